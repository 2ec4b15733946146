"""What ``sparse_conv2d`` and its gradients ask of shapes."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sparse_moon.ops.index import check_block, matrix_shape
from sparse_moon.ops.plan import Geometry, Plan, geometry_of
from sparse_moon.ops.product import expect_shape


def check_geometry(input_shape: Sequence[int], geometry: Geometry) -> None:
    """Raise ``ValueError`` for a convolution that torch would not compute either."""
    weight_shape, stride, padding, dilation, groups = geometry
    if len(weight_shape) != 4 or min(weight_shape[2:]) < 1 or min(weight_shape[:2]) < 0:
        raise ValueError(f"weight shape must be (O, C/groups, kh, kw), got {weight_shape}")
    if groups < 1 or weight_shape[0] % groups:
        raise ValueError(f"groups must divide {weight_shape[0]} output channels, got {groups}")
    if len(input_shape) != 4 or input_shape[1] != weight_shape[1] * groups or min(input_shape) < 0:
        raise ValueError(f"input must be (N, {weight_shape[1] * groups}, H, W), got shape {tuple(input_shape)}")
    if {len(stride), len(padding), len(dilation)} != {2} or min(*stride, *dilation) < 1 or min(padding) < 0:
        raise ValueError(f"invalid stride {stride}, padding {padding} or dilation {dilation}")
    if min(*input_shape[2:], *geometry.output_size(input_shape)) < 1:
        raise ValueError(f"a {weight_shape[2]} x {weight_shape[3]} kernel does not fit input {tuple(input_shape)}")


def check_channels(geometry: Geometry, block: Sequence[int]) -> None:
    """Raise ``ValueError`` for a block that does not divide the channels of the weight."""
    check_block(block)
    channels = geometry.weight_shape[:2]
    if channels[0] % block[0] or channels[1] % block[1]:
        raise ValueError(f"block {tuple(block)} does not divide the channels of a weight {geometry.weight_shape}")


def check_weight_shape(plan: Plan) -> None:
    """Raise ``ValueError`` unless the geometry's weight is the index's matrix."""
    weight_shape = geometry_of(plan).weight_shape
    if matrix_shape(weight_shape) != plan.shape:
        raise ValueError(f"weight shape {weight_shape} does not fit an index of a {plan.shape} matrix")


def check_grad(grad: Tensor, input_shape: Sequence[int], geometry: Geometry) -> None:
    """Raise ``ValueError`` for a gradient that is not of the output's shape."""
    expect_shape("grad", grad, (input_shape[0], geometry.weight_shape[0], *geometry.output_size(input_shape)))


def check_dense_grad(grad: Tensor, input: Tensor, block_width: int, *parts: Any) -> None:
    """What the operator without an index asks of the shapes of its arguments where others call it."""
    geometry = Geometry.of(*parts)
    check_geometry(input.shape, geometry)
    check_channels(geometry, (1, block_width))
    check_grad(grad, input.shape, geometry)
