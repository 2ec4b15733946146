"""What the GPU kernels of both products have in common.

Products with blocks and vectors have Triton kernels, unstructured ones CUDA C++ kernels. They run where
:mod:`sparse_moon.ops.choice` finds that they pay, or where they are asked for; everything else is a dense product.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Literal

import torch
from torch import Tensor

from sparse_moon.ops.choice import Pass, Work, kernel_pays
from sparse_moon.ops.masked_dense import GPU_DTYPES
from sparse_moon.ops.native import has_cuda, has_triton
from sparse_moon.ops.plan import Plan

Implementation = Literal["triton", "cuda", "dense"]


def key_of(pass_: Pass, shape: Sequence[int], tf32: bool, *operands: Tensor | None) -> Hashable:
    """What a choice for a plan depends on, apart from what a plan looks at itself."""
    return "gpu", pass_, tuple(shape), tf32, *[None if t is None else t.dtype for t in operands]


def choose(
    key: Hashable, work: Work, plan: Plan, takes: Callable[[], bool], *operands: Tensor | None
) -> Implementation:
    """What runs a product; ``takes`` says whether Triton has a kernel for its blocks."""
    implementation = _choose(work, plan, takes, *operands)
    plan.note_decision(key, implementation)
    return implementation


def _choose(work: Work, plan: Plan, takes: Callable[[], bool], *operands: Tensor | None) -> Implementation:
    dtypes = {t.dtype for t in operands if t is not None}
    if len(dtypes) > 1 or not dtypes <= GPU_DTYPES:
        return "dense"
    kind: Literal["triton", "cuda"] = "cuda" if work.block == (1, 1) else "triton"
    there = has_cuda() if kind == "cuda" else has_triton() and takes()
    return kind if there and kernel_pays(work, plan.density, kind) else "dense"


def speed_dtype(dtype: torch.dtype, tf32: bool) -> str:
    """As :class:`Work` names it."""
    if dtype == torch.float32 and tf32:
        return "tf32"
    return "bfloat16" if dtype == torch.float16 else str(dtype).removeprefix("torch.")
