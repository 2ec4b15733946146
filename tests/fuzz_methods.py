"""Cases of fuzz_ops.py: training methods on a tiny network."""

import warnings
from contextlib import nullcontext
from typing import Any

import torch
from fuzz_layers import Draw, settings
from fuzz_small_ops import sound
from torch import Tensor, nn

import sparse_moon as sm
from sparse_moon.nn import SparseLayer

METHODS = ("SET", "RigL", "MEST", "SRigL", "GMP", "GraNet", "TopKAST")


def methods(draw: Draw) -> None:
    """Counts, index and optimizer state of a tiny network in training."""
    kind, block = draw("method", METHODS), draw("block", ((1, 1), (1, 1), (2, 1), (2, 2)))
    selection = "constant_fan_in" if kind == "SRigL" else "random"
    sparsity = draw("sparsity", (0.0, 0.3, 0.5, 0.8, 0.95))
    parts = [nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 4, draw("k", (1, 3)), stride=2, padding=1), nn.Linear(4, 10)]
    classes = (sm.SparseConv2d, sm.SparseConv2d, sm.SparseLinear)
    layers = [c.from_dense(p, sparsity=sparsity, pattern=block, selection=selection)
              for c, p in zip(classes, parts, strict=True)]  # fmt: skip
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), pool, layers[2])
    optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, 0.05),
        "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, 1e-3, amsgrad=True),
        "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    }[draw("optimizer", ("sgd", "momentum", "adamw", "adagrad"))](model.parameters())
    steps, interval = draw("steps", (5, 9, 12)), draw("interval", (1, 2, 3))
    options = {"total_steps": steps, "interval": interval, "stop": draw("stop", (0.5, 0.8, 1.0))}
    target = None
    if kind in ("GMP", "GraNet"):
        target = (1.0 - sparsity) * draw("final", (0.0, 0.3, 1.0))
        options["densities"] = target
    if kind == "MEST":
        options |= {"soft_memory_bound": draw.chance("soft", 0.5), "gradient_weight": draw("lambda", (0.0, 0.01, 1.0))}
    if kind == "SRigL":
        options |= {"gamma_sal": draw("gamma_sal", (0.0, 0.3, 0.9, 1.0))}
    if kind == "TopKAST":
        options |= {"forward_share": draw("forward_share", (0.1, 0.5, 1.0)), "penalty": draw("penalty", (0.0, 1e-2))}
    if kind not in ("GMP", "SRigL") and draw.chance("own_fraction", 0.4):
        options["drop_fraction"] = sm.schedules.Constant(draw("fraction", (0.0, 0.5, 1.0)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            method = getattr(sm, kind)(model, optimizer, **options)
        except ValueError:
            return
    first = [layer.topology.num_blocks for layer in layers]
    with settings(draw):
        for step in range(steps):
            x = torch.randn(3, 2, 6, 6)
            with draw_layout(draw, step):
                model(x).square().mean().backward()
            method.step()
            optimizer.zero_grad()
            for number, layer in enumerate(layers):
                check_trained(layer, optimizer)
                check_counts(kind, method, layer, first[number], step, options)


def draw_layout(draw: Draw, step: int) -> Any:
    return torch.autograd.set_multithreading_enabled(False) if draw.chance(f"own_thread_{step}", 0.3) else nullcontext()


def check_trained(layer: SparseLayer, optimizer: torch.optim.Optimizer) -> None:
    topology, values = layer.topology, layer.values
    sound(topology.index, topology.grid)
    topology.check()
    assert values.shape == topology.values_shape and values.isfinite().all(), "values"
    for name, state in optimizer.state[values].items():
        if isinstance(state, Tensor) and state.dim():
            assert state.shape == values.shape, f"optimizer's {name}: {tuple(state.shape)} for {tuple(values.shape)}"


def check_counts(kind: str, method: Any, layer: SparseLayer, first: int, step: int, options: dict[str, Any]) -> None:
    present, places = layer.topology.num_blocks, layer.topology.grid[0] * layer.topology.grid[1]
    over = step >= method.stop_step - 1
    if kind in ("SET", "RigL") or (kind == "MEST" and not options["soft_memory_bound"]):
        assert present == first, f"{present} blocks of {first}"
    elif kind == "MEST":
        more = max(int(method.drop_fraction(s) * first) for s in range(step + 1))
        assert first <= present <= min(first + more, places), f"{present} blocks of {first}, at most {more} more"
        assert not over or present == first, f"{present} blocks of {first} at the end"
    elif kind == "SRigL":
        fan_ins = set(layer.topology.row_ptr.diff().tolist()) - {0}
        assert len(fan_ins) <= 1 and present <= first, f"fan-ins {fan_ins}, {present} blocks of {first}"
    elif kind in ("GMP", "GraNet"):
        last = round(options["densities"] * places)
        assert last <= present <= first, f"{present} blocks, from {first} to {last}"
        assert not over or present == last, f"{present} blocks at the end, not {last}"
    elif over:
        assert present == round(options["forward_share"] * first), f"{present} blocks at the end of {first}"
