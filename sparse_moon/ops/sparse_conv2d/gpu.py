"""What runs ``sparse_conv2d`` on a GPU."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_moon.ops.choice import Pass, Work, or_dense
from sparse_moon.ops.dense_weight import gathered
from sparse_moon.ops.gpu import Implementation, choose, key_of, speed_dtype
from sparse_moon.ops.index import check_entries
from sparse_moon.ops.layout import memory_format
from sparse_moon.ops.native import native_cuda
from sparse_moon.ops.plan import Plan, geometry_of
from sparse_moon.ops.sparse_conv2d import cuda, dense, triton
from sparse_moon.ops.sparse_conv2d.api import FORWARD, GRADS, INPUT_GRAD, VALUES_GRAD, bias_grad


def choice(pass_: Pass, input_shape: Sequence[int], x: Tensor, plan: Plan, *operands: Tensor | None) -> Implementation:
    """What runs a pass on ``x``, the input or the gradient of the output."""
    tf32 = triton.tf32()
    key = key_of(pass_, input_shape, tf32, *operands)
    found: Implementation | None = plan.decided(key)  # making it anew takes the host four times as long
    if found is not None:
        return found
    geometry, dtype = geometry_of(plan), x.dtype
    outputs, inputs, *kernel = geometry.weight_shape
    work = Work(
        pass_, input_shape[0], inputs, outputs, math.prod(geometry.output_size(torch.Size(input_shape))),
        math.prod(kernel), max(geometry.stride), geometry.groups, x.device.type, plan.block,
        speed_dtype(dtype, tf32),
    )  # fmt: skip
    return choose(key, work, plan, lambda: triton.takes(pass_, plan, dtype), *operands)


def _as(layout_of: Tensor, result: Tensor) -> Tensor:
    """The result in the memory layout that the operator promises for this operand."""
    return result.contiguous(memory_format=memory_format(layout_of))


def forward(input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, plan: Plan) -> Tensor:
    check_entries(values, plan.index[1])
    match choice("forward", input.shape, input, plan, input, values, bias):
        case "triton":
            return _as(input, triton.forward(input, values, bias, plan))
        case "cuda":
            return _as(input, cuda.forward(input, values, bias, plan))
        case _:
            return dense.forward(input, values, bias, probe, plan)


def input_grad(grad: Tensor, values: Tensor, input_shape: Sequence[int], plan: Plan) -> Tensor:
    check_entries(values, plan.index[1])
    match choice("input_grad", input_shape, grad, plan, grad, values):
        case "triton":
            return _as(grad, triton.input_grad(grad, values, input_shape, plan))
        case "cuda":
            return _as(grad, cuda.input_grad(grad, values, input_shape, plan))
        case _:
            return dense.input_grad(grad, values, input_shape, plan)


def values_grad(grad: Tensor, input: Tensor, plan: Plan) -> Tensor:
    match choice("values_grad", input.shape, grad, plan, grad, input):
        case "triton":
            return triton.values_grad(grad, input, plan)
        case "cuda":
            return cuda.values_grad(grad, input, plan)
        case _:
            return _dense_values_grad(grad, input, plan)


def _dense_values_grad(grad: Tensor, input: Tensor, plan: Plan) -> Tensor:
    """Gathered from the dense gradient as it comes: as a matrix it would be a copy where it is channels_last."""
    return gathered(dense.weight_grad(grad, input, geometry_of(plan)), plan)


input_grad_or_dense = or_dense(native_cuda, input_grad, dense.input_grad)
values_grad_or_dense = or_dense(native_cuda, values_grad, _dense_values_grad)


def grads(grad: Tensor, input: Tensor, values: Tensor, plan: Plan, with_bias: bool = False) -> tuple[Tensor, ...]:
    pair = input_grad_or_dense(grad, values, input.shape, plan), values_grad_or_dense(grad, input, plan)
    return (*pair, bias_grad(grad)) if with_bias else pair


FORWARD.implement("cuda", or_dense(native_cuda, forward, dense.forward))
INPUT_GRAD.implement("cuda", input_grad_or_dense)
VALUES_GRAD.implement("cuda", values_grad_or_dense)
GRADS.implement("cuda", grads)
