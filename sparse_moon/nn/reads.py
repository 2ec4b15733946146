"""What the code of modules reads of them while it is traced, and whether all of that is still the same."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from dis import get_instructions
from functools import partial
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

Path = tuple[str, ...]

_SIMPLE = frozenset((bool, int, float, complex, str, bytes))
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"forward", "_replicate_for_data_parallel", "dense_because"}
_ASK_FOR_TYPES = frozenset(("type", "isinstance", "issubclass"))


class _Same:
    """Equal to the same object only."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return type(other) is _Same and other.value is self.value

    __hash__ = None  # type: ignore[assignment]


class Missing:
    """In place of what is not there."""


def attributes(module: nn.Module) -> dict[str, Any]:
    """What a module has beside parameters, buffers, modules and hooks: what its class set for its code to read."""
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


def has_parts(value: Any) -> bool:
    """Whether somebody may write into a value without a trace elsewhere."""
    return type(value) not in _SIMPLE and type(content(value)) is not _Same


def content(value: Any, depth: int = 4) -> Any:
    """What is equal as long as nobody writes to a value or into it: numbers and texts, in lists, dicts and objects.

    Modules, functions, and what lies deeper are equal where they are the same; tensors where nobody has written to
    them, either.
    """
    kind = type(value)
    if kind in _SIMPLE:
        return kind, value
    if isinstance(value, torch.Tensor):
        return _Same(value), 0 if value.is_inference() else value._version
    if depth == 0 or isinstance(value, nn.Module | type) or callable(value):
        return _Same(value)
    if isinstance(value, dict):
        return kind, [(content(k, depth - 1), content(v, depth - 1)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return kind, [content(v, depth - 1) for v in value]
    if isinstance(value, set | frozenset):
        return kind, set(value)
    return (kind, content(vars(value), depth - 1)) if hasattr(value, "__dict__") else _Same(value)


def restorers(value: Any, depth: int = 4) -> Iterator[Callable[[], None]]:
    """What puts back the parts of a value, as far as :func:`content` looks, after somebody has written into it."""
    if depth == 0 or isinstance(value, torch.Tensor | nn.Module | type) or callable(value):
        return
    parts: Any = ()
    if isinstance(value, dict | set):
        yield partial(_refill, value, value.copy())
        parts = value.values() if isinstance(value, dict) else ()
    elif isinstance(value, list):
        yield partial(value.__setitem__, slice(None), value.copy())
        parts = value
    elif isinstance(value, tuple):
        parts = value
    elif hasattr(value, "__dict__"):
        parts = (vars(value),)
    for part in parts:
        yield from restorers(part, depth - 1)


def _refill(value: Any, before: Any) -> None:
    value.clear()
    value.update(before)


@dataclass
class Reads:
    """What user code has read of a module and the modules in it, by module, and that code."""

    names: dict[nn.Module, set[str]] = field(default_factory=dict)
    code: set[CodeType] = field(default_factory=set)

    def asks_for_types(self) -> bool:
        """Whether this code may ask for the type of anything."""
        return "__class__" in set().union(*self.names.values()) or bool(self.globals() & _ASK_FOR_TYPES)

    def globals(self) -> set[str]:
        """Names of the globals and builtins in this code."""
        return {str(i.argval) for code in self.code for i in get_instructions(code) if i.opname == "LOAD_GLOBAL"}


def of_user(frame: FrameType) -> bool:
    """Whether a frame is of the code of modules, and not of what traces and runs it."""
    name = str(frame.f_globals.get("__name__"))
    return not name.startswith(("torch.", "sparse_moon.nn.", "sparse_moon.ops."))


@contextmanager
def noted_reads(module: nn.Module) -> Iterator[Reads]:
    """What user code reads of the module and of those in it, in the block, through torch's containers, too."""
    reads = Reads({part: set() for part in module.modules()})
    others = vars(nn.Module).get("__getattribute__")
    read = nn.Module.__getattribute__

    def noting(self: nn.Module, name: str) -> Any:
        if (names := reads.names.get(self)) is not None:
            frame: FrameType | None = sys._getframe(1)
            while frame is not None and str(frame.f_globals.get("__name__")).startswith("torch.nn."):
                frame = frame.f_back
            if frame is not None and of_user(frame):
                names.add(name)
                reads.code.add(frame.f_code)
        return read(self, name)

    nn.Module.__getattribute__ = noting  # type: ignore[method-assign,assignment]
    try:
        yield reads
    finally:
        if others is None:
            del nn.Module.__getattribute__
        else:
            nn.Module.__getattribute__ = others  # type: ignore[method-assign]


class Read(NamedTuple):
    """What was read of a module, as it was then."""

    path: Path
    kind: type[nn.Module]
    values: dict[str, Any]
    """Attributes of the module itself."""
    whole: bool
    """Whether these are all that it had, and code has asked for all of them."""
    contents: dict[str, Any]
    """Of those that somebody may write into."""
    of_class: frozenset[str]
    """Attributes that the module does not have itself."""
    tensors: tuple[tuple[str, bool], ...]
    """Parameters and buffers, and whether there is one."""
    children: tuple[str, ...]
    types: tuple[Any, ...]
    """Of the children; only whether there is one where no code asks for types."""

    @classmethod
    def of(cls, module: nn.Module, path: Path, names: set[str], typed: bool) -> "Read":
        """What these names have now."""
        own, whole = vars(module), "__dict__" in names
        if whole:
            names = names | attributes(module).keys()
        values = {name: own[name] for name in names - _OF_EVERY_MODULE if name in own}
        contents = {name: content(value) for name, value in values.items() if has_parts(value)}
        others = names - own.keys() - module._parameters.keys() - module._buffers.keys() - module._modules.keys()
        of_class = frozenset(others - _OF_EVERY_MODULE - {"__dict__", "__class__"} | {"forward"})
        types = _types(module, typed)
        children = tuple(module._modules)
        return cls(path, type(module), values, whole, contents, of_class, _tensors(module), children, types)

    def holds(self, module: nn.Module | None, typed: bool, of_class: "list[OfClass]") -> bool:
        """Whether they still have it; asked in every call."""
        if module is None or type(module) is not self.kind or tuple(module._modules) != self.children:
            return False
        own = vars(module)
        if self.whole and attributes(module).keys() != self.values.keys():
            return False
        for name, value in self.values.items():
            now = own.get(name, Missing)
            if now is not value and content(now) != content(value):
                return False
        for name, before in self.contents.items():
            if content(own[name]) != before:
                return False
        for name, value, before in of_class:
            now = _of_class(self.kind, name)
            if (now is not value and content(now) != content(value)) or (name in own and name != "forward"):
                return False
            if before is not None and content(now) != before:
                return False
        return _tensors(module) == self.tensors and _types(module, typed) == self.types

    def class_values(self) -> "list[OfClass]":
        """What the class has of these names now."""
        values = ((name, _of_class(self.kind, name)) for name in self.of_class)
        return [(name, value, content(value) if has_parts(value) else None) for name, value in values]


OfClass = tuple[str, Any, Any]
"""Name of an attribute of a class, its value, and the content of one that somebody may write into."""


def _types(module: nn.Module, typed: bool) -> tuple[Any, ...]:
    children = module._modules.values()
    return tuple(map(type, children)) if typed else tuple([child is None for child in children])


def _tensors(module: nn.Module) -> tuple[tuple[str, bool], ...]:
    if not (module._parameters or module._buffers):
        return ()
    tensors = {**module._parameters, **module._buffers}
    return tuple([(name, tensor is not None) for name, tensor in tensors.items()])


def _of_class(kind: type, name: str) -> Any:
    for base in kind.__mro__:
        if name in base.__dict__:
            return base.__dict__[name]
    return Missing
