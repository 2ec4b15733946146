"""A forward pass of one module in which batch norms, sums and activations are one operation each."""

import linecache
from importlib import import_module
from types import CodeType, MethodType, ModuleType
from typing import Any, cast
from zlib import crc32

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module

from sparse_moon.nn.reads import Path, Read, Reads
from sparse_moon.nn.sparse_layer import SparseLayer

_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks, torch_module._global_backward_pre_hooks,
)  # fmt: skip


class FusedForward:
    """In place of ``forward`` of one module: the same with batch norms, sums and activations in one operation each.

    The module, its class and all in it stay what they were. Modules are looked up when they are called. Where what the
    graph leaves out would show, the forward pass of the class runs as ever: hooks on a batch norm or an activation that
    would not be called, another type of module in such a place, anything else that the code has read of modules and
    their classes and that has changed, arguments beside the required ones or that are no tensors on a CPU or a GPU,
    exporters, and compilers, which fuse by themselves.

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
        reads: Reads,
        *,
        recompute: bool = False,
        compiles: bool = False,
    ) -> None:
        self.module, self.recompute, self.compiles = module, recompute, compiles
        self.norms = [path for path in skipped if type(at(module, path)) is nn.BatchNorm2d]
        self._skipped = [(path, type(at(module, path))) for path in dict.fromkeys([*skipped, *inlined])]
        self._typed = reads.asks_for_types()
        paths = {part: tuple(name.split(".")) if name else () for name, part in module.named_modules()}
        parts = {module, *(part for part, names in reads.names.items() if names), *(at(module, p) for p in inlined)}
        self._read = [
            Read.of(part, path, reads.names[part], self._typed) for part, path in paths.items() if part in parts
        ]
        self._changed = False  # whether anything of this had when it was copied or saved
        self._of_class = [read.class_values() for read in self._read]
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
        # what classes have cannot be pickled
        state = {name: value for name, value in vars(self).items() if name not in ("_run", "_of_class")}
        return {**state, "_changed": not self._holds_read()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._of_class = [read.class_values() for read in self._read]

    @property
    def __wrapped__(self) -> MethodType:
        """The forward pass of the class; also for whoever looks for the signature."""
        return MethodType(type(self.module).forward, self.module)

    @property
    def __code__(self) -> CodeType:
        """For ``torch.export``, which looks for it in every ``forward``."""
        return self.__wrapped__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) > self._arity and args[0] is self.module:  # bound like a method, as accelerate does
            args = args[1:]
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
        return self._holds_read()

    def _holds_read(self) -> bool:
        for read, of_class in zip(self._read, self._of_class, strict=True):
            if not read.holds(at(self.module, read.path), self._typed, of_class):
                return False
        return not self._changed

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


def has_plain_forward(module: nn.Module) -> bool:
    """Whether nobody else has given a module a forward pass of its own."""
    forward = vars(module).get("forward")
    return forward is None or type(forward) is FusedForward


def has_code(module: nn.Module) -> bool:
    """Whether a module is there for its code, and not a layer, and its forward pass is that of its class."""
    if isinstance(module, SparseLayer) or not has_plain_forward(module):
        return False
    return isinstance(module, nn.Sequential) or not type(module).__module__.startswith(("torch.nn", "torch.ao.nn"))
