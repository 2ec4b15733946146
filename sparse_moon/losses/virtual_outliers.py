"""Virtual outlier synthesis: a loss that makes its own outliers out of the features."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_moon.distributed import mean_over_processes_
from sparse_moon.ops.labels import check_target, known_labels


class VirtualOutlierLoss(nn.Module):
    """Cross-entropy, and from some epoch on a loss that tells virtual outliers by their energy (VOS, Du et al. 2022).

    Features of class c are taken as ``N(mu_c, Sigma)``, one covariance for all, from moving averages over batches whose
    features are finite. Of ``candidates`` draws for each class the least likely is its virtual outlier v. With the
    energy ``E = logsumexp(z)`` of a sample and ``E(v) = logsumexp(head(v))``,

        L = CE + weight * logistic loss of (slope E + bias), label 1 for samples and 0 for outliers.

    ``slope`` and ``bias`` are parameters of this module. Call :meth:`end_epoch` after each epoch. Several processes
    average the estimates then, and their gradients of ``slope`` and ``bias`` are to be averaged by the caller. Batches
    count in training mode where gradients are recorded.

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
            if self.training and torch.is_grad_enabled():
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
        mean = self.mean.lerp(members.T @ features / count.clamp(min=1)[:, None], rate[:, None])
        centred = features - mean[target]
        covariance = centred.T @ centred / len(target)
        if not covariance.isfinite().all():  # an overflow, whose step a gradient scaler skips
            return
        self.mean.copy_(mean)
        self.seen |= count > 0
        self.covariance.lerp_(covariance, 1.0 if first else self.momentum)

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
