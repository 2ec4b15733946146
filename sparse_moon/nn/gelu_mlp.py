"""Two sparse linear layers with GELU between them: found in the code of modules, and run as one operation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparse_moon.nn.conv1d import SparseConv1D
from sparse_moon.nn.fused_forward import FusedForward, has_code, is_plain
from sparse_moon.nn.layers import SparseLinear
from sparse_moon.nn.tracing import trace
from sparse_moon.ops import sparse_linear, sparse_mlp
from sparse_moon.ops.registry import transformed
from sparse_moon.ops.sparse_mlp.api import pays
from sparse_moon.ops.sparse_mlp.parts import APPROXIMATE, NAMES, Gelu

_OTHERS: dict[str, Gelu] = {
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
}


def fused_mlps(model: nn.Module, taken: set[nn.Module]) -> list[FusedForward]:
    """Forward passes of modules whose code calls a sparse linear layer, GELU, perhaps dropout, and another layer.

    Args:
        taken: modules that have another forward pass of their own by now.
    """
    found = []
    for module in model.modules():
        layers = [child for child in module._modules.values() if _is_layer(child)]
        if len(layers) < 2 or module in taken or not (has_code(module) and _mentions_gelu(module)):
            continue
        traced = trace(module)
        if isinstance(traced, str):  # nothing of it was asked for by name
            continue
        skipped = _rewrite(traced.graph, dict(module.named_modules(remove_duplicate=False)))
        if skipped:
            paths = [tuple(path.split(".")) for path in skipped]
            found.append(FusedForward(module, traced.graph, paths, [], traced.reads, compiles=True))
    return found


def _mentions_gelu(module: nn.Module) -> bool:
    """Whether tracing may find one: a module in it, a function that it keeps, or a name in its code."""
    if any(child is not None and _gelu(child) for child in module._modules.values()):
        return True
    code = getattr(type(module).forward, "__code__", None)
    return (code is not None and "gelu" in code.co_names) or any(value is F.gelu for value in vars(module).values())


def gelu_mlp(
    input: Tensor,
    first: SparseLinear,
    second: SparseLinear,
    activation: nn.Module | Gelu,
    between: list[nn.Module],
) -> Tensor:
    """``second(gelu(first(input)))``, in one operation where kernels gain by it.

    That computes all gradients, so all must be wanted.

    Args:
        activation: an ``nn.GELU`` or a module like it, or its name.
        between: modules that follow it, of dropout or nothing at all.
    """
    values1, bias1, plan1 = first.operands()
    values2, bias2, plan2 = second.operands()
    gelu = None if any(map(_drops, between)) else _gelu(activation)
    if (
        gelu is not None and bias1 is not None and bias2 is not None
        and (not torch.is_grad_enabled() or all(t.requires_grad for t in (values1, bias1, values2, bias2)))
        and not transformed() and pays(input, plan1, plan2, gelu)
    ):  # fmt: skip
        return sparse_mlp(
            input, values1, bias1, plan1, values2, bias2, plan2, gelu, probe1=first.probe, probe2=second.probe
        )
    hidden = sparse_linear(input, values1, bias1, plan1, probe=first.probe)
    if isinstance(activation, nn.Module):
        hidden = activation(hidden)
    else:
        hidden = F.gelu(hidden, approximate=APPROXIMATE[NAMES.index(activation)])
    for module in between:
        hidden = module(hidden)
    return sparse_linear(hidden, values2, bias2, plan2, probe=second.probe)


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and module.training and module.p > 0


def _is_layer(module: nn.Module | None) -> bool:
    """Whether it is a sparse linear layer, and no other class made of one."""
    return type(module) in (SparseLinear, SparseConv1D)


def _gelu(activation: nn.Module | Gelu) -> Gelu | None:
    """Which one it is, None for anything else."""
    if isinstance(activation, str):
        return activation
    if type(activation) is nn.GELU:
        return NAMES[APPROXIMATE.index(activation.approximate)] if activation.approximate in APPROXIMATE else None
    return _OTHERS.get(f"{type(activation).__module__}.{type(activation).__qualname__}")


def _rewrite(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[str]:
    """Put :func:`gelu_mlp` in place of what it does; returns the names of the modules that are no longer called."""
    skipped = []
    for node in list(graph.nodes):
        if not _calls(node, modules, _is_layer):
            continue
        chain: list[fx.Node] = [node]
        activation = _next(node)
        if activation is None:
            continue
        chain.append(activation)
        gelu: Any = _function(activation)
        if gelu is None and not _calls(activation, modules, lambda module: _gelu(module) is not None):
            continue
        last = _next(activation)
        while last is not None and _calls(last, modules, lambda module: type(module) in (nn.Dropout, nn.Identity)):
            chain.append(last)
            last = _next(last)
        if last is None or not _calls(last, modules, _is_layer):
            continue
        chain.append(last)
        called = [str(old.target) for old in chain if old.op == "call_module"]
        if len({modules[name] for name in called}) < len(called) or not all(
            is_plain(modules[name], type(modules[name])) for name in called
        ):
            continue
        with graph.inserting_before(last):
            first, second, *between = (graph.get_attr(str(n.target)) for n in (node, last, *chain[2:-1]))
            gelu = graph.get_attr(str(activation.target)) if gelu is None else gelu
            new = graph.call_function(gelu_mlp, (node.args[0], first, second, gelu, between))
        last.replace_all_uses_with(new)
        for old in reversed(chain):
            graph.erase_node(old)
        skipped += called
    return skipped


def _next(node: fx.Node) -> fx.Node | None:
    """The only user, if what it is called with is this and nothing else that is a tensor."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return user if user is not None and user.all_input_nodes == [node] else None


def _calls(node: fx.Node, modules: dict[str, nn.Module], wanted: Any) -> bool:
    """Whether the node calls such a module with one argument."""
    return node.op == "call_module" and len(node.args) == 1 and not node.kwargs and wanted(modules[str(node.target)])


def _function(node: fx.Node) -> Gelu | None:
    if node.op != "call_function" or node.target is not F.gelu or len(node.args) != 1:
        return None
    options = dict(node.kwargs)
    approximate = options.pop("approximate", "none")
    return NAMES[APPROXIMATE.index(str(approximate))] if not options and approximate in APPROXIMATE else None
