"""``unknown_aware_loss``: MOON's (K+1)-way loss with its gradient and statistics in one pass (arXiv 2403.20047, Eq. 1).

p = softmax(z), u = p_{K+1}, ce = -log p_y, yhat = argmax over all K+1
L = mean_i ce_i (1 + 1[yhat_i != y_i] w / (1 + w u_i))
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_moon.ops.choice import kernel_runs
from sparse_moon.ops.labels import check_target, known_labels_reference, refuse_label, usable_labels
from sparse_moon.ops.native import has_triton, native
from sparse_moon.ops.registry import behind, define, differentiable_gradients, implement, register_autograd


class LossStatistics(NamedTuple):
    """0-d tensors on the device of the logits, detached."""

    beta: Tensor
    """Batch mean of ``(1 - u) ce``, from which w is tuned."""
    mean_u: Tensor
    """Batch mean of the unknown unit's probability."""
    errors: Tensor
    """How many samples are predicted wrongly, over K+1 outputs; NaN where a target is outside [0, K)."""


def _terms(logits: Tensor, target: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    z = logits.double() if logits.dtype == torch.float64 else logits.float()
    label, factor = usable_labels(target, (target >= 0) & (target < z.shape[1] - 1))
    factor, w = factor.to(z.dtype), w.to(z.dtype)
    log_p = z.log_softmax(1)
    ce = -log_p.gather(1, label[:, None])[:, 0] * factor
    u = log_p[:, -1].exp()
    wrong = (z.argmax(1) != target) * factor
    return label, log_p, ce, u, wrong, wrong * w / (1 + w * u)


def unknown_aware_loss_reference(logits: Tensor, target: Tensor, w: Tensor) -> Tensor:
    """The specification; differentiable as often as one likes. NaN where a target is outside [0, K)."""
    _, _, ce, _, _, extra = _terms(logits, target, w)
    return (ce * (1 + extra)).mean()


def _differentiable(logits: Tensor, target: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The operator for transforms, which take the gradient from the loss."""
    _, grad, statistics = loss_and_gradient_reference(logits.detach(), target, w)
    return unknown_aware_loss_reference(logits, target, w), grad, statistics


def loss_and_gradient_reference(logits: Tensor, target: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The operator in torch's own operators: loss (0-d), its gradient (B, K+1), and the statistics as a tensor (3,)."""
    known_labels_reference(target, logits.shape[1] - 1)
    label, log_p, ce, u, wrong, extra = _terms(logits, target, w)
    p = log_p.exp()
    # d ce / dz = p - onehot(y); d extra / dz = -(extra^2 where wrong) du/dz, with du/dz = u (onehot(K+1) - p)
    slope = ce * extra.square() * u
    grad = (1 + extra + slope)[:, None] * p
    grad.scatter_add_(1, label[:, None], -(1 + extra)[:, None])
    grad[:, -1] -= slope
    statistics = torch.stack([((1 - u) * ce).mean(), u.mean(), wrong.sum()])
    return (ce * (1 + extra)).mean(), grad / logits.shape[0], statistics


def _fake(logits: Tensor, target: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    empty = logits.new_empty
    return empty((), dtype=dtype), empty(logits.shape, dtype=dtype), empty(3, dtype=dtype)


_OP = define("unknown_aware_loss(Tensor logits, Tensor target, Tensor w) -> (Tensor, Tensor, Tensor)",
             loss_and_gradient_reference, _fake)  # fmt: skip


def _cpu(logits: Tensor, target: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    assert native is not None
    loss, grad, statistics = outputs = _fake(logits, target, w)
    z, target = logits.to(grad.dtype).contiguous(), target.contiguous()
    kernel = native.unknown_aware_loss_float64 if z.dtype == torch.float64 else native.unknown_aware_loss_float32
    bad_row = kernel(
        z.data_ptr(), target.data_ptr(), w.item(), *z.shape, loss.data_ptr(), grad.data_ptr(), statistics.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    if bad_row >= 0:
        raise refuse_label(target, bad_row, z.shape[1] - 1)
    return outputs


def _check(logits: Tensor, target: Tensor, w: Tensor) -> None:
    if logits.dim() != 2 or logits.shape[0] == 0 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating point (B, K+1), got {logits.dtype} {tuple(logits.shape)}")
    check_target(target, logits)
    if w.dim() != 0 or not w.is_floating_point() or w.requires_grad:
        raise ValueError(
            f"w must be a 0-d tensor, floating point and without gradient, got {w.dtype}, shape {tuple(w.shape)}, "
            f"requires_grad={w.requires_grad}"
        )
    if w.device != logits.device:
        raise ValueError(f"w must be on {logits.device}, got one on {w.device}")


if native is not None:
    implement("unknown_aware_loss", "cpu", _cpu, dispatched=behind(_check, _cpu))


def _cuda(logits: Tensor, target: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if logits.dtype == torch.float64 or not (has_triton() and kernel_runs("triton")):
        return loss_and_gradient_reference(logits, target, w)
    from sparse_moon.kernels.unknown_aware_loss import unknown_aware_loss as launch

    outputs = _fake(logits, target, w)
    launch(logits if logits.stride(1) == 1 else logits.contiguous(), target, w, *outputs)
    return outputs


implement("unknown_aware_loss", "cuda", _cuda, dispatched=behind(_check, _cuda))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs)
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)  # which would be zeros as large as the logits for the second


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, None, None]:
    if grad_loss is None:
        return None, None, None
    grad, logits, _, _ = ctx.saved_tensors
    # in one pass, also to 16 bits
    return torch.mul(grad, grad_loss, out=torch.empty_like(grad, dtype=logits.dtype)), None, None


def _differentiable_backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, None, None]:
    if grad_loss is None:
        return None, None, None
    _, logits, target, w = ctx.saved_tensors
    (grad,) = differentiable_gradients(
        lambda logits: unknown_aware_loss_reference(logits, target, w), (logits,), (True,), grad_loss
    )
    return grad, None, None


_unknown_aware_loss = register_autograd(
    _OP,
    _backward,
    setup_context=_setup_context,
    reference=_differentiable,
    differentiable_backward=_differentiable_backward,
)


def unknown_aware_loss(logits: Tensor, target: Tensor, w: Tensor) -> tuple[Tensor, LossStatistics]:
    """Unknown-aware loss over K+1 outputs (Eq. 1); ``w = 0`` is the cross-entropy over K+1.

    Args:
        logits: (B, K+1) floating point; 16-bit logits are computed in float32. The last output is the unknown unit.
        target: (B,) int64 in [0, K); the unknown unit is no label, and none means "ignore this row". On a GPU raising
            would wait for the device: there another one makes the loss, the gradient of its row and ``errors`` NaN.
        w: 0-d floating point tensor on the device of the logits, at least 0; held constant (no gradient).

    Returns:
        The mean loss (0-d, float32, or float64 for float64 logits) and the batch's :class:`LossStatistics`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a w that wants a gradient; on the CPU, a target outside
            [0, K).
    """
    _check(logits, target, w)
    loss, _, statistics = _unknown_aware_loss(logits, target, w)
    return loss, LossStatistics(*statistics.unbind())
