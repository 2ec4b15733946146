"""The compiled CPU kernels of ``sparse_conv2d``.

They compute in float32, and run where :mod:`sparse_moon.ops.choice` finds that they pay; bfloat16 operands are
converted to float32 and back. Everything else is a dense product: of a 3 x 3 convolution in float32 by Winograd's
products, which take about half of torch's time, else by torch's.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, get_num_threads

from sparse_moon.ops.choice import PASSES, Pass, Work, or_dense, winograd_pays
from sparse_moon.ops.cpu import address, as_dtype, empty, kernel_takes, kernels, matrix, packed
from sparse_moon.ops.dense_weight import backward_weight, forward_weight
from sparse_moon.ops.index import weight_to_matrix
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
def shapes_of(input_shape: tuple[int, ...], geometry: Geometry, layout: torch.memory_format) -> Shapes:
    """Those of inputs of this shape and layout."""
    (outputs, inputs, *kernel), *rest, groups = geometry
    batch, in_shape = input_shape[0], input_shape[1:]
    out_size = geometry.output_size(input_shape)
    sizes = (batch, inputs, outputs, math.prod(out_size), math.prod(kernel), max(geometry.stride), groups)
    works = {pass_: Work(pass_, *sizes, channels_last=layout == torch.channels_last) for pass_ in PASSES}
    plain = kernel == [3, 3] and geometry.dilation == (1, 1) and min(*input_shape[2:], *out_size) >= _LEAST_SIZE
    winograd = plain and winograd_pays(works["forward"])
    convolution = kernels.Conv2d(batch, in_shape, (outputs, *out_size), tuple(kernel), *rest, groups)
    return Shapes(works, winograd, convolution, (batch, outputs, *out_size))


def _all_float32(*operands: Tensor | None) -> bool:
    return all(t is None or t.dtype == torch.float32 for t in operands)


def forward(input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, plan: Plan) -> Tensor:
    layout = memory_format(input)
    shapes = shapes_of(input.shape, geometry_of(plan), layout)
    sparse = kernel_takes(shapes.works["forward"], plan, input, values, bias)
    if not sparse and not (shapes.winograd and _all_float32(input, values, bias)):
        return dense.forward(input, values, bias, probe, plan)
    dtype, input, values = input.dtype, packed(input, layout), packed(values)
    bias = None if bias is None else packed(bias)
    output = empty(shapes.output, layout)
    if not sparse:
        weight = forward_weight(values, plan)
        kernels.winograd_conv2d(
            shapes.convolution, weight.data_ptr(), input.data_ptr(), address(bias), output.data_ptr(),
            layout == torch.channels_last, get_num_threads(),
        )  # fmt: skip
        return output
    kernels.sparse_conv2d(
        shapes.convolution, matrix(plan, values), input.data_ptr(), address(bias), output.data_ptr(),
        layout == torch.channels_last, get_num_threads(),
    )  # fmt: skip
    return as_dtype(dtype, output)


def input_grad(grad: Tensor, values: Tensor, input_shape: Sequence[int], plan: Plan) -> Tensor:
    layout = memory_format(grad)
    shapes = shapes_of(tuple(input_shape), geometry_of(plan), layout)
    sparse = kernel_takes(shapes.works["input_grad"], plan, grad, values)
    if not sparse and not (shapes.winograd and _all_float32(grad, values)):
        return dense.input_grad(grad, values, list(input_shape), plan)
    dtype, grad, values = grad.dtype, packed(grad, layout), packed(values)
    result = empty(input_shape, layout)
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
    return as_dtype(dtype, result)


def values_grad(grad: Tensor, input: Tensor, plan: Plan) -> Tensor:
    grad_layout, layout = memory_format(grad), memory_format(input)
    shapes = shapes_of(input.shape, geometry_of(plan), layout)
    if not kernel_takes(shapes.works["values_grad"], plan, grad, input):
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
    geometry = Geometry.of(*parts)
    grad_layout, layout = memory_format(grad), memory_format(input)
    shapes = shapes_of(input.shape, geometry, layout)
    if not (shapes.winograd and _all_float32(grad, input)):
        return dense.dense_grad(grad, input, block_width, *parts)
    grad, input = packed(grad, grad_layout), packed(input, layout)
    result = empty(geometry.weight_shape)
    kernels.winograd_weight_grad(
        shapes.convolution, grad.data_ptr(), grad_layout == torch.channels_last, input.data_ptr(),
        layout == torch.channels_last, result.data_ptr(), get_num_threads(),
    )  # fmt: skip
    return weight_to_matrix(result, block_width).contiguous()


def grads(grad: Tensor, input: Tensor, values: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    grad_layout, layout = memory_format(grad), memory_format(input)
    shapes = shapes_of(input.shape, geometry_of(plan), layout)
    if not kernel_takes(shapes.works["grads"], plan, grad, input, values):
        by_winograd = shapes.winograd and _all_float32(grad, input, values)
        return (separate_grads if by_winograd else dense.grads)(grad, input, values, plan)
    dtype, grad, input, values = grad.dtype, packed(grad, grad_layout), packed(input, layout), packed(values)
    d_input, d_values = torch.empty_like(input, memory_format=grad_layout), torch.empty_like(values)
    kernels.sparse_conv2d_grads(
        shapes.convolution, matrix(plan, values), grad.data_ptr(), grad_layout == torch.channels_last,
        input.data_ptr(), layout == torch.channels_last, d_input.data_ptr(), d_values.data_ptr(),
        get_num_threads(),
    )  # fmt: skip
    return as_dtype(dtype, d_input), as_dtype(dtype, d_values)


if native is not None:
    FORWARD.implement("cpu", or_dense(native, forward, dense.forward))
    INPUT_GRAD.implement("cpu", or_dense(native, input_grad, dense.input_grad))
    VALUES_GRAD.implement("cpu", or_dense(native, values_grad, dense.values_grad))
    GRADS.implement("cpu", or_dense(native, grads, dense.grads))
    implement("sparse_conv2d_dense_grad", "cpu", dense_grad, dispatched=behind(check_dense_grad, dense_grad))
