"""The last step of a sum that several programs have parts of, always in the same order."""

import triton
import triton.language as tl
from torch import Tensor

from sparse_moon.kernels.launch import Launch


@triton.jit
def sum_splits_kernel(p_parts, p_output, numel, n_splits, B: tl.constexpr):
    """Output (numel,) = sum of parts (n_splits, numel) in their order."""
    o = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    p_part = p_parts + o
    acc = tl.zeros((B,), tl.float32)
    for _ in range(n_splits):
        acc += tl.load(p_part, mask=o < numel, other=0.0)
        p_part += numel
    tl.store(p_output + o, acc.to(p_output.dtype.element_ty), mask=o < numel)


def sum_splits(parts: Tensor, output: Tensor, block: int, num_warps: int) -> Launch:
    """``output`` = the sum of ``parts`` (splits, ...), float32, over the splits; ``block`` numbers a program."""
    n = output.numel()
    arguments = {"p_parts": parts, "p_output": output, "numel": n, "n_splits": parts.shape[0], "B": block}
    return Launch(sum_splits_kernel, (triton.cdiv(n, block),), arguments, num_warps, num_stages=1)
