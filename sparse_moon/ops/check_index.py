"""``check_index``: whether an index is one, and a fingerprint of the set of entries that it lists.

Kernels read memory at the places that an index names, so none may see one that other code has averaged, copied over or
never written.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_moon.ops.index import Index, entry_positions
from sparse_moon.ops.native import native
from sparse_moon.ops.plan import index_state
from sparse_moon.ops.registry import behind, call, define, implement

FAULTS = (
    "",
    "the row pointers do not ascend from 0 to the number of entries",
    "the columns do not ascend within their row and range",
    "the transpose index is that of other entries",
)
_ATTRIBUTE = "_sparse_moon_checked"


def _mixed(position: Tensor) -> Tensor:
    """A number of 64 bits for each position, as ``csrc/cpu/check_index.cpp`` makes it; products wrap around."""
    x = (position + 1) * -0x61C8864680B583EB
    x = (x ^ (x >> 29)) * -0x40A7B892E31B1A47
    return x ^ (x >> 32)


def _is_pointer(ptr: Tensor, n: int) -> Tensor:
    return (ptr[0] == 0) & (ptr[-1] == n) & (ptr.diff() >= 0).all()


def check_index_reference(row_ptr: Tensor, col: Tensor, t_ptr: Tensor, t_row: Tensor, t_perm: Tensor) -> Tensor:
    """The specification: ``(number of the fault in FAULTS, fingerprint)``, int64; waits for no device.

    The fingerprint is a sum over all entries, so it does not depend on their order.
    """
    n, rows, cols = col.numel(), row_ptr.numel() - 1, t_ptr.numel() - 1
    entries = torch.arange(n, dtype=torch.int32, device=col.device)
    row = (torch.searchsorted(row_ptr, entries, right=True) - 1).clamp(0, max(rows - 1, 0))
    position = row * cols + col
    columns = ((col >= 0) & (col < cols)).all() & (position.diff() > 0).all()
    t_col = torch.searchsorted(t_ptr, entries, right=True) - 1
    perm = t_perm.long().clamp(0, max(n - 1, 0))
    transposed = _is_pointer(t_ptr, n) & ((t_col * rows + t_row).diff() > 0).all()
    transposed = transposed & ((t_perm == perm) & (col[perm] == t_col) & (row[perm] == t_row)).all()
    faults = torch.where(_is_pointer(row_ptr, n), torch.where(columns, torch.where(transposed, 0, 3), 2), 1)
    return torch.stack([faults, torch.where(faults == 0, _mixed(position).sum(), 0)])


def _fake(row_ptr: Tensor, col: Tensor, t_ptr: Tensor, t_row: Tensor, t_perm: Tensor) -> Tensor:
    return col.new_empty(2, dtype=torch.int64)


define("check_index(Tensor row_ptr, Tensor col, Tensor t_ptr, Tensor t_row, Tensor t_perm) -> Tensor",
       check_index_reference, _fake)  # fmt: skip


def _cpu(*index: Tensor) -> Tensor:
    assert native is not None
    row_ptr, col, t_ptr, *_ = index = tuple(t.contiguous() for t in index)
    sizes = (row_ptr.numel() - 1, t_ptr.numel() - 1, col.numel())
    return torch.tensor(native.check_index(*(t.data_ptr() for t in index), *sizes), device="cpu")


def _check_form(*index: Tensor) -> None:
    fault = index_form(index)
    if fault:
        raise ValueError(fault)


if native is not None:
    implement("check_index", "cpu", _cpu, dispatched=behind(_check_form, _cpu))


def check_rows(row_ptr: Tensor, col: Tensor, grid_cols: int) -> None:
    """Raise ``ValueError`` unless these are block-compressed rows of so many block columns.

    Off the CPU only their form is looked at: their numbers would have to be waited for.
    """
    _check_form(row_ptr, col, row_ptr, col, col)
    if not col.is_cpu:
        return
    if not _is_pointer(row_ptr, col.numel()):
        fault = FAULTS[1]
    elif col.numel() and not (
        col.min() >= 0 and col.max() < grid_cols and (entry_positions(row_ptr, col, grid_cols).diff() > 0).all()
    ):
        fault = FAULTS[2]
    else:
        return
    raise ValueError(f"the index is damaged: {fault}")


def index_form(index: tuple[Tensor, ...]) -> str:
    """What is wrong with the tensors of an index, apart from their numbers; empty if nothing is."""
    row_ptr, col, t_ptr, t_row, t_perm = index
    if {t.dtype for t in index} != {torch.int32} or {t.dim() for t in index} != {1}:
        return f"index tensors must be int32 with one dimension, got {[(t.dtype, tuple(t.shape)) for t in index]}"
    if not all(t.is_contiguous() for t in index):  # of which kernels on a GPU get addresses alone
        return f"index tensors must be contiguous, got strides {[t.stride() for t in index]}"
    if len({t.device for t in index}) > 1:
        return f"index tensors must be on one device, got {[str(t.device) for t in index]}"
    if not col.numel() == t_row.numel() == t_perm.numel() or min(row_ptr.numel(), t_ptr.numel()) < 1:
        return f"index tensors have sizes that do not belong together: {[t.numel() for t in index]}"
    return ""


def guarded(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel behind a check of its last five arguments, an index: once for each state of these tensors.

    For calls through the dispatcher: from compiled graphs and from other code. The package's own calls in eager
    execution bring the index of a :class:`sparse_moon.topology.Topology`, which checks itself.
    """

    def run(*inputs: Any) -> Any:
        row_ptr, col, t_ptr, t_row, t_perm = index = inputs[-5:]
        others, now = (row_ptr, t_ptr, t_row, t_perm), index_state(index)
        seen = getattr(col, _ATTRIBUTE, None)
        if seen is None or seen[1] != now or any(a is not b for a, b in zip(seen[0], others, strict=True)):
            fault = index_form(index) or FAULTS[int(call("check_index", *index)[0])]
            if fault:
                raise ValueError(f"the index is damaged: {fault}")
            _note(index)
        return kernel(*inputs)

    return run


def _note(index: Index) -> None:
    """Remember that this state of an index was found right."""
    row_ptr, col, t_ptr, t_row, t_perm = index
    setattr(col, _ATTRIBUTE, ((row_ptr, t_ptr, t_row, t_perm), index_state(index)))


def check_index(index: Index) -> tuple[str, int]:
    """What is wrong with an index, empty if nothing is, and the fingerprint of its entries. Waits for the device."""
    fault = index_form(index)
    if fault:
        return fault, 0
    if any(map(torch._C._functorch.is_batchedtensor, index)):
        raise ValueError(
            "a topology cannot be batched by vmap, only values can, of models that share it: leave the buffers of "
            "stack_module_state out of the call"
        )
    with torch.no_grad():
        number, fingerprint = call("check_index", *index).tolist()
    if number == 0 and hasattr(index[1], _ATTRIBUTE):
        _note(index)  # else the next compiled step would look again, which it cannot while it is captured
    return FAULTS[number], fingerprint
