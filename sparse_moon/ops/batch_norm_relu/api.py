"""``batch_norm_relu``: batch norm of a batch of planes, a residual sum and an activation in one operator.

xhat = (x - mean) / sqrt(var + eps), y = activation(weight xhat + bias + residual)

with the mean and the biased variance of each channel, of the batch or given (Ioffe and Szegedy 2015).
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_moon.ops.activations import FUNCTIONS, LAST_FLAT, NAMES, Activation, times_derivative
from sparse_moon.ops.batch_norm_relu import cpu, gpu
from sparse_moon.ops.batch_norm_relu.checks import check_operands
from sparse_moon.ops.batch_norm_relu.reference import OP, forward_reference
from sparse_moon.ops.recompute import hang_recipe
from sparse_moon.ops.registry import call, differentiable_gradients, register_autograd, transformed


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, residual, weight, bias, mean, var, ctx.eps, ctx.activation = inputs
    ctx.batch_statistics = mean is None
    ctx.has_residual = residual is not None
    # Without a residual the mask follows from the input, which saves reading the output.
    masked = output[0] if ctx.activation and ctx.has_residual else None
    statistics = output[1:] if ctx.batch_statistics else (mean, var)
    ctx.save_for_backward(input, masked, weight, bias, *statistics)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    input, output, weight, bias, mean, var = ctx.saved_tensors
    input_grad, residual_grad, weight_grad, bias_grad = call(
        "batch_norm_relu_backward", grad, input, output, weight, bias, mean, var,
        ctx.eps, ctx.activation, ctx.batch_statistics,
    )  # fmt: skip
    if not ctx.activation:
        residual_grad = grad
    return (
        input_grad,
        residual_grad if ctx.has_residual else None,
        None if weight is None else weight_grad.to(weight.dtype),
        None if bias is None else bias_grad.to(bias.dtype),
        *(None,) * 4,
    )


def _again(eps: float, activation: int, input: Tensor, *operands: Tensor | None) -> Tensor:
    """The output from (input, weight, bias, mean, variance)."""
    return call("batch_norm_relu", input, None, *operands, eps, activation)[0]


def _differentiable_backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    input, output, weight, bias, mean, var = ctx.saved_tensors
    mean, var = (None, None) if ctx.batch_statistics else (mean, var)

    def norm(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        normed = F.batch_norm(input, mean, var, weight, bias, training=ctx.batch_statistics, eps=ctx.eps)
        return normed if ctx.has_residual else FUNCTIONS[ctx.activation](normed)

    if output is not None:
        grad = times_derivative(ctx.activation, grad, output)
    needs_input, needs_residual, *needs_affine = ctx.needs_input_grad[:4]
    needed = (needs_input, *needs_affine)
    d_input, d_weight, d_bias = differentiable_gradients(norm, (input, weight, bias), needed, grad)
    return d_input, grad if needs_residual else None, d_weight, d_bias, *(None,) * 4


_batch_norm_relu = register_autograd(
    OP,
    _backward,
    setup_context=_setup_context,
    reference=forward_reference,
    differentiable_backward=_differentiable_backward,
)


def batch_norm_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: Activation = "relu",
    recompute: bool = False,
) -> Tensor:
    """``activation(batch_norm(input) + residual)`` as torch computes it, in fewer passes over memory.

    On the CPU the compiled kernel takes float32, and activations in bfloat16 with all else in float32, as autocast has
    them; on a GPU Triton's take channels_last inputs in float32, float16 and bfloat16, with weights and statistics in
    that dtype or in float32. There the result is differentiable once by kernels. Everything else runs torch's own
    operators.

    Args:
        input: (N, C, H, W) floating point; the output has its layout, contiguous or channels_last.
        running_mean, running_var: (C,) or None. In training they are updated in place (with the unbiased variance, as
            torch does), otherwise they normalise the input.
        weight, bias: (C,) or None, 1 and 0.
        residual: (N, C, H, W) or None; added before the activation. ``"silu"`` and ``"hardswish"`` follow a sum as an
            operation of its own.
        training: normalise with the mean and the variance of the batch.
        momentum: share of the batch in the update of the running statistics.
        eps: added to the variance.
        activation: ``"none"``, ``"relu"``, ``"relu6"``, ``"silu"`` or ``"hardswish"``.
        recompute: let sparse convolutions of the output compute it again in the backward pass, to the same bits, in
            place of keeping it, where it takes no more than what is kept anyway: by the kernel, without a residual.

    Raises:
        ValueError: shapes that do not fit, an activation that is none of these, missing statistics, a negative eps, or
            in training an eps of 0 or a single value per channel.
    """
    vectors = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    if activation not in NAMES:
        raise ValueError(f"activation must be one of {NAMES}, got {activation!r}")
    number = NAMES.index(activation)
    check_operands(input, {"residual": residual}, vectors, eps, training, number)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given together")
    if not training and running_mean is None:
        raise ValueError("running_mean and running_var are needed outside training")
    count = input.shape[0] * input.shape[2] * input.shape[3]
    if training and count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")

    takes = gpu.takes if input.is_cuda else cpu.takes
    if transformed() or not takes(input, (residual,), tuple(vectors.values())):
        output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        in_place = not transformed()  # nobody else has the output
        if residual is not None:
            output = output.add_(residual) if in_place and residual.dtype == output.dtype else output + residual
        return FUNCTIONS[number](output, inplace=in_place)
    number, after = (number, 0) if residual is None or number <= LAST_FLAT else (0, number)
    mean, var = (None, None) if training else (running_mean, running_var)
    if mean is not None and var is not None and torch.is_grad_enabled():
        mean, var = mean.clone(), var.clone()  # a pass in training may write to them before the backward pass
    output, batch_mean, batch_var = _batch_norm_relu(input, residual, weight, bias, mean, var, eps, number)
    if training:
        mean, var = batch_mean, batch_var
    if recompute and residual is None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        hang_recipe(output, partial(_again, eps, number), input, weight, bias, mean, var)
    if training and running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(batch_mean.to(running_mean.dtype), momentum)
            running_var.lerp_((batch_var * (count / (count - 1))).to(running_var.dtype), momentum)
    return FUNCTIONS[after](output)
