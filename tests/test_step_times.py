import time
from dataclasses import replace

import pytest
import torch

from sparse_moon import files
from sparse_moon.app import run_folder
from sparse_moon.app.build import build_run
from sparse_moon.app.cli import main
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.run_data import load_dataset
from sparse_moon.app.step_times import beside_dense, copies
from sparse_moon.app.tables import kernels_line
from sparse_moon.app.train import train
from sparse_moon.app.trainer import Trainer
from sparse_moon.nn import SparseConv2d, sparse_layers
from sparse_moon.nn.fusion import fusions
from sparse_moon.ops import choice
from sparse_moon.ops.choice import PASSES, Work
from sparse_moon.ops.native import native
from sparse_moon.step_clock import StepClock

CONFIG = TrainConfig(model="mlp", width=64, epochs=2, batch_size=64, interval=5, sparsity=0.8, ood=["noise"], lr=0.2)
OPTIONS = [
    "--model",
    "mlp",
    "--width",
    "64",
    "--epochs",
    "1",
    "--batch-size",
    "64",
    "--interval",
    "5",
    "--ood",
    "noise",
]


def test_a_clock_leaves_out_the_first_steps():
    clock = StepClock(torch.device("cpu"), skip=2)
    for seconds in (0.1, 0.1, 0.01, 0.01, 0.05):
        with clock.step():
            time.sleep(seconds)
    assert 10 <= clock.median_ms() < 50
    assert clock.median_ms() is None
    with clock.step():
        time.sleep(0.02)
    assert clock.median_ms() >= 20


def test_timing_dense_steps_changes_nothing_else(tmp_path, capsys):
    plain, timed = tmp_path / "plain", tmp_path / "timed"
    train(CONFIG, plain, progress=False)
    random = torch.get_rng_state()
    train(CONFIG, timed, progress=False, time_dense=True)
    assert torch.equal(torch.get_rng_state(), random)
    states = [run_folder.read_checkpoint(folder) for folder in (plain, timed)]
    for part in ("model", "average"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=0, atol=0)
    assert torch.equal(states[0]["random_state"], states[1]["random_state"])
    before, after = (files.read_json(folder / run_folder.RESULTS) for folder in (plain, timed))
    assert before["id"] == after["id"] and before["ood"] == after["ood"]
    rows = run_folder.read_metrics(plain)
    assert before["steps"]["median_ms"] == sum(row["step_ms"] for row in rows) / len(rows)
    assert before["steps"]["kernels"].keys() == {name for name, s in before["sparsity"]["layers"].items() if s}
    dense = after["steps"]["beside_dense"]
    assert dense["dense_ms"] > 0 and dense["sparse_ms"] > 0 and dense["dense_layout"] in ("contiguous", "channels_last")

    # a finished run is timed later, and not again
    main(["train", "--out", str(plain), "--resume"])
    said = capsys.readouterr().out
    assert "ms (median, without loading data)   " + kernels_line(before["steps"]["kernels"]) in said
    assert "made dense" not in said and "weight gradient" not in said
    main(["train", "--out", str(plain), "--resume", "--time-dense"])
    said = capsys.readouterr().out
    assert "made dense" in said and "times as fast" in said and "weight gradient" in said
    once = files.read_json(plain / run_folder.RESULTS)
    assert {**once["steps"], "beside_dense": None} == {**before["steps"], "beside_dense": None}
    main(["train", "--out", str(plain), "--resume", "--time-dense"])
    assert files.read_json(plain / run_folder.RESULTS) == once


def test_runs_that_have_no_dense_network_beside_them(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="in one process; got method 'dense'"):
        train(replace(CONFIG, method="dense"), tmp_path / "run", time_dense=True)
    monkeypatch.setattr("sparse_moon.app.train.world_size", lambda: 2)
    with pytest.raises(ValueError, match="in one process; got 2 processes"):
        train(CONFIG, tmp_path / "run", time_dense=True)
    assert not (tmp_path / "run").exists()


def test_a_dense_run_says_its_step_time_and_no_kernels(tmp_path, capsys):
    main(["train", *OPTIONS, "--method", "dense", "--out", str(tmp_path / "run")])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("training step"))
    assert line.endswith("ms (median, without loading data)")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_sparse_network_is_timed_in_the_layout_of_the_run(layout):
    config = replace(CONFIG, model="small-resnet", width=8, epochs=1, reliability="none", memory_format=layout)
    trainer = Trainer(config, load_dataset(config))
    seen = []

    def note(module, inputs):
        if isinstance(module, SparseConv2d) and inputs[0].shape[1] > 1:
            seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        beside_dense(trainer.model, config, trainer.dataset, next(trainer.batches.epoch(0)))
    finally:
        handle.remove()
    assert set(seen) == {layout == "channels_last"}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"fuse": False},
        {"recompute": True},
        {"amp": "bfloat16"},
        {"method": "gmp", "interval": 2},
        {"reliability": "generalized-odin"},
        {"reliability": "cigl", "stop": 0.5},
        {"reliability": "sup-tickets", "epochs": 6},
        {"reliability": "vos"},
    ],
)
def test_both_networks_are_as_the_run_s(change):
    config = replace(CONFIG, **{"model": "small-resnet", "width": 8, "epochs": 8, "reliability": "none", **change})
    data = load_dataset(config)
    run = build_run(config, data)
    networks = copies(run.model, config, data)
    assert networks.keys() == {"sparse", "contiguous", "channels_last"}
    assert sparse_layers(networks["sparse"]).keys() == sparse_layers(run.model).keys()
    assert not sparse_layers(networks["contiguous"]) and not sparse_layers(networks["channels_last"])
    for network in networks.values():
        assert network.training
        assert ("fused" in fusions(network).values()) is (config.fuse and (native is not None or config.recompute))
    for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        convolution = networks[name].get_submodule("stages.0.0.conv1")
        assert convolution.weight.is_contiguous(memory_format=layout)
        weight = run.model.get_submodule("stages.0.0.conv1").weight
        assert torch.equal(convolution.weight, weight)


def test_kernels_in_a_line():
    whole, none = {"forward": "kernel", "grads": "kernel"}, {"forward": "dense", "grads": "dense"}
    part = {"forward": "kernel", "values_grad": "dense"}
    assert kernels_line({"a": whole, "b": whole}) == "2 of 2 sparse layers ran sparse kernels"
    found = {"a": whole, "b": part, "c": none}
    assert kernels_line(found) == "1 of 3 sparse layers ran sparse kernels, 1 in part: b; dense: c"
    found = {"a": whole} | dict.fromkeys("bcdefg", none)
    assert kernels_line(found) == "1 of 7 sparse layers ran sparse kernels; dense: b, c, d, e and 2 more"
    assert kernels_line({"a": whole, "b": part}) == "1 of 2 sparse layers ran sparse kernels, 1 in part: b"
    assert kernels_line({"a": none, "b": none}) == "0 of 2 sparse layers ran sparse kernels"


@pytest.mark.skipif(native is None, reason="needs the compiled CPU kernels")
@pytest.mark.usefixtures("nothing_measured")
@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("method", ["rigl", "gmp"])
def test_training_says_once_where_no_kernel_pays_and_which_pattern_would(method, tmp_path, capsys, monkeypatch):
    rows = [
        (Work(pass_, 64, 64, 64, 1, 1, 1, 1, block=block), crossover)
        for pass_ in PASSES
        for block, crossover in (((1, 1), 0.0), ((8, 8), 0.3))
    ]
    monkeypatch.setattr(choice, "table", lambda device: rows)
    options = [*OPTIONS, "--method", method, "--sparsity", "0.8", "--allocation", "uniform"]
    main(["train", *options, "--out", str(tmp_path / "run")])
    out, err = capsys.readouterr()
    (said,) = [line for line in err.splitlines() if "sparse kernel" in line]
    assert said.startswith("sparse-moon train: warning: no sparse kernel is known to pay on this device")
    assert "for unstructured weights in float32 at 80% sparsity" in said
    assert "the pattern block8 pays in" in said
    assert "0 of" in next(line for line in out.splitlines() if line.startswith("training step"))
    main(["train", "--out", str(tmp_path / "run"), "--resume"])  # finished
    assert "sparse kernel" not in capsys.readouterr().err
    rows[:] = [(work, 1.0) for work, _ in rows]
    choice.forget()
    main(["train", *options, "--out", str(tmp_path / "pays")])
    assert "sparse kernel" not in capsys.readouterr().err
