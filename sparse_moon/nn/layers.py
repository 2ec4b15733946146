"""Drop-in sparse layers; and, by the same names, what is done with whole models of them."""

import copy
import math
from collections.abc import Callable
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_moon import ops
from sparse_moon.allocation import check_sparsity
from sparse_moon.nn.averages import Watch
from sparse_moon.nn.guards import Anchor, ReadOnlyWeight, resize
from sparse_moon.ops.library import transformed
from sparse_moon.topology import (
    Index,
    Selection,
    Topology,
    block_grid,
    block_shape,
    matrix_shape,
    matrix_to_weight,
    pattern_name,
    topology_of,
    weight_to_matrix,
)

Pattern = str | tuple[int, int]
Exclude = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Size2d = int | tuple[int, int]


class SparseLayer(nn.Module):
    """What :class:`SparseLinear` and :class:`SparseConv2d` share: compact ``values`` on a ``topology``.

    Attributes:
        values: the only weight parameter: (n,) numbers, or (n, bh, bw) blocks, in row order of the topology.
        topology: which weights exist.
        bias: (out,) or None.
    """

    values: nn.Parameter
    topology: Topology
    bias: nn.Parameter | None
    weight_shape: tuple[int, ...]
    _watch: Watch | None = None

    def _init_sparse(
        self, dense: nn.Linear | nn.Conv2d, topology: Topology, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        self.weight_shape = tuple(dense.weight.shape)
        self.topology = topology.to(device)
        device = self.topology.col.device
        self.values = nn.Parameter(torch.empty(self.topology.values_shape, device=device, dtype=dtype))
        bias = None
        if dense.bias is not None:
            bias = nn.Parameter(torch.empty(dense.bias.shape, device=device, dtype=dtype))
        self.register_parameter("bias", bias)

    def reset_parameters(self) -> None:
        """Initialise like the dense layer: uniform in ``+-1/sqrt(fan_in)`` with the dense fan-in."""
        bound = 1.0 / math.sqrt(max(math.prod(self.weight_shape[1:]), 1))
        nn.init.uniform_(self.values, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        self.note_written()

    @property
    def sparsity(self) -> float:
        """Share of weights that do not exist."""
        return self.topology.sparsity

    @property
    def weight(self) -> Tensor:
        """What the product multiplies with, as a dense tensor of ``weight_shape``; differentiable and read-only.

        For code that reads a layer's weight in place of calling the layer (fast paths of ``nn.TransformerEncoder``,
        ``F.linear(x, layer.weight)``): right, but made anew at each access, and the product is then a dense one.
        """
        weight = self._dense(self.effective_values(), self.topology.probe)
        return weight if torch.compiler.is_compiling() else weight.as_subclass(ReadOnlyWeight)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                f"the weight of {type(self).__name__} is made of its values and cannot be assigned: write to values, "
                "or make a layer of a dense one with from_dense"
            )
        super().__setattr__(name, value)

    def effective_values(self) -> Tensor:
        """The values that the product sees: ``values``, through the topology's transform where one is set.

        Raises:
            RuntimeError: other code has written to the index, or has averaged values across topology updates.
        """
        self.topology.check()
        if not torch.compiler.is_compiling():
            self._check_values()
        transform = self.topology.transform
        return self.values if transform is None else transform(self.values)

    def _check_values(self) -> None:
        if self._watch is None:
            self._watch = Watch(self)
        if self._watch.has_followed(self):
            raise RuntimeError(
                f"the values of this {type(self).__name__} were averaged, slot by slot, with those of a model whose "
                "topology has moved on, so they are of other weights: average models with sm.EMA or sm.WeightAverage. "
                "If they are meant for this topology, call note_written() of the layer"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.note_written()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        new.topology.probe = new.topology.transform = None  # those of a method or mask that does not know the copy
        for layer in (self, new):
            layer.note_written()
        return new

    def dense_weight(self) -> Tensor:
        """The weight as a dense tensor of ``weight_shape``, zeros where nothing exists; differentiable."""
        self.topology.check()
        return self._dense(self.values)

    def _dense(self, values: Tensor, probe: Tensor | None = None) -> Tensor:
        matrix = self.topology.to_dense(values)
        if probe is not None:  # a growth step: it is zero, and gets the dense gradient
            matrix = matrix + probe
        if matrix.requires_grad and not (torch.compiler.is_compiling() or transformed()):
            matrix = Anchor.apply(matrix, *self.topology.index)
        return matrix_to_weight(matrix, self.weight_shape, self.topology.block[1])

    def mask(self) -> Tensor:
        """Bool tensor of ``weight_shape``, True where a weight exists."""
        return matrix_to_weight(self.topology.mask(), self.weight_shape, self.topology.block[1])

    def replace_(self, index: Index, values: Tensor) -> None:
        """Take over another topology of the same grid and its values; :attr:`values` stays the same parameter."""
        self.topology.replace_(index)
        if values.shape == self.values.shape:
            with torch.no_grad():
                self.values.copy_(values)
        else:
            resize(self.values, values)
        self.note_written()

    def note_written(self) -> None:
        """Say that the present values are meant for the present topology: after writing into a copy of a layer."""
        if self._watch is None:
            self._watch = Watch(self)
        self._watch.note(self)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        values, col = state_dict.get(prefix + "values"), state_dict.get(prefix + "topology.col")
        if (values is None) != (col is None):
            errors.append(f"sparse layer at {prefix.rstrip('.')!r}: its values and its topology must come together")
            return
        row_ptr = state_dict.get(prefix + "topology.row_ptr")
        if col is not None and row_ptr is not None and self.topology.problem(row_ptr, col, prefix + "topology."):
            return  # the topology says what it is; without it the values would lose their places
        with torch.inference_mode(False):  # whose tensors no training could use
            # where training changes the number of weights, a checkpoint holds another one than a new model
            shape = None if col is None else (*col.shape, *self.values.shape[1:])
            if values is not None and values.shape != self.values.shape and values.shape == shape:
                resize(self.values, self.values.detach().new_empty(values.shape))
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
            if values is not None:
                self.note_written()

    def _take_over(self, dense: nn.Linear | nn.Conv2d) -> None:
        with torch.no_grad():
            self.values.copy_(self.topology.gather(weight_to_matrix(dense.weight, self.topology.block[1])))
            if self.bias is not None:
                self.bias.copy_(cast(Tensor, dense.bias))
        self.values.requires_grad_(dense.weight.requires_grad)
        if self.bias is not None:
            self.bias.requires_grad_(cast(Tensor, dense.bias).requires_grad)
        self.train(dense.training)

    def _hand_over(self, dense: nn.Linear | nn.Conv2d) -> None:
        with torch.no_grad():
            dense.weight.copy_(self.dense_weight())
            if self.bias is not None:
                cast(Tensor, dense.bias).copy_(self.bias)
        dense.weight.requires_grad_(self.values.requires_grad)
        if self.bias is not None:
            cast(Tensor, dense.bias).requires_grad_(self.bias.requires_grad)
        dense.train(self.training)

    def _sparse_repr(self) -> str:
        return f"sparsity={self.sparsity:.4f}, pattern={pattern_name(self.topology.block)!r}"


class SparseLinear(SparseLayer):
    """``nn.Linear`` whose weight (out, in) exists only in part.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``.
        sparsity: share of weights to leave out, in [0, 1); their number is exact, their places drawn by torch's default
            CPU generator.
        pattern: ``"unstructured"``, ``"vector8"`` (8 neighbouring outputs of one input), ``"block32"``, or the block
            shape itself, (1, 1), (V, 1) or (b, b).

    Shapes:
        input (..., in_features), output (..., out_features).

    Raises:
        ValueError: a sparsity outside [0, 1), an unknown pattern, or a block that does not divide the weight.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        sparsity: float,
        pattern: Pattern = "unstructured",
    ) -> None:
        super().__init__()
        check_sparsity(sparsity)
        dense = nn.Linear(in_features, out_features, bias, device="meta")
        topology = Topology.random((out_features, in_features), 1.0 - sparsity, block_shape(pattern))
        self._init_linear(dense, topology, device or torch.get_default_device(), dtype)
        self.reset_parameters()

    def _init_linear(self, dense: nn.Linear, topology: Topology, device: Any, dtype: torch.dtype | None) -> None:
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self._init_sparse(dense, topology, device, dtype)

    @classmethod
    def from_dense(
        cls,
        dense: nn.Linear,
        mask: Tensor | None = None,
        *,
        sparsity: float | None = None,
        pattern: Pattern = "unstructured",
        selection: Selection = "random",
    ) -> Self:
        """Sparse copy of a linear layer.

        Args:
            dense: the layer; not changed.
            mask: bool (out, in), True = kept; or
            sparsity: share to leave out, at ``selection`` ``"random"`` places, the smallest in ``"magnitude"``, or at
                random but with the same number in every (block) row, ``"constant_fan_in"``.
            pattern: as in the constructor; a mask must consist of whole blocks.
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        topology = topology_of(dense.weight, mask, sparsity, block_shape(pattern), selection)
        self._init_linear(dense, topology, dense.weight.device, dense.weight.dtype)
        self._take_over(dense)
        return self

    def to_dense(self) -> nn.Linear:
        """Dense copy, with zeros where nothing exists."""
        values = self.values
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, values.device, values.dtype)
        self._hand_over(dense)
        return dense

    def forward(self, input: Tensor) -> Tensor:
        return ops.sparse_linear(input, self.effective_values(), self.topology, self.bias, probe=self.topology.probe)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self._sparse_repr()}"


class SparseConv2d(SparseLayer):
    """``nn.Conv2d`` whose weight (out, in / groups, kh, kw) exists only in part.

    Args:
        in_channels ... dtype: as ``nn.Conv2d``.
        sparsity, pattern: as :class:`SparseLinear`; a (b, b) block spans output and input channels at one kernel tap.

    Shapes:
        input (N, C, H, W) or (C, H, W), contiguous or channels_last; the output follows.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2d,
        stride: Size2d = 1,
        padding: Size2d | str = 0,
        dilation: Size2d = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        sparsity: float,
        pattern: Pattern = "unstructured",
    ) -> None:
        super().__init__()
        check_sparsity(sparsity)
        dense = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
                          device="meta")  # fmt: skip
        block = block_shape(pattern)
        _check_block(tuple(dense.weight.shape), block)
        topology = Topology.random(matrix_shape(tuple(dense.weight.shape)), 1.0 - sparsity, block)
        self._init_conv(dense, topology, device or torch.get_default_device(), dtype)
        self.reset_parameters()

    def _init_conv(self, dense: nn.Conv2d, topology: Topology, device: Any, dtype: torch.dtype | None) -> None:
        self.in_channels, self.out_channels, self.groups = dense.in_channels, dense.out_channels, dense.groups
        self.kernel_size, self.stride = cast(Any, dense.kernel_size), cast(Any, dense.stride)
        self.dilation, self.padding, self.padding_mode = cast(Any, dense.dilation), dense.padding, dense.padding_mode
        self._init_sparse(dense, topology, device, dtype)

        sides = [(0, 0), (0, 0)]  # (before, after) for height and width
        if self.padding == "same":
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            sides = [(total // 2, total - total // 2) for total in totals]
        elif not isinstance(self.padding, str):
            sides = [(p, p) for p in self.padding]
        by_kernel = self.padding_mode == "zeros" and all(before == after for before, after in sides)
        self._kernel_padding = (sides[0][0], sides[1][0]) if by_kernel else (0, 0)
        self._explicit_padding = None if by_kernel else (*sides[1], *sides[0])

    @classmethod
    def from_dense(
        cls,
        dense: nn.Conv2d,
        mask: Tensor | None = None,
        *,
        sparsity: float | None = None,
        pattern: Pattern = "unstructured",
        selection: Selection = "random",
    ) -> Self:
        """Sparse copy of a convolution, as :meth:`SparseLinear.from_dense` with a mask (out, in / groups, kh, kw)."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        block = block_shape(pattern)
        _check_block(tuple(dense.weight.shape), block)
        topology = topology_of(dense.weight, mask, sparsity, block, selection)
        self._init_conv(dense, topology, dense.weight.device, dense.weight.dtype)
        self._take_over(dense)
        return self

    def to_dense(self) -> nn.Conv2d:
        """Dense copy, with zeros where nothing exists."""
        dense = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, cast(Any, self.padding), self.dilation,
            self.groups, self.bias is not None, cast(Any, self.padding_mode), self.values.device, self.values.dtype,
        )  # fmt: skip
        self._hand_over(dense)
        return dense

    def forward(self, input: Tensor) -> Tensor:
        batched = input.dim() != 3
        if not batched:
            input = input.unsqueeze(0)
        if self._explicit_padding is not None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, self._explicit_padding, mode=mode)
        output = ops.sparse_conv2d(
            input, self.effective_values(), self.topology, self.bias, weight_shape=cast(Any, self.weight_shape),
            stride=self.stride, padding=self._kernel_padding, dilation=self.dilation, groups=self.groups,
            probe=self.topology.probe,
        )  # fmt: skip
        return output if batched else output.squeeze(0)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"padding_mode={self.padding_mode!r}, {self._sparse_repr()}"
        )


def _check_block(weight_shape: tuple[int, ...], block: tuple[int, int]) -> None:
    """Raise ``ValueError`` where the block does not divide output and input channels."""
    block_grid((weight_shape[0], weight_shape[1]), block)
