"""The scattered weight of dense products, kept while its values stay the same, and the values of its gradient.

One scatter serves a forward pass and its backward pass, where autograd keeps the weight with what else it has saved.
Where no gradients are wanted, the plan keeps it on the CPU, and the same values need no other scatter.
"""

from threading import get_ident
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparse_moon.ops.index import check_entries
from sparse_moon.ops.masked_dense import gather_values, places_in, scatter_values
from sparse_moon.ops.native import native
from sparse_moon.ops.plan import Plan

_NOBODY = object()
_FORWARD, _BACKWARD = "weight of the last forward pass", "weight of a backward pass"


class _Kept(NamedTuple):
    weight: Tensor
    channels_last: bool
    values: Tensor
    """What was scattered, or an alias: as long as it lives, no other tensor gets that memory."""
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

    Where :func:`may_compare`, that of the last pass where no backward pass is to have it and the values have the same
    bits.
    """
    if not _is_own(values):
        return scattered(values, plan, channels_last)
    recorded = plan.ready.get(_FORWARD, _NOBODY) is None
    if not (recorded or may_compare(values)):
        return scattered(values, plan, channels_last)
    kept: _Kept | None = plan.ready.get(_FORWARD)
    again = kept is not None and kept.is_of(values, channels_last)
    if again and kept is not None and kept.copy is not None and _same_bits(kept.copy, values):
        return kept.weight
    weight = scattered(values, plan, channels_last)
    copy = values.detach().clone() if again else None
    alias = values if values.grad_fn is None else values.detach()  # without the graph that made it
    plan.ready[_FORWARD] = _Kept(weight, channels_last, alias, values._version, copy)
    return weight


def may_compare(values: Tensor) -> bool:
    """Whether the values' bits can be looked at at once: on a GPU the host would wait for them."""
    return values.is_cpu


def forget_weight(plan: Plan) -> None:
    """Before a forward pass that autograd records: what an earlier one has left may be of other values."""
    plan.ready[_FORWARD] = None  # for the weight to come


def saved_weight(values: Tensor, plan: Plan) -> Tensor | None:
    """What autograd is to save after a forward pass with these values; None where its product was no dense one.

    :func:`forget_weight` is called before that pass.
    """
    kept: _Kept | None = plan.ready.pop(_FORWARD, None)
    if kept is None or not (kept.values is values or kept.is_of(values, kept.channels_last)):
        return None
    return kept.weight


def give_back(weight: Tensor | None, plan: Plan) -> None:
    """Around the products of a backward pass: before them what :func:`saved_weight` gave, None after them.

    A weight that nothing has taken would else be that of a later pass, for which none was saved.
    """
    key = _BACKWARD, get_ident()
    if weight is None:
        plan.ready.pop(key, None)
    else:
        plan.ready[key] = weight


def backward_weight(values: Tensor, plan: Plan, *, channels_last: bool = False) -> Tensor:
    """That of a product in a backward pass."""
    weight: Tensor | None = plan.ready.pop((_BACKWARD, get_ident()), None)
    if weight is not None and weight.is_contiguous(memory_format=_layout(channels_last)):
        return weight
    return scattered(values, plan, channels_last)


def gathered(d_weight: Tensor, plan: Plan) -> Tensor:
    """The values' places in the gradient of the dense weight."""
    channels_last = not d_weight.is_contiguous()
    if not (_by_address(d_weight, plan) and d_weight.is_contiguous(memory_format=_layout(channels_last))):
        return gather_values(d_weight, plan.block, *plan.index[:2])
    values = d_weight.new_empty(plan.values_shape)
    places, _ = _places(d_weight, plan, channels_last)
    native.gather_values(places, values.element_size(), d_weight.data_ptr(), values.data_ptr())  # type: ignore[union-attr]
    return values


def scattered(values: Tensor, plan: Plan, channels_last: bool) -> Tensor:
    """A weight that is made now."""
    shape = plan.shape if plan.geometry is None else plan.geometry.weight_shape
    if not (_by_address(values, plan) and values.is_contiguous()):
        return scatter_values(values, shape, *plan.index[:2], channels_last=channels_last)
    check_entries(values, plan.index[1])
    weight = values.new_empty(shape) if not channels_last else _empty(values, shape)
    places, _ = _places(weight, plan, channels_last)
    native.scatter_values(places, values.element_size(), values.data_ptr(), weight.data_ptr())  # type: ignore[union-attr]
    return weight


def _empty(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=values.dtype, device=values.device, memory_format=torch.channels_last)


def _by_address(tensor: Tensor, plan: Plan) -> bool:
    """Whether to go past the operators, whose ways cost a small layer 30 us."""
    return native is not None and plan.state is not None and tensor.is_cpu and _is_own(tensor)


def _places(weight: Tensor, plan: Plan, channels_last: bool) -> tuple[tuple[int, ...], object]:
    """Where the entries lie in a weight like this one, as the extension takes it, and the index that it points to."""
    key = "places", weight.dim(), channels_last, torch.get_num_threads()  # gradients may be matrices
    found: tuple[tuple[int, ...], object] | None = plan.ready.get(key)
    if found is None:
        row_ptr, col = (t.contiguous() for t in plan.index[:2])
        found = plan.ready[key] = places_in(weight, plan.block, row_ptr, col), (row_ptr, col)
    return found


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _is_own(values: Tensor) -> bool:
    """Whether the tensor has memory and a version to tell it by."""
    return type(values) in (Tensor, nn.Parameter) and not values.is_meta and not values.is_inference()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.detach().contiguous().view(torch.uint8))
