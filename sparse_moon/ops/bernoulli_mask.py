"""``bernoulli_mask``: a random mask that is a function of counters, so that it need not be stored.

Random bits come from Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): element ``i``
of tensor number ``stream`` at step ``t`` is word ``i % 4`` of the block with counter
``(i // 4, stream, t mod 2^32, t >> 32)`` and key ``(seed mod 2^32, seed >> 32)``. The same counters give the same
bits on every device.
"""

import torch
from torch import Tensor

from sparse_moon.ops.choice import cuda_or
from sparse_moon.ops.native import current_stream, native, require_cuda
from sparse_moon.ops.registry import define, implement

_WORD = 0xFFFFFFFF


def philox(size: int, seed: int, stream: int, step: Tensor) -> Tensor:
    """``size`` random 32-bit words as int64 in [0, 2^32), on the device of ``step`` (0-d int64)."""
    blocks = torch.arange((size + 3) // 4, device=step.device)
    c0, c1 = blocks, torch.full_like(blocks, stream)
    c2, c3 = (step & _WORD).expand_as(blocks), (step >> 32 & _WORD).expand_as(blocks)
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        # a 32 x 32 bit product fills 64 bits: int64 wraps, and the masks read its halves right all the same
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = p1 >> 32 & _WORD ^ c1 ^ k0, p1 & _WORD, p0 >> 32 & _WORD ^ c3 ^ k1, p0 & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return torch.stack([c0, c1, c2, c3], 1).flatten()[:size]


def bernoulli_mask_reference(like: Tensor, keep: float, seed: int, stream: int, step: Tensor) -> Tensor:
    """The specification: keep where the random word lies below ``keep * 2^32``."""
    words = philox(like.numel(), seed, stream, step.to(like.device))
    return (words < mask_threshold(keep)).view(like.shape)


def mask_threshold(keep: float) -> int:
    """Words below it keep their element."""
    return round(keep * 2**32)


def random_scores_reference(size: int, seed: int, stream: int, step: Tensor) -> Tensor:
    """The specification: the random words, rounded to float32."""
    return philox(size, seed, stream, step).float()


def _fake(like: Tensor, keep: float, seed: int, stream: int, step: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=torch.bool, device=like.device)


define("bernoulli_mask(Tensor like, float keep, int seed, int stream, Tensor step) -> Tensor",
       bernoulli_mask_reference, _fake)  # fmt: skip


def _fake_scores(size: int, seed: int, stream: int, step: Tensor) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=step.device)


define("random_scores(int size, int seed, int stream, Tensor step) -> Tensor", random_scores_reference, _fake_scores)


def _cpu(like: Tensor, keep: float, seed: int, stream: int, step: Tensor) -> Tensor:
    assert native is not None
    mask = _fake(like, keep, seed, stream, step)
    native.bernoulli_mask(seed, stream, step.item(), mask_threshold(keep), mask.numel(), mask.data_ptr())
    return mask


def _cpu_scores(size: int, seed: int, stream: int, step: Tensor) -> Tensor:
    assert native is not None
    scores = _fake_scores(size, seed, stream, step)
    native.random_scores(seed, stream, step.item(), size, scores.data_ptr())
    return scores


if native is not None:
    implement("bernoulli_mask", "cpu", _cpu)
    implement("random_scores", "cpu", _cpu_scores)


def _cuda(like: Tensor, keep: float, seed: int, stream: int, step: Tensor) -> Tensor:
    mask, step = _fake(like, keep, seed, stream, step), step.to(like.device)
    with torch.cuda.device(like.device):
        require_cuda().bernoulli_mask(
            seed, stream, step.data_ptr(), mask_threshold(keep), mask.numel(), mask.data_ptr(), current_stream()
        )
    return mask


def _cuda_scores(size: int, seed: int, stream: int, step: Tensor) -> Tensor:
    scores = _fake_scores(size, seed, stream, step)
    with torch.cuda.device(step.device):
        require_cuda().random_scores(seed, stream, step.data_ptr(), size, scores.data_ptr(), current_stream())
    return scores


implement("bernoulli_mask", "cuda", cuda_or(bernoulli_mask_reference, _cuda))
implement("random_scores", "cuda", cuda_or(random_scores_reference, _cuda_scores))


def bernoulli_mask(like: Tensor, keep: float, *, seed: int, stream: int, step: Tensor) -> Tensor:
    """Random bool mask of the shape and device of ``like``, each element True with probability ``keep``.

    Args:
        like: gives shape and device; its numbers are not read.
        keep: keep probability in [0, 1].
        seed: 64-bit key; ``stream``: which tensor, in [0, 2^32); ``step``: 0-d int64 tensor, which draw.

    Raises:
        ValueError: a probability, stream or step outside its range.
    """
    if not 0.0 <= keep <= 1.0:
        raise ValueError(f"keep must be in [0, 1], got {keep}")
    check_counters(stream, step)
    return torch.ops.sparse_moon.bernoulli_mask(like, keep, seed, stream, step)


def random_scores(size: int, *, seed: int, stream: int, step: Tensor) -> Tensor:
    """``size`` random float32 scores in [0, 2^32], on the device of ``step``: the random words, rounded.

    Args:
        size: how many, at least 0.
        seed: 64-bit key; ``stream``: which tensor, in [0, 2^32); ``step``: 0-d int64 tensor, which draw.

    Raises:
        ValueError: a size, stream or step outside its range.
    """
    if size < 0:
        raise ValueError(f"size must be at least 0, got {size}")
    check_counters(stream, step)
    return torch.ops.sparse_moon.random_scores(size, seed, stream, step)


def check_counters(stream: int, step: Tensor) -> None:
    """Raise ``ValueError`` for counters that do not address a random block."""
    if not 0 <= stream < 2**32:
        raise ValueError(f"stream must be in [0, 2^32), got {stream}")
    if step.dim() != 0 or step.dtype != torch.int64:
        raise ValueError(f"step must be a 0-d int64 tensor, got {step.dtype} with shape {tuple(step.shape)}")
