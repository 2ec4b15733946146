"""Mixed samples and their soft labels, for any loss on probabilities."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_moon.ops.labels import check_target, known_labels, usable_labels


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
