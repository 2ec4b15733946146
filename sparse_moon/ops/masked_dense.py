"""``scatter_values`` and ``gather_values``: compact values to a dense weight and back, for masked dense products."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_moon.ops.check_index import check_rows
from sparse_moon.ops.index import (
    block_grid,
    block_of,
    blocks_to_matrix,
    check_block,
    check_entries,
    check_values,
    entry_positions,
    matrix_shape,
    matrix_to_blocks,
    matrix_to_weight,
    values_shape,
    weight_to_matrix,
)
from sparse_moon.ops.native import has_triton, native
from sparse_moon.ops.registry import behind, call, define, implement

# What GPU kernels take.
GPU_DTYPES = {torch.float32, torch.float16, torch.bfloat16}


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def scatter_values_reference(
    values: Tensor, weight_shape: list[int], channels_last: bool, row_ptr: Tensor, col: Tensor
) -> Tensor:
    """The specification: a dense weight (O, I) or (O, C, kh, kw), zero where no value has its place."""
    bw = block_of(values)[1]
    grid = (row_ptr.numel() - 1, math.prod(weight_shape[1:]) // bw)
    matrix = blocks_to_matrix(values, entry_positions(row_ptr, col, grid[1]), grid)
    return matrix_to_weight(matrix, tuple(weight_shape), bw).contiguous(memory_format=_layout(channels_last))


def gather_values_reference(weight: Tensor, block: Sequence[int], row_ptr: Tensor, col: Tensor) -> Tensor:
    """The specification: compact values of a dense weight (O, I) or (O, C, kh, kw)."""
    matrix = weight_to_matrix(weight, block[1])
    positions = entry_positions(row_ptr, col, matrix.shape[1] // block[1])
    return matrix_to_blocks(matrix, positions, (block[0], block[1])).contiguous()


def _fake_scatter(values: Tensor, weight_shape: list[int], channels_last: bool, row_ptr: Tensor, col: Tensor) -> Tensor:
    layout = _layout(channels_last)
    return torch.empty(weight_shape, dtype=values.dtype, device=values.device, memory_format=layout)


def _fake_gather(weight: Tensor, block: list[int], row_ptr: Tensor, col: Tensor) -> Tensor:
    return weight.new_empty(values_shape(col, block))


define("scatter_values(Tensor values, int[] weight_shape, bool channels_last, Tensor row_ptr, Tensor col) -> Tensor",
       scatter_values_reference, _fake_scatter)  # fmt: skip
define("gather_values(Tensor weight, int[] block, Tensor row_ptr, Tensor col) -> Tensor",
       gather_values_reference, _fake_gather)  # fmt: skip


def places_in(weight: Tensor, block: tuple[int, int], row_ptr: Tensor, col: Tensor) -> tuple[int, ...]:
    """Where the entries lie in a contiguous or channels_last weight, as the extension takes it."""
    channels, taps = weight.shape[1], math.prod(weight.shape[2:])
    strides = (taps, 1) if weight.is_contiguous() else (1, channels)
    return (row_ptr.numel() - 1, *block, channels * taps, taps, *strides, row_ptr.data_ptr(), col.data_ptr(),
            torch.get_num_threads())  # fmt: skip


def _scatter_cpu(values: Tensor, weight_shape: list[int], channels_last: bool, row_ptr: Tensor, col: Tensor) -> Tensor:
    assert native is not None
    check_entries(values, col)
    values, row_ptr, col = values.contiguous(), row_ptr.contiguous(), col.contiguous()
    weight = _fake_scatter(values, weight_shape, channels_last, row_ptr, col)
    places = places_in(weight, block_of(values), row_ptr, col)
    native.scatter_values(places, values.element_size(), values.data_ptr(), weight.data_ptr())
    return weight


def _gather_cpu(weight: Tensor, block: list[int], row_ptr: Tensor, col: Tensor) -> Tensor:
    assert native is not None
    row_ptr, col = row_ptr.contiguous(), col.contiguous()
    weight = weight.contiguous(memory_format=_packed(weight))
    values = _fake_gather(weight, block, row_ptr, col)
    places = places_in(weight, (block[0], block[1]), row_ptr, col)
    native.gather_values(places, values.element_size(), weight.data_ptr(), values.data_ptr())
    return values


def _packed(weight: Tensor) -> torch.memory_format:
    """The layout without gaps that costs no copy where there is one."""
    return _layout(weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last))


def _check_places(weight_shape: Sequence[int], block: Sequence[int], row_ptr: Tensor, col: Tensor) -> None:
    check_block(block)
    if len(weight_shape) not in (2, 4) or min(weight_shape[:2]) < 0 or min(weight_shape[2:], default=1) < 1:
        raise ValueError(f"a weight is (O, I) or (O, C, kh, kw) with taps, got shape {tuple(weight_shape)}")
    block_grid((weight_shape[0], weight_shape[1]), (block[0], block[1]))
    rows, cols = block_grid(matrix_shape(tuple(weight_shape)), (block[0], block[1]))
    if row_ptr.numel() != rows + 1:
        raise ValueError(f"the index has {row_ptr.numel() - 1} block rows, the weight {rows}")
    check_rows(row_ptr, col, cols)


def _check_scatter(values: Tensor, weight_shape: list[int], channels_last: bool, row_ptr: Tensor, col: Tensor) -> None:
    check_values(values)
    _check_places(weight_shape, block_of(values), row_ptr, col)


def _check_gather(weight: Tensor, block: list[int], row_ptr: Tensor, col: Tensor) -> None:
    _check_places(weight.shape, block, row_ptr, col)


if native is not None:
    implement("scatter_values", "cpu", _scatter_cpu, dispatched=behind(_check_scatter, _scatter_cpu))
    implement("gather_values", "cpu", _gather_cpu, dispatched=behind(_check_gather, _gather_cpu))


def scatter_values_cuda(
    values: Tensor, weight_shape: list[int], channels_last: bool, row_ptr: Tensor, col: Tensor
) -> Tensor:
    """One launch, where Triton is there and moves the dtype."""
    check_entries(values, col)
    if values.dtype not in GPU_DTYPES or not has_triton():
        return scatter_values_reference(values, weight_shape, channels_last, row_ptr, col)
    from sparse_moon.kernels import masked_dense

    weight = _fake_scatter(values, weight_shape, channels_last, row_ptr, col)
    masked_dense.scatter(values.contiguous(), row_ptr, col, weight)
    return weight


def gather_values_cuda(weight: Tensor, block: list[int], row_ptr: Tensor, col: Tensor) -> Tensor:
    """One launch, where Triton is there and moves the dtype."""
    if weight.dtype not in GPU_DTYPES or not has_triton():
        return gather_values_reference(weight, block, row_ptr, col)
    from sparse_moon.kernels import masked_dense

    values = _fake_gather(weight, block, row_ptr, col)
    masked_dense.gather(weight.contiguous(memory_format=_packed(weight)), row_ptr, col, values)
    return values


implement("scatter_values", "cuda", scatter_values_cuda, dispatched=behind(_check_scatter, scatter_values_cuda))
implement("gather_values", "cuda", gather_values_cuda, dispatched=behind(_check_gather, gather_values_cuda))


def scatter_values(
    values: Tensor, weight_shape: Sequence[int], row_ptr: Tensor, col: Tensor, *, channels_last: bool = False
) -> Tensor:
    """A dense weight of this shape, zero where no value has its place."""
    return call("scatter_values", values, weight_shape, channels_last, row_ptr, col)


def gather_values(weight: Tensor, block: Sequence[int], row_ptr: Tensor, col: Tensor) -> Tensor:
    """Compact values of a dense weight."""
    return call("gather_values", weight, block, row_ptr, col)
