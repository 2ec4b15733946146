"""What a product with a sparse weight knows before it sees an input."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_moon.ops import choice
from sparse_moon.ops.index import Index, values_shape

_MOST_SHAPES = 64


class Geometry(NamedTuple):
    """What a convolution needs to know besides its operands."""

    weight_shape: tuple[int, ...]
    """(O, C/groups, kh, kw)."""
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(
        cls,
        weight_shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> "Geometry":
        """From any sequences, such as the lists of the dispatcher."""
        return cls(tuple(weight_shape), tuple(stride), tuple(padding), tuple(dilation), groups)

    def output_size(self, input_shape: Sequence[int]) -> tuple[int, int]:
        """Height and width of the output plane."""
        h, w = (
            (size + 2 * self.padding[i] - self.dilation[i] * (self.weight_shape[2 + i] - 1) - 1) // self.stride[i] + 1
            for i, size in enumerate(input_shape[2:])
        )
        return h, w


class Plan:
    """A sparse weight without its values, and what implementations have made ready for products with it.

    A layer keeps its plan as long as its index stays as it is.

    Attributes:
        index: (row_ptr, col, t_ptr, t_row, t_perm), see :class:`sparse_moon.topology.Topology`.
        block: shape of a block.
        grid: number of block rows and columns.
        shape: (rows, cols) of the matrix, in elements.
        density: share of blocks that exist.
        values_shape, bias_shape: of compact values and of a bias.
        device: where the index lies.
        geometry: of a convolution; None for a linear product.
        ready: what implementations keep here for calls to come, each under a key of its own.
        inputs: shapes of inputs that were found to fit.
        decisions: what runs a pass on operands of one shape, by pass and shape, and the generation of choices then.
        state: addresses and versions of the index tensors; None while it is traced.
    """

    def __init__(
        self, index: Index, block: tuple[int, int], geometry: Geometry | None = None, state: object = None
    ) -> None:
        self.index, self.block, self.geometry, self.state = index, block, geometry, state
        self.grid = index[0].numel() - 1, index[2].numel() - 1
        self.shape = self.grid[0] * block[0], self.grid[1] * block[1]
        self.density = index[1].numel() / max(self.grid[0] * self.grid[1], 1)
        self.values_shape = values_shape(index[1], block)
        self.bias_shape = self.shape[:1]
        self.device = index[1].device
        self.ready: dict[Any, Any] = {}
        self.inputs: set[tuple[int, ...]] = set()
        self.decisions: dict[Any, Any] = {}

    def __deepcopy__(self, memo: object) -> None:
        return None  # a copy's index lies elsewhere

    def __reduce__(self) -> tuple[object, ...]:
        return type(None), ()

    def note_input(self, shape: tuple[int, ...]) -> None:
        """Note that inputs of this shape fit; the last few are remembered."""
        if self.state is not None:
            if len(self.inputs) >= _MOST_SHAPES:
                self.inputs.clear()
            self.inputs.add(shape)

    def decided(self, key: Any) -> Any:
        """What was decided before under this key, if it still holds; else None."""
        found = self.decisions.get(key)
        if found is not None and found[1] == choice.generation and not choice.open_blocks():
            return found[0]
        return None

    def note_decision(self, key: Any, decision: Any) -> None:
        """Keep what was decided for a pass, if it may be kept; the last few are remembered."""
        if self.state is not None and choice.is_settled():
            if len(self.decisions) >= 4 * _MOST_SHAPES:
                self.decisions.clear()
            self.decisions[key] = decision, choice.generation

    def is_of(self, buffers: Mapping[str, Tensor | None]) -> bool:
        """Whether the plan is of the index in these buffers of a topology, as it is now."""
        a, b, c, d, e = index = self.index
        return (
            buffers["row_ptr"] is a
            and buffers["col"] is b
            and buffers["t_ptr"] is c
            and buffers["t_row"] is d
            and buffers["t_perm"] is e
            and self.state == index_state(index)
        )

    def check_unchanged(self) -> None:
        """Raise ``RuntimeError`` where the index has been written to since the plan was made.

        For backward passes, as autograd does it for the tensors that it saves.
        """
        if self.state is not None and self.state != index_state(self.index):
            raise RuntimeError(
                "the index of a sparse layer has been modified by an inplace operation, a topology update or a load, "
                "since this graph was made: it has no gradient any more"
            )


def geometry_of(plan: Plan) -> Geometry:
    """The plan's convolution."""
    assert plan.geometry is not None
    return plan.geometry


def index_state(index: Index) -> tuple[object, ...]:
    """Where the tensors of an index lie and how often they were written to."""
    a, b, c, d, e = index  # in every pass, where a function more would be noticed
    try:
        return (
            a.data_ptr(), b.data_ptr(), c.data_ptr(), d.data_ptr(), e.data_ptr(),
            a._version, b._version, c._version, d._version, e._version,
        )  # fmt: skip
    except RuntimeError:
        return (*[t.data_ptr() for t in index], *versions(index))


def versions(tensors: Sequence[Tensor]) -> tuple[object, ...]:
    """Writes in place to each; of tensors of inference mode, which do not count them, something new each time."""
    return tuple([object() if t.is_inference() else t._version for t in tensors])


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor has memory of its own to look at: neither traced, nor wrapped, nor on meta."""
    return type(tensor) is Tensor and tensor.device.type != "meta" and not torch.compiler.is_compiling()
