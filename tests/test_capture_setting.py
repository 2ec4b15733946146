"""Whether a run captures its steps: by itself on a GPU, and as its settings say."""

import subprocess
from dataclasses import replace

import pytest

import sparse_moon as sm
from sparse_moon import files
from sparse_moon.app import build, run_folder, start
from sparse_moon.app.cli import main
from sparse_moon.app.commands import train as train_command
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.experiment import run_key

SMALL = TrainConfig(model="mlp", reliability="none", epochs=1)


@pytest.mark.parametrize(("saved", "on_gpu"), [({}, True), ({"capture": True}, True), ({"capture": False}, False)])
def test_a_gpu_captures_unless_the_settings_say_no(saved, on_gpu):
    """Settings of older runs say yes or no, and mean it still."""
    for device, captures in (("cuda", on_gpu), ("cuda:1", on_gpu), ("cpu", False)):
        assert build.captures_steps(TrainConfig.of_run({**saved, "device": device})) is captures


def test_the_command_line_says_yes_no_or_nothing(tmp_path, monkeypatch):
    started = []

    def note(config, *_, **__):
        started.append(config.capture)
        return {}, config, tmp_path

    monkeypatch.setattr(train_command, "start", note)
    path = tmp_path / "settings.yaml"
    for words, text in (
        ([], ""), (["--capture"], ""), (["--no-capture"], ""),
        ([], "capture: false"), ([], "capture: true"), ([], "capture: null"), (["--capture"], "capture: false"),
    ):  # fmt: skip
        path.write_text(f"model: mlp\n{text}\n")
        main(["train", "--config", str(path), *words])
    assert started == [None, True, False, False, True, None, True]


@pytest.mark.parametrize("kept", [None, True, False])
def test_a_run_that_goes_on_keeps_its_setting_unless_another_is_given(kept, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(start, "train_in", lambda config, *_, **__: started.append(config.capture))
    files.write_json(tmp_path / run_folder.CONFIG, replace(SMALL, capture=kept).to_dict())
    for given in ({}, {"capture": True}, {"capture": False}):
        sm.train(out=tmp_path, resume=True, **given)
    assert started == [kept, True, False]


@pytest.mark.parametrize(("word", "asked"), [("--capture", True), ("--no-capture", False)])
def test_compare_tells_its_runs(word, asked, tmp_path, monkeypatch):
    """Those that are there, too, whose own settings say something else."""
    folder = tmp_path / "run"
    folder.mkdir()
    files.write_json(folder / run_folder.CONFIG, replace(SMALL, capture=not asked).to_dict())
    commands = []

    def started(command, **_):
        commands.append(command)
        raise OSError("not trained")

    monkeypatch.setattr(subprocess, "Popen", started)
    words = ["--model", "mlp", "--reliability", "none", "--epochs", "1"]
    with pytest.raises(SystemExit):
        main(["compare", *words, "--out", str(tmp_path), word])
    (command,) = commands
    assert str(folder) in command and word in command


def test_runs_that_are_captured_and_runs_that_are_not_are_the_same_experiment():
    """Where and how a run computes may change while it goes on."""
    assert len({run_key(replace(SMALL, capture=capture).to_dict()) for capture in (None, True, False)}) == 1
