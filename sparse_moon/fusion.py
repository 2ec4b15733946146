"""Batch norm, residual sum and rectifier as one module, and the rewriting of models to use it."""

import copy
import operator
import warnings
from collections import Counter
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparse_moon.nn import SparseLayer, evaluation_mode
from sparse_moon.ops.batch_norm_relu import batch_norm_relu


class BatchNormReLU2d(nn.BatchNorm2d):
    """``relu(BatchNorm2d(input) + residual)``, exact in training and in evaluation mode.

    Parameters, buffers and their names are those of ``nn.BatchNorm2d``. Convert to ``nn.SyncBatchNorm`` before this
    module comes in: that conversion knows nothing of the rectifier.

    Args:
        num_features ... dtype: as ``nn.BatchNorm2d``.
        relu: whether the rectifier is applied.
        recompute: whether sparse convolutions of the output compute it again in the backward pass, in place of keeping
            it (on the CPU, without a residual): a layer's activations take half the memory, for another pass over them.

    Shapes:
        input and residual (N, C, H, W), contiguous or channels_last; the output follows the input. A residual that has
        to be broadcast is added by torch.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        relu: bool = True,
        recompute: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.relu, self.recompute = relu, recompute

    @classmethod
    def from_batch_norm(cls, batch_norm: nn.BatchNorm2d, relu: bool = True, recompute: bool = False) -> Self:
        """The same batch norm, with the rectifier: it shares parameters and running statistics with the given one."""
        bn = batch_norm
        self = cls(
            bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats, "meta", relu=relu,
            recompute=recompute,
        )  # fmt: skip
        self._parameters, self._buffers = bn._parameters.copy(), bn._buffers.copy()
        return self.train(bn.training)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        training = self.training or (self.running_mean is None and self.running_var is None)
        use_running = not self.training or self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if use_running else (None, None)
        broadcast = None if residual is None or residual.shape == input.shape else residual
        output = batch_norm_relu(
            input, mean, var, self.weight, self.bias, residual if broadcast is None else None,
            training=training, momentum=momentum, eps=self.eps, relu=self.relu and broadcast is None,
            recompute=self.recompute,
        )  # fmt: skip
        if broadcast is None:
            return output
        return F.relu(output + broadcast) if self.relu else output + broadcast

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relu={self.relu}, recompute={self.recompute}"


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


class _FusedModel(fx.GraphModule):
    """A graph with all modules of the model it was made of, in their order, also in copies.

    A plain ``GraphModule`` keeps those that the graph calls, in the order of the calls, which would change the
    meaning of an optimizer's state.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> "_FusedModel":
        result = cast(_FusedModel, super().__deepcopy__(memo))
        result._hold(*copy.deepcopy((self._modules, self._parameters, self._buffers), memo))
        return result

    def _hold(self, modules: dict[str, Any], parameters: dict[str, Any], buffers: dict[str, Any]) -> None:
        self._modules, self._parameters, self._buffers = modules, parameters, buffers


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
    result = _FusedModel(rebuilt, graph, type(model).__name__)
    result._hold(rebuilt._modules, rebuilt._parameters, rebuilt._buffers)
    return result


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
        relu = _only_user(chain[-1])
        if relu is None or not _is_relu(relu, modules):
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


def _is_relu(user: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if user.op == "call_module":
        return type(modules[str(user.target)]) is nn.ReLU
    return user.op in ("call_function", "call_method") and user.target in _RELUS


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
            new = rebuilt[module] = nn.Module().train(module.training)
            new._parameters, new._buffers = module._parameters.copy(), module._buffers.copy()
            new._non_persistent_buffers_set = module._non_persistent_buffers_set.copy()
            for name, child in module._modules.items():
                new.register_module(name, None if child is None else rebuild(child))
        return rebuilt.get(module, module)

    return rebuild(model)
