"""Unstructured sparse linear products by the CUDA kernels: outputs and workspaces around ``csrc/cuda/sparse_linear.h``.

Block (1, 1) only: ``values`` (n,), int32 indices. All tensors are on one GPU and share one of float32, float16 and
bfloat16; sums are fp32. Nothing waits for the device, so every function can be captured in a CUDA graph. Operands are
checked by the callers (:mod:`sparse_moon.ops.sparse_linear`).
"""

import torch
from torch import Tensor

from sparse_moon.ops.native import current_stream, require_cuda
from sparse_moon.ops.plan import Plan


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _product(
    input: Tensor, values: Tensor, bias: Tensor | None, ptr: Tensor, col: Tensor, perm: Tensor | None
) -> Tensor:
    """``input W^T + bias`` for the matrix whose rows are ``ptr``, ``col`` and ``values[perm]``."""
    native = require_cuda()
    rows, cols, n = ptr.numel() - 1, input.shape[-1], col.numel()
    input, values, bias = input.contiguous(), values.contiguous(), None if bias is None else bias.contiguous()
    output = input.new_empty((*input.shape[:-1], rows))
    tokens, dtype = input.shape[:-1].numel(), str(input.dtype)
    with torch.cuda.device(input.device):
        size = native.sparse_linear_workspace(dtype, tokens, rows, cols, n)
        workspace = torch.empty(size, dtype=torch.uint8, device=input.device)
        weight = (rows, cols, n, _address(ptr), _address(col), _address(perm))
        addresses = (_address(tensor) for tensor in (values, bias, input, output, workspace))
        native.sparse_linear(dtype, tokens, weight, *addresses, current_stream())
    return output


def forward(input: Tensor, values: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """``y = x W^T + b``: input (..., I), values (n,), bias (O,) or None to (..., O).

    Raises:
        RuntimeError: the extension was not built, or a launch failed.
    """
    return _product(input, values, bias, *plan.index[:2], None)


def input_grad(grad: Tensor, values: Tensor, plan: Plan) -> Tensor:
    """``dx = dy W``: grad (..., O), values (n,) to (..., I).

    Raises:
        RuntimeError: the extension was not built, or a launch failed.
    """
    return _product(grad, values, None, *plan.index[2:])


def values_grad(grad: Tensor, input: Tensor, plan: Plan) -> Tensor:
    """``dv[e] = sum_t dy[t, row e] x[t, col e]``: grad (..., O), input (..., I) to (n,), the same bits every time.

    Raises:
        RuntimeError: the extension was not built, or a launch failed.
    """
    native = require_cuda()
    (rows, cols), row_ptr, col = plan.shape, *plan.index[:2]
    n = col.numel()
    grad, input = grad.contiguous(), input.contiguous()
    result = input.new_empty(n)
    tokens, dtype = input.shape[:-1].numel(), str(input.dtype)
    with torch.cuda.device(input.device):
        size = native.sparse_linear_values_grad_workspace(dtype, tokens, rows, cols, n)
        workspace = torch.empty(size, dtype=torch.uint8, device=input.device)
        weight = (rows, cols, n, _address(row_ptr), _address(col), 0)
        addresses = (_address(tensor) for tensor in (grad, input, result, workspace))
        native.sparse_linear_values_grad(dtype, tokens, weight, *addresses, current_stream())
    return result
