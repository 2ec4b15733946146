"""The settings of a run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sparse_moon.allocation import Allocation, check_sparsity
from sparse_moon.app.names import (
    OR_IMPORT_PATH,
    ImportPath,
    ModelName,
    Reliability,
    Score,
    TrainingMethod,
    is_import_path,
)

PARTS = {"moon": ("loss", "tuning", "voting"), "cigl": ("mask", "averaging")}
"""What ``without`` may leave out, by reliability method."""

START_SPARSITY = {"gmp": 0.0, "granet": 0.5}
"""Sparsity at the start by method: Zhu & Gupta 2018 start dense, Liu et al. 2021 have it sparse to sparse."""

_MASKED = ("weight-dropout", "mc-dropout")
_SHARES = ("drop_fraction", "stop", "vote_from", "lr_until", "outliers_from", "ablation_threshold")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run. Defaults are MOON's (arXiv 2403.20047, section 4.1), smaller where the digits ask for it.

    Args:
        dataset: digits, mnist, cifar10, cifar100, a keras-style .npz, or a folder with train/ and test/.
        data_root: folder that holds the named data sets.
        download: fetch a missing named data set into data_root.
        image_size: side to resize an image folder to.
        ood: out-of-distribution sets, NAME or NAME=PATH; by default those that go with the data set.
        headline: the one score that tables lead with, whichever is best; fixed before the test sets are seen.
        model: which network; your own as package.module.function.
        width: channels of the first stage (small-resnet) or of the hidden layers (mlp); passed to a model of your own.
        method: dense, static, set, rigl, mest, srigl, gmp, granet or top-kast.
        reliability: training for reliability, none or one of the methods in docs/reliability.md.
        without: parts to leave out; of moon loss, tuning (w stays final_weight) or voting, of cigl mask or averaging.
        sparsity: share of weights to leave out, in [0, 1).
        pattern: unstructured, vectorV (V outputs of one input) or blockB.
        allocation: erk, er or uniform.
        exclude: layers to keep dense, by name with * and ?.
        fuse: run batch norm, ReLU and residual addition as one operation (faster on the CPU).
        recompute: with fuse, compute what a sparse convolution reads again in the backward pass (less memory).
        epochs: passes over the training data.
        batch_size: images a batch, over all processes.
        lr: learning rate at the start; it falls along half a cosine to lr_end at lr_until and then stays.
        lr_end: final learning rate; by default lr / 15.
        lr_until: share of the training after which the learning rate is constant.
        momentum: Nesterov momentum of SGD.
        weight_decay: L2 penalty on all parameters; with top-kast its own penalty on the sparse weights.
        interval: batches from topology update to topology update.
        drop_fraction: share of a layer's weights that the first update exchanges; falls to 0 along half a cosine.
        stop: share of the training after which the topology is frozen; sup-tickets goes on to the end.
        final_weight: w of moon, a of dac in the last epoch; default 0.01 (mnist), 2 (cifar100), 1 (others); dac: 1.
        warmup_epochs: epochs of plain cross-entropy of moon and dac; by default 5, fewer in a short run.
        vote_from: share of the training after which moon, cigl and sup-tickets average over epochs.
        keep: share of weights that the random mask of cigl, weight-dropout and mc-dropout keeps in a batch.
        rescale: divide CigL's average by keep.
        amp: none, bfloat16 or float16 automatic mixed precision.
        seed: of initial weights, topology, data order and augmentation.
        device: cpu, cuda, cuda:1 ...
        holdout: share of the training images kept out of training, for the temperature and for DICE's p.
        start_sparsity: sparsity from which gmp and granet prune; by default 0 and 0.5.
        gradient_weight: weight of the gradient in mest's drop score.
        soft_memory_bound: mest grows before it drops (EM&S).
        ablation_threshold: share of its fan-in that must be salient for srigl to keep a neuron; 0 keeps all.
        forward_share: share of the trained weights that top-kast uses in the forward pass.
        label_smoothing: probability that label-smoothing spreads over all classes.
        mixup_alpha: both parameters of mixup's Beta distribution.
        logit_temperature: tau of logitnorm.
        outlier_weight: weight of the loss on vos' virtual outliers.
        outliers_from: share of the training after which vos draws them.
        samples: stochastic passes that mc-dropout averages for a prediction.
        tickets: networks that sup-tickets makes in its cycles of the learning rate, and averages.
    """

    dataset: str = "digits"
    data_root: str | None = None
    download: bool = False
    image_size: int | None = None
    ood: list[str] | None = None
    headline: Score = "msp"
    model: ModelName | ImportPath = "small-resnet"
    width: int | None = None
    method: TrainingMethod = "rigl"
    reliability: Reliability = "moon"
    without: tuple[str, ...] = ()
    sparsity: float = 0.9
    pattern: str = "unstructured"
    allocation: Allocation = "erk"
    exclude: tuple[str, ...] = ()
    fuse: bool = False
    recompute: bool = False
    epochs: int = 40
    batch_size: int = 64
    lr: float = 0.12
    lr_end: float | None = None
    lr_until: float = 0.8
    momentum: float = 0.9
    weight_decay: float = 5e-4
    interval: int = 50
    drop_fraction: float = 0.3
    stop: float = 0.7
    final_weight: float | None = None
    warmup_epochs: int | None = None
    vote_from: float = 0.8
    keep: float = 0.9
    rescale: bool = False
    amp: Literal["none", "bfloat16", "float16"] = "none"
    seed: int = 0
    device: str = "cpu"
    holdout: float = 0.0
    start_sparsity: float | None = None
    gradient_weight: float = 0.01
    soft_memory_bound: bool = False
    ablation_threshold: float = 0.3
    forward_share: float = 0.5
    label_smoothing: float = 0.1
    mixup_alpha: float = 0.2
    logit_temperature: float = 0.04
    outlier_weight: float = 0.1
    outliers_from: float = 0.4
    samples: int = 10
    tickets: int = 4

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for anything that can be known to be wrong before the data is read."""
        from sparse_moon.topology import block_shape

        for name, hint in get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), hint)
        object.__setattr__(self, "model", str(self.model))  # the command line's paths are of a subclass
        check_sparsity(self.sparsity)
        block_shape(self.pattern)
        for name in ("epochs", "batch_size", "interval", "samples", "tickets", "width", "image_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seed", "lr_end", "final_weight", "warmup_epochs"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in _SHARES:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not (self.lr > 0 and 0 <= self.momentum < 1 and self.weight_decay >= 0):
            raise ValueError(
                f"need lr > 0, momentum in [0, 1) and weight_decay >= 0, "
                f"got {self.lr}, {self.momentum}, {self.weight_decay}"
            )
        for name in ("mixup_alpha", "logit_temperature"):
            if getattr(self, name) <= 0.0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("holdout", "label_smoothing"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("gradient_weight", "outlier_weight"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("keep", "forward_share"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        if self.recompute and not self.fuse:
            raise ValueError("recompute needs fuse")
        parts = PARTS.get(self.reliability, ())
        if not set(self.without) <= set(parts):
            raise ValueError(f"{self.reliability!r} has the parts {parts} to leave out, got {self.without}")
        self._check_method()
        _check_device(self.device)

    def _check_method(self) -> None:
        """What method and reliability ask of each other and of the rest."""
        if self.masks and self.method == "dense":
            raise ValueError(f"{self.reliability!r} masks sparse layers, it needs another method than 'dense'")
        if self.reliability == "sup-tickets" and self.method not in ("set", "rigl", "mest"):
            raise ValueError(
                "'sup-tickets' needs a method that exchanges weights and keeps their number, "
                f"'set', 'rigl' or 'mest', got {self.method!r}"
            )
        if self.reliability == "sup-tickets" and self.soft_memory_bound:
            raise ValueError("'sup-tickets' needs a constant number of weights, it cannot have soft_memory_bound")
        if self.averages and self.updates and self.stop > self.first_vote / self.epochs:
            raise ValueError(
                f"stop {self.stop} leaves the topology changing at the end of epoch {self.first_vote} of "
                f"{self.epochs}, from which weights are averaged; lower stop or raise vote_from ({self.vote_from})"
            )
        if self.first_sparsity is not None and not 0.0 <= self.first_sparsity <= self.sparsity:
            raise ValueError(
                f"{self.method!r} goes from start_sparsity to sparsity, need 0 <= {self.first_sparsity} <= "
                f"{self.sparsity}"
            )
        if self.method == "top-kast" and (1.0 - self.sparsity) / self.forward_share >= 1.0:
            raise ValueError(
                f"'top-kast' trains a share {(1 - self.sparsity) / self.forward_share:g} of the weights, "
                f"it needs a sparsity above {1 - self.forward_share:g}, got {self.sparsity}"
            )

    @property
    def updates(self) -> bool:
        """Whether the topology changes during training."""
        return self.method not in ("dense", "static")

    @property
    def topology_stop(self) -> float:
        """Share of the training after which the topology is frozen."""
        return 1.0 if self.reliability == "sup-tickets" else self.stop

    @property
    def first_sparsity(self) -> float | None:
        """Sparsity from which a method that prunes starts; None with the others."""
        if self.method not in START_SPARSITY:
            return None
        return START_SPARSITY[self.method] if self.start_sparsity is None else self.start_sparsity

    @property
    def unknown_unit(self) -> bool:
        """Whether the network has an output for "unknown" after those of the classes."""
        return self.reliability == "dac" or (self.reliability == "moon" and "loss" not in self.without)

    @property
    def averages(self) -> bool:
        """Whether the weights of the late epochs are averaged."""
        return (self.reliability == "moon" and "voting" not in self.without) or (
            self.reliability == "cigl" and "averaging" not in self.without
        )

    @property
    def averages_predictions(self) -> bool:
        """Whether the predictions of the late epochs' networks are averaged."""
        return self.reliability == "cigl" and "averaging" in self.without

    @property
    def masks(self) -> bool:
        """Whether random masks hide weights during training."""
        return self.reliability in _MASKED or (self.reliability == "cigl" and "mask" not in self.without)

    @property
    def first_vote(self) -> int:
        """Number, from 1, of the first epoch whose end takes part in the vote."""
        return min(math.floor(self.vote_from * self.epochs) + 1, self.epochs)

    @property
    def ticket_epochs(self) -> tuple[int, ...]:
        """Numbers, from 1, of the epochs that end a cycle of Sup-tickets; the cycles cover the epochs of the vote."""
        before, late = self.first_vote - 1, self.epochs - self.first_vote + 1
        count = min(self.tickets, late)
        return tuple(before + late * (i + 1) // count for i in range(count))

    @property
    def label(self) -> str:
        """The reliability method with what it lacks: ``moon:-tuning``, the syntax of ``sparse-moon compare``."""
        return self.reliability + "".join(f"{':' * (i == 0)}-{part}" for i, part in enumerate(self.without))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "TrainConfig":
        """From ``config.json``; settings that it lacks have their defaults.

        Raises:
            ValueError: unknown settings or bad values.
        """
        unknown = set(content) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown settings {sorted(unknown)}")
        tuples = {name: content.get(name) or () for name in ("exclude", "without")}
        return cls(**{**content, **{k: tuple(v) if isinstance(v, list) else v for k, v in tuples.items()}})


def _check_type(name: str, value: Any, hint: Any) -> None:
    """Raise ``ValueError`` unless a setting has a value of its type, and numbers that are finite."""
    expected = {bool: "true or false", int: "an integer", float: "a number", str: "a text", NoneType: "nothing"}
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    names = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
    if names:
        own = ImportPath in parts
        if value not in names and not (own and is_import_path(value)):
            raise ValueError(f"{name} must be one of {', '.join(names)}{OR_IMPORT_PATH * own}, got {value!r}")
        return
    for part in parts:
        if get_origin(part) in (list, tuple):
            fits = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
        elif isinstance(value, bool):
            fits = part is bool
        else:
            fits = isinstance(value, int | float if part is float else part)
        if fits:
            return
    kinds = " or ".join(expected.get(part, "a list of texts") for part in parts)
    raise ValueError(f"{name} must be {kinds}, got {value!r}")


def _check_device(device: str) -> None:
    """Raise ``ValueError`` for a device that is not there, or does not compute."""
    import torch

    try:
        (torch.zeros(1, device=device) + 1).item()
    except Exception as error:  # each kind of device has its own
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"device {device!r} cannot be used: {reason}") from None


def parse_label(label: str) -> tuple[str, tuple[str, ...]]:
    """Reliability method and the parts to leave out, from :attr:`TrainConfig.label`."""
    name, _, parts = label.partition(":-")
    return name, tuple(part for part in parts.split("-") if part)
