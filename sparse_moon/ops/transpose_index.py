"""``transpose_index``: the column-ordered index of block-compressed rows, for products with the transposed matrix."""

import torch
from torch import Tensor

from sparse_moon.ops.check_index import check_rows
from sparse_moon.ops.index import entry_rows
from sparse_moon.ops.library import behind, define, implement
from sparse_moon.ops.native import native


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
