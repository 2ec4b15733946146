"""The compiled CPU kernels of ``sparse_conv2d``.

They compute in float32, and run where :mod:`sparse_moon.ops.choice` finds that they pay; activations in bfloat16 are
converted as they are read and written. Everything else is a dense product: of a 3 x 3 convolution in float32 by
Winograd's products, which take about half of torch's time, else by torch's; in float32, too, where torch only emulates
16 bits.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, get_num_threads

from sparse_moon.ops.choice import PASSES, Pass, Work, dense_instead, or_dense, winograd_pays
from sparse_moon.ops.cpu import (
    address,
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
from sparse_moon.ops.dense_weight import backward_weight, forward_weight
from sparse_moon.ops.index import check_entries, weight_to_matrix
from sparse_moon.ops.layout import memory_format
from sparse_moon.ops.native import native
from sparse_moon.ops.plan import Geometry, Plan, geometry_of
from sparse_moon.ops.registry import behind, implement
from sparse_moon.ops.sparse_conv2d import dense
from sparse_moon.ops.sparse_conv2d.api import (
    FORWARD,
    GRADS,
    INPUT_GRAD,
    VALUES_GRAD,
    bias_grad,
    separate_grads,
)
from sparse_moon.ops.sparse_conv2d.checks import check_dense_grad

# Winograd's products of a smaller plane are mostly of its padding.
_LEAST_SIZE = 4


class Shapes(NamedTuple):
    """What the shapes of a convolution determine."""

    works: dict[Pass, Work]
    winograd: bool  # whether its dense products in float32 are Winograd's
    convolution: Any  # as the extension takes it
    output: tuple[int, ...]


@lru_cache(maxsize=1024)
def shapes_of(
    input_shape: tuple[int, ...], geometry: Geometry, layout: torch.memory_format, dtype: torch.dtype
) -> Shapes:
    """Those of inputs of this shape, layout and type."""
    (outputs, inputs, *kernel), *rest, groups = geometry
    batch, in_shape = input_shape[0], input_shape[1:]
    out_size = geometry.output_size(input_shape)
    sizes = (batch, inputs, outputs, math.prod(out_size), math.prod(kernel), max(geometry.stride), groups)
    works = {pass_: Work(pass_, *sizes, channels_last=layout == torch.channels_last) for pass_ in PASSES}
    plain = kernel == [3, 3] and geometry.dilation == (1, 1) and min(*input_shape[2:], *out_size) >= _LEAST_SIZE
    winograd = plain and winograd_pays(works["forward"])
    half = dtype is torch.bfloat16
    convolution = kernels.Conv2d(batch, in_shape, (outputs, *out_size), tuple(kernel), *rest, groups, half)
    return Shapes(works, winograd, convolution, (batch, outputs, *out_size))


def _all_float32(*operands: Tensor | None) -> bool:
    return all(t is None or t.dtype == torch.float32 for t in operands)


_dense_grads = with_bias_grad(dense.grads, bias_grad)
_separate_grads = with_bias_grad(separate_grads, bias_grad)


def forward(input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, plan: Plan) -> Tensor:
    given = input, values, bias, probe, plan
    dtype, layout = input.dtype, memory_format(input)
    key = "forward", input.shape, layout, dtype
    decision = decided(plan, key, input, values, bias, layout)
    if decision is None:
        shapes = shapes_of(input.shape, geometry_of(plan), layout, dtype)
        sparse = kernel_takes(shapes.works["forward"], plan, input, values, bias)
        check_entries(values, plan.index[1])
        size = shapes.convolution if sparse else shapes
        result = blank(shapes.output, layout, dtype)
        decision = decide(plan, key, size, result, sparse=sparse, keep=one_type(input, values, bias))
        if sparse:
            input, values = packed(input, layout), as_float32(values)
            bias = None if bias is None else as_float32(bias)
    if not decision.sparse:
        if emulated(dtype):
            return in_float32(forward, *given)
        return _dense_forward(decision.size, layout, input, values, bias, probe, plan)
    if dtype is torch.bfloat16:
        values, bias = as_float32(values), None if bias is None else as_float32(bias)
    output = torch.empty_like(decision.blanks[0])
    try:
        kernels.sparse_conv2d(
            decision.size, (decision.weight, values.data_ptr()), input.data_ptr(),
            0 if bias is None else bias.data_ptr(), output.data_ptr(), layout is torch.channels_last, get_num_threads(),
        )  # fmt: skip
    except kernels.TooLarge as error:
        return dense_instead(error, dense.forward, *given)
    return output


def _dense_forward(
    shapes: Shapes, layout: torch.memory_format, input: Tensor, values: Tensor, bias: Tensor | None,
    probe: Tensor | None, plan: Plan,
) -> Tensor:  # fmt: skip
    if not (shapes.winograd and _all_float32(input, values, bias)):
        return dense.forward(input, values, bias, probe, plan)
    input, bias = packed(input, layout), None if bias is None else packed(bias)
    output, weight = empty(shapes.output, layout), forward_weight(values, plan)
    kernels.winograd_conv2d(
        shapes.convolution, weight.data_ptr(), input.data_ptr(), address(bias), output.data_ptr(),
        layout == torch.channels_last, get_num_threads(),
    )  # fmt: skip
    return output


def input_grad(grad: Tensor, values: Tensor, input_shape: Sequence[int], plan: Plan) -> Tensor:
    layout = memory_format(grad)
    shapes = shapes_of(tuple(input_shape), geometry_of(plan), layout, grad.dtype)
    sparse = kernel_takes(shapes.works["input_grad"], plan, grad, values)
    if not sparse and not (shapes.winograd and _all_float32(grad, values)):
        if emulated(grad.dtype):
            return in_float32(input_grad, grad, values, input_shape, plan)
        return dense.input_grad(grad, values, list(input_shape), plan)
    grad, values = packed(grad, layout), as_float32(values)
    result = empty(input_shape, layout, grad.dtype)
    if not sparse:
        weight = backward_weight(values, plan)
        kernels.winograd_input_grad(
            shapes.convolution, weight.data_ptr(), grad.data_ptr(), result.data_ptr(), layout == torch.channels_last,
            get_num_threads(),
        )  # fmt: skip
        return result
    kernels.sparse_conv2d_input_grad(
        shapes.convolution, matrix(plan, values), grad.data_ptr(), result.data_ptr(), layout == torch.channels_last,
        get_num_threads(),
    )  # fmt: skip
    return result


def values_grad(grad: Tensor, input: Tensor, plan: Plan) -> Tensor:
    grad_layout, layout = memory_format(grad), memory_format(input)
    shapes = shapes_of(input.shape, geometry_of(plan), layout, input.dtype)
    if not kernel_takes(shapes.works["values_grad"], plan, grad, input):
        if emulated(grad.dtype):
            return in_float32(values_grad, grad, input, plan)
        return dense.values_grad(grad, input, plan)
    dtype, grad, input = grad.dtype, packed(grad, grad_layout), packed(input, layout)
    result = empty(plan.values_shape)
    kernels.sparse_conv2d_values_grad(
        shapes.convolution, matrix(plan, None), grad.data_ptr(), grad_layout == torch.channels_last,
        input.data_ptr(), layout == torch.channels_last, result.data_ptr(), get_num_threads(),
    )  # fmt: skip
    return as_dtype(dtype, result)


def dense_grad(grad: Tensor, input: Tensor, block_width: int, *parts: Any) -> Tensor:
    """The dense weight's gradient as a matrix; ``parts`` are those of a :class:`Geometry`."""
    if emulated(grad.dtype):
        return in_float32(dense_grad, grad, input, block_width, *parts)
    geometry = Geometry.of(*parts)
    grad_layout, layout = memory_format(grad), memory_format(input)
    shapes = shapes_of(input.shape, geometry, layout, input.dtype)
    if not (shapes.winograd and _all_float32(grad, input)):
        return dense.dense_grad(grad, input, block_width, *parts)
    grad, input = packed(grad, grad_layout), packed(input, layout)
    result = empty(geometry.weight_shape)
    kernels.winograd_weight_grad(
        shapes.convolution, grad.data_ptr(), grad_layout == torch.channels_last, input.data_ptr(),
        layout == torch.channels_last, result.data_ptr(), get_num_threads(),
    )  # fmt: skip
    return weight_to_matrix(result, block_width).contiguous()


def grads(grad: Tensor, input: Tensor, values: Tensor, plan: Plan, with_bias: bool = False) -> tuple[Tensor, ...]:
    given = grad, input, values, plan, with_bias
    dtype, grad_layout, layout = grad.dtype, memory_format(grad), memory_format(input)
    key = "grads", input.shape, grad_layout, layout, dtype
    decision = decided(plan, key, grad, values, input, grad_layout, layout)
    if decision is None:
        shapes = shapes_of(input.shape, geometry_of(plan), layout, dtype)
        sparse = kernel_takes(shapes.works["grads"], plan, grad, input, values)
        float32 = _all_float32(grad, input, values)
        check_entries(values, plan.index[1])
        size = shapes.convolution if sparse else _separate_grads if shapes.winograd and float32 else _dense_grads
        blanks = blank(input.shape, grad_layout, dtype), blank(plan.bias_shape)
        decision = decide(plan, key, size, *blanks, sparse=sparse, keep=one_type(grad, input, values))
        if sparse:
            grad, input, values = packed(grad, grad_layout), packed(input, layout), as_float32(values)
    if not decision.sparse:
        if emulated(dtype):
            return in_float32(grads, *given)
        results: tuple[Tensor, ...] = decision.size(*given)
        return results
    if dtype is torch.bfloat16:
        values = as_float32(values)
    d_input, d_values = torch.empty_like(decision.blanks[0]), torch.empty_like(values)
    d_bias = torch.empty_like(decision.blanks[1]) if with_bias else None
    try:
        kernels.sparse_conv2d_grads(
            decision.size, (decision.weight, values.data_ptr()), grad.data_ptr(), grad_layout is torch.channels_last,
            input.data_ptr(), layout is torch.channels_last, d_input.data_ptr(), d_values.data_ptr(),
            0 if d_bias is None else d_bias.data_ptr(), get_num_threads(),
        )  # fmt: skip
    except kernels.TooLarge as error:
        return dense_instead(error, _dense_grads, *given)
    results = (d_input, d_values) if d_bias is None else (d_input, d_values, d_bias)
    return results if dtype is torch.float32 else tuple(result.to(dtype) for result in results)


if native is not None:
    FORWARD.implement("cpu", forward)
    INPUT_GRAD.implement("cpu", or_dense(native, input_grad, dense.input_grad))
    VALUES_GRAD.implement("cpu", or_dense(native, values_grad, dense.values_grad))
    GRADS.implement("cpu", grads)
    implement("sparse_conv2d_dense_grad", "cpu", dense_grad, dispatched=behind(check_dense_grad, dense_grad))
