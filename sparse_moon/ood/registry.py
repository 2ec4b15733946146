"""Detectors by name. Each class registers itself when it is defined, ours and any other; see `Detector`."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from sparse_moon.registry import Registry

if TYPE_CHECKING:
    from sparse_moon.ood.detector import Detector

SCORES: "Registry[Detector]" = Registry("detector", "sparse_moon.ood", "Detector")
"""Every registered detector, by name."""

DETECTORS: "dict[str, Callable[[int], Detector]]" = {}
"""Detectors by name, each made from the number of classes alone, for a network with a linear head and training data."""


def register(detector: "type[Detector]") -> None:
    """Note a class that has a name of its own and can be imported; one defined anew takes the place of the first.

    Raises:
        ValueError: another class has the name.
    """
    if SCORES.add(detector) and not (detector.cosine_head or detector.held_out):
        DETECTORS[detector.name] = detector.make


def detector_class(name: str) -> "type[Detector]":
    """The registered class with this name or import path.

    Raises:
        ValueError: there is none.
    """
    if name not in SCORES and "." not in name:
        raise ValueError(f"unknown scores {[name]}, expected some of {sorted(SCORES)}, or the import path of another")
    return SCORES.find(name)
