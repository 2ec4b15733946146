"""``sparse_linear`` as a dense product on the scattered weight, on any device."""

import math

import torch.nn.functional as F
from torch import Tensor

from sparse_moon.ops.dense_weight import backward_weight, forward_weight, gathered
from sparse_moon.ops.plan import Plan


def rows_of(tensor: Tensor) -> Tensor:
    """(..., I) as (N, I); of no features -1 rows could be any number."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def forward(input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, plan: Plan) -> Tensor:
    return F.linear(input, forward_weight(values, plan), bias)


def input_grad(grad: Tensor, values: Tensor, plan: Plan) -> Tensor:
    return grad @ backward_weight(values, plan)


def dense_grad(grad: Tensor, input: Tensor) -> Tensor:
    if grad.dim() != 2:
        grad, input = rows_of(grad), rows_of(input)
    return grad.t() @ input


def grads(grad: Tensor, input: Tensor, values: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    return input_grad(grad, values, plan), values_grad(grad, input, plan)


def values_grad(grad: Tensor, input: Tensor, plan: Plan) -> Tensor:
    return gathered(dense_grad(grad, input), plan)
