#!/usr/bin/env python3
"""CPU time until the command line answers, beside that of importing torch; writes benchmarks/results/startup.json.

    python benchmarks/startup.py

User and system time of new processes that take turns; medians of 7 rounds after one that fills the page cache.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from timing import environment, write_results

from sparse_moon.text_table import text_table

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import sparse_moon": ["-c", "import sparse_moon"],
    "import sparse_moon; sparse_moon.RigL": ["-c", "import sparse_moon; sparse_moon.RigL"],
    "sparse-moon --help": ["-m", "sparse_moon", "--help"],
    "sparse-moon --version": ["-m", "sparse_moon", "--version"],
    "sparse-moon train --help": ["-m", "sparse_moon", "train", "--help"],
    "sparse-moon train --epoch 3": ["-m", "sparse_moon", "train", "--epoch", "3"],
    "sparse-moon train --dataset nowhere": ["-m", "sparse_moon", "train", "--dataset", "nowhere"],
    "sparse-moon eval nowhere": ["-m", "sparse_moon", "eval", "nowhere"],
}


def cpu_s(arguments: list[str]) -> float:
    """User and system seconds of a Python process."""
    before = os.times()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="times each command runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "startup.json")
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(options.rounds + 1):
        for name, arguments in COMMANDS.items():
            times[name].append(cpu_s(arguments))
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    reference = medians["import torch"]
    rows = [
        {"command": name, "cpu_s": round(median, 3), "over_torch": round(median / reference, 3)}
        for name, median in medians.items()
    ]
    shown = [(row["command"], f"{row['cpu_s']:.2f}", f"{row['over_torch']:.2f}") for row in rows]
    print(text_table([("command", "CPU time in s", "x torch"), *shown], "lrr"))
    write_results(options.out, {**environment(torch.device("cpu")), "rounds": options.rounds, "rows": rows})


if __name__ == "__main__":
    main()
