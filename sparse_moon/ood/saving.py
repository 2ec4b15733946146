"""Detectors on disk, and the threshold that turns a score into a decision."""

import io
import math
from inspect import signature
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from sparse_moon import files
from sparse_moon.ood.detector import Detector
from sparse_moon.ood.metrics import check_scores
from sparse_moon.ood.registry import SCORES

FORMAT = "sparse_moon detector 1"


def threshold(id_scores: Tensor, tpr: float = 0.95) -> float:
    """The largest threshold that at least a share ``tpr`` of in-distribution samples reach: ``score >= threshold``.

    Args:
        id_scores: (N,) floating, scores of held-out **ID** samples, the positive class; higher means ID.
        tpr: true positive rate in (0, 1].

    Raises:
        ValueError: scores that are empty, not 1-d, or NaN; a rate out of range.
    """
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must be in (0, 1], got {tpr}")
    check_scores("id_scores", id_scores)
    size = len(id_scores)
    accepted = math.ceil(tpr * size)
    if (accepted - 1) / size >= tpr:  # the product was rounded up
        accepted -= 1
    return id_scores.detach().sort(descending=True).values[accepted - 1].item()


def save_detector(path: Path | str, detector: Detector) -> None:
    """Write a fitted detector with its settings, name and threshold; an existing file is replaced as a whole.

    Scalars of NumPy and tensors without dimensions are written as Python's numbers.

    Raises:
        ValueError: a detector that is not fitted, of a class that is not registered, see `Detector`, or with settings
            that `load_detector` would refuse.
        OSError: the file cannot be written.
    """
    content = _to_dict(detector)
    _made_of(content, f"{detector.name!r} could not be loaded again")
    files.write_archive(Path(path), {"format": FORMAT, "detector": content})


def load_detector(path: Path | str, device: torch.device | str = "cpu") -> Detector:
    """The detector that `save_detector` wrote, on ``device``: same scores, bit for bit. Loading executes no code.

    The class of a detector from outside this package must have been imported: nothing that a file names is.

    Raises:
        ValueError: a file that is missing, damaged, or not a detector of a known class.
    """
    content = files.read_archive(Path(path), "a detector")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a detector of this version of sparse_moon")
    return _made_of(content.get("detector", {}), f"{path} does not describe a detector").to(device)


def _made_of(content: dict[str, Any], problem: str) -> Detector:
    try:
        return _from_dict(content)
    except Exception as error:  # what is wrong in a file has no one kind of error
        reason = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{problem}: {reason}") from None


def _to_dict(detector: Detector) -> dict[str, Any]:
    kind = type(detector)
    if SCORES.get(kind.name) is not kind:
        raise ValueError(
            "expected a class with a name of its own at the top level of a module, or one of sparse_moon.ood, "
            f"got {kind.__name__}"
        )
    arguments = {name: getattr(detector, name) for name in signature(kind).parameters}
    return {
        "kind": SCORES.import_path(kind),
        "arguments": {k: _to_dict(v) if isinstance(v, Detector) else _plain(k, v) for k, v in arguments.items()},
        "name": _plain("name", detector.name),
        "threshold": _plain("threshold", detector.threshold),
        "learned": {name: detector.fitted(getattr(detector, name)).cpu() for name in detector.learned},
    }


def _plain(name: str, value: Any) -> Any:
    """``value`` as it can be loaded."""
    if getattr(value, "ndim", None) == 0:
        return value.item()
    if type(value) in (bool, int, float, str, NoneType):
        return value
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)  # which knows tensors, lists and some others
    except Exception:  # what cannot be saved has no one kind of error
        raise ValueError(f"{name} must be one that can be loaded again, got {value!r:.200}") from None
    return value


def _from_dict(content: dict[str, Any]) -> Detector:
    kind = SCORES.by_import_path(content["kind"])
    arguments = content["arguments"].items()
    # The constructors differ, and check what they get.
    make: Any = kind
    detector: Detector = make(**{k: _from_dict(v) if isinstance(v, dict) else v for k, v in arguments})
    name, limit, learned = content["name"], content["threshold"], content["learned"]
    if not isinstance(name, str) or not isinstance(limit, int | float | None):
        raise ValueError(f"expected a name and a threshold, got {name!r} and {limit!r}")
    if set(learned) != set(kind.learned) or not all(isinstance(value, Tensor) for value in learned.values()):
        raise ValueError(f"expected the tensors {sorted(kind.learned)}, got {sorted(learned)}")
    detector.name, detector.threshold = name, limit
    for name, value in learned.items():
        setattr(detector, name, value)
    return detector
