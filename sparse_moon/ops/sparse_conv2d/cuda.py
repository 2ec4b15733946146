"""The CUDA kernels of ``sparse_conv2d`` for unstructured weights: outputs and workspaces here, launches in C++.

Activations, values and bias share one dtype out of float32, float16 and bfloat16, on one GPU; sums are in float32.
Results are channels_last, whatever comes in, and have the same bits every time. Nothing here waits for the GPU, so
calls can be captured in a CUDA graph. Shapes are those of :mod:`sparse_moon.ops.sparse_conv2d`, with blocks of (1, 1).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_moon.ops.index import Index
from sparse_moon.ops.native import current_stream, require_cuda
from sparse_moon.ops.plan import Geometry, Plan, geometry_of

_Pair = tuple[int, ...]
_Convolution = tuple[int, _Pair, _Pair, _Pair, _Pair, _Pair, _Pair, int]


def _convolution(input_shape: Sequence[int], geometry: Geometry) -> _Convolution:
    """The convolution as the extension takes it."""
    batch, *in_size = input_shape
    weight_shape, stride, padding, dilation, groups = geometry
    out_size = (weight_shape[0], *geometry.output_size(torch.Size(input_shape)))
    return (
        batch, tuple(in_size), out_size, tuple(weight_shape[2:]), tuple(stride), tuple(padding), tuple(dilation), groups
    )  # fmt: skip


def _contiguous(index: Index) -> Index:
    row_ptr, col, t_ptr, t_row, t_perm = (tensor.contiguous() for tensor in index)
    return row_ptr, col, t_ptr, t_row, t_perm


def _addresses(index: Index) -> tuple[int, list[int]]:
    """Number of entries and addresses of the index tensors."""
    return index[1].numel(), [tensor.data_ptr() for tensor in index]


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _workspace(pass_: str, convolution: _Convolution, like: Tensor, n: int) -> Tensor:
    size = require_cuda().sparse_conv2d_workspace(pass_, convolution, str(like.dtype), n)
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def forward(input: Tensor, values: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """(N, O, Ho, Wo) from an input (N, C, H, W), values (n,) and a bias (O,) or None."""
    input, values, index = _channels_last(input), values.contiguous(), _contiguous(plan.index)
    bias = None if bias is None else bias.contiguous()
    convolution = _convolution(input.shape, geometry_of(plan))
    output = _empty((input.shape[0], *convolution[2]), input)
    with torch.cuda.device(input.device):
        workspace = _workspace("forward", convolution, input, values.numel())
        require_cuda().sparse_conv2d(
            convolution, str(input.dtype), _addresses(index), values.data_ptr(), input.data_ptr(),
            0 if bias is None else bias.data_ptr(), output.data_ptr(), workspace.data_ptr(), current_stream(),
        )  # fmt: skip
    return output


def input_grad(grad: Tensor, values: Tensor, input_shape: Sequence[int], plan: Plan) -> Tensor:
    """The input's gradient, of shape ``input_shape``, from the output's (N, O, Ho, Wo) and values (n,)."""
    grad, values, index = _channels_last(grad), values.contiguous(), _contiguous(plan.index)
    convolution = _convolution(input_shape, geometry_of(plan))
    result = _empty(input_shape, grad)
    with torch.cuda.device(grad.device):
        workspace = _workspace("input_grad", convolution, grad, values.numel())
        require_cuda().sparse_conv2d_input_grad(
            convolution, str(grad.dtype), _addresses(index), values.data_ptr(), grad.data_ptr(),
            result.data_ptr(), workspace.data_ptr(), current_stream(),
        )  # fmt: skip
    return result


def values_grad(grad: Tensor, input: Tensor, plan: Plan) -> Tensor:
    """The values' gradient (n,) from the output's (N, O, Ho, Wo) and the input (N, C, H, W)."""
    grad, input, index = _channels_last(grad), _channels_last(input), _contiguous(plan.index)
    convolution = _convolution(input.shape, geometry_of(plan))
    result = torch.empty(index[1].shape, dtype=grad.dtype, device=grad.device)
    with torch.cuda.device(grad.device):
        workspace = _workspace("values_grad", convolution, grad, result.numel())
        require_cuda().sparse_conv2d_values_grad(
            convolution, str(grad.dtype), _addresses(index), grad.data_ptr(), input.data_ptr(),
            result.data_ptr(), workspace.data_ptr(), current_stream(),
        )  # fmt: skip
    return result
