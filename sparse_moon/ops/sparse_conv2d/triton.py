"""The Triton kernels of ``sparse_conv2d``, for weights of blocks and vectors. Results are channels_last.

A pointwise convolution in channels_last memory is a linear layer of its positions, and with blocks runs as one: those
kernels read and multiply the same, and have no taps to find and no borders to look for.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_moon.ops.choice import Pass
from sparse_moon.ops.layout import without_gaps
from sparse_moon.ops.plan import Plan, geometry_of
from sparse_moon.ops.sparse_conv2d.api import fake_values_grad
from sparse_moon.ops.sparse_linear import triton as linear


def tf32() -> bool:
    """Whether torch allows it for convolutions."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def takes(pass_: Pass, plan: Plan, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for this pass and these blocks."""
    from sparse_moon.kernels import sparse_conv2d

    geometry = geometry_of(plan)
    if _is_linear(plan):
        return linear.takes(plan.block, dtype)
    vectors_input_grad = pass_ == "input_grad" and plan.block[1] == 1  # has no kernel
    return not vectors_input_grad and sparse_conv2d.takes(plan.block, geometry.weight_shape, geometry.groups, dtype)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _is_linear(plan: Plan) -> bool:
    """Whether it has blocks, and every output is of the one position it lies at."""
    weight_shape, stride, padding, _, groups = geometry_of(plan)
    pointwise = (*weight_shape[2:], *stride, groups) == (1, 1, 1, 1, 1) and not any(padding)
    return pointwise and plan.block[1] > 1


def _positions(images: Tensor) -> Tensor:
    """(N, C, H, W) as (N * H * W, C), without a copy of what is channels_last."""
    return _channels_last(images).permute(0, 2, 3, 1).flatten(0, 2)


def _images(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """:func:`_positions` back, for images (N, any, H, W)."""
    return rows.view(shape[0], *shape[2:], rows.shape[1]).permute(0, 3, 1, 2)


def _options(plan: Plan) -> dict[str, Any]:
    return {**geometry_of(plan)._asdict(), "allow_tf32": tf32()}


def forward(input: Tensor, values: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    from sparse_moon.kernels import sparse_conv2d as kernels

    if _is_linear(plan):
        return _images(linear.forward(_positions(input), values, bias, None, plan, tf32()), input.shape)
    geometry = geometry_of(plan)
    output = _empty((input.shape[0], geometry.weight_shape[0], *geometry.output_size(input.shape)), input)
    kernels.sparse_conv2d(
        _channels_last(input), values.contiguous(), without_gaps(bias), *plan.index[:2], output, **_options(plan)
    )
    return output


def input_grad(grad: Tensor, values: Tensor, input_shape: Sequence[int], plan: Plan) -> Tensor:
    from sparse_moon.kernels import sparse_conv2d as kernels

    if _is_linear(plan):
        return _images(linear.input_grad(_positions(grad), values, plan, tf32()), grad.shape)
    result = _empty(input_shape, grad)
    kernels.sparse_conv2d_input_grad(
        _channels_last(grad), values.contiguous(), *plan.index[2:], result, **_options(plan)
    )
    return result


def values_grad(grad: Tensor, input: Tensor, plan: Plan) -> Tensor:
    from sparse_moon.kernels import sparse_conv2d as kernels

    if _is_linear(plan):
        return linear.values_grad(_positions(grad), _positions(input), plan, tf32())
    result = fake_values_grad(grad, input, plan)
    kernels.sparse_conv2d_values_grad(
        _channels_last(grad), _channels_last(input), *plan.index[:2], result, **_options(plan)
    )
    return result
