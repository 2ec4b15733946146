"""Batch norm, a residual sum and an activation of channels_last activations (Ioffe and Szegedy 2015).

xhat = (x - mean) rstd, rstd = 1 / sqrt(var + eps), y = activation(weight xhat + bias + residual); with m = N H W,
g = activation'(...) dy, d bias = sum g, d weight = sum g xhat, d residual = g, and with the batch's statistics
dx = weight rstd (g - d bias / m - xhat d weight / m), with given ones dx = weight rstd g

Here x is a matrix (m, C), float32, float16 or bfloat16; all else is computed in float32, and rounded where it is
written. What a step reads and writes, in units of x, is nearly all it costs:

| | forward | with a residual | backward | with a residual | sum |
|---|---|---|---|---|---|
| here | x, x, y = 3 | 4 | dy x, dy x dx = 5 | dy x y g, g x dx = 7 | 8, 11 |
| torch, operator by operator | 3 + 2 | 3 + 3 + 2 | 3 + 5 | 3 + 5 | 13, 16 |

A mean needs all of x before the first y, and so do the sums before the first dx: 3 and 5 are the least that a tensor
larger than the L2 allows. Both second passes begin at the end, which the L2 still has.

Statistics are Welford's in each slot of a program's tile, and are merged by Chan's formula, in the program and then
over programs: no difference of large sums, whatever the mean. All sums are parts of programs, added up in a fixed
order by one more launch, so that the same input gives the same bits; how many parts depends on the shape alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_moon.kernels.launch import Launch, Variant, Variants

# Activations by their numbers, which are the operator's: none, ReLU, ReLU6, SiLU, hardswish.
_RELU, _RELU6, _SILU, _HARDSWISH = (tl.constexpr(i) for i in range(1, 5))


@triton.jit
def _activate(v, ACTIVATION: tl.constexpr):
    """NaN stays NaN."""
    if ACTIVATION == _RELU:
        v = tl.where(v <= 0, 0.0, v)
    elif ACTIVATION == _RELU6:
        v = tl.where(v <= 0, 0.0, tl.where(v >= 6, 6.0, v))
    elif ACTIVATION == _SILU:
        v = v / (1 + tl.exp(-v))
    elif ACTIVATION == _HARDSWISH:
        v = tl.where(v <= -3, 0.0, tl.where(v < 3, v * (v + 3) / 6, v))
    return v


@triton.jit
def _times_derivative(g, v, ACTIVATION: tl.constexpr):
    """The gradient in front of the activation of v; of ReLU and ReLU6 the result does as well as v."""
    if ACTIVATION == _RELU:
        g = tl.where(v <= 0, 0.0, g)
    elif ACTIVATION == _RELU6:
        g = tl.where((v <= 0) | (v >= 6), 0.0, g)
    elif ACTIVATION == _SILU:
        s = 1 / (1 + tl.exp(-v))
        g = g * s * (1 + v * (1 - s))
    elif ACTIVATION == _HARDSWISH:
        g = tl.where(v <= -3, 0.0, tl.where(v < 3, g * (v / 3 + 0.5), g))
    return g


@triton.jit
def _rstd(p_var, eps, o_col, m_col):
    return tl.div_rn(1.0, tl.sqrt_rn(tl.load(p_var + o_col, m_col, 1.0).to(tl.float32) + eps))


@triton.jit
def _norm(p_mean, p_var, p_weight, p_bias, eps, o_col, m_col):
    """(COLS,) each: mean, scale and bias of (x - mean) scale + bias."""
    mean = tl.load(p_mean + o_col, m_col, 0.0).to(tl.float32)
    scale = _rstd(p_var, eps, o_col, m_col)
    if p_weight is not None:
        scale *= tl.load(p_weight + o_col, m_col, 0.0).to(tl.float32)
    bias = tl.zeros_like(mean)
    if p_bias is not None:
        bias += tl.load(p_bias + o_col, m_col, 0.0).to(tl.float32)
    return mean, scale, bias


@triton.jit
def _merge(n, mean, squares, total):
    """Chan's: mean, and squared distances from it, of parts of n numbers each, (parts,) and (parts, COLS).

    A first mean is as imprecise as a sum of large numbers; the distances from it say by how much.
    """
    n = n.to(tl.float32)[:, None]
    whole = tl.sum(n * mean, 0) / total
    distance = mean - whole[None, :]
    missed = tl.sum(n * distance, 0) / total
    return whole + missed, tl.sum(squares + n * distance * distance, 0) - total * missed * missed


@triton.jit
def _moments(p_x, p_parts, rows, rows_a_part, channels, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Program (COLS channels, part of the rows): mean and squared distances from it, to parts (2, parts, C)."""
    part = tl.program_id(1).to(tl.int64)
    o_row, o_col = tl.arange(0, ROWS), tl.program_id(0) * COLS + tl.arange(0, COLS)
    m_col = o_col < channels
    count = tl.minimum(rows_a_part, rows - part * rows_a_part).to(tl.int32)
    p_x += part * rows_a_part * channels
    o_tile = o_row[:, None] * channels + o_col[None, :]
    mean = tl.zeros([ROWS, COLS], tl.float32)
    squares = tl.zeros([ROWS, COLS], tl.float32)
    seen = 0.0
    whole = count // ROWS * ROWS
    for row in tl.range(0, whole, ROWS, num_stages=3):
        x = tl.load(p_x + tl.cast(row, tl.int64) * channels + o_tile, m_col[None, :], 0.0).to(tl.float32)
        seen += 1.0
        distance = x - mean
        mean += distance * (1 / seen)
        squares += distance * (x - mean)
    if whole < count:
        m_x = (whole + o_row < count)[:, None] & m_col[None, :]
        x = tl.load(p_x + tl.cast(whole, tl.int64) * channels + o_tile, m_x, 0.0).to(tl.float32)
        distance = tl.where(m_x, x - mean, 0.0)
        mean += distance * (1 / (seen + 1))
        squares += distance * (x - mean)
    mean, squares = _merge((count - o_row + ROWS - 1) // ROWS, mean, squares, count)
    p_parts += part * channels + o_col
    tl.store(p_parts, mean, m_col)
    tl.store(p_parts + tl.num_programs(1).to(tl.int64) * channels, squares, m_col)


@triton.jit
def _close_moments(p_parts, p_mean, p_var, parts, rows, rows_a_part, channels, PARTS: tl.constexpr, COLS: tl.constexpr):
    """Program (COLS channels): mean and biased variance of all parts."""
    o_part, o_col = tl.arange(0, PARTS), tl.program_id(0) * COLS + tl.arange(0, COLS)
    m_col = o_col < channels
    m_part = (o_part < parts)[:, None] & m_col[None, :]
    p_parts += o_part[:, None] * channels + o_col[None, :]
    mean = tl.load(p_parts, m_part, 0.0)
    squares = tl.load(p_parts + parts * channels, m_part, 0.0)
    n = tl.maximum(tl.minimum(rows_a_part, rows - o_part.to(tl.int64) * rows_a_part), 0)
    mean, squares = _merge(n, mean, squares, rows)
    tl.store(p_mean + o_col, mean, m_col)
    tl.store(p_var + o_col, tl.where(squares < 0, 0.0, squares) / rows, m_col)


@triton.jit
def _forward(
    p_x, p_residual, p_weight, p_bias, p_mean, p_var, p_y, eps, rows, rows_a_part, channels,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Program (COLS channels, part of the rows)."""
    part = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
    o_row, o_col = tl.arange(0, ROWS), tl.program_id(0) * COLS + tl.arange(0, COLS)
    m_col = o_col < channels
    mean, scale, bias = _norm(p_mean, p_var, p_weight, p_bias, eps, o_col, m_col)
    count = tl.minimum(rows_a_part, rows - part * rows_a_part).to(tl.int32)
    o_tile = o_row[:, None] * channels + o_col[None, :]
    for row in tl.range(0, count, ROWS, num_stages=2):
        m_x = (row + o_row < count)[:, None] & m_col[None, :]
        o_x = (part * rows_a_part + row) * channels
        v = (tl.load(p_x + o_x + o_tile, m_x, 0.0).to(tl.float32) - mean[None, :]) * scale[None, :] + bias[None, :]
        if p_residual is not None:
            v += tl.load(p_residual + o_x + o_tile, m_x, 0.0).to(tl.float32)
        tl.store(p_y + o_x + o_tile, _activate(v, ACTIVATION).to(p_y.dtype.element_ty), m_x)


@triton.jit
def _gradient_sums(
    p_grad, p_x, p_y, p_residual_grad, p_weight, p_bias, p_mean, p_var, p_parts, eps, rows, rows_a_part, channels,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Program (COLS channels, part of the rows): sums of g and of g (x - mean), to parts (2, parts, C).

    With the output y of a sum, g follows from that, and is written as the residual's gradient.
    """
    part = tl.program_id(1).to(tl.int64)
    o_row, o_col = tl.arange(0, ROWS), tl.program_id(0) * COLS + tl.arange(0, COLS)
    m_col = o_col < channels
    mean, scale, bias = _norm(p_mean, p_var, p_weight, p_bias, eps, o_col, m_col)
    count = tl.minimum(rows_a_part, rows - part * rows_a_part).to(tl.int32)
    o_tile = o_row[:, None] * channels + o_col[None, :]
    sums = tl.zeros([ROWS, COLS], tl.float32)
    products = tl.zeros([ROWS, COLS], tl.float32)
    for row in tl.range(0, count, ROWS, num_stages=2):
        m_x = (row + o_row < count)[:, None] & m_col[None, :]
        o_x = (part * rows_a_part + row) * channels
        g = tl.load(p_grad + o_x + o_tile, m_x, 0.0).to(tl.float32)
        centred = tl.load(p_x + o_x + o_tile, m_x, 0.0).to(tl.float32) - mean[None, :]
        if p_y is not None:
            g = _times_derivative(g, tl.load(p_y + o_x + o_tile, m_x, 0.0).to(tl.float32), ACTIVATION)
            tl.store(p_residual_grad + o_x + o_tile, g.to(p_residual_grad.dtype.element_ty), m_x)
        else:
            g = _times_derivative(g, centred * scale[None, :] + bias[None, :], ACTIVATION)
        sums += g
        products += tl.where(m_x, g * centred, 0.0)
    p_parts += part * channels + o_col
    tl.store(p_parts, tl.sum(sums, 0), m_col)
    tl.store(p_parts + tl.num_programs(1).to(tl.int64) * channels, tl.sum(products, 0), m_col)


@triton.jit
def _close_sums(
    p_parts, p_var, p_weight_grad, p_bias_grad, eps, parts, channels, PARTS: tl.constexpr, COLS: tl.constexpr
):
    """Program (COLS channels): gradients of weight and bias."""
    o_part, o_col = tl.arange(0, PARTS), tl.program_id(0) * COLS + tl.arange(0, COLS)
    m_col = o_col < channels
    m_part = (o_part < parts)[:, None] & m_col[None, :]
    p_parts += o_part[:, None] * channels + o_col[None, :]
    sums = tl.sum(tl.load(p_parts, m_part, 0.0), 0)
    products = tl.sum(tl.load(p_parts + parts * channels, m_part, 0.0), 0)
    products *= _rstd(p_var, eps, o_col, m_col)
    tl.store(p_bias_grad + o_col, sums.to(p_bias_grad.dtype.element_ty), m_col)
    tl.store(p_weight_grad + o_col, products.to(p_weight_grad.dtype.element_ty), m_col)


@triton.jit
def _input_grad(
    p_grad, p_x, p_weight, p_bias, p_mean, p_var, p_weight_grad, p_bias_grad, p_dx, eps, rows, rows_a_part, channels,
    ACTIVATION: tl.constexpr, BATCH_STATISTICS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Program (COLS channels, part of the rows)."""
    part = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
    o_row, o_col = tl.arange(0, ROWS), tl.program_id(0) * COLS + tl.arange(0, COLS)
    m_col = o_col < channels
    mean, scale, bias = _norm(p_mean, p_var, p_weight, p_bias, eps, o_col, m_col)
    if BATCH_STATISTICS:
        offset = tl.load(p_bias_grad + o_col, m_col, 0.0).to(tl.float32) / rows
        slope = tl.load(p_weight_grad + o_col, m_col, 0.0).to(tl.float32) / rows * _rstd(p_var, eps, o_col, m_col)
    count = tl.minimum(rows_a_part, rows - part * rows_a_part).to(tl.int32)
    o_tile = o_row[:, None] * channels + o_col[None, :]
    for row in tl.range(0, count, ROWS, num_stages=2):
        m_x = (row + o_row < count)[:, None] & m_col[None, :]
        o_x = (part * rows_a_part + row) * channels
        g = tl.load(p_grad + o_x + o_tile, m_x, 0.0).to(tl.float32)
        if BATCH_STATISTICS or ACTIVATION > 0:
            centred = tl.load(p_x + o_x + o_tile, m_x, 0.0).to(tl.float32) - mean[None, :]
            g = _times_derivative(g, centred * scale[None, :] + bias[None, :], ACTIVATION)
        if BATCH_STATISTICS:
            g = g - offset[None, :] - centred * slope[None, :]
        tl.store(p_dx + o_x + o_tile, (g * scale[None, :]).to(p_dx.dtype.element_ty), m_x)


# A program's tile: 16 numbers a thread, and rows of 128 bytes in 16 bits; neighbouring programs have their neighbours.
TILE, COLS, WARPS = 4096, 64, 8
# Programs of a pass: some for each of the 108 to 148 multiprocessors, so that the last ones do not matter.
PROGRAMS = 1024
# Most parts of a channel, which the launch that closes them holds in registers, 4096 numbers a program.
MOST_PARTS, CLOSE_TILE = 512, 4096


class _Shape:
    """How (m, C) is divided among programs."""

    def __init__(self, x: Tensor) -> None:
        self.channels = x.shape[1]
        self.rows = x.numel() // self.channels
        cols = min(triton.next_power_of_2(self.channels), COLS)
        tile_rows = TILE // cols
        blocks = triton.cdiv(self.channels, cols)
        parts = min(max(PROGRAMS // blocks, 1), MOST_PARTS)
        rows_a_part = triton.cdiv(triton.cdiv(self.rows, parts), tile_rows) * tile_rows
        self.parts = triton.cdiv(self.rows, rows_a_part)
        self.sizes = {"rows": self.rows, "rows_a_part": rows_a_part, "channels": self.channels}
        self._tile = {"ROWS": tile_rows, "COLS": cols}
        self._grid = (blocks, self.parts)

    def whole(self, kernel: object, **arguments: object) -> Launch:
        """A launch that passes over activations."""
        return Launch(kernel, self._grid, self.sizes | self._tile | arguments, num_warps=WARPS)

    def close(self, kernel: object, **arguments: object) -> Launch:
        """A launch that passes over the parts."""
        padded = triton.next_power_of_2(self.parts)
        cols = min(CLOSE_TILE // padded, triton.next_power_of_2(self.channels), COLS)
        constants = {"parts": self.parts, "channels": self.channels, "PARTS": padded, "COLS": cols}
        return Launch(kernel, (triton.cdiv(self.channels, cols),), constants | arguments, num_warps=WARPS)


def _forward_launches(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor,
    y: Tensor, eps: float, activation: int, batch_statistics: bool,
) -> tuple[Launch, ...]:  # fmt: skip
    shape = _Shape(x)
    last = shape.whole(
        _forward, p_x=x, p_residual=residual, p_weight=weight, p_bias=bias, p_mean=mean, p_var=var, p_y=y, eps=eps,
        ACTIVATION=activation,
    )  # fmt: skip
    if not batch_statistics:
        return (last,)
    parts = mean.new_empty((2, shape.parts, shape.channels))
    return (
        shape.whole(_moments, p_x=x, p_parts=parts),
        shape.close(
            _close_moments, p_parts=parts, p_mean=mean, p_var=var, rows=shape.rows,
            rows_a_part=shape.sizes["rows_a_part"],
        ),
        last,
    )  # fmt: skip


def _backward_launches(
    grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor,
    dx: Tensor, residual_grad: Tensor | None, weight_grad: Tensor, bias_grad: Tensor, eps: float, activation: int,
    batch_statistics: bool,
) -> tuple[Launch, ...]:  # fmt: skip
    shape = _Shape(x)
    parts = x.new_empty((2, shape.parts, shape.channels), dtype=torch.float32)
    norm = {"p_x": x, "p_weight": weight, "p_bias": bias, "p_mean": mean, "p_var": var, "eps": eps}
    g, left = (grad, activation) if residual_grad is None else (residual_grad, 0)
    return (
        shape.whole(
            _gradient_sums, p_grad=grad, p_y=y, p_residual_grad=residual_grad, p_parts=parts, ACTIVATION=activation,
            **norm,
        ),
        shape.close(
            _close_sums, p_parts=parts, p_var=var, p_weight_grad=weight_grad, p_bias_grad=bias_grad, eps=eps
        ),
        shape.whole(
            _input_grad, p_grad=g, p_weight_grad=weight_grad, p_bias_grad=bias_grad, p_dx=dx, ACTIVATION=left,
            BATCH_STATISTICS=batch_statistics, **norm,
        ),
    )  # fmt: skip


def batch_norm_relu(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor,
    y: Tensor, eps: float, activation: int, batch_statistics: bool,
) -> None:  # fmt: skip
    """Write y, and first the batch's mean and variance where they are wanted: three launches, or one.

    Args:
        x, residual, y: (N, C, H, W), dense in channels_last order, not empty; one dtype of float32, float16, bfloat16.
        weight, bias: (C,) of any floating dtype, contiguous, or None.
        mean, var: (C,); read, or with ``batch_statistics`` float32 and written (the biased variance).
        activation: 0 to 4: none, ReLU, ReLU6, SiLU, hardswish.
    """
    for launch in _forward_launches(x, residual, weight, bias, mean, var, y, eps, activation, batch_statistics):
        launch()


def batch_norm_relu_backward(
    grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor,
    dx: Tensor, residual_grad: Tensor | None, weight_grad: Tensor, bias_grad: Tensor, eps: float, activation: int,
    batch_statistics: bool,
) -> None:  # fmt: skip
    """Write the gradients in three launches; arguments as for :func:`batch_norm_relu`.

    Args:
        grad, dx: like x.
        y, residual_grad: the output and, written, the residual's gradient: both, or None without a residual or without
            an activation; the activation is ReLU or ReLU6 then.
        weight_grad, bias_grad: (C,), written; float32 with ``batch_statistics``, which say whether mean and var are
            those of x.
    """
    for launch in _backward_launches(
        grad, x, y, weight, bias, mean, var, dx, residual_grad, weight_grad, bias_grad, eps, activation,
        batch_statistics,
    ):  # fmt: skip
        launch()


def variants() -> Variants:
    """Widths of channels, dtypes, all activations with and without a residual, either kind of statistics."""
    fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
    all_activations = [(0, False), (0, True), (1, False), (1, True), (2, False), (2, True), (3, False), (4, False)]
    cases = [(bf16, 64, fp32), (bf16, 512, fp32), (bf16, 3, fp32), (bf16, 64, bf16), (fp16, 64, fp32), (fp32, 64, fp32)]
    seen = set()
    for i, (dtype, channels, vector_dtype) in enumerate(cases):
        x = torch.empty(512, channels, 32, 32, dtype=dtype, device="meta")
        weight = torch.empty(channels, dtype=vector_dtype, device="meta")
        for activation, sums in all_activations if i == 0 else all_activations[2:4]:
            for batch in (True, False):
                mean = torch.empty(channels, dtype=fp32 if batch else vector_dtype, device="meta")
                other, masked = x if sums else None, x if sums and activation else None
                launches = (
                    *_forward_launches(x, other, weight, weight, mean, mean, x, 1e-5, activation, batch),
                    *_backward_launches(
                        x, x, masked, weight, weight, mean, mean, x, masked, mean, mean, 1e-5, activation, batch
                    ),
                )  # fmt: skip
                for launch in launches:
                    options = {k: v for k, v in launch.arguments.items() if v is None or k.isupper()}
                    name = f"batch_norm_relu {launch.kernel.__name__} {dtype} {vector_dtype} {channels} {options}"
                    if name not in seen:
                        seen.add(name)
                        yield Variant(name, launch, matrix_unit=False)
