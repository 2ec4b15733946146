#!/usr/bin/env python3
"""Speed of sparse_moon against dense PyTorch and its peers, on the machine at hand.

    python benchmarks/flops_and_time.py layers --sparsity 0.9 0.95 --peers
    python benchmarks/flops_and_time.py all --json benchmarks/results/cpu.json --plot benchmarks/results/cpu.png

Nothing is timed before its result has passed a comparison with float64. Every time is a median of interleaved runs in
this process, every speed-up a ratio to a named baseline in the same rounds; losses are printed like wins.
"""

import argparse
import copy
import math
import multiprocessing
import resource
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import ceilings, computes_bf16, environment, graphed, median_ms, write_results
from torch import Tensor, nn

import sparse_moon as sm
from sparse_moon import flops
from sparse_moon.app import models
from sparse_moon.memory import keep_freed_memory
from sparse_moon.nn import SparseLayer
from sparse_moon.nn import tune as tuning
from sparse_moon.ops.drop_and_grow import drop_and_grow_reference
from sparse_moon.ops.unknown_aware_loss import unknown_aware_loss_reference
from sparse_moon.topology import Topology, weight_to_matrix

GRAPHED = 8  # repetitions in a CUDA graph
CACHES_BYTES = 128 * 2**20  # inputs rotate over at least this much
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Row:
    """One measured ratio. Times in milliseconds; ``max_error`` relative to the largest exact entry."""

    section: str
    case: str
    pattern: str
    sparsity: float
    dtype: str
    device: str
    pass_: str
    ms: float
    baseline: str
    baseline_ms: float
    speedup: float
    flops: float | None = None
    floor_ms: float | None = None
    max_error: float | None = None
    chosen: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Fields with times to four digits, ``pass_`` as ``pass``."""
        fields = {key.rstrip("_"): value for key, value in asdict(self).items()}
        return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in fields.items()}


@dataclass(frozen=True)
class Case:
    """A layer and its input."""

    name: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]


def conv(channels: int, out: int, size: int, kernel: int = 3, stride: int = 1, batch: int = 128) -> Case:
    suffix = f"_s{stride}" if stride > 1 else ""
    return Case(
        f"conv{kernel}x{kernel}{suffix}_{channels}_{out}_{size}x{size}_b{batch}",
        lambda: nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False),
        (batch, channels, size, size),
    )


def linear(inputs: int, outputs: int, batch: int) -> Case:
    return Case(f"linear_{inputs}_{outputs}_b{batch}", lambda: nn.Linear(inputs, outputs, bias=False), (batch, inputs))


MAIN_CASES = [
    conv(64, 64, 32), conv(128, 128, 16), conv(256, 256, 8), conv(512, 512, 4),
    linear(4096, 4096, 256), linear(1024, 1024, 128), linear(768, 3072, 2048),
]  # fmt: skip
OTHER_CASES = [
    conv(64, 128, 32, stride=2), conv(64, 128, 32, kernel=1, stride=2), conv(256, 64, 32, kernel=1),
    conv(64, 256, 32, kernel=1), conv(64, 64, 32, kernel=5), conv(64, 64, 32, kernel=7),
    conv(128, 128, 16, batch=1), conv(512, 512, 4, batch=1), conv(128, 128, 16, batch=8), linear(1024, 1024, 1),
]  # fmt: skip
# sizes at which a large GPU is busy
CUDA_CASES = [linear(4096, 4096, 4096), conv(256, 256, 16, batch=256), conv(512, 512, 16, batch=256)]
OTHER_CUDA_CASES = [
    linear(1024, 1024, 4096), linear(1024, 4096, 8192), conv(64, 64, 32, batch=256), conv(128, 128, 16, batch=256),
    conv(512, 512, 4, batch=256), conv(256, 1024, 16, kernel=1, batch=256), conv(256, 512, 16, stride=2, batch=256),
]  # fmt: skip


class Bench:
    """Settings, ceilings and rows of one invocation."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.seconds = 0.15 if arguments.quick else 1.0
        self.rows: list[Row] = []
        self.peaks: list[dict[str, Any]] = []
        self.ceilings = ceilings(self.device, seconds=self.seconds)

    def main_cases(self) -> list[Case]:
        return CUDA_CASES if self.device.type == "cuda" else MAIN_CASES

    def other_cases(self) -> list[Case]:
        return OTHER_CUDA_CASES if self.device.type == "cuda" else OTHER_CASES

    def times(self, candidates: dict[str, Callable[[int], Any]]) -> dict[str, float]:
        if not self.arguments.graph:
            return median_ms(candidates, self.device, seconds=self.seconds)
        graphs = {name: graphed(run, GRAPHED) for name, run in candidates.items()}
        return {name: time / GRAPHED for name, time in median_ms(graphs, self.device, seconds=self.seconds).items()}

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(
            f"{row.section:<8}{row.case:<36}{row.pattern:<13}{row.sparsity:>5.2f} {row.dtype} {row.pass_:<8}"
            f"{row.ms:>10.3f} ms  "
            f"{row.speedup:>6.2f}x  {row.baseline} ({row.baseline_ms:.3f} ms)"
            + (f"  chose {row.chosen}" if row.chosen else ""),
            flush=True,
        )

    def floor_ms(self, flops: float, bytes_: float, dtype: torch.dtype = torch.float32) -> float:
        """Time that the operations, or else the bytes, need at the measured ceilings."""
        rate = self.ceilings["gflops_fp32" if dtype == torch.float32 else "gflops_bf16"]
        return max(1e-6 * flops / rate, 1e-6 * bytes_ / self.ceilings["copy_gb_per_s"])


def layers(bench: Bench) -> None:
    """Single layers: forward, gradients, and both, against dense, masked dense, bf16, CSR and SparseProp."""
    arguments = bench.arguments
    cases = bench.main_cases() if arguments.quick else bench.main_cases() + bench.other_cases()
    for case in cases:
        if arguments.case and not any(part in case.name for part in arguments.case):
            continue
        for sparsity in arguments.sparsity:
            for pattern in arguments.pattern:
                for dtype in arguments.dtype:
                    _layer(bench, case, sparsity, pattern, DTYPES[dtype])


def _layer(bench: Bench, case: Case, sparsity: float, pattern: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    arguments = bench.arguments
    dense = case.build().to(bench.device, dtype)
    kind = sm.SparseConv2d if isinstance(dense, nn.Conv2d) else sm.SparseLinear
    try:
        sparse = kind.from_dense(dense, sparsity=sparsity, pattern=pattern)
    except ValueError:  # the pattern's block does not divide the layer
        return
    masked = sparse.to_dense()
    error = gate(sparse, masked, case)

    bytes_each = dense.weight.element_size()
    count = min(math.ceil(CACHES_BYTES / (bytes_each * math.prod(case.input_shape))), 16)
    inputs = [torch.randn(case.input_shape, device=bench.device, dtype=dtype) for _ in range(count)]
    with torch.no_grad():
        grads = [torch.randn_like(masked(x)) for x in inputs]
    last = (inputs, grads)
    if isinstance(dense, nn.Conv2d):
        last = tuple([t.contiguous(memory_format=torch.channels_last) for t in ts] for ts in (inputs, grads))
    operations = 2.0 * sparse.topology.nnz * grads[0].numel() / sparse.topology.shape[0]
    moved = bytes_each * (inputs[0].numel() + grads[0].numel() + 2.0 * sparse.topology.nnz)

    layouts = {"": (masked, inputs, grads)}
    if isinstance(dense, nn.Conv2d):  # a copy, because a module changes its layout in place
        layouts[" channels_last"] = (copy.deepcopy(masked).to(memory_format=torch.channels_last), *last)
    others = peers(masked, sparse, bench.device) if arguments.peers else {}
    for pass_, products in (("fwd", 1.0), ("fwd+bwd", 3.0)):
        runs: dict[str, Callable[[int], Any]] = {}
        for layout, operands in layouts.items():
            runs[f"dense {SHORT[dtype]}{layout}"] = runner(*operands, pass_)
            if dtype == torch.float32 and computes_bf16(bench.device):
                runs[f"dense bf16{layout}"] = autocast(runner(*operands, pass_), bench.device)
        runs |= {name: runner(module, inputs, grads, pass_) for name, module in others.items()}
        # the kernels of GPUs work on channels_last
        runs["sparse"] = runner(sparse, *(last if bench.device.type == "cuda" else (inputs, grads)), pass_)
        if not arguments.graph:  # what synchronises cannot be captured
            # what runs where kernels do not pay; torch's product, or on the CPU Winograd's where that is faster
            runs["masked dense"] = on_backend("dense", runs["sparse"])
        if isinstance(dense, nn.Linear) and pass_ == "fwd" and not arguments.graph:
            if pattern == "unstructured" and (bench.device.type == "cuda" or dtype == torch.float32):
                runs["torch.sparse CSR"] = compressed_runner(masked, inputs, None)
            elif bench.device.type == "cuda" and sparse.topology.block[1] >= 16:
                runs["torch.sparse BSR"] = compressed_runner(masked, inputs, sparse.topology.block)
        times = bench.times(runs)
        row = Row(
            "layers", case.name, pattern, sparsity, SHORT[dtype], bench.device.type, pass_, times["sparse"], "", 0.0,
            0.0, products * operations, bench.floor_ms(products * operations, products * moved, dtype), error,
            chosen(sparse, case),
        )  # fmt: skip
        fastest: dict[str, str] = {}  # of the layouts
        for name in times:
            kind = name.removesuffix(" channels_last")
            fastest[kind] = min(fastest.get(kind, name), name, key=times.__getitem__)
        for name in fastest.values():
            if name != "sparse":
                bench.add(replace(row, baseline=name, baseline_ms=times[name], speedup=times[name] / times["sparse"]))


def gate(sparse: nn.Module, masked: nn.Module, case: Case) -> float:
    """Largest error of output and gradients against float64, relative to the largest exact entry.

    Raises:
        SystemExit: more than twice the error of dense PyTorch in the same dtype.
    """
    example = next(masked.parameters())
    x = torch.randn(min(case.input_shape[0], 9), *case.input_shape[1:], device=example.device, dtype=example.dtype)
    exact_layer = copy.deepcopy(masked).double()
    upstream = torch.randn_like(masked(x))

    def results(module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        z = x.to(dtype).clone().requires_grad_()
        module.zero_grad()
        y = module(z)
        y.backward(upstream.to(dtype))
        weight = module.values if isinstance(module, SparseLayer) else module.weight
        grad = weight.grad
        if not isinstance(module, SparseLayer):
            grad = sparse.topology.gather(weight_to_matrix(grad, sparse.topology.block[1]))
        return [t.detach().double() for t in (y, z.grad, grad)]

    exact = results(exact_layer, torch.float64)
    errors = [
        [((a - e).abs().max() / e.abs().max()).item() for a, e in zip(results(m, x.dtype), exact, strict=True)]
        for m in (sparse, masked)
    ]
    for what, ours, theirs in zip(("output", "input gradient", "values gradient"), *errors, strict=True):
        if not ours <= 2 * theirs + 1e-6:
            raise SystemExit(f"{case.name}: wrong {what}, error {ours:.1e} where dense PyTorch has {theirs:.1e}")
    return max(errors[0])


def runner(module: nn.Module, inputs: list[Tensor], grads: list[Tensor], pass_: str) -> Callable[[int], Any]:
    """A function that runs one repetition of a layer on the inputs' turn."""

    def forward(i: int) -> None:
        with torch.no_grad():
            module(inputs[i % len(inputs)])

    def both(i: int) -> None:
        x = inputs[i % len(inputs)].detach().requires_grad_()
        module.zero_grad()
        module(x).backward(grads[i % len(grads)])

    return forward if pass_ == "fwd" else both


def on_backend(backend: sm.ops.Backend, run: Callable[[int], Any]) -> Callable[[int], Any]:
    def forced(i: int) -> None:
        with sm.ops.use_backend(backend):
            run(i)

    return forced


def autocast(run: Callable[[int], Any], device: torch.device) -> Callable[[int], Any]:
    def lowered(i: int) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            run(i)

    return lowered


def compressed_runner(masked: nn.Linear, inputs: list[Tensor], block: tuple[int, int] | None) -> Callable[[int], Any]:
    """PyTorch's own compressed rows: CSR, or BSR with this block shape; forward only."""
    weight = masked.weight.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls both beta
        weight = weight.to_sparse_csr() if block is None else weight.to_sparse_bsr(block)

    def forward(i: int) -> None:
        x = inputs[i % len(inputs)]
        _ = (weight @ x.t()).t() if block is None else F.linear(x, weight)

    return forward


def peers(masked: nn.Module, sparse: nn.Module, device: torch.device) -> dict[str, nn.Module]:
    """SparseProp (Nikdan et al. 2023) where it is installed and takes the layer: unstructured, on the CPU."""
    try:
        import sparseprop.modules as sparseprop
    except ImportError:
        print("SparseProp is not installed (pip install sparseprop), it is left out", file=sys.stderr)
        return {}
    if device.type != "cpu" or sparse.topology.block != (1, 1):
        return {}
    if isinstance(masked, nn.Linear):
        return {"sparseprop": sparseprop.SparseLinear.from_dense(masked)}
    if masked.kernel_size[0] == 1 and masked.stride[0] > 1:
        return {}
    # its two kernels; the faster one counts
    return {f"sparseprop {n}": sparseprop.SparseConv2d.from_dense(masked, vectorizing_over_on=n == "over on")
            for n in ("over batch", "over on")}  # fmt: skip


def chosen(layer: SparseLayer, case: Case, layout: torch.memory_format = torch.contiguous_format) -> str:
    return " ".join(tuning.chosen_backends(layer, case.input_shape, layout).values())


@dataclass(frozen=True)
class Network:
    """A model and its training batch."""

    name: str
    image_shape: tuple[int, ...]
    batch: int = 128
    classes: int = 10
    steps_per_epoch: int = 390

    def build(self, outputs: int) -> nn.Module:
        return models.build(self.name, outputs, in_channels=self.image_shape[0], image_size=self.image_shape[1])


NETWORKS = [Network("resnet18", (3, 32, 32)), Network("wrn-22-2", (3, 32, 32)), Network("mlp", (1, 28, 28))]
INTERVAL = 100


def choice(bench: Bench) -> None:
    """Every layer of the networks, forward + backward with what the choice runs, against dense: is it ever slower?"""
    for network in (*NETWORKS, Network("resnet50", (3, 32, 32))):
        for batch in bench.arguments.batch:
            for case in _layers_of(network, batch):
                if not bench.arguments.case or any(
                    part in f"{network.name} {case.name}" for part in bench.arguments.case
                ):
                    for sparsity in bench.arguments.sparsity:
                        _choice(bench, network, case, sparsity)
    rows = [row for row in bench.rows if row.section == "choice"]
    slower = [row for row in rows if row.speedup < 1 / 1.05]
    print(f"{len(slower)} of {len(rows)} layers are slower than dense by more than 5 %")


def _layers_of(network: Network, batch: int) -> list[Case]:
    """The network's distinct layers with the inputs that a batch gives them."""
    model, seen = network.build(network.classes), {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        case = _case_of(layer, tuple(inputs[0].shape))
        seen.setdefault(case.name, case)

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_pre_hook(note)
    with torch.no_grad():
        model.eval()(torch.zeros(batch, *network.image_shape))
    return list(seen.values())


def _case_of(layer: nn.Module, shape: tuple[int, ...]) -> Case:
    if isinstance(layer, nn.Linear):
        return linear(layer.in_features, layer.out_features, shape[0])
    return conv(layer.in_channels, layer.out_channels, shape[2], layer.kernel_size[0], layer.stride[0], shape[0])


def _choice(bench: Bench, network: Network, case: Case, sparsity: float) -> None:
    torch.manual_seed(0)
    dense = case.build().to(bench.device)
    kind = sm.SparseConv2d if isinstance(dense, nn.Conv2d) else sm.SparseLinear
    sparse = kind.from_dense(dense, sparsity=sparsity)
    inputs = [torch.randn(case.input_shape, device=bench.device) for _ in range(2)]
    with torch.no_grad():
        grads = [torch.randn_like(dense(x)) for x in inputs]
    runs: dict[str, Callable[[int], Any]] = {}
    layouts = {"": torch.contiguous_format}
    if isinstance(dense, nn.Conv2d):
        layouts[" channels_last"] = torch.channels_last
    for suffix, layout in layouts.items():
        operands = [[t.contiguous(memory_format=layout) for t in tensors] for tensors in (inputs, grads)]
        runs[f"sparse{suffix}"] = runner(sparse, *operands, "fwd+bwd")
        runs[f"dense fp32{suffix}"] = runner(copy.deepcopy(dense).to(memory_format=layout), *operands, "fwd+bwd")
    times = bench.times(runs)
    # each in the layout that suits it
    ours, theirs = (min((n for n in times if n.startswith(k)), key=times.__getitem__) for k in ("sparse", "dense"))
    suffix = ours.removeprefix("sparse")
    bench.add(Row(
        "choice", f"{network.name} {case.name}", "unstructured", sparsity, "fp32", bench.device.type, "fwd+bwd",
        times[ours], theirs, times[theirs], times[theirs] / times[ours],
        chosen=chosen(sparse, case, layouts[suffix]) + suffix,
    ))  # fmt: skip


def step(bench: Bench) -> None:
    """Whole training steps, with topology updates and averaging spread over their intervals."""
    for network in NETWORKS:
        if not bench.arguments.case or any(part in network.name for part in bench.arguments.case):
            _step(bench, network)


def _step(bench: Bench, network: Network) -> None:
    arguments = bench.arguments
    x = torch.randn(network.batch, *network.image_shape, device=bench.device)
    last = network.name != "mlp" and bench.device.type == "cuda"  # the kernels of GPUs work on channels_last
    sparse_x = x.contiguous(memory_format=torch.channels_last) if last else x
    half = arguments.dtype == ["bfloat16"]
    y = torch.randint(network.classes, (network.batch,), device=bench.device)

    def training(model: nn.Module, method: sm.Method, loss: nn.Module, x: Tensor = x) -> Callable[[int], Any]:
        def run(_: int) -> None:
            loss(model(x), y).backward()
            method.step()
            method.optimizer.zero_grad()

        return run

    runs = {name: run for name, run in _dense_steps(network, x, training, bench.device)}
    losses = bench.times(_losses(network, bench.device))
    variants = [(s, a, p) for s in arguments.sparsity for a in ("uniform", "erk") for p in arguments.pattern]
    costs = {}
    for variant in variants:
        steps, costs[variant] = _sparse_steps(network, variant, partial(training, x=sparse_x), bench)
        steps = {name: autocast(run, bench.device) for name, run in steps.items()} if half else steps
        runs |= {f"{variant} {name}": run for name, run in steps.items()}
    waiting = (" update", " average") if arguments.graph else ()  # for the GPU, so they cannot be captured
    times = bench.times({name: run for name, run in runs.items() if not name.endswith(waiting)})
    if waiting:
        eager = {name: run for name, run in runs.items() if name.endswith((" rigl", *waiting))}
        eager_times = median_ms(eager, bench.device, seconds=bench.seconds)
        for v in variants:
            times[f"{v} average"] = eager_times[f"{v} average"]
            times[f"{v} update"] = times[f"{v} rigl"] + eager_times[f"{v} update"] - eager_times[f"{v} rigl"]
    fp32 = {name: time for name, time in times.items() if name.startswith("dense fp32")}
    baselines = {name: times[name] for name in (min(fp32, key=fp32.__getitem__), "dense bf16") if name in times}
    for variant in variants:
        own = {name: times[f"{variant} {name}"] for name in ("rigl", "moon", "cigl", "update", "average")}
        own["more loss"] = losses["moon"] - losses["cross-entropy"]
        _report_step(bench, network, variant, costs[variant], own, baselines, "bf16" if half else "fp32")


def _losses(network: Network, device: torch.device) -> dict[str, Callable[[int], Any]]:
    """Both losses, forward and backward, on a batch of logits: their difference is lost in the noise of whole steps."""
    target = torch.randint(network.classes, (network.batch,), device=device)
    known, all_ = (
        torch.randn(network.batch, n, device=device, requires_grad=True) for n in (network.classes, network.classes + 1)
    )
    unknown_aware = sm.UnknownAwareLoss(network.classes, 10, warmup_epochs=0).to(device)
    return {
        "moon": lambda _: unknown_aware(all_, target).backward(),
        "cross-entropy": lambda _: F.cross_entropy(known, target).backward(),
    }


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 1e-3, 0.9, weight_decay=5e-4, nesterov=True)


def _dense_steps(
    network: Network, x: Tensor, training: Callable[..., Callable[[int], Any]], device: torch.device
) -> Iterator[tuple[str, Callable[[int], Any]]]:
    """The dense training step, in the layouts and precisions that dense users choose from."""
    convolutional = network.name != "mlp"
    x_last = x.contiguous(memory_format=torch.channels_last) if convolutional else x
    for name, layout in (("dense fp32", torch.contiguous_format), ("dense fp32 channels_last", torch.channels_last)):
        if layout == torch.contiguous_format or convolutional:
            model = network.build(network.classes).to(device, memory_format=layout)
            own_x = x_last if layout == torch.channels_last else x
            yield name, training(model, sm.Dense(model, _sgd(model)), nn.CrossEntropyLoss(), own_x)
    if not computes_bf16(device):
        return
    layout = torch.channels_last if convolutional else torch.contiguous_format
    model = network.build(network.classes).to(device, memory_format=layout)
    yield "dense bf16", autocast(training(model, sm.Dense(model, _sgd(model)), nn.CrossEntropyLoss(), x_last), device)


def _sparse_steps(
    network: Network, variant: tuple[float, Any, str], training: Callable[..., Callable[[int], Any]], bench: Bench
) -> tuple[dict[str, Callable[[int], Any]], tuple[float, float]]:
    """Steps of RigL, with MOON and with CigL, one with a topology update, an averaging; forward FLOPs of both kinds."""
    sparsity, allocation, pattern = variant
    rigl, moon, cigl = (
        sm.sparsify(
            network.build(outputs), sparsity, allocation, pattern=pattern, fuse=bench.arguments.fuse,
            recompute=bench.arguments.recompute,
        ).to(bench.device, memory_format=torch.channels_last if bench.device.type == "cuda" else torch.preserve_format)
        for outputs in (network.classes, network.classes + 1, network.classes)
    )  # fmt: skip
    changing = copy.deepcopy(rigl)
    updating = sm.RigL(changing, _sgd(changing), total_steps=10**9, interval=1)
    updating.load_state_dict({**updating.state_dict(), "steps": 1})  # the first batch never updates, all others do
    average = sm.WeightAverage(moon)
    cross_entropy = nn.CrossEntropyLoss()
    unknown_aware = sm.UnknownAwareLoss(network.classes, 10, warmup_epochs=0).to(bench.device)
    costs = flops.layer_costs(rigl, network.image_shape)
    mask = sm.RandomMask(cigl)
    masked_step = training(cigl, sm.RigL(cigl, _sgd(cigl), total_steps=10**9, interval=10**8), cross_entropy)

    def cigl_step(i: int) -> None:
        mask.draw()
        masked_step(i)

    return {
        "rigl": training(rigl, sm.RigL(rigl, _sgd(rigl), total_steps=10**9, interval=10**8), cross_entropy),
        "moon": training(moon, sm.RigL(moon, _sgd(moon), total_steps=10**9, interval=10**8), unknown_aware),
        "cigl": cigl_step,
        "update": training(changing, updating, cross_entropy),
        "average": lambda _: average.update(moon),
    }, (sum(c.forward_sparse for c in costs), float(sum(c.forward_dense for c in costs)))


def _report_step(
    bench: Bench, network: Network, variant: tuple[float, str, str], forward: tuple[float, float],
    times: dict[str, float], baselines: dict[str, float], dtype: str,
) -> None:  # fmt: skip
    sparsity, allocation, pattern = variant
    update_ms = times["update"] - times["rigl"]
    average_ms = times["average"] / network.steps_per_epoch
    rigl = times["rigl"] + update_ms / INTERVAL
    moon, cigl = (times[name] + update_ms / INTERVAL + average_ms for name in ("moon", "cigl"))
    row = Row(
        "step", f"{network.name}_b{network.batch}_{allocation}", pattern, sparsity, dtype, bench.device.type, "rigl",
        rigl, "", 0.0, 0.0, 3 * network.batch * forward[0],
    )  # fmt: skip
    for name, time in baselines.items():
        bench.add(replace(row, baseline=name, baseline_ms=time, speedup=time / rigl))
    parts = rigl + times["more loss"] + average_ms
    for name, time in (("moon", moon), ("moon (sum of parts)", parts), ("cigl", cigl)):
        bench.add(replace(row, pass_=name, ms=time, baseline="rigl", baseline_ms=rigl, speedup=rigl / time))
    print(
        f"        forward FLOPs {forward[0] / forward[1]:.3f} x dense; topology update {update_ms:.1f} ms more than a "
        f"step, {update_ms / INTERVAL / rigl:.2%} of a step at every {INTERVAL}; MOON {moon / rigl - 1:+.2%}, by its "
        f"parts {parts / rigl - 1:+.3%}, CigL {cigl / rigl - 1:+.2%}, of which averaging {average_ms / rigl:.3%} at "
        f"{network.steps_per_epoch} steps an epoch",
        flush=True,
    )


def update(bench: Bench) -> None:
    """One layer's topology update against PyTorch's sorts."""
    for rows, cols in ((512, 4608), (4096, 4096)):
        for sparsity in bench.arguments.sparsity:
            _update(bench, rows, cols, sparsity)


def _update(bench: Bench, rows: int, cols: int, sparsity: float) -> None:
    torch.manual_seed(0)
    topology = Topology.random((rows, cols), 1 - sparsity).to(bench.device)
    drop = torch.rand(topology.num_blocks, device=bench.device)
    grow = torch.rand(rows, cols, device=bench.device)
    count = int(0.3 * topology.num_blocks)
    ours = sm.ops.drop_and_grow(drop, grow, topology, count)
    exact = drop_and_grow_reference(drop, grow, topology.row_ptr, topology.col, count, count)
    if not all(torch.equal(a, b) for a, b in zip((*ours.index, ours.source), exact, strict=True)):
        raise SystemExit("drop_and_grow: differs from the reference")
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
        _loss(bench, batch, classes)


def _loss(bench: Bench, batch: int, classes: int) -> None:
    w = torch.tensor(1.0, device=bench.device)
    logits = torch.randn(batch, classes + 1, device=bench.device, requires_grad=True)
    target = torch.randint(classes, (batch,), device=bench.device)
    exact = unknown_aware_loss_reference(logits.double(), target, w.double())
    value, _ = sm.ops.unknown_aware_loss(logits, target, w)
    error = abs(value.item() - exact.item()) / exact.item()
    if error > 1e-5:
        raise SystemExit(f"unknown_aware_loss: error {error:.1e}")
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
        _average(bench, sparsity)


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


def memory(bench: Bench) -> None:
    """Peak resident memory of a process that trains ResNet-18, dense and sparse, topology updates included.

    Medians of five processes, because where the C library finds room differs from run to run.
    """
    if bench.device.type != "cpu":
        return

    def peak(kind: str, sparsity: float) -> float:
        context, peaks = multiprocessing.get_context("spawn"), []
        for _ in range(5):
            with context.Pool(1) as pool:  # a fresh process each, because a peak never falls
                peaks.append(pool.apply(_peak_mb, (kind, sparsity, bench.arguments.fuse, bench.arguments.recompute)))
        return statistics.median(peaks)

    dense = peak("dense", 0.0)
    for sparsity in bench.arguments.sparsity:
        sparse = peak("sparse", sparsity)
        named = {"dense_mb": round(dense, 1), "sparse_mb": round(sparse, 1)}
        bench.peaks.append({"network": NETWORKS[0].name, "sparsity": sparsity, **named})
        print(
            f"memory  {NETWORKS[0].name}_b{NETWORKS[0].batch}  {sparsity:.2f}  peak resident "
            f"{sparse:.0f} MB, dense training {dense:.0f} MB, {sparse / dense:.2f} x",
            flush=True,
        )


def _peak_mb(kind: str, sparsity: float, fuse: bool, recompute: bool) -> float:
    network = NETWORKS[0]
    model = network.build(network.classes)
    if kind == "sparse":
        model = sm.sparsify(model, sparsity, "uniform", fuse=fuse, recompute=recompute)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, 0.9)
    method = sm.Dense(model, optimizer) if kind == "dense" else sm.RigL(model, optimizer, total_steps=100, interval=2)
    x, y = torch.randn(network.batch, *network.image_shape), torch.randint(network.classes, (network.batch,))
    for _ in range(4):
        F.cross_entropy(model(x), y).backward()
        method.step()
        optimizer.zero_grad()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


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
LONG_SECTIONS = {"choice": choice}  # not part of "all"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", nargs="*", default="all", choices=[*SECTIONS, *LONG_SECTIONS, "all"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9, 0.95, 0.99])
    parser.add_argument("--pattern", nargs="+", default=["unstructured"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 128], help="of 'choice'")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32"], help="of 'layers'")
    parser.add_argument("--backend", default="auto", help="auto, kernel, triton or cuda: which kernels may run")
    parser.add_argument("--case", nargs="+", help="only cases whose name contains one of these")
    parser.add_argument("--peers", action="store_true", help="also time SparseProp, where it is installed")
    parser.add_argument("--fuse", action="store_true", help="fuse batch norm and ReLU in the networks of 'step'")
    parser.add_argument("--recompute", action="store_true", help="with --fuse: keep less for the backward pass")
    parser.add_argument("--graph", action="store_true", help="on CUDA: times of the GPU alone, as CUDA graphs")
    parser.add_argument("--keep-memory", action="store_true", help="call sparse_moon.memory.keep_freed_memory() first")
    parser.add_argument("--threads", type=int, help="torch's threads; default its own choice")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, main cases only")
    parser.add_argument("--json", type=Path, help="results file to write")
    parser.add_argument("--plot", type=Path, help="picture of speed-up against sparsity to write")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.keep_memory and not keep_freed_memory():
        raise SystemExit("--keep-memory needs glibc")
    torch.backends.cudnn.benchmark = True  # as dense users have it
    bench = Bench(arguments)
    print(", ".join(f"{k} {v:.0f}" for k, v in bench.ceilings.items()))
    sections = [arguments.section] if isinstance(arguments.section, str) else arguments.section  # the default is one
    for name, run in (SECTIONS | LONG_SECTIONS).items():
        if name in sections or ("all" in sections and name in SECTIONS):
            with sm.ops.use_backend(arguments.backend):
                run(bench)
    print(*summarise(bench.rows), sep="\n")
    if arguments.json:
        head = {
            **environment(bench.device),
            "command": " ".join(sys.argv[1:]),
            "ceilings": bench.ceilings,
            "peaks": bench.peaks,
        }
        write_results(arguments.json, {**head, "rows": [row.as_json() for row in bench.rows]})
    if arguments.plot:
        plot(bench.rows, arguments.plot)


if __name__ == "__main__":
    main()
