import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from tqdm import tqdm

from sparse_moon import files
from sparse_moon.algorithms import RigL
from sparse_moon.app import build, run_folder
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.evaluate import load_run
from sparse_moon.app.experiment import experiment
from sparse_moon.app.report import write_report
from sparse_moon.app.run_data import channels_last, load_dataset
from sparse_moon.app.run_record import read_record
from sparse_moon.app.train import train
from sparse_moon.app.trainer import Trainer
from sparse_moon.nn import sparse_layers

QUICK = TrainConfig(
    model="mlp", width=64, epochs=5, batch_size=64, interval=5, sparsity=0.8, ood=["digits-8-9", "noise"], lr=0.2
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, and what came of it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    torch.use_deterministic_algorithms(True)
    return folder, train(QUICK, folder, progress=False)


def final_state(folder):
    return run_folder.read_checkpoint(folder)


def assert_same_end(a, b):
    first, second = final_state(a), final_state(b)
    for part in ("model", "average", "loss"):
        assert first[part].keys() == second[part].keys()
        assert [k for k in first[part] if not torch.equal(first[part][k], second[part][k])] == []
    times = ("time_s", "step_ms")
    strip = [[{k: v for k, v in row.items() if k not in times} for row in s["history"]] for s in (first, second)]
    assert strip[0] == strip[1]
    results = [files.read_json(f / run_folder.RESULTS) for f in (a, b)]
    assert all(r.pop("time_s") > 0 and r.pop("environment") for r in results)
    assert all(r["steps"].pop("median_ms") > 0 for r in results) and results[0] == results[1]


def test_the_report_from_memory_is_that_from_the_files(whole):
    folder, _ = whole
    from_memory = (folder / run_folder.REPORT).read_text(encoding="utf-8")
    assert write_report(folder, read_record(folder)).read_text(encoding="utf-8") == from_memory


def test_a_run_writes_its_folder(whole):
    folder, results = whole
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoint.pt", "results.json", "scores.npz", "report.html",
    }  # fmt: skip
    assert files.read_json(folder / run_folder.RESULTS) == results
    rows = [json.loads(line) for line in (folder / run_folder.METRICS).read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
    assert sum(row["topology_updates"] for row in rows) > 3 and rows[0]["w"] == 0.0 and rows[-1]["w"] == 1.0
    assert all(row["density"] == rows[0]["density"] for row in rows)
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]

    assert results.keys() == {"id", "ood", "sparsity", "flops", "memory", "epochs", "time_s", "steps", "environment"}
    assert results["id"].keys() == {
        "accuracy", "ece", "nll", "brier", "classwise_ece", "adaptive_ece", "aurc", "ece_all_outputs",
    }  # fmt: skip
    assert results["id"]["accuracy"] > 0.8
    assert results["ood"].keys() == {"digits-8-9", "noise"}
    for scores in results["ood"].values():
        assert scores.keys() >= {"msp", "maxlogit", "energy", "odin", "knn", "unknown"}
        assert all(m.keys() == {"auroc", "fpr95", "aupr_in", "aupr_out", "oscr"} for m in scores.values())
    assert results["sparsity"]["target"] == 0.8
    assert results["sparsity"]["actual"] == pytest.approx(0.8, abs=0.001)
    assert results["flops"].keys() == {"forward_dense", "forward_sparse", "passes", "train_ratio"}
    with np.load(folder / run_folder.SCORES) as scores:
        assert scores["confidence"].shape == scores["correct"].shape == scores["id/msp"].shape


def test_the_same_seed_gives_the_same_bits(whole, tmp_path):
    train(QUICK, tmp_path / "again", progress=False)
    assert_same_end(whole[0], tmp_path / "again")


@pytest.mark.parametrize("model", ["mlp", "small-resnet"])
def test_the_same_seed_gives_the_same_bits_in_two_threads_without_deterministic_mode(model):
    config, ends = replace(QUICK, model=model, width=8, batch_size=512, interval=1, reliability="cigl"), []
    torch.use_deterministic_algorithms(False)  # as for a user
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(2):
            trainer = Trainer(config, load_dataset(config))
            trainer.run_epoch(tqdm(disable=True))
            ends.append(trainer.model.state_dict())
    finally:
        torch.set_num_threads(before)
    assert trainer.history[0]["topology_updates"] > 0
    assert [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])] == []


def test_the_seed_is_that_of_weights_topology_batches_growth_and_masks():
    drawn = []
    for seed in (0, 1, 0):
        config = replace(QUICK, method="set", reliability="cigl", seed=seed)
        run = build.build_run(config, load_dataset(config))
        layer = next(iter(sparse_layers(run.model).values()))
        drawn.append({
            "weights": layer.values.detach(), "topology": layer.topology.positions(),
            "batch": next(iter(run.batches))[0], "growth": torch.tensor(run.method.seed),
            "mask": torch.tensor(run.reliability.mask.seed),
        })  # fmt: skip
    first, other, again = drawn
    assert [name for name in first if not torch.equal(first[name], again[name])] == []
    assert [name for name in first if torch.equal(first[name], other[name])] == []


@pytest.mark.parametrize("kill_at", [0, 7, 30, 53, 70])
def test_an_interrupted_run_resumes_to_the_same_bits(whole, tmp_path, monkeypatch, kill_at):
    step, seen = RigL.step, []

    def interrupted(self, scaler=None):
        seen.append(1)
        if len(seen) == kill_at + 1:
            raise KeyboardInterrupt
        return step(self, scaler)

    with monkeypatch.context() as patch:
        patch.setattr(RigL, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(QUICK, tmp_path, progress=False)
    assert not (tmp_path / run_folder.RESULTS).exists()
    train(QUICK, tmp_path, resume=True, progress=False)
    assert_same_end(whole[0], tmp_path)


def test_a_finished_run_resumes_to_itself(whole, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in whole[0].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    train(QUICK, copy, resume=True, progress=False)
    assert_same_end(whole[0], copy)


def test_a_finished_run_without_its_checkpoint_is_not_trained_anew(whole, tmp_path, monkeypatch):
    for path in whole[0].iterdir():
        if path.name != run_folder.CHECKPOINT:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(Trainer, "run_epoch", lambda self, bar: pytest.fail("trained"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    results = train(QUICK, tmp_path, resume=True, progress=False)
    assert results["id"] == files.read_json(whole[0] / run_folder.RESULTS)["id"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match=r"checkpoint.pt is gone: it lacks the times beside a dense network"):
        train(QUICK, tmp_path, resume=True, progress=False, time_dense=True)
    (tmp_path / run_folder.REPORT).unlink()  # which is made of the other files
    train(QUICK, tmp_path, resume=True, progress=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / run_folder.SCORES).unlink()
    with pytest.raises(ValueError, match=r"checkpoint.pt is gone: it lacks scores.npz, which need that file"):
        train(QUICK, tmp_path, resume=True, progress=False)


def test_a_killed_process_resumes_to_the_same_bits(tmp_path):
    """SIGKILL at random moments, all through the command line."""
    command = [sys.executable, "-m", "sparse_moon", "train", "--model", "mlp", "--width", "64", "--epochs", "12",
               "--batch-size", "64", "--interval", "5", "--sparsity", "0.8", "--ood", "digits-8-9", "noise",
               "--lr", "0.2", "--out"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    killed, whole = str(tmp_path / "killed"), str(tmp_path / "whole")
    for attempt in range(2):
        process = subprocess.Popen([*command, killed, *["--resume"] * (attempt > 0)], **quiet)
        while process.poll() is None and not (tmp_path / "killed" / run_folder.CHECKPOINT).exists():
            time.sleep(0.01)
        time.sleep(random.uniform(0.0, 0.3) if attempt == 0 else random.uniform(3.0, 6.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, killed, "--resume"], check=True, **quiet)
    subprocess.run([*command, whole], check=True, **quiet)
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.filterwarnings("ignore:torch only emulates")  # on a processor without AVX-512
@pytest.mark.parametrize(
    "change",
    [{"method": "dense"}, {"method": "static"}, {"method": "set"}, {"reliability": "none"}, {"amp": "bfloat16"}],
)
def test_other_methods(tmp_path, change):
    config = replace(QUICK, epochs=2, **change)
    results = train(config, tmp_path, progress=False)
    rows = run_folder.read_checkpoint(tmp_path)["history"]
    assert results["sparsity"]["actual"] == pytest.approx(0.0 if config.method == "dense" else 0.8, abs=0.001)
    assert (sum(row["topology_updates"] for row in rows) > 0) == (config.method in ("set", "rigl"))
    assert ("w" in rows[0]) == ("unknown" in results["ood"]["noise"]) == (config.reliability == "moon")
    if config.method == "dense":
        assert results["flops"]["train_ratio"] == 1.0


@pytest.mark.parametrize(("asked", "device", "computes", "expected"), [
    ("auto", "cpu", True, "none"), ("auto", "cuda:1", True, "bfloat16"), ("auto", "cuda", False, "none"),
    ("none", "cuda", True, "none"), ("float16", "cuda", True, "float16"), ("bfloat16", "cpu", True, "bfloat16"),
])  # fmt: skip
def test_mixed_precision_is_what_dense_networks_train_in(asked, device, computes, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: computes)
    config = replace(QUICK, amp=asked)
    object.__setattr__(config, "device", device)  # which is not there
    assert build.amp(config) == expected
    assert channels_last(config) == (device != "cpu")
    assert not channels_last(replace(config, device="cpu", memory_format="contiguous"))
    if computes:
        assert experiment(config.to_dict())["amp"] == expected  # as if it had been said


@pytest.mark.parametrize("amp", ["none", "bfloat16"])
def test_emulated_precision_is_said(amp, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "emulated", lambda dtype: dtype is torch.bfloat16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(replace(QUICK, epochs=1, amp=amp), tmp_path, progress=False)
    said = [w for w in caught if "only emulates products of bfloat16 on this processor" in str(w.message)]
    assert len(said) == (amp == "bfloat16")


def test_a_run_in_channels_last_is_the_same_run(tmp_path):
    # Two steps of all images: after more of them a rectifier that flips at zero makes runs of equal worth differ.
    config = replace(QUICK, model="small-resnet", width=8, epochs=2, reliability="none", method="dense")
    config = replace(config, batch_size=len(load_dataset(config).train))
    found = {}
    for layout in ("auto", "channels_last"):
        asked = replace(config, memory_format=layout)
        trainer = Trainer(asked, load_dataset(asked))
        assert trainer.batches.channels_last == (layout == "channels_last")
        weights = [p for p in trainer.model.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
        assert {p.is_contiguous() for p in weights} == {layout == "auto"}
        for _ in range(2):
            trainer.run_epoch(tqdm(disable=True))
        assert trainer.method.steps == 2
        found[layout] = [row["loss"] for row in trainer.history]
        assert experiment(asked.to_dict()) == experiment(config.to_dict())
    assert found["channels_last"] == pytest.approx(found["auto"], rel=1e-5)


def test_memory_at_95_percent_is_at_most_12_percent_of_dense(tmp_path):
    config = TrainConfig(epochs=1, interval=10, sparsity=0.95, ood=["noise"])
    memory = train(config, tmp_path, progress=False)["memory"]
    dense = memory["dense_parameter_bytes"] + memory["dense_gradient_bytes"] + memory["dense_optimizer_bytes"]
    sparse = sum(memory[k] for k in ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "index_bytes"))
    assert memory["optimizer_bytes"] > 0 and memory["ratio"] == pytest.approx(sparse / dense)
    assert memory["ratio"] <= 0.12


def test_load_run_gives_the_finished_model(whole):
    run = load_run(whole[0])
    model = run.network
    assert run.config == QUICK and run.predictor is model and not model.training
    state = run_folder.read_checkpoint(whole[0])
    assert all(torch.equal(v, state["model"][k]) for k, v in model.state_dict().items())
    averages = [v for k, v in state["average"].items() if k.startswith("average_")]  # sparse values come first
    parameters = sorted(model.named_parameters(), key=lambda item: not item[0].endswith("values"))
    assert all(torch.equal(p, a) for (_, p), a in zip(parameters, averages, strict=True))


def test_a_folder_with_a_run_is_not_overwritten(whole):
    before = {p.name: p.read_bytes() for p in whole[0].iterdir()}
    with pytest.raises(ValueError, match="holds a run already"):
        train(QUICK, whole[0], progress=False)
    assert {p.name: p.read_bytes() for p in whole[0].iterdir()} == before


@pytest.mark.parametrize("damage", ["truncated", "text", "other", "empty"])
def test_damaged_checkpoints(whole, tmp_path, damage):
    (tmp_path / run_folder.CONFIG).write_bytes((whole[0] / run_folder.CONFIG).read_bytes())
    checkpoint = tmp_path / run_folder.CHECKPOINT
    content = (whole[0] / run_folder.CHECKPOINT).read_bytes()
    checkpoint.write_bytes(
        {"truncated": content[: len(content) // 2], "text": b"no", "empty": b"", "other": b""}[damage]
    )
    if damage == "other":
        torch.save({"weights": torch.ones(3)}, checkpoint)
    before = checkpoint.read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint\.pt is (damaged|not a checkpoint)"):
        train(QUICK, tmp_path, resume=True, progress=False)
    assert checkpoint.read_bytes() == before and not (tmp_path / run_folder.RESULTS).exists()


def test_a_checkpoint_of_another_model(whole, tmp_path):
    (tmp_path / run_folder.CHECKPOINT).write_bytes((whole[0] / run_folder.CHECKPOINT).read_bytes())
    with pytest.raises(ValueError, match="does not fit this run"):
        train(replace(QUICK, width=32), tmp_path, resume=True, progress=False)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_checkpoints_load_without_executing_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil(), "config": {}, "epoch": 0}, tmp_path / run_folder.CHECKPOINT)
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        run_folder.read_checkpoint(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was(tmp_path):
    with pytest.raises(ValueError, match=r"the loss is nan in epoch \d+.*lower lr than 1e\+30"):
        train(replace(QUICK, lr=1e30, method="static"), tmp_path, progress=False)
    assert not (tmp_path / run_folder.RESULTS).exists()


def test_an_unfinished_run_is_not_evaluated(whole, tmp_path):
    state = run_folder.read_checkpoint(whole[0])
    run_folder.write_checkpoint(tmp_path, {**state, "finished": False})
    with pytest.raises(ValueError, match="has not finished"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"method": "rigle"}, "method must be one of"),
        ({"model": "resnet19"}, "model must be one of"),
        ({"pattern": "blocky"}, "pattern must be"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"stop": 1.2}, r"stop must be in \[0, 1\]"),
        ({"lr": -1.0}, "need lr > 0"),
        ({"stop": 0.95}, "leaves the topology changing at the end of epoch 5 of 5"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
    ],
)
def test_bad_settings(change, message):
    if "stop" in change and change["stop"] == 0.95:
        change = {**change, "epochs": 10}
        message = message.replace("epoch 5 of 5", "epoch 9 of 10")
    with pytest.raises(ValueError, match=message):
        replace(QUICK, **change)


def test_settings_from_a_file():
    assert TrainConfig.from_dict({"epochs": 3, "exclude": ["fc"]}).exclude == ("fc",)
    with pytest.raises(ValueError, match=r"unknown settings \['epoch'\]"):
        TrainConfig.from_dict({"epoch": 3})


def test_two_sets_of_one_name(tmp_path):
    with pytest.raises(ValueError, match="two OOD sets are called 'noise'"):
        train(replace(QUICK, ood=["noise", "noise"]), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
