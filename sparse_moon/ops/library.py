"""Registration of the package's operators with ``torch.library``.

Every operator has a reference implementation for all devices (``CompositeExplicitAutograd``) and a fake one for
tracing; a faster kernel for one device registers itself for that device's dispatch key and is then preferred.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("sparse_moon", "DEF")


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> str:
    """Define an operator from its schema; returns its qualified name."""
    name = "sparse_moon::" + schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(schema[: schema.index("(")], reference, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=LIBRARY)
    return name


def register_autograd(
    name: str, backward: Callable[..., tuple[Tensor | None, ...]], *, setup_context: Callable[..., None]
) -> None:
    """What ``torch.library.register_autograd`` does for an operator without default arguments, at half its cost a call.

    Torch's own compares the arguments with the schema's defaults in every forward pass, 30 to 50 us for the operators
    of a layer, which is as long as a small layer's product takes.

    Args:
        name: of the operator, qualified.
        backward: from ``ctx`` and the results' gradients to a gradient or None for each argument.
        setup_context: stores what the backward pass needs in ``ctx``; called with ``inputs`` and ``output``.
    """
    namespace, operator = name.split("::")
    op = getattr(getattr(torch.ops, namespace), operator).default

    def below_autograd(keyset: torch._C.DispatchKeySet, inputs: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            *inputs, keyset = arguments
            output = below_autograd(keyset, tuple(inputs))
            setup_context(ctx, tuple(inputs), output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return *backward(ctx, *grads), None

    def autograd(keyset: torch._C.DispatchKeySet, *inputs: Any) -> Any:
        return Differentiable.apply(*inputs, keyset) if torch.is_grad_enabled() else below_autograd(keyset, inputs)

    LIBRARY.impl(operator, autograd, "Autograd", with_keyset=True)


def to_autocast_dtype(device_type: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Floating point tensors in the dtype that autocast asks for on this device; unchanged outside autocast."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # torch knows no autocast on meta
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)
