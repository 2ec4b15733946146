"""Schedules: frozen functions from an optimizer step to a value. Outside [0, steps] they hold their end values.

``Constant``, ``Cosine`` and ``Cubic`` are ``sparse_moon``'s own names too; ``Linear`` and ``Step`` are not, because a
layer and an optimizer's step are called so.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


def _check_finite(schedule: object, **numbers: float) -> None:
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise ValueError(f"{type(schedule).__name__}: {name} must be finite, got {number}")


@dataclass(frozen=True)
class Constant:
    """The same value at every step."""

    value: float

    def __post_init__(self) -> None:
        _check_finite(self, value=self.value)

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class _Ramp:
    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check_finite(self, start=self.start, end=self.end, steps=self.steps)
        if self.steps < 1:
            raise ValueError(f"{type(self).__name__}: steps must be at least 1, got {self.steps}")

    def _progress(self, step: int) -> float:
        return min(max(step / self.steps, 0.0), 1.0)


@dataclass(frozen=True)
class Linear(_Ramp):
    """A straight line from ``start`` at step 0 to ``end`` at step ``steps``."""

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * self._progress(step)


@dataclass(frozen=True)
class Cosine(_Ramp):
    """Half a cosine from ``start`` at step 0 to ``end`` at step ``steps``.

    With ``end=0`` this is RigL's drop fraction ``a/2 (1 + cos(pi t / T_end))`` (Evci et al. 2020, section 3).
    """

    def __call__(self, step: int) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1.0 + math.cos(math.pi * self._progress(step)))


@dataclass(frozen=True)
class Cubic(_Ramp):
    """``end + (start - end) (1 - step / steps)^3``: fast first, then slower (Zhu & Gupta 2018, equation 1).

    Its mean over the ramp is ``end + (start - end) / 4``.
    """

    def __call__(self, step: int) -> float:
        return self.end + (self.start - self.end) * (1.0 - self._progress(step)) ** 3


@dataclass(frozen=True)
class Step:
    """``start``, times ``gamma`` from every milestone on, as ``torch.optim.lr_scheduler.MultiStepLR``.

    Args:
        start: value before the first milestone.
        milestones: steps in ascending order, each at least 1; ``Step(0.1, (30_000, 60_000))``.
        gamma: factor, positive.
        warmup: the first so many steps run in a straight line from ``start / warmup`` to ``start`` (Goyal et al. 2017);
            at most the first milestone.

    Raises:
        ValueError: other numbers.
    """

    start: float
    milestones: Sequence[int]
    gamma: float = 0.1
    warmup: int = 0

    def __post_init__(self) -> None:
        milestones = tuple(self.milestones)
        object.__setattr__(self, "milestones", milestones)  # so that it cannot change
        _check_finite(self, start=self.start, gamma=self.gamma)
        if not all(a < b < math.inf for a, b in zip((0, *milestones), milestones, strict=False)):
            raise ValueError(f"Step: milestones must ascend from at least 1, got {milestones}")
        if self.gamma <= 0:
            raise ValueError(f"Step: gamma must be positive, got {self.gamma}")
        last = milestones[0] if milestones else math.inf
        if not 0 <= self.warmup <= last or self.warmup == math.inf:
            raise ValueError(f"Step: warmup must be in [0, {last}], up to the first milestone, got {self.warmup}")

    @property
    def end(self) -> float:
        """The value after the last milestone."""
        return self(self.milestones[-1] if self.milestones else self.warmup)

    def __call__(self, step: int) -> float:
        step = max(step, 0)
        if step < self.warmup:
            return self.start * (step + 1) / self.warmup
        return self.start * self.gamma ** sum(step >= milestone for milestone in self.milestones)


Schedule = Constant | Linear | Cosine | Cubic | Step
