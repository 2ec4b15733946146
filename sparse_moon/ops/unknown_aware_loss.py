"""``unknown_aware_loss``: MOON's (K+1)-way loss with its gradient and statistics in one pass (arXiv 2403.20047, Eq. 1).

p = softmax(z), u = p_{K+1}, ce = -log p_y, yhat = argmax over all K+1
L = mean_i ce_i (1 + 1[yhat_i != y_i] w / (1 + w u_i))
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_moon.ops.choice import kernel_runs
from sparse_moon.ops.library import define, differentiable_gradients, implement, register_autograd
from sparse_moon.ops.native import has_triton, native


class LossStatistics(NamedTuple):
    """0-d tensors on the device of the logits, detached."""

    beta: Tensor
    """Batch mean of ``(1 - u) ce``, from which w is tuned."""
    mean_u: Tensor
    """Batch mean of the unknown unit's probability."""
    errors: Tensor
    """How many samples are predicted wrongly, over K+1 outputs."""


def _terms(logits: Tensor, target: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    z = logits.double() if logits.dtype == torch.float64 else logits.float()
    log_p = z.log_softmax(1)
    ce = -log_p.gather(1, target[:, None])[:, 0]
    u = log_p[:, -1].exp()
    wrong = (z.argmax(1) != target).to(z.dtype)
    return log_p, ce, u, wrong, wrong * w.to(z.dtype) / (1 + w.to(z.dtype) * u)


def unknown_aware_loss_reference(logits: Tensor, target: Tensor, w: Tensor) -> Tensor:
    """The specification; differentiable."""
    _, ce, _, _, extra = _terms(logits, target, w)
    return (ce * (1 + extra)).mean()


def _differentiable(logits: Tensor, target: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The operator for transforms, which take the gradient from the loss."""
    _, grad, statistics = _forward(logits.detach(), target, w)
    return unknown_aware_loss_reference(logits, target, w), grad, statistics


def _forward(logits: Tensor, target: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_p, ce, u, wrong, extra = _terms(logits, target, w)
    p = log_p.exp()
    # d ce / dz = p - onehot(y); d extra / dz = -(extra^2 where wrong) du/dz, with du/dz = u (onehot(K+1) - p)
    slope = ce * extra.square() * u
    grad = (1 + extra + slope)[:, None] * p
    grad.scatter_add_(1, target[:, None], -(1 + extra)[:, None])
    grad[:, -1] -= slope
    statistics = torch.stack([((1 - u) * ce).mean(), u.mean(), wrong.sum()])
    return (ce * (1 + extra)).mean(), grad / logits.shape[0], statistics


def _fake(logits: Tensor, target: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    empty = logits.new_empty
    return empty((), dtype=dtype), empty(logits.shape, dtype=dtype), empty(3, dtype=dtype)


_OP = define("unknown_aware_loss(Tensor logits, Tensor target, Tensor w) -> (Tensor, Tensor, Tensor)",
             _forward, _fake)  # fmt: skip


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
        raise ValueError(f"target must be in [0, {z.shape[1]}), got {target[bad_row].item()} in row {bad_row}")
    return outputs


if native is not None:
    implement("unknown_aware_loss", "cpu", _cpu)


def _cuda(logits: Tensor, target: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if logits.dtype == torch.float64 or not (has_triton() and kernel_runs("triton")):
        return _forward(logits, target, w)
    from sparse_moon.kernels.unknown_aware_loss import unknown_aware_loss as launch

    outputs = _fake(logits, target, w)
    launch(logits if logits.stride(1) == 1 else logits.contiguous(), target, w, *outputs)
    return outputs


implement("unknown_aware_loss", "cuda", _cuda)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs)
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor, None, None]:
    grad, logits, _, _ = ctx.saved_tensors
    return (grad * grad_loss).to(logits.dtype), None, None


def _differentiable_backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, None, None]:
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
        target: (B,) int64 in [0, K). The GPU kernel cannot raise for another one, which would wait for the device: it
            makes the loss and the gradient of that row NaN.
        w: 0-d floating point tensor on the device of the logits, at least 0; held constant (no gradient).

    Returns:
        The mean loss (0-d, float32, or float64 for float64 logits) and the batch's :class:`LossStatistics`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if logits.dim() != 2 or logits.shape[0] == 0 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating point (B, K+1), got {logits.dtype} {tuple(logits.shape)}")
    if target.shape != logits.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target must be int64 ({logits.shape[0]},), got {target.dtype} {tuple(target.shape)}")
    if w.dim() != 0:
        raise ValueError(f"w must be a 0-d tensor, got shape {tuple(w.shape)}")
    loss, _, statistics = _unknown_aware_loss(logits, target, w)
    return loss, LossStatistics(*statistics.unbind())
