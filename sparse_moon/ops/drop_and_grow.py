"""``drop_and_grow``: one topology update: drop the weakest entries, grow the strongest candidates, exact in count."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_moon.ops.check_index import check_rows
from sparse_moon.ops.choice import cuda_or
from sparse_moon.ops.index import Index, entry_positions
from sparse_moon.ops.native import current_stream, native, require_cuda
from sparse_moon.ops.registry import behind, call, define, implement
from sparse_moon.ops.transpose_index import build_index
from sparse_moon.sharding import divided_like, is_sharded, whole

if TYPE_CHECKING:
    from sparse_moon.topology import Topology

Layer = tuple[Tensor, Tensor, Tensor, Tensor, int, int]
"""``(drop_score, grow_score, row_ptr, col, drop, grow)`` of one layer."""

Updated = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""``(row_ptr, col, t_ptr, t_row, t_perm, source)`` of one layer after the update."""

_MOST_POSITIONS = 2**31 - 1
_EXACT_IN_FLOAT32 = {torch.float32, torch.float16, torch.bfloat16}


@dataclass(frozen=True)
class Regrown:
    """Result of :func:`drop_and_grow`."""

    index: Index
    """New index tensors, of m = n - drop + grow entries."""
    source: Tensor
    """(m,) int32: place of each new entry among the old ones, or -1 for one that has just been grown."""

    def remap(self, old: Tensor) -> Tensor:
        """What belongs to the new entries (m, ...) of a per-entry tensor (n, ...): moved along, 0 where just grown.

        A sharded tensor, which all processes have to bring, stays divided as it is.
        """
        if is_sharded(old):
            return divided_like(self.remap(whole(old)), old)
        if old.shape[0] == 0:
            return old.new_zeros(self.source.shape[0], *old.shape[1:])
        kept = (self.source >= 0).view(-1, *[1] * (old.dim() - 1))
        return torch.where(kept, old[self.source.clamp(min=0).long()], old.new_zeros(()))


def drop_and_grow_reference(
    drop_score: Tensor, grow_score: Tensor, row_ptr: Tensor, col: Tensor, drop: int, grow: int
) -> Updated:
    """The specification, by stable sorts."""
    positions = entry_positions(row_ptr, col, grow_score.shape[1])
    survivors = positions[drop_score.sort(stable=True).indices[drop:]]
    order = grow_score.flatten().sort(descending=True, stable=True).indices
    survives = torch.zeros_like(order, dtype=torch.bool).index_fill(0, survivors, True)
    grown = order[survives[order].sort(stable=True).indices[:grow]]  # candidates come before survivors
    updated = torch.cat([survivors, grown]).sort().values

    place = torch.searchsorted(positions, updated)
    padded = torch.cat([positions, positions.new_tensor([-1])])  # past the end there is nothing to find
    source = torch.where(padded[place] == updated, place, -1)
    return *build_index(updated, (grow_score.shape[0], grow_score.shape[1])), source.int()


def _fake(drop_score: Tensor, grow_score: Tensor, row_ptr: Tensor, col: Tensor, drop: int, grow: int) -> Updated:
    t_ptr = row_ptr.new_empty(grow_score.shape[1] + 1)
    entries = [col.new_empty(col.shape[0] - drop + grow) for _ in range(4)]
    return torch.empty_like(row_ptr), entries[0], t_ptr, entries[1], entries[2], entries[3]


define("drop_and_grow(Tensor drop_score, Tensor grow_score, Tensor row_ptr, Tensor col, int drop, int grow)"
       " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", drop_and_grow_reference, _fake)  # fmt: skip


def _cpu(drop_score: Tensor, grow_score: Tensor, row_ptr: Tensor, col: Tensor, drop: int, grow: int) -> Updated:
    assert native is not None
    if drop_score.dtype != torch.float32 or grow_score.dtype != torch.float32:
        return drop_and_grow_reference(drop_score, grow_score, row_ptr, col, drop, grow)
    scores = grow_score.contiguous() if grow else grow_score  # not read otherwise
    inputs = [drop_score.contiguous(), scores, row_ptr.contiguous(), col.contiguous()]
    outputs = _fake(drop_score, grow_score, row_ptr, col, drop, grow)
    sizes = (*grow_score.shape, drop, grow)
    native.drop_and_grow(*[t.data_ptr() for t in inputs], *sizes, *[t.data_ptr() for t in outputs])
    return outputs


def _check(drop_score: Tensor, grow_score: Tensor, row_ptr: Tensor, col: Tensor, drop: int, grow: int) -> None:
    if grow_score.dim() != 2:
        raise ValueError(f"grow_score must have 2 dimensions, got shape {tuple(grow_score.shape)}")
    check_rows(row_ptr, col, grow_score.shape[1])
    _check_counts(drop_score, grow_score, col.numel(), (row_ptr.numel() - 1, grow_score.shape[1]), drop, grow)


def _check_counts(drop_score: Tensor, grow_score: Tensor, n: int, grid: tuple[int, int], drop: int, grow: int) -> None:
    if drop_score.shape != (n,) or grow_score.shape != grid:
        raise ValueError(
            f"expected scores of shape ({n},) and {grid}, got {tuple(drop_score.shape)} and {tuple(grow_score.shape)}"
        )
    if not 0 <= drop <= n:
        raise ValueError(f"drop must be in [0, {n}], got {drop}")
    room = grid[0] * grid[1] - n + drop
    if not 0 <= grow <= room:
        raise ValueError(f"grow must be in [0, {room}] after a drop of {drop}, got {grow}")


if native is not None:
    implement("drop_and_grow", "cpu", _cpu, dispatched=behind(_check, _cpu))


def drop_and_grow_layers_cuda(layers: Sequence[Layer]) -> list[Updated]:
    """Update all layers at once: about a dozen launches for up to 36 of them.

    Float64 scores, an empty grid and one of 2^31 positions or more take the reference path, layer by layer.

    Args:
        layers: ``drop_score`` (n,), ``grow_score`` (R, C), int32 ``row_ptr`` (R + 1,) and ``col`` (n,), ``drop`` in
            [0, n] and ``grow`` in [0, R C - n + drop]; all on one GPU.

    Raises:
        ValueError: a count outside its range.
    """
    for _, grow_score, _, col, drop, grow in layers:
        n, positions = col.numel(), grow_score.numel()
        if not 0 <= drop <= n or not 0 <= grow <= positions - n + drop:
            raise ValueError(f"expected to drop 0 to {n} of {positions} and to grow into what is left, "
                             f"got {drop} and {grow}")  # fmt: skip
    inputs = [_as_kernel_takes(layer) if _fits_kernel(layer) else None for layer in layers]
    results = [drop_and_grow_reference(*layer) if ours is None else _fake(*ours)
               for layer, ours in zip(layers, inputs, strict=True)]  # fmt: skip
    batch = [
        ([t.data_ptr() for t in (*layer[:4], *result)], (*layer[1].shape, layer[3].numel(), *layer[4:]))
        for layer, result in zip(inputs, results, strict=True)
        if layer is not None
    ]
    if batch:
        device = results[0][0].device
        with torch.cuda.device(device):
            workspace = torch.empty(require_cuda().drop_and_grow_workspace(batch), dtype=torch.uint8, device=device)
            require_cuda().drop_and_grow(batch, workspace.data_ptr(), current_stream())
    return results


def _fits_kernel(layer: Layer) -> bool:
    drop_score, grow_score = layer[:2]
    return {drop_score.dtype, grow_score.dtype} <= _EXACT_IN_FLOAT32 and 0 < grow_score.numel() <= _MOST_POSITIONS


def _as_kernel_takes(layer: Layer) -> Layer:
    drop_score, grow_score, row_ptr, col, drop, grow = layer
    if grow:  # not read otherwise
        grow_score = grow_score.float().contiguous()
    return drop_score.float().contiguous(), grow_score, row_ptr.contiguous(), col.contiguous(), drop, grow


def _cuda(drop_score: Tensor, grow_score: Tensor, row_ptr: Tensor, col: Tensor, drop: int, grow: int) -> Updated:
    return drop_and_grow_layers_cuda([(drop_score, grow_score, row_ptr, col, drop, grow)])[0]


_cuda_or_reference = cuda_or(drop_and_grow_reference, _cuda)
implement("drop_and_grow", "cuda", _cuda_or_reference, dispatched=behind(_check, _cuda_or_reference))


def drop_and_grow(
    drop_score: Tensor, grow_score: Tensor | None, topology: "Topology", drop: int, grow: int | None = None
) -> Regrown:
    """Drop the ``drop`` lowest ``drop_score`` entries, then grow the ``grow`` highest ``grow_score`` positions.

    Candidates for growth are all positions that are inactive after the drop, so one that was just dropped may return
    and then counts as moved, not grown (RigL, Evci et al. 2020, Algorithm 1). Ties go to the lowest index.

    Args:
        drop_score: (n,) one score an existing block.
        grow_score: (rows / bh, cols / bw) one score a block of the grid, above -inf; None where nothing grows.
        topology: the present topology; not changed.
        drop: how many go, in [0, n].
        grow: how many come, at most as many as there is room for after the drop; by default ``drop``.

    Raises:
        ValueError: shapes that do not fit, a count outside its range, or growth without a score.
    """
    n, grid = topology.num_blocks, topology.grid
    grow = drop if grow is None else grow
    if grow_score is None:
        if grow:
            raise ValueError(f"to grow {grow} blocks a grow_score is needed, got None")
        grow_score = drop_score.new_zeros(()).expand(grid)
    _check_counts(drop_score, grow_score, n, grid, drop, grow)
    *index, source = call("drop_and_grow", drop_score, grow_score, topology.row_ptr, topology.col, drop, grow)
    return Regrown((index[0], index[1], index[2], index[3], index[4]), source)
