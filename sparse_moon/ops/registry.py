"""Registration of the package's operators with ``torch.library``.

Every operator has a reference implementation for all devices (``CompositeExplicitAutograd``) and a fake one for
tracing; a faster kernel for one device registers itself for that device's dispatch key and is then preferred.

The dispatcher turns the arguments of an operator written in Python into its own values and back at every stage, which
takes as long as a small layer's product. So in plain eager execution, where nothing but us would look at the call,
kernels are called directly; compilers, modes, transforms and tensor subclasses see the operators.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import NoneType, new_class
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from sparse_moon.ops import choice
from sparse_moon.ops.plan import Plan

LIBRARY = torch.library.Library("sparse_moon", "DEF")

KERNELS: dict[tuple[str, str], Callable[..., Any]] = {}
"""The kernel that eager execution calls, by operator and type of device."""
_parts: dict[str, Callable[..., tuple[Any, ...]]] = {}  # by operator

# Looked at in every call.
_is_tracing = torch._C._is_tracing
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch = torch._C._are_functorch_transforms_active

is_batch = torch._C._functorch.is_legacy_batchedtensor
"""Whether a tensor is a batch of gradients in the guise of one (``torch.autograd.grad(is_grads_batched=True)``)."""

PLAIN = frozenset((Tensor, nn.Parameter, NoneType, bool, int, float, tuple, list, torch.Size, Plan))
"""Arguments of these types alone are nobody else's business."""


def _as_they_are(*inputs: Any) -> tuple[Any, ...]:
    return inputs


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    parts: Callable[..., tuple[Any, ...]] = _as_they_are,
) -> str:
    """Define an operator from its schema; returns its qualified name.

    Args:
        reference: what the dispatcher calls where no kernel is implemented for a device.
        fake: shapes, dtypes and layouts of the results.
        parts: from the arguments of kernels to those of the schema.
    """
    operator = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(operator, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparse_moon::{operator}", fake, lib=LIBRARY)
    _parts[operator] = parts
    return f"sparse_moon::{operator}"


def implement(
    operator: str,
    device_type: Literal["cpu", "cuda"],
    kernel: Callable[..., Any],
    *,
    dispatched: Callable[..., Any] | None = None,
) -> None:
    """Use this kernel for the operator on this type of device, in place of the reference.

    Args:
        dispatched: what the dispatcher calls in its place: the kernel behind checks of what strangers may bring.
    """
    LIBRARY.impl(operator, dispatched or kernel, device_type.upper())
    KERNELS[operator, device_type] = kernel


def behind(check: Callable[..., None], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel behind a check of its inputs, as :func:`implement` takes it for ``dispatched``."""

    def run(*inputs: Any) -> Any:
        check(*inputs)
        return kernel(*inputs)

    return run


def call(operator: str, *inputs: Any) -> Any:
    """Call an operator that has no gradient and whose first argument is a tensor."""
    kernel = None if torch.is_grad_enabled() else direct_kernel(operator, inputs)
    return kernel(*inputs) if kernel else getattr(torch.ops.sparse_moon, operator)(*_parts[operator](*inputs))


def direct_kernel(operator: str, inputs: tuple[Any, ...]) -> Callable[..., Any] | None:
    """The kernel to call in place of the operator, or None where anything else may want to see the operator."""
    if not (unwatched() and PLAIN.issuperset(map(type, inputs)) and all(map(in_memory, inputs))):
        return None
    return KERNELS.get((operator, inputs[0].device.type))


def in_memory(operand: Any) -> bool:
    """Whether the numbers of an operand, if it is a plain tensor, are what its memory holds, which kernels read.

    Those of an imaginary part of a conjugate have the opposite sign there, and lazy zeros have no memory.
    """
    return not isinstance(operand, Tensor) or not (operand.is_neg() or operand._is_zerotensor())


def unwatched() -> bool:
    """Whether no compiler, mode or transform looks at what is computed now."""
    return not (
        torch.compiler.is_dynamo_compiling()  # at half the time of is_compiling(); exporters have modes
        or _is_tracing()
        or _dispatch_modes()
        or _functorch()
        or forward_ad._current_level >= 0
    )


def transformed() -> bool:
    """Whether ``torch.func`` transforms or forward-mode derivatives look at what is computed now.

    They need operators of torch alone: kernels have neither batching rules nor forward derivatives.
    """
    return not torch.compiler.is_compiling() and (_functorch() or forward_ad._current_level >= 0)


def differentiable_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Any], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of ``function(*inputs)`` that can be differentiated in turn; None where not ``needed``.

    Each is the partial derivative, also where one input was computed from another.
    """
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        known = [t.requires_grad_() if n and not t.requires_grad else t for t, n in zip(inputs, needed, strict=True)]
        aliases = [t.view_as(t) if n else t for t, n in zip(known, needed, strict=True)]
        wanted = [t for t, n in zip(aliases, needed, strict=True) if n]
        found = iter(torch.autograd.grad(function(*aliases), wanted, grad, create_graph=True, materialize_grads=True))
    return [next(found) if n else None for n in needed]


def register_autograd(
    name: str,
    backward: Callable[..., tuple[Tensor | None, ...]],
    *,
    setup_context: Callable[..., None],
    reference: Callable[..., Any],
    differentiable_backward: Callable[..., tuple[Tensor | None, ...]],
    whole: Callable[..., tuple[Any, ...]] = _as_they_are,
) -> Callable[..., Any]:
    """What ``torch.library.register_autograd`` does for an operator without default arguments, at half its cost a call.

    Torch's own compares the arguments with the schema's defaults in every forward pass, 30 to 50 us for the operators
    of a layer.

    Args:
        name: of the operator, qualified; its first argument is a tensor.
        backward: from ``ctx`` and the results' gradients to a gradient or None for each argument.
        setup_context: stores what the backward pass needs in ``ctx``; called with ``inputs`` and ``output``.
        reference: the operator by differentiable operators of torch; runs under ``torch.func`` transforms and in
            forward mode.
        differentiable_backward: as ``backward``, by differentiable operators; runs under ``create_graph=True``
            and for batches of gradients.
        whole: as in :func:`register_function`.

    Returns:
        The operator as a function, which calls kernels directly where it can.
    """
    operator = name.removeprefix("sparse_moon::")

    def forward(ctx: Any, *arguments: Any) -> Any:
        inputs, run = arguments[:-1], arguments[-1]
        ctx.backend = choice.current_backend()
        output = run(*inputs)
        setup_context(ctx, inputs, output)
        return output

    def backward_of_all(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # gradients are recorded in a backward pass only if it is to be differentiated
        batches = any(grad is not None and is_batch(grad) for grad in grads)
        derived = torch.is_grad_enabled() or transformed() or batches
        run = differentiable_backward if derived else backward
        if ctx.backend == "auto" or choice.current_backend() != "auto":
            return *run(ctx, *grads), None
        with choice.use_backend(ctx.backend):
            return *run(ctx, *grads), None

    function, dispatched = register_function(name, forward, backward_of_all, reference=reference, whole=whole)

    def call_or_dispatch(*inputs: Any) -> Any:
        kernel = direct_kernel(operator, inputs)
        if kernel is None or choice.current_backend() == "reference":
            return dispatched(*inputs)
        return function.apply(*inputs, kernel) if torch.is_grad_enabled() else kernel(*inputs)

    return call_or_dispatch


def register_function(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., tuple[Tensor | None, ...]],
    *,
    reference: Callable[..., Any],
    whole: Callable[..., tuple[Any, ...]] = _as_they_are,
) -> tuple[Any, Callable[..., Any]]:
    """Make the ``autograd.Function`` of an operator, and register it.

    Args:
        name: of the operator, qualified; its first argument is a tensor.
        forward: gets ``ctx``, the inputs, and last what computes the results from the inputs.
        backward: gets ``ctx`` and the results' gradients; returns a gradient or None for each argument of ``forward``.
        reference: the operator by differentiable operators of torch; runs under ``torch.func`` transforms and in
            forward mode.
        whole: from the schema's arguments to those of kernels, the inverse of what :func:`define` got as ``parts``.

    Returns:
        The function, and what to call in its place where no kernel may be called directly.
    """
    namespace, operator = name.split("::")
    op, parts = getattr(getattr(torch.ops, namespace), operator).default, _parts[operator]

    def below_autograd(keyset: torch._C.DispatchKeySet, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *parts(*inputs))

    # named after the operator, because profilers show the class
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = new_class(operator, (torch.autograd.Function,), exec_body=lambda body: body.update(methods))

    def autograd(keyset: torch._C.DispatchKeySet, *flat: Any) -> Any:
        inputs = whole(*flat)
        if torch.is_grad_enabled():
            return function.apply(*inputs, partial(below_autograd, keyset))
        return below_autograd(keyset, *inputs)

    def dispatched(*inputs: Any) -> Any:
        if transformed():
            return reference(*inputs)
        if torch.compiler.is_compiling() or choice.current_backend() != "reference":
            return op(*parts(*inputs))
        output = reference(*inputs)
        first = output[0] if isinstance(output, tuple) else output
        for plan in (given for given in inputs if isinstance(given, Plan)):
            if first.requires_grad:  # torch's operators keep no index that it could watch
                first.register_hook(lambda _, plan=plan: plan.check_unchanged())
        return output

    LIBRARY.impl(operator, autograd, "Autograd", with_keyset=True)
    return function, dispatched


def to_autocast_dtype(device_type: str, *tensors: Any) -> tuple[Any, ...]:
    """Floating point tensors but float64, as torch, in the dtype that autocast asks for on this device, if it does."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # torch knows no autocast on meta
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    casts = (t is not None and t.is_floating_point() and t.dtype is not torch.float64 for t in tensors)
    return tuple(t.to(dtype) if cast else t for t, cast in zip(tensors, casts, strict=True))
