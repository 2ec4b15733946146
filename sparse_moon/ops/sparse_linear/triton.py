"""The Triton kernels of ``sparse_linear``, for weights of blocks and vectors."""

import torch
from torch import Tensor

from sparse_moon.ops.layout import without_gaps
from sparse_moon.ops.plan import Plan
from sparse_moon.ops.sparse_linear.api import fake_forward, fake_input_grad, fake_values_grad
from sparse_moon.ops.sparse_linear.dense import rows_of


def tf32() -> bool:
    """Whether torch allows it for products of matrices."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _allowed(allow_tf32: bool | None) -> bool:
    return tf32() if allow_tf32 is None else allow_tf32


def takes(block: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether there is a kernel for these blocks."""
    from sparse_moon.kernels import sparse_linear

    return sparse_linear.takes(block, dtype)


def _rows(tensor: Tensor) -> Tensor:
    """(..., I) as (N, I), rows without gaps between their elements."""
    rows = rows_of(tensor)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def forward(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    probe: Tensor | None,
    plan: Plan,
    allow_tf32: bool | None = None,
) -> Tensor:
    """``allow_tf32``: whether float32 products may round to TF32, here and below; by default what :func:`tf32` says."""
    from sparse_moon.kernels import sparse_linear as kernels

    output = fake_forward(input, values, bias, probe, plan)
    x, y = _rows(input), rows_of(output)
    kernels.sparse_linear(
        x, values.contiguous(), without_gaps(bias), *plan.index[:2], y, allow_tf32=_allowed(allow_tf32)
    )
    return output


def forward_gelu(input: Tensor, values: Tensor, bias: Tensor, activation: str, plan: Plan) -> tuple[Tensor, Tensor]:
    """The product with its bias, and GELU of that, ``"gelu"`` or ``"gelu_tanh"``."""
    from sparse_moon.kernels import sparse_linear as kernels

    before, output = (fake_forward(input, values, bias, None, plan) for _ in range(2))
    kernels.sparse_linear(
        _rows(input), values.contiguous(), without_gaps(bias), *plan.index[:2], rows_of(output), allow_tf32=tf32(),
        activated=kernels.Activated(rows_of(before), activation),
    )  # fmt: skip
    return before, output


def input_grad(grad: Tensor, values: Tensor, plan: Plan, allow_tf32: bool | None = None) -> Tensor:
    from sparse_moon.kernels import sparse_linear as kernels

    result = fake_input_grad(grad, values, plan)
    kernels.sparse_linear_input_grad(
        _rows(grad), values.contiguous(), *plan.index[2:], rows_of(result), allow_tf32=_allowed(allow_tf32)
    )
    return result


def input_grad_gelu(grad: Tensor, values: Tensor, before: Tensor, activation: str, plan: Plan) -> Tensor:
    """The gradient of ``before``, of which the input was GELU; not for vectors."""
    from sparse_moon.kernels import sparse_linear as kernels

    result = fake_input_grad(grad, values, plan)
    kernels.sparse_linear_input_grad(
        _rows(grad), values.contiguous(), *plan.index[2:], rows_of(result), allow_tf32=tf32(),
        activated=kernels.Activated(_rows(before), activation),
    )  # fmt: skip
    return result


def values_grad(grad: Tensor, input: Tensor, plan: Plan, allow_tf32: bool | None = None) -> Tensor:
    from sparse_moon.kernels import sparse_linear as kernels

    result = fake_values_grad(grad, input, plan)
    kernels.sparse_linear_values_grad(
        _rows(grad), _rows(input), *plan.index[:2], result, allow_tf32=_allowed(allow_tf32)
    )
    return result


def values_and_bias_grad(grad: Tensor, input: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    from sparse_moon.kernels import sparse_linear as kernels

    d_values, d_bias = fake_values_grad(grad, input, plan), grad.new_empty(plan.bias_shape)
    kernels.sparse_linear_values_grad(
        _rows(grad), _rows(input), *plan.index[:2], d_values, allow_tf32=tf32(), bias_grad=d_bias
    )
    return d_values, d_bias
