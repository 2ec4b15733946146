"""Training losses of models that know what they do not know.

Labels are int64 (B,) in [0, K). Any other is an error: there is no label for "ignore this row", and "unknown" is an
output, not a label. On the CPU the call raises ``ValueError``. On a GPU that would mean waiting for the device: there
the loss and the row's gradient become NaN, and losses with epochs raise as soon as someone looks at their state.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
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
    ``b`` at the end of each epoch.

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
        alpha = torch.where(self.batches == 0, 1.0, self.smoothing)
        self.moving_average.lerp_(beta.to(self.moving_average.dtype), alpha * self.warming_up)
        self.batches += self.warming_up
        self.totals += torch.stack([torch.full_like(mean_u, samples), mean_u * samples, errors]).to(self.totals.dtype)

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
        if self.training:
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
        self._check(logits)
        check_target(target, logits)
        label, factor = usable_labels(target, known_labels(target, self.num_classes))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        log_p = logits.log_softmax(1)
        log_known = log_p[:, : self.num_classes].logsumexp(1)  # log(1 - u)
        ce = (log_known - log_p.gather(1, label[:, None])[:, 0]) * factor
        weighted = log_known.exp() * ce
        if self.training:
            with torch.no_grad():
                errors = ((logits.argmax(1) != target) * factor).sum()
                self._note(weighted.mean(), log_p[:, self.num_classes].exp().mean(), errors, logits.shape[0])
        loss = torch.where(self.warming_up, ce - log_known, weighted - self.w * log_known)
        return loss.mean()


class LogitNormLoss(nn.Module):
    """Cross-entropy of normalised logits, ``CE(z / (tau ||z||), y)`` (Wei et al. 2022): their norm cannot grow.

    Args:
        temperature: tau.

    Raises:
        ValueError: a temperature that is not positive; in ``forward``, targets that are neither labels nor
            probabilities of the logits' classes.
    """

    def __init__(self, temperature: float = 0.04) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean loss (0-d) of logits (B, K) and targets: int64 (B,) in [0, K), or floating probabilities (B, K)."""
        if logits.dim() != 2 or logits.shape[0] == 0:
            raise ValueError(f"expected logits (B, K), got shape {tuple(logits.shape)}")
        logits = logits if logits.dtype == torch.float64 else logits.float()
        z = F.normalize(logits) / self.temperature
        if target.shape == logits.shape and target.is_floating_point():
            return F.cross_entropy(z, target)
        check_target(target, logits)
        label, factor = usable_labels(target, known_labels(target, logits.shape[1]))
        return (F.cross_entropy(z, label, reduction="none") * factor).mean()

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


class VirtualOutlierLoss(nn.Module):
    """Cross-entropy, and from some epoch on a loss that tells virtual outliers by their energy (VOS, Du et al. 2022).

    Features of class c are taken as ``N(mu_c, Sigma)``, one covariance for all, from moving averages over batches. Of
    ``candidates`` draws for each class the least likely is its virtual outlier v. With the energy ``E = logsumexp(z)``
    of a sample and ``E(v) = logsumexp(head(v))``,

        L = CE + weight * logistic loss of (slope E + bias), label 1 for samples and 0 for outliers.

    ``slope`` and ``bias`` are parameters of this module. Call :meth:`end_epoch` after each epoch. Several processes
    average the estimates then, and their gradients of ``slope`` and ``bias`` are to be averaged by the caller.

    Differences from the paper: moving averages in place of a queue of 1000 features a class; the least likely of n
    draws directly, as ``mu + L z`` where only the length of z decides how likely it is: its square is the largest of n
    chi-squared draws, and its direction uniform; a line in place of a small network on the energy.

    Args:
        num_classes: K.
        features: D, size of the penultimate features.
        epochs: length of the training; ``start``: share of it before which the loss is cross-entropy.
        weight: of the logistic loss.
        candidates: n.
        momentum: of the moving averages.

    Raises:
        ValueError: a number out of range; in ``forward``, features or logits of another size, or a label outside
            [0, K), on every device: this loss waits for it anyway.
    """

    mean: Tensor
    covariance: Tensor
    seen: Tensor
    epoch: Tensor

    def __init__(
        self,
        num_classes: int,
        features: int,
        epochs: int,
        *,
        start: float = 0.4,
        weight: float = 0.1,
        candidates: int = 10_000,
        momentum: float = 0.05,
    ) -> None:
        super().__init__()
        if min(num_classes, features, epochs, candidates) < 1:
            raise ValueError(
                "num_classes, features, epochs and candidates must be at least 1, "
                f"got {num_classes}, {features}, {epochs}, {candidates}"
            )
        if not 0 <= start <= 1 or not 0 <= weight < math.inf or not 0 < momentum <= 1:
            raise ValueError(
                f"need start in [0, 1], weight >= 0 and momentum in (0, 1], got {start}, {weight}, {momentum}"
            )
        self.num_classes, self.features, self.weight = num_classes, features, weight
        self.first_epoch, self.candidates, self.momentum = round(start * epochs), candidates, momentum
        self.slope, self.bias = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))
        self.register_buffer("mean", torch.zeros(num_classes, features))
        self.register_buffer("covariance", torch.zeros(features, features))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))  # finished epochs

    def forward(self, logits: Tensor, target: Tensor, features: Tensor, head: nn.Module) -> Tensor:
        """Mean loss (0-d) of logits (B, K) and int64 targets (B,) in [0, K).

        Args:
            logits, target: of the batch.
            features: (B, D), the input of ``head``.
            head: the layer that makes logits of features.
        """
        batch = logits.shape[0] if logits.dim() else 0
        if not batch or logits.shape != (batch, self.num_classes) or features.shape != (batch, self.features):
            raise ValueError(
                f"expected logits ({batch}, {self.num_classes}) and features ({batch}, {self.features}), "
                f"got {tuple(logits.shape)} and {tuple(features.shape)}"
            )
        check_target(target, logits)
        if not known_labels(target, self.num_classes).all():
            raise ValueError(f"target must be in [0, {self.num_classes}), got {target.tolist()}")
        loss = F.cross_entropy(logits, target)
        with torch.autocast(features.device.type, enabled=False):  # covariances need their digits
            if self.training:
                self._note(features.detach().to(self.mean.dtype), target)
            if self.epoch < self.first_epoch or not self.seen.all():
                return loss
            outliers = self.outliers().to(features.dtype)
        energies = torch.cat([logits.float().logsumexp(1), head(outliers).float().logsumexp(1)])
        known = torch.arange(len(energies), device=energies.device) < len(logits)
        uncertainty = F.binary_cross_entropy_with_logits(self.slope * energies + self.bias, known.to(energies.dtype))
        return loss + self.weight * uncertainty

    @torch.no_grad()
    def _note(self, features: Tensor, target: Tensor) -> None:
        members = F.one_hot(target, self.num_classes).to(features.dtype)
        count = members.sum(0)
        first = not bool(self.seen.any())
        rate = torch.where(self.seen, self.momentum, 1.0).to(features.dtype) * (count > 0)
        self.mean.lerp_(members.T @ features / count.clamp(min=1)[:, None], rate[:, None])
        self.seen |= count > 0
        centred = features - self.mean[target]
        self.covariance.lerp_(centred.T @ centred / len(target), 1.0 if first else self.momentum)

    @torch.no_grad()
    def outliers(self) -> Tensor:
        """A virtual outlier of each class (K, D), drawn by torch's default CPU generator."""
        chi2 = torch.distributions.Chi2(torch.tensor(float(self.features)))
        length = chi2.sample((self.candidates, self.num_classes)).amax(0).sqrt()
        z = (F.normalize(torch.randn(self.num_classes, self.features)) * length[:, None]).to(self.mean)
        spread = self.covariance.diagonal().mean()
        ridge = torch.eye(self.features).to(self.mean) * (1e-4 * spread + 1e-6)
        return self.mean + z @ torch.linalg.cholesky(self.covariance + ridge).T

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Move on to the next epoch."""
        seen = self.seen.to(self.mean.dtype)
        mean_over_processes_(seen)
        mean_over_processes_(self.mean)  # 0 where a process has not seen the class
        mean_over_processes_(self.covariance)
        self.seen.copy_(seen > 0)
        self.mean /= torch.where(self.seen, seen, 1.0)[:, None]
        self.epoch += 1

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, features={self.features}, weight={self.weight}"


def mixup(images: Tensor, labels: Tensor, num_classes: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Mix each sample with another of the batch, ``l x + (1 - l) x'`` with one ``l ~ Beta(alpha, alpha)`` (Zhang 2018).

    Args:
        images: (B, ...) floating; labels: int64 (B,) in [0, K), ``num_classes`` K.
        alpha: positive; the larger, the more it mixes.

    Returns:
        Images (B, ...) and probabilities (B, K), for which ``nn.CrossEntropyLoss`` is
        ``l CE(y) + (1 - l) CE(y')``. Drawn by torch's default CPU generator.

    Raises:
        ValueError: alpha is not positive, images are not floating point, or labels are not int64 (B,); on the CPU, a
            label outside [0, K). On a GPU its probabilities are NaN.
    """
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive, got {alpha}")
    if not images.dim() or not images.is_floating_point():
        raise ValueError(f"images must be floating point (B, ...), got {images.dtype} {tuple(images.shape)}")
    check_target(labels, images)
    labels, factor = usable_labels(labels, known_labels(labels, num_classes))
    share = torch.distributions.Beta(torch.tensor(alpha), torch.tensor(alpha)).sample().to(images)
    partner = torch.randperm(len(images)).to(images.device)
    targets = (F.one_hot(labels, num_classes) * factor[:, None]).to(images.dtype)
    return torch.lerp(images[partner], images, share), torch.lerp(targets[partner], targets, share)
