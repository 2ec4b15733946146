"""Whole training steps of networks, and the memory of training one."""

import math
import multiprocessing
import resource
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from batch_norm_times import PASSES
from bench import NETWORKS, OTHER_NETWORKS, Bench, Network, Row, autocast
from timing import computes_bf16
from torch import Tensor, nn

import sparse_moon as sm
from sparse_moon import flops
from sparse_moon.layer_costs import LayerCost

INTERVAL = 100


def step(bench: Bench) -> None:
    """Whole steps on a CPU of what ``sparsify`` makes of a network, updates and averaging spread over their intervals.

    Baselines are the fastest dense step in float32, of both layouts and fused or not, the fastest that is not fused,
    and that in bfloat16. RigL's step is timed under autocast to bfloat16, too. Floors are those of :func:`_floor_ms`.
    """
    cases = bench.arguments.case
    for network in [*NETWORKS, *OTHER_NETWORKS] if cases else NETWORKS:
        if not cases or any(part in network.label for part in cases):
            _step(bench, network)


def _step(bench: Bench, network: Network) -> None:
    arguments = bench.arguments
    x = torch.randn(network.batch, *network.image_shape)
    y = torch.randint(network.classes, (network.batch,))

    sparse_x = x.contiguous(memory_format=network.sparse_layout)

    def training(model: nn.Module, method: sm.Method, loss: nn.Module, x: Tensor = sparse_x) -> Callable[[int], Any]:
        def run(_: int) -> None:
            loss(model(x), y).backward()
            method.step()
            method.optimizer.zero_grad()

        return run

    runs = dict(_dense_steps(network, x, training, bench.device))
    losses = bench.times(_losses(network, bench.device))
    variants = [(s, a, p) for s in arguments.sparsity for a in ("uniform", "erk") for p in arguments.pattern]
    costs = {}
    for variant in variants:
        steps, costs[variant] = _sparse_steps(network, variant, training, bench)
        runs |= {f"{variant} {name}": run for name, run in steps.items()}
    times = bench.times(runs)
    fp32 = [name for name in times if name.startswith("dense fp32")]
    unfused = [name for name in fp32 if not name.endswith("fused")]
    fastest = [min(names, key=times.__getitem__) for names in (fp32, unfused)]
    baselines = {name: times[name] for name in (*fastest, "dense bf16") if name in times}
    for variant in variants:
        own = {name.removeprefix(f"{variant} "): time for name, time in times.items() if name.startswith(f"{variant} ")}
        own["more loss"] = losses["moon"] - losses["cross-entropy"]
        _report_step(bench, network, variant, costs[variant], own, baselines)


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
    """The dense training step, in the layouts and precisions that dense users choose from, and fused by ``sm.fuse``."""
    convolutional = network.convolutional
    x_last = x.contiguous(memory_format=torch.channels_last) if convolutional else x
    layouts = {"": torch.contiguous_format} | ({" channels_last": torch.channels_last} if convolutional else {})
    for fused in (False, True) if convolutional else (False,):
        for name, layout in layouts.items():
            model = network.build(network.classes).to(device, memory_format=layout)
            model = sm.fuse(model) if fused else model
            own_x = x_last if layout == torch.channels_last else x
            run = training(model, sm.Dense(model, _sgd(model)), nn.CrossEntropyLoss(), own_x)
            yield f"dense fp32{name}{' fused' * fused}", run
    if not computes_bf16(device):
        return
    layout = torch.channels_last if convolutional else torch.contiguous_format
    model = network.build(network.classes).to(device, memory_format=layout)
    yield "dense bf16", autocast(training(model, sm.Dense(model, _sgd(model)), nn.CrossEntropyLoss(), x_last), device)


def _sparse_steps(
    network: Network, variant: tuple[float, Any, str], training: Callable[..., Callable[[int], Any]], bench: Bench
) -> tuple[dict[str, Callable[[int], Any]], list[LayerCost]]:
    """Steps of RigL, in bfloat16, with MOON and with CigL, one with a topology update, an averaging; and the costs of
    the layers."""
    sparsity, allocation, pattern = variant
    # the one that updates is no copy: a layer whose copy has moved looks in each pass whether it was averaged with it
    rigl, moon, cigl, changing = (
        sm.sparsify(
            network.build(outputs), sparsity, allocation, pattern=pattern, recompute=bench.arguments.recompute
        ).to(memory_format=network.sparse_layout)
        for outputs in (network.classes, network.classes + 1, network.classes, network.classes)
    )  # fmt: skip
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

    rigl_step = training(rigl, sm.RigL(rigl, _sgd(rigl), total_steps=10**9, interval=10**8), cross_entropy)
    lowered = {} if bench.arguments.no_autocast else {"rigl bf16": autocast(rigl_step, bench.device)}
    return {
        "rigl": rigl_step,
        **lowered,
        "moon": training(moon, sm.RigL(moon, _sgd(moon), total_steps=10**9, interval=10**8), unknown_aware),
        "cigl": cigl_step,
        "update": training(changing, updating, cross_entropy),
        "average": lambda _: average.update(moon),
    }, costs


def _floor_ms(bench: Bench, network: Network, costs: list[LayerCost]) -> float:
    """What the products and batch norms of a float32 step need at the measured ceilings, each by itself.

    A product multiplies three times, and each time reads and writes activations and weights once. The passes of a batch
    norm are those of one with activation. Nothing else is counted: loss, optimizer, other norms and activations.
    """
    numel: dict[str, tuple[int, int]] = {}
    model = network.build(network.classes).to("meta")
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, inputs, output, name=name: numel.update({name: (inputs[0].numel(), output.numel())})
        )
    model(torch.empty(network.batch, *network.image_shape, device="meta"))
    floor = sum(bench.floor_ms(0, 4.0 * PASSES[False] * numel[name][0]) for name in norms)
    for cost in costs:
        weights = cost.density * math.prod(cost.weight_shape)
        moved = sum(numel.get(cost.name, ())) + 2 * weights
        floor += bench.floor_ms(3.0 * network.batch * cost.forward_sparse, 3 * 4.0 * moved)
    return floor


def _report_step(
    bench: Bench, network: Network, variant: tuple[float, str, str], costs: list[LayerCost],
    times: dict[str, float], baselines: dict[str, float],
) -> None:  # fmt: skip
    sparsity, allocation, pattern = variant
    sparse, dense = sum(cost.forward_sparse for cost in costs), sum(cost.forward_dense for cost in costs)
    update_ms = times["update"] - times["rigl"]
    average_ms = times["average"] / network.steps_per_epoch
    rigl = times["rigl"] + update_ms / INTERVAL
    moon, cigl = (times[name] + update_ms / INTERVAL + average_ms for name in ("moon", "cigl"))
    floor_ms = _floor_ms(bench, network, costs)
    row = Row(
        "step", f"{network.label}_b{network.batch}_{allocation}", pattern, sparsity, "fp32", bench.device.type, "rigl",
        rigl, "", 0.0, 0.0, 3 * network.batch * sparse, floor_ms,
    )  # fmt: skip
    for name, time in baselines.items():
        bench.add(replace(row, baseline=name, baseline_ms=time, speedup=time / rigl))
    if "rigl bf16" in times:
        lowered = times["rigl bf16"] + update_ms / INTERVAL
        bf16 = replace(row, dtype="bf16", ms=lowered, floor_ms=None)
        for name, time in {**baselines, "rigl": rigl}.items():
            bench.add(replace(bf16, baseline=name, baseline_ms=time, speedup=time / lowered))
    parts = rigl + times["more loss"] + average_ms
    others = {"without updates": times["rigl"], "moon": moon, "moon (sum of parts)": parts, "cigl": cigl}
    for name, time in others.items():
        bench.add(replace(row, pass_=name, ms=time, baseline="rigl", baseline_ms=rigl, speedup=rigl / time))
    print(
        f"        forward FLOPs {sparse / dense:.3f} x dense, floor {floor_ms:.1f} ms, {floor_ms / rigl:.2f} of a "
        f"step; topology update {update_ms:.1f} ms more than a step, {update_ms / INTERVAL / rigl:.2%} of a step at "
        f"every {INTERVAL}; MOON {moon / rigl - 1:+.2%}, by its parts {parts / rigl - 1:+.3%}, CigL "
        f"{cigl / rigl - 1:+.2%}, of which averaging {average_ms / rigl:.3%} at {network.steps_per_epoch} steps an "
        "epoch",
        flush=True,
    )


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
                peaks.append(pool.apply(_peak_mb, (kind, sparsity, bench.arguments.recompute)))
        return statistics.median(peaks)

    dense = peak("dense", 0.0)
    for sparsity in bench.arguments.sparsity:
        sparse, lowered = peak("sparse", sparsity), peak("sparse bf16", sparsity)
        named = {"dense_mb": round(dense, 1), "sparse_mb": round(sparse, 1), "sparse_bf16_mb": round(lowered, 1)}
        bench.peaks.append({"network": NETWORKS[0].name, "sparsity": sparsity, **named})
        print(
            f"memory  {NETWORKS[0].name}_b{NETWORKS[0].batch}  {sparsity:.2f}  peak resident "
            f"{sparse:.0f} MB, under autocast {lowered:.0f} MB, dense training {dense:.0f} MB, {sparse / dense:.2f} x "
            f"and {lowered / dense:.2f} x",
            flush=True,
        )


def _peak_mb(kind: str, sparsity: float, recompute: bool) -> float:
    network = NETWORKS[0]
    model = network.build(network.classes)
    if kind != "dense":
        model = sm.sparsify(model, sparsity, "uniform", recompute=recompute)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, 0.9)
    method = sm.Dense(model, optimizer) if kind == "dense" else sm.RigL(model, optimizer, total_steps=100, interval=2)
    x, y = torch.randn(network.batch, *network.image_shape), torch.randint(network.classes, (network.batch,))
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind.endswith("bf16")):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        method.step()
        optimizer.zero_grad()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
