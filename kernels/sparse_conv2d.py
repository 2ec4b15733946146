"""Block-sparse 2-d convolution and its two gradients, as matrix products that gather one operand (implicit GEMM).

The weight is a matrix (O, C/groups * kh * kw) of which only some blocks (bh, bw) exist. With m = (n, oh, ow) an output
position and x[m, k] = x[n, c, oh s - p + i d, ow s - p + j d] what column k = (c, i, j) sees there, 0 off the plane:

    forward          y[m, o]  = bias[o] + sum_k W[o, k] x[m, k]      over the existing columns k of o's block row
    values gradient  dW[o, k] = sum_m dy[m, o] x[m, k]               for the existing blocks
    input gradient   dx[n, c, h, w] = sum_(o, i, j) W[o, (c, i, j)] dy[n, o, (h + p - i d) / s, (w + p - j d) / s]

Positions are the long side of each product, so that a block of 8 to 128 is the narrow side of the matrix units.

Blocks (b, b) read b neighbouring channels at one tap, contiguous in channels_last memory. A column of vectors (V, 1)
is a single channel at one tap: there neighbouring positions must be neighbours in memory. So the input is copied, some
images at a time, to copy[c, j, n, h, ow] = x[n, c, h - p, ow s - p + j d] with rows of ``pitch`` (ow rounded up to 8):
every tap is then an aligned run of positions, and no load tests for a border.

The input gradient of vectors has no kernel: each column of W is one channel of dx and adds V terms an entry, so that
it would read V numbers of dy for every V products. The library's product of a dense weight is the faster one.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_moon.kernels.dot import dot
from sparse_moon.kernels.launch import Launch, Variant, Variants

# of the copied input of vectors: bounds the workspace, and is large enough that a layer is seldom more than one or two
# launches (32 MiB would stay in L2, but four times the launches cost more than that wherever the host is in the way)
_COPY_BYTES = 128 * 2**20
_PROGRAMS = 4 * 132  # four programs on each multiprocessor of an H200


@triton.jit
def _divide(a, b):
    """a // b of numbers that are not negative: without a sign it takes half the instructions."""
    return (a.to(tl.uint32) // tl.full((), b, tl.uint32)).to(tl.int32)


@triton.jit
def _output_place(m, m_m, out_width, pitch, BW: tl.constexpr):
    """Place of positions m in the output, and which exist there: rows of vectors' positions are padded to the pitch."""
    if BW == 1:
        row = _divide(m, pitch)
        ow = m - row * pitch
        m, m_m = row * out_width + ow, m_m & (ow < out_width)
    return m.to(tl.int64), m_m


@triton.jit
def _gather(
    p_x, m, m_m, column, channel, m_k, channels, images, height, width, out_height, pitch,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    KH: tl.constexpr, KW: tl.constexpr, BW: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    """x[m, k] as a tile (k, m): ``column`` (k) of the matrix, whose block starts at ``channel`` (k), at positions m."""
    tap = column % (KH * KW)
    channel += column // (KH * KW) * BW
    i, j = tap // KW * dilation_h, tap % KW
    row = _divide(m, pitch)
    n = _divide(row, out_height)
    ow, oh = m - row * pitch, row - n * out_height
    mask = m_k[:, None] & m_m[None, :]
    if BW == 1:
        o_m = (n * height + oh * stride_h) * pitch + ow
        o_k = ((channel * KW + j).to(tl.int64) * (images * height) + i) * pitch
    else:
        j *= dilation_w
        h, w = oh * stride_h - padding_h, ow * stride_w - padding_w
        o_m = ((n * height + h) * width + w).to(tl.int64) * channels
        o_k = (i * width + j) * channels + channel
        if HALO:
            h, w = h[None, :] + i[:, None], w[None, :] + j[:, None]
            mask = mask & (h >= 0) & (h < height) & (w >= 0) & (w < width)
    return tl.load((p_x + o_k)[:, None] + o_m[None, :], mask=mask, other=0.0)


@triton.jit
def _forward(
    p_x, p_values, p_bias, p_row_ptr, p_col, p_y,
    rows, rows_per_group, channels_per_group, channels, images, height, width, out_height, out_width, pitch,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    KH: tl.constexpr, KW: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    HALO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of positions (BM) for one block row (BH)."""
    if BW == 1:
        pitch *= 8  # so that the compiler sees that rows are aligned
    # the block rows of a tile of positions are neighbours in time: they read the same input, from L2
    row, tile = tl.program_id(0) % rows, tl.program_id(0) // rows
    m = tile * BM + tl.arange(0, BM)
    m_m = m < images * out_height * pitch
    o = tl.arange(0, BH)
    first_channel = row // rows_per_group * channels_per_group
    start, end = tl.load(p_row_ptr + row), tl.load(p_row_ptr + row + 1)
    acc = tl.zeros((BM, BH), tl.float32)
    for step in range(0, (end - start) * BW, BK):
        k = step + tl.arange(0, BK)
        entry = start + k // BW
        m_k = entry < end
        column = tl.load(p_col + entry, mask=m_k, other=0)
        channel = first_channel + k % BW
        x = _gather(p_x, m, m_m, column, channel, m_k, channels, images, height, width, out_height, pitch,
                    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, KH, KW, BW, HALO)  # fmt: skip
        o_w = entry * (BH * BW) + k % BW
        w = tl.load(p_values + o_w[:, None] + o[None, :] * BW, mask=m_k[:, None], other=0.0)
        acc = dot(tl.trans(x), w, acc, PRECISION)
    if p_bias is not None:
        acc += tl.load(p_bias + row * BH + o).to(tl.float32)[None, :]
    o_m, m_m = _output_place(m, m_m, out_width, pitch, BW)
    tl.store(
        p_y + (o_m * (rows * BH))[:, None] + (row * BH + o)[None, :], acc.to(p_y.dtype.element_ty), mask=m_m[:, None]
    )


@triton.jit
def _values_grad(
    p_dy, p_x, p_row_ptr, p_col, p_dw,
    rows, rows_per_group, channels_per_group, channels, images, height, width, out_height, out_width, pitch,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, entries, steps,
    KH: tl.constexpr, KW: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    ROWS: tl.constexpr, HALO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BK / BW neighbouring entries of one block row, over ``steps`` tiles of positions."""
    if BW == 1:
        pitch *= 8
    # the block rows are cut into parts of BK / BW entries; this program's part is number `part` of all
    part, split = tl.program_id(0), tl.program_id(1)
    r = tl.arange(0, ROWS)
    starts, ends = tl.load(p_row_ptr + r, mask=r < rows, other=0), tl.load(p_row_ptr + r + 1, mask=r < rows, other=0)
    parts = tl.cdiv(ends - starts, BK // BW)
    before = tl.cumsum(parts, 0) <= part
    row = tl.sum(before.to(tl.int32), 0)
    if row >= rows:  # the host knows only a bound of the number of parts
        return
    start = tl.load(p_row_ptr + row) + (part - tl.sum(tl.where(before, parts, 0), 0)) * (BK // BW)
    k, o = tl.arange(0, BK), tl.arange(0, BH)
    entry = start + k // BW
    m_k = entry < tl.load(p_row_ptr + row + 1)
    column = tl.load(p_col + entry, mask=m_k, other=0)
    channel = row // rows_per_group * channels_per_group + k % BW
    acc = tl.zeros((BK, BH), tl.float32)
    stop = min((split + 1) * steps * BM, images * out_height * pitch)
    for first in range(split * steps * BM, stop, BM):
        m = first + tl.arange(0, BM)
        m_m = m < images * out_height * pitch
        x = _gather(p_x, m, m_m, column, channel, m_k, channels, images, height, width, out_height, pitch,
                    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, KH, KW, BW, HALO)  # fmt: skip
        o_m, m_m = _output_place(m, m_m, out_width, pitch, BW)
        dy = tl.load(p_dy + (o_m * (rows * BH))[:, None] + (row * BH + o)[None, :], mask=m_m[:, None], other=0.0)
        acc = dot(x, dy, acc, PRECISION)
    o_w = split.to(tl.int64) * entries * (BH * BW) + entry * (BH * BW) + k % BW
    tl.store(p_dw + o_w[:, None] + o[None, :] * BW, acc.to(p_dw.dtype.element_ty), mask=m_k[:, None])


@triton.jit
def _sum_splits(p_parts, p_sum, n, splits, BN: tl.constexpr):
    """sum[e] = the sum over the splits of parts[split, e], always in the same order."""
    e = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros((BN,), tl.float32)
    for _ in range(splits):
        acc += tl.load(p_parts + e, mask=e < n, other=0.0)
        p_parts += n
    tl.store(p_sum + e, acc.to(p_sum.dtype.element_ty), mask=e < n)


@triton.jit
def _copy_taps(
    p_x, p_copy, channels, images, height, width, copy_height, out_width, pitch,
    stride_w, padding_h, padding_w, dilation_w, KW: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """copy[c, j, n, h, ow] = x[n, c, h - p, ow s - p + j d], zero off the plane and from ow = out_width on."""
    pitch *= 8
    m, c = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BC + tl.arange(0, BC)
    positions = images * copy_height * pitch
    ow, h, n = m % pitch, m // pitch % copy_height - padding_h, m // pitch // copy_height
    m_h = (m < positions) & (h >= 0) & (h < height) & (ow < out_width)
    for j in tl.static_range(KW):
        w = ow * stride_w - padding_w + j * dilation_w
        m_m = m_h & (w >= 0) & (w < width)
        o_x = ((n * height + h) * width + w).to(tl.int64) * channels
        x = tl.load(p_x + o_x[:, None] + c[None, :], mask=m_m[:, None] & (c < channels)[None, :], other=0.0)
        o_copy = (c * KW + j).to(tl.int64) * positions
        tl.store(p_copy + o_copy[:, None] + m[None, :], tl.trans(x),
                 mask=(c < channels)[:, None] & (m < positions)[None, :])  # fmt: skip


@triton.jit
def _input_grad(
    p_dy, p_values, p_t_ptr, p_t_row, p_t_perm, p_dx,
    outputs, outputs_per_group, channels, channels_per_group, column_blocks, positions, height, width,
    out_height, out_width, padding_h, padding_w, dilation_h, dilation_w,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, B: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of input positions (BM) for the B channels of one block column and its KH * KW taps.

    The taps of a channel block are neighbouring block columns, so its entries are one run of the transpose index.
    """
    blocks_per_group = channels_per_group // B
    block, tile = tl.program_id(0) % column_blocks, tl.program_id(0) // column_blocks
    group, block = block // blocks_per_group, block % blocks_per_group
    m = tile * BM + tl.arange(0, BM)
    m_m = m < positions
    # with s = 1 these are the output's row and column that the first tap connects to this position
    line = _divide(m, width)
    n = _divide(line, height)
    h, w = line - n * height + padding_h, m - line * width + padding_w
    c = tl.arange(0, B)
    p_t_ptr += block * (KH * KW)
    start, end = tl.load(p_t_ptr), tl.load(p_t_ptr + KH * KW)
    acc = tl.zeros((BM, B), tl.float32)
    for step in range(0, (end - start) * B, BK):
        k = step + tl.arange(0, BK)
        entry = start + k // B
        m_k = entry < end
        row = tl.load(p_t_row + entry, mask=m_k, other=0)
        tap = tl.zeros((BK,), tl.int32)
        for q in tl.static_range(1, KH * KW):
            tap += (entry >= tl.load(p_t_ptr + q)).to(tl.int32)
        o = row * B + k % B
        o_w = tl.load(p_t_perm + entry, mask=m_k, other=0) * (B * B) + k % B * B
        m_k = m_k & (row * B // outputs_per_group == group)
        oh = h[None, :] - (tap // KW * dilation_h)[:, None]
        ow = w[None, :] - (tap % KW * dilation_w)[:, None]
        mask = m_k[:, None] & m_m[None, :] & (oh >= 0) & (ow >= 0)
        if STRIDE_H > 1:
            mask = mask & (oh % STRIDE_H == 0)
            oh = oh // STRIDE_H
        if STRIDE_W > 1:
            mask = mask & (ow % STRIDE_W == 0)
            ow = ow // STRIDE_W
        mask = mask & (oh < out_height) & (ow < out_width)
        o_dy = ((n[None, :] * out_height + oh) * out_width + ow).to(tl.int64) * outputs + o[:, None]
        dy = tl.load(p_dy + o_dy, mask=mask, other=0.0)
        weight = tl.load(p_values + o_w[:, None] + c[None, :], mask=m_k[:, None], other=0.0)
        acc = dot(tl.trans(dy), weight, acc, PRECISION)
    o_dx = m.to(tl.int64)[:, None] * channels + (group * channels_per_group + block * B + c)[None, :]
    tl.store(p_dx + o_dx, acc.to(p_dx.dtype.element_ty), mask=m_m[:, None])


class _Geometry(NamedTuple):
    """A convolution, as in the public functions."""

    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class _Tiles(NamedTuple):
    """Size of a product's tile and how a program works on it."""

    m: int
    k: int
    num_warps: int
    num_stages: int


def _precision(dtype: torch.dtype, allow_tf32: bool) -> str:
    return "tf32" if allow_tf32 or dtype != torch.float32 else "ieee"


def _tiles(narrow: int, dtype: torch.dtype, precision: str) -> _Tiles:
    """Tiles of the forward and input gradient, for blocks of ``narrow`` channels."""
    if precision == "ieee":
        # CUDA cores: operands too come from registers, so tiles are small; of 64 and 128 the size at which none spill
        return _Tiles(128 if narrow in (32, 128) else 64, 16, 8 if narrow == 128 else 4, 3)
    # 128 bytes of neighbouring channels or positions a row of the tile: full lines of shared memory
    # 128 x 128 accumulators need eight warps to stay in registers
    return _Tiles(128, 128 // dtype.itemsize, 8 if narrow == 128 else 4, 3)


def _values_tiles(block: tuple[int, ...], dtype: torch.dtype, precision: str) -> _Tiles:
    """Tiles of the values gradient: k is the long side of its output, m the positions of a step."""
    if precision == "ieee":
        return _Tiles(16, max(64, block[1]), 8 if block[1] == 128 else 4, 3)
    # the entries of a part share what they read of dy: 4 entries of 32 together read 0.6 times what single ones would
    return _Tiles(128 // dtype.itemsize, 128, 8 if block[0] == 128 else 4, 3)


def _gathered(
    input: Tensor, output: Tensor, block: tuple[int, ...], geometry: _Geometry
) -> Iterator[tuple[list[Launch], Tensor, Tensor, dict[str, Any]]]:
    """Groups of images: what to launch first, the input to gather from, their output, and the kernels' geometry."""
    images, channels, height, width = input.shape
    outputs, out_height, out_width = output.shape[1:]
    _, channels_per_group, kh, kw = geometry.weight_shape
    rows = outputs // block[0]
    arguments: dict[str, Any] = dict(
        rows=rows, rows_per_group=rows // geometry.groups, channels_per_group=channels_per_group, channels=channels,
        images=images, height=height, width=width, out_height=out_height, out_width=out_width, pitch=out_width,
        stride_h=geometry.stride[0], stride_w=geometry.stride[1],
        padding_h=geometry.padding[0], padding_w=geometry.padding[1],
        dilation_h=geometry.dilation[0], dilation_w=geometry.dilation[1],
        KH=kh, KW=kw, BH=block[0], BW=block[1], HALO=any(geometry.padding),
    )  # fmt: skip
    if block[1] > 1:
        yield [], input, output, arguments
        return
    copy_height = (out_height - 1) * geometry.stride[0] + (kh - 1) * geometry.dilation[0] + 1
    pitch = triton.cdiv(out_width, 8)
    size = channels * kw * copy_height * pitch * 8
    group = max(1, _COPY_BYTES // (size * input.element_size()))
    group = triton.cdiv(images, triton.cdiv(images, group)) if images else 1  # equal groups
    copy = torch.empty(min(group, images) * size, dtype=input.dtype, device=input.device)
    for first in range(0, images, group):
        x, y = input[first : first + group], output[first : first + group]
        n = x.shape[0]
        grid = (triton.cdiv(n * copy_height * pitch * 8, 64), triton.cdiv(channels, 64))
        launch = Launch(_copy_taps, grid, dict(
            p_x=x, p_copy=copy, channels=channels, images=n, height=height, width=width, copy_height=copy_height,
            out_width=out_width, pitch=pitch, stride_w=geometry.stride[1], padding_h=geometry.padding[0],
            padding_w=geometry.padding[1], dilation_w=geometry.dilation[1], KW=kw, BM=64, BC=64,
        ))  # fmt: skip
        yield [launch], copy, y, arguments | dict(images=n, height=copy_height, pitch=pitch, HALO=False)


def _positions(output: Tensor, arguments: dict[str, Any]) -> int:
    """Positions that the kernels walk over: with vectors, rows are padded to multiples of 8."""
    return output.shape[0] * output.shape[2] * arguments["pitch"] * (8 if arguments["BW"] == 1 else 1)


def _forward_launches(
    input: Tensor, values: Tensor, bias: Tensor | None, row_ptr: Tensor, col: Tensor, output: Tensor,
    geometry: _Geometry, allow_tf32: bool,
) -> Iterator[Launch]:  # fmt: skip
    precision = _precision(input.dtype, allow_tf32)
    tiles = _tiles(values.shape[1], input.dtype, precision)
    for before, x, y, arguments in _gathered(input, output, values.shape[1:], geometry):
        yield from before
        grid = (arguments["rows"] * triton.cdiv(_positions(y, arguments), tiles.m),)
        yield Launch(_forward, grid, dict(
            p_x=x, p_values=values, p_bias=bias, p_row_ptr=row_ptr, p_col=col, p_y=y, **arguments, BM=tiles.m,
            BK=tiles.k, PRECISION=precision,
        ), tiles.num_warps, tiles.num_stages)  # fmt: skip


def _input_grad_launch(
    grad: Tensor, values: Tensor, t_ptr: Tensor, t_row: Tensor, t_perm: Tensor, output: Tensor,
    geometry: _Geometry, allow_tf32: bool,
) -> Launch:  # fmt: skip
    images, channels, height, width = output.shape
    outputs, channels_per_group, kh, kw = geometry.weight_shape
    side, precision = values.shape[1], _precision(grad.dtype, allow_tf32)
    tiles = _tiles(side, grad.dtype, precision)
    column_blocks = geometry.groups * channels_per_group // side
    grid = (column_blocks * triton.cdiv(images * height * width, tiles.m),)
    return Launch(_input_grad, grid, dict(
        p_dy=grad, p_values=values, p_t_ptr=t_ptr, p_t_row=t_row, p_t_perm=t_perm, p_dx=output, outputs=outputs,
        outputs_per_group=outputs // geometry.groups, channels=channels, channels_per_group=channels_per_group,
        column_blocks=column_blocks, positions=images * height * width, height=height, width=width,
        out_height=grad.shape[2], out_width=grad.shape[3], padding_h=geometry.padding[0],
        padding_w=geometry.padding[1], dilation_h=geometry.dilation[0], dilation_w=geometry.dilation[1],
        STRIDE_H=geometry.stride[0], STRIDE_W=geometry.stride[1], KH=kh, KW=kw, B=side, BM=tiles.m, BK=tiles.k,
        PRECISION=precision,
    ), tiles.num_warps, tiles.num_stages)  # fmt: skip


def _values_grad_launches(
    grad: Tensor, input: Tensor, row_ptr: Tensor, col: Tensor, output: Tensor, geometry: _Geometry, allow_tf32: bool
) -> Iterator[Launch]:
    block, precision = output.shape[1:], _precision(grad.dtype, allow_tf32)
    tiles = _values_tiles(block, grad.dtype, precision)
    rows, n = grad.shape[1] // block[0], col.numel()
    parts = n // (tiles.k // block[1]) + min(rows, n)  # at most; the rows' own numbers are on the device
    groups = list(_gathered(input, grad, block, geometry))
    steps = [triton.cdiv(_positions(dy, arguments), tiles.m) for _, _, dy, arguments in groups]
    # enough splits to fill the GPU, but eight steps each, to be worth their start and their sum
    longest = max(1, *steps) if steps else 1
    per_split = triton.cdiv(longest, min(triton.cdiv(_PROGRAMS, max(parts, 1)), triton.cdiv(longest, 8)))
    counts = [triton.cdiv(count, per_split) for count in steps]
    total = sum(counts)
    sums = output if total == 1 else output.new_empty((total, output.numel()), dtype=torch.float32)
    first = 0
    for (before, x, dy, arguments), count in zip(groups, counts, strict=True):
        yield from before
        yield Launch(_values_grad, (parts, count), dict(
            p_dy=dy, p_x=x, p_row_ptr=row_ptr, p_col=col, p_dw=output if total == 1 else sums[first:], **arguments,
            entries=n, steps=per_split, BM=tiles.m, BK=tiles.k, ROWS=triton.next_power_of_2(rows),
            PRECISION=precision,
        ), tiles.num_warps, tiles.num_stages)  # fmt: skip
        first += count
    if total != 1:
        grid = (triton.cdiv(output.numel(), 256),)
        yield Launch(_sum_splits, grid, dict(p_parts=sums, p_sum=output, n=output.numel(), splits=total, BN=256), 2)


def _check(block: tuple[int, ...], geometry: _Geometry, *images: Tensor) -> None:
    dtype = images[0].dtype
    if not takes(block, geometry.weight_shape, geometry.groups, dtype):
        raise ValueError(
            f"no kernel for block {tuple(block)}, weight {tuple(geometry.weight_shape)}, "
            f"{geometry.groups} groups and {dtype}"
        )
    for tensor in images:
        if not tensor.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"tensors must be channels_last, got strides {tensor.stride()} of {tuple(tensor.shape)}")


_BLOCKS = [(16, 16), (32, 32), (64, 64), (128, 128), (8, 1), (16, 1), (32, 1)]
_DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def takes(block: tuple[int, ...], weight_shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> bool:
    """Whether the kernels below work for this block, weight (O, C/groups, kh, kw) and element type."""
    outputs, channels = weight_shape[:2]
    return (
        dtype in _DTYPES and tuple(block) in _BLOCKS and outputs % (groups * block[0]) == 0 and channels % block[1] == 0
    )


def sparse_conv2d(
    input: Tensor, values: Tensor, bias: Tensor | None, row_ptr: Tensor, col: Tensor, output: Tensor, *,
    weight_shape: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...],
    groups: int, allow_tf32: bool,
) -> None:  # fmt: skip
    """Cross-correlation as ``F.conv2d``.

    Args:
        input: (N, C, H, W) channels_last, fewer than 2^31 positions N * H * W; the dtype of all that follow.
        values: (n, bh, bw) contiguous, blocks of the matrix (O, C/groups * kh * kw) in topology order.
        bias: (O,) or None.
        row_ptr, col: the index by rows, int32 (see :class:`sparse_moon.topology.Topology`).
        output: (N, O, Ho, Wo) channels_last, written.
        weight_shape: (O, C/groups, kh, kw).
        stride, padding, dilation: (vertical, horizontal).
        allow_tf32: whether float32 products may round their operands to TF32.

    Raises:
        ValueError: a case that :func:`takes` refuses, or tensors that are not channels_last.
    """
    geometry = _Geometry(weight_shape, stride, padding, dilation, groups)
    _check(values.shape[1:], geometry, input, output)
    for launch in _forward_launches(input, values, bias, row_ptr, col, output, geometry, allow_tf32):
        launch()


def sparse_conv2d_input_grad(
    grad: Tensor, values: Tensor, t_ptr: Tensor, t_row: Tensor, t_perm: Tensor, output: Tensor, *,
    weight_shape: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...],
    groups: int, allow_tf32: bool,
) -> None:  # fmt: skip
    """Gradient (N, C, H, W) of the input, into ``output``, from ``grad`` (N, O, Ho, Wo), both channels_last.

    Blocks (b, b) only. ``t_ptr``, ``t_row`` and ``t_perm`` are the transpose index, int32; all else as in
    :func:`sparse_conv2d`.
    """
    geometry = _Geometry(weight_shape, stride, padding, dilation, groups)
    _check(values.shape[1:], geometry, grad, output)
    if values.shape[2] == 1:
        raise ValueError(f"no kernel for the input gradient of vectors, got blocks {tuple(values.shape[1:])}")
    _input_grad_launch(grad, values, t_ptr, t_row, t_perm, output, geometry, allow_tf32)()


def sparse_conv2d_values_grad(
    grad: Tensor, input: Tensor, row_ptr: Tensor, col: Tensor, output: Tensor, *,
    weight_shape: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...],
    groups: int, allow_tf32: bool,
) -> None:  # fmt: skip
    """Gradient (n, bh, bw) of the values, contiguous, into ``output``, from ``grad`` (N, O, Ho, Wo) and ``input``.

    The same inputs give the same bits: partial sums over positions are added in a fixed order. All else as in
    :func:`sparse_conv2d`.
    """
    geometry = _Geometry(weight_shape, stride, padding, dilation, groups)
    _check(output.shape[1:], geometry, grad, input)
    for launch in _values_grad_launches(grad, input, row_ptr, col, output, geometry, allow_tf32):
        launch()


def variants() -> Variants:
    """Every pattern and tile on a 3 x 3 kernel with padding; float16, stride, dilation and no padding on two of them.

    float16 takes the tiles of bfloat16, and no more than the type of the matrix instruction differs.
    """
    common = _Geometry((256, 256, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    strided = _Geometry((256, 256, 3, 3), (2, 2), (0, 0), (2, 2), 1)
    cases = [(block, dtype, tf32, common) for block in _BLOCKS
             for dtype, tf32 in ((torch.bfloat16, True), (torch.float32, True), (torch.float32, False))]  # fmt: skip
    cases += [(block, torch.float16, True, strided) for block in ((32, 32), (16, 1))]
    seen = set()
    for block, dtype, tf32, geometry in cases:
        side = 17 if geometry is common else 7
        x = torch.empty(3, 256, 17, 17, dtype=dtype).to(memory_format=torch.channels_last)
        y = torch.empty(3, 256, side, side, dtype=dtype).to(memory_format=torch.channels_last)
        values, index = torch.empty(6, *block, dtype=dtype), torch.empty(16, dtype=torch.int32)
        for launch in (
            *_forward_launches(x, values, y[0, :, 0, 0], index, index[:6], y, geometry, tf32),
            *([_input_grad_launch(y, values, index, index, index, x, geometry, tf32)] if block[1] > 1 else []),
            *_values_grad_launches(y, x, index, index[:6], values, geometry, tf32),
        ):
            kernel = launch.kernel.fn.__name__
            same = {name: value for name, value in launch.arguments.items() if not isinstance(value, Tensor)}
            key = (kernel, dtype, *same.items())
            if key not in seen:
                seen.add(key)
                name = f"sparse_conv2d {kernel} {block} {dtype} tf32={tf32} stride={geometry.stride}"
                product = kernel in ("_forward", "_input_grad", "_values_grad")
                yield Variant(name, launch, product and _precision(dtype, tf32) == "tf32")
