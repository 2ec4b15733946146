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
from torch import Tensor

from sparse_moon.kernels.dot import precision_of
from sparse_moon.kernels.launch import Launch, Variant, Variants
from sparse_moon.kernels.sparse_conv2d_kernels import (
    copy_taps_kernel,
    forward_kernel,
    input_grad_kernel,
    values_grad_kernel,
)
from sparse_moon.kernels.sum_splits import sum_splits

# of the copied input of vectors: bounds the workspace, and is large enough that a layer is seldom more than one or two
# launches (32 MiB would stay in L2, but four times the launches cost more than that wherever the host is in the way)
COPY_BYTES = 128 * 2**20
_PROGRAMS = 4 * 132  # four programs on each multiprocessor of an H200


class Geometry(NamedTuple):
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


def _tiles(block: tuple[int, ...], dtype: torch.dtype, precision: str) -> _Tiles:
    """Tiles of the forward and input gradient."""
    narrow = block[0]
    # Rows have few steps, and what a third stage takes in shared memory is a program less side by side; not of blocks
    # of 128, where registers allow two. Indices of vectors go through a stage, too.
    stages = 2 if 1 < block[1] < 128 else 3
    if precision == "ieee":
        # CUDA cores: operands too come from registers, so tiles are small; of 64 and 128 the size at which none spill
        return _Tiles(128 if narrow in (32, 128) else 64, 16, 8 if narrow == 128 else 4, stages)
    # 128 bytes of neighbouring channels or positions a row of the tile: full lines of shared memory
    # 128 x 128 accumulators need eight warps to stay in registers
    return _Tiles(128, 128 // dtype.itemsize, 8 if narrow == 128 else 4, stages)


def _values_tiles(block: tuple[int, ...], dtype: torch.dtype, precision: str) -> _Tiles:
    """Tiles of the values gradient: k is the long side of its output, m the positions of a step."""
    if precision == "ieee":
        return _Tiles(16, max(64, block[1]), 8 if block[1] == 128 else 4, 3)
    # the entries of a part share what they read of dy: 4 entries of 32 together read 0.6 times what single ones would
    return _Tiles(128 // dtype.itemsize, 128, 8 if block[0] == 128 else 4, 3)


def _gathered(
    input: Tensor, output: Tensor, block: tuple[int, ...], geometry: Geometry
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
    group = max(1, COPY_BYTES // (size * input.element_size()))
    group = triton.cdiv(images, triton.cdiv(images, group)) if images else 1  # equal groups
    copy = torch.empty(min(group, images) * size, dtype=input.dtype, device=input.device)
    for first in range(0, images, group):
        x, y = input[first : first + group], output[first : first + group]
        n = x.shape[0]
        grid = (triton.cdiv(n * copy_height * pitch * 8, 64), triton.cdiv(channels, 64))
        launch = Launch(copy_taps_kernel, grid, dict(
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
    geometry: Geometry, allow_tf32: bool,
) -> Iterator[Launch]:  # fmt: skip
    precision = precision_of(input.dtype, allow_tf32)
    tiles = _tiles(values.shape[1:], input.dtype, precision)
    for before, x, y, arguments in _gathered(input, output, values.shape[1:], geometry):
        yield from before
        grid = (arguments["rows"] * triton.cdiv(_positions(y, arguments), tiles.m),)
        yield Launch(forward_kernel, grid, dict(
            p_x=x, p_values=values, p_bias=bias, p_row_ptr=row_ptr, p_col=col, p_y=y, **arguments, BM=tiles.m,
            BK=tiles.k, PRECISION=precision,
        ), tiles.num_warps, tiles.num_stages)  # fmt: skip


def _input_grad_launch(
    grad: Tensor, values: Tensor, t_ptr: Tensor, t_row: Tensor, t_perm: Tensor, output: Tensor,
    geometry: Geometry, allow_tf32: bool,
) -> Launch:  # fmt: skip
    images, channels, height, width = output.shape
    outputs, channels_per_group, kh, kw = geometry.weight_shape
    side, precision = values.shape[1], precision_of(grad.dtype, allow_tf32)
    tiles = _tiles(values.shape[1:], grad.dtype, precision)
    column_blocks = geometry.groups * channels_per_group // side
    grid = (column_blocks * triton.cdiv(images * height * width, tiles.m),)
    return Launch(input_grad_kernel, grid, dict(
        p_dy=grad, p_values=values, p_t_ptr=t_ptr, p_t_row=t_row, p_t_perm=t_perm, p_dx=output, outputs=outputs,
        outputs_per_group=outputs // geometry.groups, channels=channels, channels_per_group=channels_per_group,
        column_blocks=column_blocks, positions=images * height * width, height=height, width=width,
        out_height=grad.shape[2], out_width=grad.shape[3], padding_h=geometry.padding[0],
        padding_w=geometry.padding[1], dilation_h=geometry.dilation[0], dilation_w=geometry.dilation[1],
        STRIDE_H=geometry.stride[0], STRIDE_W=geometry.stride[1], KH=kh, KW=kw, B=side, BM=tiles.m, BK=tiles.k,
        PRECISION=precision,
    ), tiles.num_warps, tiles.num_stages)  # fmt: skip


def values_grad_launches(
    grad: Tensor, input: Tensor, row_ptr: Tensor, col: Tensor, output: Tensor, geometry: Geometry, allow_tf32: bool
) -> Iterator[Launch]:
    """What :func:`sparse_conv2d_values_grad` launches, in order."""
    block, precision = output.shape[1:], precision_of(grad.dtype, allow_tf32)
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
        yield Launch(values_grad_kernel, (parts, count), dict(
            p_dy=dy, p_x=x, p_row_ptr=row_ptr, p_col=col, p_dw=output if total == 1 else sums[first:], **arguments,
            entries=n, steps=per_split, BM=tiles.m, BK=tiles.k, ROWS=triton.next_power_of_2(rows),
            PRECISION=precision,
        ), tiles.num_warps, tiles.num_stages)  # fmt: skip
        first += count
    if total != 1:
        yield sum_splits(sums, output, 256, num_warps=2)


def _check(block: tuple[int, ...], geometry: Geometry, *images: Tensor) -> None:
    dtype = images[0].dtype
    if not takes(block, geometry.weight_shape, geometry.groups, dtype):
        raise ValueError(
            f"no kernel for block {tuple(block)}, weight {tuple(geometry.weight_shape)} (of at most "
            f"{_LONGEST_KERNEL} taps each way), "
            f"{geometry.groups} groups and {dtype}"
        )
    for tensor in images:
        if not tensor.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"tensors must be channels_last, got strides {tensor.stride()} of {tuple(tensor.shape)}")


BLOCKS = [(16, 16), (32, 32), (64, 64), (128, 128), (8, 1), (16, 1), (32, 1)]
_DTYPES = [torch.float16, torch.bfloat16, torch.float32]
_LONGEST_KERNEL = 15  # taps each way: which of them are on the plane is a word of 31 bits


def takes(block: tuple[int, ...], weight_shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> bool:
    """Whether the kernels below work for this block, weight (O, C/groups, kh, kw) and element type."""
    outputs, channels = weight_shape[:2]
    divides = outputs % (groups * block[0]) == 0 and channels % block[1] == 0
    return dtype in _DTYPES and tuple(block) in BLOCKS and divides and max(weight_shape[2:]) <= _LONGEST_KERNEL


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
    geometry = Geometry(weight_shape, stride, padding, dilation, groups)
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
    geometry = Geometry(weight_shape, stride, padding, dilation, groups)
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
    geometry = Geometry(weight_shape, stride, padding, dilation, groups)
    _check(output.shape[1:], geometry, grad, input)
    for launch in values_grad_launches(grad, input, row_ptr, col, output, geometry, allow_tf32):
        launch()


def variants() -> Variants:
    """Every pattern and tile on a 3 x 3 kernel with padding; float16, stride, dilation and no padding on two of them,
    and planes of a single row or column, whose 1 is a constant to Triton.

    float16 takes the tiles of bfloat16, and no more than the type of the matrix instruction differs.
    """
    common = Geometry((256, 256, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    strided = Geometry((256, 256, 3, 3), (2, 2), (0, 0), (2, 2), 1)
    cases = [(block, dtype, tf32, common, (17, 17)) for block in BLOCKS
             for dtype, tf32 in ((torch.bfloat16, True), (torch.float32, True), (torch.float32, False))]  # fmt: skip
    cases += [(block, torch.float16, True, strided, (17, 17)) for block in ((32, 32), (16, 1))]
    cases += [(block, torch.bfloat16, True, common, plane) for block in ((16, 16), (8, 1))
              for plane in ((1, 1), (1, 9), (9, 1))]  # fmt: skip
    seen = set()
    for block, dtype, tf32, geometry, plane in cases:
        x = torch.empty(3, 256, *plane, dtype=dtype).to(memory_format=torch.channels_last)
        output_plane = plane if geometry is common else (7, 7)
        y = torch.empty(3, 256, *output_plane, dtype=dtype).to(memory_format=torch.channels_last)
        values, index = torch.empty(6, *block, dtype=dtype), torch.empty(16, dtype=torch.int32)
        for launch in (
            *_forward_launches(x, values, y[0, :, 0, 0], index, index[:6], y, geometry, tf32),
            *([_input_grad_launch(y, values, index, index, index, x, geometry, tf32)] if block[1] > 1 else []),
            *values_grad_launches(y, x, index, index[:6], values, geometry, tf32),
        ):
            kernel = launch.kernel.fn.__name__
            same = {name: value for name, value in launch.arguments.items() if not isinstance(value, Tensor)}
            key = (kernel, dtype, *same.items())
            if key not in seen:
                seen.add(key)
                name = f"sparse_conv2d {kernel} {block} {dtype} tf32={tf32} stride={geometry.stride} plane={plane}"
                product = kernel in ("forward_kernel", "input_grad_kernel", "values_grad_kernel")
                yield Variant(name, launch, product and precision_of(dtype, tf32) == "tf32")
