"""Cases of fuzz_ops.py: layers. Each draws its options from a seed, runs the package and compares with float64.

A case is a function of a :class:`Draw`. It raises AssertionError where the package is wrong; where memory is misused,
the sanitizer ends the process.
"""

import copy
import math
import os
import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_moon as sm
from sparse_moon import ops
from sparse_moon.nn import SparseLayer
from sparse_moon.ops import choice
from sparse_moon.ops.activations import FUNCTIONS, NAMES
from sparse_moon.ops.native import native
from sparse_moon.ops.sparse_conv2d.cpu import shapes_of
from sparse_moon.topology import matrix_to_weight, weight_to_matrix

SIZES = (1, 1, 2, 3, 8, 16, 17, 33, 63, 64, 65, 257)
DTYPES = (torch.float32,) * 6 + (torch.bfloat16,) * 2 + (torch.float64, torch.float16)
ERRORS = (ValueError, RuntimeError, IndexError, TypeError)


class Draw:
    """The choices of one case by name, a function of seed and number; a file holds them in case of a crash."""

    def __init__(self, seed: int, number: int, log: int | None = None) -> None:
        self.random = random.Random(f"{seed} {number}")
        torch.manual_seed(self.random.getrandbits(63))
        self.log, self.drawn = log, {"seed": seed, "case": number}

    def __call__(self, name: str, options: Any) -> Any:
        self.drawn[name] = chosen = self.random.choice(options)
        if self.log is not None:
            os.pwrite(self.log, str(self).ljust(2000).encode(), 0)
        return chosen

    def chance(self, name: str, probability: float) -> bool:
        return self(name, (False,) * round(20 - 20 * probability) + (True,) * round(20 * probability))

    def __str__(self) -> str:
        return " ".join(f"{name}={_short(value)}" for name, value in self.drawn.items())


def _short(value: Any) -> Any:
    if isinstance(value, Tensor):
        return f"tensor{list(value.shape)}"
    return [_short(item) for item in value] if isinstance(value, list) else value


def settings(draw: Draw) -> Any:
    """Instruction set, threads and flat panels of the case; returns the backend's context."""
    native.set_isa(draw("isa", native.supported_isas()))
    native.set_flat_panels(draw("flat", ("faster", "possible", "never")))
    torch.set_num_threads(draw("threads", (1, 2, 3)))
    choice.WINOGRAD_TILES = draw("winograd_tiles", (1, 32))
    shapes_of.cache_clear()
    return ops.use_backend(draw("backend", ("auto", "kernel", "kernel", "dense", "reference")))


def laid_out(draw: Draw, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal numbers in memory of any layout, without gaps or with."""
    kinds = ["contiguous", "offset"]
    if shape:
        kinds += ["sliced", "narrowed", "expanded", "permuted", "gap"]
    if len(shape) == 4:
        kinds += ["channels_last"] * 4 + ["channels_of_channels_last"]
    kind, full = draw(name, kinds), torch.randn(shape).to(dtype)
    if kind == "channels_last":
        return full.contiguous(memory_format=torch.channels_last)
    if kind == "channels_of_channels_last":
        return torch.cat([full, full], 1).contiguous(memory_format=torch.channels_last)[:, : shape[1]]
    if kind == "offset":
        return torch.cat([full.new_zeros(1), full.flatten()])[1:].view(shape)
    if kind == "sliced":
        return torch.stack([full, full], -1).flatten(-2)[..., ::2]
    if kind == "narrowed":
        return torch.cat([full[:1], full, full[:1]])[1 if shape[0] else 0 :][: shape[0]]
    if kind == "gap":
        return F.pad(full, (1, 2))[..., 1 : 1 + shape[-1]]
    if kind == "expanded":
        axis = draw(f"{name}_axis", range(len(shape)))
        return full.narrow(axis, 0, min(shape[axis], 1)).expand(shape)
    if kind == "permuted":
        order = list(range(len(shape)))
        draw.random.shuffle(order)
        return full.permute(order).contiguous().permute([order.index(axis) for axis in range(len(shape))])
    return full


def entries(draw: Draw, grid: tuple[int, int]) -> Tensor:
    """Bool mask of a block grid: of any density, perhaps with empty and full rows and columns."""
    mask = torch.rand(grid) < draw("density", (0.0, 0.01, 0.1, 0.1, 0.3, 0.6, 1.0))
    if draw.chance("empty_rows", 0.3):
        mask[torch.rand(grid[0]) < 0.5] = False
    if draw.chance("empty_cols", 0.3):
        mask[:, torch.rand(grid[1]) < 0.5] = False
    if draw.chance("full_row", 0.2):
        mask[draw.random.randrange(grid[0])] = True
    return mask


def as_good(what: str, ours: Tensor, theirs: Tensor, exact: Tensor, size: Tensor) -> None:
    """At most twice torch's own error, or two units in the last place of ``size``, the sum of the terms' magnitudes."""
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == theirs.dtype, f"{what}: {ours.dtype}, expected {theirs.dtype}"
    if exact.numel():
        error, allowed = ((t.double() - exact).abs().max() for t in (ours, theirs))
        bound = 2 * allowed + 2 * torch.finfo(ours.dtype).eps * size.max()
        assert error <= bound, f"{what}: off by {error:.3g}, at most {bound:.3g} expected"  # NaN fails


def compare_layer(draw: Draw, layer: SparseLayer, dense: nn.Module, shape: tuple[int, ...]) -> None:
    """Forward pass and all gradients of the layer against the dense one, in its dtype and in float64."""
    dtype = draw("dtype", DTYPES)
    layer, dense = layer.to(dtype), dense.to(dtype)
    with torch.no_grad():
        dense.weight.copy_(layer.dense_weight())
        if dense.bias is not None:
            dense.bias.copy_(layer.bias)
    x = laid_out(draw, "input", shape, dtype).detach().requires_grad_()

    def run(module: nn.Module, x: Tensor, grad: Tensor | None, *leaves: Tensor) -> tuple[Tensor, ...]:
        y = module(x)
        if grad is None:
            grad = laid_out(draw, "grad", tuple(y.shape), y.dtype)
        return y.detach(), grad, *torch.autograd.grad(y, [x, *leaves], grad)

    def of_dense(convert: Callable[[Tensor], Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        module = copy.deepcopy(dense)
        for parameter in module.parameters():
            parameter.data = convert(parameter.data)
        return run(module, convert(x.detach()).requires_grad_(), convert(grad), *module.parameters())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about paddings that it copies for
        try:
            expected = run(copy.deepcopy(dense), x.detach().clone().requires_grad_(), None, *dense.parameters())[:1]
        except (RuntimeError, TypeError):
            expected = None
    probe = None
    if draw.chance("probe", 0.2):
        probe = torch.zeros((), dtype=dtype).expand(layer.topology.shape).requires_grad_()
        layer.probe = probe
    leaves = [t for t in (layer.values, layer.bias, probe) if t is not None]
    with settings(draw):
        try:
            y, grad, *ours = run(layer, x, None, *leaves)
        except native.TooLarge:
            return
        except ERRORS:
            if expected is None:
                return
            raise
    if expected is None:  # torch refuses this dtype or shape
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, exact, sizes = (of_dense(f, grad) for f in (torch.clone, Tensor.double, lambda t: t.double().abs()))
    width = layer.topology.block[1]
    for result in zip(("output", "grad of input"), *((r[0], r[2]) for r in ((y, grad, *ours), theirs, exact, sizes)),
                      strict=True):  # fmt: skip
        as_good(*result)
    matrices = [weight_to_matrix(r[3], width) for r in (theirs, exact, sizes)]
    as_good("grad of values", ours[1], *(layer.topology.gather(m) for m in matrices))
    if layer.bias is not None:
        as_good("grad of bias", ours[2], *(r[4] for r in (theirs, exact, sizes)))
    if probe is not None:
        as_good("grad of probe", ours[-1], *matrices)


BLOCKS = ((1, 1), (1, 1), (1, 1), (3, 1), (8, 1), (2, 2), (4, 4), (16, 16))


def linear(draw: Draw) -> None:
    block = draw("block", BLOCKS)
    rows, cols = (draw(name, SIZES) for name in ("rows", "cols"))
    rows, cols = math.ceil(rows / block[0]) * block[0], math.ceil(cols / block[1]) * block[1]
    mask = entries(draw, (rows // block[0], cols // block[1]))
    whole = mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    dense = nn.Linear(cols, rows, draw.chance("bias", 0.6))
    layer = sm.SparseLinear.from_dense(dense, whole, pattern=block)
    lead = draw("lead", ((), (0,), (1,), (2,), (7,), (63,), (257,), (3, 5), (2, 0, 3), (2, 1, 3)))
    compare_layer(draw, layer, dense, (*lead, cols))


def conv2d(draw: Draw) -> None:
    block = draw("block", BLOCKS[:-1])
    winograd = draw.chance("winograd", 0.25)
    groups = 1 if winograd else draw("groups", (1, 1, 1, 2, 3))
    few = (16, 17, 18, 40) if winograd else (1, 2, 3, 5, 16, 17, 33, 63)
    out, inner = (draw(name, few) for name in ("out", "in"))
    out, inner = math.ceil(out / block[0]) * block[0] * groups, math.ceil(inner / block[1]) * block[1]
    kernel = (3, 3) if winograd else (draw("kh", (1, 2, 3, 3, 5)), draw("kw", (1, 2, 3, 3, 7)))
    stride = (1, 1) if winograd else (draw("sh", (1, 1, 2, 3)), draw("sw", (1, 1, 2)))
    dilation = (1, 1) if winograd else (draw("dh", (1, 1, 2)), draw("dw", (1, 1, 3)))
    paddings = ["same", "valid"] if stride == (1, 1) else ["valid"]
    padding = draw("padding", [0, 1, (1, 0), (0, 2), (2, 1), (4, 3), *paddings])
    mode = draw("mode", ("zeros",) * 5 + ("reflect", "replicate", "circular"))
    plane = tuple(draw(name, (1, 2, 4, 5, 7, 8, 13, 16, 31, 33)) for name in ("h", "w"))
    batch = draw("batch", ((), 0, 1, 1, 2, 3, 7, 16, 17))
    taps = kernel[0] * kernel[1]
    matrix = entries(draw, (out // block[0], inner // block[1] * taps))
    whole = matrix.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    bias = draw.chance("bias", 0.6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense = nn.Conv2d(inner * groups, out, kernel, stride, padding, dilation, groups, bias, mode)
        mask = matrix_to_weight(whole, tuple(dense.weight.shape), block[1])
        layer = sm.SparseConv2d.from_dense(dense, mask, pattern=block)
    compare_layer(draw, layer, dense, (*(() if batch == () else (batch,)), inner * groups, *plane))


def batch_norm_relu(draw: Draw) -> None:
    channels = draw("channels", (1, 2, 3, 15, 16, 17, 33, 63))
    shape = (draw("batch", (1, 2, 3, 7, 16, 33)), channels, draw("h", (1, 2, 3, 7, 8, 15)), draw("w", (1, 3, 5, 8, 17)))
    training = draw.chance("training", 0.6)
    dtype = draw("dtype", DTYPES[:-1])
    activation, eps = draw("activation", ("relu", *NAMES)), draw("eps", (1e-5, 1e-3))
    if training and shape[0] * shape[2] * shape[3] == 1:
        shape = (2, *shape[1:])
    leaves = [laid_out(draw, "input", shape, dtype)]
    affine, summed, known = draw.chance("affine", 0.7), draw.chance("residual", 0.5), draw.chance("running", 0.7)
    vectors = draw("vectors", (dtype, torch.float32)) if dtype is torch.bfloat16 else dtype
    leaves += [torch.randn(channels, dtype=vectors) for _ in range(2)] if affine else []
    leaves += [laid_out(draw, "residual_layout", shape, dtype)] if summed else []
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    running = (torch.randn(channels).to(vectors), (torch.rand(channels) + 0.5).to(vectors))
    grad = laid_out(draw, "grad", shape, dtype).clone()

    def run(fused: bool, convert: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        x, *rest = (convert(leaf.detach()).requires_grad_() for leaf in leaves)
        weight, bias = rest[:2] if affine else (None, None)
        residual = rest[-1] if summed else None
        statistics = [convert(t.clone()) for t in running] if known or not training else [None, None]
        if fused:
            y = ops.batch_norm_relu(
                x, *statistics, weight, bias, residual, training=training, eps=eps, activation=activation
            )
        else:
            y = F.batch_norm(x, *statistics, weight, bias, training, 0.1, eps)
            y = y if residual is None else y + residual
            z = y.detach()  # where its derivative jumps, an activation may decide either way
            near.copy_((z.abs() < 1e-3) | ((z - 6).abs() < 1e-3) | ((z.abs() - 3).abs() < 1e-3))
            y = FUNCTIONS[NAMES.index(activation)](y)
        grads = torch.autograd.grad(y, [x, *rest], convert(grad).masked_fill(near, 0.0))
        return y.detach(), *grads, *(t for t in statistics if t is not None)

    near = torch.zeros(shape, dtype=torch.bool)
    exact = run(False, Tensor.double)
    with settings(draw):
        ours = run(True, lambda t: t)
    theirs = run(False, lambda t: t)
    # the gradient of the input is a difference of terms that grow with the batch and with 1 / std
    for place, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        size = 32 * (1 + c.abs().max()) if c.numel() else c
        if dtype in (torch.float32, torch.float64) or place == 0:
            as_good(f"result {place}", a, b, c, size)
