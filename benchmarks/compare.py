#!/usr/bin/env python3
"""RigL and SET, each without and with MOON and CigL, at 95 and 99 % sparsity, and MOON's ablations at 99 %.

    python benchmarks/compare.py mnist DATA             # 45 runs, about 15 minutes each on a core
    python benchmarks/compare.py mnist DATA --jobs 2 --seed 0

Trains what benchmarks/results/mnist lacks and writes the table there. Interrupted, it goes on where it was. Each run's
settings, metrics and results belong to the repository, with the machine and the versions that made them; checkpoints,
scores and pages do not.

    python benchmarks/compare.py mnist DATA --times     # on an idle machine: times.json, the times of a training step

Those are taken in turns in one process, topology updates included, because the runs' own depend on what else ran.

DATA holds mnist.npz and cifar10.npz with the arrays x_train, y_train, x_test and y_test, and the OOD sets named below,
with the images in x or x_test.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from timing import environment, write_results

from sparse_moon import runs
from sparse_moon.config import TrainConfig
from sparse_moon.inputs import load_dataset
from sparse_moon.memory import keep_freed_memory
from sparse_moon.train import Trainer

RESULTS = Path(__file__).resolve().parent / "results"
ENVIRONMENT, TIMES = "environment.json", "times.json"

# The learning rates and their schedule, the topology's end and the final weights are those of arXiv 2403.20047.
COMMON: dict[str, Any] = {
    "model": "small-resnet", "width": 16, "fuse": True, "batch_size": 128, "interval": 100,
    "lr": 0.12, "lr_end": 0.008, "epochs": 15, "warmup_epochs": 5,
}  # fmt: skip
DATASETS = {
    "mnist": [
        "--final-weight", "0.01",
        "--ood", "notmnist=notmnist_test.npz", "fashion_mnist=fashion_mnist_test.npz", "kmnist=kmnist_test.npz",
        "dtd=ood/dtd.npz", "cifar10=cifar10.npz", "tinyimagenet=ood/tinyimagenet.npz", "scenes=ood/scenes.npz",
    ],
    "cifar10": [
        "--final-weight", "1",
        "--ood", "cifar100=ood/cifar100.npz", "tinyimagenet=ood/tinyimagenet.npz",
        "mnist=mnist.npz", "svhn=ood/svhn.npz", "dtd=ood/dtd.npz", "scenes=ood/scenes.npz",
    ],
}  # fmt: skip
GRIDS = [
    ["--method", "rigl", "set", "--reliability", "none", "moon", "cigl", "--sparsity", "0.99"],
    ["--method", "rigl", "--reliability", "moon:-loss", "moon:-tuning", "moon:-voting", "--sparsity", "0.99"],
    ["--method", "rigl", "set", "--reliability", "none", "moon", "cigl", "--sparsity", "0.95"],
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=list(DATASETS))
    parser.add_argument("data", type=Path, help="folder of the data")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; their times are then not comparable")
    parser.add_argument("--out", type=Path, help="folder of the runs, default benchmarks/results/DATASET")
    parser.add_argument("--times", action="store_true", help="train nothing, time training steps")
    arguments = parser.parse_args()
    out = (arguments.out or RESULTS / arguments.dataset).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if arguments.times:
        write_results(out / TIMES, times(arguments.dataset, arguments.data))
        return
    command = [
        sys.executable, "-m", "sparse_moon", "compare", "--out", str(out), "--jobs", str(arguments.jobs),
        "--dataset", arguments.dataset, "--data-root", ".", *options(COMMON), *DATASETS[arguments.dataset],
    ]  # fmt: skip
    for seed in arguments.seed:
        for grid in GRIDS:
            before = environment(torch.device("cpu"))
            # from the folder of the data, so that no run's settings hold a path of this machine
            try:
                code = subprocess.run([*command, *grid, "--seed", str(seed)], cwd=arguments.data).returncode
            finally:  # also of an interrupted comparison
                for results in out.glob(f"*/{runs.RESULTS}"):
                    if not (path := results.with_name(ENVIRONMENT)).exists():
                        runs.write_json(path, before)
            if code:
                sys.exit(code)


def options(settings: Mapping[str, Any]) -> list[str]:
    """Settings as ``sparse-moon`` takes them."""
    flags: list[str] = []
    for name, value in settings.items():
        flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return flags


def times(dataset: str, data: Path) -> dict[str, object]:
    """Time of a training step of each method, and its ratio to RigL's without a reliability method."""
    keep_freed_memory()
    os.chdir(data)
    slices, length = 10, 10  # a hundred steps of each, of which one is a topology update
    trainers: dict[tuple[float, str, str], Trainer] = {}
    for sparsity, method, reliability in product((0.95, 0.99), ("rigl", "set"), ("none", "moon", "cigl")):
        config = TrainConfig(
            dataset=dataset, data_root=".", method=method, reliability=reliability, sparsity=sparsity, **COMMON
        )
        trainers[sparsity, method, reliability] = Trainer(config, load_dataset(config))
    batches = {key: trainer.batches.epoch(0) for key, trainer in trainers.items()}
    spent: dict[tuple[float, str, str], list[float]] = {key: [] for key in trainers}
    totals = torch.zeros(3)
    for turn in range(slices + 1):
        for key, trainer in trainers.items():
            trainer.parallel.train()
            drawn = [next(batches[key]) for _ in range(length)]
            begin = time.perf_counter()
            for images, labels in drawn:
                trainer._step(images, labels, totals)
            if turn:  # the first one allocates
                spent[key].append((time.perf_counter() - begin) / length)
    rows = []
    for (sparsity, method, reliability), own in spent.items():
        base = spent[sparsity, "rigl", "none"]
        rows.append({
            "sparsity": sparsity, "method": method, "reliability": reliability,
            "step_ms": round(1e3 * statistics.mean(own), 2), "over_rigl": round(sum(own) / sum(base), 3),
        })  # fmt: skip
        print(*rows[-1].values(), flush=True)
    return {**environment(torch.device("cpu")), "update_interval": COMMON["interval"], "rows": rows}


if __name__ == "__main__":
    main()
