"""What keeps a sparse layer from being changed behind its back: by writes to its weight, averages, and old graphs."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn


def resize(parameter: nn.Parameter, data: Tensor) -> None:
    """Give a parameter data of another shape: the same object, as its optimizer knows it.

    A graph made before cannot be used any more: its backward pass raises, as torch does after a change in place.
    """
    with torch.enable_grad():
        view = parameter.view_as(parameter)
    if view.grad_fn is not None:
        accumulator = cast(torch.autograd.graph.Node, view.grad_fn.next_functions[0][0])
        accumulator.register_prehook(_refuse)
    parameter.grad = None
    # autograd's node for a parameter keeps its shape as long as any graph holds that node (an old loss does), and is
    # renewed only with the dtype
    parameter.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float64 else torch.float64)
    parameter.data = data
    torch.autograd.graph.increment_version(parameter)


def _refuse(*_: Any) -> None:
    raise RuntimeError(
        "the number of a layer's weights was changed in place since this graph was made: it has no gradient any more"
    )


class Anchor(torch.autograd.Function):
    """The dense matrix itself; its backward pass raises where the index has changed since, as torch does in general."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, *index: Tensor) -> Tensor:
        ctx.save_for_backward(*index)
        return matrix.view_as(matrix)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *[None for _ in ctx.saved_tensors]


class ReadOnlyWeight(Tensor):
    """A dense weight that was made of compact values: writing to it would change nothing, so that is an error."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook):
            raise RuntimeError(
                "the weight of a sparse layer is another tensor each time it is read, so that its hooks are called for "
                "none of the layer's products: register them with layer.values"
            )
        if _writes(func, args, kwargs, cls):
            raise RuntimeError(
                "the weight of a sparse layer is made of its values when it is read, writing to it changes nothing: "
                "write to values"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            sources = {t.untyped_storage().data_ptr() for t in args if isinstance(t, cls)}
            if type(result) in (tuple, list):  # of views: unbind, chunk
                return type(result)([_read_only(t, sources, cls) for t in result])
            return _read_only(result, sources, cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return copy.deepcopy(self.as_subclass(Tensor), memo)


def _writes(func: Any, args: Any, kwargs: dict[str, Any], cls: type) -> bool:
    """Whether the function would write into such a weight."""
    name = getattr(func, "__name__", "")
    first = args[0] if args else None
    if isinstance(kwargs.get("out"), cls):
        return True
    in_place = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__set__") or (
        name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    ) or kwargs.get("inplace") is True  # fmt: skip
    targets = first if isinstance(first, tuple | list) else (first,)
    return in_place and any(isinstance(target, cls) for target in targets)


def _read_only(result: Any, sources: set[int], cls: Any) -> Any:
    """The result, read-only as well if it shares memory with the weight."""
    shares = isinstance(result, Tensor) and result.untyped_storage().data_ptr() in sources
    return result.as_subclass(cls) if shares else result
