"""What every detector is, and a bounded sample of a stream for those that need one."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sparse_moon.ood.outputs import Outputs
from sparse_moon.ood.registry import register

SAMPLES = 2**15
"""Samples that a `Sample` keeps at most: 64 MiB for 512 float32 features."""


class Detector(ABC):
    """Scores how much a sample looks in-distribution; higher is more so.

    Everything is computed on the device of the outputs; fitting and `score` expect the same one. To be saved, the
    arguments of the constructor must be attributes of the same names.

    A subclass that sets ``name``, at the top level of a module, is in `DETECTORS` and can be saved as soon as it is
    defined. What it asks of the network are class attributes.

    Attributes:
        name: key in tables and in `DETECTORS`. To compare two settings of one detector, give an instance another.
        learned: names of the tensors that `finish` sets; a detector without any does not fit.
        linear_head: whether the score needs outputs of a network with a linear head.
        logit_scale: whether it reads how large the logits are in all, which logarithms of probabilities do not say.
        cosine_head: whether it needs those of a network with a `CosineHead`; it is then not in `DETECTORS`.
        unknown_output: whether it needs K + 1 outputs.
        held_out: whether it learns from held-out ID data in place of training data; it is then not in `DETECTORS`.
        num_classes: K; with K + 1 outputs the last is the unknown one.
        threshold: scores from here on are taken as in-distribution; see `sparse_moon.ood.threshold`.
    """

    name: str
    learned: ClassVar[tuple[str, ...]] = ()
    linear_head: ClassVar[bool] = False
    logit_scale: ClassVar[bool] = False
    cosine_head: ClassVar[bool] = False
    unknown_output: ClassVar[bool] = False
    held_out: ClassVar[bool] = False
    threshold: float | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register(cls)

    @classmethod
    def make(cls, num_classes: int) -> Self:
        """The detector with its defaults; to be overridden where the constructor needs more than ``num_classes``."""
        return cls(num_classes)

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes
        for name in self.learned:
            setattr(self, name, None)
        self.start()

    def start(self) -> None:
        """Before the first training batch: forget what an earlier fit left over; nothing by default."""
        return

    def update(self, batch: Outputs) -> None:
        """Learn from a batch of training data; nothing by default."""
        return

    def finish(self) -> None:
        """After the last training batch: set what `learned` names; nothing by default."""
        return

    def fit(self, train: Outputs) -> Self:
        """Learn from the whole training set at once."""
        self.start()
        self.update(train)
        self.finish()
        return self

    def perturb(self, model: nn.Module, images: Tensor) -> Tensor:
        """Change the images before the pass that is scored; nothing by default."""
        return images

    @abstractmethod
    def score(self, outputs: Outputs) -> Tensor:
        """(N,) floating scores, of the perturbed pass where `perturb` changes the images.

        Raises:
            ValueError: logits that are not (N, K) or (N, K + 1), or a detector that is not fitted.
        """

    def accepts(self, outputs: Outputs) -> Tensor:
        """(N,) bool: whether the score reaches the threshold.

        Raises:
            ValueError: the detector has no threshold, or as `score`.
        """
        if self.threshold is None:
            raise ValueError(f"{self.name} has no threshold: set it to threshold(id_scores) first")
        return self.score(outputs) >= self.threshold

    @property
    def fits(self) -> bool:
        """Whether the detector learns: from the training set, or from held-out data, see ``held_out``."""
        return bool(self.learned)

    @property
    def perturbs(self) -> bool:
        """Whether `score` needs a pass of its own."""
        return type(self).perturb is not Detector.perturb

    def to(self, device: torch.device | str) -> Self:
        """Move what was learned to ``device``; returns the detector."""
        for name in self.learned:
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.to(device))
        return self

    def fitted(self, value: Tensor | None) -> Tensor:
        """``value``, one of those that `finish` sets.

        Raises:
            ValueError: it is None, the detector is not fitted.
        """
        if value is None:
            raise ValueError(f"{type(self).__name__} is not fitted: call fit(train) first")
        return value


class Sample:
    """Every s-th row of a stream, from the first on; s doubles whenever there are more than ``limit``.

    So a short stream is kept whole, and what is kept does not depend on how the stream is cut into batches.
    """

    def __init__(self, limit: int = SAMPLES) -> None:
        self.limit, self.stride, self.seen = limit, 1, 0
        self._parts: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Take (B, ...) further rows."""
        # A copy, so that a kept row does not hold the memory of its whole batch.
        self._parts.append(rows[-self.seen % self.stride :: self.stride].clone())
        self.seen += len(rows)
        while sum(map(len, self._parts)) > self.limit:
            self._parts = [self.rows()[::2].clone()]
            self.stride *= 2

    def rows(self) -> Tensor:
        """(at most ``limit``, ...) kept rows."""
        return torch.cat(self._parts)


def check_share(name: str, value: float) -> float:
    """``value``, which must be in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
    return value
