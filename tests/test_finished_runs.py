"""Finished runs that are evaluated again, with other OOD sets and scores: nothing is lost, nothing is mixed up."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sparse_moon import files
from sparse_moon.app import run_folder
from sparse_moon.app.cli import main
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.train import train

CONFIG = TrainConfig(
    model="mlp", width=16, epochs=1, batch_size=256, interval=2, reliability="none", ood=["noise"], score=["msp"]
)
OPTIONS = ["--model", "mlp", "--width", "16", "--epochs", "1", "--batch-size", "256", "--interval", "2",
           "--reliability", "none", "--score", "msp", "--out", "all"]  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:.* never updates the topology:UserWarning")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """By their OOD sets runs that nothing has happened to."""
    folder = tmp_path_factory.mktemp("trained")
    for name, changes in (("noise", {}), ("default", {"ood": None}), ("held", {"holdout": 0.2})):
        train(replace(CONFIG, **changes), folder / name, progress=False)
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of one, alone in the folder ``all``, beside files of images."""
    monkeypatch.chdir(tmp_path)
    for name, lowest in (("b1", 0), ("b2", 170)):
        images = np.random.default_rng(lowest).integers(lowest, lowest + 80, (60, 8, 8))
        np.savez(f"{name}.npz", x=images.astype(np.uint8))
    return shutil.copytree(trained / "noise", tmp_path / "all" / "run")


def compare(*options):
    main(["compare", *OPTIONS, *options])


def evaluate(*options):
    main(["compare", "--out", "all", "--evaluate", *options])


def refused(capsys, command, *options, code):
    """What a command says that ends with this code."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command(*options)
    assert stop.value.code == code
    return "".join(capsys.readouterr())


def ood(run):
    return files.read_json(run / run_folder.RESULTS)["ood"]


def test_an_ood_set_from_another_file_needs_another_name(run, capsys):
    compare("--ood", "noise", "b=b1.npz")
    before = ood(run)
    message = "it has the OOD set b=b1.npz, got b=b2.npz: give that another name"
    assert message in refused(capsys, compare, "--ood", "noise", "b=b2.npz", code=1)
    assert message in refused(capsys, evaluate, "--ood", "b=b2.npz", code=2)
    compare("--ood", "noise", "b=./b1.npz")  # the same file
    assert ood(run) == before
    compare("--ood", "noise", "c=b2.npz")
    evaluate("--ood", "b=b1.npz")
    assert ood(run)["b"]["msp"] == before["b"]["msp"] != ood(run)["c"]["msp"]


def test_a_default_ood_set_is_not_taken_for_a_file_of_its_name(trained, run, capsys):
    default = shutil.copytree(trained / "default", run.parent / "default")
    shutil.rmtree(run)
    before = ood(default)
    message = "it has the OOD set letters, got letters=b1.npz: give that another name"
    assert message in refused(capsys, compare, "--ood", "letters=b1.npz", code=1)
    compare("--ood", "letters")
    assert ood(default) == before


def test_results_that_do_not_say_where_their_ood_sets_came_from_are_read(run):
    compare("--ood", "noise", "b=b1.npz")
    results = files.read_json(run / run_folder.RESULTS)
    assert results.pop("ood_specs") == {"b": "b=b1.npz"}
    files.write_json(run / run_folder.RESULTS, results)
    compare("--ood", "noise", "b=b1.npz")
    assert files.read_json(run / run_folder.RESULTS) == results
    evaluate("--ood", "b=b1.npz")
    assert ood(run)["b"]["msp"] == results["ood"]["b"]["msp"]


def test_scores_are_added_to_the_ood_sets_that_are_asked_for(run, capsys):
    compare("--ood", "noise", "b=b1.npz")
    compare("--ood", "noise", "--score", "energy")
    assert {name: {*by_score} for name, by_score in ood(run).items()} == {"noise": {"msp", "energy"}, "b": {"msp"}}
    capsys.readouterr()
    compare("--ood", "noise", "--score", "energy")
    assert "evaluated" not in capsys.readouterr().out


def test_a_headline_that_a_finished_run_lacks_is_added(run, capsys):
    asked = ["compare", *OPTIONS, "--ood", "noise", "--headline", "energy"]
    place = asked.index("--score")
    command = [*asked[:place], *asked[place + 2 :]]  # no scores, which are all for a new run
    main(command)
    assert {*ood(run)["noise"]} == {"msp", "energy"}
    assert "AUROC % far, energy" in capsys.readouterr().out
    main(command)
    assert "evaluated" not in capsys.readouterr().out
    evaluate("--score", "knn: k=7", "--headline", "knn: k=7")
    assert "AUROC % far, knn:k=7" in capsys.readouterr().out
    main([*command[:-1], "knn:k = 7"])
    assert "evaluated" not in capsys.readouterr().out


def test_what_held_out_images_chose_stays(trained, run):
    shutil.rmtree(run)
    run = shutil.copytree(trained / "held", run)
    evaluate("--score", "dice")
    chosen = files.read_json(run / run_folder.RESULTS)["dice"]
    evaluate("--score", "dice:score=energy")
    both = files.read_json(run / run_folder.RESULTS)["dice"]
    assert chosen.keys() == {"p"} and both.keys() == {"p", "dice:score=energy"} and both["p"] == chosen["p"]


@pytest.fixture
def evaluated(run):
    """A run that was evaluated on more sets, with more scores."""
    evaluate("--ood", "noise", "photos", "b=b1.npz", "--score", "msp", "knn:k=5")
    return run


def contents(run):
    return {path.name: path.read_bytes() for path in run.iterdir()}


def test_timing_a_finished_run_keeps_what_it_was_evaluated_on(evaluated):
    before = contents(evaluated)
    results = files.read_json(evaluated / run_folder.RESULTS)
    assert results["ood"].keys() == {"noise", "photos", "b"}
    assert all(by_score.keys() == {"msp", "knn:k=5"} for by_score in results["ood"].values())
    main(["train", "--resume", "--time-dense", "--quiet", "--out", str(evaluated)])
    timed = files.read_json(evaluated / run_folder.RESULTS)
    assert timed["steps"].pop("beside_dense")["dense_ms"] > 0 and timed == results
    changed = {name for name, content in contents(evaluated).items() if content != before[name]}
    assert changed == {run_folder.RESULTS, run_folder.REPORT}
    assert "photos" in (page := (evaluated / run_folder.REPORT).read_text()) and "Over dense" in page


@pytest.mark.parametrize("name", [run_folder.CONFIG, run_folder.METRICS, run_folder.SCORES, run_folder.REPORT])
def test_a_file_of_a_finished_run_comes_back_as_it_was(evaluated, name):
    main(["train", "--resume", "--time-dense", "--quiet", "--out", str(evaluated)])
    before, kept = contents(evaluated), run_folder.read_scores(evaluated)
    (evaluated / name).unlink()
    main(["train", "--resume", "--quiet", "--out", str(evaluated)])
    after, found = contents(evaluated), run_folder.read_scores(evaluated)
    same = {name for name in before if before[name] == after[name]} | {run_folder.SCORES}  # in another order
    assert same == before.keys() == after.keys()
    assert found.keys() == kept.keys() and all(np.array_equal(found[key], kept[key]) for key in kept)


def test_scores_do_not_come_back_where_it_is_not_known_of_which_images(evaluated):
    results = files.read_json(evaluated / run_folder.RESULTS)
    del results["ood_specs"]["b"]
    files.write_json(evaluated / run_folder.RESULTS, results)
    (evaluated / run_folder.SCORES).unlink()
    before = contents(evaluated)
    with pytest.raises(
        ValueError, match=r"scores\.npz is gone, and results\.json does not say where b came from: with"
    ):
        train(CONFIG, evaluated, resume=True, progress=False)
    assert contents(evaluated) == before


def test_runs_that_cannot_be_evaluated_leave_the_others_alone(trained, run, capsys):
    moon = run.parent / "a-moon"
    train(replace(CONFIG, reliability="moon", epochs=2, stop=0.5), moon, progress=False)
    for seed, (name, lacking) in enumerate(
        (("no-checkpoint", run_folder.CHECKPOINT), ("no-scores", run_folder.SCORES))
    ):
        shutil.copytree(trained / "noise", run.parent / name)
        files.write_json(run.parent / name / run_folder.CONFIG, replace(CONFIG, seed=seed + 1).to_dict())
        (run.parent / name / lacking).unlink()
    before = {path.name: contents(path) for path in run.parent.iterdir() if path != moon}
    assert "no run could be evaluated again; a-moon: unknown scores ['mps']" in refused(
        capsys, evaluate, "--score", "mps", code=2
    )
    assert contents(run) == contents(trained / "noise")

    printed = refused(capsys, evaluate, "--score", "unknown", code=1)
    assert "3 runs failed: no-checkpoint, no-scores, run" in printed
    for name, reason in (
        ("no-checkpoint", "all/no-checkpoint/checkpoint.pt does not exist: it was removed since"),
        ("no-scores", "all/no-scores/scores.npz does not exist"),
        ("run", "the unknown score needs 8 + 1 outputs"),
    ):
        assert f"{name}: FAILED to evaluate it again: {reason}" in printed
    assert all(contents(path) == before[path.name] for path in run.parent.iterdir() if path.name in before)
    assert ood(moon)["noise"].keys() == {"msp", "unknown"}
    auroc = ood(moon)["noise"]["unknown"]["auroc"]
    assert f" | {100 * auroc:.2f} |\n| rigl none 0.9 epochs=1" in (run.parent / "table.md").read_text()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--ece-bins", "3"], "--ece-bins"),
        (["--seed", "1", "--method", "set", "--jobs", "2"], "--seed, --method, --jobs"),
        (["--sweep", "final_weight=1,2"], "--sweep"),
        (["--config", "c.yaml"], "--lr"),
    ],
)
def test_an_evaluation_takes_no_settings_of_training(run, capsys, options, named):
    Path("c.yaml").write_text("lr: 0.1\nood: [noise]\n")
    before = contents(run)
    message = f"evaluates all finished runs, with the settings that they have: leave out {named}\n"
    assert message in refused(capsys, evaluate, "--score", "energy", *options, code=2)
    assert contents(run) == before
