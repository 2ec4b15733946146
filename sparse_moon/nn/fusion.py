"""Models whose modules run batch norm, residual sum and activation as one operation."""

import warnings

from torch import fx, nn

from sparse_moon.nn.batch_norm_relu import BatchNormReLU2d
from sparse_moon.nn.fused_forward import FusedForward, at, has_code, is_plain
from sparse_moon.nn.fusion_patterns import Matches, why_not
from sparse_moon.nn.gelu_mlp import fused_mlps
from sparse_moon.nn.plan import some
from sparse_moon.nn.tracing import trace


def fuse(model: nn.Module, *, recompute: bool = False) -> nn.Module:
    """Run batch norm followed by an activation, or by a sum and an activation, as one operation; in place.

    So do two sparse linear layers with GELU between them, where the code of one module calls them: on a GPU those of
    blocks, on the CPU those with GELU by tanh. Without a word where that module cannot be traced.

    It is exact in training and in evaluation, and faster on the CPU in float32 and on a GPU in channels_last; elsewhere
    torch's own operators run. Activations are ReLU, ReLU6, SiLU and Hardswish as modules or functions, in place or not;
    after a sum the first two. Only an ``nn.BatchNorm2d`` that is called once, and whose output is used nowhere else,
    takes part.

    The model stays what it is: classes, modules, their names, hooks, ``state_dict()``. Modules whose code calls batch
    norms and activations get another ``forward`` of their own, which ``torch.fx`` makes of that of their class. It goes
    into copies and pickles (``copy.copy`` of such a module alone would run the original's). Modules are called by name,
    so that one put in the place of another is called. The class's own forward pass runs where a batch norm or an
    activation in question has a hook or has become another type, where what the code has read of modules and their
    classes has changed, attributes and methods, also within lists, dicts and plain objects, and under
    ``torch.compile``, which fuses by itself. Numbers that a module reads from elsewhere, such as globals, stay what
    they were. Tracing runs the code of such modules a few times, on placeholders: what it does beside computing, as
    printing, happens then, and not in the fused forward pass.

    Args:
        model: any module. What cannot be traced stays as it is, with one warning that says why: code that looks at
            numbers, shapes or types of its input, depends on its mode (apart from what torch's modules do) as in
            ``F.dropout(x, training=self.training)`` or on autocast, draws random numbers or writes to the module.
        recompute: see :class:`BatchNormReLU2d`.

    Returns:
        The model itself.
    """
    for note in install(model, recompute):
        warnings.warn(note, stacklevel=2)
    return model


def install(model: nn.Module, recompute: bool) -> list[str]:
    """What :func:`fuse` does; returns what it has to say, at most one text."""
    unfuse(model)
    search = _Search(model, recompute)
    mlps = fused_mlps(model, {fused.module for fused in search.found})
    for fused in (*search.found, *mlps):
        # as attributes of the instance, which come before methods
        fused.module.__dict__.update(forward=fused, _replicate_for_data_parallel=fused.replica)
    if not search.untraced:
        return []
    names, reason = [name or "(model)" for name in search.untraced], next(iter(search.untraced.values()))
    return [f"not fused, as torch.fx cannot trace it: {some(names)}: {reason}"]


def unfuse(model: nn.Module) -> nn.Module:
    """Take back what :func:`fuse` did, in place: every module runs the forward pass of its class. Returns the model."""
    for module in model.modules():
        if type(vars(module).get("forward")) is FusedForward:
            del module.__dict__["forward"], module.__dict__["_replicate_for_data_parallel"]
    return model


def fusions(model: nn.Module) -> dict[str, str]:
    """Whether each 2-d batch norm is fused, and if not why; the model is traced for that, and not changed."""
    fused: set[nn.Module | None] = set()
    changed: set[nn.Module | None] = set()
    for module in model.modules():
        forward = vars(module).get("forward")
        if type(forward) is FusedForward:
            (fused if forward.holds() else changed).update(at(module, path) for path in forward.norms)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    found = {name: "fused" for name, m in norms.items() if m in fused or isinstance(m, BatchNormReLU2d)}
    if len(found) == len(norms):
        return found
    search = _Search(model, False)
    would = {at(f.module, path) for f in search.found for path in f.norms}

    def reason(module: nn.BatchNorm2d) -> str:
        if module in changed:
            return "it, its activation or what holds them was changed, or has hooks"
        if module in would:
            return "fuse(model) would"
        if type(module) is not nn.BatchNorm2d:
            return f"{type(module).__name__} is a kind of BatchNorm2d"
        return search.reasons.get(module, "torch.fx cannot trace the model")

    return {name: found.get(name) or f"not fused: {reason(module)}" for name, module in norms.items()}


class _Search:
    """What can be fused in a model, each in the innermost module whose code calls all of it.

    Attributes:
        found: the forward passes to install.
        reasons: why a batch norm is not fused, of those that are in a graph.
        untraced: modules that have batch norms left and cannot be traced, and why.
    """

    def __init__(self, model: nn.Module, recompute: bool) -> None:
        self.found: list[FusedForward] = []
        self.reasons: dict[nn.Module, str] = {}
        self.untraced: dict[str, str] = {}
        self._recompute = recompute
        # whose output may be used by code outside of what was traced
        self._open = {module for module in model.modules() if type(module) is nn.BatchNorm2d}
        for name, module in reversed(list(model.named_modules())):  # what is inside first
            if has_code(module) and self._has_open(module):
                self._look(name, module)
        self.untraced = {name: why for name, why in self.untraced.items() if self._has_open(model.get_submodule(name))}

    def _has_open(self, module: nn.Module) -> bool:
        return any(child in self._open for child in module.modules())

    def _look(self, name: str, module: nn.Module) -> None:
        modules = dict(module.named_modules(remove_duplicate=False))
        inlined = [
            child
            for child in dict.fromkeys(modules.values())
            if child is not module and has_code(child) and is_plain(child, type(child)) and self._has_open(child)
        ]
        parts = inlined
        traced = trace(module, parts)
        if isinstance(traced, str) and inlined:
            reason, parts = traced, []
            traced = trace(module)
            traced = reason if isinstance(traced, str) else traced
        if isinstance(traced, str):
            self.untraced[name] = traced
            return
        matches, reads = Matches(traced.graph, modules, self._recompute), traced.reads
        self._decide(traced.graph, modules)
        if not matches.norms:
            return
        # once more with no more code than it takes, so that all else is called as before
        less = [modules[path] for path in matches.owners if path]
        if set(less) != set(parts):
            again = trace(module, less)
            if not isinstance(again, str):
                smaller = Matches(again.graph, modules, self._recompute)
                if set(matches.norms) <= set(smaller.norms):
                    matches, parts, reads = smaller, less, again.reads
        for skipped in (modules[path] for path in matches.skipped):
            if isinstance(skipped, nn.ReLU6):
                reads.names[skipped] |= {"min_val", "max_val"}  # by its own code, which was not traced
        paths = [tuple(path.split(".")) for path in matches.skipped]
        owners = [tuple(path.split(".")) for path in modules if modules[path] in parts]
        self.found.append(FusedForward(module, matches.graph, paths, owners, reads, recompute=self._recompute))

    def _decide(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
        """Close those whose output ends in this graph."""
        calls: dict[nn.Module, list[fx.Node]] = {}
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr") and str(node.target) in modules:
                calls.setdefault(modules[str(node.target)], []).append(node)
        for norm in self._open & calls.keys():
            self.reasons[norm], last = why_not(calls[norm], modules)
            if len(calls[norm]) > 1 or not any(user.op == "output" for user in last.users):
                self._open.discard(norm)
