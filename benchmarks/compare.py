#!/usr/bin/env python3
"""RigL and SET, each without and with MOON and CigL, at 95 and 99 % sparsity, and MOON's ablations at 99 %.

    python benchmarks/compare.py mnist DATA             # 45 runs, about 15 minutes each on a core
    python benchmarks/compare.py mnist DATA --jobs 2 --seed 0

Trains what benchmarks/results/mnist lacks and writes the table there. Interrupted, it goes on where it was. Each run's
settings, metrics and results belong to the repository, with the machine and the versions that made them; checkpoints,
scores and pages do not.

    python benchmarks/compare.py mnist DATA --grid moon --seed 0 1 2 3 4 5 6 7     # benchmarks/results/mnist-moon

Whether MOON does more than averaging, at 95 %: RigL, RigL with voting, MOON with three final weights, Deep Gamblers.
And whether sparsity hurts: a dense network, and RigL at 80 to 99 %. Linear layers alone, half a minute each. For
cifar10 a ResNet-18 of width 32, 25 to 30 minutes a run on two idle cores, and MOON with the final weight 1 alone.

    python benchmarks/compare.py cifar10 DATA --grid sparsity --seed 0 1 2     # benchmarks/results/cifar10-sparsity

Whether sparsity hurts there, in the small network: dense, and RigL at 80 to 99 %, 20 to 90 minutes a run.

    python benchmarks/compare.py cifar10 DATA --grid patterns --seed 0 1     # benchmarks/results/cifar10-patterns

What blocks and vectors of weights cost in accuracy: RigL with six patterns at 90 and 95 %, eight epochs.

    python benchmarks/compare.py mnist DATA --grid calibration --seed 0 1 2 3 4 5 6 7     # mnist-calibration

CigL with three shares of weights kept, without one of its parts, and beside other calibration, at 95 %. A tenth of the
training images is held out for the temperature.

    python benchmarks/compare.py mnist DATA --grid diagnostics --seed 0 1 2     # mnist-diagnostics

What the papers' theory speaks of, after each epoch: RigL alone, with MOON and with CigL, SET and static, at 95 %.

    python benchmarks/compare.py mnist DATA --times     # on an idle machine: times.json, the times of a training step

Those are taken in turns in one process, topology updates included, and stand in the table in place of the runs' own,
which depend on what else ran. They leave out what comes after steps, MOON's and CigL's averages and batch-norm pass:
moon_cost.py measures that.

DATA holds mnist.npz and cifar10.npz with the arrays x_train, y_train, x_test and y_test, and the OOD sets named below,
with the images in x or x_test.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from timing import command_line, environment, write_results

from sparse_moon import files
from sparse_moon.app import run_folder
from sparse_moon.app.comparison import write_table
from sparse_moon.app.config import TrainConfig, parse_label
from sparse_moon.app.experiment import row_label
from sparse_moon.app.run_data import load_dataset
from sparse_moon.app.trainer import Trainer
from sparse_moon.memory import keep_freed_memory

RESULTS = Path(__file__).resolve().parent / "results"
ENVIRONMENT, TIMES = "environment.json", "times.json"

# The learning rates and their schedule, the topology's end and the final weights are those of arXiv 2403.20047.
COMMON: dict[str, Any] = {
    "batch_size": 128, "interval": 100, "lr": 0.12, "lr_end": 0.008, "epochs": 15, "warmup_epochs": 5,
}  # fmt: skip
RESNET = {**COMMON, "model": "small-resnet", "width": 16}
# For single claims: linear layers, half a minute a run, so that eight seeds tell small differences from chance.
SCORES = ["msp", "energy", "mahalanobis", "dice", "unknown"]
CLAIMS: dict[str, dict[str, Any]] = {
    "mnist": {**COMMON, "model": "mlp", "width": 256, "score": SCORES},
    # fits its images at 95 %, unlike the small one
    "cifar10": {**COMMON, "model": "resnet18", "width": 32, "score": [*SCORES, "knn"]},
}
DATASETS = {
    "mnist": [
        "--ood", "notmnist=notmnist_test.npz", "fashion_mnist=fashion_mnist_test.npz", "kmnist=kmnist_test.npz",
        "dtd=ood/dtd.npz", "cifar10=cifar10.npz", "tinyimagenet=ood/tinyimagenet.npz", "scenes=ood/scenes.npz",
    ],
    "cifar10": [
        "--ood", "cifar100=ood/cifar100.npz", "tinyimagenet=ood/tinyimagenet.npz",
        "mnist=mnist.npz", "svhn=ood/svhn.npz", "dtd=ood/dtd.npz", "scenes=ood/scenes.npz",
    ],
}  # fmt: skip
FINAL_WEIGHTS = {"mnist": 0.01, "cifar10": 1.0}
METHODS = [
    {"method": ["rigl", "set"], "reliability": ["none", "moon", "cigl"], "sparsity": ["0.99"]},
    {"method": ["rigl", "set"], "reliability": ["none", "moon", "cigl"], "sparsity": ["0.95"]},
    {"method": ["rigl"], "reliability": ["moon:-loss", "moon:-tuning", "moon:-voting"], "sparsity": ["0.99"]},
]


GRIDS = ("methods", "moon", "sparsity", "patterns", "calibration", "diagnostics")
PATTERNS = "unstructured,vector8,vector16,block16,block32,block64"


def grids(name: str, dataset: str) -> list[dict[str, Any]]:
    """Options of the commands that train a grid."""
    if name == "methods":
        return [{**RESNET, **grid, "final_weight": FINAL_WEIGHTS[dataset]} for grid in METHODS]
    beside_dense = {"method": ["dense", "rigl"], "reliability": ["none"], "sparsity": ["0.8", "0.9", "0.95", "0.99"]}
    if name == "sparsity":
        return [{**RESNET, **beside_dense}]
    if name == "patterns":  # twice as wide, so that blocks of 64 divide most weights, and half as long
        wide = {**RESNET, "width": 32, "epochs": 8, "score": ["msp", "energy", "knn"]}
        grid = {"method": ["rigl"], "reliability": ["none"], "sparsity": ["0.9", "0.95"]}
        return [{**wide, **grid, "sweep": f"pattern={PATTERNS}"}]
    common = {**CLAIMS[dataset], "method": ["rigl"], "sparsity": ["0.95"]}
    if name == "moon":
        cheap = dataset == "mnist"
        return [
            {**common, "reliability": ["none", "moon:-loss", *(["gamblers"] if cheap else [])]},
            {**common, "reliability": ["moon"], "sweep": f"final_weight={'0.01,1,4' if cheap else '1'}"},
            *([{**common, **beside_dense}] if cheap else []),
        ]
    if name == "diagnostics":
        common |= {"diagnostics": True, "final_weight": FINAL_WEIGHTS[dataset]}
        return [
            {**common, "reliability": ["none", "moon", "cigl"]},
            {**common, "method": ["set", "static"], "reliability": ["none"]},
        ]
    common["holdout"] = 0.1
    others = ["weight-dropout", "mc-dropout", "mixup", "label-smoothing"]
    return [
        {**common, "reliability": ["none", "cigl:-mask", "cigl:-averaging", *others]},
        {**common, "reliability": ["cigl"], "sweep": "keep=0.9,0.95,0.99"},
        {**common, "method": ["dense"], "reliability": ["none"]},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=list(DATASETS))
    parser.add_argument("data", type=Path, help="folder of the data")
    parser.add_argument("--grid", choices=GRIDS, default="methods")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; their times are then not comparable")
    parser.add_argument(
        "--out", type=Path, help="folder of the runs, default benchmarks/results/DATASET or DATASET-GRID"
    )
    parser.add_argument("--times", action="store_true", help="train nothing, time training steps")
    arguments = parser.parse_args()
    folder = arguments.dataset if arguments.grid == "methods" else f"{arguments.dataset}-{arguments.grid}"
    out = (arguments.out or RESULTS / folder).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if arguments.times:
        write_results(out / TIMES, times(arguments.dataset, arguments.data))
        if any(out.glob(f"*/{run_folder.RESULTS}")):
            write_table(out, relative_times(out))
        return
    command = [
        sys.executable, "-m", "sparse_moon", "compare", "--out", str(out), "--jobs", str(arguments.jobs),
        "--dataset", arguments.dataset, "--data-root", ".", *DATASETS[arguments.dataset],
    ]  # fmt: skip
    for seed in arguments.seed:
        for grid in grids(arguments.grid, arguments.dataset):
            before = environment(torch.device("cpu"))
            # from the folder of the data, so that no run's settings hold a path of this machine
            try:
                code = subprocess.run([*command, *options(grid), "--seed", str(seed)], cwd=arguments.data).returncode
            finally:  # also of an interrupted comparison
                say_where(out, before)
            if code:
                sys.exit(code)
            write_table(out, relative_times(out))


def say_where(out: Path, made: Mapping[str, Any]) -> None:
    """Beside the results of finished runs with what they were made, and in them no folder of this machine."""
    for path in out.glob(f"*/{run_folder.RESULTS}"):
        if not (beside := path.with_name(ENVIRONMENT)).exists():
            files.write_json(beside, made)
        results = files.read_json(path)
        own = results.get("environment", {})
        if (command := command_line(shlex.split(own.get("command", "")))) != own.get("command", ""):
            files.write_json(path, {**results, "environment": {**own, "command": command}})


def options(settings: Mapping[str, Any]) -> list[str]:
    """Settings as ``sparse-moon`` takes them."""
    flags: list[str] = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        flags += [f"--{name.replace('_', '-')}", *map(str, values)]
    return flags


def relative_times(out: Path) -> dict[str, float]:
    """By label of a table's row, where they were measured: the runs' own depend on what else ran."""
    if not (out / TIMES).exists():
        return {}
    return {row["label"]: row["over_rigl"] for row in files.read_json(out / TIMES)["rows"]}


def times(dataset: str, data: Path) -> dict[str, object]:
    """Time of a training step of each method, and its ratio to RigL's without a reliability method."""
    keep_freed_memory()
    os.chdir(data)
    slices, length = 10, 10  # a hundred steps of each, of which one is a topology update
    trainers: dict[str, Trainer] = {}
    for config in configs(dataset):
        trainers[row_label(config)] = Trainer(config, load_dataset(config))
    batches = {label: trainer.batches.epoch(0) for label, trainer in trainers.items()}
    spent: dict[str, list[float]] = {label: [] for label in trainers}
    totals = torch.zeros(3)
    for turn in range(slices + 1):
        for label, trainer in trainers.items():
            trainer.parallel.train()
            drawn = [next(batches[label]) for _ in range(length)]
            begin = time.perf_counter()
            for images, labels in drawn:
                trainer._step(images, labels, totals)
            if turn:  # the first one allocates
                spent[label].append((time.perf_counter() - begin) / length)
    rows = []
    for label, trainer in trainers.items():
        rigl = replace(trainer.config, method="rigl", reliability="none", without=())
        own, base = spent[label], spent[row_label(rigl)]
        step_ms, over_rigl = round(1e3 * statistics.mean(own), 2), round(sum(own) / sum(base), 3)
        rows.append({"label": label, "step_ms": step_ms, "over_rigl": over_rigl})
        print(label, step_ms, over_rigl, flush=True)
    return {**environment(torch.device("cpu")), "update_interval": COMMON["interval"], "rows": rows}


def configs(dataset: str) -> list[TrainConfig]:
    """The runs' settings, of one seed."""
    found = []
    for grid in METHODS:
        for method, label, sparsity in product(grid["method"], grid["reliability"], grid["sparsity"]):
            reliability, without = parse_label(label)
            found.append(TrainConfig(
                dataset=dataset, data_root=".", method=method, reliability=reliability, without=without,
                sparsity=float(sparsity), **RESNET,
            ))  # fmt: skip
    return found


if __name__ == "__main__":
    main()
