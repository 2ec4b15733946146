#!/usr/bin/env python3
"""Measure at which density the sparse kernels overtake the dense product, and store the table that users get.

    python benchmarks/tune.py                  # sparse_moon/ops/crossover_cpu_avx2.json or ..._avx512.json
    python benchmarks/tune.py --device cuda    # sparse_moon/ops/crossover_cuda.json
    python benchmarks/tune.py --missing        # only what the table of this machine lacks

Run it on an otherwise idle machine with as many threads as users have.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timing import environment, write_results
from torch import nn

import sparse_moon as sm
from sparse_moon.memory import keep_freed_memory
from sparse_moon.nn import SparseLayer
from sparse_moon.ops import choice
from sparse_moon.tuning import best_ms, products

TABLES = Path(__file__).parents[1] / "sparse_moon" / "ops"
DENSITIES = [1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03, 0.015]


Case = tuple[nn.Module, tuple[int, ...], str, torch.dtype]
"""A dense layer, the shape of its input, a pattern and a dtype."""


def cuda_cases() -> Iterator[Case]:
    """What GPUs are busy with: the kernels' patterns differ in speed, and so do dtypes."""
    patterns = ["block16", "block32", "block64", "block128", "vector8", "vector16", "vector32"]
    kinds = [(p, dtype) for p in patterns for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    kinds += [("unstructured", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    for pattern, dtype in kinds:
        for tokens in (256, 4096):
            for inputs, outputs in ((1024, 1024), (4096, 4096)):
                yield nn.Linear(inputs, outputs, bias=False), (tokens, inputs), pattern, dtype
        for channels, size in ((128, 16), (256, 16), (512, 4)):
            for batch in (16, 256):
                shape = (batch, channels, size, size)
                yield nn.Conv2d(channels, channels, 3, padding=1, bias=False), shape, pattern, dtype
        yield nn.Conv2d(256, 1024, 1, bias=False), (256, 256, 8, 8), pattern, dtype
        yield nn.Conv2d(256, 512, 3, 2, padding=1, bias=False), (256, 256, 8, 8), pattern, dtype


def cpu_cases() -> Iterator[Case]:
    """All patterns have one speed on the CPU."""
    for layer, shape in layers():
        yield layer, shape, "unstructured", torch.float32


def layouts(dense: nn.Module, device: torch.device) -> list[torch.memory_format]:
    """Those of the input that make a difference: kernels of a GPU take images in channels_last only."""
    both = isinstance(dense, nn.Conv2d) and device.type == "cpu"
    return [torch.contiguous_format, torch.channels_last] if both else [torch.contiguous_format]


def layers() -> list[tuple[nn.Module, tuple[int, ...]]]:
    """Layers and inputs of the networks that people train, and small and large batches of some."""
    found: list[tuple[nn.Module, tuple[int, ...]]] = []
    for batch in (1, 8, 32, 128):
        for channels, size in ((16, 32), (64, 32), (128, 16), (256, 8), (512, 4)):
            found.append((nn.Conv2d(channels, channels, 3, padding=1, bias=False), (batch, channels, size, size)))
        for channels, size in ((64, 32), (128, 16), (256, 8), (512, 4)):
            found += [
                (nn.Conv2d(channels, 4 * channels, 1, bias=False), (batch, channels, size, size)),
                (nn.Conv2d(4 * channels, channels, 1, bias=False), (batch, 4 * channels, size, size)),
            ]
        for channels, size in ((64, 32), (128, 16), (256, 8)):
            conv = nn.Conv2d(channels, 2 * channels, 3, 2, padding=1, bias=False)
            found.append((conv, (batch, channels, size, size)))
        for channels, size in ((64, 32), (128, 16), (256, 8), (256, 32), (512, 16), (1024, 8)):
            found.append((nn.Conv2d(channels, 2 * channels, 1, 2, bias=False), (batch, channels, size, size)))
    for batch in (1, 8, 128):
        found.append((nn.Conv2d(3, 64, 7, 2, 3, bias=False), (min(batch, 8), 3, 224, 224)))
        found.append((nn.Conv2d(64, 64, 3, padding=1, bias=False), (min(batch, 8), 64, 56, 56)))
        found.append((nn.Conv2d(32, 64, 5, padding=2, bias=False), (batch, 32, 16, 16)))
    for batch in (1, 8, 32, 128, 512, 2048):
        for inputs, outputs in ((256, 10), (512, 512), (1024, 1024), (768, 3072), (4096, 4096)):
            found.append((nn.Linear(inputs, outputs, bias=False), (batch, inputs)))
    return found


def crossover(times: list[tuple[float, float, float]]) -> float:
    """Density at which the kernel's time passes the reference's, from (density, kernel, reference) by falling density.

    Between two measured densities it is interpolated in logarithms; 1 where the kernel always wins, 0 where it never
    does.
    """
    previous = None
    for density, kernel, reference in times:
        gain = math.log(reference / kernel)
        if gain >= 0:
            if previous is None:
                return 1.0 if density == times[0][0] else density
            other, loss = previous
            share = gain / (gain - loss)
            return math.exp(math.log(density) + share * (math.log(other) - math.log(density)))
        previous = density, gain
    return 0.0


def sparse(dense: nn.Module, density: float, pattern: str) -> SparseLayer:
    """A random part of the layer."""
    torch.manual_seed(0)
    kind = sm.SparseConv2d if isinstance(dense, nn.Conv2d) else sm.SparseLinear
    return kind.from_dense(dense, sparsity=1 - density, pattern=pattern)


def measure(
    dense: nn.Module, shape: tuple[int, ...], pattern: str, layout: torch.memory_format, known: set[choice.Work]
) -> list[dict[str, Any]]:
    """The table's rows of one layer, but for what is known."""
    wanted: dict[choice.Pass, list[choice.Work]] = {}
    sparsest = products(sparse(dense, DENSITIES[-1], pattern), shape, layout)
    for pass_, run in sparsest.items():
        with choice.asked_for() as works:
            run()
        if not known.issuperset(works):
            wanted[pass_] = works
    if not wanted:
        return []
    rows: list[dict[str, Any]] = []
    runs = [(density, products(sparse(dense, density, pattern), shape, layout)) for density in DENSITIES[:-1]]
    runs.append((DENSITIES[-1], sparsest))
    for pass_, works in wanted.items():
        times = []
        for density, run in runs:
            pair = [best_ms(run[pass_], backend) for backend in ("kernel", "reference")]
            times.append((density, *pair))
            if pair[0] < 0.7 * pair[1]:
                break  # sparser is only faster
        found = round(crossover(times), 4)
        rows += [{"work": work._asdict(), "crossover": found} for work in works]
        print(f"{works[0]}: {found}", flush=True)
    return rows


def kept_table(path: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """The table as it is, with what it needs to say about rows that are kept; it must be of this machine."""
    table = json.loads(path.read_text())
    for key in ("cpu", "gpu", "capability", "threads"):
        if table.get(key) != machine.get(key):
            pair = f"{table.get(key)!r}, here {machine.get(key)!r}"
            raise SystemExit(f"{path.name} is of another machine: {key} {pair}")
    measured = {key: table[key] for key in ("date", "commit", "torch")} | {"rows": len(table["rows"])}
    return {"kept": [*table.get("kept", []), measured], "rows": table["rows"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--missing", action="store_true", help="keep the rows that the table has")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    keep_freed_memory()  # as training does
    path, machine = TABLES / choice.table_name(device.type), environment(device)
    kept = kept_table(path, machine) if arguments.missing else {"rows": []}
    known = {work for work, _ in choice.table(device.type)} if arguments.missing else set()
    rows: list[dict[str, Any]] = []
    for dense, shape, pattern, dtype in cpu_cases() if device.type == "cpu" else cuda_cases():
        for layout in layouts(dense, device):
            rows += measure(dense.to(device, dtype), shape, pattern, layout, known)
    if rows:
        write_results(path, {**machine, **kept, "rows": kept["rows"] + rows})


if __name__ == "__main__":
    main()
