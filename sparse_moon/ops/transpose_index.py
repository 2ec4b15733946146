"""``transpose_index``: the column-ordered index of block-compressed rows, for products with the transposed matrix."""

import torch
from torch import Tensor

from sparse_moon.ops.check_index import check_rows
from sparse_moon.ops.choice import cuda_or
from sparse_moon.ops.index import Index, entry_rows
from sparse_moon.ops.native import current_stream, native, require_cuda
from sparse_moon.ops.registry import behind, call, define, implement

_MOST_POSITIONS = 2**31 - 1


def transpose_index_reference(row_ptr: Tensor, col: Tensor, grid_cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(t_ptr, t_row, t_perm)`` by a stable sort of the columns; see :class:`sparse_moon.topology.Topology`."""
    order = col.sort(stable=True).indices
    t_ptr = torch.zeros(grid_cols + 1, dtype=torch.int64, device=col.device)
    t_ptr[1:] = torch.bincount(col, minlength=grid_cols).cumsum(0)
    return t_ptr.int(), entry_rows(row_ptr, col.numel())[order].int(), order.int()


def _fake(row_ptr: Tensor, col: Tensor, grid_cols: int) -> tuple[Tensor, Tensor, Tensor]:
    return col.new_empty(grid_cols + 1), torch.empty_like(col), torch.empty_like(col)


define("transpose_index(Tensor row_ptr, Tensor col, int grid_cols) -> (Tensor, Tensor, Tensor)",
       transpose_index_reference, _fake)  # fmt: skip


def _cpu(row_ptr: Tensor, col: Tensor, grid_cols: int) -> tuple[Tensor, Tensor, Tensor]:
    assert native is not None
    row_ptr, col = row_ptr.contiguous(), col.contiguous()
    t_ptr, t_row, t_perm = _fake(row_ptr, col, grid_cols)
    native.transpose_index(
        row_ptr.data_ptr(), col.data_ptr(), row_ptr.numel() - 1, grid_cols,
        t_ptr.data_ptr(), t_row.data_ptr(), t_perm.data_ptr(),
    )  # fmt: skip
    return t_ptr, t_row, t_perm


if native is not None:
    implement("transpose_index", "cpu", _cpu, dispatched=behind(check_rows, _cpu))


def _cuda(row_ptr: Tensor, col: Tensor, grid_cols: int) -> tuple[Tensor, Tensor, Tensor]:
    if not 0 < (row_ptr.numel() - 1) * grid_cols <= _MOST_POSITIONS:
        return transpose_index_reference(row_ptr, col, grid_cols)
    row_ptr, col = row_ptr.contiguous(), col.contiguous()
    outputs = _fake(row_ptr, col, grid_cols)
    matrices = [([t.data_ptr() for t in (row_ptr, col, *outputs)], (row_ptr.numel() - 1, grid_cols))]
    with torch.cuda.device(col.device):
        size = require_cuda().transpose_index_workspace(matrices)
        workspace = torch.empty(size, dtype=torch.uint8, device=col.device)
        require_cuda().transpose_index(matrices, workspace.data_ptr(), current_stream())
    return outputs


_cuda_or_reference = cuda_or(transpose_index_reference, _cuda)
implement("transpose_index", "cuda", _cuda_or_reference, dispatched=behind(check_rows, _cuda_or_reference))


def transpose_index(row_ptr: Tensor, col: Tensor, grid_cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(t_ptr, t_row, t_perm)``, int32, of block-compressed rows; see :class:`sparse_moon.topology.Topology`."""
    return call("transpose_index", row_ptr, col, grid_cols)


def build_index(positions: Tensor, grid: tuple[int, int]) -> Index:
    """All index tensors (int32) of ascending int64 grid ``positions``."""
    row = torch.div(positions, grid[1], rounding_mode="floor")
    row_ptr = positions.new_zeros(grid[0] + 1)
    row_ptr[1:] = torch.bincount(row, minlength=grid[0]).cumsum(0)
    col = positions - row * grid[1]
    row_ptr, col = row_ptr.int(), col.int()
    return row_ptr, col, *transpose_index(row_ptr, col, grid[1])
