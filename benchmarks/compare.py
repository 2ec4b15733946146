#!/usr/bin/env python3
"""RigL and SET, each without and with MOON and CigL, at 95 and 99 % sparsity, and MOON's ablations at 99 %.

    python benchmarks/compare.py mnist DATA             # 45 runs, about 15 minutes each on a core
    python benchmarks/compare.py mnist DATA --jobs 2 --seed 0

Trains what benchmarks/results/mnist lacks and writes the table there. Interrupted, it goes on where it was. Each run's
settings, metrics and results belong to the repository, with the machine and the versions that made them; checkpoints,
scores and pages do not.

DATA holds mnist.npz and cifar10.npz with the arrays x_train, y_train, x_test and y_test, and the OOD sets named below,
with the images in x or x_test.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from timing import environment

from sparse_moon import runs

RESULTS = Path(__file__).resolve().parent / "results"
ENVIRONMENT = "environment.json"

# The learning rates and their schedule, the topology's end and the final weights are those of arXiv 2403.20047.
COMMON = [
    "--model", "small-resnet", "--width", "16", "--fuse", "--batch-size", "128", "--interval", "100",
    "--lr", "0.12", "--lr-end", "0.008", "--epochs", "15", "--warmup-epochs", "5",
]  # fmt: skip
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
    arguments = parser.parse_args()
    out = (arguments.out or RESULTS / arguments.dataset).resolve()
    out.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "sparse_moon", "compare", "--out", str(out), "--jobs", str(arguments.jobs),
        "--dataset", arguments.dataset, "--data-root", ".", *COMMON, *DATASETS[arguments.dataset],
    ]  # fmt: skip
    for seed in arguments.seed:
        for grid in GRIDS:
            before = environment(torch.device("cpu"))
            # from the folder of the data, so that no run's settings hold a path of this machine
            code = subprocess.run([*command, *grid, "--seed", str(seed)], cwd=arguments.data).returncode
            for results in out.glob(f"*/{runs.RESULTS}"):
                if not (path := results.with_name(ENVIRONMENT)).exists():
                    runs.write_json(path, before)
            if code:
                sys.exit(code)


if __name__ == "__main__":
    main()
