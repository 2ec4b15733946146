"""What the compiled CPU kernels of both products have in common."""

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_moon.ops.choice import Work, kernel_pays
from sparse_moon.ops.index import check_entries
from sparse_moon.ops.native import native
from sparse_moon.ops.plan import Plan

# What new_empty takes dtype and device from, in less time than from arguments.
_LIKE = torch.empty(0, dtype=torch.float32, device="cpu")


Grads = Callable[[Tensor, Tensor, Tensor, Plan], tuple[Tensor, Tensor]]

# How activations may be stored for the kernels, which compute in float32.
TYPES = {torch.float32, torch.bfloat16}

kernels: Any = native
"""The compiled extension; what reads it is registered only where it was built."""


class Decision(NamedTuple):
    """What runs a pass on operands of one shape, and what follows from the shape."""

    sparse: int
    """How many of its results the kernel computes; the others are those of dense products."""
    weight: Any
    """As the extension takes it, without values."""
    size: Any
    """Of the pass, as the extension takes it, or what a dense product wants to know."""
    blanks: tuple[Tensor, ...]
    """Of the shapes of results, see :func:`blank`."""


def decided(
    plan: Plan, key: Hashable, first: Tensor, values: Tensor, third: Tensor | None,
    layout: torch.memory_format = torch.contiguous_format, third_layout: torch.memory_format = torch.contiguous_format,
) -> Decision | None:  # fmt: skip
    """What was decided for these operands, where all have one type and no gaps in these layouts; else None.

    The key tells the type, which is one of :data:`TYPES` where there is a decision.
    """
    decision: Decision | None = plan.decided(key)
    if (
        decision is not None
        and values.dtype is first.dtype
        and first.is_contiguous(memory_format=layout)
        and values.is_contiguous()
        and (third is None or (third.dtype is first.dtype and third.is_contiguous(memory_format=third_layout)))
    ):
        return decision
    return None


def decide(plan: Plan, key: Hashable, size: Any, *blanks: Tensor, keep: bool, sparse: int = 1) -> Decision:
    """A decision; kept for calls to come where that is asked for, by operands that :func:`decided` takes."""
    decision = Decision(sparse, matrix(plan, None)[0], size, blanks)
    if keep:
        plan.note_decision(key, decision)
    return decision


def one_type(first: Tensor, *others: Tensor | None) -> bool:
    """Whether all are of one of :data:`TYPES`."""
    return first.dtype in TYPES and all(t is None or t.dtype is first.dtype for t in others)


def blank(
    shape: Sequence[int], layout: torch.memory_format = torch.contiguous_format, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A tensor without memory, for ``empty_like``: that takes half as long as what makes a tensor from a shape."""
    result = torch.empty(shape, dtype=dtype, device="cpu", memory_format=layout)
    result.untyped_storage().resize_(0)
    return result


def kernel_takes(work: Work, plan: Plan, *operands: Tensor | None) -> bool:
    """Whether the kernel takes operands of these dtypes and pays for them."""
    first = operands[0]
    assert first is not None
    if not one_type(first, *operands):
        return False
    if first.dtype is torch.bfloat16 and not emulated(first.dtype):
        work = work._replace(dtype="bfloat16")
    return kernel_pays(work, plan.density)


@cache
def emulated(dtype: torch.dtype) -> bool:
    """Whether torch only emulates products of this dtype on this processor.

    Without AVX-512 those of bfloat16 took 27 times as long as float32's in a 3 x 3 convolution, forward, and 10 with
    its gradients, 4 and 40 times in a linear layer and its input's gradient (64 channels; 768 to 3072; Zen 4's AVX2).
    """
    number = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    has = None if number is None else getattr(torch.ops.mkldnn, f"_is_mkldnn_{number}_supported", None)
    return has is not None and not has()


def in_float32(product: Callable[..., Any], first: Tensor, *others: Any) -> Any:
    """The results of a product in the dtype of the first operand, computed in float32, within autocast too."""
    with torch.autocast("cpu", enabled=False):
        found = product(first.float(), *(t.float() if isinstance(t, Tensor) else t for t in others))
    if isinstance(found, Tensor):
        return as_dtype(first.dtype, found)
    return tuple(as_dtype(first.dtype, result) for result in found)


def matrix(plan: Plan, values: Tensor | None) -> tuple[Any, int]:
    """The weight as the extension takes it: shapes and index, and the address of the values."""
    ready = plan.ready.get("cpu")
    if ready is None:
        index = [t.contiguous() for t in plan.index]
        weight = kernels.SparseMatrix(*plan.shape, *plan.block, *(t.data_ptr() for t in index))
        ready = plan.ready["cpu"] = weight, index
    if values is None:
        return ready[0], 0
    check_entries(values, plan.index[1])
    return ready[0], values.data_ptr()


def packed(tensor: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """The tensor without gaps."""
    return tensor if tensor.is_contiguous(memory_format=layout) else tensor.contiguous(memory_format=layout)


def as_float32(tensor: Tensor) -> Tensor:
    """Values or a bias as the kernels take them, in float32 and without gaps."""
    return packed(tensor if tensor.dtype is torch.float32 else tensor.float())


def empty(
    shape: Sequence[int], layout: torch.memory_format = torch.contiguous_format, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Memory for a result that is shaped like no operand."""
    if layout is torch.contiguous_format and dtype is torch.float32:
        return _LIKE.new_empty(shape)
    return torch.empty(shape, dtype=dtype, device="cpu", memory_format=layout)


def as_dtype(dtype: torch.dtype, result: Tensor) -> Tensor:
    """A result of float32 in the dtype of the operands."""
    return result if dtype is torch.float32 else result.to(dtype)


def with_bias_grad(grads: Grads, bias_grad: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Both gradients of a dense product, with that of the bias as a third where it is asked for."""

    def run(grad: Tensor, input: Tensor, values: Tensor, plan: Plan, with_bias: bool = False) -> tuple[Tensor, ...]:
        pair = grads(grad, input, values, plan)
        return (*pair, bias_grad(grad)) if with_bias else pair

    return run


def address(tensor: Tensor | None) -> int:
    """Where its numbers begin; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
