"""Detectors by name. Each class registers itself when it is defined, ours and any other; see `Detector`."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparse_moon.ood.detector import Detector

SCORES: "dict[str, type[Detector]]" = {}
"""Every registered detector, by name."""

DETECTORS: "dict[str, Callable[[int], Detector]]" = {}
"""Detectors by name, each made from the number of classes alone, for a network with a linear head."""


def register(detector: "type[Detector]") -> None:
    """Note a class that has a name of its own and can be imported; one defined anew takes the place of the first.

    Raises:
        ValueError: another class has the name.
    """
    name = vars(detector).get("name")
    if not isinstance(name, str) or "<locals>" in detector.__qualname__:
        return
    if name in SCORES and import_path(SCORES[name]) != import_path(detector):
        both = f"{import_path(SCORES[name])} and {import_path(detector)}"
        raise ValueError(f"detectors need distinct names, two are called {name!r}: {both}")
    SCORES[name] = detector
    if not detector.cosine_head:
        DETECTORS[name] = detector.make


def import_path(detector: "type[Detector]") -> str:
    """``module.Class``, how files and the command line name a class; for those of this package ``Class`` alone."""
    if detector.__module__.startswith("sparse_moon.ood."):
        return detector.__name__
    return f"{detector.__module__}.{detector.__qualname__}"


def by_import_path(path: str) -> "type[Detector]":
    """The registered class with this `import_path`; imports nothing.

    Raises:
        ValueError: there is none.
    """
    for detector in SCORES.values():
        if import_path(detector) == path:
            return detector
    module = path.rpartition(".")[0]
    hint = f": import {module}, where it must be a Detector with a name of its own" if module else ""
    raise ValueError(f"no detector {path} is known{hint}")


def detector_class(name: str) -> "type[Detector]":
    """The registered class with this name or `import_path`.

    Raises:
        ValueError: there is none.
    """
    if name in SCORES:
        return SCORES[name]
    if "." in name:
        return by_import_path(name)
    raise ValueError(f"unknown scores {[name]}, expected some of {sorted(SCORES)}, or the import path of another")
