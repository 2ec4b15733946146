"""Detectors that shape the activations before the head and leave the score to another detector."""

from abc import abstractmethod
from dataclasses import replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from sparse_moon.ood.detector import Detector, Sample, check_share
from sparse_moon.ood.logits import Energy
from sparse_moon.ood.outputs import Outputs, features_of, linear_head


class Shaping(Detector):
    """Changes outputs, then scores them with another detector: ``ReAct(Energy(10))``, ``ReAct(DICE(Energy(10)))``.

    Logits are computed anew, for all outputs, by the network's own head; what an unknown output means is up to the
    inner detector. Named after both detectors, but only after the outer one where the inner one is `Energy`.

    Args:
        detector: any that reads logits alone and learns nothing, or another `Shaping`.

    Raises:
        ValueError: a detector that learns from or perturbs unshaped outputs.
    """

    linear_head = True

    def __init__(self, detector: Detector) -> None:
        if detector.perturbs or (detector.fits and not isinstance(detector, Shaping)):
            raise ValueError(
                f"{type(self).__name__} goes before a detector that neither learns nor perturbs, or that shapes "
                f"activations itself; got {detector.name}"
            )
        self.detector = detector
        super().__init__(detector.num_classes)
        own = type(self).name
        self.name = own if detector.name == "energy" else f"{own}+{detector.name}"

    @classmethod
    def make(cls, num_classes: int) -> Self:
        """The detector with its defaults, before `Energy`."""
        return cls(Energy(num_classes))

    @abstractmethod
    def shape(self, outputs: Outputs) -> Outputs:
        """The outputs that the inner detector scores."""

    def score(self, outputs: Outputs) -> Tensor:
        return self.detector.score(self.shape(outputs))

    def start(self) -> None:
        self.detector.start()

    def update(self, batch: Outputs) -> None:
        self.detector.update(batch)

    def finish(self) -> None:
        self.detector.finish()

    @property
    def fits(self) -> bool:
        return bool(self.learned) or self.detector.fits

    def to(self, device: torch.device | str) -> Self:
        self.detector.to(device)
        return super().to(device)


class ReAct(Shaping):
    """Clips activations from above at a percentile of all training activations (Sun et al. 2021).

    The percentile is taken over an evenly spread sample of at most 32768 training images, all units jointly. An inner
    `DICE` learns from activations that are not clipped, as in DICE's released code.

    Args:
        detector: see `Shaping`.
        percentile: in [0, 1]; the paper takes 0.9.
    """

    name = "react"
    learned = ("clip",)
    clip: Tensor | None

    def __init__(self, detector: Detector, percentile: float = 0.9) -> None:
        super().__init__(detector)
        if not 0 <= percentile <= 1:
            raise ValueError(f"percentile must be in [0, 1], got {percentile}")
        self.percentile = percentile

    def start(self) -> None:
        super().start()
        self._sample = Sample()

    def update(self, batch: Outputs) -> None:
        super().update(batch)
        self._sample.add(features_of(batch))

    def finish(self) -> None:
        """Set the 0-d float64 ``clip``.

        Raises:
            ValueError: no training data, or activations that are not finite.
        """
        super().finish()
        if not self._sample.seen:
            raise ValueError("ReAct is not fitted: no training data")
        activations = self._sample.rows()
        if not activations.isfinite().all():
            raise ValueError("training features must be finite")
        # NumPy selects instead of sorting, and takes more than torch's 2^24 values.
        clip = np.quantile(activations.cpu().double().numpy(), self.percentile)
        self.clip = torch.tensor(clip, dtype=torch.float64, device=activations.device)
        self._sample = Sample()

    def shape(self, outputs: Outputs) -> Outputs:
        clip = self.fitted(self.clip)
        return _with_features(outputs, features_of(outputs).double().clamp(max=clip))


class ASH(Shaping):
    """Keeps an image's largest activations and scales them by ``exp(s1 / s2)``: ASH-S (Djurisic et al. 2023).

    s1 is the sum of all activations and s2 that of those kept; ties go to the lowest index. It works on the
    penultimate features, after pooling, and is meant for features that are not negative: where ``s2 <= 0`` the scale
    is e.

    Args:
        detector: see `Shaping`.
        percentile: share of activations that are set to zero, in [0, 1).
    """

    name = "ash"

    def __init__(self, detector: Detector, percentile: float = 0.9) -> None:
        super().__init__(detector)
        self.percentile = check_share("percentile", percentile)

    def shape(self, outputs: Outputs) -> Outputs:
        features = features_of(outputs).double()
        kept = _largest(features, self.percentile)
        return _with_features(outputs, kept * _scale(features, kept))


class SCALE(Shaping):
    """Scales all activations of an image by ASH's ``exp(s1 / s2)`` and drops none (Xu et al. 2024).

    Args:
        detector: see `Shaping`.
        percentile: share of activations that are left out of s2, in [0, 1); the paper takes 0.85 on ImageNet.
    """

    name = "scale"

    def __init__(self, detector: Detector, percentile: float = 0.85) -> None:
        super().__init__(detector)
        self.percentile = check_share("percentile", percentile)

    def shape(self, outputs: Outputs) -> Outputs:
        features = features_of(outputs).double()
        return _with_features(outputs, features * _scale(features, _largest(features, self.percentile)))


def _with_features(outputs: Outputs, features: Tensor) -> Outputs:
    return replace(outputs, features=features, logits=linear_head(outputs).logits(features))


def _largest(features: Tensor, percentile: float) -> Tensor:
    """``features`` with all but the largest ``1 - percentile`` of each row, at least one, set to zero."""
    size = features.shape[1]
    keep = max(1, size - round(size * percentile))
    index = features.argsort(dim=1, descending=True, stable=True)[:, :keep]
    return torch.zeros_like(features).scatter_(1, index, features.gather(1, index))


def _scale(features: Tensor, kept: Tensor) -> Tensor:
    whole, part = features.sum(1, keepdim=True), kept.sum(1, keepdim=True)
    return torch.where(part > 0, whole / part, 1.0).exp()
