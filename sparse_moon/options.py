"""Names and options of the training methods and of the reliability methods, apart from the classes that they belong to.

The command line says them without importing torch, which takes seconds. A class of ``sparse_moon.algorithms`` or
``sparse_moon.reliability`` names its dataclass as ``Options``; one from outside has it beside itself.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from sparse_moon.settings import ABOVE_1, AT_LEAST_0, AT_LEAST_1, POSITIVE, POSITIVE_SHARE, SHARE, SHARE_BELOW_ONE

TrainingMethod = Literal["dense", "static", "set", "rigl", "mest", "srigl", "gmp", "granet", "top-kast"]

ReliabilityMethod = Literal[
    "none", "moon", "cigl", "weight-dropout", "mc-dropout", "label-smoothing", "mixup", "logitnorm", "dac", "vos",
    "generalized-odin", "sup-tickets", "gamblers",
]  # fmt: skip

Refresh = Literal["final", "epoch"]
"""When batch norm is estimated anew: at the end of the training, or after each epoch that takes part in an average."""


@dataclass(frozen=True)
class PruningOptions:
    """Of methods that begin with more weights than they end with.

    Args:
        start_sparsity: sparsity from which gmp and granet prune; by default 0 and 0.5.
    """

    start_sparsity: float | None = None


@dataclass(frozen=True)
class MESTOptions:
    """Of MEST.

    Args:
        gradient_weight: weight of the gradient in mest's drop score.
        soft_memory_bound: mest grows before it drops (EM&S).
    """

    gradient_weight: Annotated[float, AT_LEAST_0] = 0.01
    soft_memory_bound: bool = False


@dataclass(frozen=True)
class SRigLOptions:
    """Of SRigL.

    Args:
        ablation_threshold: share of its fan-in that must be salient for srigl to keep a neuron; 0 keeps all.
    """

    ablation_threshold: Annotated[float, SHARE] = 0.3


@dataclass(frozen=True)
class TopKASTOptions:
    """Of Top-KAST.

    Args:
        forward_share: share of the trained weights that top-kast uses in the forward pass.
    """

    forward_share: Annotated[float, POSITIVE_SHARE] = 0.5


@dataclass(frozen=True)
class MethodOptions(TopKASTOptions, SRigLOptions, MESTOptions, PruningOptions):
    """Of all training methods."""


@dataclass(frozen=True)
class WarmupOptions:
    """Of networks with an output for "unknown".

    Args:
        warmup_epochs: epochs of plain cross-entropy of moon, dac and gamblers; by default 5, fewer in a short run.
    """

    warmup_epochs: Annotated[int, AT_LEAST_0] | None = None


@dataclass(frozen=True)
class AbstentionOptions(WarmupOptions):
    """Of those whose loss has a weight that tunes itself.

    Args:
        final_weight: last w of moon, a of dac: 0.01 (mnist), 2 (cifar100), 0.001 (imagenet), 1 (others); dac: 1.
    """

    final_weight: Annotated[float, AT_LEAST_0] | None = None


@dataclass(frozen=True)
class VotingOptions:
    """Of averages over the late epochs.

    Args:
        vote_from: share of the training after which moon, cigl, sup-tickets and gamblers average over epochs.
    """

    vote_from: Annotated[float, SHARE] = 0.8


@dataclass(frozen=True)
class MaskOptions:
    """Of random masks on the weights.

    Args:
        keep: share of weights that the random mask of cigl, weight-dropout and mc-dropout keeps in a batch.
    """

    keep: Annotated[float, POSITIVE_SHARE] = 0.9


@dataclass(frozen=True)
class MOONOptions(VotingOptions, AbstentionOptions):
    """Of MOON."""


@dataclass(frozen=True)
class GamblersOptions(VotingOptions, WarmupOptions):
    """Of Deep Gamblers.

    Args:
        payoff: o of gamblers, what a right answer pays; the smaller, the cheaper to abstain.
    """

    payoff: Annotated[float, ABOVE_1] = 2.0


@dataclass(frozen=True)
class CigLOptions(MaskOptions, VotingOptions):
    """Of CigL.

    Args:
        rescale: divide CigL's average by keep.
    """

    rescale: bool = False


@dataclass(frozen=True)
class LabelSmoothingOptions:
    """Of label smoothing.

    Args:
        label_smoothing: probability that label-smoothing spreads over all classes.
    """

    label_smoothing: Annotated[float, SHARE_BELOW_ONE] = 0.1


@dataclass(frozen=True)
class MixupOptions:
    """Of mixup.

    Args:
        mixup_alpha: both parameters of mixup's Beta distribution.
    """

    mixup_alpha: Annotated[float, POSITIVE] = 0.2


@dataclass(frozen=True)
class LogitNormOptions:
    """Of LogitNorm.

    Args:
        logit_temperature: tau of logitnorm.
    """

    logit_temperature: Annotated[float, POSITIVE] = 0.04


@dataclass(frozen=True)
class VOSOptions:
    """Of virtual outlier synthesis.

    Args:
        outlier_weight: weight of the loss on vos' virtual outliers.
        outliers_from: share of the training after which vos draws them.
    """

    outlier_weight: Annotated[float, AT_LEAST_0] = 0.1
    outliers_from: Annotated[float, SHARE] = 0.4


@dataclass(frozen=True)
class MCDropoutOptions(MaskOptions):
    """Of Monte Carlo dropout.

    Args:
        samples: stochastic passes that mc-dropout averages for a prediction.
    """

    samples: Annotated[int, AT_LEAST_1] = 10


@dataclass(frozen=True)
class SupTicketsOptions(VotingOptions):
    """Of Sup-tickets.

    Args:
        tickets: networks that sup-tickets makes in its cycles of the learning rate, and averages.
    """

    tickets: Annotated[int, AT_LEAST_1] = 4


@dataclass(frozen=True)
class ReliabilityOptions(
    SupTicketsOptions, MCDropoutOptions, VOSOptions, LogitNormOptions, MixupOptions, LabelSmoothingOptions,
    CigLOptions, MOONOptions, GamblersOptions,
):  # fmt: skip
    """Of all reliability methods."""
