"""Metrics for other programs: ``sparse-moon train --log``."""

import csv

import pytest

import sparse_moon as sm
from small_frameworks import EXTRA
from small_runs import killed_after
from sparse_moon.app import run_folder
from sparse_moon.app.cli import main

SMALL = ["--model", "mlp", "--width", "16", "--interval", "5", "--ood", "noise", "--quiet"]
SETTINGS = {"model": "mlp", "width": 16, "interval": 5, "ood": ["noise"]}


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def same(row, metrics):
    return all(row[name] == ("" if name not in metrics else str(metrics[name])) for name in row)


def test_a_csv_has_a_line_an_epoch(tmp_path):
    main(["train", *SMALL, "--epochs", "3", "--log", "csv", "--out", str(tmp_path / "run")])
    found, metrics = rows(tmp_path / "run"), run_folder.read_metrics(tmp_path / "run", 3)
    assert [row["epoch"] for row in found] == ["1", "2", "3"]
    assert all(same(row, one) for row, one in zip(found, metrics, strict=True))
    assert {"loss", "test_accuracy", "density", "step_ms", "time_s"} <= found[0].keys()
    assert not (tmp_path / "run" / "tensorboard").exists()


def events(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_event_files_of_a_resumed_run_have_each_epoch_once(tmp_path):
    pytest.importorskip("tensorboard", reason=f"tensorboard {EXTRA}")
    folder = tmp_path / "run"
    with killed_after(2):
        sm.train(SETTINGS, epochs=4, out=folder, progress=False, log=["csv", "tensorboard"])
    assert [step for step, _ in events(folder)["loss"]] == [1]  # it was killed before it had logged the second
    sm.train(SETTINGS, epochs=4, out=folder, progress=False, resume=True, log=["csv", "tensorboard"])
    metrics, found = run_folder.read_metrics(folder, 4), events(folder)
    for name in ("loss", "test_accuracy", "density"):
        assert [step for step, _ in found[name]] == [1, 2, 3, 4]
        assert [value for _, value in found[name]] == pytest.approx([row[name] for row in metrics])
    assert [row["epoch"] for row in rows(folder)] == ["1", "2", "3", "4"]


def test_a_finished_run_is_logged_without_training(tmp_path):
    settings = {**SETTINGS, "epochs": 1}
    sm.train(settings, out=tmp_path / "run", progress=False)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    sm.train(settings, out=tmp_path / "run", progress=False, resume=True, log=["csv"])
    assert len(rows(tmp_path / "run")) == 1
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_what_cannot_be_logged_is_said_before_training(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="log must be of csv, tensorboard, got wandb"):
        sm.train(SETTINGS, out=tmp_path / "run", log=["wandb"])
    with pytest.raises(SystemExit):
        main(["train", *SMALL, "--log", "wandb", "--out", str(tmp_path / "run")])
    assert "--log" in capsys.readouterr().err
    monkeypatch.setattr("sparse_moon.app.logs.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="log tensorboard needs the package tensorboard: pip install tensorboard"):
        sm.train(SETTINGS, out=tmp_path / "run", log=["tensorboard"])
    assert not (tmp_path / "run").exists()


def test_a_comparison_logs_its_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["compare", *SMALL[:-1], "--epochs", "2", "--reliability", "none", "--out", str(tmp_path)]
    main(command)  # one run without a log
    capsys.readouterr()
    main([*command, "--seed", "0", "1", "--log", "csv"])
    assert "rigl-none-0.9-seed0: finished before" in capsys.readouterr().out
    for seed in (0, 1):
        assert [row["epoch"] for row in rows(tmp_path / f"rigl-none-0.9-seed{seed}")] == ["1", "2"]


def test_what_a_comparison_cannot_log_is_said_before_training(tmp_path, monkeypatch, capsys):
    command = ["compare", *SMALL, "--out", str(tmp_path / "all")]
    for flag in ("--table-only", "--evaluate"):
        with pytest.raises(SystemExit):
            main([*command, flag, "--log", "csv"])
        assert "error: --log is for training" in capsys.readouterr().err
    monkeypatch.setattr("sparse_moon.app.logs.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main([*command, "--log", "tensorboard"])
    assert "needs the package tensorboard" in capsys.readouterr().err
    assert not (tmp_path / "all").exists()
