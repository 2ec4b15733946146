"""The Triton kernels of ``sparse_conv2d``, for weights of blocks and vectors. Results are channels_last."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_moon.ops.choice import Pass
from sparse_moon.ops.plan import Plan, geometry_of
from sparse_moon.ops.sparse_conv2d.api import fake_values_grad


def tf32() -> bool:
    """Whether torch allows it for convolutions."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def takes(pass_: Pass, plan: Plan, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for this pass and these blocks."""
    from sparse_moon.kernels import sparse_conv2d

    geometry = geometry_of(plan)
    vectors_input_grad = pass_ == "input_grad" and plan.block[1] == 1  # has no kernel
    return not vectors_input_grad and sparse_conv2d.takes(plan.block, geometry.weight_shape, geometry.groups, dtype)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _options(plan: Plan) -> dict[str, Any]:
    return {**geometry_of(plan)._asdict(), "allow_tf32": tf32()}


def forward(input: Tensor, values: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    from sparse_moon.kernels import sparse_conv2d as kernels

    geometry = geometry_of(plan)
    output = _empty((input.shape[0], geometry.weight_shape[0], *geometry.output_size(input.shape)), input)
    kernels.sparse_conv2d(_channels_last(input), values.contiguous(), bias, *plan.index[:2], output, **_options(plan))
    return output


def input_grad(grad: Tensor, values: Tensor, input_shape: Sequence[int], plan: Plan) -> Tensor:
    from sparse_moon.kernels import sparse_conv2d as kernels

    result = _empty(input_shape, grad)
    kernels.sparse_conv2d_input_grad(
        _channels_last(grad), values.contiguous(), *plan.index[2:], result, **_options(plan)
    )
    return result


def values_grad(grad: Tensor, input: Tensor, plan: Plan) -> Tensor:
    from sparse_moon.kernels import sparse_conv2d as kernels

    result = fake_values_grad(grad, input, plan)
    kernels.sparse_conv2d_values_grad(
        _channels_last(grad), _channels_last(input), *plan.index[:2], result, **_options(plan)
    )
    return result
