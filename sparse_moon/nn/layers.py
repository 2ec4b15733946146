"""Drop-in sparse layers."""

from collections.abc import Callable
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_moon.allocation import check_sparsity
from sparse_moon.nn.sparse_layer import SparseLayer
from sparse_moon.ops import Geometry, sparse_conv2d, sparse_linear
from sparse_moon.topology import Selection, Topology, block_grid, block_shape, matrix_shape, topology_of

Pattern = str | tuple[int, int]
Exclude = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Size2d = int | tuple[int, int]


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
        values, bias, plan = self.operands()
        return sparse_linear(input, values, bias, plan, probe=self.probe)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self._sparse_repr()}"


_OPTIONS = frozenset(("stride", "padding", "dilation", "groups", "padding_mode", "weight_shape"))


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

    def _set_geometry(self) -> None:
        """What the options of the convolution come to; again where one of them is set."""
        sides = [(0, 0), (0, 0)]  # (before, after) for height and width
        if self.padding == "same":
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            sides = [(total // 2, total - total // 2) for total in totals]
        elif not isinstance(self.padding, str):
            sides = [(p, p) for p in self.padding]
        by_kernel = self.padding_mode == "zeros" and all(before == after for before, after in sides)
        padding = (sides[0][0], sides[1][0]) if by_kernel else (0, 0)
        self._explicit_padding = None if by_kernel else (*sides[1], *sides[0])
        self._geometry = Geometry.of(self.weight_shape, self.stride, padding, self.dilation, self.groups)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _OPTIONS:
            self._geometry = self._plan = None

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
        if self._geometry is None:
            self._set_geometry()
        if self._explicit_padding is not None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, self._explicit_padding, mode=mode)
        values, bias, plan = self.operands()
        output = sparse_conv2d(input, values, bias, plan, probe=self.probe)
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
