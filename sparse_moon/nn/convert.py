"""Models made sparse, and dense again."""

import math
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MethodType
from typing import Any, Literal, cast, get_args

from torch import nn

from sparse_moon.allocation import Allocation, check_sparsity
from sparse_moon.nn import fusion
from sparse_moon.nn.attention import SparseMultiheadAttention, pack
from sparse_moon.nn.batch_norm_relu import BatchNormReLU2d
from sparse_moon.nn.conv1d import SparseConv1D, TransposedLinear
from sparse_moon.nn.inspect import Inputs, weight_layers, weights
from sparse_moon.nn.layers import Exclude, Pattern, Selection, SparseConv2d, SparseLayer, SparseLinear
from sparse_moon.nn.plan import Dense, Plan, shares_of, some, tolerance_of, unwrapped, weight_of
from sparse_moon.nn.projections import as_linear_layers
from sparse_moon.ops.native import has_triton, native
from sparse_moon.topology import block_shape

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
    depthwise_dense: bool = True,
    input_size: Inputs | None = None,
    fuse: bool | Literal["auto"] = "auto",
    recompute: bool = False,
) -> nn.Module:
    """Replace the linear and 2-d convolution layers of a model by sparse ones, in place.

    Linear layers in other forms are among them: the projections of ``nn.MultiheadAttention``, which becomes a
    :class:`SparseMultiheadAttention` and in which they are called ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``;
    and the ``Conv1D`` of transformers.

    Layers to which the allocation gives density 1 stay dense modules, and so do layers that the block does not divide,
    subclasses of these classes (their code may read ``weight``), layers whose weight is computed from
    parameters (``torch.nn.utils.parametrize``, ``prune``), and weights shared with another kind of module. Two layers
    that share a weight share ``values`` and topology afterwards. Hooks of a layer move to the new one, those for state
    dicts too.

    Layers that are sparse already stay as they are and count: the others are given what is left to reach ``sparsity``.
    So the same call again changes nothing, and one that asks for what cannot be had so is an error; exclude the sparse
    layers to give the others a sparsity of their own.

    What was asked for and not done is said in one warning:

    - the share of the model's weights (see :func:`overall_sparsity`) that is left out misses ``sparsity`` by more than
      0.01 or, above 0.9, by more than a tenth of ``1 - sparsity``, with the types of modules that stayed dense and
      their shares, or the rounding to whole blocks or rows that is the cause. Excluded weights and those that
      ``first_dense`` and ``depthwise_dense`` keep do not count, neither do biases and norms. Embeddings do:
      ``exclude=nn.Embedding`` says that they are meant to stay dense;
    - layers that the block does not divide;
    - layers that end without any weight, or of whose outputs at least 3 and 1 % have none;
    - hooks of a weight itself, which do not move: register them with ``values``;
    - with ``fuse=True``, modules that cannot be traced.

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
        depthwise_dense: with ``"uniform"``, whether depthwise convolutions stay dense (RigL's convention, arXiv
            1911.11134, section 4). They hold few weights, 2 % of MobileNet-V2's, and at 90 % a filter of 9 would keep
            one on average, or none.
        input_size: shape of one example without the batch dimension, or example inputs (a tensor, or a tuple or mapping
            of arguments); when given, layers are ordered by their first use in one forward pass instead of by
            definition, which matters for what "first" is.
        fuse: ``"auto"`` runs batch norm, activation and the residual addition between them as one operation wherever
            that is exact and faster (on the CPU with compiled kernels, on a GPU with Triton in channels_last), and
            leaves what cannot be traced as it is; ``True`` says in one warning what that is; ``False`` changes nothing.
            See :func:`sparse_moon.fuse`.
        recompute: with ``fuse``, less memory for more time: what batch norm and activation make for a sparse
            convolution is not kept for the backward pass; see :class:`sparse_moon.BatchNormReLU2d`.

    Returns:
        The model itself (or, where the model is itself such a layer, its replacement).

    Raises:
        ValueError: a bad argument, a name in ``exclude`` that matches no module, no layer to convert, a sparsity that
            cannot be reached, or a model that is compiled or wrapped for several processes; the model is then as it
            was.
    """
    if fuse not in (True, False, "auto"):
        raise ValueError(f"fuse must be 'auto', True or False, got {fuse!r}")
    if recompute and not fuse:
        raise ValueError("recompute needs fuse: it is the fused batch norm that computes its result again")
    if selection not in get_args(Selection):
        raise ValueError(f"selection must be one of {get_args(Selection)}, got {selection!r}")
    block, hooked = block_shape(pattern), hooked_parameters(model)
    with as_linear_layers(model):
        plan = Plan.of(model, sparsity, allocation, block, exclude, first_dense, depthwise_dense, input_size)
        start = plan.densities
        if start_sparsity is not None:
            if start_sparsity > sparsity:
                raise ValueError(f"start_sparsity must be at most the sparsity {sparsity}, got {start_sparsity}")
            check_sparsity(start_sparsity)
            start = plan.allocate(start_sparsity)

        def make(owner: str, layer: Dense) -> SparseLayer:
            kind = sparse_kind(layer)
            return kind.from_dense(layer, sparsity=1.0 - start[owner], pattern=pattern, selection=selection)

        thin = {layer: plan.densities[plan.owners[weight_of(layer)]] < 1 for layer in plan.places}
        places = {layer: names for layer, names in plan.places.items() if thin[layer]}
        model, done = replace_layers(model, places, make)
        for layer, reason in plan.dense_because.items():
            layer.dense_because = reason  # type: ignore[assignment]  # for summary
        for name, layer in done.items():
            layer.pruned_later = start[name] > plan.densities[name]
        notes = plan.notes + _missed(model, plan, done, pruned_later=start_sparsity is not None) + without_weights(done)
    notes += lost_hooks(hooked, model)
    if fuse is True or (fuse == "auto" and (native is not None or has_triton())):
        untraced = fusion.install(model, recompute)
        notes += untraced if fuse is True else []
    _say(notes)
    return model


def sparse_kind(layer: Dense) -> Any:
    """The class that takes the place of a layer."""
    if isinstance(layer, TransposedLinear):
        return SparseConv1D
    return SparseLinear if isinstance(layer, nn.Linear) else SparseConv2d


def replace_layers(
    model: nn.Module, places: Mapping[Dense, list[str]], make: Callable[[str, Dense], SparseLayer]
) -> tuple[nn.Module, dict[str, SparseLayer]]:
    """Put sparse layers in the places of dense ones, with their hooks; layers that share a weight still do.

    Args:
        places: the layers, each with all its names.
        make: from name and layer the sparse one; called once for each weight, before anything is replaced.

    Returns:
        The model (or, where it is itself such a layer, its replacement), and what was made by the first name.
    """
    firsts: dict[nn.Parameter, SparseLayer] = {}
    done: dict[str, SparseLayer] = {}
    made: dict[Dense, SparseLayer] = {}
    for layer, names in places.items():
        weight = weight_of(layer)
        if weight in firsts:  # tied to a layer converted before
            first = firsts[weight]
            sparse = sparse_kind(layer).from_dense(layer, mask=first.mask(), pattern=first.topology.block)
            sparse.values, sparse.topology = first.values, first.topology
        else:
            sparse = firsts[weight] = done[names[0]] = make(names[0], layer)
        made[layer] = sparse
    for layer, sparse in made.items():
        _move_hooks(layer, sparse)
        sparse.bias = cast(nn.Parameter | None, layer.bias)  # others may have it, too
        for name in places[layer]:
            model = _replace(model, name, sparse)
    if note := _held_elsewhere(model, made):
        warnings.warn(note, stacklevel=3)
    return model, done


def densify(model: nn.Module) -> nn.Module:
    """Replace every sparse layer by its dense equivalent, in place; shared weights stay shared.

    What :func:`sparse_moon.fuse` did is undone as well: every module runs the forward pass of its class. Of a model
    that is compiled or wrapped for several processes the model inside is meant. Hooks of layers move to the new ones,
    those of ``values`` do not. Names in ``state_dict()`` change for the sparse layers' weights only. A method that
    trains the layers raises in its next step, as neither it nor its optimizer knows the new ones: to look at a dense
    copy and train on, densify a ``copy.deepcopy``.

    Modules of this package without sparse weights stay as they are. That is said for a
    :class:`sparse_moon.BatchNormReLU2d` that the model's own code calls, as no module of torch could take its place;
    others, as :class:`sparse_moon.ood.CosineHead`, run torch's operators alone.

    Returns:
        The model itself (or, where the model is itself a sparse layer, its replacement): the model's own classes with
        torch's layers.
    """
    model = unwrapped(model)
    fusion.unfuse(model)
    called = [name for name, module in model.named_modules() if isinstance(module, BatchNormReLU2d)]
    if called:
        _say([f"BatchNormReLU2d stays, the model's own code calls it: {some(called)}"])
    dense_weights: dict[tuple[nn.Parameter, Any], nn.Parameter] = {}  # by values and transform
    replaced: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        module.__dict__.pop("dense_because", None)
        if not isinstance(module, SparseLinear | SparseConv2d):
            continue
        if module not in replaced:
            dense = module.to_dense()
            key = module.values, module.transform
            dense.weight = dense_weights.setdefault(key, cast(nn.Parameter, dense.weight))
            dense.bias = module.bias
            _move_hooks(module, dense)
            module.made_dense = True
            replaced[module] = dense
        model = _replace(model, name, replaced[module])
    _say([note] if (note := _held_elsewhere(model, replaced)) else [])
    for module in model.modules():
        if isinstance(module, SparseMultiheadAttention):
            pack(module)
    return model


def layer_densities(
    model: nn.Module,
    sparsity: float,
    allocation: Allocation = "erk",
    *,
    pattern: Pattern = "unstructured",
    exclude: Iterable[Exclude] | Exclude = (),
    first_dense: bool = True,
    depthwise_dense: bool = True,
    input_size: Inputs | None = None,
) -> dict[str, float]:
    """Density, by name, that :func:`sparsify` with these arguments would give each layer; the model is not changed.

    A weight that has several names, as layers may share it, is listed under the first; layers that take no part are not
    listed.
    """
    block = block_shape(pattern)
    with as_linear_layers(model):
        plan = Plan.of(model, sparsity, allocation, block, exclude, first_dense, depthwise_dense, input_size)
        densities = {
            name: plan.densities[plan.owners[weight_of(layer)]]
            for name, layer in weight_layers(model).items()
            if isinstance(layer, nn.Linear | nn.Conv2d) and layer in plan.places
        }
    _say(plan.notes)
    return densities


def _say(notes: list[str]) -> None:
    if notes:
        warnings.warn("; ".join(notes), stacklevel=3)


_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Hooks of a layer go on at its replacement: the same containers, so that their handles still remove them."""
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
    for hook in new._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):  # these know their module
            hook.module = weakref.ref(new)  # type: ignore[attr-defined]


def hooked_parameters(model: nn.Module) -> dict[nn.Parameter, str]:
    """Parameters that have hooks of their own, with their names."""
    return {p: name for name, p in model.named_parameters() if p._backward_hooks or p._post_accumulate_grad_hooks}


def lost_hooks(hooked: Mapping[nn.Parameter, str], model: nn.Module) -> list[str]:
    """What to say where such parameters are the model's no more."""
    left = set(model.parameters())
    names = [name for parameter, name in hooked.items() if parameter not in left]
    if not names:
        return []
    where = "values of the sparse layers, where they are still needed"  # ones that mask gradients are not
    return [f"these parameters were replaced, so register their hooks with {where}: {some(names)}"]


def _replace(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put the module in this place of the model; returns the model, or the module where it takes the model's place."""
    name = name.removesuffix("._orig_mod")  # what torch.compile made of the old one would go on calling it
    if name == "":
        return module
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
    return model


def _held_elsewhere(model: nn.Module, replaced: Collection[nn.Module]) -> str | None:
    """What to say where attributes that are no modules still hold layers whose places have others now."""

    def holds(value: Any, depth: int = 4) -> bool:  # containers may hold themselves
        if isinstance(value, Mapping):
            value = list(value.values())
        if isinstance(value, list | tuple | set):
            return depth > 0 and any(holds(item, depth - 1) for item in value)
        if isinstance(value, MethodType):
            value = value.__self__
        return isinstance(value, nn.Module) and value in replaced

    names = [
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if holds(value)
    ]
    return f"these still hold layers that were replaced, so assign them again: {some(names)}" if names else None


def without_weights(layers: Mapping[str, SparseLayer]) -> list[str]:
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
        notes.append(f"no weight is left in {some(without)}")
    if dead:
        most = max(dead, key=lambda name: dead[name][0])
        notes.append(
            f"{sum(n for n, _ in dead.values())} of {outputs} outputs have no weight, most of them in {most!r} "
            f"({dead[most][0]} of {dead[most][1]}); see sparse_moon.live_outputs(model)"
        )
    return notes


def _missed(model: nn.Module, plan: Plan, made: Mapping[str, SparseLayer], *, pruned_later: bool) -> list[str]:
    """What to say about a sparsity that was not reached."""
    found = [weight for weight in weights(model) if weight.key not in plan.kept]
    total = sum(weight.numel for weight in found)
    present = float(sum(weight.present for weight in found))
    planned = {name: plan.densities[name] * math.prod(plan.shapes[name]) for name in made}
    rounding = sum(layer.topology.nnz - planned[name] for name, layer in made.items())
    if pruned_later:  # to whole blocks of what is planned
        present, rounding = present - rounding, 0.0
    allowed = tolerance_of(plan.sparsity) * total + 1.5 * len(plan.shapes)
    if abs(present - (1.0 - plan.sparsity) * total) <= allowed:
        return []
    text = (
        f"a sparsity of {plan.sparsity:g} was asked for, {1.0 - present / total:.3f} of the "
        f"{'other ' if plan.kept else ''}weights are left out"
    )
    shares = shares_of(
        [w for w in found if not isinstance(w.module, SparseLayer) and w.module not in plan.places], total
    )
    if shares:
        text += f"; dense stay {some(shares)}"
    if abs(rounding) > allowed / 2:
        text += "; the rest is rounding to whole blocks or rows"
    return [text + "; see sparse_moon.summary(model)"]
