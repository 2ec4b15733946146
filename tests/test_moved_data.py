"""Runs whose data has moved since: every command that needs it takes ``--data-root``."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from sparse_moon.app import run_folder
from sparse_moon.app.cli import main
from sparse_moon.app.trainer import Trainer
from sparse_moon.files import read_json

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


def test_an_interrupted_run_goes_on(moved, monkeypatch, capsys):
    run_epoch = Trainer.run_epoch

    def interrupted(self, bar):
        if self.epoch:
            raise KeyboardInterrupt
        run_epoch(self, bar)

    monkeypatch.setattr(Trainer, "run_epoch", interrupted)
    with pytest.raises(SystemExit):
        main(["train", *OPTIONS, "--data-root", "old", "--out", "run"])
    monkeypatch.setattr(Trainer, "run_epoch", run_epoch)
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
