"""Batch norm, sum and activation in the graph of a forward pass."""

import operator
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from sparse_moon.nn.batch_norm_relu import normalise
from sparse_moon.nn.fused_forward import is_plain
from sparse_moon.nn.layers import SparseLayer
from sparse_moon.nn.tracing import add_
from sparse_moon.ops.activations import LAST_FLAT, NAMES, Activation
from sparse_moon.topology import Topology

_MODULES: dict[type, Activation] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish"
}  # fmt: skip
_FUNCTIONS: dict[Any, Activation] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    F.relu6: "relu6", F.silu: "silu", F.hardswish: "hardswish",
}  # fmt: skip
_SUMS = {operator.add, torch.add, add_, "add", "add_"}
_SUMS_IN_PLACE = {add_, "add_"}


class Matches:
    """A graph rewritten, and what was fused in it.

    Attributes:
        norms: names of the batch norms.
        skipped: names of all modules that are no longer called.
        owners: names of the modules whose code called them or did the rest, from the root.
    """

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module], recompute: bool) -> None:
        self.graph = graph
        self.norms: list[str] = []
        self.skipped: list[str] = []
        self.owners: list[str] = []
        calls = Counter(modules[str(node.target)] for node in graph.nodes if node.op == "call_module")
        for node in list(graph.nodes):
            if node.op != "call_module" or type(modules[str(node.target)]) is not nn.BatchNorm2d:
                continue
            if calls[modules[str(node.target)]] == 1 and len(node.args) == 1 and not node.kwargs:
                self._match(node, modules, recompute)

    def _match(self, node: fx.Node, modules: dict[str, nn.Module], recompute: bool) -> None:
        chain = [node]
        last = _past_identities(node, modules, chain)
        residual = _residual(last)
        in_place = False
        if residual is not None:
            chain.append(next(iter(last.users)))
            in_place = chain[-1].target in _SUMS_IN_PLACE
            last = _past_identities(chain[-1], modules, chain)
        user = _only_user(last)
        activation = None if user is None else _activation(user, modules)
        if user is None or activation is None or (residual is not None and NAMES.index(activation) > LAST_FLAT):
            return
        chain.append(user)
        if self._reads_of(node) or _written(node, user, chain, modules):
            return
        called = [modules[str(n.target)] for n in chain if n.op == "call_module"]
        if not all(is_plain(module, type(module)) for module in called):
            return
        with self.graph.inserting_before(user):
            norm = self.graph.get_attr(str(node.target))
            options: dict[str, Any] = {"recompute": recompute, "add_in_place": in_place}
            new = self.graph.call_function(normalise, (norm, node.args[0], residual, activation), options)
        user.replace_all_uses_with(new)
        self.norms.append(str(node.target))
        for old in reversed(chain):
            if old.op == "call_module":
                self.skipped.append(str(old.target))
            stack = old.meta.get("nn_module_stack") or {}
            self.owners += [path for path, _ in stack.values() if path not in (*self.owners, str(old.target))]
            self.graph.erase_node(old)

    def _reads_of(self, norm: fx.Node) -> bool:
        """Whether code reads a batch norm's own numbers, which the fused one writes later."""
        return any(n.op == "get_attr" and str(n.target).startswith(f"{norm.target}.") for n in self.graph.nodes)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _past_identities(node: fx.Node, modules: dict[str, nn.Module], passed: list[fx.Node] | None = None) -> fx.Node:
    user = _only_user(node)
    while user is not None and user.op == "call_module" and type(modules[str(user.target)]) is nn.Identity:
        if passed is not None:
            passed.append(user)
        node, user = user, _only_user(user)
    return node


def _residual(node: fx.Node) -> fx.Node | None:
    """What the only user of a batch norm adds to it, if that is a sum."""
    user = _only_user(node)
    if user is None or user.op not in ("call_function", "call_method") or user.target not in _SUMS:
        return None
    if user.kwargs or len(user.args) != 2 or user.args[0] is user.args[1]:
        return None
    if user.target in _SUMS_IN_PLACE and user.args[0] is not node:
        return None
    other = user.args[1] if user.args[0] is node else user.args[0]
    return other if isinstance(other, fx.Node) else None


def _activation(node: fx.Node, modules: dict[str, nn.Module]) -> Activation | None:
    if node.op == "call_module":
        module = modules[str(node.target)]
        clips = isinstance(module, nn.ReLU6) and (module.min_val, module.max_val) != (0.0, 6.0)
        return None if clips else _MODULES.get(type(module))
    if node.op not in ("call_function", "call_method"):
        return None
    return _FUNCTIONS.get(node.target)


def _written(first: fx.Node, last: fx.Node, chain: list[fx.Node], modules: dict[str, nn.Module]) -> bool:
    """Whether anything between two nodes may change what the first reads, which is to be read at the last instead."""
    node = first.next
    while node is not last:
        if node not in chain and _writes(node, modules):
            return True
        node = node.next
    return False


def _writes(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return any(  # into its input, which may share its memory with what is read
            getattr(part, "inplace", False)
            or not (type(part).__module__.startswith("torch.nn.") or isinstance(part, SparseLayer | Topology))
            for part in modules[str(node.target)].modules()
        )
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else node.target.__name__
    in_place = any(node.kwargs.get(key) for key in ("inplace", "out")) or any(arg is True for arg in node.args)
    return in_place or (name.endswith("_") and not name.endswith("__"))


def why_not(calls: list[fx.Node], modules: dict[str, nn.Module]) -> tuple[str, fx.Node]:
    """Why a batch norm is not fused, and the last node that is only there for it."""
    node = calls[0]
    if len(calls) != 1:
        return f"called {len(calls)} times", node
    last, sum_ = _past_identities(node, modules), ""
    if _residual(last) is not None:
        last, sum_ = _past_identities(next(iter(last.users)), modules), "a sum and "
    if len(last.users) != 1:
        return f"{sum_ or 'its output '}used {len(last.users)} times", last
    user = next(iter(last.users))
    if user.op == "call_module":
        return f"followed by {sum_}{type(modules[str(user.target)]).__name__}", last
    if user.target is normalise:
        return "added to the output of a batch norm that is fused", last
    what = user.op if user.op == "output" else getattr(user.target, "__name__", user.target)
    return f"followed by {sum_}{str(what).strip('_')}", last
