"""The compiled CPU kernels of ``sparse_linear`` and ``sparse_conv2d``, registered for the CPU where they were built.

They compute in float32, and run where :mod:`sparse_moon.ops.choice` finds that they pay; bfloat16 operands are
converted to float32 and back. Everything else is a dense product: of a 3 x 3 convolution in float32 by Winograd's
products, which take about half of torch's time, else by the operator's reference.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_moon.ops.check_index import guarded
from sparse_moon.ops.choice import PASSES, Pass, Work, kernel_pays, or_dense, winograd_pays
from sparse_moon.ops.index import weight_to_matrix
from sparse_moon.ops.library import behind, call, implement
from sparse_moon.ops.masked_dense import block_of, check_entries, values_shape
from sparse_moon.ops.native import native
from sparse_moon.ops.sparse_conv2d import CHECKS as CONV2D_CHECKS
from sparse_moon.ops.sparse_conv2d import Geometry, _split, check_dense_grad, memory_format
from sparse_moon.ops.sparse_conv2d import _dense_grad as _conv2d_dense_grad_reference
from sparse_moon.ops.sparse_conv2d import _dense_grads as _conv2d_dense_grads
from sparse_moon.ops.sparse_conv2d import _forward as _conv2d_reference
from sparse_moon.ops.sparse_conv2d import _grads as _conv2d_separate_grads
from sparse_moon.ops.sparse_conv2d import _input_grad as _conv2d_input_grad_reference
from sparse_moon.ops.sparse_conv2d import _values_grad as _conv2d_values_grad_reference
from sparse_moon.ops.sparse_linear import CHECKS as LINEAR_CHECKS
from sparse_moon.ops.sparse_linear import _forward as _linear_reference
from sparse_moon.ops.sparse_linear import _input_grad as _linear_input_grad_reference
from sparse_moon.ops.sparse_linear import _values_grad as _linear_values_grad_reference

# A dense product in bfloat16 is about this much faster than in float32, so the kernel pays at densities as much lower;
# but no faster than Winograd's in float32 (23.4 and 23.5 ms for 64 channels, 128 images of 32 x 32, on Zen 4).
_BFLOAT16_DENSE_SPEED = 2.0

# Winograd's products of a smaller plane are mostly of its padding.
_LEAST_SIZE = 4


def _extension() -> ModuleType:
    assert native is not None
    return native


def _use_kernel(work: Work, index: tuple[Tensor, ...], *operands: Tensor | None) -> bool:
    """Whether the kernel takes these operands and pays for them."""
    row_ptr, col, t_ptr, _, _ = index
    blocks = (row_ptr.numel() - 1) * (t_ptr.numel() - 1)
    dtypes = {t.dtype for t in operands if t is not None}
    density = col.numel() / max(blocks, 1)
    if dtypes == {torch.bfloat16} and not winograd_pays(work):
        density *= _BFLOAT16_DENSE_SPEED
    return len(dtypes) == 1 and dtypes <= {torch.float32, torch.bfloat16} and kernel_pays(work, density)


def _linear_work(pass_: Pass, tokens: int, block: Sequence[int], index: tuple[Tensor, ...]) -> Work:
    outputs, inputs = (index[0].numel() - 1) * block[0], (index[2].numel() - 1) * block[1]
    return Work(pass_, tokens, inputs, outputs, positions=1, taps=1, stride=1, groups=1)


class _Plan(NamedTuple):
    """What the shapes of a convolution determine, which small ones would spend much of their time on."""

    works: dict[Pass, Work]
    winograd: bool  # whether its dense products in float32 are Winograd's
    convolution: tuple[Any, ...]  # as the extension takes it
    output_shape: tuple[int, ...]


@lru_cache(maxsize=1024)
def _plan(input_shape: tuple[int, ...], geometry: Geometry, layout: torch.memory_format) -> _Plan:
    (outputs, inputs, *kernel), *rest, groups = geometry
    batch, in_shape = input_shape[0], input_shape[1:]
    out_size = geometry.output_size(input_shape)
    sizes = (batch, inputs, outputs, math.prod(out_size), math.prod(kernel), max(geometry.stride), groups)
    works = {pass_: Work(pass_, *sizes, channels_last=layout == torch.channels_last) for pass_ in PASSES}
    plain = kernel == [3, 3] and geometry.dilation == (1, 1) and min(*input_shape[2:], *out_size) >= _LEAST_SIZE
    winograd = plain and winograd_pays(works["forward"])
    convolution = (batch, in_shape, (outputs, *out_size), tuple(kernel), *rest, groups)
    return _Plan(works, winograd, convolution, (batch, outputs, *out_size))


def _matrix(values: Tensor | None, block: Sequence[int], index: tuple[Tensor, ...]) -> tuple[int, ...]:
    """The weight as the extension takes it: shape, block shape, and the addresses of index and values."""
    row_ptr, col, t_ptr, _, _ = index
    if values is not None:
        check_entries(values, col)
    shape = ((row_ptr.numel() - 1) * block[0], (t_ptr.numel() - 1) * block[1])
    return (*shape, *block, *(t.data_ptr() for t in index), 0 if values is None else values.data_ptr())


def _packed(tensor: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """The tensor in float32 and without gaps."""
    return tensor.float().contiguous(memory_format=layout)


def _contiguous(index: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple([t.contiguous() for t in index])


def _empty(shape: Sequence[int], layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=layout)


def _all_float32(*operands: Tensor | None) -> bool:
    return all(t is None or t.dtype == torch.float32 for t in operands)


def _dense_weight(values: Tensor, geometry: Geometry, index: tuple[Tensor, ...]) -> Tensor:
    return call("scatter_values", values, geometry.weight_shape, False, *index[:2])


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _tokens(tensor: Tensor) -> int:
    return math.prod(tensor.shape[:-1])


def _linear(input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, *index: Tensor) -> Tensor:
    work = _linear_work("forward", _tokens(input), block_of(values), index)
    if not _use_kernel(work, index, input, values, bias):
        return _linear_reference(input, values, bias, probe, *index)
    dtype, index = input.dtype, _contiguous(index)
    input, values = _packed(input), _packed(values)
    bias = None if bias is None else _packed(bias)
    output = _empty((*input.shape[:-1], work.outputs))
    _extension().sparse_linear(
        work.batch, _matrix(values, block_of(values), index), input.data_ptr(), _address(bias), output.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return output.to(dtype)


def _linear_input_grad(grad: Tensor, values: Tensor, *index: Tensor) -> Tensor:
    work = _linear_work("input_grad", _tokens(grad), block_of(values), index)
    if not _use_kernel(work, index, grad, values):
        return _linear_input_grad_reference(grad, values, *index)
    dtype, index = grad.dtype, _contiguous(index)
    grad, values = _packed(grad), _packed(values)
    result = _empty((*grad.shape[:-1], work.inputs))
    _extension().sparse_linear_input_grad(
        work.batch, _matrix(values, block_of(values), index), grad.data_ptr(), result.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return result.to(dtype)


def _linear_values_grad(grad: Tensor, input: Tensor, block: Sequence[int], *index: Tensor) -> Tensor:
    work = _linear_work("values_grad", _tokens(grad), block, index)
    if not _use_kernel(work, index, grad, input):
        return _linear_values_grad_reference(grad, input, block, *index)
    dtype, index = grad.dtype, _contiguous(index)
    grad, input = _packed(grad), _packed(input)
    result = _empty(values_shape(index[1], block))
    _extension().sparse_linear_values_grad(
        work.batch, _matrix(None, block, index), grad.data_ptr(), input.data_ptr(), result.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return result.to(dtype)


def _conv2d(input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, *spec: Any) -> Tensor:
    geometry, index = _split(spec)
    layout = memory_format(input)
    plan = _plan(tuple(input.shape), geometry, layout)
    sparse = _use_kernel(plan.works["forward"], index, input, values, bias)
    if not sparse and not (plan.winograd and _all_float32(input, values, bias)):
        return _conv2d_reference(input, values, bias, probe, *spec)
    dtype, index = input.dtype, _contiguous(index)
    input, values = _packed(input, layout), _packed(values)
    bias = None if bias is None else _packed(bias)
    output = _empty(plan.output_shape, layout)
    if not sparse:
        weight = _dense_weight(values, geometry, index)
        _extension().winograd_conv2d(
            plan.convolution, weight.data_ptr(), input.data_ptr(), _address(bias), output.data_ptr(),
            layout == torch.channels_last, torch.get_num_threads(),
        )  # fmt: skip
        return output
    _extension().sparse_conv2d(
        plan.convolution, _matrix(values, block_of(values), index), input.data_ptr(), _address(bias),
        output.data_ptr(), layout == torch.channels_last, torch.get_num_threads(),
    )  # fmt: skip
    return output.to(dtype)


def _conv2d_input_grad(grad: Tensor, values: Tensor, input_shape: Sequence[int], *spec: Any) -> Tensor:
    geometry, index = _split(spec)
    layout = memory_format(grad)
    plan = _plan(tuple(input_shape), geometry, layout)
    sparse = _use_kernel(plan.works["input_grad"], index, grad, values)
    if not sparse and not (plan.winograd and _all_float32(grad, values)):
        return _conv2d_input_grad_reference(grad, values, list(input_shape), *spec)
    dtype, index = grad.dtype, _contiguous(index)
    grad, values = _packed(grad, layout), _packed(values)
    result = _empty(input_shape, layout)
    if not sparse:
        weight = _dense_weight(values, geometry, index)
        _extension().winograd_input_grad(
            plan.convolution, weight.data_ptr(), grad.data_ptr(), result.data_ptr(), layout == torch.channels_last,
            torch.get_num_threads(),
        )  # fmt: skip
        return result
    _extension().sparse_conv2d_input_grad(
        plan.convolution, _matrix(values, block_of(values), index), grad.data_ptr(), result.data_ptr(),
        layout == torch.channels_last, torch.get_num_threads(),
    )  # fmt: skip
    return result.to(dtype)


def _conv2d_values_grad(grad: Tensor, input: Tensor, block: Sequence[int], *spec: Any) -> Tensor:
    geometry, index = _split(spec)
    grad_layout, layout = memory_format(grad), memory_format(input)
    plan = _plan(tuple(input.shape), geometry, layout)
    if not _use_kernel(plan.works["values_grad"], index, grad, input):
        return _conv2d_values_grad_reference(grad, input, block, *spec)
    dtype, index = grad.dtype, _contiguous(index)
    grad, input = _packed(grad, grad_layout), _packed(input, layout)
    result = _empty(values_shape(index[1], block))
    _extension().sparse_conv2d_values_grad(
        plan.convolution, _matrix(None, block, index), grad.data_ptr(), grad_layout == torch.channels_last,
        input.data_ptr(), layout == torch.channels_last, result.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return result.to(dtype)


def _conv2d_dense_grad(grad: Tensor, input: Tensor, block_width: int, *spec: Any) -> Tensor:
    geometry, _ = _split(spec)
    grad_layout, layout = memory_format(grad), memory_format(input)
    plan = _plan(tuple(input.shape), geometry, layout)
    if not (plan.winograd and _all_float32(grad, input)):
        return _conv2d_dense_grad_reference(grad, input, block_width, *spec)
    grad, input = _packed(grad, grad_layout), _packed(input, layout)
    result = _empty(geometry.weight_shape)
    _extension().winograd_weight_grad(
        plan.convolution, grad.data_ptr(), grad_layout == torch.channels_last, input.data_ptr(),
        layout == torch.channels_last, result.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return weight_to_matrix(result, block_width).contiguous()


def _conv2d_grads(grad: Tensor, input: Tensor, values: Tensor, *spec: Any) -> tuple[Tensor, Tensor]:
    geometry, index = _split(spec)
    grad_layout, layout = memory_format(grad), memory_format(input)
    plan = _plan(tuple(input.shape), geometry, layout)
    if not _use_kernel(plan.works["grads"], index, grad, input, values):
        if plan.winograd and _all_float32(grad, input, values):
            return _conv2d_separate_grads(grad, input, values, *spec)
        return _conv2d_dense_grads(grad, input, values, *spec)
    dtype, index = grad.dtype, _contiguous(index)
    grad, input, values = _packed(grad, grad_layout), _packed(input, layout), _packed(values)
    input_grad = _empty(input.shape, grad_layout)
    values_grad = _empty(values.shape)
    _extension().sparse_conv2d_grads(
        plan.convolution, _matrix(values, block_of(values), index), grad.data_ptr(),
        grad_layout == torch.channels_last, input.data_ptr(), layout == torch.channels_last,
        input_grad.data_ptr(), values_grad.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return input_grad.to(dtype), values_grad.to(dtype)


if native is not None:
    for _name, _kernel, _reference in (
        ("sparse_linear", _linear, _linear_reference),
        ("sparse_linear_input_grad", _linear_input_grad, _linear_input_grad_reference),
        ("sparse_linear_values_grad", _linear_values_grad, _linear_values_grad_reference),
        ("sparse_conv2d", _conv2d, _conv2d_reference),
        ("sparse_conv2d_input_grad", _conv2d_input_grad, _conv2d_input_grad_reference),
        ("sparse_conv2d_values_grad", _conv2d_values_grad, _conv2d_values_grad_reference),
        ("sparse_conv2d_grads", _conv2d_grads, _conv2d_dense_grads),
    ):
        _product = or_dense(native, _kernel, _reference)
        _check = (LINEAR_CHECKS | CONV2D_CHECKS)[_name]
        implement(_name, "cpu", _product, dispatched=guarded(_product, _check))
    _dispatched = behind(check_dense_grad, _conv2d_dense_grad)
    implement("sparse_conv2d_dense_grad", "cpu", _conv2d_dense_grad, dispatched=_dispatched)
