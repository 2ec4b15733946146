#!/usr/bin/env python3
"""Time that a tiny layer takes, beside torch's own dense one: what a call costs apart from arithmetic.

    python benchmarks/host_time.py
    python benchmarks/host_time.py --before ../checkout     # also of another checkout, with its kernels built in place
    python benchmarks/host_time.py --stub-gpu               # the GPU's way, without a GPU and without its launches

Forward + backward of a linear layer (64 to 64 features, 4 tokens), of a classifier's head (512 to 10, one token) and
of a convolution (16 to 16 channels, 3 x 3, one image of 4 x 4) at 90 % sparsity, on one thread, all gradients.
Processes of either checkout take turns; in each, sparse and dense layers take turns in short rounds. Minimum and median
over all rounds: another process on the machine makes rounds longer, never shorter. Writes
benchmarks/results/host_time.json.

With --stub-gpu sparse layers of several patterns take what they take on a GPU, see stub_gpu.py, beside torch's dense
layer on the CPU. Of the sparse layer that leaves out the driver's part of each launch, of which ``launches`` says how
many there are, and what the CUDA extension does in C++; of the dense one the launches are left out as well, and its
arithmetic, which takes little at these sizes, is in it. Writes benchmarks/results/host_time_gpu.json.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CALLS = 60
PATTERNS = {"unstructured": 0.9, "block16": 0.7, "vector8": 0.9}  # with a sparsity that leaves each layer weights


def layers_of_patterns() -> dict[str, tuple[Any, Any, Any, Any]]:
    """As :func:`layers`, for a GPU."""
    import torch
    from torch import nn

    import sparse_moon as sm

    linear, conv2d = nn.Linear(64, 64), nn.Conv2d(16, 16, 3, padding=1)
    x, images = torch.randn(4, 64, requires_grad=True), torch.randn(1, 16, 4, 4, requires_grad=True)
    found = {}
    for pattern, sparsity in PATTERNS.items():
        sparse = sm.SparseLinear.from_dense(linear, sparsity=sparsity, pattern=pattern)
        found[f"linear {pattern}"] = linear, sparse, x, torch.randn(4, 64)
        sparse = sm.SparseConv2d.from_dense(conv2d, sparsity=sparsity, pattern=pattern)
        found[f"conv2d {pattern}"] = conv2d, sparse, images, torch.randn(1, 16, 4, 4)
    return found


def layers() -> dict[str, tuple[Any, Any, Any, Any]]:
    """By name: the dense layer, the sparse one, an input and a gradient of the output."""
    import torch
    from torch import nn

    import sparse_moon as sm

    linear, head, conv2d = nn.Linear(64, 64), nn.Linear(512, 10), nn.Conv2d(16, 16, 3, padding=1)
    x, images = torch.randn(4, 64, requires_grad=True), torch.randn(1, 16, 4, 4, requires_grad=True)
    features = torch.randn(1, 512, requires_grad=True)
    return {
        "linear": (linear, sm.SparseLinear.from_dense(linear, sparsity=0.9), x, torch.randn(4, 64)),
        "head": (head, sm.SparseLinear.from_dense(head, sparsity=0.9), features, torch.randn(1, 10)),
        "conv2d": (conv2d, sm.SparseConv2d.from_dense(conv2d, sparsity=0.9), images, torch.randn(1, 16, 4, 4)),
    }


def measure(rounds: int, stub_gpu: bool = False) -> dict[str, list[float]]:
    """Microseconds of a forward and of a forward + backward pass, a number for each round; launches of one pass."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {}
    runs: dict[str, Callable[[], Any]] = {}
    launches: Counter[str] = Counter()
    if stub_gpu:
        import stub_gpu as stub

        stub.install()
        launches = stub.launches
    for name, (dense, sparse, x, grad) in (layers_of_patterns() if stub_gpu else layers()).items():
        for kind, layer in (("dense", dense), ("sparse", sparse)):
            wanted = (x, *layer.parameters())
            runs[f"{name} {kind} forward"] = lambda layer=layer, x=x: layer(x)
            runs[f"{name} {kind} forward + backward"] = lambda layer=layer, x=x, grad=grad, wanted=wanted: (
                torch.autograd.grad(layer(x), wanted, grad)
            )
    for name, run in runs.items() if stub_gpu else ():
        before = launches.total()
        run()
        times[f"launches {name}"] = [launches.total() - before]
    gc.collect()
    gc.disable()
    for round_ in range(rounds + 5):
        for name, run in runs.items():
            start = time.perf_counter_ns()
            for _ in range(CALLS):
                run()
            if round_ >= 5:
                times.setdefault(name, []).append((time.perf_counter_ns() - start) / CALLS / 1e3)
    return times


def measured_in(folder: Path, rounds: int, stub_gpu: bool) -> dict[str, list[float]]:
    """The same in a new process, of the checkout in this folder."""
    command = [sys.executable, __file__, "--child", "--rounds", str(rounds), *(["--stub-gpu"] if stub_gpu else [])]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def commit_of(folder: Path) -> str | None:
    """Its commit, where it is a checkout."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 and (folder / ".git").exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="another checkout to compare with")
    parser.add_argument("--before-commit", help="its commit, where it has no .git")
    parser.add_argument("--rounds", type=int, default=100, help="rounds a process")
    parser.add_argument("--processes", type=int, default=5, help="of each checkout")
    parser.add_argument("--stub-gpu", action="store_true", help="what the host does for a GPU, without launches")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/host_time.json or host_time_gpu.json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.rounds, options.stub_gpu)))
        return
    out = options.out or ROOT / "benchmarks" / "results" / f"host_time{'_gpu' if options.stub_gpu else ''}.json"

    import torch
    from timing import environment, write_results

    folders = {"after": ROOT} | ({"before": options.before.resolve()} if options.before else {})
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(options.processes):
        for side, folder in folders.items():
            for name, values in measured_in(folder, options.rounds, options.stub_gpu).items():
                times.setdefault((side, name), []).extend(values)
    rows = []
    for side in folders:
        for name in dict.fromkeys(run.rsplit(" dense ")[0] for _, run in times if " dense " in run):
            if name.startswith("launches "):
                continue
            for pass_ in ("forward", "forward + backward"):
                dense, sparse = (times[side, f"{name} {kind} {pass_}"] for kind in ("dense", "sparse"))
                row: dict[str, Any] = {"checkout": side, "layer": name, "pass": pass_}
                for kind, us in (("dense", dense), ("sparse", sparse)):
                    row |= {f"{kind}_us": round(min(us), 1), f"{kind}_us_median": round(statistics.median(us), 1)}
                row["ratio"] = round(row["sparse_us"] / row["dense_us"], 2)
                if options.stub_gpu:
                    row["launches"] = int(times[side, f"launches {name} sparse {pass_}"][0])
                rows.append(row)
                beyond = row["sparse_us"] - row["dense_us"]
                print(
                    f"{side:7}{name:20}{pass_:20}dense {row['dense_us']:6.1f} us, sparse {row['sparse_us']:6.1f}, "
                    f"beyond {beyond:6.1f}, {row['ratio']:.2f} x"
                )
    before = options.before_commit or (commit_of(folders["before"]) if options.before else None)
    about = {"threads": 1, "before_commit": before, "rounds": options.rounds, "processes": options.processes}
    write_results(out, {**environment(torch.device("cpu")), **about, "rows": rows})


if __name__ == "__main__":
    main()
