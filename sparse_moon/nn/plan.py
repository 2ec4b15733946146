"""Which layers of a model become sparse, and how dense each is to be."""

import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from sparse_moon.allocation import Allocation, allocate, check_sparsity
from sparse_moon.nn.conv1d import TransposedLinear
from sparse_moon.nn.fused_forward import has_plain_forward
from sparse_moon.nn.inspect import Inputs, Weight, kind_of, run_once, weights
from sparse_moon.nn.layers import Exclude, SparseLayer
from sparse_moon.sharding import refuse_sharded

Dense = nn.Linear | nn.Conv2d

_PLAIN = (nn.Linear, nn.Conv2d, TransposedLinear)  # subclasses of them have code that may read the weight

# A shortfall is said from 0.01 on, or from a tenth more weights than asked for: 0.001 at a sparsity of 0.99.
_LARGEST_SHORTFALL = 0.01
_LARGEST_EXCESS = 0.1


@dataclass(frozen=True)
class Plan:
    """Which layers of a model become sparse, and how dense each is to be; see :func:`sparse_moon.sparsify`."""

    places: dict[Dense, list[str]]  # layers to convert, each with all its names
    owners: dict[nn.Parameter, str]  # weight -> name of the first layer that has it
    shapes: dict[str, tuple[int, ...]]  # by the owner's name
    sparse: list[SparseLayer]  # that are there already and count
    sparsity: float
    allocation: Allocation
    dense: dict[str, str]  # owners that stay dense in a uniform allocation, and why
    block: tuple[int, int]
    kept: set[frozenset[int]]  # keys of weights that are meant to stay as they are
    dense_because: dict[nn.Module, str]
    notes: list[str]
    densities: dict[str, float]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        sparsity: float,
        allocation: Allocation,
        block: tuple[int, int],
        exclude: Iterable[Exclude] | Exclude,
        first_dense: bool,
        depthwise_dense: bool,
        inputs: Inputs | None,
    ) -> "Plan":
        check_sparsity(sparsity)
        if wrapped(model) is not None:
            raise ValueError(
                f"make the model sparse before {type(model).__name__} wraps it: its parameters become others"
            )
        refuse_sharded("sparsify", model.parameters(), "make the model sparse before")
        weights(model)  # raises for parameters without a shape
        excluded = matching(model, exclude, "exclude")
        kept = {weight.key for module in excluded for weight in weights(module)}
        inner = (module for outer in excluded for module in outer.modules() if module._parameters)
        because: dict[nn.Module, str] = dict.fromkeys(inner, "excluded")
        places = convertible(model, kept)
        sparse = {
            layer.values: layer
            for layer in model.modules()
            if isinstance(layer, SparseLayer) and not any(weight.key in kept for weight in weights(layer))
        }
        order = _in_order_of_use(model, [*places, *sparse.values()], inputs)
        places = {layer: places[layer] for layer in order if isinstance(layer, nn.Linear | nn.Conv2d)}

        notes = []
        indivisible = {layer: names[0] for layer, names in places.items() if not _divides(layer, block)}
        if indivisible:
            notes.append(f"block {block} does not divide these layers, they stay dense: {[*indivisible.values()]}")
            because |= dict.fromkeys(indivisible, f"block {block} does not divide it")
            places = {layer: names for layer, names in places.items() if layer not in indivisible}
            order = [layer for layer in order if layer not in indivisible]
        if not places and not sparse:
            if indivisible:
                named = some(f"{name} {tuple(layer.weight.shape)}" for layer, name in indivisible.items())
                raise ValueError(f"block {block} divides none of the layers to make sparse: {named}")
            kinds = shares_of([weight for weight in weights(model) if weight.key not in kept])
            others = f", its weights are in {some(kinds)}" if kinds else ""
            but = " but those that exclude names" if convertible(model) else ""
            raise ValueError(f"the model has no linear or 2-d convolution layer to make sparse{but}{others}")
        shapes: dict[str, tuple[int, ...]] = {}
        owners: dict[nn.Parameter, str] = {}
        for layer, names in places.items():
            if owners.setdefault(weight_of(layer), names[0]) == names[0]:
                shapes[names[0]] = tuple(layer.weight.shape)

        dense: dict[str, str] = {}
        if allocation == "uniform":
            if depthwise_dense:
                dense |= {owners[weight_of(layer)]: "depthwise" for layer in places if _is_depthwise(layer)}
            if first_dense and places and order[0] in places:
                dense[owners[weight_of(next(iter(places)))]] = "first layer"
        kept |= {frozenset([id(weight)]) for weight, owner in owners.items() if owner in dense}
        plan = cls(
            places, owners, shapes, [*sparse.values()], sparsity, allocation, dense, block, kept, because, notes, {}
        )
        plan.densities.update(plan.allocate(sparsity))
        for layer in places:
            if plan.densities[owners[weight_of(layer)]] >= 1.0:
                because[layer] = dense.get(owners[weight_of(layer)], f"density 1 by {allocation!r}")
        return plan

    def allocate(self, sparsity: float) -> dict[str, float]:
        """Densities with which the layers to convert and those that are sparse already have this sparsity together."""
        dense = dict.fromkeys(self.shapes, 1.0)
        shapes = {name: shape for name, shape in self.shapes.items() if name not in self.dense}
        if not self.sparse:
            return dense | allocate(shapes, sparsity, self.allocation, first_dense=False) if shapes else dense
        present = sum(layer.topology.nnz for layer in self.sparse)
        there, numel = sum(layer.topology.numel for layer in self.sparse), sum(map(math.prod, shapes.values()))
        keep = (1.0 - sparsity) * (there + numel) - present
        tolerance = tolerance_of(sparsity) * (there + numel) + 1.5 * len(self.sparse)
        if sparsity == self.sparsity and not -tolerance <= keep <= numel + tolerance:
            raise ValueError(
                f"sparsity {sparsity} cannot be reached: the layers that are sparse already have {present} of their "
                f"{there} weights and stay as they are, all layers together are to have "
                f"{round((1.0 - sparsity) * (there + numel))} of {there + numel}; "
                "densify the model first, or exclude those layers"
            )
        if keep >= numel - tolerance:
            return dense
        return dense | allocate(shapes, 1.0 - keep / numel, self.allocation, first_dense=False)


def tolerance_of(sparsity: float) -> float:
    """Share of the weights by which a sparsity may be missed."""
    return min(_LARGEST_SHORTFALL, _LARGEST_EXCESS * (1.0 - sparsity))


def wrapped(model: nn.Module) -> nn.Module | None:
    """The model inside one that is compiled or wrapped for several processes or devices."""
    if isinstance(model, DistributedDataParallel | DataParallel):
        return model.module
    return model._modules.get("_orig_mod")  # torch.compile's; its class is not imported until somebody compiles


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside all of those, or itself."""
    while (inner := wrapped(model)) is not None:
        model = inner
    return model


def matching(model: nn.Module, rules: Iterable[Exclude] | Exclude, argument: str) -> list[nn.Module]:
    """The modules that the rules of this argument match.

    Raises:
        ValueError: a name that matches none.
    """
    rules = (rules,) if isinstance(rules, str) or callable(rules) else tuple(rules)
    named = list(model.named_modules(remove_duplicate=False))
    found: list[nn.Module] = []
    for rule in rules:
        if isinstance(rule, str):
            matches = [module for name, module in named if fnmatchcase(name, rule)]
            if not matches:
                names = [name for name, _ in named]
                close = get_close_matches(rule, names, cutoff=0.5)
                if rule.rpartition(".")[0] in names[1:]:  # the name of a parameter
                    close = [rule.rpartition(".")[0]]
                hint = f", did you mean one of {close}?" if close else ""
                raise ValueError(f"{argument} {rule!r} matches no module of the model{hint}")
        elif isinstance(rule, type):
            matches = [module for _, module in named if issubclass(kind_of(module), rule)]
        else:
            layers = ((n, m) for n, m in named if isinstance(m, nn.Linear | nn.Conv2d | SparseLayer))
            matches = [module for name, module in layers if rule(name, module)]
        found += matches
    return list(dict.fromkeys(found))


def convertible(model: nn.Module, kept: Collection[frozenset[int]] = ()) -> dict[Dense, list[str]]:
    """Layers that may become sparse, each with all its names, in definition order."""
    users: dict[nn.Parameter, set[type]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(parameter, set()).add(type(module))
    places: dict[Dense, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) not in _PLAIN or not has_plain_forward(module):
            continue
        weight = module._parameters.get("weight")
        if weight is None or not weight.is_floating_point():  # complex, of which no kernel is
            continue
        if users[weight] == {type(module)} and frozenset([id(weight)]) not in kept:
            places.setdefault(module, []).append(name)
    return places


def _is_depthwise(layer: Dense) -> bool:
    """Whether each output of a convolution sees one channel of several."""
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1


def weight_of(layer: Dense) -> nn.Parameter:
    """Its weight, a parameter of its own."""
    return cast(nn.Parameter, layer.weight)


def _divides(module: Dense, block: tuple[int, int]) -> bool:
    return module.weight.shape[0] % block[0] == 0 and module.weight.shape[1] % block[1] == 0


def _in_order_of_use(
    model: nn.Module, layers: list[Dense | SparseLayer], inputs: Inputs | None
) -> list[Dense | SparseLayer]:
    """The same layers: those that one forward pass uses first, then the others; in definition order without inputs."""
    position = {module: i for i, module in enumerate(model.modules())}
    layers = sorted(layers, key=position.__getitem__)
    if inputs is None:
        return layers
    used: dict[nn.Module, int] = {}

    def note(module: nn.Module, _: Any) -> None:
        used.setdefault(module, len(used))

    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        run_once(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return sorted(layers, key=lambda layer: used.get(layer, len(used)))


def some(texts: Iterable[str], most: int = 4) -> str:
    """The first of these texts, and how many more there are."""
    texts = list(texts)
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def shares_of(found: list[Weight], total: int | None = None) -> list[str]:
    """Types of modules with their share of the weights, the largest first, from one in a thousand on."""
    kinds: Counter[str] = Counter()
    for weight in found:
        kinds[weight.kind] += weight.numel
    total = total or sum(kinds.values())
    return [f"{kind} ({numel / total:.1%})" for kind, numel in kinds.most_common() if numel >= 0.001 * total]
