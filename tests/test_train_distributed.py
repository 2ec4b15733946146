"""Runs of the command line's loop in two processes with gloo against the same runs in one."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from small_processes import join, leave, run_processes
from sparse_moon.app import run_folder, train
from sparse_moon.app.build import build_run
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.run_data import load_dataset
from sparse_moon.app.trainer import Trainer

CONFIG = TrainConfig(model="mlp", width=32, epochs=3, batch_size=64, method="static", sparsity=0.5, ood=[], lr=0.05)
VOS = replace(CONFIG, reliability="vos", outliers_from=0.0, epochs=1)  # whose loss has parameters


def worker(folder):
    write = run_folder.write_checkpoint

    def write_and_keep(path, state):
        """The first epoch's checkpoint of ``whole`` is also what a run was cut off with."""
        write(path, state)
        if path.name == "whole" and state["epoch"] == 1:
            (folder / "cut").mkdir()
            write(folder / "cut", state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "write_report", lambda *_: None)
        patch.setattr(run_folder, "write_checkpoint", write_and_keep)
        train.train(CONFIG, folder / "whole", progress=False)
        train.train(CONFIG, folder / "cut", resume=True, progress=False)
    trainer = Trainer(VOS, load_dataset(VOS))
    trainer.run_epoch(tqdm(disable=True))
    labels = [labels for _, labels in build_run(CONFIG, load_dataset(CONFIG)).batches.epoch(0)]
    state = {"labels": labels, "vos": trainer.state_dict()["loss"]}
    torch.save(state, folder / f"{torch.distributed.get_rank()}.pt")


def test_two_processes_train_what_one_does_and_go_on_after_a_cut(tmp_path):
    run_processes(__file__, 2, tmp_path)
    train.train(CONFIG, tmp_path / "alone", progress=False)
    alone, whole, cut = (run_folder.read_checkpoint(tmp_path / name) for name in ("alone", "whole", "cut"))
    for part in ("model", "average", "loss"):
        for name, tensor in alone[part].items():
            torch.testing.assert_close(whole[part][name], tensor, rtol=1e-5, atol=1e-6)
            assert torch.equal(cut[part][name], whole[part][name]), name
    assert [row["loss"] for row in cut["history"]] == [row["loss"] for row in whole["history"]]

    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    batches = build_run(CONFIG, load_dataset(CONFIG)).batches.epoch(0)
    for (_, labels), *halves in zip(batches, first["labels"], second["labels"], strict=True):
        assert torch.equal(torch.cat(halves), labels) and len(halves[0]) == 32
    assert first["vos"]["slope"] != 1.0
    assert [name for name in first["vos"] if not torch.equal(first["vos"][name], second["vos"][name])] == []


if __name__ == "__main__":
    (folder,) = join(sys.argv)
    worker(Path(folder))
    leave()
