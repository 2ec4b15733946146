#!/usr/bin/env python3
"""Speed of sparse_moon against dense PyTorch and its peers, on the machine at hand.

    python benchmarks/flops_and_time.py layers --sparsity 0.9 0.95 --peers
    python benchmarks/flops_and_time.py all --json benchmarks/results/cpu.json --plot benchmarks/results/cpu.png

Layers, losses and batch norm are timed after their results have passed a comparison with float64, updates after one
with a reference. Every time is a median of interleaved runs in this process, which keeps freed memory for both sides,
every speed-up a ratio to a named baseline in the same rounds; losses are printed like wins.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gpu_steps
import step_times
import torch
import torch.nn.functional as F
from batch_norm_times import batch_norm
from bench import CUDA_CASES, DTYPES, MAIN_CASES, NETWORKS, Bench, Row, WrongResult
from layer_times import choice, layers
from step_times import memory
from torch import Tensor

import sparse_moon as sm
from sparse_moon.memory import keep_freed_memory
from sparse_moon.ops.drop_and_grow import drop_and_grow_reference
from sparse_moon.ops.unknown_aware_loss import unknown_aware_loss_reference
from sparse_moon.topology import Topology


def step(bench: Bench) -> None:
    """Whole training steps of the networks that a CPU or a GPU is for."""
    (gpu_steps.step if bench.device.type == "cuda" or bench.arguments.tiny else step_times.step)(bench)


def update(bench: Bench) -> None:
    """One layer's topology update against PyTorch's sorts."""
    for rows, cols in ((512, 4608), (4096, 4096)):
        for sparsity in bench.arguments.sparsity:
            bench.case(f"drop_and_grow_{rows}_{cols} {sparsity}", _update, rows, cols, sparsity)


def _update(bench: Bench, rows: int, cols: int, sparsity: float) -> None:
    torch.manual_seed(0)
    topology = Topology.random((rows, cols), 1 - sparsity).to(bench.device)
    drop = torch.rand(topology.num_blocks, device=bench.device)
    grow = torch.rand(rows, cols, device=bench.device)
    count = int(0.3 * topology.num_blocks)
    ours = sm.ops.drop_and_grow(drop, grow, topology, count)
    exact = drop_and_grow_reference(drop, grow, topology.row_ptr, topology.col, count, count)
    if not all(torch.equal(a, b) for a, b in zip((*ours.index, ours.source), exact, strict=True)):
        raise WrongResult("drop_and_grow: differs from the reference")
    mask, weight = topology.mask(), topology.to_dense(drop)
    times = bench.times({
        "ours": lambda _: sm.ops.drop_and_grow(drop, grow, topology, count),
        "two topk": lambda _: _two_topk(weight, grow, mask, count),
    })  # fmt: skip
    moved = 4.0 * grow.numel() + 60.0 * topology.num_blocks
    bench.add(Row(
        "update", f"drop_and_grow_{rows}_{cols}", "unstructured", sparsity, "fp32", bench.device.type, "update",
        times["ours"], "two topk", times["two topk"], times["two topk"] / times["ours"],
        floor_ms=bench.floor_ms(0, moved), max_error=0.0,
    ))  # fmt: skip


def _two_topk(weight: Tensor, grad: Tensor, mask: Tensor, count: int) -> Tensor:
    """The update as public ports have it: a dense mask and a top-k over all weights each way."""
    flat, new = weight.abs().flatten(), mask.flatten().clone()
    dropped = torch.where(new, flat, torch.inf).topk(count, largest=False).indices
    new.index_fill_(0, dropped, False)
    return new.index_fill_(0, torch.where(new, -1.0, grad.abs().flatten()).topk(count).indices, True)


def loss(bench: Bench) -> None:
    """MOON's loss with its gradient, against the eager formula and plain cross-entropy."""
    for batch, classes in ((128, 10), (1024, 1000)):
        bench.case(f"unknown_aware_loss_{batch}_{classes + 1}", _loss, batch, classes)


def _loss(bench: Bench, batch: int, classes: int) -> None:
    w = torch.tensor(1.0, device=bench.device)
    logits = torch.randn(batch, classes + 1, device=bench.device, requires_grad=True)
    target = torch.randint(classes, (batch,), device=bench.device)
    exact = unknown_aware_loss_reference(logits.double(), target, w.double())
    value, _ = sm.ops.unknown_aware_loss(logits, target, w)
    error = abs(value.item() - exact.item()) / exact.item()
    if error > 1e-5:
        raise WrongResult(f"unknown_aware_loss: error {error:.1e}")
    times = bench.times({
        "ours": lambda _: sm.ops.unknown_aware_loss(logits, target, w)[0].backward(),
        "eager formula": lambda _: unknown_aware_loss_reference(logits, target, w).backward(),
        "cross-entropy": lambda _: F.cross_entropy(logits, target).backward(),
    })  # fmt: skip
    for name in ("eager formula", "cross-entropy"):
        bench.add(Row(
            "loss", f"unknown_aware_loss_{batch}_{classes + 1}", "-", 0.0, "fp32", bench.device.type, "fwd+bwd",
            times["ours"], name, times[name], times[name] / times["ours"],
            floor_ms=bench.floor_ms(0, 12.0 * logits.numel()), max_error=error,
        ))  # fmt: skip


def average(bench: Bench) -> None:
    """Averaging all weights of a sparse ResNet-18, plain and with a random mask."""
    for sparsity in bench.arguments.sparsity:
        bench.case(f"resnet18 average {sparsity}", _average, sparsity)


def _average(bench: Bench, sparsity: float) -> None:
    model = sm.sparsify(NETWORKS[0].build(11), sparsity).to(bench.device)
    values = [p.detach() for p in model.parameters()]
    averages = [torch.zeros_like(v) for v in values]
    count = torch.tensor(3, device=bench.device)
    times = bench.times({
        "plain": lambda _: sm.ops.average_(averages, values, count),
        "masked": lambda _: sm.ops.average_(averages, values, count, keep=0.9, seed=1, step=count),
        "torch._foreach_lerp_": lambda _: torch._foreach_lerp_(averages, values, 0.25),
        "stored masks": lambda _: torch._foreach_lerp_(
            averages, torch._foreach_mul(values, [torch.rand_like(v) < 0.9 for v in values]), 0.25
        ),
    })  # fmt: skip
    floor = bench.floor_ms(0, 12.0 * sum(v.numel() for v in values))
    for ours, theirs in (("plain", "torch._foreach_lerp_"), ("masked", "stored masks")):
        bench.add(Row(
            "average", f"resnet18_{ours}", "unstructured", sparsity, "fp32", bench.device.type, "update",
            times[ours], theirs, times[theirs], times[theirs] / times[ours], floor_ms=floor,
        ))  # fmt: skip


def summarise(rows: list[Row]) -> Iterator[str]:
    """Geometric means over the main layers, by kind, pass, sparsity and baseline."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    names = {case.name for case in (*MAIN_CASES, *CUDA_CASES)}
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row.section == "layers" and row.case in names:
            baseline = row.baseline.split(" over ")[0].removesuffix(" channels_last")
            key = (row.case, row.pattern, row.dtype, row.pass_, row.sparsity, baseline)
            if key not in best or row.baseline_ms < best[key].baseline_ms:  # of a peer's kernels the faster counts
                best[key] = row
    for (case, *key, baseline), row in best.items():
        groups.setdefault((case.split("_")[0], *key, baseline), []).append(row.speedup)
    for (kind, pattern, dtype, pass_, sparsity, baseline), values in sorted(groups.items()):
        mean = math.exp(sum(map(math.log, values)) / len(values))
        yield (
            f"{kind:<9}{pattern:<13}{dtype} {pass_:<8}{sparsity:>5.2f}  {mean:>6.2f}x {baseline} "
            f"(geometric mean of {len(values)})"
        )


def plot(rows: list[Row], path: Path) -> None:
    """Speed-up of every main layer over dense in the same dtype, against sparsity, with the crossover line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    names = {case.name for case in (*MAIN_CASES, *CUDA_CASES)}
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.case in names and row.pass_ == "fwd+bwd" and row.baseline.startswith(f"dense {row.dtype}"):
            lines.setdefault(f"{row.case} {row.pattern} {row.dtype}", []).append((row.sparsity, row.speedup))
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.axhline(1.0, color="black", linewidth=1, linestyle="--")
    axes.set(xlabel="sparsity", ylabel="speed-up of forward + backward over dense", yscale="log")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


SECTIONS = {"layers": layers, "step": step, "update": update, "loss": loss, "average": average, "memory": memory}
LONG_SECTIONS = {"choice": choice, "batch_norm": batch_norm}  # not part of "all"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", nargs="*", default="all", choices=[*SECTIONS, *LONG_SECTIONS, "all"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9, 0.95, 0.99])
    parser.add_argument("--pattern", nargs="+", default=["unstructured"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128], help="of 'choice'")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32"], help="of 'layers' and "
                        "'batch_norm'")  # fmt: skip
    parser.add_argument("--backend", default="auto", help="auto, kernel, triton or cuda: which kernels may run")
    parser.add_argument("--case", nargs="+", help="only cases whose name contains one of these")
    parser.add_argument("--peers", action="store_true", help="also time SparseProp, where it is installed")
    parser.add_argument("--recompute", action="store_true", help="of 'step' and 'memory': as in sparsify")
    parser.add_argument("--no-autocast", action="store_true", help="of 'step' on the CPU: float32 alone, where "
                        "torch emulates bfloat16 and takes minutes")  # fmt: skip
    parser.add_argument("--graph", action="store_true", help="on CUDA: times of the GPU alone, as CUDA graphs")
    parser.add_argument("--threads", type=int, help="torch's threads; default its own choice")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, main cases only")
    parser.add_argument("--dense", nargs="+", choices=gpu_steps.DENSE, default=list(gpu_steps.DENSE), help="on CUDA "
                        "of 'step': the dense steps")  # fmt: skip
    parser.add_argument("--compile-sparse", nargs="+", choices=gpu_steps.DENSE[1:], default=[], help="on CUDA of "
                        "'step': ways of compiling the sparse step of the first sparsity and pattern, too")  # fmt: skip
    parser.add_argument("--compile-only", action="store_true", help="on CUDA of 'step': fill the compiler's cache, "
                        "and time nothing")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="of 'step' and 'batch_norm': what CUDA would "
                        "run, of tiny networks")  # fmt: skip
    parser.add_argument("--case-seconds", type=float, default=math.inf, help="on CUDA of 'step': the most for a case")
    parser.add_argument("--seconds", type=float, help="on CUDA of 'step': the most for all; the rest is left out")
    parser.add_argument("--json", type=Path, help="results file to write, after each case")
    parser.add_argument("--plot", type=Path, help="picture of speed-up against sparsity to write")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    kept = keep_freed_memory()  # what sparse layers in training do by themselves, so that dense sides always have it
    if torch.device(arguments.device).type == "cuda":
        torch.backends.cudnn.benchmark = True  # as dense users have it
    bench = Bench(arguments, kept)
    print(", ".join(f"{k} {v:.0f}" for k, v in bench.ceilings.items()))
    sections = [arguments.section] if isinstance(arguments.section, str) else arguments.section  # the default is one
    for name, run in (SECTIONS | LONG_SECTIONS).items():
        if name in sections or ("all" in sections and name in SECTIONS):
            # no block for "auto": inside of one, nothing that was decided is kept for the next call
            with nullcontext() if arguments.backend == "auto" else sm.ops.use_backend(arguments.backend):
                run(bench)
    print(*summarise(bench.rows), sep="\n")
    bench.save()
    if arguments.plot:
        plot(bench.rows, arguments.plot)
    sys.exit(bool(bench.failures))


if __name__ == "__main__":
    main()
