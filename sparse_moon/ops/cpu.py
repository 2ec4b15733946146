"""The compiled CPU kernels of ``sparse_linear`` and ``sparse_conv2d``, registered for the CPU where they were built.

They compute in float32, and run where :mod:`sparse_moon.ops.choice` finds that they pay; bfloat16 operands are
converted to float32 and back. Everything else goes to the operator's reference.
"""

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparse_moon.ops.choice import Pass, Work, kernel_pays
from sparse_moon.ops.library import LIBRARY
from sparse_moon.ops.masked_dense import block_of
from sparse_moon.ops.native import native
from sparse_moon.ops.sparse_conv2d import Geometry, _split, memory_format
from sparse_moon.ops.sparse_conv2d import _fake_forward as _conv2d_empty
from sparse_moon.ops.sparse_conv2d import _fake_grads as _conv2d_grads_empty
from sparse_moon.ops.sparse_conv2d import _fake_input_grad as _conv2d_input_grad_empty
from sparse_moon.ops.sparse_conv2d import _fake_values_grad as _conv2d_values_grad_empty
from sparse_moon.ops.sparse_conv2d import _forward as _conv2d_reference
from sparse_moon.ops.sparse_conv2d import _grads as _conv2d_grads_reference
from sparse_moon.ops.sparse_conv2d import _input_grad as _conv2d_input_grad_reference
from sparse_moon.ops.sparse_conv2d import _values_grad as _conv2d_values_grad_reference
from sparse_moon.ops.sparse_linear import _fake_forward as _linear_empty
from sparse_moon.ops.sparse_linear import _fake_input_grad as _linear_input_grad_empty
from sparse_moon.ops.sparse_linear import _fake_values_grad as _linear_values_grad_empty
from sparse_moon.ops.sparse_linear import _forward as _linear_reference
from sparse_moon.ops.sparse_linear import _input_grad as _linear_input_grad_reference
from sparse_moon.ops.sparse_linear import _values_grad as _linear_values_grad_reference

# A dense product in bfloat16 is about this much faster than in float32, so the kernel pays at densities as much lower.
_BFLOAT16_DENSE_SPEED = 2.0


def _extension() -> ModuleType:
    assert native is not None
    return native


def _use_kernel(work: Work, index: tuple[Tensor, ...], *operands: Tensor | None) -> bool:
    """Whether the kernel takes these operands and pays for them."""
    row_ptr, col, t_ptr, _, _ = index
    blocks = (row_ptr.numel() - 1) * (t_ptr.numel() - 1)
    dtypes = {t.dtype for t in operands if t is not None}
    density = col.numel() / max(blocks, 1)
    if dtypes == {torch.bfloat16}:
        density *= _BFLOAT16_DENSE_SPEED
    return len(dtypes) == 1 and dtypes <= {torch.float32, torch.bfloat16} and kernel_pays(work, density)


def _linear_work(pass_: Pass, tokens: int, block: tuple[int, int], index: tuple[Tensor, ...]) -> Work:
    outputs, inputs = (index[0].numel() - 1) * block[0], (index[2].numel() - 1) * block[1]
    return Work(pass_, tokens, inputs, outputs, positions=1, taps=1, stride=1, groups=1)


def _conv2d_work(pass_: Pass, input_shape: torch.Size | list[int], geometry: Geometry) -> Work:
    outputs, inputs, *kernel = geometry.weight_shape
    positions = math.prod(geometry.output_size(torch.Size(input_shape)))
    return Work(
        pass_, input_shape[0], inputs, outputs, positions, math.prod(kernel), max(geometry.stride), geometry.groups
    )


def _matrix(values: Tensor | None, block: tuple[int, int], index: tuple[Tensor, ...]) -> tuple[int, ...]:
    """The weight as the extension takes it: shape, block shape, and the addresses of index and values."""
    row_ptr, _, t_ptr, _, _ = index
    shape = ((row_ptr.numel() - 1) * block[0], (t_ptr.numel() - 1) * block[1])
    return (*shape, *block, *(t.data_ptr() for t in index), 0 if values is None else values.data_ptr())


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors without gaps, floating point ones in float32."""
    return tuple((t.float() if t.is_floating_point() else t).contiguous() for t in tensors)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _tokens(tensor: Tensor) -> int:
    return math.prod(tensor.shape[:-1])


def _linear(input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, *index: Tensor) -> Tensor:
    if not _use_kernel(_linear_work("forward", _tokens(input), block_of(values), index), index, input, values, bias):
        return _linear_reference(input, values, bias, probe, *index)
    dtype = input.dtype
    input, values, *index_ = _contiguous(input, values, *index)
    bias = None if bias is None else bias.float().contiguous()
    output = _linear_empty(input, values, bias, probe, *index_)
    weight = _matrix(values, block_of(values), tuple(index_))
    _extension().sparse_linear(
        _tokens(input), weight, input.data_ptr(), _address(bias), output.data_ptr(), torch.get_num_threads()
    )
    return output.to(dtype)


def _linear_input_grad(grad: Tensor, values: Tensor, *index: Tensor) -> Tensor:
    if not _use_kernel(_linear_work("input_grad", _tokens(grad), block_of(values), index), index, grad, values):
        return _linear_input_grad_reference(grad, values, *index)
    dtype = grad.dtype
    grad, values, *index_ = _contiguous(grad, values, *index)
    result = _linear_input_grad_empty(grad, values, *index_)
    weight = _matrix(values, block_of(values), tuple(index_))
    _extension().sparse_linear_input_grad(
        _tokens(grad), weight, grad.data_ptr(), result.data_ptr(), torch.get_num_threads()
    )
    return result.to(dtype)


def _linear_values_grad(grad: Tensor, input: Tensor, block: list[int], *index: Tensor) -> Tensor:
    work = _linear_work("values_grad", _tokens(grad), (block[0], block[1]), index)
    if not _use_kernel(work, index, grad, input):
        return _linear_values_grad_reference(grad, input, block, *index)
    dtype = grad.dtype
    grad, input, *index_ = _contiguous(grad, input, *index)
    result = _linear_values_grad_empty(grad, input, block, *index_)
    weight = _matrix(None, (block[0], block[1]), tuple(index_))
    _extension().sparse_linear_values_grad(
        _tokens(grad), weight, grad.data_ptr(), input.data_ptr(), result.data_ptr(), torch.get_num_threads()
    )
    return result.to(dtype)


def _planes(tensor: Tensor) -> tuple[Tensor, bool]:
    """The tensor in float32 and without gaps, and whether it is channels_last."""
    layout = memory_format(tensor)
    return tensor.float().contiguous(memory_format=layout), layout == torch.channels_last


def _convolution(input_shape: torch.Size | list[int], geometry: Geometry) -> tuple[Any, ...]:
    """The convolution as the extension takes it."""
    batch, *in_size = input_shape
    out_size = (geometry.weight_shape[0], *geometry.output_size(torch.Size(input_shape)))
    weight_shape, *rest, groups = geometry
    return (batch, tuple(in_size), out_size, tuple(weight_shape[2:]), *(tuple(pair) for pair in rest), groups)


def _conv2d(input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, *spec: Any) -> Tensor:
    geometry, index = _split(spec)
    if not _use_kernel(_conv2d_work("forward", input.shape, geometry), index, input, values, bias):
        return _conv2d_reference(input, values, bias, probe, *spec)
    dtype = input.dtype
    input, channels_last = _planes(input)
    values, *index_ = _contiguous(values, *index)
    bias = None if bias is None else bias.float().contiguous()
    output = _conv2d_empty(input, values, bias, probe, *spec)
    _extension().sparse_conv2d(
        _convolution(input.shape, geometry), _matrix(values, block_of(values), tuple(index_)),
        input.data_ptr(), _address(bias), output.data_ptr(), channels_last, torch.get_num_threads(),
    )  # fmt: skip
    return output.to(dtype)


def _conv2d_input_grad(grad: Tensor, values: Tensor, input_shape: list[int], *spec: Any) -> Tensor:
    geometry, index = _split(spec)
    if not _use_kernel(_conv2d_work("input_grad", input_shape, geometry), index, grad, values):
        return _conv2d_input_grad_reference(grad, values, input_shape, *spec)
    dtype = grad.dtype
    grad, channels_last = _planes(grad)
    values, *index_ = _contiguous(values, *index)
    result = _conv2d_input_grad_empty(grad, values, input_shape, *spec)
    _extension().sparse_conv2d_input_grad(
        _convolution(input_shape, geometry), _matrix(values, block_of(values), tuple(index_)),
        grad.data_ptr(), result.data_ptr(), channels_last, torch.get_num_threads(),
    )  # fmt: skip
    return result.to(dtype)


def _conv2d_values_grad(grad: Tensor, input: Tensor, block: list[int], *spec: Any) -> Tensor:
    geometry, index = _split(spec)
    if not _use_kernel(_conv2d_work("values_grad", input.shape, geometry), index, grad, input):
        return _conv2d_values_grad_reference(grad, input, block, *spec)
    dtype = grad.dtype
    grad, grad_channels_last = _planes(grad)
    input, input_channels_last = _planes(input)
    index_ = _contiguous(*index)
    result = _conv2d_values_grad_empty(grad, input, block, *spec)
    _extension().sparse_conv2d_values_grad(
        _convolution(input.shape, geometry), _matrix(None, (block[0], block[1]), index_),
        grad.data_ptr(), grad_channels_last, input.data_ptr(), input_channels_last,
        result.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return result.to(dtype)


def _conv2d_grads(grad: Tensor, input: Tensor, values: Tensor, *spec: Any) -> tuple[Tensor, Tensor]:
    geometry, index = _split(spec)
    products: tuple[Pass, ...] = ("input_grad", "values_grad")
    works = [_conv2d_work(pass_, input.shape, geometry) for pass_ in products]
    if not all([_use_kernel(work, index, grad, input, values) for work in works]):
        return _conv2d_grads_reference(grad, input, values, *spec)
    dtype = grad.dtype
    grad, grad_channels_last = _planes(grad)
    input, input_channels_last = _planes(input)
    values, *index_ = _contiguous(values, *index)
    input_grad, values_grad = _conv2d_grads_empty(grad, input, values, *spec)
    _extension().sparse_conv2d_grads(
        _convolution(input.shape, geometry), _matrix(values, block_of(values), tuple(index_)),
        grad.data_ptr(), grad_channels_last, input.data_ptr(), input_channels_last,
        input_grad.data_ptr(), values_grad.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return input_grad.to(dtype), values_grad.to(dtype)


if native is not None:
    LIBRARY.impl("sparse_linear", _linear, "CPU")
    LIBRARY.impl("sparse_linear_input_grad", _linear_input_grad, "CPU")
    LIBRARY.impl("sparse_linear_values_grad", _linear_values_grad, "CPU")
    LIBRARY.impl("sparse_conv2d", _conv2d, "CPU")
    LIBRARY.impl("sparse_conv2d_input_grad", _conv2d_input_grad, "CPU")
    LIBRARY.impl("sparse_conv2d_values_grad", _conv2d_values_grad, "CPU")
    LIBRARY.impl("sparse_conv2d_grads", _conv2d_grads, "CPU")
