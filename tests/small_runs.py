"""Finished runs of made-up figures, and ones that are cut off."""

from contextlib import contextmanager
from dataclasses import asdict

import pytest

from sparse_moon import files
from sparse_moon.app import run_folder
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.experiment import run_name

CONFIG = TrainConfig(model="mlp", width=32, epochs=2, ood=["noise", "letters", "photos"], reliability="none")


def write_run(folder, config, *, accuracy, near, far, seconds, name=None, near_set="letters"):
    """One with the OOD sets noise and photos, which are far, and one that is near, of the score msp."""
    path = folder / (name or run_name(config))
    path.mkdir(parents=True)
    old = {key: value for key, value in asdict(config).items() if key != "holdout"}  # written before it was a setting
    files.write_json(path / run_folder.CONFIG, old)
    run_folder.write_metrics(path, [{"epoch": i + 1, "time_s": t} for i, t in enumerate(seconds)])
    metrics = {"noise": far[0], "photos": far[1], near_set: near}
    results = {
        "id": {"accuracy": accuracy, "ece": 0.1, "nll": 0.5},
        "ood": {set_: {"msp": {"auroc": a, "fpr95": 1 - a}} for set_, a in metrics.items()},
        "flops": {"forward_dense": 100.0, "forward_sparse": 10.0, "passes": 2, "train_ratio": 0.2},
        "time_s": sum(seconds),
    }
    files.write_json(path / run_folder.RESULTS, results)
    run_folder.write_checkpoint(path, {"model": {}, "config": {}, "epoch": 2, "finished": True})


@contextmanager
def killed_after(epoch):
    """A training inside the block is interrupted when it has written the checkpoint of this epoch."""
    write = run_folder.write_checkpoint

    def killed(folder, state):
        write(folder, state)
        if state["epoch"] == epoch:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder, "write_checkpoint", killed)
        yield
