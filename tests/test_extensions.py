"""A user's own detector and model: one file outside the package, and nothing else."""

import json
import subprocess
import sys
from typing import get_args

import pytest
import torch
from torch import nn

import sparse_moon as sm
from small_own import own_files, refused
from sparse_moon.app import models, run_folder
from sparse_moon.app.cli import main
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.names import ModelName, Score
from sparse_moon.ood import DETECTORS, SCORES, Energy, Outputs, ReAct, detector_class, load_detector, save_detector

DETECTOR = '''
from torch import Tensor

from sparse_moon.ood import Detector, Outputs


class NegativeEntropy(Detector):
    """Minus the entropy over its mean on the training set."""

    name = "negative-entropy"
    learned = ("mean",)
    mean: Tensor | None

    def __init__(self, num_classes: int, temperature: float = 2.0) -> None:
        super().__init__(num_classes)
        self.temperature = temperature

    def start(self) -> None:
        self._values: list[Tensor] = []

    def update(self, batch: Outputs) -> None:
        self._values += self._entropy(batch)

    def finish(self) -> None:
        self.mean = sum(self._values) / len(self._values)

    def _entropy(self, outputs: Outputs) -> Tensor:
        p = (outputs.logits.double() / self.temperature).softmax(1)
        return -(p * p.clamp(min=1e-300).log()).sum(1)

    def score(self, outputs: Outputs) -> Tensor:
        return -self._entropy(outputs) / self.fitted(self.mean)
'''

MODEL = """
from torch import nn


def make_net(num_outputs: int, in_channels: int, image_size: int, width: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(width * (image_size // 2) ** 2, 32), nn.ReLU(), nn.Linear(32, num_outputs),
    )


def fixed_width(num_outputs: int, in_channels: int, image_size: int) -> nn.Module:
    return make_net(num_outputs, in_channels, image_size)


def one_output_less(num_outputs: int, in_channels: int, image_size: int) -> nn.Module:
    return make_net(num_outputs - 1, in_channels, image_size)


def log_probabilities(num_outputs: int, in_channels: int, image_size: int) -> nn.Module:
    return nn.Sequential(make_net(num_outputs, in_channels, image_size), nn.LogSoftmax(1))


def no_module(num_outputs: int, in_channels: int, image_size: int) -> None:
    return None


SIZE = 3
"""

OWN_DETECTOR, OWN_MODEL = "own_detector.NegativeEntropy", "own_model.make_net"
QUICK = ["--epochs", "2", "--interval", "4", "--batch-size", "256", "--quiet", "--ood", "noise"]
pytestmark = pytest.mark.filterwarnings("ignore:.* never updates the topology:UserWarning")


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """The two files on the path, and forgotten afterwards."""
    with own_files(tmp_path, monkeypatch, (SCORES, DETECTORS), own_detector=DETECTOR, own_model=MODEL):
        yield tmp_path


def python(folder, code):
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append('.'); {code}"], cwd=folder, capture_output=True, text=True
    )


def test_an_own_model_and_an_own_detector_from_training_to_service(own, capsys):
    run, file = own / "run", own / "detector.pt"
    main(["train", *QUICK, "--model", OWN_MODEL, "--width", "6", "--out", str(run)])
    assert json.loads((run / run_folder.CONFIG).read_text())["model"] == OWN_MODEL
    capsys.readouterr()

    main(["eval", str(run), "--score", OWN_DETECTOR, "msp", "--json", "--ood", "noise", "letters"])
    ood = json.loads(capsys.readouterr().out)["ood"]
    assert ood.keys() == {"noise", "letters"}
    assert all(by_score.keys() == {"negative-entropy", "msp"} for by_score in ood.values())
    assert "negative-entropy" in DETECTORS and detector_class("negative-entropy") is detector_class(OWN_DETECTOR)

    # by name once imported, and among all that fit
    main(["eval", str(run), "--score", "negative-entropy", "--json"])
    assert json.loads(capsys.readouterr().out)["ood"]["noise"]["negative-entropy"] == ood["noise"]["negative-entropy"]
    main(["eval", str(run), "--json"])
    assert list(json.loads(capsys.readouterr().out)["ood"]["noise"])[-1] == "negative-entropy"

    main(["eval", str(run), "--score", OWN_DETECTOR, "--save-detector", str(file)])
    detector = load_detector(file)
    assert type(detector) is SCORES["negative-entropy"] and detector.mean is not None
    outputs = Outputs(torch.randn(5, 9), None)
    assert detector.accepts(outputs).shape == (5,)


def test_a_files_modules_are_named_and_not_imported(own):
    (own / "save.py").write_text(
        "import torch\nfrom own_detector import NegativeEntropy\nfrom sparse_moon.ood import Outputs, save_detector\n"
        "save_detector('d.pt', NegativeEntropy(3, 1.5).fit(Outputs(torch.eye(3), None)))\n"
    )
    assert python(own, "import save").returncode == 0
    load = "from sparse_moon.ood import load_detector\n"
    strange = python(own, load + "try: load_detector('d.pt')\nfinally: print('own_detector' in sys.modules)")
    assert strange.stdout == "False\n" and strange.returncode != 0
    assert f"no detector {OWN_DETECTOR} is known: import own_detector" in strange.stderr
    known = python(own, load + "import own_detector\nd = load_detector('d.pt')\nprint(d.name, d.temperature)")
    assert known.stdout == "negative-entropy 1.5\n"


def test_the_working_folder_is_searched_and_a_run_asks_for_its_module(own):
    program = [sys.executable, "-c", "from sparse_moon.app.cli import main; main()"]

    def call(*argv):
        return subprocess.run([*program, *argv], cwd=own, capture_output=True, text=True)

    done = call("train", *QUICK, "--model", OWN_MODEL, "--out", "run")
    assert done.returncode == 0, done.stderr
    asks = call("eval", "run", "--score", "msp")
    assert asks.returncode == 2 and f"{OWN_MODEL} is not imported: import own_model first" in asks.stderr
    for argv in (("eval", "run", "--score", "msp"), ("export", "run", "--dense", "dense.pt")):
        done = call(*argv, "--model", OWN_MODEL)
        assert done.returncode == 0, done.stderr
    other = call("eval", "run", "--model", "own_model.fixed_width")
    assert f"{OWN_MODEL} is not imported" in other.stderr or f"the run has the model {OWN_MODEL}" in other.stderr
    again = call("train", *QUICK, "--model", OWN_MODEL, "--out", "run", "--resume")
    assert again.returncode == 0, again.stderr


LOAD = "import own_detector; from sparse_moon.ood import load_detector; print(load_detector('d.pt').name)"


@pytest.mark.parametrize(("name", "text", "model", "score", "load", "printed"), [
    ("own_detector.py", DETECTOR, "mlp", OWN_DETECTOR, ["-c", f"import sys; sys.path.append('.'); {LOAD}"],
     "negative-entropy"),
    ("own_model.py", MODEL, OWN_MODEL, "dice", ["-m", "sparse_moon", "eval", "run", "--model", OWN_MODEL], "dice"),
])  # fmt: skip
def test_one_file_is_all_that_is_needed(tmp_path, name, text, model, score, load, printed):
    """Trained, evaluated, saved and loaded, each in a process of its own that finds nothing but that file."""
    folder = tmp_path / "alone"
    folder.mkdir()
    (folder / name).write_text(text)
    own = ["--model", model] if model != "mlp" else []
    for argv in (
        ["-m", "sparse_moon", "train", *QUICK, "--model", model, "--out", "run"],
        ["-m", "sparse_moon", "eval", "run", *own, "--score", score, "--save-detector", "d.pt"],
        load,
    ):
        done = subprocess.run([sys.executable, *argv], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert printed in done.stdout
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {name, "run", "d.pt"}


def test_compare_trains_and_evaluates_an_own_model(own, capsys):
    runs = str(own / "runs")
    main(["compare", *QUICK, "--model", OWN_MODEL, "--method", "static", "--reliability", "none", "--out", runs])
    main(["compare", "--out", runs, "--model", OWN_MODEL, "--evaluate", "--score", OWN_DETECTOR, "--quiet"])
    (results,) = own.glob(f"runs/*/{run_folder.RESULTS}")
    assert {"msp", "negative-entropy"} <= json.loads(results.read_text())["ood"]["noise"].keys()


@pytest.mark.parametrize("reliability", ["none", "moon"])
def test_a_model_that_does_not_end_in_a_linear_layer_is_trained_to_its_results(own, reliability):
    settings = {"model": "own_model.log_probabilities", "reliability": reliability, "ood": ["noise"], "epochs": 2}
    with pytest.warns(UserWarning, match="scores left out, which this data or model does not allow: dice "):
        results = sm.train(settings, method="static", batch_size=256, out=own / "run", progress=False)
    assert results["left_out"].keys() == {"dice", "react", "vim", "ash", "scale", "gradnorm"}
    assert {"msp", "energy", "odin", "knn"} <= results["ood"]["noise"].keys()


def test_flops_of_an_own_model(capsys):
    main(["flops", "--model", OWN_MODEL, "--input", "1,8,8", "--classes", "3", "--json"])
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "no_such_module.make"], "no_such_module.make: importing no_such_module failed: ModuleNotFoundErr"),
        (["--model", "own_model.nothing"], "the module own_model has no nothing"),
        (
            ["--model", "own_model.SIZE"],
            "own_model.SIZE cannot be called with num_outputs=9, in_channels=1, image_size=8: 3",
        ),
        (
            ["--model", "own_model.fixed_width", "--width", "3"],
            "cannot be called with num_outputs=9, in_channels=1, image_size=8, width=3: got an",
        ),
        (["--model", "own_model.no_module"], "own_model.no_module must return an nn.Module, got NoneType"),
        (["--model", "own_model.one_output_less"], "expected logits (1, 9) for images (1, 1, 8, 8), got (1, 8)"),
        (
            ["--model", OWN_MODEL, "--reliability", "generalized-odin"],
            "replaces the nn.Linear fc of a model, own_model",
        ),
        (["--model", "own model.make"], "or your own as package.module.name, got own model.make"),
    ],
)
def test_models_that_do_not_fit_get_one_line(own, capsys, options, message):
    assert message in refused(capsys, "train", *QUICK, *options, "--out", own / "run")


def test_scores_that_are_not_detectors_get_one_line(own, capsys):
    main(["train", *QUICK, "--model", "mlp", "--out", str(own / "run")])
    capsys.readouterr()
    for score, message in (
        ("no_such_module.Score", "importing no_such_module failed"),
        ("own_detector.Tensor", "no detector own_detector.Tensor is known: import own_detector, where it must be a"),
    ):
        assert message in refused(capsys, "eval", own / "run", "--score", score)
    assert "the run has the model mlp" in refused(capsys, "eval", own / "run", "--model", OWN_MODEL)


def test_names_stay_distinct_and_a_class_may_be_defined_anew(own):
    def define(module, name):
        content = {"__module__": module, "__qualname__": "Mine", "name": name, "score": Energy.score}
        return type("Mine", (Energy,), content)

    first = define("own_module", "mine")
    assert SCORES["mine"] is first and DETECTORS["mine"](3).num_classes == 3
    second = define("own_module", "mine")
    assert SCORES["mine"] is second
    save_detector(own / "d.pt", ReAct(second(3)).fit(Outputs(torch.eye(3), torch.eye(3), None, None)))
    assert type(load_detector(own / "d.pt").detector) is second
    with pytest.raises(ValueError, match=r"'mine': own_module\.Mine and other\.Mine"):
        define("other", "mine")
    with pytest.raises(ValueError, match=r"'msp': MSP and other\.Mine"):
        define("other", "msp")


def test_settings_take_an_import_path_as_a_model(own):
    config = TrainConfig(model=OWN_MODEL)
    assert type(config.model) is str
    with pytest.raises(
        ValueError, match=r"model must be one of mlp, .* or your own as package\.module\.name, got 'vgg'"
    ):
        TrainConfig(model="vgg")
    with pytest.raises(ValueError, match="own_model first"):
        models.build(OWN_MODEL, 3, in_channels=1, image_size=8)
    import own_model

    network = models.build(OWN_MODEL, 3, in_channels=1, image_size=8, width=4)
    assert network.training and isinstance(network[0], nn.Conv2d) and network[0].out_channels == 4
    assert own_model.SIZE == 3


def test_one_light_list_of_names_is_what_is_registered():
    assert list(get_args(ModelName)) == list(models.MODELS)
    assert set(get_args(Score)) == set(SCORES) == {*DETECTORS, "godin", "temperature"}
