"""MOON's (K+1)-way loss, its gradient over the logits and its statistics (arXiv 2403.20047, Eq. 1).

z (B, K+1), y = target (B,), w (); in float32, for every row
    p = softmax(z), u = p_{K+1}, ce = -log p_y, extra = 1[argmax z != y] w / (1 + w u), slope = ce extra^2 u
    loss = ce (1 + extra)
    d loss / dz = (1 + extra + slope) p - (1 + extra) onehot(y) - slope onehot(K+1)
Written: loss (), the mean over rows; grad (B, K+1), of that mean; statistics (3,) = mean (1 - u) ce, mean u, errors.

A program sums its own rows; one more program adds up the programs' sums in a fixed order, unless there was only one.
So there are no float atomics, and the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_moon.kernels.launch import Launch, Variant, Variants


@triton.jit
def _coefficients(ce, u, wrong, y, w, classes):
    """Row's terms; a target outside [0, K) makes all but u NaN, also the number of errors: nothing can be raised."""
    possible = (y >= 0) & (y < classes - 1)
    ce = tl.where(possible, ce, float("nan"))
    wrong = tl.where(possible, wrong, float("nan"))
    extra = wrong * w / (1 + w * u)
    return ce, wrong, extra, ce * extra * extra * u


@triton.jit
def _whole_rows(
    p_z, stride_row, p_target, stride_target, p_w, p_grad, p_loss, p_statistics, p_sums, batch, classes,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, ONE_PROGRAM: tl.constexpr,
):  # fmt: skip
    """Rows that fit in registers, (ROWS, CLASSES) at a time: read once, written once. Sums: (4, programs)."""
    w = tl.load(p_w).to(tl.float32)
    o_class = tl.arange(0, CLASSES)[None, :]
    sum_loss = tl.zeros([ROWS], tl.float32)
    sum_beta = tl.zeros([ROWS], tl.float32)
    sum_u = tl.zeros([ROWS], tl.float32)
    sum_wrong = tl.zeros([ROWS], tl.float32)
    for first in range(tl.program_id(0) * ROWS, batch, tl.num_programs(0) * ROWS):
        o_row = first + tl.arange(0, ROWS).to(tl.int64)
        m_row = o_row < batch
        m_z = m_row[:, None] & (o_class < classes)
        p_row = p_z + o_row * stride_row
        y = tl.load(p_target + o_row * stride_target, m_row, 0)
        z = tl.load(p_row[:, None] + o_class, m_z, 0.0).to(tl.float32)
        z = tl.where(o_class < classes, z, -float("inf"))
        z_unknown = tl.load(p_row + classes - 1, m_row, 0.0).to(tl.float32)
        z_y = tl.load(p_row + y, m_row & (y >= 0) & (y < classes), 0.0).to(tl.float32)

        top = tl.max(z, 1)
        best = tl.min(tl.where(z == top[:, None], o_class, CLASSES), 1)
        e = tl.exp(z - top[:, None])
        total = tl.sum(e, 1)
        u = tl.exp(z_unknown - top) / total
        wrong = (best != y).to(tl.float32)
        ce, wrong, extra, slope = _coefficients(tl.log(total) - (z_y - top), u, wrong, y, w, classes)

        grad = ((1 + extra + slope) / total)[:, None] * e
        grad = tl.where(o_class == y.to(tl.int32)[:, None], grad - (1 + extra)[:, None], grad)
        grad = tl.where(o_class == classes - 1, grad - slope[:, None], grad) * (1 / batch)
        tl.store((p_grad + o_row * classes)[:, None] + o_class, grad, m_z)
        sum_loss += tl.where(m_row, ce * (1 + extra), 0.0)
        sum_beta += tl.where(m_row, (1 - u) * ce, 0.0)
        sum_u += tl.where(m_row, u, 0.0)
        sum_wrong += tl.where(m_row, wrong, 0.0)

    loss, beta, mean_u, errors = tl.sum(sum_loss), tl.sum(sum_beta), tl.sum(sum_u), tl.sum(sum_wrong)
    if ONE_PROGRAM:
        _write_means(p_loss, p_statistics, loss, beta, mean_u, errors, batch)
    else:
        _write_sums(p_sums, loss, beta, mean_u, errors)


@triton.jit
def _long_row(
    p_z, stride_row, p_target, stride_target, p_w, p_grad, p_loss, p_statistics, p_sums, batch, classes,
    CLASSES: tl.constexpr, ONE_PROGRAM: tl.constexpr,
):  # fmt: skip
    """A row a program, in chunks: once for maximum and sum together (online softmax), once more for the gradient."""
    w = tl.load(p_w).to(tl.float32)
    row = tl.program_id(0).to(tl.int64)
    p_row = p_z + row * stride_row
    y = tl.load(p_target + row * stride_target)
    z_unknown = tl.load(p_row + classes - 1).to(tl.float32)
    z_y = tl.load(p_row + y, (y >= 0) & (y < classes), 0.0).to(tl.float32)

    top = tl.full([], -float("inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    best = tl.zeros([], tl.int32)
    for first in range(0, classes, CLASSES):
        o_class = first + tl.arange(0, CLASSES)
        m_z = o_class < classes
        z = tl.load(p_row + o_class, m_z, -float("inf")).to(tl.float32)
        chunk_top = tl.max(z, 0)
        chunk_best = tl.min(tl.where(z == chunk_top, o_class, classes), 0)
        best = tl.where(chunk_top > top, chunk_best, best)
        new_top = tl.maximum(top, chunk_top)
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # nothing but -inf so far: a sum of 0, not NaN
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift), 0)
        top = new_top
    u = tl.exp(z_unknown - top) / total
    wrong = (best != y).to(tl.float32)
    ce, wrong, extra, slope = _coefficients(tl.log(total) - (z_y - top), u, wrong, y, w, classes)

    scale = (1 + extra + slope) / total
    for first in range(0, classes, CLASSES):
        o_class = first + tl.arange(0, CLASSES)
        m_z = o_class < classes
        z = tl.load(p_row + o_class, m_z, 0.0).to(tl.float32)
        grad = scale * tl.exp(z - top)
        grad = tl.where(o_class == y.to(tl.int32), grad - (1 + extra), grad)
        grad = tl.where(o_class == classes - 1, grad - slope, grad) * (1 / batch)
        tl.store(p_grad + row * classes + o_class, grad, m_z)
    if ONE_PROGRAM:
        _write_means(p_loss, p_statistics, ce * (1 + extra), (1 - u) * ce, u, wrong, batch)
    else:
        _write_sums(p_sums, ce * (1 + extra), (1 - u) * ce, u, wrong)


@triton.jit
def _write_sums(p_sums, loss, beta, u, wrong):
    programs = tl.num_programs(0)
    p_sums += tl.program_id(0)
    tl.store(p_sums, loss)
    tl.store(p_sums + programs, beta)
    tl.store(p_sums + 2 * programs, u)
    tl.store(p_sums + 3 * programs, wrong)


@triton.jit
def _write_means(p_loss, p_statistics, loss, beta, u, wrong, batch):
    tl.store(p_loss, loss / batch)
    tl.store(p_statistics, beta / batch)
    tl.store(p_statistics + 1, u / batch)
    tl.store(p_statistics + 2, wrong)


@triton.jit
def _means(p_sums, p_loss, p_statistics, programs, batch, PROGRAMS: tl.constexpr):
    """One program: adds up the (4, programs) sums."""
    o_sum = tl.arange(0, 4)[:, None]
    sums = tl.zeros([4, PROGRAMS], tl.float32)
    for first in range(0, programs, PROGRAMS):
        o_program = first + tl.arange(0, PROGRAMS)[None, :]
        sums += tl.load(p_sums + o_sum * programs + o_program, o_program < programs, 0.0)
    total = tl.sum(sums, 1)
    o_sum = tl.arange(0, 4)
    result = tl.where(o_sum == 3, total, total / batch)
    tl.store(p_loss + o_sum, result, o_sum == 0)
    tl.store(p_statistics + o_sum - 1, result, o_sum > 0)


# Up to so many numbers one program does it all: at most four rounds of loads, about what a second launch would cost.
_ONE_PROGRAM = 8192
# Numbers a program takes at a time: few, so that there are programs for every multiprocessor; more where it is alone.
_TILE, _ONE_PROGRAM_TILE = 1024, 2048
# Longest row that stays in registers, 16 numbers a thread (with 32, Triton 3.9 spills); chunk of a longer one.
_LONGEST_WHOLE, _CHUNK = 8192, 8192


def _launches(
    logits: Tensor, target: Tensor, w: Tensor, loss: Tensor, grad: Tensor, statistics: Tensor
) -> tuple[Launch, ...]:
    batch, classes = logits.shape
    padded = triton.next_power_of_2(classes)
    whole = classes <= _LONGEST_WHOLE
    alone = batch * padded <= _ONE_PROGRAM
    constants: dict[str, int]
    if whole:
        kernel = _whole_rows
        rows = min(max((_ONE_PROGRAM_TILE if alone else _TILE) // padded, 1), triton.next_power_of_2(batch))
        programs = 1 if alone else triton.cdiv(batch, rows)
        constants = {"ROWS": rows, "CLASSES": padded}
        # 8 numbers a thread; 4 where a warp has several rows, whose sums and maxima take registers too
        num_warps = min(max(rows * padded // (128 if padded < 128 else 256), 1), 16)
    else:
        # 8 numbers a thread, and as many bytes in flight as one program can have: B may be less than multiprocessors
        kernel, programs, constants, num_warps = _long_row, batch, {"CLASSES": _CHUNK}, 32
    sums = None if programs == 1 else loss.new_empty((4, programs))
    arguments = {
        "p_z": logits,
        "stride_row": logits.stride(0),
        "p_target": target,
        "stride_target": target.stride(0),
        "p_w": w,
        "p_grad": grad,
        "p_loss": loss,
        "p_statistics": statistics,
        "p_sums": sums,
        "batch": batch,
        "classes": classes,
        "ONE_PROGRAM": sums is None,
    }
    first = Launch(kernel, (programs,), arguments | constants, num_warps=num_warps)
    if sums is None:
        return (first,)
    arguments = {"p_sums": sums, "p_loss": loss, "p_statistics": statistics, "programs": programs, "batch": batch}
    return first, Launch(_means, (1,), arguments | {"PROGRAMS": 1024}, num_warps=8)


def unknown_aware_loss(
    logits: Tensor, target: Tensor, w: Tensor, loss: Tensor, grad: Tensor, statistics: Tensor
) -> None:
    """Write loss, gradient and statistics: one launch where everything is small, else two.

    Args:
        logits: (B, K+1) float32, float16 or bfloat16, rows contiguous but at any distance; B >= 1, K+1 >= 2.
        target: (B,) int64. Outside [0, K), loss, gradient of that row, the mean of (1 - u) ce and the number of errors
            become NaN: to raise an error, the host would have to wait for the device.
        w: 0-d floating point, on the device of the logits.
        loss: () float32, written.
        grad: (B, K+1) float32, contiguous, written.
        statistics: (3,) float32, written: batch means of (1 - u) ce and of u, number of errors.
    """
    for launch in _launches(logits, target, w, loss, grad, statistics):
        launch()


_SHAPES = (
    *((1, 2), (7, 2), (128, 11), (128, 16), (8, 1001), (1, 8192)),  # one program
    *((8193, 2), (4096, 11), (4096, 16), (600, 50), (1024, 101), (1024, 1001)),  # some rows a program
    *((130, 1600), (130, 4096), (130, 5001), (1024, 8192)),  # a row a program
    *((1, 8193), (1024, 10000), (128, 50001), (64, 50000)),  # in chunks
)


def variants() -> Variants:
    """Shapes that select each configuration, with rows that are and are not a multiple of 16 bytes."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for batch, classes in _SHAPES if dtype == torch.float32 else _SHAPES[::3]:
            logits, grad = torch.empty(batch, classes, dtype=dtype), torch.empty(batch, classes)
            target, w = torch.empty(batch, dtype=torch.int64), torch.empty(())
            for launch in _launches(logits, target, w, torch.empty(()), grad, torch.empty(3)):
                name = f"unknown_aware_loss {launch.kernel.__name__} {dtype} {batch} x {classes}"
                yield Variant(name, launch, matrix_unit=False)
