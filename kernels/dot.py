"""The tile product of all kernels, in the precision that PyTorch's own products have."""

import torch
import triton
import triton.language as tl


@triton.jit
def round_to_tf32(x):
    """x (float32) rounded to 10 bits of mantissa, to the nearest, halves away from zero.

    The matrix unit drops the 13 low bits of its operands, where cuBLAS and cuDNN have rounded before: without that the
    error is larger, and of one sign, so that it does not average out. Half of the last bit kept is added to the
    magnitude and carries where it must, from an infinity only into the bits that are dropped. What the GPU computes as
    NaN has all bits set but the sign: there the carry would leave a zero.
    """
    rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, float("nan"))


@triton.jit
def dot(x, y, acc, PRECISION: tl.constexpr):
    """acc + x y, for operands of 16 bits or float32; PRECISION is "ieee" or, on the matrix unit, "tf32"."""
    if PRECISION == "ieee":
        # A step's sum starts from zero: the error grows with steps + length of a step, not with their product. The
        # last argument, which is for eight bits, keeps the compiler from making one sum of both again.
        return acc + tl.dot(x, y, input_precision="ieee", max_num_imprecise_acc=1)
    if x.dtype == tl.float32:
        return tl.dot(round_to_tf32(x), round_to_tf32(y), acc, input_precision="tf32")
    return tl.dot(x, y, acc)


def precision_of(dtype: torch.dtype, allow_tf32: bool) -> str:
    """PRECISION for operands of this dtype."""
    return "tf32" if allow_tf32 or dtype != torch.float32 else "ieee"
