"""A forward pass of one module in which batch norms, sums and activations are one operation each."""

import linecache
from collections.abc import Iterator
from importlib import import_module
from types import CodeType, MethodType, ModuleType
from typing import Any, NamedTuple, cast
from zlib import crc32

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module

from sparse_moon.nn.sparse_layer import SparseLayer
from sparse_moon.nn.tracing import attributes, class_attributes, content, has_parts

_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks, torch_module._global_backward_pre_hooks,
)  # fmt: skip

Path = tuple[str, ...]


class _Code(NamedTuple):
    """A module whose code is in a graph, as it was when the graph was made."""

    path: Path
    kind: type[nn.Module]
    attributes: dict[str, Any]
    contents: dict[str, Any]
    """Of those that somebody may write into."""
    of_class: dict[str, Any]
    """The same of attributes of the class."""
    children: tuple[str, ...]

    def holds(self, module: nn.Module | None) -> bool:
        if module is None or type(module) is not self.kind or tuple(module._modules) != self.children:
            return False
        own = vars(module)
        for name, value in self.attributes.items():
            if own.get(name, self) is not value and content(own.get(name)) != content(value):
                return False
        for name, before in self.of_class.items():
            if content(getattr(self.kind, name, None)) != before:
                return False
        return all(content(own[name]) == before for name, before in self.contents.items())


class FusedForward:
    """In place of ``forward`` of one module: the same with batch norms, sums and activations in one operation each.

    The module, its class and all in it stay what they were. Modules are looked up when they are called. Where what the
    graph leaves out would show, the forward pass of the class runs as ever: hooks on a batch norm or an activation that
    would not be called, another type of module in such a place, attributes that have changed, arguments beside the
    required ones or that are no tensors on a CPU or a GPU, exporters, and compilers, which fuse by themselves.

    Attributes:
        norms: paths of the batch norms, from the module.
        recompute: as in :class:`sparse_moon.BatchNormReLU2d`.
        compiles: whether compilers are to see what is fused as well, because they could not.
    """

    def __init__(
        self,
        module: nn.Module,
        graph: fx.Graph,
        skipped: list[Path],
        inlined: list[Path],
        *,
        recompute: bool = False,
        compiles: bool = False,
    ) -> None:
        self.module, self.recompute, self.compiles = module, recompute, compiles
        self.norms = [path for path in skipped if type(at(module, path)) is nn.BatchNorm2d]
        self._skipped = [(path, type(at(module, path))) for path in dict.fromkeys([*skipped, *inlined])]
        self._code = [_code_of(module, path) for path in _with_lists(module, [(), *inlined])]
        code = graph.python_code("self")
        self._source = code.src
        self._names = {name: value for name, value in code.globals.items() if not isinstance(value, ModuleType)}
        self._imports = {name: value.__name__ for name, value in code.globals.items() if isinstance(value, ModuleType)}
        self._arity = sum(node.op == "placeholder" for node in graph.nodes)
        self._compile()

    def _compile(self) -> None:
        names = self._names | {name: import_module(module) for name, module in self._imports.items()}
        file = f"<fused {type(self.module).__name__} {crc32(self._source.encode()):08x}>"
        lines = self._source.splitlines(keepends=True)
        linecache.cache[file] = (len(self._source), None, lines, file)  # for tracebacks
        exec(compile(self._source, file, "exec"), names)
        self._run = names["forward"]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    @property
    def __wrapped__(self) -> MethodType:
        """The forward pass of the class; also for whoever looks for the signature."""
        return MethodType(type(self.module).forward, self.module)

    @property
    def __code__(self) -> CodeType:
        """For ``torch.export``, which looks for it in every ``forward``."""
        return self.__wrapped__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != self._arity or not self._serves(args):
            return type(self.module).forward(self.module, *args, **kwargs)
        return self._run(self.module, *args)

    def _serves(self, args: tuple[Any, ...]) -> bool:
        if torch.compiler.is_compiling():
            return self.compiles and not torch.compiler.is_exporting() and _holds(self)
        if "_run" not in vars(self):  # a copy
            self._compile()
        for arg in args:
            if not isinstance(arg, Tensor) or not (arg.is_cpu or arg.is_cuda):
                return False
        return self.holds()

    def holds(self) -> bool:
        """Whether the graph still says what the module does."""
        for hooks in _GLOBAL_HOOKS:
            if hooks:
                return False
        for path, kind in self._skipped:  # loops: in every call, and generators take twice as long
            if not is_plain(at(self.module, path), kind):
                return False
        return all(code.holds(at(self.module, code.path)) for code in self._code)

    def replica(self) -> nn.Module:
        """The module's ``_replicate_for_data_parallel``: replicas are for GPUs, and have modules of their own."""
        replica = type(self.module)._replicate_for_data_parallel(self.module)
        del replica.__dict__["forward"], replica.__dict__["_replicate_for_data_parallel"]
        return cast(nn.Module, replica)


def _holds(forward: FusedForward) -> bool:
    """Asked once by a compiler, which does not see hooks either that come later."""
    if "_run" not in vars(forward):
        forward._compile()
    return forward.holds()


# What torch.compiler.assume_constant_result does after importing torch._dynamo, which takes as long as half of torch.
_holds._dynamo_marked_constant = True  # type: ignore[attr-defined]


def at(module: nn.Module, path: Path) -> nn.Module | None:
    """What a module has at this path, None where there is nothing."""
    found: nn.Module | None = module
    for name in path:
        found = None if found is None else found._modules.get(name)
    return found


def is_plain(module: nn.Module | None, kind: type) -> bool:
    """Whether calling a module runs the forward pass of this class and nothing else."""
    if type(module) is not kind:
        return False
    own = vars(module)
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return not hooks and ("forward" not in own or type(own["forward"]) is FusedForward)


def _code_of(module: nn.Module, path: Path) -> _Code:
    part = cast(nn.Module, at(module, path))
    own, kind = attributes(part), type(part)
    contents = {name: content(value) for name, value in own.items() if has_parts(value)}
    of_class = {name: content(value) for name, value in class_attributes(kind).items()}
    return _Code(path, kind, own, contents, of_class, tuple(part._modules))


def _with_lists(module: nn.Module, paths: list[Path]) -> Iterator[Path]:
    """The paths, and those of the lists of modules that such code goes through."""
    for path in paths:
        yield path
        part = cast(nn.Module, at(module, path))
        lists = [n for n, child in part._modules.items() if isinstance(child, nn.ModuleList | nn.ModuleDict)]
        yield from _with_lists(module, [(*path, name) for name in lists])


def has_plain_forward(module: nn.Module) -> bool:
    """Whether nobody else has given a module a forward pass of its own."""
    forward = vars(module).get("forward")
    return forward is None or type(forward) is FusedForward


def has_code(module: nn.Module) -> bool:
    """Whether a module is there for its code, and not a layer, and its forward pass is that of its class."""
    if isinstance(module, SparseLayer) or not has_plain_forward(module):
        return False
    return isinstance(module, nn.Sequential) or not type(module).__module__.startswith(("torch.nn", "torch.ao.nn"))
