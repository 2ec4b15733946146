"""Training losses of models that know what they do not know.

Labels are int64 (B,) in [0, K). Any other is an error: there is no label for "ignore this row", and "unknown" is an
output, not a label. On the CPU the call raises ``ValueError``. On a GPU that would mean waiting for the device: there
the loss and the row's gradient become NaN, and losses with epochs raise as soon as someone looks at their state.
"""

from sparse_moon.losses.abstention import (
    AbstainingLoss,
    AbstentionLoss,
    GamblersLoss,
    UnknownAwareLoss,
    default_warmup_epochs,
)
from sparse_moon.losses.logit_norm import LogitNormLoss
from sparse_moon.losses.mixing import mixup
from sparse_moon.losses.virtual_outliers import VirtualOutlierLoss

__all__ = [
    "AbstainingLoss",
    "AbstentionLoss",
    "GamblersLoss",
    "LogitNormLoss",
    "UnknownAwareLoss",
    "VirtualOutlierLoss",
    "default_warmup_epochs",
    "mixup",
]
