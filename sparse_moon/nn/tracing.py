"""What the code of one module does, as a graph; refused where a graph would not say all of it."""

import gc
import inspect
import pickle
import random
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

_SIMPLE = frozenset((bool, int, float, complex, str, bytes))
_COLLECTIONS = frozenset((list, tuple, dict, set))
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"forward", "_replicate_for_data_parallel", "dense_because"}


def add_(x: Any, y: Any) -> Any:
    """``x += y`` in a graph."""
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
    """Records ``x += y`` as that (``fx.Proxy`` records ``x + y``, which is not the same where ``x`` is used again)."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance() of a module's code: any answer would be written into the graph for all inputs
        if not str(sys._getframe(1).f_globals.get("__name__")).startswith(("torch.", "sparse_moon.")):
            raise ValueError("its forward pass asks for the type of its input")
        return type(self)

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", add_, (self, other), {})

    def __isub__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", _subtract_, (self, other), {})

    def __imul__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", _multiply_, (self, other), {})

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", _divide_, (self, other), {})


def _modes() -> tuple[Any, ...]:
    """What a block of a forward pass can switch, which a graph does not know."""
    devices = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in devices),
        torch._C._autograd._top_saved_tensors_default_hooks(False),  # those of checkpoints
    )


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, inlined: Collection[nn.Module]) -> None:
        super().__init__()
        self._inlined, self._modes = frozenset(inlined), _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self._inlined

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        inputs = [self.create_proxy("placeholder", name, (), {}) for name in _inputs(root_fn)]
        return root_fn, [self.root, *inputs]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise ValueError("its forward pass switches gradients, autocast or checkpoints")
        return super().create_node(*args, **kwargs)


def _inputs(forward: Callable[..., Any]) -> list[str]:
    """Its arguments without a default; the others keep theirs in the graph."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise ValueError("its forward pass takes any number of arguments")
    return [p.name for p in parameters if p.default is p.empty]


def trace(module: nn.Module, inlined: Collection[nn.Module] = ()) -> fx.Graph | str:
    """The forward pass of a module's class, with its required arguments; hooks of the module are not in it.

    Args:
        module: not changed.
        inlined: modules in it whose own code is followed; calls of all others are nodes.

    Returns:
        The graph; or why there is none: the code asks for what only a real input has; does another thing in training
        than in evaluation, with gradients than without, or by chance; or writes to the module.
    """
    before = _modes()
    try:
        return _trace(module, inlined)
    except Exception as error:  # whatever the code does with a placeholder
        reason = str(error)
    if _modes() != before:  # torch 2.11 leaves a checkpoint that fails when its frame, which errors hold, is collected
        gc.collect()
    return reason


def _trace(module: nn.Module, inlined: Collection[nn.Module]) -> fx.Graph:
    code = [module, *inlined]
    graphs = []
    with _unchanged(code):
        for training in (False, True):
            for part in code:
                part.training = training
            with torch.set_grad_enabled(training), _autocast(not training):
                graphs.append(_Tracer(inlined).trace(module))
    if str(graphs[0]) != str(graphs[1]):
        raise ValueError("its forward pass depends on self.training, on whether there are gradients or on autocast")
    return graphs[1]


@contextmanager
def _autocast(enabled: bool) -> Iterator[None]:
    """Autocast as whoever asks sees it, on no device in truth."""
    before = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}
    try:
        for device in before:
            torch.set_autocast_enabled(device, enabled)
        yield
    finally:
        for device, was in before.items():
            torch.set_autocast_enabled(device, was)


def attributes(module: nn.Module) -> dict[str, Any]:
    """What a module has beside parameters, buffers, modules and hooks: what its class set for its code to read."""
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


def class_attributes(kind: type[nn.Module]) -> dict[str, Any]:
    """What a class of modules and its bases have for their code to read, in place of attributes of a module."""
    bases = kind.__mro__[: kind.__mro__.index(nn.Module)]
    own = {name for base in bases for name in vars(base) if not name.startswith("__")}
    return {name: value for name in own if type(value := getattr(kind, name)) in _SIMPLE | _COLLECTIONS}


class _Same:
    """Equal to the same object only."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return type(other) is _Same and other.value is self.value

    __hash__ = None  # type: ignore[assignment]


def has_parts(value: Any) -> bool:
    """Whether somebody may write into a value without a trace elsewhere."""
    return type(value) not in _SIMPLE and type(content(value)) is not _Same


def content(value: Any, depth: int = 4) -> Any:
    """What is equal as long as nobody writes to a value or into it: numbers and texts, in lists, dicts and objects.

    Tensors, modules, functions, and what lies deeper are equal where they are the same.
    """
    kind = type(value)
    if kind in _SIMPLE:
        return kind, value
    if depth == 0 or isinstance(value, torch.Tensor | nn.Module | type) or callable(value):
        return _Same(value)
    if isinstance(value, dict):
        return kind, [(content(k, depth - 1), content(v, depth - 1)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return kind, [content(v, depth - 1) for v in value]
    if isinstance(value, set | frozenset):
        return kind, set(value)
    return (kind, content(vars(value), depth - 1)) if hasattr(value, "__dict__") else _Same(value)


@contextmanager
def _unchanged(modules: list[nn.Module]) -> Iterator[None]:
    """Modes, attributes and random numbers are as before afterwards; ValueError where more than the modes changed."""
    modes = [module.training for module in modules]
    before = [(attributes(module), _contents(module)) for module in modules]
    state, torch_state = random.getstate(), torch.get_rng_state()
    numpy = sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state(legacy=False)
    try:
        yield
    finally:
        drawn = random.getstate() != state or not torch.equal(torch.get_rng_state(), torch_state)
        random.setstate(state)
        torch.set_rng_state(torch_state)
        if numpy is not None:
            drawn = drawn or pickle.dumps(numpy.random.get_state(legacy=False)) != pickle.dumps(numpy_state)
            numpy.random.set_state(numpy_state)
        written = False
        for module, mode, (own, contents) in zip(modules, modes, before, strict=True):
            module.training = mode
            now = attributes(module)
            if any(now.get(name, module) is not own.get(name, module) for name in now | own):
                written = True
                for name in now:
                    del module.__dict__[name]
                module.__dict__.update(own)
            written = written or _contents(module) != contents
    if written:
        raise ValueError("its forward pass writes to the module")
    if drawn:
        raise ValueError("its forward pass draws random numbers by itself")


def _contents(module: nn.Module) -> list[Any]:
    tensors = [*module._parameters.items(), *module._buffers.items()]
    versions = [(name, id(t), 0 if t is None or t.is_inference() else t._version) for name, t in tensors]
    children = [(name, id(child)) for name, child in module._modules.items()]
    return [versions, content(attributes(module)), children]
