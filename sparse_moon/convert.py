"""Models made sparse, and dense again."""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, cast, get_args

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from sparse_moon import fusion
from sparse_moon.allocation import Allocation, allocate, check_sparsity
from sparse_moon.fusion import BatchNormReLU2d, unfuse
from sparse_moon.inspect import Inputs, run_once, weights
from sparse_moon.nn import Exclude, Pattern, Selection, SparseConv2d, SparseLayer, SparseLinear
from sparse_moon.topology import block_shape

_Dense = nn.Linear | nn.Conv2d

# A shortfall is said from 0.01 on, or from a tenth more weights than asked for: 0.001 at a sparsity of 0.99.
_LARGEST_SHORTFALL = 0.01
_LARGEST_EXCESS = 0.1

# Outputs without a weight are said from this many and this share of a layer on: one of 128 is chance, and no news.
_DEAD_OUTPUTS = 3
_DEAD_SHARE = 0.01


def sparsify(
    model: nn.Module,
    sparsity: float,
    allocation: Allocation = "erk",
    *,
    pattern: Pattern = "unstructured",
    exclude: Iterable[Exclude] | Exclude = (),
    selection: Selection = "random",
    start_sparsity: float | None = None,
    first_dense: bool = True,
    input_size: Inputs | None = None,
    fuse: bool = False,
    recompute: bool = False,
) -> nn.Module:
    """Replace the linear and 2-d convolution layers of a model by sparse ones, in place.

    Layers to which the allocation gives density 1 stay dense modules, and so do layers that the block does not divide,
    subclasses of ``nn.Linear`` and ``nn.Conv2d`` (their code may read ``weight``), layers whose weight is computed from
    parameters (``torch.nn.utils.parametrize``, ``prune``), and weights shared with another kind of module. Two layers
    that share a weight share ``values`` and topology afterwards. Forward and backward hooks move to the new layers.

    Layers that are sparse already stay as they are and count: the others are given what is left to reach ``sparsity``.
    So the same call again changes nothing, and one that asks for what cannot be had so is an error; exclude the sparse
    layers to give the others a sparsity of their own.

    What was asked for and not done is said in one warning:

    - the share of the model's weights (see :func:`overall_sparsity`) that is left out misses ``sparsity`` by more than
      0.01 or, above 0.9, by more than a tenth of ``1 - sparsity``, with the types of modules that stayed dense and
      their shares, or the rounding to whole blocks or rows that is the cause. Excluded weights and the first layer that
      ``first_dense`` keeps do not count, neither do biases and norms. Embeddings do: ``exclude=nn.Embedding`` says that
      they are meant to stay dense;
    - layers that the block does not divide;
    - layers that end without any weight, or of whose outputs at least 3 and 1 % have none.

    :func:`sparse_moon.summary` shows each layer.

    Args:
        model: any module; changed in place. Build the optimizer afterwards, and compile or wrap the model afterwards.
        sparsity: overall share of weights to leave out of the layers that take part, in [0, 1).
        allocation: ``"erk"``, ``"er"`` or ``"uniform"``; see :func:`sparse_moon.allocation.allocate`.
        pattern: as in :class:`SparseLinear`.
        exclude: what to keep as it is, with all modules in it: names of modules (with ``*`` and ``?``), or module
            types; or predicates ``(name, layer) -> bool``, which are asked for linear and convolution layers. A weight
            that an excluded module shares is excluded everywhere.
        selection: ``"random"`` places, ``"magnitude"`` to keep the largest weights of a trained model, or
            ``"constant_fan_in"``: random, with the same number in every (block) row.
        start_sparsity: where training is to reach ``sparsity`` by pruning, the overall sparsity at the start, allocated
            in the same way; 0 starts dense. The layers that end with density 1 are dense modules from the start.
        first_dense: with ``"uniform"``, whether the first layer stays dense.
        input_size: shape of one example without the batch dimension, or example inputs (a tensor, or a tuple or mapping
            of arguments); when given, layers are ordered by their first use in one forward pass instead of by
            definition, which matters for what "first" is.
        fuse: also run batch norm, ReLU and the residual addition between them as one operation; see
            :func:`sparse_moon.fusion.fuse`. It pays in training on the CPU.
        recompute: with ``fuse``, less memory for more time: what batch norm and ReLU make for a sparse convolution is
            not kept for the backward pass; see :class:`sparse_moon.BatchNormReLU2d`.

    Returns:
        The model itself (or, where the model is itself such a layer, its replacement); with ``fuse`` a traced module
        of the same parameters and state.

    Raises:
        ValueError: a bad argument, a name in ``exclude`` that matches no module, no layer to convert, a sparsity that
            cannot be reached, or a model that is compiled or wrapped for several processes; the model is then as it
            was.
    """
    if recompute and not fuse:
        raise ValueError("recompute needs fuse: it is the fused batch norm that computes its result again")
    if selection not in get_args(Selection):
        raise ValueError(f"selection must be one of {get_args(Selection)}, got {selection!r}")
    plan = _Plan.of(model, sparsity, allocation, block_shape(pattern), exclude, first_dense, input_size)
    start = plan.densities
    if start_sparsity is not None:
        if start_sparsity > sparsity:
            raise ValueError(f"start_sparsity must be at most the sparsity {sparsity}, got {start_sparsity}")
        check_sparsity(start_sparsity)
        start = plan.allocate(start_sparsity)

    done: dict[str, SparseLayer] = {}
    made: dict[_Dense, SparseLayer] = {}
    for module in plan.places:
        owner = plan.owners[_weight(module)]
        if plan.densities[owner] >= 1.0:
            continue
        kind: Any = SparseLinear if isinstance(module, nn.Linear) else SparseConv2d
        if owner in done:  # tied to a layer converted before
            sparse = kind.from_dense(module, mask=done[owner].mask(), pattern=pattern)
            sparse.values, sparse.topology = done[owner].values, done[owner].topology
        else:
            sparse = kind.from_dense(module, sparsity=1.0 - start[owner], pattern=pattern, selection=selection)
            done[owner] = sparse
        _move_hooks(module, sparse)
        made[module] = sparse
    for layer, reason in plan.dense_because.items():
        layer._dense_because = reason  # type: ignore[assignment]  # for summary
    for module, sparse in made.items():
        for name in plan.places[module]:
            model = _replace(model, name, sparse)
    _say(plan.notes + _missed(model, plan, done, pruned_later=start_sparsity is not None) + _empty(done))
    return fusion.fuse(model, recompute=recompute) if fuse else model


def densify(model: nn.Module) -> nn.Module:
    """Replace every sparse layer by its dense equivalent, in place; shared weights stay shared.

    What :func:`sparse_moon.fuse` made is undone as well: batch norm, sum and rectifier are the model's own again, and
    so are its classes. Of a model that is compiled or wrapped for several processes the model inside is meant. Forward
    and backward hooks move to the new layers. Names in ``state_dict()`` change for the sparse layers' weights only.

    Modules of this package without sparse weights stay as they are. That is said for a
    :class:`sparse_moon.BatchNormReLU2d` that the model's own code calls, as no module of torch could take its place;
    others, as :class:`sparse_moon.ood.CosineHead`, run torch's operators alone.

    Returns:
        The model itself (or, where the model is itself a sparse layer or the result of ``fuse``, its replacement):
        the model's own classes with torch's layers.
    """
    while (inner := _wrapped(model)) is not None:
        model = inner
    model = unfuse(model)
    called = [name for name, module in model.named_modules() if isinstance(module, BatchNormReLU2d)]
    if called:
        _say([f"BatchNormReLU2d stays, the model's own code calls it: {_some(called)}"])
    dense_weights: dict[nn.Parameter, nn.Parameter] = {}
    replaced: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        module.__dict__.pop("_dense_because", None)
        if not isinstance(module, SparseLinear | SparseConv2d):
            continue
        if module not in replaced:
            dense = module.to_dense()
            dense.weight = dense_weights.setdefault(module.values, cast(nn.Parameter, dense.weight))
            _move_hooks(module, dense)
            replaced[module] = dense
        model = _replace(model, name, replaced[module])
    return model


def layer_densities(
    model: nn.Module,
    sparsity: float,
    allocation: Allocation = "erk",
    *,
    pattern: Pattern = "unstructured",
    exclude: Iterable[Exclude] | Exclude = (),
    first_dense: bool = True,
    input_size: Inputs | None = None,
) -> dict[str, float]:
    """Density, by name, that :func:`sparsify` with these arguments would give each layer; the model is not changed.

    A layer with several names is listed under its first; layers that take no part are not listed.
    """
    plan = _Plan.of(model, sparsity, allocation, block_shape(pattern), exclude, first_dense, input_size)
    _say(plan.notes)
    return {names[0]: plan.densities[plan.owners[_weight(layer)]] for layer, names in plan.places.items()}


def _say(notes: list[str]) -> None:
    if notes:
        warnings.warn("; ".join(notes), stacklevel=3)


@dataclass(frozen=True)
class _Plan:
    places: dict[_Dense, list[str]]  # layers to convert, each with all its names
    owners: dict[nn.Parameter, str]  # weight -> name of the first layer that has it
    shapes: dict[str, tuple[int, ...]]  # by the owner's name
    sparse: list[SparseLayer]  # that are there already and count
    sparsity: float
    allocation: Allocation
    first: str | None  # owner that stays dense in a uniform allocation
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
        inputs: Inputs | None,
    ) -> "_Plan":
        check_sparsity(sparsity)
        if _wrapped(model) is not None:
            raise ValueError(
                f"make the model sparse before {type(model).__name__} wraps it: its parameters become others"
            )
        weights(model)  # raises for parameters without a shape
        excluded = _excluded(model, exclude)
        kept = {weight.key for module in excluded for weight in weights(module)}
        inner = (module for outer in excluded for module in outer.modules() if module._parameters)
        because: dict[nn.Module, str] = dict.fromkeys(inner, "excluded")
        places = _convertible(model, kept)
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
            raise ValueError("the model has no linear or 2-d convolution layer to make sparse")
        shapes: dict[str, tuple[int, ...]] = {}
        owners: dict[nn.Parameter, str] = {}
        for layer, names in places.items():
            if owners.setdefault(_weight(layer), names[0]) == names[0]:
                shapes[names[0]] = tuple(layer.weight.shape)

        first = None
        if allocation == "uniform" and first_dense and places and order[0] in places:
            layer = next(iter(places))
            first = owners[_weight(layer)]
            kept.add(frozenset([id(layer.weight)]))
        plan = cls(
            places, owners, shapes, [*sparse.values()], sparsity, allocation, first, block, kept, because, notes, {}
        )
        plan.densities.update(plan.allocate(sparsity))
        for layer in places:
            if plan.densities[owners[_weight(layer)]] >= 1.0:
                because[layer] = "first layer" if owners[_weight(layer)] == first else f"density 1 by {allocation!r}"
        return plan

    def allocate(self, sparsity: float) -> dict[str, float]:
        """Densities with which the layers to convert and those that are sparse already have this sparsity together."""
        if not self.sparse:
            return allocate(self.shapes, sparsity, self.allocation, first_dense=self.first is not None)
        shapes = {name: shape for name, shape in self.shapes.items() if name != self.first}
        present = sum(layer.topology.nnz for layer in self.sparse)
        there, numel = sum(layer.topology.numel for layer in self.sparse), sum(map(math.prod, shapes.values()))
        keep = (1.0 - sparsity) * (there + numel) - present
        tolerance = _tolerance(sparsity) * (there + numel) + 1.5 * len(self.sparse)
        if sparsity == self.sparsity and not -tolerance <= keep <= numel + tolerance:
            raise ValueError(
                f"sparsity {sparsity} cannot be reached: the layers that are sparse already have {present} of their "
                f"{there} weights and stay as they are, all layers together are to have "
                f"{round((1.0 - sparsity) * (there + numel))} of {there + numel}; "
                "densify the model first, or exclude those layers"
            )
        dense = dict.fromkeys(self.shapes, 1.0)
        if keep >= numel - tolerance:
            return dense
        return dense | allocate(shapes, 1.0 - keep / numel, self.allocation, first_dense=False)


def _tolerance(sparsity: float) -> float:
    return min(_LARGEST_SHORTFALL, _LARGEST_EXCESS * (1.0 - sparsity))


def _wrapped(model: nn.Module) -> nn.Module | None:
    """The model inside one that is compiled or wrapped for several processes or devices."""
    if isinstance(model, DistributedDataParallel | DataParallel):
        return model.module
    return model._modules.get("_orig_mod")  # torch.compile's; its class is not imported until somebody compiles


def _excluded(model: nn.Module, exclude: Iterable[Exclude] | Exclude) -> list[nn.Module]:
    """The modules that the rules match."""
    rules = (exclude,) if isinstance(exclude, str) or callable(exclude) else tuple(exclude)
    named = list(model.named_modules(remove_duplicate=False))
    found: list[nn.Module] = []
    for rule in rules:
        if isinstance(rule, str):
            matching = [module for name, module in named if fnmatchcase(name, rule)]
            if not matching:
                close = get_close_matches(rule, [name for name, _ in named], cutoff=0.5)
                hint = f", did you mean one of {close}?" if close else ""
                raise ValueError(f"exclude {rule!r} matches no module of the model{hint}")
        elif isinstance(rule, type):
            matching = [module for _, module in named if isinstance(module, rule)]
        else:
            layers = ((n, m) for n, m in named if isinstance(m, nn.Linear | nn.Conv2d | SparseLayer))
            matching = [module for name, module in layers if rule(name, module)]
        found += matching
    return list(dict.fromkeys(found))


def _convertible(model: nn.Module, kept: set[frozenset[int]]) -> dict[_Dense, list[str]]:
    """Layers that may become sparse, each with all its names, in definition order."""
    users: dict[nn.Parameter, set[type]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(parameter, set()).add(type(module))
    places: dict[_Dense, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is not nn.Linear and type(module) is not nn.Conv2d:
            continue
        weight = module._parameters.get("weight")
        if weight is not None and users[weight] == {type(module)} and frozenset([id(weight)]) not in kept:
            places.setdefault(module, []).append(name)
    return places


def _weight(layer: _Dense) -> nn.Parameter:
    return cast(nn.Parameter, layer.weight)


def _divides(module: _Dense, block: tuple[int, int]) -> bool:
    return module.weight.shape[0] % block[0] == 0 and module.weight.shape[1] % block[1] == 0


def _in_order_of_use(
    model: nn.Module, layers: list[_Dense | SparseLayer], inputs: Inputs | None
) -> list[_Dense | SparseLayer]:
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


_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Hooks of a layer go on at its replacement: the same containers, so that their handles still remove them."""
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))


def _replace(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put the module in this place of the model; returns the model, or the module where it takes the model's place."""
    name = name.removesuffix("._orig_mod")  # what torch.compile made of the old one would go on calling it
    if name == "":
        return module
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
    return model


def _empty(layers: Mapping[str, SparseLayer]) -> list[str]:
    """What to say about layers, or outputs of them, that have no weight."""
    without: list[str] = []
    dead: dict[str, tuple[int, int]] = {}
    outputs = 0
    for name, layer in layers.items():
        row_ptr, rows = layer.topology.row_ptr, layer.topology.shape[0]
        if row_ptr.is_meta or layer.topology.numel == 0:
            continue
        outputs += rows
        if layer.topology.nnz == 0:
            without.append(name)
        empty = int((row_ptr.diff() == 0).sum()) * layer.topology.block[0]
        if layer.topology.nnz and empty >= max(_DEAD_OUTPUTS, _DEAD_SHARE * rows):
            dead[name] = (empty, rows)
    notes = []
    if without:
        notes.append(f"no weight is left in {_some(without)}")
    if dead:
        most = max(dead, key=lambda name: dead[name][0])
        notes.append(
            f"{sum(n for n, _ in dead.values())} of {outputs} outputs have no weight, most of them in {most!r} "
            f"({dead[most][0]} of {dead[most][1]}); see sparse_moon.live_outputs(model)"
        )
    return notes


def _some(texts: Iterable[str], most: int = 4) -> str:
    texts = list(texts)
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def _missed(model: nn.Module, plan: _Plan, made: Mapping[str, SparseLayer], *, pruned_later: bool) -> list[str]:
    """What to say about a sparsity that was not reached."""
    found = [weight for weight in weights(model) if weight.key not in plan.kept]
    total = sum(weight.numel for weight in found)
    present = float(sum(weight.present for weight in found))
    planned = {name: plan.densities[name] * math.prod(plan.shapes[name]) for name in made}
    rounding = sum(layer.topology.nnz - planned[name] for name, layer in made.items())
    if pruned_later:  # to whole blocks of what is planned
        present, rounding = present - rounding, 0.0
    allowed = _tolerance(plan.sparsity) * total + 1.5 * len(plan.shapes)
    if abs(present - (1.0 - plan.sparsity) * total) <= allowed:
        return []
    text = (
        f"a sparsity of {plan.sparsity:g} was asked for, {1.0 - present / total:.3f} of the "
        f"{'other ' if plan.kept else ''}weights are left out"
    )
    dense: Counter[str] = Counter()
    for weight in found:
        if not isinstance(weight.module, SparseLayer) and weight.module not in plan.places:
            dense[weight.kind] += weight.numel
    shares = [f"{kind} ({numel / total:.1%})" for kind, numel in dense.most_common() if numel >= 0.001 * total]
    if shares:
        text += f"; dense stay {_some(shares)}"
    if abs(rounding) > allowed / 2:
        text += "; the rest is rounding to whole blocks or rows"
    return [text + "; see sparse_moon.summary(model)"]
