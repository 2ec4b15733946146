"""Cross-entropy of normalised logits."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_moon.ops.labels import check_target, known_labels, known_probabilities, usable_labels


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
        """Mean loss (0-d) of logits (B, K) and targets: int64 (B,) in [0, K), or floating probabilities (B, K).

        Nothing can be raised on a GPU without waiting for it: there other targets make the loss NaN.
        """
        if logits.dim() != 2 or logits.shape[0] == 0:
            raise ValueError(f"expected logits (B, K), got shape {tuple(logits.shape)}")
        logits = logits if logits.dtype == torch.float64 else logits.float()
        z = F.normalize(logits) / self.temperature
        if target.shape == logits.shape and target.is_floating_point():
            known = torch.where(known_probabilities(target), 1.0, float("nan"))
            return F.cross_entropy(z, target) * known.mean()
        check_target(target, logits)
        label, factor = usable_labels(target, known_labels(target, logits.shape[1]))
        return (F.cross_entropy(z, label, reduction="none") * factor).mean()

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
