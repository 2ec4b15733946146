"""The compiled CPU kernels of ``sparse_linear``.

They compute in float32, and run where :mod:`sparse_moon.ops.choice` finds that they pay; activations in bfloat16 are
converted as they are read and written. Everything else is a dense product, in float32 where torch only emulates 16
bits.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, get_num_threads

from sparse_moon.ops.choice import Pass, Work, dense_instead, or_dense
from sparse_moon.ops.cpu import (
    as_dtype,
    as_float32,
    blank,
    decide,
    decided,
    empty,
    emulated,
    in_float32,
    kernel_takes,
    kernels,
    matrix,
    one_type,
    packed,
    with_bias_grad,
)
from sparse_moon.ops.index import check_entries
from sparse_moon.ops.native import native
from sparse_moon.ops.plan import Plan
from sparse_moon.ops.registry import implement
from sparse_moon.ops.sparse_linear import dense
from sparse_moon.ops.sparse_linear.api import FORWARD, GRADS, INPUT_GRAD, VALUES_GRAD, bias_grad


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


_dense_grads = with_bias_grad(dense.grads, bias_grad)
_separate_grads = with_bias_grad(
    lambda grad, input, values, plan: (INPUT_GRAD(grad, values, plan), VALUES_GRAD(grad, input, plan)), bias_grad
)


def forward(input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, plan: Plan) -> Tensor:
    given = input, values, bias, probe, plan
    dtype, key = input.dtype, ("forward", input.shape, input.dtype)
    decision = decided(plan, key, input, values, bias)
    if decision is None:
        shapes = shapes_of("forward", input.shape, plan.shape)
        sparse = kernel_takes(shapes.work, plan, input, values, bias)
        result = blank(shapes.result, dtype=dtype)
        decision = decide(plan, key, shapes.tokens, result, sparse=sparse, keep=one_type(input, values, bias))
        if sparse:
            check_entries(values, plan.index[1])
            input, values, bias = packed(input), as_float32(values), None if bias is None else as_float32(bias)
    if not decision.sparse:
        if emulated(dtype):
            return in_float32(forward, *given)
        return dense.forward(input, values, bias, probe, plan)
    half = dtype is torch.bfloat16
    if half:
        values, bias = as_float32(values), None if bias is None else as_float32(bias)
    output = torch.empty_like(decision.blanks[0])
    try:
        kernels.sparse_linear(
            decision.size, (decision.weight, values.data_ptr()), input.data_ptr(),
            0 if bias is None else bias.data_ptr(), output.data_ptr(), half, get_num_threads(), 0,
        )  # fmt: skip
    except kernels.TooLarge as error:
        return dense_instead(error, dense.forward, *given)
    return output


def takes(pass_: Pass, shape: tuple[int, ...], plan: Plan, *operands: Tensor) -> bool:
    """Whether the kernel runs a pass on operands of these dtypes, the input or the output's gradient of this shape."""
    return kernel_takes(shapes_of(pass_, shape, plan.shape).work, plan, *operands)


def forward_gelu(input: Tensor, values: Tensor, bias: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """By the kernel: the product with its bias, and GELU by tanh of that."""
    shapes = shapes_of("forward", input.shape, plan.shape)
    dtype, input, values, bias = input.dtype, packed(input), as_float32(values), as_float32(bias)
    before, output = (empty(shapes.result, dtype=dtype) for _ in range(2))
    kernels.sparse_linear(
        shapes.tokens, matrix(plan, values), input.data_ptr(), bias.data_ptr(), before.data_ptr(),
        dtype is torch.bfloat16, get_num_threads(), output.data_ptr(),
    )  # fmt: skip
    return before, output


def input_grad(grad: Tensor, values: Tensor, plan: Plan) -> Tensor:
    if not takes("input_grad", grad.shape, plan, grad, values):
        if emulated(grad.dtype):
            return in_float32(input_grad, grad, values, plan)
        return dense.input_grad(grad, values, plan)
    return _input_grad(grad, values, plan, 0)


def input_grad_gelu(grad: Tensor, values: Tensor, before: Tensor, plan: Plan) -> Tensor:
    """By the kernel: the gradient of ``before``, of which the input was GELU by tanh."""
    before = packed(before)
    return _input_grad(grad, values, plan, before.data_ptr())


def _input_grad(grad: Tensor, values: Tensor, plan: Plan, before: int) -> Tensor:
    shapes = shapes_of("input_grad", grad.shape, plan.shape)
    dtype, grad, values = grad.dtype, packed(grad), as_float32(values)
    result = empty(shapes.result, dtype=dtype)
    kernels.sparse_linear_input_grad(
        shapes.tokens, matrix(plan, values), grad.data_ptr(), result.data_ptr(), dtype is torch.bfloat16,
        get_num_threads(), before,
    )  # fmt: skip
    return result


def values_grad(grad: Tensor, input: Tensor, plan: Plan) -> Tensor:
    if not takes("values_grad", grad.shape, plan, grad, input):
        if emulated(grad.dtype):
            return in_float32(values_grad, grad, input, plan)
        return dense.values_grad(grad, input, plan)
    return _values_grad(grad, input, plan, 0)


def values_and_bias_grad(grad: Tensor, input: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """By the kernel, from one reading of ``grad``."""
    d_bias = empty(plan.bias_shape)
    return _values_grad(grad, input, plan, d_bias.data_ptr()), as_dtype(grad.dtype, d_bias)


def _values_grad(grad: Tensor, input: Tensor, plan: Plan, bias_grad: int) -> Tensor:
    shapes = shapes_of("values_grad", grad.shape, plan.shape)
    dtype, grad, input = grad.dtype, packed(grad), packed(input)
    result = empty(plan.values_shape)
    kernels.sparse_linear_values_grad(
        shapes.tokens, matrix(plan, None), grad.data_ptr(), input.data_ptr(), result.data_ptr(),
        dtype is torch.bfloat16, get_num_threads(), bias_grad,
    )  # fmt: skip
    return as_dtype(dtype, result)


def dense_grad(grad: Tensor, input: Tensor) -> Tensor:
    """The dense weight's gradient (O, I)."""
    return in_float32(dense.dense_grad, grad, input) if emulated(grad.dtype) else dense.dense_grad(grad, input)


def grads(grad: Tensor, input: Tensor, values: Tensor, plan: Plan, with_bias: bool = False) -> tuple[Tensor, ...]:
    given = grad, input, values, plan, with_bias
    dtype, key = grad.dtype, ("grads", grad.shape, grad.dtype)
    decision = decided(plan, key, grad, values, input)
    if decision is None:
        first = shapes_of("input_grad", grad.shape, plan.shape)
        second = shapes_of("values_grad", grad.shape, plan.shape)
        sparse = kernel_takes(first.work, plan, grad, values, input) + kernel_takes(second.work, plan, grad, input)
        check_entries(values, plan.index[1])
        blanks = blank(first.result, dtype=dtype), blank(plan.bias_shape)
        decision = decide(plan, key, first.tokens, *blanks, sparse=sparse, keep=one_type(grad, input, values))
        if sparse == 2:
            grad, input, values = packed(grad), packed(input), as_float32(values)
    if decision.sparse == 0:
        if emulated(dtype):
            return in_float32(grads, *given)
        return _dense_grads(*given)
    if decision.sparse == 1:
        return _separate_grads(*given)
    half = dtype is torch.bfloat16
    if half:
        values = as_float32(values)
    d_input, d_values = torch.empty_like(decision.blanks[0]), torch.empty_like(values)
    d_bias = torch.empty_like(decision.blanks[1]) if with_bias else None
    try:
        kernels.sparse_linear_grads(
            decision.size, (decision.weight, values.data_ptr()), grad.data_ptr(), input.data_ptr(), d_input.data_ptr(),
            d_values.data_ptr(), 0 if d_bias is None else d_bias.data_ptr(), half, get_num_threads(),
        )  # fmt: skip
    except kernels.TooLarge as error:
        return dense_instead(error, _dense_grads, *given)
    results = (d_input, d_values) if d_bias is None else (d_input, d_values, d_bias)
    return tuple(result.to(dtype) for result in results) if half else results


if native is not None:
    FORWARD.implement("cpu", forward)
    INPUT_GRAD.implement("cpu", or_dense(native, input_grad, dense.input_grad))
    VALUES_GRAD.implement("cpu", or_dense(native, values_grad, dense.values_grad))
    GRADS.implement("cpu", grads)
    implement("sparse_linear_dense_grad", "cpu", dense_grad)
