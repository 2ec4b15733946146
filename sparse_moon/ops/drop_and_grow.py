"""``drop_and_grow``: one topology update: drop the weakest entries, grow the strongest candidates, exact in count."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_moon.ops.library import LIBRARY, define
from sparse_moon.ops.native import native
from sparse_moon.topology import Index, Topology, build_index, entry_positions


@dataclass(frozen=True)
class Regrown:
    """Result of :func:`drop_and_grow`."""

    index: Index
    """New index tensors, with as many entries as before."""
    source: Tensor
    """(n,) int32: place of each new entry among the old ones, or -1 for one that has just been grown."""

    def remap(self, old: Tensor) -> Tensor:
        """What belongs to the new entries of a per-entry tensor (n, ...): moved along, 0 where just grown."""
        kept = (self.source >= 0).view(-1, *[1] * (old.dim() - 1))
        return torch.where(kept, old[self.source.clamp(min=0).long()], old.new_zeros(()))


def drop_and_grow_reference(
    drop_score: Tensor, grow_score: Tensor, row_ptr: Tensor, col: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The specification, by stable sorts."""
    positions = entry_positions(row_ptr, col, grow_score.shape[1])
    survivors = positions[drop_score.sort(stable=True).indices[count:]]
    candidates = grow_score.flatten().index_fill(0, survivors, -torch.inf)
    grown = candidates.sort(descending=True, stable=True).indices[:count]
    updated = torch.cat([survivors, grown]).sort().values

    place = torch.searchsorted(positions, updated).clamp(max=max(positions.numel() - 1, 0))
    source = torch.where(positions[place] == updated, place, -1)
    return *build_index(updated, (grow_score.shape[0], grow_score.shape[1])), source.int()


def _fake(
    drop_score: Tensor, grow_score: Tensor, row_ptr: Tensor, col: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    t_ptr = row_ptr.new_empty(grow_score.shape[1] + 1)
    entries = [torch.empty_like(col) for _ in range(4)]
    return torch.empty_like(row_ptr), entries[0], t_ptr, entries[1], entries[2], entries[3]


define("drop_and_grow(Tensor drop_score, Tensor grow_score, Tensor row_ptr, Tensor col, int count)"
       " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", drop_and_grow_reference, _fake)  # fmt: skip


def _cpu(
    drop_score: Tensor, grow_score: Tensor, row_ptr: Tensor, col: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    assert native is not None
    if drop_score.dtype != torch.float32 or grow_score.dtype != torch.float32:
        return drop_and_grow_reference(drop_score, grow_score, row_ptr, col, count)
    inputs = [t.contiguous() for t in (drop_score, grow_score, row_ptr, col)]
    outputs = _fake(drop_score, grow_score, row_ptr, col, count)
    native.drop_and_grow(*[t.data_ptr() for t in inputs], *grow_score.shape, count, *[t.data_ptr() for t in outputs])
    return outputs


if native is not None:
    LIBRARY.impl("drop_and_grow", _cpu, "CPU")


def drop_and_grow(drop_score: Tensor, grow_score: Tensor, topology: Topology, count: int) -> Regrown:
    """Drop the ``count`` lowest ``drop_score`` entries, then grow the ``count`` highest ``grow_score`` positions.

    Candidates for growth are all positions that are inactive after the drop, so one that was just dropped may return
    and then counts as moved, not grown (RigL, Evci et al. 2020, Algorithm 1). Ties go to the lowest index.

    Args:
        drop_score: (n,) one score an existing block.
        grow_score: (rows / bh, cols / bw) one score a block of the grid; above -inf.
        topology: the present topology; not changed.
        count: how many to exchange, in [0, n].

    Raises:
        ValueError: shapes that do not fit, or a count outside its range.
    """
    if drop_score.shape != (topology.num_blocks,) or grow_score.shape != topology.grid:
        raise ValueError(
            f"expected scores of shape ({topology.num_blocks},) and {topology.grid}, "
            f"got {tuple(drop_score.shape)} and {tuple(grow_score.shape)}"
        )
    if not 0 <= count <= topology.num_blocks:
        raise ValueError(f"count must be in [0, {topology.num_blocks}], got {count}")
    *index, source = torch.ops.sparse_moon.drop_and_grow(drop_score, grow_score, topology.row_ptr, topology.col, count)
    return Regrown((index[0], index[1], index[2], index[3], index[4]), source)
