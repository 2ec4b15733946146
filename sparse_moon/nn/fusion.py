"""The rewriting of models to use one module for batch norm, residual sum and rectifier."""

import copy
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from sparse_moon.nn.batch_norm_relu import BatchNormReLU2d
from sparse_moon.nn.inspect import evaluation_mode
from sparse_moon.nn.layers import SparseLayer


def _add_(x: Any, y: Any) -> Any:
    x += y
    return x


def _subtract_(x: Any, y: Any) -> Any:
    x -= y
    return x


def _multiply_(x: Any, y: Any) -> Any:
    x *= y
    return x


def _divide_(x: Any, y: Any) -> Any:
    x /= y
    return x


class _Proxy(fx.Proxy):
    """Records ``x += y`` as that. ``fx.Proxy`` records ``x + y``, which is not the same where ``x`` is used again."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", _add_, (self, other), {})

    def __isub__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", _subtract_, (self, other), {})

    def __imul__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", _multiply_, (self, other), {})

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", _divide_, (self, other), {})


_SUMS = {operator.add, torch.add, _add_, "add", "add_"}
_SUMS_IN_PLACE = {_add_, "add_"}
_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, SparseLayer | BatchNormReLU2d) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


class _Shell(nn.Module):
    """In place of a container of the model: its modules, parameters and buffers, and no code.

    Attributes:
        emptied: a copy of the container that has none of them, from which :func:`unfuse` makes it again.
    """

    def __init__(self, container: nn.Module) -> None:
        super().__init__()
        self.train(container.training)
        self._parameters, self._buffers = container._parameters.copy(), container._buffers.copy()
        self._non_persistent_buffers_set = container._non_persistent_buffers_set.copy()
        emptied = copy.copy(container)
        emptied._modules, emptied._parameters, emptied._buffers = {}, {}, {}
        self.__dict__["emptied"] = emptied  # no module of the model


class _FusedModel(fx.GraphModule):
    """A graph with all modules of the model it was made of, in their order, also in copies.

    A plain ``GraphModule`` keeps those that the graph calls, in the order of the calls, which would change the
    meaning of an optimizer's state.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> "_FusedModel":
        result = cast(_FusedModel, super().__deepcopy__(memo))
        result._hold(copy.deepcopy({name: self.__dict__[name] for name in _HELD}, memo))
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        load, arguments = super().__reduce__()[:2]
        return _load_fused, (load, arguments, type(self).__name__, {name: self.__dict__[name] for name in _HELD})

    def _hold(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update((name, state[name]) for name in _HELD)


def _load_fused(
    load: Callable[..., fx.GraphModule], arguments: tuple[Any, ...], name: str, state: Mapping[str, Any]
) -> _FusedModel:
    module = load(*arguments)
    result = _FusedModel(module, module.graph, name)
    result._hold(state)
    return result


_HELD = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "emptied")


def fuse(model: nn.Module, *, recompute: bool = False) -> nn.Module:
    """Put :class:`BatchNormReLU2d` in the places of batch norm followed by a rectifier, or by a sum and a rectifier.

    The rectifier may be ``nn.ReLU``, ``F.relu``, ``torch.relu`` or a method, in place or not. Only an
    ``nn.BatchNorm2d`` that is used once, and whose output is used nowhere else, takes part.

    Args:
        model: any module that ``torch.fx`` can trace; not changed. Sparse layers are kept whole.
        recompute: of the new modules; see there.

    Returns:
        A module with the forward pass of the model, the same parameters and buffers (shared with it), and the same
        names in ``state_dict()``, in the same order. Of the model's own classes it has nothing but what their forward
        passes did: containers cannot be called one by one, and hooks on them and on the batch norms are gone.
        The model itself where nothing can be fused; with a warning where it cannot be traced, or where its forward
        pass depends on its mode (apart from what torch's modules do), as in ``F.dropout(x, training=self.training)``.
    """
    if not any(type(module) is nn.BatchNorm2d for module in model.modules() if module is not model):
        return model
    try:
        graph = _trace(model)
    except Exception as error:  # whatever the model's code does with a placeholder
        warnings.warn(f"the model is left as it is, torch.fx cannot trace it: {error}", stacklevel=2)
        return model
    fused = _rewrite(graph, dict(model.named_modules(remove_duplicate=False)), recompute)
    if not fused:
        return model
    rebuilt = _rebuild(model, fused)
    lost = [
        name or "(model)"
        for name, module in model.named_modules()
        if (module in fused or isinstance(rebuilt.get_submodule(name), _Shell))
        and (module._forward_hooks or module._forward_pre_hooks)
    ]
    if lost:
        warnings.warn(f"hooks on these modules are not called in the fused model: {', '.join(lost)}", stacklevel=2)
    result = _FusedModel(rebuilt, graph, type(model).__name__)
    result._hold(rebuilt.__dict__)
    return result


def unfuse(model: nn.Module) -> nn.Module:
    """Take back what :func:`fuse` did to the model or to modules in it: its own classes and its batch norms again.

    Returns:
        The model itself, changed in place, where it is not itself the result of ``fuse``. What it returns has the
        modules, parameters and buffers that the fused model has now.
    """
    whole: dict[nn.Module, nn.Module] = {}

    def restore(module: nn.Module) -> nn.Module:
        if module in whole:
            return whole[module]
        if isinstance(module, BatchNormReLU2d):
            whole[module] = module.to_batch_norm()
        elif isinstance(module, _Shell | _FusedModel):
            container = whole[module] = copy.copy(cast(nn.Module, module.emptied))
            container.training = module.training
            container._parameters, container._buffers = module._parameters.copy(), module._buffers.copy()
            container._modules = {
                name: None if child is None else restore(child) for name, child in module._modules.items()
            }
        else:
            whole[module] = module
        return whole[module]

    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, _FusedModel):
            if name == "":
                return restore(module)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, restore(module))
    return model


def fusions(model: nn.Module) -> dict[str, str]:
    """Whether each 2-d batch norm is fused, and if not why; the model is traced for that, and not changed."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    found = {name: "fused" for name, module in norms.items() if isinstance(module, BatchNormReLU2d)}
    if len(found) == len(norms):
        return found
    modules = dict(model.named_modules(remove_duplicate=False))
    try:
        nodes = [node for node in _trace(model).nodes if node.op == "call_module"]
    except Exception:  # whatever the model's code does with a placeholder
        return {name: found.get(name, "not fused: torch.fx cannot trace the model") for name in norms}
    calls: dict[nn.Module, list[fx.Node]] = {}
    for node in nodes:
        calls.setdefault(modules[str(node.target)], []).append(node)
    return {
        name: found.get(name) or f"not fused: {_not_fused(norm, calls.get(norm, []), modules)}"
        for name, norm in norms.items()
    }


def _not_fused(norm: nn.Module, calls: list[fx.Node], modules: dict[str, nn.Module]) -> str:
    """Why a batch norm is not fused, from its calls in the graph."""
    if type(norm) is not nn.BatchNorm2d:
        return f"{type(norm).__name__} is a kind of BatchNorm2d"
    if len(calls) != 1:
        return f"called {len(calls)} times"
    last = calls[0] if _residual(calls[0], modules) is None else next(iter(calls[0].users))
    if _rectifier(last, modules) is not None:
        return "fuse(model) would"
    sum_ = "a sum and " if last is not calls[0] else ""
    if len(last.users) != 1:
        return f"{sum_ or 'its output '}used {len(last.users)} times"
    user = next(iter(last.users))
    if user.op == "call_module":
        return f"followed by {sum_}{type(modules[str(user.target)]).__name__}"
    what = user.op if user.op == "output" else getattr(user.target, "__name__", user.target)
    return f"followed by {sum_}{str(what).strip('_')}"


def _trace(model: nn.Module) -> fx.Graph:
    """The forward pass, provided that it is the same in training and in evaluation mode."""
    with evaluation_mode(model):
        evaluation = _Tracer().trace(model)
        model.train()
        training = _Tracer().trace(model)
    if str(evaluation) != str(training):
        raise ValueError("its forward pass depends on self.training")
    return training


def _rewrite(graph: fx.Graph, modules: dict[str, nn.Module], recompute: bool) -> dict[nn.Module, BatchNormReLU2d]:
    """Rewrite the graph; returns what replaces each batch norm."""
    calls = Counter(modules[str(node.target)] for node in graph.nodes if node.op == "call_module")
    fused: dict[nn.Module, BatchNormReLU2d] = {}
    for node in list(graph.nodes):
        if node.op != "call_module" or type(modules[node.target]) is not nn.BatchNorm2d:
            continue
        batch_norm = cast(nn.BatchNorm2d, modules[node.target])
        if calls[batch_norm] != 1 or len(node.args) != 1 or node.kwargs:
            continue
        residual = _residual(node, modules)
        chain = [node] if residual is None else [node, next(iter(node.users))]
        relu = _rectifier(chain[-1], modules)
        if relu is None:
            continue
        with graph.inserting_before(relu):
            # The keyword always: another module put in this place must not pass for one that has a rectifier.
            new = graph.call_module(node.target, node.args, {"residual": residual})
        relu.replace_all_uses_with(new)
        for old in (relu, *reversed(chain)):
            graph.erase_node(old)
        fused[batch_norm] = BatchNormReLU2d.from_batch_norm(batch_norm, recompute=recompute)
    graph.lint()
    return fused


def _residual(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """What the only user of a batch norm adds to it, if that is a sum to whose place the batch norm may be moved."""
    user = _only_user(node)
    if user is None or user.op not in ("call_function", "call_method") or user.target not in _SUMS:
        return None
    if user.kwargs or len(user.args) != 2 or user.args[0] is user.args[1]:
        return None
    if user.target in _SUMS_IN_PLACE and user.args[0] is not node:
        return None
    between = node.next
    while between is not user:
        if _writes(between, modules):
            return None
        between = between.next
    other = user.args[1] if user.args[0] is node else user.args[0]
    return other if isinstance(other, fx.Node) else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _rectifier(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The only user of a node, if that is a rectifier."""
    user = _only_user(node)
    if user is None:
        return None
    if user.op == "call_module":
        return user if type(modules[str(user.target)]) is nn.ReLU else None
    return user if user.op in ("call_function", "call_method") and user.target in _RELUS else None


def _writes(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the node may change a tensor that it is given."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else node.target.__name__
    by_name = name.endswith("_") and not name.endswith("__")
    return by_name or any(node.kwargs.get(key) for key in ("inplace", "out"))


def _rebuild(model: nn.Module, fused: dict[nn.Module, BatchNormReLU2d]) -> nn.Module:
    """The tree of modules with the batch norms replaced; what contains one of them holds modules and no code."""
    rebuilt: dict[nn.Module, nn.Module] = dict(fused)

    def rebuild(module: nn.Module) -> nn.Module:
        if module not in rebuilt and any(child in fused for child in module.modules()):
            new = rebuilt[module] = _Shell(module)
            for name, child in module._modules.items():
                new.register_module(name, None if child is None else rebuild(child))
        return rebuilt.get(module, module)

    return rebuild(model)
