"""Batch norm, a residual sum and a rectifier, forward and backward, in the sizes of ResNet-50 at 224."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from bench import DTYPES, SHORT, Bench, Row, WrongResult
from layer_times import CACHES_BYTES
from torch import Tensor

import sparse_moon as sm

PASSES = {False: 8, True: 11}
"""Times that an activation is read or written at least, forward and backward, without and with a residual."""

Norm = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Norms:
    """Batch norms of one size: how many a step has, and whether a residual is added."""

    count: int
    channels: int
    size: int
    residual: bool
    batch: int = 128

    @property
    def name(self) -> str:
        return f"norm_{self.channels}_{self.size}x{self.size}_b{self.batch}" + "_sum" * self.residual


RESNET50 = [
    Norms(1, 64, 112, False), Norms(6, 64, 56, False), Norms(3, 256, 56, True),
    Norms(1, 128, 56, False), Norms(7, 128, 28, False), Norms(4, 512, 28, True),
    Norms(1, 256, 28, False), Norms(11, 256, 14, False), Norms(6, 1024, 14, True),
    Norms(1, 512, 14, False), Norms(5, 512, 7, False), Norms(3, 2048, 7, True),
]  # fmt: skip
"""Those with a rectifier; the four of shortcuts have none."""
QUICK = [norms for norms in RESNET50 if norms.count * norms.channels * norms.size**2 > 7 * 10**5]
TINY = [Norms(1, 16, 6, False, 2), Norms(1, 16, 6, True, 2)]


def eager(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """Torch's own operators, as torchvision's networks call them."""
    y = F.batch_norm(x, mean, var, weight, bias, training=True)
    return F.relu_(y if residual is None else y.add_(residual))


def ours(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    return sm.ops.batch_norm_relu(x, mean, var, weight, bias, residual, training=True)


def batch_norm(bench: Bench) -> None:
    """Ours against torch's operators, and against what torch.compile makes of them; activations in channels_last."""
    cases = TINY if bench.arguments.tiny else QUICK if bench.arguments.quick else RESNET50
    for norms in cases:
        if not bench.arguments.case or any(part in norms.name for part in bench.arguments.case):
            for dtype in bench.arguments.dtype:
                bench.case(f"{norms.name} {dtype}", _time, norms, DTYPES[dtype])


def _time(bench: Bench, norms: Norms, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shape, device = (norms.batch, norms.channels, norms.size, norms.size), bench.device
    bytes_ = math.prod(shape) * dtype.itemsize
    count = min(math.ceil(CACHES_BYTES / bytes_), 4)

    def activation() -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)

    inputs, grads = ([activation() for _ in range(count)] for _ in range(2))
    residuals = [activation() if norms.residual else None for _ in range(count)]
    vectors = [torch.rand(norms.channels, device=device) + 0.5 for _ in range(4)]

    def results(norm: Norm, to: torch.dtype, i: int) -> tuple[Tensor, ...]:
        x, residual = inputs[i].to(to).detach().requires_grad_(), residuals[i]
        other = None if residual is None else residual.to(to).detach().requires_grad_()
        mean, var, *affine = (t.double() if to == torch.float64 else t for t in vectors)
        leaves = [t.detach().requires_grad_() for t in affine]
        y = norm(x, mean, var, leaves[0], leaves[1], other)
        wanted = [t for t in (x, *leaves, other) if t is not None]
        return y, *torch.autograd.grad(y, wanted, grads[i].to(to))

    def run(norm: Norm) -> Callable[[int], Any]:
        leaves = [t.detach().requires_grad_() for t in vectors[2:]]

        def both(i: int) -> None:
            x = inputs[i % count].detach().requires_grad_()
            residual = residuals[i % count]
            other = None if residual is None else residual.detach().requires_grad_()
            y = norm(x, vectors[0], vectors[1], leaves[0], leaves[1], other)
            torch.autograd.grad(y, [t for t in (x, *leaves, other) if t is not None], grads[i % count])

        return both

    error = _gate(norms.name, results, dtype)
    torch.compiler.reset()  # a kernel of its own for each size
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)
    times = bench.times({"ours": run(ours), "eager": run(eager), "compiled": run(compiled)})
    moved = float(PASSES[norms.residual] * bytes_)
    for name in ("eager", "compiled"):
        bench.add(Row(
            "norm", norms.name, "-", 0.0, SHORT[dtype], device.type, "fwd+bwd", times["ours"], name, times[name],
            times[name] / times["ours"], floor_ms=bench.floor_ms(0, moved), max_error=error,
        ))  # fmt: skip
    bench.note({
        "case": norms.name, "in_a_step": norms.count, "gb_per_s": 1e-6 * moved / times["ours"],
        "share_of_copy": 1e-6 * moved / times["ours"] / bench.ceilings["copy_gb_per_s"],
    })  # fmt: skip


def _gate(case: str, results: Callable[[Norm, torch.dtype, int], tuple[Tensor, ...]], dtype: torch.dtype) -> float:
    """Largest error of ours against float64, relative to the norm; more than twice torch's own is an error."""
    exact, found = results(eager, torch.float64, 0), []
    for norm in (ours, eager):
        pairs = zip(results(norm, dtype, 0), exact, strict=True)
        found.append([((a.double() - e).norm() / e.norm()).item() for a, e in pairs])
    if any(a > 2 * b + torch.finfo(dtype).eps for a, b in zip(*found, strict=True)):
        raise WrongResult(f"{case}: errors {found[0]}, torch's own {found[1]}")
    return max(found[0])
