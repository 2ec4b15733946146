"""The line that says how far a training is."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

import sparse_moon as sm
from sparse_moon.app.progress import live_stream

SETTINGS = {"model": "mlp", "width": 16, "interval": 5, "ood": [], "reliability": "none", "epochs": 2}


def ipython(*config):
    """IPython as ``sys.modules`` has it where a shell of this configuration runs."""
    module = ModuleType("IPython")
    module.get_ipython = lambda: SimpleNamespace(config=dict.fromkeys(config)) if config else None
    return module


def test_a_terminal_has_it_on_stderr(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert live_stream() is sys.stderr
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    assert live_stream() is None


@pytest.mark.parametrize("config, found", [(("IPKernelApp",), True), (("TerminalIPythonApp",), False), ((), False)])
def test_a_notebook_has_it_below_its_cell(monkeypatch, config, found):
    monkeypatch.setitem(sys.modules, "IPython", ipython(*config))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    assert live_stream() is (sys.stdout if found else None)


def test_a_training_in_a_notebook_writes_over_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sparse_moon.app.train.live_stream", lambda: sys.stdout)
    sm.train(SETTINGS, out=tmp_path / "notebook")
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1 and printed.out.count("\r") > 1
    assert "epoch=2/2" in printed.out.rpartition("\r")[2] and "density=0.1" in printed.out
    assert "epoch 1/2" not in printed.err
    monkeypatch.undo()
    sm.train(SETTINGS, out=tmp_path / "script")
    printed = capsys.readouterr()
    assert printed.out == "" and [line[:9] for line in printed.err.splitlines() if "loss" in line] == [
        "epoch 1/2", "epoch 2/2",
    ]  # fmt: skip
