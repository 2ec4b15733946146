"""CUDA graphs as the host can play them: what is recorded has fixed memory, and is repeated without any Python.

A capture notes every operator with the tensors that it reads and writes, and leaves all as it was. A replay calls the
operators again, on those tensors. So a step that has put other tensors in their place since goes on with the old ones,
as on a GPU. What capturing forbids is an error: to look at numbers on the device, also where an operator of a GPU does
so inside, shapes that depend on them, memory of another size, another device, tensors that are made of Python's
numbers. Which tensors would be on the host cannot be seen here, where all are: to read one is no error.
"""

import sys
from contextlib import ExitStack, contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_moon.ops import cpu, registry

_LOOKS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__", "nonzero",
          "equal", "is_nonzero", "allclose", "unique", "masked_select"}  # fmt: skip
_COPIES = {"tensor", "as_tensor", "from_numpy", "new_tensor"}
_MOVES = {"cuda", "pin_memory"}
_FROM_PYTHON = torch.ops.aten.lift_fresh.default
_CHECKS = {  # numbers on the device, inside of what a GPU runs
    "multinomial", "normal.Tensor_Tensor", "normal.float_Tensor", "_linalg_check_errors", "_linalg_eigh",
    "linalg_eig", "_linalg_svd", "linalg_lstsq",
}  # fmt: skip
_SIZES = {"resize_", "resize_as_", "resize", "set_"}
_INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}
_WRITES_UNSAID = {torch.ops.aten.native_batch_norm.default: (3, 4)}


class Forbidden(RuntimeError):
    """As CUDA raises where a stream is capturing."""


class _Calls(TorchFunctionMode):
    """What Python asks of tensors."""

    def __init__(self, refuse):
        super().__init__()
        self.refuse, self.quiet = refuse, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if not self.quiet:
            if name in _LOOKS:
                self.refuse(f"{name} waits for the device")
            elif name in _COPIES:
                self.refuse(f"{name} copies from the host")
            elif name in _MOVES or (name == "to" and _names_a_device((*args[1:], *(kwargs or {}).values()))):
                self.refuse(f"{name} goes to another device")
        return func(*args, **(kwargs or {}))


def _names_a_device(arguments):
    """As a text; a device that is an object may be the tensors' own."""
    return any(isinstance(argument, str) for argument in arguments)


class Dispatched(TorchDispatchMode):
    """Sends all through the dispatcher, for the same bits: kernels called past it sum a bias's gradient differently."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    """What operators do; ``ops`` is the graph, ``saved`` what they have overwritten."""

    def __init__(self, refuse):
        super().__init__()
        self.refuse, self.ops, self.saved, self.made = refuse, [], {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            self.refuse(f"{func} depends on numbers on the device")
        if func is _FROM_PYTHON:
            self.refuse(f"{func} copies from the host")
        packet = str(func._overloadpacket).removeprefix("aten.")
        if not {packet, f"{packet}.{func._overloadname}"}.isdisjoint(_CHECKS):
            self.refuse(f"{func} checks numbers on the device")
        if packet in _SIZES:
            self.refuse(f"{func} gives a tensor other memory")
        one = len(args) > 2 and func in _INDEXED and args[2].numel() == 1  # it is filled in, wherever the mask is
        if func in _INDEXED and not one and any(t is not None and t.dtype == torch.bool for t in args[1]):
            self.refuse("a mask as an index has a shape that depends on numbers on the device")
        for tensor in _written(func, args, kwargs):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.made and storage.data_ptr() not in self.saved:
                self.saved[storage.data_ptr()] = storage, storage.clone()
        outputs = func(*args, **kwargs)
        given = {address(t) for t in _tensors((args, kwargs))}
        found = _tensors(outputs)
        self.made |= {address(t) for t in found} - given
        self.ops.append((func, args, kwargs, found))
        return outputs


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _written(func, args, kwargs):
    found = [args[place] for place in _WRITES_UNSAID.get(func, ())]
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[place] if place < len(args) else kwargs.get(argument.name))
    return _tensors(found)


@contextmanager
def _kernels_apart(calls):
    """Kernels of the CPU may read what they like: those of a GPU are others."""
    before = dict(registry.KERNELS)

    def apart(kernel):
        def run(*inputs):
            calls.quiet += 1
            try:
                return kernel(*inputs)
            finally:
                calls.quiet -= 1

        return run

    registry.KERNELS.update({key: apart(kernel) for key, kernel in before.items()})
    try:
        yield
    finally:
        registry.KERNELS.update(before)


@contextmanager
def looks():
    """What Python asks of the device inside the block that it would have to wait for."""
    found = []
    calls = _Calls(found.append)
    with _kernels_apart(calls), calls:
        yield found


@contextmanager
def _storages_stay(refuse):
    """Their sizes are changed past the dispatcher; kernels of the CPU may."""
    resize = torch.UntypedStorage.resize_

    def refused(storage, size):
        if sys._getframe(1).f_code is cpu.blank.__code__:
            return resize(storage, size)
        return refuse("a storage gets another size")

    torch.UntypedStorage.resize_ = refused
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize


class HostGraph:
    """In the place of :class:`sparse_moon.capture.graph.StepGraph`."""

    def __init__(self, device):
        self.ops = []

    @staticmethod
    def missing(device):
        return None

    def run(self, step):
        with Dispatched():
            return step()

    def rehearse(self, step):
        with Dispatched(), looks() as waits:
            outputs = step()
        return outputs, waits[0] if waits else None

    def capture(self, step):
        def refuse(what):
            raise Forbidden(what)

        random = torch.get_rng_state()
        operators, calls = _Operators(refuse), _Calls(refuse)
        with ExitStack() as stack:
            stack.enter_context(_storages_stay(refuse))
            stack.enter_context(calls)
            stack.enter_context(operators)
            outputs = step()
        for storage, before in operators.saved.values():
            storage.copy_(before)
        torch.set_rng_state(random)
        self.ops = operators.ops
        return outputs

    def forget(self):
        self.ops = []

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, outputs in self.ops:
            for old, new in zip(outputs, _tensors(func(*args, **kwargs)), strict=True):
                if address(old) != address(new):
                    old.copy_(new)
