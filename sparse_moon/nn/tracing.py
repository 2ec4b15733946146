"""What the code of one module does, as a graph; refused where a graph would not say all of it."""

import gc
import inspect
import pickle
import random
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dis import opname
from typing import Any, NamedTuple, NoReturn

import torch
from torch import fx, nn

from sparse_moon.nn.reads import Reads, attributes, content, noted_reads, of_user, restorers

_ASKS_FOR_TYPE = "its forward pass asks for the type of its input"


class Traced(NamedTuple):
    """The graph of a forward pass, and what its code read of modules."""

    graph: fx.Graph
    reads: Reads


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
    """Records ``x += y`` as that (``fx.Proxy`` records ``x + y``, which is not the same where ``x`` is used again).

    What only a real input can answer is refused, for good: code may catch the error.
    """

    tracer: "_Tracer"

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance() of a module's code: any answer would be written into the graph for all inputs
        if of_user(sys._getframe(1)):
            self.tracer.refuse(_ASKS_FOR_TYPE)
        return type(self)

    def __getattr__(self, name: str) -> Any:
        frame = sys._getframe(1)
        if of_user(frame) and opname[frame.f_code.co_code[frame.f_lasti]] not in ("LOAD_ATTR", "LOAD_METHOD"):
            self.tracer.refuse("its forward pass asks its input for attributes by name")  # hasattr() and getattr()
        return super().__getattr__(name)

    def _refuse_number(self, *_: Any) -> NoReturn:
        self.tracer.refuse("its forward pass looks at numbers or sizes of its input")

    __int__ = __float__ = __complex__ = __index__ = __contains__ = _refuse_number

    def __len__(self) -> int:
        self._refuse_number()

    def _refuse_in_place(self, _: Any) -> NoReturn:
        self.tracer.refuse("its forward pass has an operator in place that is not +=, -=, *= or /=")

    __ipow__ = __ifloordiv__ = __imod__ = __imatmul__ = __iand__ = __ior__ = __ixor__ = _refuse_in_place
    __ilshift__ = __irshift__ = _refuse_in_place

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
        self.refused = ""

    def refuse(self, reason: str) -> NoReturn:
        """Raise ``ValueError``, and let it be known to whoever asked for the graph."""
        self.refused = reason
        raise ValueError(reason)

    def to_bool(self, obj: fx.Proxy) -> bool:
        with self._refusing():
            return super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        with self._refusing():
            return super().iter(obj)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.refused = str(error)
            raise

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self._inlined

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        bases = type(m).__mro__[: type(m).__mro__.index(nn.Module)]
        if any("__call__" in vars(base) for base in bases):  # which calls this, and would be called by the graph, too
            self.refuse(f"{type(m).__name__} has a __call__ of its own")
        return super().call_module(m, forward, args, kwargs)

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


def trace(module: nn.Module, inlined: Collection[nn.Module] = ()) -> Traced | str:
    """The forward pass of a module's class, with its required arguments; hooks of the module are not in it.

    Args:
        module: not changed.
        inlined: modules in it whose own code is followed; calls of all others are nodes.

    Returns:
        The graph, with what it depends on; or why there is none: the code asks for what only a real input has; does
        another thing in training than in evaluation, with gradients than without, or by chance; or writes to the
        module.
    """
    before = _modes()
    try:
        return _trace(module, inlined)
    except Exception as error:  # whatever the code does with a placeholder
        reason = str(error)
    if _modes() != before:  # torch 2.11 leaves a checkpoint that fails when its frame, which errors hold, is collected
        gc.collect()
    return reason


def _trace(module: nn.Module, inlined: Collection[nn.Module]) -> Traced:
    parts = list(module.modules())
    graphs = []
    with _unchanged(parts), noted_reads(module) as reads:
        for training in (False, True):
            for part in parts:
                part.training = training
            with torch.set_grad_enabled(training), _autocast(not training):
                tracer = _Tracer(inlined)
                graphs.append(tracer.trace(module))
            if tracer.refused:
                raise ValueError(tracer.refused)
    if str(graphs[0]) != str(graphs[1]):
        raise ValueError("its forward pass depends on self.training, on whether there are gradients or on autocast")
    if "type" in reads.globals():
        raise ValueError(_ASKS_FOR_TYPE)
    return Traced(graphs[1], reads)


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


@contextmanager
def _unchanged(modules: list[nn.Module]) -> Iterator[None]:
    """Modes, attributes and random numbers are as before afterwards; ValueError where more than the modes changed."""
    modes = [module.training for module in modules]
    before = [(attributes(module), _contents(module)) for module in modules]
    restore = [put_back for own, _ in before for put_back in restorers(own)]
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
        for put_back in restore if written else ():
            put_back()
    if written:
        raise ValueError("its forward pass writes to the module")
    if drawn:
        raise ValueError("its forward pass draws random numbers by itself")


def _contents(module: nn.Module) -> list[Any]:
    tensors = [*module._parameters.items(), *module._buffers.items()]
    versions = [(name, id(t), 0 if t is None or t.is_inference() else t._version) for name, t in tensors]
    children = [(name, id(child)) for name, child in module._modules.items()]
    return [versions, content(attributes(module)), children]
