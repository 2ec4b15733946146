"""Which labels are classes, and which rows are probabilities: losses check theirs without waiting for a GPU."""

import torch
from torch import Tensor

from sparse_moon.ops.registry import define


def check_target(target: Tensor, values: Tensor) -> None:
    """Raise ``ValueError`` unless ``target`` is one int64 label for each row of ``values``, on the same device."""
    if target.shape != values.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target must be int64 ({values.shape[0]},), got {target.dtype} {tuple(target.shape)}")
    if target.device != values.device:
        raise ValueError(f"target must be on {values.device}, got one on {target.device}")


def refuse_label(target: Tensor, row: int, num_classes: int) -> ValueError:
    """The error to raise for the label in this row."""
    return ValueError(f"target must be in [0, {num_classes}), got {target[row].item()} in row {row}")


def known_labels_reference(target: Tensor, num_classes: int) -> Tensor:
    """The specification."""
    known = (target >= 0) & (target < num_classes)
    if target.device.type == "cpu" and not known.all():
        raise refuse_label(target, int(known.logical_not().nonzero()[0]), num_classes)
    return known


def _fake(target: Tensor, num_classes: int) -> Tensor:
    return torch.empty_like(target, dtype=torch.bool)


# an operator, so that a compiled loss raises as well
define("known_labels(Tensor target, SymInt num_classes) -> Tensor", known_labels_reference, _fake)


def known_labels(target: Tensor, num_classes: int) -> Tensor:
    """Which labels are in [0, K).

    Args:
        target: (B,) int64.
        num_classes: K.

    Returns:
        (B,) bool. On the CPU all are True; elsewhere nothing can be raised without waiting for the device.

    Raises:
        ValueError: on the CPU, a label outside [0, K), -100 as well: no label means "ignore this row".
    """
    return torch.ops.sparse_moon.known_labels(target, num_classes)


def known_probabilities_reference(target: Tensor) -> Tensor:
    """The specification."""
    # 0.01 is more than rounding to 16 bits makes of a sum, 0.004
    known = (target >= 0).all(1) & ((target.sum(1, dtype=torch.float64) - 1).abs() <= 0.01)
    if target.device.type == "cpu" and not known.all():
        row = int(known.logical_not().nonzero()[0])
        lowest, total = target[row].min().item(), target[row].sum(dtype=torch.float64).item()
        raise ValueError(
            "target must be probabilities, at least 0 and of sum 1, "
            f"got a lowest of {lowest:g} and a sum of {total:g} in row {row}"
        )
    return known


define(
    "known_probabilities(Tensor target) -> Tensor",
    known_probabilities_reference,
    lambda target: target.new_empty(target.shape[:1], dtype=torch.bool),
)


def known_probabilities(target: Tensor) -> Tensor:
    """Which rows are probabilities: at least 0, and 1 in sum, within 0.01.

    Args:
        target: (B, K) floating.

    Returns:
        (B,) bool. On the CPU all are True; elsewhere nothing can be raised without waiting for the device.

    Raises:
        ValueError: on the CPU, a row that is none.
    """
    return torch.ops.sparse_moon.known_probabilities(target.detach())


def usable_labels(target: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Labels (B,) that are safe to index with, and a factor (B,) for what is computed from them.

    The factor is 1, and NaN where the label is not ``known``: loss and gradient of that row become NaN.
    """
    return torch.where(known, target, 0), torch.where(known, 1.0, float("nan"))
