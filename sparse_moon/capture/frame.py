"""What a graph of a training step takes for granted, so that no stale one is replayed."""

from collections.abc import Callable, Iterator, Sized
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_moon.algorithms import Method
from sparse_moon.algorithms.optimizers import inner_optimizers, parameters_of
from sparse_moon.nn import SparseLayer
from sparse_moon.topology import Topology

_PLAIN = (bool, int, float, str)  # what Python reads in a step, and a graph keeps
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Frame:
    """What a graph takes for granted, from before it is captured.

    Attributes:
        rebound: what the step itself puts in another's place, so that a second replay would read what the first did.
    """

    def __init__(self, method: Method, modules: tuple[nn.Module, ...]) -> None:
        self.rebound: str | None = None
        self._bound: list[tuple[Any, Any, Any, str]] = []  # container, key, what is there, name
        self._tensors: list[tuple[Tensor, int, torch.Size, bool, str]] = []
        self._numbers: list[tuple[dict[str, Any], str, Any, str]] = []  # container, key, what is there, name
        self._lists: list[tuple[dict[str, Any], str, list[Any], str]] = []  # container, key, what is in it, name
        self._sized: list[Sized] = []  # to which something may be added
        self._sizes: list[int] = []
        self._sized_names: list[str] = []
        self._layers: list[SparseLayer] = []
        self._topologies: list[Topology] = []
        self._written: dict[int, Tensor] = {}  # by a step; indices are not
        self.parameters = parameters(method, modules)
        for number, root in enumerate(modules):
            for name, module in root.named_modules(prefix=type(root).__name__ if number else ""):
                self._see_module(name, module)
        for inner in inner_optimizers(method.optimizer):
            self._see_optimizer(inner)
        for kind in _HOOKS:
            self._see_hooks(vars(nn.modules.module), f"_global{kind}", f"torch's _global{kind}")
        self._gradient_hooks = [(parameter, _gradient_hooks(parameter)) for parameter in self.parameters]
        self._written |= {id(parameter): parameter for parameter in self.parameters}
        self._grads: list[Tensor | None] = []
        self._hides: list[tuple[SparseLayer, Any, bool]] = []  # what is set, and whether by the step

    def _see_module(self, name: str, module: nn.Module) -> None:
        own = module.__dict__
        if not isinstance(module, Topology):  # which keeps notes, and has its own check
            plain = ((key, value) for key, value in own.items() if type(value) in _PLAIN)
            self._numbers += [(own, key, value, f"{name}.{key}") for key, value in plain]
        for kind in ("_modules", "_parameters", "_buffers"):
            self._see_size(getattr(module, kind), f"{name}.{kind}")
        for kind in _HOOKS:
            self._see_hooks(own, kind, f"{name}.{kind}")
        self._bound += [(module._modules, key, child, f"{name}.{key}") for key, child in module._modules.items()]
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                self._see_tensor(tensors, key, tensor, f"{name}.{key}")
                if tensor is not None and not isinstance(module, Topology):
                    self._written[id(tensor)] = tensor
        if isinstance(module, SparseLayer):
            self._layers.append(module)
            self._bound.append((own, "_transform", own.get("_transform"), f"{name}.transform"))
        if isinstance(module, Topology):
            self._topologies.append(module)

    def _see_optimizer(self, optimizer: Optimizer) -> None:
        name, own = type(optimizer).__name__, optimizer.__dict__
        for key in ("state", "param_groups"):
            self._bound.append((own, key, getattr(optimizer, key), f"the optimizer's {key}"))
        for key in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            self._see_hooks(own, key, f"{name}.{key}")
        self._lists.append((own, "param_groups", list(optimizer.param_groups), "param_groups"))
        for group in optimizer.param_groups:
            self._see_size(group, f"a parameter group of {name}")
            for key, value in group.items():
                if isinstance(value, Tensor):
                    self._see_tensor(group, key, value, f"the {key} of {name}")
                elif key == "params":
                    self._lists.append((group, key, list(value), key))
                else:
                    self._numbers.append((group, key, value, f"{key} of the optimizer"))
        self._see_size(optimizer.state, f"the state of {name}")
        for state in optimizer.state.values():
            self._see_size(state, f"the state of a parameter in {name}")
            for key, value in state.items():
                if isinstance(value, Tensor):
                    self._see_tensor(state, key, value, f"the {key} of {name}")
                    self._written[id(value)] = value

    def _see_tensor(self, container: Any, key: Any, tensor: Tensor | None, name: str) -> None:
        self._bound.append((container, key, tensor, name))
        if tensor is not None:
            self._tensors.append((tensor, tensor.data_ptr(), tensor.shape, tensor.requires_grad, name))

    def _see_size(self, container: Sized, name: str) -> None:
        self._sized.append(container)
        self._sizes.append(len(container))
        self._sized_names.append(name)

    def _see_hooks(self, owner: dict[str, Any], key: str, name: str) -> None:
        hooks = owner[key]
        self._see_size(hooks, name)
        if hooks:
            self._bound.append((owner, key, hooks, name))
        self._bound += [(hooks, number, hook, name) for number, hook in hooks.items()]

    def around_capture(self) -> "_Hides":
        """A context to capture in, which finds out whose masks the graph has read."""
        return _Hides(self._layers, self._keep)

    def _keep(self, hides: list[tuple[SparseLayer, Any, bool]]) -> None:
        self._hides = hides
        self._grads = [parameter.grad for parameter in self.parameters]

    def change(self, *, stepped: bool = False) -> str | None:
        """What is not as it was: another object, or other memory. Looks at indices that were written to.

        Args:
            stepped: right after a step, which leaves hooks on parameters where the next batch ends with an update.
        """
        for topology in self._topologies:
            topology.check()
        for container, key, value, name in self._bound:
            if container.get(key) is not value:
                return f"{name} is another"
        for tensor, address, shape, trains, name in self._tensors:
            if tensor.data_ptr() != address or tensor.shape != shape:
                return f"{name} has other memory"
            if tensor.requires_grad != trains:
                return f"{name} has another requires_grad"
        if list(map(len, self._sized)) != self._sizes:
            sizes = zip(self._sized_names, map(len, self._sized), self._sizes, strict=True)
            return next(f"{name} has {now} entries, not {then}" for name, now, then in sizes if now != then)
        for parameter, numbers in () if stepped else self._gradient_hooks:
            hooks = numbers or parameter._backward_hooks or parameter._post_accumulate_grad_hooks
            if hooks and _gradient_hooks(parameter) != numbers:
                return "a parameter has other hooks"
        for container, key, items, name in self._lists:
            if len(container[key]) != len(items) or not all(map(is_, container[key], items)):
                return f"{name} of the optimizer is another"
        for container, key, number, name in self._numbers:
            if (now := container.get(key)) is not number and now != number:
                return f"{name} is another"
        for layer, hide, by_step in self._hides:
            if not by_step and layer.hide is not hide:
                return "a random mask is drawn or cleared outside of the step"
        return None

    def restore(self) -> None:
        """What the step's Python would have left behind."""
        for parameter, grad in zip(self.parameters, self._grads, strict=True):
            parameter.grad = grad
        for layer, hide, by_step in self._hides:
            if by_step:
                layer.hide = hide
        torch.autograd.graph.increment_version(self._written.values())


class _Hides:
    """Around a capture: which layers' ``hide`` the graph has read as it was, and which ones the step has set."""

    def __init__(self, layers: list[SparseLayer], keep: Callable[[list[tuple[SparseLayer, Any, bool]]], None]) -> None:
        self._layers, self._keep = layers, keep

    def __enter__(self) -> None:
        self._before = [(layer, layer.hide, _Read(layer.hide)) for layer in self._layers]
        for layer, hide, noting in self._before:
            if hide is not None:
                layer.hide = noting

    def __exit__(self, *_: object) -> None:
        kept: list[tuple[SparseLayer, Any, bool]] = []
        for layer, hide, noting in self._before:
            if layer.hide is noting:
                layer.hide = hide
            if noting.read or layer.hide is hide:
                kept.append((layer, hide, False))
            else:
                kept.append((layer, layer.hide, True))
        self._keep(kept)


class _Read:
    """A ``hide`` that notes that it was called."""

    def __init__(self, hide: Callable[[Tensor], Tensor] | None) -> None:
        self._hide, self.read = hide, False

    def __call__(self, values: Tensor) -> Tensor:
        assert self._hide is not None
        self.read = True
        return self._hide(values)


def parameters(method: Method, modules: tuple[nn.Module, ...]) -> list[nn.Parameter]:
    """All that get gradients, each once."""
    every: Iterator[nn.Parameter] = (p for module in modules for p in module.parameters())
    return list({id(p): p for p in (*every, *parameters_of(method.optimizer))}.values())


def _gradient_hooks(parameter: Tensor) -> tuple[int, ...]:
    """Numbers of the hooks that a backward pass calls for it."""
    return *(parameter._backward_hooks or ()), *(parameter._post_accumulate_grad_hooks or ())
