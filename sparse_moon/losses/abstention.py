"""Losses of networks with an output for "unknown": MOON's, the deep abstaining classifier's and Deep Gamblers'."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from sparse_moon import ops
from sparse_moon.distributed import mean_over_processes_
from sparse_moon.ops.labels import check_target, known_labels, usable_labels


def default_warmup_epochs(epochs: int) -> int:
    """A quarter of the training, at least 1 and at most MOON's 5 epochs, and fewer than ``epochs``."""
    return min(5, max(epochs // 4, 1), epochs - 1)


class AbstentionLoss(nn.Module):
    """What the losses of networks with an output for "unknown" share: a weight w that tunes itself.

    For the first ``warmup_epochs`` epochs ``w = 0`` while ``b``, the moving average over batches of the mean that a
    loss notes, is taken; then ``w_i = b / ratio`` and ``w`` runs in a straight line from ``w_i`` after the warm-up to
    ``final_weight`` in the last epoch, which it keeps if training goes on. Call :meth:`end_epoch` after each epoch. All
    state lives on the device, in buffers, and ``forward`` does not wait for the device. Several processes agree on
    ``b`` at the end of each epoch. Batches count in training mode where gradients are recorded, so that a validation
    does not, and one whose loss overflows, whose step a gradient scaler skips, does not.

    Args:
        num_classes: K.
        epochs: length of the training, more than ``warmup_epochs``.
        final_weight: w in the last epoch.
        warmup_epochs: T_e; by default a quarter of ``epochs``, at least 1 and at most 5.
        ratio: r; ``smoothing``: alpha of the moving average, which starts at the first batch's value (papers: 0).
        auto_tune: False keeps w at ``final_weight`` from the first epoch on.

    Attributes:
        w: the present weight, 0-d float32.
        mean_u, errors: running over the epoch: mean unknown probability and share of wrong predictions, 0-d.

    Raises:
        ValueError: a number out of range; in ``forward``, anything but K+1 outputs and labels in [0, K). On a GPU such
            a label is raised by what looks at the epoch: ``mean_u``, ``errors``, ``end_epoch`` and ``state_dict``.
    """

    w: Tensor
    moving_average: Tensor
    initial_weight: Tensor
    epoch: Tensor
    batches: Tensor
    totals: Tensor

    def __init__(
        self,
        num_classes: int,
        epochs: int,
        *,
        final_weight: float = 1.0,
        warmup_epochs: int | None = None,
        ratio: float = 64.0,
        smoothing: float = 0.05,
        auto_tune: bool = True,
    ) -> None:
        super().__init__()
        warmup_epochs = default_warmup_epochs(epochs) if warmup_epochs is None else warmup_epochs
        if num_classes < 1 or not 0 <= warmup_epochs < epochs:
            raise ValueError(
                f"need num_classes >= 1 and 0 <= warmup_epochs < epochs, got {num_classes}, {warmup_epochs}, {epochs}"
            )
        if not 0 <= final_weight < math.inf or not 0 < ratio < math.inf or not 0 < smoothing <= 1:
            raise ValueError(
                f"need final_weight >= 0, ratio > 0 and smoothing in (0, 1], got {final_weight}, {ratio}, {smoothing}"
            )
        self.num_classes, self.epochs, self.warmup_epochs = num_classes, epochs, warmup_epochs
        self.final_weight, self.ratio, self.smoothing = final_weight, ratio, smoothing
        self.auto_tune = auto_tune
        self.register_buffer("w", torch.zeros(()))
        self.register_buffer("moving_average", torch.zeros(()))
        self.register_buffer("initial_weight", torch.zeros(()))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))  # finished epochs
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))  # of the warm-up, all epochs
        self.register_buffer("totals", torch.zeros(3), persistent=False)  # samples, sum of u, errors of this epoch
        self._tune()

    def _check(self, logits: Tensor) -> None:
        if logits.dim() != 2 or logits.shape[0] == 0 or logits.shape[1] != self.num_classes + 1:
            raise ValueError(
                f"{type(self).__name__} over {self.num_classes} classes needs logits (B, {self.num_classes + 1}), "
                f"the last for 'unknown', got shape {tuple(logits.shape)}"
            )
        if self.w.device != logits.device:
            raise ValueError(
                f"{type(self).__name__} is on {self.w.device}, logits on {logits.device}; move it there with .to()"
            )

    def _check_errors(self, errors: Tensor) -> None:
        """Raise where an impossible label has made the number of errors NaN. Waits for the device."""
        if not errors.is_meta and errors.isnan():
            raise ValueError(f"a batch of this epoch has a label outside [0, {self.num_classes})")

    @property
    def warming_up(self) -> Tensor:
        """Whether the present epoch is one of the warm-up, 0-d bool."""
        return self.epoch < self.warmup_epochs

    @torch.no_grad()
    def _note(self, beta: Tensor, mean_u: Tensor, errors: Tensor, samples: int) -> None:
        """Take in a batch: ``beta`` for the moving average, the mean of u, and how many predictions are wrong.

        ``errors`` is NaN where a label is impossible.
        """
        beta = beta.to(self.moving_average.dtype)
        finite = beta.isfinite()
        noted = finite & self.warming_up
        alpha = torch.where(self.batches == 0, 1.0, self.smoothing)
        self.moving_average.lerp_(torch.where(noted, beta, self.moving_average), alpha)
        self.batches += noted
        totals = torch.stack([torch.full_like(mean_u, samples), mean_u * samples, errors]).to(self.totals.dtype)
        self.totals += torch.where(finite, totals, 0 * errors)  # NaN stays NaN

    def _log_probabilities(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those of all outputs (B, K+1), of the right class (B,), and a factor (B,): 1, or NaN for bad labels."""
        self._check(logits)
        check_target(target, logits)
        label, factor = usable_labels(target, known_labels(target, self.num_classes))
        log_p = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(1)
        return log_p, log_p.gather(1, label[:, None])[:, 0] * factor, factor

    def _note_batch(self, losses: Tensor, log_p: Tensor, wrong: Tensor) -> None:
        """In training, take in a batch: ``losses`` (B,) for beta, and which predictions are wrong (B,)."""
        if not (self.training and torch.is_grad_enabled()):
            return
        with torch.no_grad():
            self._note(losses.mean(), log_p[:, self.num_classes].exp().mean(), wrong.sum(), len(wrong))

    @property
    def mean_u(self) -> Tensor:
        self._check_errors(self.totals[2])
        return self.totals[1] / self.totals[0]

    @property
    def errors(self) -> Tensor:
        self._check_errors(self.totals[2])
        return self.totals[2] / self.totals[0]

    def _save_to_state_dict(self, *args: Any) -> None:
        self._check_errors(self.totals[2])
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.totals.zero_()

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Move on to the next epoch: new w, running statistics from zero.

        Raises:
            ValueError: a label of this epoch was outside [0, K).
        """
        errors = self.totals[2].clone()
        mean_over_processes_(errors)  # so that all processes raise
        self._check_errors(errors)
        mean_over_processes_(self.moving_average)
        self.epoch += 1
        self.totals.zero_()
        self._tune()

    @torch.no_grad()
    def _tune(self) -> None:
        """w of the epoch in progress (number ``epoch + 1`` of MOON's Algorithm 1)."""
        if not self.auto_tune:
            self.w.fill_(self.final_weight)
            return
        after = self.epoch + 1 - self.warmup_epochs
        self.initial_weight.copy_(
            torch.where(self.epoch == self.warmup_epochs, self.moving_average / self.ratio, self.initial_weight)
        )
        share = (after / (self.epochs - self.warmup_epochs)).clamp(max=1.0)
        w = self.initial_weight + share * (self.final_weight - self.initial_weight)
        self.w.copy_(torch.where(after > 0, w, 0.0))

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, epochs={self.epochs}, final_weight={self.final_weight}"


class UnknownAwareLoss(AbstentionLoss):
    """MOON's loss with its auto-tuned weight w (arXiv 2403.20047, Eq. 1 and Algorithm 1).

    The model has K+1 outputs, the last for "unknown". In the warm-up the loss is cross-entropy and ``b`` averages
    ``(1 - u) ce``.

    Where the loss can push the unknown unit up at all depends on w: for a wrong sample with u near 0 it needs a
    cross-entropy above ``(1 + w) / w^2`` nats (2 for w = 1, about 10^4 for w = 0.01). ``mean_u`` tells what happened.

    Args:
        num_classes ... auto_tune: as :class:`AbstentionLoss`. Final weights of the paper: MNIST 0.01, CIFAR-10 1,
            CIFAR-100 2, ImageNet 0.001; without ``auto_tune`` it is the paper's ablation.
    """

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean loss (0-d) of logits (B, K+1) and int64 targets (B,) in [0, K)."""
        self._check(logits)
        loss, statistics = ops.unknown_aware_loss(logits, target, self.w)
        if self.training and torch.is_grad_enabled():
            self._note(statistics.beta, statistics.mean_u, statistics.errors, logits.shape[0])
        return loss


class AbstainingLoss(AbstentionLoss):
    """Deep abstaining classifier (Thulasidasan et al. 2019, equation 1), its penalty ``a`` tuned as MOON's w.

    With ``u = p_{K+1}`` and the cross-entropy ``ce_K`` of ``p`` renormalised over the K classes,

        L = (1 - u) ce_K + a log 1 / (1 - u).

    In the warm-up the loss is the cross-entropy of all K+1 outputs, ``ce_K + log 1 / (1 - u)``, and the average
    taken is that of ``(1 - u) ce_K``. A small ``a`` makes abstaining cheap, a large one rare.

    Args:
        num_classes ... auto_tune: as :class:`AbstentionLoss`; ``final_weight`` is a in the last epoch.
    """

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean loss (0-d) of logits (B, K+1) and int64 targets (B,) in [0, K)."""
        log_p, log_right, factor = self._log_probabilities(logits, target)
        log_known = log_p[:, : self.num_classes].logsumexp(1)  # log(1 - u)
        ce = log_known - log_right
        weighted = log_known.exp() * ce
        self._note_batch(weighted, log_p, (logits.argmax(1) != target) * factor)
        loss = torch.where(self.warming_up, ce - log_known, weighted - self.w * log_known)
        return loss.mean()


class GamblersLoss(AbstentionLoss):
    """Deep Gamblers (Liu et al. 2019, arXiv 1907.00208, equation 5), ``u`` being the probability of "unknown":

        L = -log(p_y + u / o).

    A network bets on the classes, where a right answer pays o, or keeps its stake, u. For small u the gradient with
    respect to the logit of u is ``u (1 - 1 / (o p_y))``: it pushes u up as soon as ``p_y < 1 / o``, the more the surer
    the network is of another class. In the warm-up the loss is cross-entropy over all K+1 outputs.

    Args:
        num_classes, epochs, warmup_epochs: as :class:`AbstentionLoss`.
        payoff: o, above 1; the paper's is at most K, found by a search.
    """

    def __init__(self, num_classes: int, epochs: int, *, payoff: float = 2.0, warmup_epochs: int | None = None) -> None:
        if not 1 < payoff < math.inf:
            raise ValueError(f"payoff must be above 1, got {payoff}")
        super().__init__(num_classes, epochs, final_weight=1.0 / payoff, warmup_epochs=warmup_epochs, auto_tune=False)
        self.payoff = payoff

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean loss (0-d) of logits (B, K+1) and int64 targets (B,) in [0, K)."""
        log_p, log_right, factor = self._log_probabilities(logits, target)
        log_u = log_p[:, self.num_classes]
        loss = -torch.where(self.warming_up, log_right, torch.logaddexp(log_right, log_u - math.log(self.payoff)))
        self._note_batch(loss, log_p, (logits.argmax(1) != target) * factor)
        return loss.mean()

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, epochs={self.epochs}, payoff={self.payoff}"
