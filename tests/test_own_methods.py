"""A user's own training method and reliability method: one file outside the package, and nothing else."""

import json
import subprocess
import sys

import pytest
import torch

from small_own import own_files, refused
from sparse_moon import files
from sparse_moon.algorithms import ALGORITHMS, RigL
from sparse_moon.app import comparison, run_folder
from sparse_moon.app.cli import main
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.evaluate import load_run
from sparse_moon.reliability import RELIABILITY, Reliability

METHOD = '''
from dataclasses import dataclass
from typing import Annotated

from sparse_moon import SET
from sparse_moon.settings import SHARE


@dataclass(frozen=True)
class Options:
    """Of SET that lets some weights of a layer alone.

    Args:
        left_alone: share of the weights that an update never drops.
    """

    left_alone: Annotated[float, SHARE] = 0.5


class CautiousSET(SET):
    name = "cautious-set"
    Options = Options

    def __init__(self, model, optimizer, *, left_alone=0.5, **arguments):
        self.left_alone = left_alone
        super().__init__(model, optimizer, **arguments)

    @classmethod
    def arguments(cls, options, run):
        return {**super().arguments(options, run), "left_alone": options.left_alone}

    def counts(self, layer):
        count = min(super().counts(layer)[0], int((1 - self.left_alone) * layer.topology.num_blocks))
        return count, count

    @classmethod
    def training_flops(cls, flops):
        return 0.125


class SecondSET(CautiousSET):
    name = "second-set"


class Unset(SET):
    name = "unset"

    class Options:
        left_alone: float


class NotAMethod:
    name = "not-a-method"
'''

RELIABLE = '''
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from sparse_moon.options import VotingOptions
from sparse_moon.reliability import Reliability
from sparse_moon.reliability.voting import Voting
from sparse_moon.settings import AT_LEAST_0


@dataclass(frozen=True)
class Options(VotingOptions):
    """Args:
    entropy_weight: weight of the predictions' mean entropy, which is subtracted from the loss.
    """

    entropy_weight: Annotated[float, AT_LEAST_0] = 0.1


class Confident(nn.Module):
    """Cross-entropy minus entropy (Pereyra et al. 2017), which counts its batches."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, logits, target):
        self.batches += 1
        log_p = logits.float().log_softmax(1)
        return nn.functional.nll_loss(log_p, target) + self.weight * (log_p.exp() * log_p).sum(1).mean()


class ConfidencePenalty(Voting):
    name = "confidence-penalty"
    Options = Options
    parts = ("penalty",)

    @property
    def averages(self):
        return False

    def make_loss(self, model):
        return Confident(0.0 if "penalty" in self.without else self.options.entropy_weight)

    def metrics(self):
        return {"batches": float(self.loss.batches)}

    def vote(self, model):
        self.voted = getattr(self, "voted", 0) + 1

    @classmethod
    def overhead(cls, cost):
        loss = 4.0 * cost.num_classes * cost.examples * cost.epochs
        return {"loss": loss, "total": loss, "ratio": loss / cost.training_flops}


class Taken(Reliability):
    """Does nothing, and says so under a name of its own; with an option that the training method has otherwise."""

    name = "taken"

    @dataclass(frozen=True)
    class Options:
        left_alone: int = 3


class Hidden(Reliability):
    """With an option that has the name of a setting, and another default than that."""

    name = "hidden"

    @dataclass(frozen=True)
    class Options:
        keep: float = 0.5


class Shared(Reliability):
    """With a setting as an option."""

    name = "shared"

    @dataclass(frozen=True)
    class Options:
        keep: float = 0.9
'''

OWN = {"method": "own_method.CautiousSET", "reliability": "own_reliable.ConfidencePenalty"}
CHOSEN = [word for name, path in OWN.items() for word in (f"--{name}", path)]
QUICK = ["--model", "mlp", "--width", "16", "--epochs", "4", "--interval", "3", "--batch-size", "256", "--stop", "0.5"]
QUICK += ["--ood", "noise", "--quiet"]
pytestmark = pytest.mark.filterwarnings("ignore:.* never updates the topology:UserWarning")


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """The two files on the path, and forgotten afterwards."""
    registries = ALGORITHMS, RELIABILITY
    with own_files(tmp_path, monkeypatch, registries, own_method=METHOD, own_reliable=RELIABLE):
        yield tmp_path


def call(folder, *argv):
    """The command in another process, whose working folder has the two files."""
    code = "from sparse_moon.app.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *argv], cwd=folder, capture_output=True, text=True)


def test_a_run_with_both_from_training_to_service(own, capsys):
    run = own / "run"
    options = ["--left-alone", "0.75", "--entropy-weight", "0.2", "--vote-from", "0.25"]
    main(["train", *QUICK, *CHOSEN, *options, "--out", str(run)])
    config = files.read_json(run / run_folder.CONFIG)
    assert {name: config[name] for name in OWN} == OWN and config["vote_from"] == 0.25
    assert config["own"] == {"left_alone": 0.75, "entropy_weight": 0.2}
    rows = run_folder.read_metrics(run)
    assert [row["batches"] for row in rows] == [4.0, 8.0, 12.0, 16.0] and rows[0]["topology_updates"] > 0
    results = json.loads((run / run_folder.RESULTS).read_text())
    assert results["flops"]["train_ratio"] == 0.125

    finished = load_run(run)
    assert finished.config.make_reliability().options.entropy_weight == 0.2
    assert TrainConfig.from_dict(config) == finished.config
    capsys.readouterr()
    main(["eval", str(run), *CHOSEN, "--score", "msp", "--json"])
    ood = json.loads(capsys.readouterr().out)["ood"]
    assert ood["noise"]["msp"] == results["ood"]["noise"]["msp"]
    main(["export", str(run), "--dense", str(own / "dense.pt"), *CHOSEN])
    assert "the run has the method own_method.CautiousSET" in refused(
        capsys, "eval", run, "--method", "own_method.SecondSET"
    )
    other = refused(capsys, "train", *QUICK, *CHOSEN, "--resume", "--left-alone", "0.6", "--out", run)
    assert "has left_alone 0.75, it cannot be resumed with 0.6" in other


def test_the_options_count(own):
    weights = {}
    for options in ([], ["--left-alone", "1"], ["--entropy-weight", "2"], ["--without", "penalty"]):
        folder = own / str(len(weights))
        main(["train", *QUICK, *CHOSEN, *options, "--out", str(folder)])
        weights[tuple(options)] = load_run(folder).network.state_dict()
    first, *others = weights.values()
    for other in others:
        assert any(first[name].shape != other[name].shape or (first[name] != other[name]).any() for name in first)


def test_a_resumed_run_ends_with_the_same_bits(own, monkeypatch):
    main(["train", *QUICK, *CHOSEN, "--left-alone", "0.25", "--out", str(own / "whole")])
    write, written = run_folder.write_checkpoint, []

    def interrupting(*arguments):
        write(*arguments)
        written.append(1)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_folder, "write_checkpoint", interrupting)
    with pytest.raises(SystemExit):
        main(["train", *QUICK, *CHOSEN, "--left-alone", "0.25", "--out", str(own / "cut")])
    monkeypatch.setattr(run_folder, "write_checkpoint", write)
    # nothing but the names has to be said again
    main(["train", "--quiet", *CHOSEN, "--resume", "--out", str(own / "cut")])
    whole, cut = (run_folder.read_checkpoint(own / name) for name in ("whole", "cut"))
    assert all(torch.equal(whole["model"][name], cut["model"][name]) for name in whole["model"])
    assert torch.equal(whole["loss"]["batches"], cut["loss"]["batches"]) and whole["loss"]["batches"] == 16


def test_only_what_is_typed_is_imported(own):
    done = call(own, "train", *QUICK, *CHOSEN, "--out", "run")
    assert done.returncode == 0, done.stderr
    for argv in (("eval", "run", "--score", "msp"), ("train", "--resume", "--out", "run")):
        asks = call(own, *argv)
        assert asks.returncode == 2 and "no method own_method.CautiousSET is known: import own_method" in asks.stderr
        done = call(own, *argv, *CHOSEN)
        assert done.returncode == 0, done.stderr


def test_compare_trains_them_beside_ours(own, capsys):
    runs = own / "runs"
    main([
        "compare", *QUICK, "--method", "set", OWN["method"], "--reliability", "none", OWN["reliability"],
        f"{OWN['reliability']}:-penalty", "--left-alone", "0.75", "--out", str(runs),
    ])  # fmt: skip
    table = json.loads((runs / comparison.TABLE).read_text())
    labels = {row["label"].split(" own=")[0] for row in table["rows"]}
    ours = {f"{method} {reliability} 0.9" for method in ("set", OWN["method"]) for reliability in
            ("none", OWN["reliability"], f"{OWN['reliability']}:-penalty")}  # fmt: skip
    assert labels == ours
    main(["compare", "--out", str(runs), "--method", OWN["method"], "--reliability", OWN["reliability"], "--evaluate",
          "--score", "energy", "--quiet"])  # fmt: skip


def test_flops_of_an_own_method_and_of_an_own_reliability_method(own, capsys):
    main(["flops", "--model", "mlp", "--input", "1,8,8", "--classes", "8", "--method", OWN["method"], "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["train_ratio"] == 0.125 and report["overhead"].keys() == {"moon", "cigl"}
    asked = ["flops", "--model", "mlp", "--input", "1,8,8", "--classes", "8", "--reliability", OWN["reliability"]]
    main([*asked, "--json"])
    assert json.loads(capsys.readouterr().out)["overhead"].keys() == {"moon", "cigl", "confidence-penalty"}
    main(asked)
    assert "ConfidencePenalty adds to training" in capsys.readouterr().out


def test_help_has_their_options(own, capsys):
    with pytest.raises(SystemExit):
        main(["train", *CHOSEN, "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "share of the weights that an update never drops" in out and "--entropy-weight" in out
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "--left-alone" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "nowhere.Method"], "nowhere.Method: importing nowhere failed: ModuleNotFoundError"),
        (["--method", "own_method.Nothing"], "no method own_method.Nothing is known: import own_method, where it must"),
        (["--method", "own_method.NotAMethod"], "where it must be a Method with a name of its own"),
        (["--reliability", "own_method.CautiousSET"], "where it must be a Reliability with a name of its own"),
        ([*CHOSEN, "--left-alone", "2"], "left_alone must be in [0, 1], got 2.0"),
        ([*CHOSEN, "--left-alone", "much"], "--left-alone must be a number, got much"),
        ([*CHOSEN, "--without", "loss"], "has the parts ('penalty',) to leave out, got ('loss',)"),
        (["--left-alone", "0.5"], "unknown option --left-alone"),
        (["--method", "own_method.Unset"], "Unset.Options must be a frozen dataclass whose fields have defaults"),
        (
            ["--method", OWN["method"], "--reliability", "own_reliable.Taken"],
            "Taken.Options and Options have different options left_alone",
        ),
        (["--reliability", "own_reliable.Hidden"], "Hidden.Options has the default 0.5 for keep, which is"),
        (["--reliability", "own_reliable.Hidden", "--keep", "0.5"], "0.9 there: give it that default, or another name"),
        (["--reliability", "own_reliable.Shared", "--keep", "2"], "keep must be in (0, 1], got 2.0"),
    ],
)
def test_what_does_not_fit_gets_one_line(own, capsys, options, message):
    assert message in refused(capsys, "train", *QUICK, *options, "--out", own / "run")
    assert not (own / "run").exists()


def test_names_are_distinct_and_abstract_classes_have_none():
    with pytest.raises(ValueError, match=r"methods need distinct names, two are called 'rigl': RigL and here\.Mine"):
        type("Mine", (RigL,), {"__module__": "here", "__qualname__": "Mine", "name": "rigl"})
    with pytest.raises(ValueError, match=r"'moon': MOON and here\.Mine"):
        type("Mine", (Reliability,), {"__module__": "here", "__qualname__": "Mine", "name": "moon"})
    before = dict(ALGORITHMS), dict(RELIABILITY)
    type("Abstract", (RigL,), {"__module__": "here", "__qualname__": "Abstract"})
    type("Abstract", (Reliability,), {"__module__": "here", "__qualname__": "Abstract"})
    assert before == (ALGORITHMS, RELIABILITY)
