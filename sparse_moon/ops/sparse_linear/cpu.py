"""The compiled CPU kernels of ``sparse_linear``.

They compute in float32, and run where :mod:`sparse_moon.ops.choice` finds that they pay; bfloat16 operands are
converted to float32 and back. Everything else is a dense product.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, get_num_threads

from sparse_moon.ops.choice import Pass, Work, or_dense
from sparse_moon.ops.cpu import address, as_dtype, empty, kernel_takes, kernels, matrix, packed
from sparse_moon.ops.native import native
from sparse_moon.ops.plan import Plan
from sparse_moon.ops.sparse_linear import dense
from sparse_moon.ops.sparse_linear.api import FORWARD, GRADS, INPUT_GRAD, VALUES_GRAD


class Shapes(NamedTuple):
    """What the shapes of a pass determine."""

    work: Work
    tokens: int
    result: tuple[int, ...]


@lru_cache(maxsize=4096)
def shapes_of(pass_: Pass, shape: tuple[int, ...], matrix_shape: tuple[int, int]) -> Shapes:
    """Those of a pass on the input or the gradient of the output of this shape."""
    (outputs, inputs), tokens = matrix_shape, math.prod(shape[:-1])
    work = Work(pass_, tokens, inputs, outputs, positions=1, taps=1, stride=1, groups=1)
    return Shapes(work, tokens, (*shape[:-1], outputs if pass_ == "forward" else inputs))


def forward(input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, plan: Plan) -> Tensor:
    shapes = shapes_of("forward", input.shape, plan.shape)
    if not kernel_takes(shapes.work, plan, input, values, bias):
        return dense.forward(input, values, bias, probe, plan)
    dtype, input, values, bias = input.dtype, packed(input), packed(values), None if bias is None else packed(bias)
    output = empty(shapes.result)
    kernels.sparse_linear(
        shapes.tokens, matrix(plan, values), input.data_ptr(), address(bias), output.data_ptr(), get_num_threads()
    )
    return as_dtype(dtype, output)


def input_grad(grad: Tensor, values: Tensor, plan: Plan) -> Tensor:
    shapes = shapes_of("input_grad", grad.shape, plan.shape)
    if not kernel_takes(shapes.work, plan, grad, values):
        return dense.input_grad(grad, values, plan)
    dtype, grad, values = grad.dtype, packed(grad), packed(values)
    result = empty(shapes.result)
    kernels.sparse_linear_input_grad(
        shapes.tokens, matrix(plan, values), grad.data_ptr(), result.data_ptr(), get_num_threads()
    )
    return as_dtype(dtype, result)


def values_grad(grad: Tensor, input: Tensor, plan: Plan) -> Tensor:
    shapes = shapes_of("values_grad", grad.shape, plan.shape)
    if not kernel_takes(shapes.work, plan, grad, input):
        return dense.values_grad(grad, input, plan)
    dtype, grad, input = grad.dtype, packed(grad), packed(input)
    result = empty(plan.values_shape)
    kernels.sparse_linear_values_grad(
        shapes.tokens, matrix(plan, None), grad.data_ptr(), input.data_ptr(), result.data_ptr(), get_num_threads()
    )
    return as_dtype(dtype, result)


def grads(grad: Tensor, input: Tensor, values: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    first = shapes_of("input_grad", grad.shape, plan.shape)
    second = shapes_of("values_grad", grad.shape, plan.shape)
    if not (kernel_takes(first.work, plan, grad, values, input) and kernel_takes(second.work, plan, grad)):
        return input_grad(grad, values, plan), values_grad(grad, input, plan)
    dtype, grad, input, values = grad.dtype, packed(grad), packed(input), packed(values)
    d_input, d_values = torch.empty_like(input), torch.empty_like(values)
    kernels.sparse_linear_grads(
        first.tokens, matrix(plan, values), grad.data_ptr(), input.data_ptr(), d_input.data_ptr(), d_values.data_ptr(),
        get_num_threads(),
    )  # fmt: skip
    return as_dtype(dtype, d_input), as_dtype(dtype, d_values)


if native is not None:
    FORWARD.implement("cpu", or_dense(native, forward, dense.forward))
    INPUT_GRAD.implement("cpu", or_dense(native, input_grad, dense.input_grad))
    VALUES_GRAD.implement("cpu", or_dense(native, values_grad, dense.values_grad))
    GRADS.implement("cpu", or_dense(native, grads, dense.grads))
