"""Runs whose data has moved since, or whose device is not here: commands take ``--data-root`` and ``--device``."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparse_moon.app import run_folder
from sparse_moon.app.cli import main
from sparse_moon.app.datasets import load
from sparse_moon.app.run_data import difference, identity
from sparse_moon.app.trainer import Trainer
from sparse_moon.files import read_json, write_json

OPTIONS = ["--dataset", "mnist", "--model", "mlp", "--width", "8", "--epochs", "2", "--interval", "5", "--score", "msp",
           "--ood", "noise", "--quiet"]  # fmt: skip


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """Where the data is now, with other test labels; ``old`` beside it is where it was."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    x, y = random.integers(0, 255, (400, 8, 8), dtype=np.uint8), np.arange(400) % 4
    for folder, labels in (("old", y[:80]), ("new", np.zeros(80, dtype=int))):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / "mnist.npz", x_train=x, y_train=y, x_test=x[:80], y_test=labels)
    return "new"


def accuracy(capsys, *options):
    main(["eval", "run", "--score", "msp", "--json", *options])
    return json.loads(capsys.readouterr().out)["id"]["accuracy"]


def refused(capsys, *command):
    with pytest.raises(SystemExit) as stop:
        main(list(command))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_finished_run_is_evaluated_and_exported(moved, capsys):
    main(["train", *OPTIONS, "--data-root", "old", "--out", "run"])
    capsys.readouterr()
    assert accuracy(capsys) != accuracy(capsys, "--data-root", moved)
    shutil.rmtree("old")
    assert "was not found: looked for old" in refused(capsys, "eval", "run")
    assert 0 <= accuracy(capsys, "--data-root", moved) <= 1
    main(["export", "run", "--dense", "dense.pt", "--data-root", moved])


def interrupt(monkeypatch, *options):
    """A run of which one epoch is done."""
    run_epoch = Trainer.run_epoch

    def interrupted(self, bar):
        if self.epoch:
            raise KeyboardInterrupt
        run_epoch(self, bar)

    monkeypatch.setattr(Trainer, "run_epoch", interrupted)
    with pytest.raises(SystemExit):
        main(["train", *OPTIONS, "--data-root", "old", "--out", "run", *options])
    monkeypatch.setattr(Trainer, "run_epoch", run_epoch)


def test_an_interrupted_run_goes_on(moved, monkeypatch, capsys):
    interrupt(monkeypatch)
    shutil.rmtree("old")
    main(["train", "--resume", "--out", "run", "--data-root", moved, "--quiet"])
    config = read_json(Path("run") / run_folder.CONFIG)
    assert config["data_root"] == moved and config["width"] == 8
    assert read_json(Path("run") / run_folder.RESULTS)["epochs"] == 2


def test_a_comparison_goes_on_and_is_evaluated_again(moved, capsys):
    one = ["--method", "static", "--sparsity", "0.5", "--out", "many"]
    main(["compare", *OPTIONS, *one, "--data-root", "old"])
    shutil.rmtree("old")
    place = OPTIONS.index("noise") + 1
    more = ["compare", *OPTIONS[:place], "letters", *OPTIONS[place:], *one]
    with pytest.raises(SystemExit):
        main(more)
    main([*more, "--data-root", moved])
    (results,) = Path("many").glob(f"*/{run_folder.RESULTS}")
    assert set(read_json(results)["ood"]) == {"noise", "letters"}
    assert "looked for old" in refused(capsys, "compare", "--out", "many", "--evaluate")
    main(["compare", "--out", "many", "--evaluate", "--data-root", moved])


def made_on(device, run):
    """The run as one of another machine."""
    state, settings = run_folder.read_checkpoint(run), read_json(run / run_folder.CONFIG)
    write_json(run / run_folder.CONFIG, {**settings, "device": device})
    run_folder.write_checkpoint(run, {**state, "config": {**state["config"], "device": device}})


def test_a_run_of_another_machine_is_tabled_evaluated_and_goes_on_here(moved, monkeypatch, capsys):
    run = Path("many") / "run"
    options = [*OPTIONS, "--data-root", "old", "--out", str(run), "--reliability", "none"]
    interrupt(monkeypatch, *options[len(OPTIONS) :])
    made_on("cuda:99", run)
    capsys.readouterr()
    for command in (["train", "--resume", "--out", str(run)], ["train", *options, "--device", "cuda:99"]):
        assert "device 'cuda:99' cannot be used: " in refused(capsys, *command)
    main(["train", "--resume", "--out", str(run), "--device", "cpu", "--quiet"])
    assert read_json(run / run_folder.CONFIG)["device"] == "cpu"
    made_on("cuda:99", run)
    main(["compare", "--out", "many", "--table-only"])
    (row,) = read_json(Path("many") / "table.json")["rows"]
    assert row["runs"] == 1
    (run / run_folder.SCORES).unlink()
    main(["train", "--resume", "--out", str(run), "--device", "cpu"])
    assert run_folder.read_scores(run)
    main(["compare", "--out", "many", "--evaluate", "--score", "energy", "--device", "cpu"])
    assert set(read_json(run / run_folder.RESULTS)["ood"]["noise"]) == {"msp", "energy"}
    assert read_json(run / run_folder.CONFIG)["device"] == "cuda:99"
    capsys.readouterr()
    for command in (["eval", str(run)], ["compare", "--out", "many", "--evaluate"]):
        assert "device 'cuda:99' cannot be used: " in refused(capsys, *command)


def test_the_headline_of_a_table_is_the_one_that_is_asked_for(moved, capsys):
    options = [*OPTIONS[: OPTIONS.index("msp") + 1], "energy", *OPTIONS[OPTIONS.index("msp") + 1 :]]
    command = ["compare", *options, "--method", "static", "--sparsity", "0.5", "--out", "many", "--data-root", "old"]
    main(command)
    table = Path("many") / "table.json"
    assert read_json(table)["headline"] == "msp"
    main([*command, "--headline", "energy"])
    assert read_json(table)["headline"] == "energy"
    main(["compare", "--out", "many", "--table-only", "--headline", "msp"])
    assert read_json(table)["headline"] == "msp"
    message = refused(capsys, "compare", "--out", "many", "--table-only", "--headline", "knn")
    assert "headline must be a score that some of the runs have, ['msp', 'energy'], got 'knn'" in message


def changed(arrays, change):
    """Other data of the same name: more of it, or with some of it changed."""
    x, y = arrays["x_train"], arrays["y_train"]
    others = {
        "more": {"x_train": np.concatenate([x, x]), "y_train": np.concatenate([y, y])},
        "fewer to test": {"x_test": arrays["x_test"][:60], "y_test": arrays["y_test"][:60]},
        "classes": {"y_train": y % 3, "y_test": arrays["y_test"] % 3},
        "darker": {"x_train": (x * 0.3).astype(np.uint8)},
        "one pixel": {"x_train": np.where(np.arange(x.size).reshape(x.shape) == 7, 255 - x, x)},
        "order": {"x_train": x[::-1], "y_train": y[::-1]},
        "labels": {"y_train": (y + 1) % 4},
    }
    return {**arrays, **others[change]}


@pytest.mark.parametrize(("change", "message"), [
    ("more", "was trained with 400 training images, here are 800"),
    ("fewer to test", "was trained with 80 test images, here are 60"),
    ("classes", "was trained with 4 classes, here are 3"),
    ("darker", "was trained with images whose mean is [0.4"),
    ("one pixel", "was trained with other training images or labels of the same number"),
    ("order", "was trained with other training images or labels of the same number"),
    ("labels", "was trained with other training images or labels of the same number"),
])  # fmt: skip
@pytest.mark.parametrize("finished", [True, False])
def test_other_data_is_refused(moved, monkeypatch, capsys, change, message, finished):
    if finished:
        main(["train", *OPTIONS, "--data-root", "old", "--out", "run"])
        command = ["eval", "run"]
    else:
        interrupt(monkeypatch, "--holdout", "0.2")
        command = ["train", "--resume", "--out", "run"]
        message = message.replace("400", "320").replace("800", "640")  # what is not held out
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    capsys.readouterr()
    with np.load("old/mnist.npz") as file:
        np.savez("old/mnist.npz", **changed(dict(file), change))
    assert message in refused(capsys, *command)
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before


def test_checkpoints_that_do_not_say_which_data_can_be_read(moved, monkeypatch, capsys):
    interrupt(monkeypatch)
    state = run_folder.read_checkpoint(Path("run"))
    del state["data_identity"]
    run_folder.write_checkpoint(Path("run"), state)
    main(["train", "--resume", "--out", "run", "--quiet"])
    state = run_folder.read_checkpoint(Path("run"))
    assert state.pop("data_identity")["train"] == 400
    run_folder.write_checkpoint(Path("run"), state)
    capsys.readouterr()
    assert 0 <= accuracy(capsys) <= 1


def test_the_same_images_are_known_again_in_folders_and_in_another_form(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (12, 8, 8), dtype=np.uint8), np.repeat([0, 1], 6)
    for part, count in (("train", 6), ("test", 1)):
        for label, name in enumerate("ab"):
            (tmp_path / "folder" / part / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(x[6 * label + i]).save(tmp_path / "folder" / part / name / f"{i}.png")
    shutil.copytree(tmp_path / "folder", tmp_path / "elsewhere")
    np.savez(tmp_path / "x.npz", x_train=x, y_train=y, x_test=x[[0, 6]], y_test=y[[0, 6]])
    first, second, arrays = (identity(load(str(tmp_path / name))) for name in ("folder", "elsewhere", "x.npz"))
    assert first == second and first["checksum"].startswith("files ") and arrays["checksum"].startswith("pixels ")
    assert difference(first, second) is difference(first, arrays) is None
    Image.fromarray(x[0, ::-1]).save(tmp_path / "elsewhere" / "train" / "a" / "0.png")
    assert difference(first, identity(load(str(tmp_path / "elsewhere")))).startswith("other training images")
