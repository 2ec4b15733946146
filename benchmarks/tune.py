#!/usr/bin/env python3
"""Measure at which density the sparse kernels overtake the dense product, and store the table that users get.

    python benchmarks/tune.py                  # sparse_moon/ops/tables/crossover_cpu_avx512_intel.json and its like
    python benchmarks/tune.py --device cuda    # sparse_moon/ops/tables/crossover_cuda_sm90.json
    python benchmarks/tune.py --missing        # only what the table of this machine lacks
    python benchmarks/tune.py --device cuda --case vit_base resnet50 --seconds 75    # layers of networks first of all

Run it on an otherwise idle machine with as many threads as users have.
"""

import argparse
import copy
import itertools
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from gpu_networks import NETWORKS, has_blocks
from timing import environment, write_results
from torch import nn

import sparse_moon as sm
from sparse_moon.memory import keep_freed_memory
from sparse_moon.nn import SparseLayer
from sparse_moon.nn.tune import kernel_gain, products
from sparse_moon.ops import choice

TABLES = Path(__file__).parents[1] / "sparse_moon" / "ops" / "tables"
DENSITIES = [0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03, 0.015]
COMPILERS = 8  # processes


Case = tuple[nn.Module, tuple[int, ...], str, torch.dtype]
"""A dense layer, the shape of its input, a pattern and a dtype."""


def cuda_cases() -> Iterator[Case]:
    """What GPUs are busy with: the kernels' patterns differ in speed, and so do dtypes.

    float32 as torch has it by default: TF32 in convolutions, not in linear layers.
    """
    blocks, vectors = ["block16", "block32", "block64", "block128"], ["vector8", "vector16", "vector32"]
    kinds = [(pattern, torch.bfloat16) for pattern in (*blocks, *vectors, "unstructured")]
    kinds += [(pattern, torch.float32) for pattern in (*blocks, "unstructured")]
    for pattern, dtype in kinds:
        for tokens, inputs, outputs in ((256, 1024, 1024), (256, 4096, 4096), (4096, 1024, 1024), (4096, 4096, 4096)):
            yield nn.Linear(inputs, outputs, bias=False), (tokens, inputs), pattern, dtype
        for batch, channels, size in ((16, 256, 16), (256, 128, 16), (256, 256, 16), (256, 512, 4)):
            shape = (batch, channels, size, size)
            yield nn.Conv2d(channels, channels, 3, padding=1, bias=False), shape, pattern, dtype
        yield nn.Conv2d(256, 1024, 1, bias=False), (256, 256, 8, 8), pattern, dtype
        yield nn.Conv2d(256, 512, 3, 2, padding=1, bias=False), (256, 256, 8, 8), pattern, dtype


def network_cases(names: list[str], patterns: list[str]) -> Iterator[Case]:
    """The layers that become sparse in the networks whose steps are timed, once each: what decides their speed.

    One pattern after the other: where the time ends, the first ones are whole. For larger layers than those that were
    measured a choice can be made, for smaller ones not.
    """
    seen: set[str] = set()
    for network in NETWORKS:
        if any(part in network.name for part in names):
            for pattern, (_, layer, shape) in itertools.product(patterns, network.layers()):
                if (described := f"{layer} {tuple(shape)} {pattern}") not in seen and has_blocks(layer, 0.8, pattern):
                    seen.add(described)
                    real = copy.deepcopy(layer).to_empty(device="cpu")
                    real._forward_pre_hooks.clear()
                    real.reset_parameters()
                    yield real, tuple(shape), pattern, torch.bfloat16


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
    for batch in (1, 8, 128):
        for channels, size in ((16, 32), (64, 32), (128, 16), (256, 8), (512, 4)):
            found.append((nn.Conv2d(channels, channels, 3, padding=1, bias=False), (batch, channels, size, size)))
        for channels, outputs in ((3, 64), (8, 16)):  # dense products that are torch's
            found.append((nn.Conv2d(channels, outputs, 3, padding=1, bias=False), (batch, channels, 32, 32)))
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
    for batch in (1, 8, 128):  # MobileNet's
        for channels, stride, size in ((32, 1, 48), (96, 2, 48), (144, 1, 24), (192, 1, 12), (384, 1, 6), (960, 1, 3)):
            conv = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
            found.append((conv, (batch, channels, size, size)))
        for channels, outputs, size in (
            (16, 96, 48), (96, 24, 24), (24, 144, 24), (144, 32, 12), (192, 64, 6), (384, 96, 6), (576, 160, 3),
            (320, 1280, 3),
        ):  # fmt: skip
            found.append((nn.Conv2d(channels, outputs, 1, bias=False), (batch, channels, size, size)))
    for batch in (1, 8):
        found.append((nn.Conv2d(3, 64, 7, 2, 3, bias=False), (batch, 3, 224, 224)))
        found.append((nn.Conv2d(64, 64, 3, padding=1, bias=False), (batch, 64, 56, 56)))
    for batch in (1, 8, 128):
        found.append((nn.Conv2d(32, 64, 5, padding=2, bias=False), (batch, 32, 16, 16)))
    for batch in (1, 8, 32, 128, 512, 2048):
        for inputs, outputs in ((64, 64), (256, 10), (512, 512), (1024, 1024), (768, 3072), (4096, 4096)):
            found.append((nn.Linear(inputs, outputs, bias=False), (batch, inputs)))
    for tokens in (197, 1576, 6304, 25216):  # a small vision transformer's
        for inputs, outputs in ((192, 768), (768, 192), (192, 192)):
            found.append((nn.Linear(inputs, outputs, bias=False), (tokens, inputs)))
    return found


def crossover(gain: Callable[[float], float]) -> float:
    """Density at which the kernel's time passes the dense one's; 1 where it is faster at all ``DENSITIES``, 0 at none.

    Args:
        gain: the logarithm of how much faster the kernel is at a density. It falls with density, so the place in
            ``DENSITIES`` is found by bisection; between two of them it is interpolated in logarithms.
    """
    loses, wins = -1, len(DENSITIES) - 1  # places; before the first none is known to lose
    gains = {wins: gain(DENSITIES[wins])}
    if gains[wins] < 0:
        return 0.0
    while wins - loses > 1:
        middle = (loses + wins) // 2
        gains[middle] = gain(DENSITIES[middle])
        if gains[middle] < 0:
            loses = middle
        else:
            wins = middle
    if loses < 0:
        return 1.0
    share = gains[wins] / (gains[wins] - gains[loses])
    return math.exp((1 - share) * math.log(DENSITIES[wins]) + share * math.log(DENSITIES[loses]))


def sparse(dense: nn.Module, density: float, pattern: str) -> SparseLayer:
    """A random part of the layer."""
    kind = sm.SparseConv2d if isinstance(dense, nn.Conv2d) else sm.SparseLinear
    # by magnitude, which is as good as random in a new layer, because drawing is slow
    return kind.from_dense(dense, sparsity=1 - density, pattern=pattern, selection="magnitude")


def measure(
    dense: nn.Module, shape: tuple[int, ...], pattern: str, layout: torch.memory_format, known: set[choice.Work]
) -> list[dict[str, Any]]:
    """The table's rows of one layer, but for what is known."""

    device = next(dense.parameters()).device

    @cache
    def runs(density: float) -> dict[choice.Pass, Callable[[], Any]]:
        return products(sparse(dense, density, pattern), shape, layout)

    def gain(pass_: choice.Pass, density: float) -> float:
        run = runs(density)[pass_]
        seconds = 0.001 if device.type == "cuda" else 0.02
        return math.log(kernel_gain(run, device, seconds=seconds))

    rows: list[dict[str, Any]] = []
    for pass_, run in runs(DENSITIES[-1]).items():
        if device.type == "cpu" and pass_ in _seldom_alone(dense, shape):
            continue
        with choice.use_backend("kernel"), choice.asked_for() as works:
            run()
        if not known.issuperset(works):
            found = round(crossover(partial(gain, pass_)), 4)
            rows += [{"work": work._asdict(), "crossover": found} for work in works]
            print(f"{works[0]}: {found}", flush=True)
    return rows


def _seldom_alone(dense: nn.Module, shape: tuple[int, ...]) -> tuple[choice.Pass, ...]:
    """Gradients that are not measured by themselves on the CPU, because only layers in part frozen compute them so.

    Both of a linear layer are measured together and stand for each; that of a convolution's input is taken from
    smaller batches.
    """
    if isinstance(dense, nn.Linear):
        return "input_grad", "values_grad"
    return ("input_grad",) if shape[0] > 8 else ()


def compile_kernels(case: Case) -> None:
    """Run a case's kernels once, in a process of its own: Triton keeps what it has compiled on disk."""
    dense, shape, pattern, dtype = case  # on meta: between processes weights would go through shared memory
    dense = dense.to_empty(device="cuda").to(dtype)
    dense.reset_parameters()
    with choice.use_backend("kernel"):
        for run in products(sparse(dense, DENSITIES[-1], pattern), shape).values():
            run()


def kept_table(path: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """The table as it is, with what it needs to say about rows that are kept; it must be of this machine."""
    table = json.loads(path.read_text())
    for key in ("cpu", "gpu", "capability", "threads"):
        if table.get(key) != machine.get(key):
            pair = f"{table.get(key)!r}, here {machine.get(key)!r}"
            raise SystemExit(f"{path.name} is of another machine: {key} {pair}")
    measured = {key: table[key] for key in ("date", "commit", "torch")} | {"rows": len(table["rows"])}
    return {"kept": [*table.get("kept", []), measured], "rows": table["rows"]}


def replaced_table(path: Path) -> dict[str, Any]:
    """The table as it is, whose rows are replaced one by one, with what it says about them."""
    if not path.exists():
        return {"rows": []}
    table = json.loads(path.read_text())
    return {"kept": {key: value for key, value in table.items() if key != "rows"}, "rows": table["rows"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--missing", action="store_true", help="keep the rows that the table has")
    parser.add_argument("--case", nargs="+", help="on CUDA: layers of networks whose name contains one of these; other "
                        "rows stay")  # fmt: skip
    parser.add_argument("--pattern", nargs="+", default=["block64", "block32", "block128", "vector16"],
                        help="with --case")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no other layer after this time")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    keep_freed_memory()  # as training does
    path, machine = TABLES / choice.table_name(device.type), environment(device)
    kept = {"rows": []}
    if arguments.case or arguments.missing:
        kept = replaced_table(path) if arguments.case else kept_table(path, machine)
    known = {work for work, _ in choice.table(device.type)} if arguments.missing else set()
    if arguments.case:
        cases = list(network_cases(arguments.case, arguments.pattern))
    else:
        cases = list(cpu_cases() if device.type == "cpu" else cuda_cases())
    if device.type == "cuda" and not arguments.case:  # compile_kernels.py has compiled those of networks
        with multiprocessing.get_context("spawn").Pool(COMPILERS) as pool:
            pool.map(compile_kernels, [(copy.deepcopy(dense).to("meta"), *rest) for dense, *rest in cases], chunksize=1)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # as the dense layers of training steps have it
    rows: list[dict[str, Any]] = []
    failed = 0
    end = time.monotonic() + arguments.seconds
    for done, (dense, shape, pattern, dtype) in enumerate(cases):
        if time.monotonic() > end:
            print(f"no time for {len(cases) - done} of {len(cases)} layers", flush=True)
            break
        for layout in layouts(dense, device):
            try:
                rows += measure(dense.to(device, dtype), shape, pattern, layout, known)
            except Exception as error:  # a layer that cannot be measured leaves the others
                failed += 1
                print(f"{dense} {shape} {pattern} failed: {type(error).__name__}: {error}", flush=True)
        if rows:
            works = {choice.as_work(row["work"]) for row in rows}
            others = [row for row in kept["rows"] if choice.as_work(row["work"]) not in works]
            write_results(path, {**machine, **kept, "rows": others + rows})
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
