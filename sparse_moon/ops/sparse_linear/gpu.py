"""What runs ``sparse_linear`` on a GPU."""

import math
from collections.abc import Sequence

from torch import Tensor

from sparse_moon.ops.choice import Pass, Work, or_dense
from sparse_moon.ops.gpu import Implementation, choose, key_of, speed_dtype
from sparse_moon.ops.index import check_entries
from sparse_moon.ops.native import native_cuda
from sparse_moon.ops.plan import Plan
from sparse_moon.ops.sparse_linear import cuda, dense, triton
from sparse_moon.ops.sparse_linear.api import FORWARD, GRADS, INPUT_GRAD, VALUES_GRAD, bias_grad


def choice(pass_: Pass, shape: Sequence[int], plan: Plan, x: Tensor, *operands: Tensor | None) -> Implementation:
    """What runs a pass on operands of the dtype and on the device of ``x``.

    Args:
        shape: of the input, or of the gradient of the output.
    """
    tf32 = triton.tf32()
    key = key_of(pass_, shape, tf32, x, *operands)
    found: Implementation | None = plan.decided(key)  # making it anew takes the host four times as long
    if found is not None:
        return found
    outputs, inputs = plan.shape
    tokens, dtype = math.prod(shape[:-1]), x.dtype
    work = Work(pass_, tokens, inputs, outputs, 1, 1, 1, 1, x.device.type, plan.block, speed_dtype(dtype, tf32))
    return choose(key, work, plan, lambda: triton.takes(plan.block, dtype), x, *operands)


def forward(input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, plan: Plan) -> Tensor:
    check_entries(values, plan.index[1])
    match choice("forward", input.shape, plan, input, values, bias):
        case "triton":
            return triton.forward(input, values, bias, probe, plan)
        case "cuda":
            return cuda.forward(input, values, bias, plan)
        case _:
            return dense.forward(input, values, bias, probe, plan)


def input_grad(grad: Tensor, values: Tensor, plan: Plan) -> Tensor:
    check_entries(values, plan.index[1])
    match choice("input_grad", grad.shape, plan, grad, values):
        case "triton":
            return triton.input_grad(grad, values, plan)
        case "cuda":
            return cuda.input_grad(grad, values, plan)
        case _:
            return dense.input_grad(grad, values, plan)


def values_grad(grad: Tensor, input: Tensor, plan: Plan) -> Tensor:
    match choice("values_grad", grad.shape, plan, grad, input):
        case "triton":
            return triton.values_grad(grad, input, plan)
        case "cuda":
            return cuda.values_grad(grad, input, plan)
        case _:
            return dense.values_grad(grad, input, plan)


input_grad_or_dense = or_dense(native_cuda, input_grad, dense.input_grad)
values_grad_or_dense = or_dense(native_cuda, values_grad, dense.values_grad)


def values_and_bias_grad(grad: Tensor, input: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Both from one reading of ``grad`` by Triton's kernel."""
    if choice("values_grad", grad.shape, plan, grad, input) == "triton":
        return triton.values_and_bias_grad(grad, input, plan)
    return values_grad_or_dense(grad, input, plan), bias_grad(grad)


def grads(grad: Tensor, input: Tensor, values: Tensor, plan: Plan, with_bias: bool = False) -> tuple[Tensor, ...]:
    d_input = input_grad_or_dense(grad, values, plan)
    if with_bias:
        return d_input, *values_and_bias_grad(grad, input, plan)
    return d_input, values_grad_or_dense(grad, input, plan)


FORWARD.implement("cuda", or_dense(native_cuda, forward, dense.forward))
INPUT_GRAD.implement("cuda", input_grad_or_dense)
VALUES_GRAD.implement("cuda", values_grad_or_dense)
GRADS.implement("cuda", grads)
