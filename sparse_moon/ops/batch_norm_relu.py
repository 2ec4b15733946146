"""``batch_norm_relu``: batch norm of a batch of planes, a residual sum and an activation in one operator.

xhat = (x - mean) / sqrt(var + eps), y = activation(weight xhat + bias + residual)

with the mean and the biased variance of each channel, of the batch or given (Ioffe and Szegedy 2015).
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_moon.ops.activations import FUNCTIONS, LAST_FLAT, NAMES, Activation, times_derivative
from sparse_moon.ops.layout import memory_format
from sparse_moon.ops.native import native
from sparse_moon.ops.recompute import hang_recipe
from sparse_moon.ops.registry import (
    behind,
    call,
    define,
    differentiable_gradients,
    implement,
    register_autograd,
    transformed,
)

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


def _forward(
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
        return output, *_fake(input, residual, weight, bias, mean)[1:]
    batch_var, batch_mean = torch.var_mean(input.to(_statistics_dtype(input)), _PLANE, correction=0)
    return output, batch_mean, batch_var


def _fake(
    input: Tensor, residual: Tensor | None, weight: Any, bias: Any, mean: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch_mean = input.new_empty(input.shape[1] if mean is None else 0, dtype=_statistics_dtype(input))
    return torch.empty_like(input, memory_format=memory_format(input)), batch_mean, torch.empty_like(batch_mean)


def _column(t: Tensor) -> Tensor:
    return t[:, None, None]


def _backward_reference(
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


def _backward_fake(
    grad: Tensor, input: Tensor, output: Tensor | None, weight: Any, bias: Any, mean: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    input_grad = torch.empty_like(input, memory_format=memory_format(input))
    residual_grad = grad.new_empty(0) if output is None else torch.empty_like(input_grad, dtype=grad.dtype)
    return input_grad, residual_grad, torch.empty_like(mean), torch.empty_like(mean)


_OP = define("batch_norm_relu(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, "
             "float eps, int activation) -> (Tensor, Tensor, Tensor)", _forward, _fake)  # fmt: skip
define("batch_norm_relu_backward(Tensor grad, Tensor input, Tensor? output, Tensor? weight, Tensor? bias, Tensor mean, "
       "Tensor var, float eps, int activation, bool batch_statistics) -> (Tensor, Tensor, Tensor, Tensor)",
       _backward_reference, _backward_fake)  # fmt: skip


def _kernel_takes(input: Tensor, alike: Iterable[Tensor | None], vectors: Iterable[Tensor | None]) -> bool:
    """Whether activations are all in float32 or all in bfloat16, and what has a number for each channel in float32."""
    if native is None or input.device.type != "cpu" or input.dtype not in (torch.float32, torch.bfloat16):
        return False
    types = [(t, input.dtype) for t in (input, *alike)] + [(t, torch.float32) for t in vectors]
    return all(t is None or (t.dtype is dtype and t.device.type == "cpu" and t.numel() > 0) for t, dtype in types)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, *scalars: Any
) -> tuple[Any, ...]:
    """What to normalise with, as the extension takes it. ``scalars``: activation, whether the batch's statistics, eps.

    Planes of one number are rows of channels in either layout.
    """
    n, channels, height, width = input.shape
    channels_last = memory_format(input) == torch.channels_last or height * width == 1
    addresses = (_address(t) for t in (weight, bias, input, mean, var))
    return (n, channels, height * width), channels_last, input.dtype is torch.bfloat16, *scalars, *addresses


def _cpu(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if not _kernel_takes(input, (residual,), (weight, bias, mean, var)):
        return _forward(input, residual, weight, bias, mean, var, eps, activation)
    assert native is not None
    layout = memory_format(input)
    input = input.contiguous(memory_format=layout)
    residual = None if residual is None else residual.contiguous(memory_format=layout)
    weight, bias, mean, var = (_dense(t) for t in (weight, bias, mean, var))
    output, batch_mean, batch_var = _fake(input, residual, weight, bias, mean)
    statistics = (batch_mean, batch_var) if mean is None or var is None else (mean, var)
    norm = _norm(input, weight, bias, *statistics, activation, mean is None, eps)
    native.batch_norm_relu(norm, _address(residual), output.data_ptr(), torch.get_num_threads())
    return output, batch_mean, batch_var


def _backward_cpu(
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
    if not (masked and _kernel_takes(input, (grad, output), (weight, bias, mean, var))):
        return _backward_reference(grad, input, output, weight, bias, mean, var, eps, activation, batch_statistics)
    assert native is not None
    layout = memory_format(input)
    grad, input = grad.contiguous(memory_format=layout), input.contiguous(memory_format=layout)
    output = None if output is None else output.contiguous(memory_format=layout)
    mean, var = mean.contiguous(), var.contiguous()
    weight, bias = _dense(weight), _dense(bias)
    grads = _backward_fake(grad, input, output, weight, bias, mean)
    input_grad, residual_grad, weight_grad, bias_grad = grads
    native.batch_norm_relu_backward(
        _norm(input, weight, bias, mean, var, activation, batch_statistics, eps),
        grad.data_ptr(), _address(output), input_grad.data_ptr(),
        0 if output is None else residual_grad.data_ptr(), weight_grad.data_ptr(), bias_grad.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return grads


def _check(
    input: Tensor,
    alike: dict[str, Tensor | None],
    vectors: dict[str, Tensor | None],
    eps: float,
    training: bool,
    activation: int,
) -> None:
    if input.dim() != 4 or not input.is_floating_point():
        raise ValueError(f"input must be floating point (N, C, H, W), got {input.dtype} {tuple(input.shape)}")
    for name, tensor in alike.items():
        if tensor is not None and tensor.shape != input.shape:
            raise ValueError(f"{name} must have the input's shape {tuple(input.shape)}, got {tuple(tensor.shape)}")
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (input.shape[1],):
            raise ValueError(f"{name} must have shape ({input.shape[1]},), got {tuple(vector.shape)}")
    if eps < 0.0 or (training and eps == 0.0):
        raise ValueError(f"eps must be {'positive in training' if training else 'at least 0'}, got {eps}")
    if not 0 <= activation < len(NAMES):
        raise ValueError(f"activation must be at least 0 and less than {len(NAMES)}, got {activation}")


def _check_flat(activation: int) -> None:
    if activation > LAST_FLAT:
        raise ValueError(f"a residual goes with one of {NAMES[: LAST_FLAT + 1]}, got {NAMES[activation]!r}")


def _check_forward(
    input: Tensor, residual: Tensor | None, weight: Any, bias: Any, mean: Any, var: Any, eps: float, activation: int
) -> None:
    vectors = {"weight": weight, "bias": bias, "mean": mean, "var": var}
    _check(input, {"residual": residual}, vectors, eps, mean is None, activation)
    if residual is not None:
        _check_flat(activation)
    if (mean is None) != (var is None):
        raise ValueError("mean and var must be given together")


def _check_backward(
    grad: Tensor, input: Tensor, output: Tensor | None, weight: Any, bias: Any, mean: Tensor, var: Tensor,
    eps: float, activation: int, batch_statistics: bool,
) -> None:  # fmt: skip
    vectors = {"weight": weight, "bias": bias, "mean": mean, "var": var}
    _check(input, {"grad": grad, "output": output}, vectors, eps, batch_statistics, activation)
    if output is not None:
        _check_flat(activation)


if native is not None:
    implement("batch_norm_relu", "cpu", _cpu, dispatched=behind(_check_forward, _cpu))
    implement("batch_norm_relu_backward", "cpu", _backward_cpu, dispatched=behind(_check_backward, _backward_cpu))


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
    _OP, _backward, setup_context=_setup_context, reference=_forward, differentiable_backward=_differentiable_backward
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

    The compiled kernel takes float32 on the CPU, and as under autocast activations in bfloat16 with all else in
    float32; there the result is differentiable once. Everything else runs torch's own operators.

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
    _check(input, {"residual": residual}, vectors, eps, training, number)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given together")
    if not training and running_mean is None:
        raise ValueError("running_mean and running_var are needed outside training")
    count = input.shape[0] * input.shape[2] * input.shape[3]
    if training and count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")

    if transformed() or not _kernel_takes(input, (residual,), vectors.values()):
        output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        in_place = not transformed()  # nobody else has the output
        if residual is not None:
            output = output.add_(residual) if in_place and residual.dtype == output.dtype else output + residual
        return FUNCTIONS[number](output, inplace=in_place)
    number, after = (number, 0) if residual is None or number <= LAST_FLAT else (0, number)
    mean, var = (None, None) if training else (running_mean, running_var)
    output, batch_mean, batch_var = _batch_norm_relu(input, residual, weight, bias, mean, var, eps, number)
    if training:
        mean, var = batch_mean, batch_var
    if recompute and residual is None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        hang_recipe(output, partial(_again, eps, number), input, weight, bias, mean, var)
    if training and running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(batch_mean, momentum)
            running_var.lerp_(batch_var * (count / (count - 1)), momentum)
    return FUNCTIONS[after](output)
