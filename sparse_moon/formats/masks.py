"""Models that other tools have pruned: their masks, or their zeros, become the topology."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from sparse_moon.nn import fusion
from sparse_moon.nn.attention import SparseMultiheadAttention
from sparse_moon.nn.conv1d import TransposedLinear
from sparse_moon.nn.convert import hooked_parameters, lost_hooks, replace_layers, sparse_kind, without_weights
from sparse_moon.nn.layers import Pattern, SparseLayer
from sparse_moon.nn.plan import Dense, convertible, some, weight_of, wrapped
from sparse_moon.nn.projections import as_linear_layers
from sparse_moon.ops.native import native
from sparse_moon.topology import Topology, block_shape, weight_to_matrix

_FLAX = {2: (1, 0), 4: (3, 2, 0, 1)}  # from (in, out) and (kh, kw, in, out) to torch's order
_ENDINGS = ("weight", "kernel", "weight_mask")

_Found = dict[nn.Parameter, tuple[str, Tensor]]  # name of a layer and mask, by weight


def from_masks(
    model: nn.Module,
    masks: Mapping[str, Any] | None = None,
    *,
    pattern: Pattern = "unstructured",
    layout: Literal["torch", "flax"] = "torch",
    min_sparsity: float = 0.01,
) -> nn.Module:
    """Make the layers of a pruned model sparse, in place, with exactly the weights that it has kept.

    Without ``masks`` they are found in the model: those of ``torch.nn.utils.prune`` (``weight_orig`` and
    ``weight_mask``), and for other layers the places of the weights that are not zero, as checkpoints of SparseML,
    llm-compressor and 2:4 pruning have them. A weight that is masked out is gone, one that a mask keeps stays, also
    where it is zero.

    Layers without a mask stay dense, and so do those whose mask keeps everything. The model is fused afterwards as by
    :func:`sparse_moon.sparsify`. One warning says what was pruned and stays dense, masks of biases that are not kept,
    and layers or outputs that have no weight.

    Args:
        model: in torch's layers; changed in place. Build the optimizer afterwards.
        masks: by name of layer, or of weight (ending in ``.weight``, ``.weight_mask`` or ``.kernel``), arrays of torch,
            NumPy or JAX of the shape of the weight, bool or 0 and 1 in any dtype, True = kept. Mappings inside are
            looked through, ``{"block": {"conv": mask}}`` is ``"block.conv"``; None is no mask. An attention's
            ``in_proj_weight`` is one of them; masks of a ``Conv1D`` are (in, out) in either layout.
        pattern: as in :class:`SparseLinear`; masks must consist of whole blocks.
        layout: of the masks: ``"flax"`` is (in, out) and (kh, kw, in, out), which JAX and TensorFlow use.
        min_sparsity: without masks, layers of which a smaller share is zero count as dense.

    Returns:
        The model itself (or, where the model is itself such a layer, its replacement).

    Raises:
        ValueError: a mask whose layer does not exist or cannot become sparse, of another shape, with other numbers than
            0 and 1, or not of whole blocks; two that differ for one weight; neither masks nor zeros. The model is then
            as it was.
    """
    if layout not in ("torch", "flax"):
        raise ValueError(f"layout must be 'torch' or 'flax', got {layout!r}")
    if wrapped(model) is not None:
        raise ValueError(f"make the model sparse before {type(model).__name__} wraps it: its parameters become others")
    block, hooked = block_shape(pattern), hooked_parameters(model)
    notes: list[str] = []
    with as_linear_layers(model):
        if masks is None:
            found, notes = _in_the_model(model, min_sparsity)
        else:
            found = _given(model, masks, layout)
        for name, mask in found.values():
            try:  # before anything is changed
                Topology.from_mask(weight_to_matrix(mask, block[1]), block)
            except ValueError as error:
                raise ValueError(f"the mask of {name!r}: {error}") from None
        if all(mask.all() for _, mask in found.values()):
            why = "the model has no pruned layer" if masks is None else f"the {len(found)} masks keep everything"
            raise ValueError("; ".join([f"nothing becomes sparse: {why}", *notes]))
        if masks is None:
            notes += _without_pruning(model)
        places = {
            layer: names
            for layer, names in convertible(model).items()
            if weight_of(layer) in found and not found[weight_of(layer)][1].all()
        }

        def make(_: str, layer: Dense) -> SparseLayer:
            return sparse_kind(layer).from_dense(layer, mask=found[weight_of(layer)][1], pattern=block)

        model, done = replace_layers(model, places, make)
    if native is not None:
        fusion.install(model, recompute=False)
    notes += without_weights(done) + lost_hooks(hooked, model)
    if notes:
        warnings.warn("; ".join(notes), stacklevel=2)
    return model


def _is_pruned(module: nn.Module) -> bool:
    """Whether ``torch.nn.utils.prune`` masks its weight."""
    return "weight_orig" in module._parameters and "weight_mask" in module._buffers


def _in_the_model(model: nn.Module, min_sparsity: float) -> tuple[_Found, list[str]]:
    """Masks by torch's pruning, or by zeros; and what else is pruned."""
    found: _Found = {}
    plain = convertible(model)
    zero: list[str] = []
    other: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer):
            continue
        weight = module._parameters.get("weight_orig" if _is_pruned(module) else "weight")
        if weight is None or weight.dim() < 2:
            continue
        if weight.is_meta:
            raise ValueError(f"expected weights with memory, that of {name!r} is on meta")
        mask = cast(Tensor, module.weight_mask) != 0 if _is_pruned(module) else weight.detach() != 0
        share = 1.0 - mask.float().mean().item()
        if not _is_pruned(module) and share < min_sparsity:
            continue
        if module not in plain and not (_is_pruned(module) and type(module) in (nn.Linear, nn.Conv2d)):
            other.append(f"{name} ({type(module).__name__}, {share:.0%})")
        elif share == 1.0 and not _is_pruned(module):
            zero.append(name)
        else:
            _add(found, weight, name, mask)
    notes = [f"modules of other kinds stay dense, where this share of weights is left out: {some(other)}"] * bool(other)
    notes += [f"zero everywhere, which is no mask, and dense stay {some(zero)}"] * bool(zero)
    return found, notes


def _without_pruning(model: nn.Module) -> list[str]:
    """Make what ``torch.nn.utils.prune`` masks parameters again, in the layers that may become sparse."""
    biases = []
    for name, module in model.named_modules():
        if _is_pruned(module) and type(module) in (nn.Linear, nn.Conv2d):
            prune.remove(module, "weight")
            if "bias_mask" in module._buffers:
                prune.remove(module, "bias")
                biases.append(name)
    return [f"biases keep their zeros, but no mask: {some(biases)}"] if biases else []


def _given(model: nn.Module, masks: Mapping[str, Any], layout: str) -> _Found:
    """The masks of a mapping, checked."""
    found: _Found = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    places = convertible(model)
    for key, value in _unpacked(_flat(masks), modules):
        parent, _, ending = key.rpartition(".")
        name = parent if key not in modules and ending in _ENDINGS else key
        if name not in modules:
            close = get_close_matches(name, modules, cutoff=0.5)
            hint = f", did you mean one of {close}?" if close else ""
            raise ValueError(f"mask {key!r} is of no layer of the model{hint}")
        layer: Any = modules[name]
        if layer not in places:
            kind = "a layer that is pruned already" if _is_pruned(layer) else f"a {type(layer).__name__}"
            raise ValueError(f"mask {key!r} is of {kind}; only plain nn.Linear and nn.Conv2d become sparse")
        mask = _as_mask(key, value)
        is_turned = isinstance(layer, TransposedLinear)
        shape = tuple(layer.weight.shape)[:: -1 if is_turned else 1]
        turned = mask.permute(_FLAX[mask.dim()]) if mask.dim() in _FLAX else mask
        if layout == "flax" and not is_turned:
            mask = turned
        if mask.shape != shape:
            hint = "; with layout='flax' it would fit" if turned.shape == shape and not is_turned else ""
            raise ValueError(f"mask {key!r} must have the shape {shape} of its weight, got {tuple(mask.shape)}{hint}")
        _add(found, weight_of(layer), name, (mask.t() if is_turned else mask).to(layer.weight.device))
    return found


def _unpacked(masks: Iterable[tuple[str, Any]], modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Any]]:
    """The masks, those of an attention's weights by the names of its projections."""
    for key, value in masks:
        parent, _, ending = key.rpartition(".")
        module = modules.get(parent)
        if isinstance(module, SparseMultiheadAttention) and ending == "in_proj_weight":
            parts = _as_mask(key, value).chunk(3)
            names = (f"{parent}.{name}".lstrip(".") for name in module.inputs())
            yield from zip(names, parts, strict=True)
        elif isinstance(module, SparseMultiheadAttention):
            yield key.removesuffix("_weight"), value
        else:
            yield key, value


def _add(found: _Found, weight: nn.Parameter, name: str, mask: Tensor) -> None:
    first, other = found.setdefault(weight, (name, mask))
    if not torch.equal(other, mask):
        raise ValueError(f"{first!r} and {name!r} share a weight, but not a mask")


def _flat(masks: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in masks.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def _as_mask(key: str, value: Any) -> Tensor:
    """A bool tensor of an array of 0 and 1."""
    array = value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    mask = array != 0
    if not torch.equal(mask, array.to(torch.float32) == 1):
        raise ValueError(f"mask {key!r} must hold 0 and 1, got {array[mask].flatten()[:3].tolist()} among them")
    return mask
