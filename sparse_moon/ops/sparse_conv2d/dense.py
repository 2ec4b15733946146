"""``sparse_conv2d`` as a dense product on the scattered weight, on any device."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_moon.ops.dense_weight import backward_weight, forward_weight, gathered
from sparse_moon.ops.index import matrix_shape, weight_to_matrix
from sparse_moon.ops.layout import memory_format
from sparse_moon.ops.plan import Geometry, Plan, geometry_of
from sparse_moon.ops.product import GEOMETRY_SCHEMA
from sparse_moon.ops.registry import behind, call, define
from sparse_moon.ops.sparse_conv2d.checks import check_dense_grad

# Activations that the dense gradient is computed from at a time on the CPU.
PART_BYTES = 2**25


def _channels_last(activation: Tensor) -> bool:
    return memory_format(activation) == torch.channels_last


def forward(input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, plan: Plan) -> Tensor:
    weight = forward_weight(values, plan, channels_last=_channels_last(input))
    output = F.conv2d(input, weight, bias, *geometry_of(plan)[1:])
    return output.contiguous(memory_format=memory_format(input))


def _convolution_backward(
    grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, input_grad: bool, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """Those of the two gradients that are asked for.

    ``torch.nn.grad`` would stand an expanded number in for the operand that is not needed, whose layout then costs
    transpositions: 35 ms in place of 15 for both gradients of a 1 x 1 convolution in channels_last (64 to 256 channels,
    16 images of 32 x 32, one Zen 3 core).
    """
    _, stride, padding, dilation, groups = geometry
    mask = [input_grad, weight_grad, False]
    d_input, d_weight, _ = torch.ops.aten.convolution_backward(
        grad, input, weight, None, stride, padding, dilation, False, (0, 0), groups, mask
    )
    return d_input, d_weight


def _stand_in(shape: Sequence[int], grad: Tensor) -> Tensor:
    """For an operand whose numbers are not needed: memory that nothing touches, in the gradient's layout."""
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format(grad))


def input_grad(grad: Tensor, values: Tensor, input_shape: Sequence[int], plan: Plan) -> Tensor:
    weight = backward_weight(values, plan, channels_last=_channels_last(grad))
    stand_in = _stand_in(input_shape, grad)
    result, _ = _convolution_backward(grad, stand_in, weight, geometry_of(plan), True, False)
    return result.contiguous(memory_format=memory_format(grad))


def weight_grad(grad: Tensor, input: Tensor, geometry: Geometry) -> Tensor:
    """The dense weight's gradient."""
    return _convolution_backward(grad, input, _stand_in(geometry.weight_shape, grad), geometry, False, True)[1]


def dense_grad(grad: Tensor, input: Tensor, block_width: int, *parts: Any) -> Tensor:
    """The dense weight's gradient as a matrix; ``parts`` are those of a :class:`Geometry`."""
    # The CPU library copies what it is given into its own layout, at training's peak of memory: parts of the batch.
    count = max(math.ceil((grad.nbytes + input.nbytes) / PART_BYTES), 1) if grad.device.type == "cpu" else 1
    geometry = Geometry.of(*parts)
    pairs = zip(grad.chunk(count), input.chunk(count), strict=True)
    summands = (weight_grad(part_grad, part, geometry) for part_grad, part in pairs)
    total = next(summands)
    for more in summands:
        total += more
    return weight_to_matrix(total, block_width).contiguous()


def _fake_dense_grad(grad: Tensor, input: Tensor, block_width: int, weight_shape: list[int], *_: Any) -> Tensor:
    return input.new_empty(matrix_shape(tuple(weight_shape)))


define(f"sparse_conv2d_dense_grad(Tensor grad, Tensor input, int block_width, {GEOMETRY_SCHEMA}) -> Tensor",
       behind(check_dense_grad, dense_grad), _fake_dense_grad)  # fmt: skip


def values_grad(grad: Tensor, input: Tensor, plan: Plan) -> Tensor:
    d_weight = call("sparse_conv2d_dense_grad", grad, input, plan.block[1], *geometry_of(plan))
    return gathered(d_weight, plan)


def grads(grad: Tensor, input: Tensor, values: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Both gradients by one dense product."""
    weight = backward_weight(values, plan, channels_last=_channels_last(grad))
    d_input, d_weight = _convolution_backward(grad, input, weight, geometry_of(plan), True, True)
    d_values = gathered(d_weight, plan)
    return d_input.contiguous(memory_format=memory_format(grad)), d_values
