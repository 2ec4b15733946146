"""The activations that a batch norm can apply itself, and their derivatives."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["none", "relu", "relu6", "silu", "hardswish"]
NAMES: tuple[str, ...] = get_args(Activation)
"""Operators and the kernel take an activation as its place here."""

FUNCTIONS: tuple[Callable[..., Tensor], ...] = (lambda x, inplace=False: x, F.relu, F.relu6, F.silu, F.hardswish)
"""All take ``inplace``."""

LAST_FLAT = NAMES.index("relu6")
"""Up to here the derivative can be told from the result."""


def times_derivative(activation: int, grad: Tensor, x: Tensor) -> Tensor:
    """The gradient in front of an activation.

    Args:
        activation: its place in :data:`NAMES`.
        grad: of the result.
        x: what was activated; up to :data:`LAST_FLAT` the result does as well.
    """
    match NAMES[activation]:
        case "relu":
            return torch.where(x <= 0, 0, grad)
        case "relu6":
            return torch.where((x <= 0) | (x >= 6), 0, grad)
        case "silu":
            s = torch.sigmoid(x)
            return grad * s * (1 + x * (1 - s))
        case "hardswish":
            return torch.where(x <= -3, 0, torch.where(x < 3, grad * (x / 3 + 0.5), grad))
    return grad
