"""The parts of ``sparse_mlp`` that kernels do at once, by one operator after the other."""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_moon.ops.plan import Plan
from sparse_moon.ops.sparse_linear.api import FORWARD, INPUT_GRAD, VALUES_GRAD, bias_grad

Gelu = Literal["gelu", "gelu_tanh"]
NAMES: tuple[Gelu, ...] = get_args(Gelu)
"""Operators take an activation as its place here."""

APPROXIMATE = ("none", "tanh")
"""The same as torch names it."""


class Parts(NamedTuple):
    """Of the first product: up to its activation, back through it; of either: what is summed over tokens."""

    forward: Callable[[Tensor, Tensor, Tensor, int, Plan], tuple[Tensor, Tensor]]
    """From input, values and bias to what is activated and its activation."""
    backward: Callable[[Tensor, Tensor, Tensor, int, Plan], Tensor]
    """From the second product's gradient, its values and what was activated to the gradient of that."""
    values_grad: Callable[[Tensor, Tensor, Plan], tuple[Tensor, Tensor]]
    """From the gradient of the output and the input to those of values and bias."""


def forward(input: Tensor, values: Tensor, bias: Tensor, activation: int, plan: Plan) -> tuple[Tensor, Tensor]:
    before = FORWARD(input, values, bias, None, plan)
    return before, F.gelu(before, approximate=APPROXIMATE[activation])


def backward(grad: Tensor, values: Tensor, before: Tensor, activation: int, plan: Plan) -> Tensor:
    grad = INPUT_GRAD(grad, values, plan)
    return torch.ops.aten.gelu_backward(grad, before, approximate=APPROXIMATE[activation])


def values_grad(grad: Tensor, input: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    return VALUES_GRAD(grad, input, plan), bias_grad(grad)


SEPARATE = Parts(forward, backward, values_grad)
