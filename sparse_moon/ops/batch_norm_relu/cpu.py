"""The compiled CPU kernels of ``batch_norm_relu``: float32 or bfloat16, contiguous or channels_last."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_moon.ops.batch_norm_relu.checks import check_backward, check_forward
from sparse_moon.ops.batch_norm_relu.reference import backward_reference, fake, fake_backward, forward_reference
from sparse_moon.ops.cpu import TYPES, address
from sparse_moon.ops.layout import memory_format, without_gaps
from sparse_moon.ops.native import native
from sparse_moon.ops.registry import behind, implement


def takes(input: Tensor, alike: Sequence[Tensor | None], vectors: Sequence[Tensor | None]) -> bool:
    """Whether activations are all in float32 or all in bfloat16, and what has a number for each channel in float32."""
    if native is None or input.device.type != "cpu" or input.dtype not in TYPES:
        return False
    types = [(t, input.dtype) for t in (input, *alike)] + [(t, torch.float32) for t in vectors]
    return all(t is None or (t.dtype is dtype and t.device.type == "cpu" and t.numel() > 0) for t, dtype in types)


def _norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, *scalars: Any
) -> tuple[Any, ...]:
    """What to normalise with, as the extension takes it. ``scalars``: activation, whether the batch's statistics, eps.

    Planes of one number are rows of channels in either layout.
    """
    n, channels, height, width = input.shape
    channels_last = memory_format(input) == torch.channels_last or height * width == 1
    addresses = (address(t) for t in (weight, bias, input, mean, var))
    return (n, channels, height * width), channels_last, input.dtype is torch.bfloat16, *scalars, *addresses


def forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if not takes(input, (residual,), (weight, bias, mean, var)):
        return forward_reference(input, residual, weight, bias, mean, var, eps, activation)
    assert native is not None
    layout = memory_format(input)
    input = input.contiguous(memory_format=layout)
    residual = without_gaps(residual, layout)
    weight, bias, mean, var = (without_gaps(t) for t in (weight, bias, mean, var))
    output, batch_mean, batch_var = fake(input, residual, weight, bias, mean)
    statistics = (batch_mean, batch_var) if mean is None or var is None else (mean, var)
    norm = _norm(input, weight, bias, *statistics, activation, mean is None, eps)
    native.batch_norm_relu(norm, address(residual), output.data_ptr(), torch.get_num_threads())
    return output, batch_mean, batch_var


def backward(
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
    masked = activation != 0 or output is None  # the kernel reads an output for nothing else
    if not (masked and takes(input, (grad, output), (weight, bias, mean, var))):
        return backward_reference(grad, input, output, weight, bias, mean, var, eps, activation, batch_statistics)
    assert native is not None
    layout = memory_format(input)
    grad, input = grad.contiguous(memory_format=layout), input.contiguous(memory_format=layout)
    output = without_gaps(output, layout)
    mean, var = mean.contiguous(), var.contiguous()
    weight, bias = without_gaps(weight), without_gaps(bias)
    grads = fake_backward(grad, input, output, weight, bias, mean)
    input_grad, residual_grad, weight_grad, bias_grad = grads
    native.batch_norm_relu_backward(
        _norm(input, weight, bias, mean, var, activation, batch_statistics, eps),
        grad.data_ptr(), address(output), input_grad.data_ptr(),
        0 if output is None else residual_grad.data_ptr(), weight_grad.data_ptr(), bias_grad.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return grads


if native is not None:
    implement("batch_norm_relu", "cpu", forward, dispatched=behind(check_forward, forward))
    implement("batch_norm_relu_backward", "cpu", backward, dispatched=behind(check_backward, backward))
