"""What the reliability methods add to a training, in FLOPs."""

import math
from dataclasses import dataclass
from typing import get_args

from sparse_moon.options import Refresh


@dataclass(frozen=True)
class RunCost:
    """What the FLOPs of a reliability method depend on.

    Attributes:
        training_flops: of the whole training without it.
        forward: FLOPs an example of the (sparse) network's forward pass.
        parameters: existing numbers of the model; ``masked``: existing weights of sparse layers.
        num_classes: K.
        examples: size of the training set.
        epochs: of the training; ``averaged_epochs``: whose end takes part in an average; ``warmup_epochs``: the first
            ones, with plain cross-entropy.
        batch_size: examples a step.
        refresh: whether batch norm is refreshed at the end or after each averaged epoch.
    """

    training_flops: float
    forward: float
    parameters: float
    masked: float
    num_classes: int
    examples: int
    epochs: int
    batch_size: int
    warmup_epochs: int = 5
    averaged_epochs: int = 20
    refresh: Refresh = "final"


def moon_overhead(
    training_flops: float,
    *,
    forward: float,
    parameters: float,
    num_classes: int,
    examples: int,
    epochs: int,
    warmup_epochs: int = 5,
    averaged_epochs: int = 20,
    refresh: Refresh = "final",
) -> dict[str, float]:
    """What MOON adds to a training, in FLOPs (arXiv 2403.20047, Appendix F).

    - ``loss``: ``4 (K + 1)`` an example and epoch during the warm-up, ``8 (K + 1)`` after it. For ImageNet in batches
      of 32 these are the paper's 1.3e5 and 2.6e5 an iteration; they make 1.0e12 in all, not the paper's 2.3e15.
    - ``averaging``: 3 for each parameter and averaged epoch, ``mean += (w - mean) / n``. The paper has 1.8e9.
    - ``batch_norm``: a forward pass over the training set, once at the end, or after every averaged epoch as in the
      released code. Of a training of 100 epochs one pass is 0.33 %, and twenty are 6.7 %, nearly all of the paper's
      total of 6.8 %. Its 2.4e15 a pass are those of ResNet-50 with a uniform allocation of 80 %; ERK's are 1.8 times
      as many.

    Args:
        training_flops: of the whole training without MOON.
        forward: FLOPs an example of the (sparse) network's forward pass.
        parameters: existing numbers that are averaged.
        num_classes: K.
        examples: size of the training set.
        epochs, warmup_epochs, averaged_epochs: of the training, with w = 0, and whose end takes part in the vote.
        refresh: ``"final"`` or ``"epoch"``.

    Returns:
        ``loss``, ``averaging``, ``batch_norm``, ``total``, and ``ratio`` = total / training_flops.

    Raises:
        ValueError: an unknown refresh or a number out of range.
    """
    passes = _batch_norm_passes(training_flops, epochs, averaged_epochs, refresh)
    if not 0 <= warmup_epochs <= epochs:
        raise ValueError(f"warmup_epochs must be in [0, {epochs}], got {warmup_epochs}")
    parts = {
        "loss": (num_classes + 1) * examples * (4.0 * warmup_epochs + 8.0 * (epochs - warmup_epochs)),
        "averaging": 3.0 * parameters * averaged_epochs,
        "batch_norm": forward * examples * passes,
    }
    return _with_total(parts, training_flops)


def cigl_overhead(
    training_flops: float,
    *,
    forward: float,
    parameters: float,
    masked: float,
    examples: int,
    epochs: int,
    batch_size: int,
    averaged_epochs: int = 20,
    refresh: Refresh = "final",
) -> dict[str, float]:
    """What CigL adds to a training, in FLOPs, counted as :func:`moon_overhead` does.

    - ``mask``: 2 for each masked weight and step: the random mask times the weights before the forward pass, and times
      their gradients after the backward pass. Drawing random bits is integer work and not counted.
    - ``averaging``: 3 for each parameter and averaged epoch, and 1 more for each masked weight, whose mask is averaged
      with it.
    - ``batch_norm``: as for MOON.

    Args:
        training_flops, forward, parameters, examples, epochs, averaged_epochs, refresh: as :func:`moon_overhead`.
        masked: existing weights under the random mask.
        batch_size: examples a step; an epoch's last batch may be smaller.

    Returns:
        ``mask``, ``averaging``, ``batch_norm``, ``total``, and ``ratio`` = total / training_flops.

    Raises:
        ValueError: an unknown refresh or a number out of range.
    """
    passes = _batch_norm_passes(training_flops, epochs, averaged_epochs, refresh)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    parts = {
        "mask": 2.0 * masked * math.ceil(examples / batch_size) * epochs,
        "averaging": (3.0 * parameters + masked) * averaged_epochs,
        "batch_norm": forward * examples * passes,
    }
    return _with_total(parts, training_flops)


def _batch_norm_passes(training_flops: float, epochs: int, averaged_epochs: int, refresh: Refresh) -> int:
    if training_flops <= 0:
        raise ValueError(f"training_flops must be positive, got {training_flops}")
    if not 0 <= averaged_epochs <= epochs:
        raise ValueError(f"averaged_epochs must be in [0, {epochs}], got {averaged_epochs}")
    if refresh not in get_args(Refresh):
        raise ValueError(f"unknown refresh {refresh!r}, expected one of {get_args(Refresh)}")
    return averaged_epochs if refresh == "epoch" else min(averaged_epochs, 1)


def _with_total(parts: dict[str, float], training_flops: float) -> dict[str, float]:
    total = sum(parts.values())
    return {**parts, "total": total, "ratio": total / training_flops}
