"""The Triton kernels of ``batch_norm_relu``: channels_last activations in float32 or 16 bits.

All else on a GPU is computed by torch's own operators.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_moon.ops.batch_norm_relu.checks import check_backward, check_forward
from sparse_moon.ops.batch_norm_relu.reference import backward_reference, fake, fake_backward, forward_reference
from sparse_moon.ops.choice import kernel_runs
from sparse_moon.ops.layout import without_gaps
from sparse_moon.ops.masked_dense import GPU_DTYPES
from sparse_moon.ops.native import has_triton
from sparse_moon.ops.registry import behind, implement


def takes(input: Tensor, alike: Sequence[Tensor | None], vectors: Sequence[Tensor | None]) -> bool:
    """Whether the kernels compute with these; a compiler decides by what it knows, and finds the operator's reference
    where Triton is missing."""
    if input.dtype not in GPU_DTYPES or input.numel() == 0:
        return False
    if not input.is_contiguous(memory_format=torch.channels_last):
        return False
    for tensor in alike:
        if tensor is not None and (tensor.dtype != input.dtype or tensor.device != input.device):
            return False
    for vector in vectors:
        if vector is not None and (vector.dtype not in (torch.float32, input.dtype) or vector.device != input.device):
            return False
    return torch.compiler.is_compiling() or (has_triton() and kernel_runs("triton"))


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
    from sparse_moon.kernels.batch_norm_relu import batch_norm_relu as launch

    output, batch_mean, batch_var = fake(input, residual, weight, bias, mean)
    batch_statistics = mean is None or var is None
    mean, var = (batch_mean, batch_var) if mean is None or var is None else (mean.contiguous(), var.contiguous())
    launch(
        input, without_gaps(residual, torch.channels_last), without_gaps(weight), without_gaps(bias), mean, var, output,
        eps, activation, batch_statistics,
    )  # fmt: skip
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
    masked = activation != 0 or output is None  # the kernels read an output for nothing else
    if not (masked and takes(input, (grad, output), (weight, bias, mean, var))):
        return backward_reference(grad, input, output, weight, bias, mean, var, eps, activation, batch_statistics)
    from sparse_moon.kernels.batch_norm_relu import batch_norm_relu_backward as launch

    grads = fake_backward(grad, input, output, weight, bias, mean)
    input_grad, residual_grad, weight_grad, bias_grad = grads
    launch(
        grad.contiguous(memory_format=torch.channels_last), input, without_gaps(output, torch.channels_last),
        without_gaps(weight), without_gaps(bias), mean.contiguous(), var.contiguous(), input_grad,
        None if output is None else residual_grad, weight_grad, bias_grad, eps, activation, batch_statistics,
    )  # fmt: skip
    return grads


implement("batch_norm_relu", "cuda", forward, dispatched=behind(check_forward, forward))
implement("batch_norm_relu_backward", "cuda", backward, dispatched=behind(check_backward, backward))
