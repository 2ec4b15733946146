"""What keeps a sparse layer from being changed behind its back: by writes to its weight, averages, and old graphs."""

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


class Copied:
    """What a layer knows once it was copied, or is a copy: whether its values may have been written by other code."""

    def __init__(self, digest: int) -> None:
        self.digest = digest
        self.trained = False

    def note_training(self, _: Tensor) -> None:
        self.trained = True


def digest_of(values: Tensor) -> int:
    """A number that changes with the values."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    numbers = values.detach().contiguous().view(bits).flatten().long()
    return int((numbers * torch.arange(1, 2 * numbers.numel(), 2, device=numbers.device)).sum())


class ReadOnlyWeight(Tensor):
    """A dense weight that was made of compact values: writing to it would change nothing, so that is an error."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        written = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__set__") or (
            name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
        )  # fmt: skip
        if written and isinstance(first, cls) and name != "requires_grad_":
            raise RuntimeError(
                "the weight of a sparse layer is made of its values when it is read, writing to it changes nothing: "
                "write to values"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        shares = isinstance(result, Tensor) and isinstance(first, cls) and result.data_ptr() == first.data_ptr()
        return result.as_subclass(cls) if shares else result
