"""Whether other code has averaged a layer's values with those of a model whose topology has moved on.

Averages by hand (``teacher.lerp_(student)`` over parameters) go slot by slot, and once the student's topology has moved
its slots hold other weights. Then a slot of the teacher goes with what is now in the student's slot, which is a weight
of another place and has nothing to do with it otherwise. That is what is looked for: a correlation of what is new in
the teacher's values with the student's, over slots that belong to places far apart.

Only layers that once had the same topology come into question (copies, and what was loaded from one another), and only
once one of them has moved; a layer that moves itself is not looked at.
"""

import math
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from sparse_moon.ops.index import entry_rows
from sparse_moon.sharding import is_sharded
from sparse_moon.topology import Topology

if TYPE_CHECKING:
    from sparse_moon.nn.sparse_layer import SparseLayer

_MOST_SLOTS = 4096
_LEAST_SLOTS = 32
_SIGNIFICANT = 6.0  # standard deviations
_FAR = 8  # places, and twice the taps of a convolution: weights next to each other may be alike

_layers: "weakref.WeakSet[SparseLayer]" = weakref.WeakSet()


class _Moved(NamedTuple):
    """A layer that has left this one's topology, and what each look at both needs: a look is taken in every pass."""

    layer: "weakref.ref[SparseLayer]"
    slots: Tensor
    """Those that now belong to places far apart."""
    rows: Tensor
    """Of this layer's weight, of each slot: numbered without gaps."""
    counts: Tensor
    """Slots of each of these rows."""
    start: Tensor | None
    """This layer's values there, apart from their rows, when they were its own for certain; of length 1."""

    def apart_from_rows(self, values: Tensor) -> Tensor:
        """Those of the slots, less the mean of their row: weights of one output may have a sign in common."""
        return _apart(values.double()[self.slots], self.rows, self.counts)


class Watch:
    """What a layer knows of others that once had its topology."""

    def __init__(self, layer: "SparseLayer") -> None:
        _layers.add(layer)
        self.start: Tensor | None = None  # values at the last moment at which they were the layer's own for certain
        self.quiet: int | None = Topology.moves
        """So many moves of topologies leave nothing to look at; None where there is something in any case."""
        self._moves = Topology.moves
        self._moved: list[_Moved] = []
        self._looks = 0

    def __deepcopy__(self, memo: object) -> None:
        return None  # a copy watches for itself

    def __reduce__(self) -> tuple[object, ...]:
        return type(None), ()

    def note(self, layer: "SparseLayer") -> None:
        """The present values are the layer's own."""
        there = layer.values.device.type != "meta" and not is_sharded(layer.values)
        self.start = _first_of_blocks(layer.values)[:_MOST_SLOTS].clone() if there else None
        self.quiet, self._moves, self._moved = None, -1, []

    def has_followed(self, layer: "SparseLayer") -> bool:
        """Whether the values have been averaged with those of a layer that has left this one's topology."""
        if layer.values.is_cuda and (torch.cuda.is_current_stream_capturing() or torch.cuda.get_sync_debug_mode()):
            return False  # a look waits for the device, which is forbidden or looked for now
        if self._moves != Topology.moves:
            was_left = layer.topology.fingerprint in Topology.left  # else no layer is worth looking for
            self._moved = list(_those_that_moved(layer, self.start)) if was_left else []
            self._moves = Topology.moves
            self.quiet = None if self._moved else self._moves
        if not self._moved or type(layer.values) is not nn.Parameter:
            return False
        self._looks += 1
        if layer.values.is_cuda and self._looks % 16 != 1:
            return False
        values = _first_of_blocks(layer.values)[:_MOST_SLOTS]
        for moved in self._moved:
            other = moved.layer()
            if other is not None and other.values.shape == layer.values.shape and not is_sharded(other.values):
                theirs = _first_of_blocks(other.values)[:_MOST_SLOTS]
                if _goes_with(values, theirs, moved):
                    return True
        return False


def _first_of_blocks(values: Tensor) -> Tensor:
    return values.detach().flatten(1)[:, 0] if values.dim() > 1 else values.detach()


def _those_that_moved(layer: "SparseLayer", start: Tensor | None) -> Iterator[_Moved]:
    topology = layer.topology
    far = max(_FAR, 2 * math.prod(layer.weight_shape[2:]))
    for other in list(_layers):
        theirs = other.topology
        if (
            topology.fingerprint in theirs.past
            and topology.fingerprint != theirs.fingerprint
            and other.values.shape == layer.values.shape
            and (theirs.shape, theirs.block, theirs.col.device) == (topology.shape, topology.block, topology.col.device)
        ):
            apart = (topology.positions()[:_MOST_SLOTS] - theirs.positions()[:_MOST_SLOTS]).abs() > far
            slots = apart.nonzero().flatten()
            rows = entry_rows(topology.row_ptr, topology.num_blocks)[slots]
            _, rows, counts = rows.unique(return_inverse=True, return_counts=True)
            before = None
            if start is not None and start.shape == _first_of_blocks(layer.values)[:_MOST_SLOTS].shape:
                before = _apart(start.double()[slots], rows, counts)
                before = before / before.norm().clamp(min=1e-150)
            yield _Moved(weakref.ref(other), slots, rows, counts, before)


def _apart(values: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    sums = values.new_zeros(counts.shape).index_add_(0, rows, values)
    return values - (sums / counts)[rows]


def _goes_with(values: Tensor, theirs: Tensor, moved: _Moved) -> bool:
    """Whether ``values``, but for what they were at the start, go with ``theirs`` over the slots."""
    count = moved.slots.numel() - moved.counts.numel()
    if count < _LEAST_SLOTS:
        return False
    new, other = moved.apart_from_rows(values), moved.apart_from_rows(theirs)
    if moved.start is not None:
        new = new - moved.start * (new @ moved.start)
    length, size, along = (float(t) for t in (new.norm(), other.norm(), new @ other))
    if not length * size > 0 or length < 1e-6 * float(values.double().norm()):
        return False
    return along / (length * size) * math.sqrt(count) > _SIGNIFICANT
