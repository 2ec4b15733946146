"""The scattered weight of dense products, kept while its values stay the same.

One scatter serves a forward pass and its backward pass, where autograd keeps the weight with what else it has saved.
Where no gradients are wanted, the plan keeps it, and the same values need no other scatter.
"""

from threading import get_ident
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparse_moon.ops.masked_dense import scatter_values
from sparse_moon.ops.plan import Plan

_FORWARD, _BACKWARD = "weight of the last forward pass", "weight of a backward pass"


class _Kept(NamedTuple):
    weight: Tensor
    channels_last: bool
    values: Tensor
    """An alias of what was scattered: as long as it lives, no other tensor gets that memory."""
    version: int
    copy: Tensor | None
    """What was scattered; for the next forward pass, because writes through ``.data`` do not count as versions."""

    def is_of(self, values: Tensor, channels_last: bool) -> bool:
        return (
            self.channels_last == channels_last
            and self.values.data_ptr() == values.data_ptr()
            and self.values.shape == values.shape
            and self.values.dtype is values.dtype
            and self.version == values._version
        )


def forward_weight(values: Tensor, plan: Plan, *, channels_last: bool = False) -> Tensor:
    """The dense weight (O, I) or (O, C/groups, kh, kw) of a forward pass.

    On the CPU that of the last pass where no backward pass is to have it and the values have the same bits; on a GPU
    comparing them would make the host wait.
    """
    if not _is_own(values):
        return _scattered(values, plan, channels_last)
    kept: _Kept | None = plan.ready.get(_FORWARD)
    again = kept is not None and kept.is_of(values, channels_last)
    if again and kept is not None and kept.copy is not None and _same_bits(kept.copy, values):
        return kept.weight
    weight = _scattered(values, plan, channels_last)
    copy = values.detach().clone() if again and values.device.type == "cpu" else None
    plan.ready[_FORWARD] = _Kept(weight, channels_last, values.detach(), values._version, copy)
    return weight


def saved_weight(values: Tensor, plan: Plan) -> Tensor | None:
    """What autograd is to save after a forward pass with these values; None where its product was no dense one."""
    kept: _Kept | None = plan.ready.pop(_FORWARD, None)
    return kept.weight if kept is not None and kept.is_of(values, kept.channels_last) else None


def give_back(weight: Tensor, plan: Plan) -> None:
    """Before the products of a backward pass: what :func:`saved_weight` gave after its forward pass."""
    plan.ready[_BACKWARD, get_ident()] = weight


def backward_weight(values: Tensor, plan: Plan, *, channels_last: bool = False) -> Tensor:
    """That of a product in a backward pass."""
    weight: Tensor | None = plan.ready.pop((_BACKWARD, get_ident()), None)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if weight is not None and weight.is_contiguous(memory_format=layout):
        return weight
    return _scattered(values, plan, channels_last)


def _scattered(values: Tensor, plan: Plan, channels_last: bool) -> Tensor:
    shape = plan.shape if plan.geometry is None else plan.geometry.weight_shape
    return scatter_values(values, shape, *plan.index[:2], channels_last=channels_last)


def _is_own(values: Tensor) -> bool:
    """Whether the tensor has memory and a version to tell it by."""
    return type(values) in (Tensor, nn.Parameter) and not values.is_meta and not values.is_inference()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.detach().contiguous().view(torch.uint8))
