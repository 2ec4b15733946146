"""The GPU kernels of the operators, registered for CUDA.

Products with blocks and vectors have Triton kernels, unstructured ones CUDA C++ kernels. They run where
:mod:`sparse_moon.ops.choice` finds that they pay, or where they are asked for; everything else goes to the operator's
reference, a dense product on the scattered weight (:mod:`sparse_moon.ops.masked_dense`). The small operators have CUDA
C++ kernels, which run wherever they were built.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from sparse_moon.ops import cuda_conv2d, cuda_linear, cuda_small_ops
from sparse_moon.ops import sparse_conv2d as conv2d
from sparse_moon.ops import sparse_linear as linear
from sparse_moon.ops.average_ import average_reference_
from sparse_moon.ops.bernoulli_mask import bernoulli_mask_reference, random_scores_reference
from sparse_moon.ops.check_index import guarded
from sparse_moon.ops.choice import Pass, Work, kernel_pays, kernel_runs, or_dense
from sparse_moon.ops.drop_and_grow import drop_and_grow_reference
from sparse_moon.ops.index import Index
from sparse_moon.ops.library import implement
from sparse_moon.ops.masked_dense import GPU_DTYPES, block_of, check_entries
from sparse_moon.ops.native import has_triton, native_cuda
from sparse_moon.ops.sparse_conv2d import Geometry
from sparse_moon.ops.transpose_index import transpose_index_reference

Choice = Literal["triton", "cuda", "reference"]


def _choose(work: Work, index: tuple[Tensor, ...], takes: Callable[[], bool], *operands: Tensor | None) -> Choice:
    """What runs a product; ``takes`` says whether Triton has a kernel for its blocks."""
    dtypes = {t.dtype for t in operands if t is not None}
    if len(dtypes) > 1 or not dtypes <= GPU_DTYPES:
        return "reference"
    kind: Literal["triton", "cuda"] = "cuda" if work.block == (1, 1) else "triton"
    blocks = (index[0].numel() - 1) * (index[2].numel() - 1)
    there = native_cuda is not None if kind == "cuda" else has_triton() and takes()
    if there and kernel_pays(work, index[1].numel() / max(blocks, 1), kind):
        return kind
    return "reference"


def _speed_dtype(dtype: torch.dtype, tf32: bool) -> str:
    """As :class:`Work` names it."""
    if dtype == torch.float32 and tf32:
        return "tf32"
    return "bfloat16" if dtype == torch.float16 else str(dtype).removeprefix("torch.")


def _rows(tensor: Tensor) -> Tensor:
    """(..., I) as (N, I), rows without gaps between their elements."""
    rows = linear._rows(tensor)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _linear_choice(
    pass_: Pass, x: Tensor, block: tuple[int, int], index: tuple[Tensor, ...], *operands: Tensor | None
) -> Choice:
    outputs, inputs = (index[0].numel() - 1) * block[0], (index[2].numel() - 1) * block[1]
    tokens, dtype = math.prod(x.shape[:-1]), x.dtype
    speed = _speed_dtype(dtype, _matmul_tf32())
    work = Work(pass_, tokens, inputs, outputs, 1, 1, 1, 1, x.device.type, block, speed)

    def takes() -> bool:
        from sparse_moon.kernels import sparse_linear

        return sparse_linear.takes(block, dtype)

    return _choose(work, index, takes, *operands)


def _matmul_tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def sparse_linear(input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, *index: Tensor) -> Tensor:
    check_entries(values, index[1])
    block = block_of(values)
    match _linear_choice("forward", input, block, index, input, values, bias):
        case "triton":
            from sparse_moon.kernels import sparse_linear as kernels

            output = linear._fake_forward(input, values, bias, probe, *index)
            x, y = _rows(input), linear._rows(output)
            kernels.sparse_linear(x, values.contiguous(), bias, index[0], index[1], y, allow_tf32=_matmul_tf32())
            return output
        case "cuda":
            return cuda_linear.sparse_linear(input, values, bias, index[0], index[1])
        case _:
            return linear._forward(input, values, bias, probe, *index)


def sparse_linear_input_grad(grad: Tensor, values: Tensor, *index: Tensor) -> Tensor:
    check_entries(values, index[1])
    block = block_of(values)
    match _linear_choice("input_grad", grad, block, index, grad, values):
        case "triton":
            from sparse_moon.kernels import sparse_linear as kernels

            result = linear._fake_input_grad(grad, values, *index)
            dx, transpose = linear._rows(result), _index(index)[2:]
            kernels.sparse_linear_input_grad(
                _rows(grad), values.contiguous(), *transpose, dx, allow_tf32=_matmul_tf32()
            )
            return result
        case "cuda":
            return cuda_linear.sparse_linear_input_grad(grad, values, *_index(index)[2:])
        case _:
            return linear._input_grad(grad, values, *index)


def sparse_linear_values_grad(grad: Tensor, input: Tensor, block: list[int], *index: Tensor) -> Tensor:
    shape = (block[0], block[1])
    match _linear_choice("values_grad", grad, shape, index, grad, input):
        case "triton":
            from sparse_moon.kernels import sparse_linear as kernels

            result = linear._fake_values_grad(grad, input, block, *index)
            kernels.sparse_linear_values_grad(
                _rows(grad), _rows(input), index[0], index[1], result, allow_tf32=_matmul_tf32()
            )
            return result
        case "cuda":
            return cuda_linear.sparse_linear_values_grad(grad, input, index[0], index[1])
        case _:
            return linear._values_grad(grad, input, block, *index)


def _conv2d_choice(
    pass_: Pass, input_shape: torch.Size | list[int], x: Tensor, block: tuple[int, int], geometry: Geometry,
    index: tuple[Tensor, ...], *operands: Tensor | None,
) -> Choice:  # fmt: skip
    outputs, inputs, *kernel = geometry.weight_shape
    work = Work(
        pass_, input_shape[0], inputs, outputs, math.prod(geometry.output_size(torch.Size(input_shape))),
        math.prod(kernel), max(geometry.stride), geometry.groups, x.device.type, block,
        _speed_dtype(x.dtype, _conv_tf32()),
    )  # fmt: skip

    def takes() -> bool:
        from sparse_moon.kernels import sparse_conv2d

        vectors_input_grad = pass_ == "input_grad" and block[1] == 1  # has no kernel
        return not vectors_input_grad and sparse_conv2d.takes(
            block, tuple(geometry.weight_shape), geometry.groups, x.dtype
        )

    return _choose(work, index, takes, *operands)


def _conv_tf32() -> bool:
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _empty_channels_last(shape: tuple[int, ...] | list[int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _as(layout_of: Tensor, result: Tensor) -> Tensor:
    """The result in the memory layout that the operator promises for this operand."""
    return result.contiguous(memory_format=conv2d.memory_format(layout_of))


def sparse_conv2d(input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, *spec: Any) -> Tensor:
    geometry, index = conv2d._split(spec)
    check_entries(values, index[1])
    block = block_of(values)
    match _conv2d_choice("forward", input.shape, input, block, geometry, index, input, values, bias):
        case "triton":
            from sparse_moon.kernels import sparse_conv2d as kernels

            shape = (input.shape[0], geometry.weight_shape[0], *geometry.output_size(input.shape))
            output = _empty_channels_last(shape, input)
            kernels.sparse_conv2d(
                _channels_last(input), values.contiguous(), bias, index[0], index[1], output, **_keywords(geometry)
            )
            return _as(input, output)
        case "cuda":
            return _as(input, cuda_conv2d.forward(input, values, bias, geometry, _index(index)))
        case _:
            return conv2d._forward(input, values, bias, probe, *spec)


def sparse_conv2d_input_grad(grad: Tensor, values: Tensor, input_shape: list[int], *spec: Any) -> Tensor:
    geometry, index = conv2d._split(spec)
    check_entries(values, index[1])
    block = block_of(values)
    match _conv2d_choice("input_grad", input_shape, grad, block, geometry, index, grad, values):
        case "triton":
            from sparse_moon.kernels import sparse_conv2d as kernels

            result = _empty_channels_last(input_shape, grad)
            kernels.sparse_conv2d_input_grad(
                _channels_last(grad), values.contiguous(), *_index(index)[2:], result, **_keywords(geometry)
            )
            return _as(grad, result)
        case "cuda":
            return _as(grad, cuda_conv2d.input_grad(grad, values, input_shape, geometry, _index(index)))
        case _:
            return conv2d._input_grad(grad, values, input_shape, *spec)


def sparse_conv2d_values_grad(grad: Tensor, input: Tensor, block: list[int], *spec: Any) -> Tensor:
    geometry, index = conv2d._split(spec)
    shape = (block[0], block[1])
    match _conv2d_choice("values_grad", input.shape, grad, shape, geometry, index, grad, input):
        case "triton":
            from sparse_moon.kernels import sparse_conv2d as kernels

            result = conv2d._fake_values_grad(grad, input, block, *spec)
            kernels.sparse_conv2d_values_grad(
                _channels_last(grad), _channels_last(input), index[0], index[1], result, **_keywords(geometry)
            )
            return result
        case "cuda":
            return cuda_conv2d.values_grad(grad, input, geometry, _index(index))
        case _:
            return conv2d._values_grad(grad, input, block, *spec)


def _keywords(geometry: Geometry) -> dict[str, Any]:
    return {**geometry._asdict(), "allow_tf32": _conv_tf32()}


def _index(index: tuple[Tensor, ...]) -> Index:
    row_ptr, col, t_ptr, t_row, t_perm = index
    return row_ptr, col, t_ptr, t_row, t_perm


def _small_operator(kernel: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        return (kernel if native_cuda is not None and kernel_runs("cuda") else reference)(*arguments)

    return run


for _name, _kernel, _reference in (
    ("average_", cuda_small_ops.average_, average_reference_),
    ("bernoulli_mask", cuda_small_ops.bernoulli_mask, bernoulli_mask_reference),
    ("drop_and_grow", cuda_small_ops.drop_and_grow, drop_and_grow_reference),
    ("random_scores", cuda_small_ops.random_scores, random_scores_reference),
    ("transpose_index", cuda_small_ops.transpose_index, transpose_index_reference),
):
    implement(_name, "cuda", _small_operator(_kernel, _reference))
_PRODUCTS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "sparse_linear": (sparse_linear, linear._forward),
    "sparse_linear_input_grad": (sparse_linear_input_grad, linear._input_grad),
    "sparse_linear_values_grad": (sparse_linear_values_grad, linear._values_grad),
    "sparse_conv2d": (sparse_conv2d, conv2d._forward),
    "sparse_conv2d_input_grad": (sparse_conv2d_input_grad, conv2d._input_grad),
    "sparse_conv2d_values_grad": (sparse_conv2d_values_grad, conv2d._values_grad),
}
for _name, (_sparse, _dense) in _PRODUCTS.items():
    _product = or_dense(native_cuda, _sparse, _dense)
    implement(_name, "cuda", _product, dispatched=guarded(_product, (linear.CHECKS | conv2d.CHECKS)[_name]))
