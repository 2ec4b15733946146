"""The command line's loop with captured steps, which the host plays, see host_graph.py."""

import gc
import warnings
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from host_graph import Dispatched, HostGraph
from tqdm import tqdm

from sparse_moon.app import build, run_folder, trainer
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.run_data import load_dataset
from sparse_moon.app.train import train
from sparse_moon.app.trainer import Trainer
from sparse_moon.capture import step as capture_step

SMALL = TrainConfig(
    model="mlp", width=16, epochs=2, batch_size=64, interval=5, sparsity=0.8, ood=[], lr=0.2, vote_from=0.5, stop=0.5,
    reliability="none",
)  # fmt: skip
RUNS = [
    {"reliability": "moon"}, {"reliability": "cigl"}, {"reliability": "mixup"}, {"reliability": "logitnorm"},
    {"reliability": "dac"}, {"reliability": "gamblers"}, {"reliability": "sup-tickets"},
    {"reliability": "generalized-odin"}, {"reliability": "label-smoothing"}, {"method": "static"}, {"method": "mest"},
    {"method": "dense"}, {"model": "small-resnet", "width": 8}, {"amp": "bfloat16"},
]  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    return load_dataset(SMALL)


@pytest.fixture(autouse=True)
def _on_host(monkeypatch):
    monkeypatch.setattr(capture_step, "StepGraph", HostGraph)
    monkeypatch.setattr(build, "captures_steps", lambda config: True)  # the optimizer, of both runs
    monkeypatch.setattr(trainer, "captures_steps", lambda config: config.capture is not False)


def run(config, digits, epochs=2):
    made = Trainer(config, digits)
    for _ in range(epochs):
        with Dispatched() if config.capture is False else nullcontext():
            made.run_epoch(tqdm(disable=True))
    return made


def kept(made):
    history = [{k: v for k, v in row.items() if k not in ("time_s", "step_ms", "captured")} for row in made.history]
    return history, {name: tensor.clone() for name, tensor in made.model.state_dict().items()}


@pytest.mark.parametrize("options", RUNS, ids=lambda options: "-".join(map(str, options.values())))
def test_captured_runs_end_as_eager_ones(options, digits):
    config = replace(SMALL, **options)
    rows, weights = kept(run(replace(config, capture=False), digits))
    gc.collect()
    captured = run(config, digits)
    assert captured.captured.reason is None
    assert captured.captured.captures >= 1
    found_rows, found = kept(captured)
    assert found_rows == rows
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_a_captured_run_is_resumed(digits):
    config = replace(SMALL, reliability="moon")
    rows, weights = kept(run(config, digits))
    gc.collect()
    first, second = run(config, digits, 1), Trainer(config, digits)
    second.load_state_dict(first.state_dict())
    del first
    gc.collect()
    second.run_epoch(tqdm(disable=True))
    found_rows, found = kept(second)
    assert found_rows == rows
    assert all(torch.allclose(found[name].float(), weights[name].float()) for name in weights)


@pytest.mark.parametrize(("options", "reason"), [
    ({"reliability": "vos"}, "reliability method 'vos' may do something else in each batch"),
    ({"method": "gmp"}, "method 'gmp' changes the number of a layer's weights"),
    ({"amp": "float16"}, "take bfloat16"),
])  # fmt: skip
def test_runs_that_cannot_be_captured_say_why(options, reason, digits):
    with pytest.warns(UserWarning, match=f"not captured in a CUDA graph: .*{reason}"):
        made = Trainer(replace(SMALL, **options), digits)
    assert made.captured is None or made.captured.reason is not None


def test_times_beside_a_dense_network_are_of_captured_steps(tmp_path, monkeypatch):
    replays = {}

    class Counted(HostGraph):
        def replay(self):
            replays[id(self)] = replays.get(id(self), 0) + 1
            super().replay()

    monkeypatch.setattr(capture_step, "StepGraph", Counted)
    steps = train(replace(SMALL, epochs=1), tmp_path, progress=False, time_dense=True)["steps"]
    assert steps["beside_dense"]["dense_ms"] > 0
    assert len(replays) == 4 and min(replays.values()) > 5  # the run, its copy, and a dense network in two layouts
    (tmp_path / run_folder.RESULTS).unlink()  # a process that makes none of the steps
    replays.clear()
    assert train(replace(SMALL, epochs=1), tmp_path, resume=True, progress=False, time_dense=True)["steps"]["captured"]
    assert len(replays) == 3 and min(replays.values()) > 5


def test_one_process_of_several_says_why(digits, monkeypatch):
    monkeypatch.setattr(capture_step, "rank", lambda: 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"reliability": "vos"}, {"method": "gmp"}):
            Trainer(replace(SMALL, **options), digits)


@pytest.mark.parametrize("capture", [None, True, False])
def test_without_a_gpu_nothing_changes(capture, digits, monkeypatch):
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = Trainer(replace(SMALL, capture=capture), digits)
    assert made.captured is None
    assert made.optimizer.param_groups[0]["lr"] == SMALL.lr
    assert made.optimizer.param_groups[0]["fused"] is None
