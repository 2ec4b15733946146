"""What ``batch_norm_relu`` computes, and its registration."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_moon.ops.activations import FUNCTIONS, times_derivative
from sparse_moon.ops.layout import memory_format
from sparse_moon.ops.registry import define

_PLANE = (0, 2, 3)


def batch_norm_relu_reference(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    activation: int,
) -> Tensor:
    """The specification; differentiable. Without ``mean`` and ``var`` those of the batch."""
    output = F.batch_norm(input, mean, var, weight, bias, training=mean is None, eps=eps)
    if residual is not None:
        output = output + residual
    return FUNCTIONS[activation](output)


def _statistics_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def forward_reference(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    output = batch_norm_relu_reference(input, residual, weight, bias, mean, var, eps, activation)
    output = output.contiguous(memory_format=memory_format(input))
    if mean is not None:
        return output, *fake(input, residual, weight, bias, mean)[1:]
    batch_var, batch_mean = torch.var_mean(input.to(_statistics_dtype(input)), _PLANE, correction=0)
    return output, batch_mean, batch_var


def fake(
    input: Tensor, residual: Tensor | None, weight: Any, bias: Any, mean: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch_mean = input.new_empty(input.shape[1] if mean is None else 0, dtype=_statistics_dtype(input))
    return torch.empty_like(input, memory_format=memory_format(input)), batch_mean, torch.empty_like(batch_mean)


def _column(t: Tensor) -> Tensor:
    return t[:, None, None]


def backward_reference(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: int,
    batch_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = mean.dtype
    scale = rstd = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    centred = input.to(dtype) - _column(mean)
    g, has_residual = grad.to(dtype), output is not None
    if activation:
        if output is None:
            output = centred * _column(scale) + (0 if bias is None else _column(bias))
        g = times_derivative(activation, g, output)
    bias_grad, product = g.sum(_PLANE), (g * centred).sum(_PLANE)
    input_grad = g
    if batch_statistics:
        count = input.numel() // input.shape[1]
        input_grad = g - _column(bias_grad / count) - centred * _column(rstd.square() * product / count)
    layout = memory_format(input)
    return (
        (input_grad * _column(scale)).to(input.dtype).contiguous(memory_format=layout),
        g.to(grad.dtype).contiguous(memory_format=layout) if has_residual else grad.new_empty(0),
        product * rstd,
        bias_grad,
    )


def fake_backward(
    grad: Tensor, input: Tensor, output: Tensor | None, weight: Any, bias: Any, mean: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    input_grad = torch.empty_like(input, memory_format=memory_format(input))
    residual_grad = grad.new_empty(0) if output is None else torch.empty_like(input_grad, dtype=grad.dtype)
    return input_grad, residual_grad, torch.empty_like(mean), torch.empty_like(mean)


OP = define("batch_norm_relu(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, "
             "float eps, int activation) -> (Tensor, Tensor, Tensor)", forward_reference, fake)  # fmt: skip
define("batch_norm_relu_backward(Tensor grad, Tensor input, Tensor? output, Tensor? weight, Tensor? bias, Tensor mean, "
       "Tensor var, float eps, int activation, bool batch_statistics) -> (Tensor, Tensor, Tensor, Tensor)",
       backward_reference, fake_backward)  # fmt: skip
