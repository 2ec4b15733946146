"""``average_``: the running mean of many tensors in place, optionally of randomly masked ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_moon.ops.bernoulli_mask import bernoulli_mask_reference, check_counters, mask_threshold
from sparse_moon.ops.choice import cuda_or
from sparse_moon.ops.native import current_stream, native, require_cuda
from sparse_moon.ops.registry import define, implement


def average_reference_(
    averages: Sequence[Tensor], values: Sequence[Tensor], count: Tensor, keep: float, seed: int, step: Tensor
) -> None:
    """The specification: ``avg <- (n avg + Z v) / (n + 1)`` for each pair."""
    for stream, (average, value) in enumerate(zip(averages, values, strict=True)):
        _average_one_(average, value, count, keep, seed, stream, step)


def _average_one_(
    average: Tensor, value: Tensor, count: Tensor, keep: float, seed: int, stream: int, step: Tensor
) -> None:
    if keep < 1.0:
        value = value * bernoulli_mask_reference(value, keep, seed, stream, step)
    # n / (n + 1) avg + v / (n + 1), so that a large count cannot overflow
    weight = 1.0 / (count.to(average.device, torch.float64) + 1.0)
    average.lerp_(value.to(average.dtype), weight.to(average.dtype))


def _fake(
    averages: Sequence[Tensor], values: Sequence[Tensor], count: Tensor, keep: float, seed: int, step: Tensor
) -> None:
    return None


define("average_(Tensor(a!)[] averages, Tensor[] values, Tensor count, float keep, int seed, Tensor step) -> ()",
       average_reference_, _fake)  # fmt: skip


def _kernel_tasks(
    averages: Sequence[Tensor], values: Sequence[Tensor], count: Tensor, keep: float, seed: int, step: Tensor
) -> dict[torch.dtype, list[tuple[int, int, int, int]]]:
    """What kernels take, by dtype: addresses of average and value, length, stream. Other pairs are averaged at once.

    A launch is on one device, that of the first average.
    """
    tasks: dict[torch.dtype, list[tuple[int, int, int, int]]] = {torch.float32: [], torch.float64: []}
    for stream, (average, value) in enumerate(zip(averages, values, strict=True)):
        alike = average.dtype == value.dtype and average.shape == value.shape
        alike = alike and average.device == value.device == averages[0].device
        if alike and average.is_contiguous() and value.is_contiguous() and average.dtype in tasks:
            tasks[average.dtype].append((average.data_ptr(), value.data_ptr(), average.numel(), stream))
        else:
            _average_one_(average, value, count, keep, seed, stream, step)
    return tasks


def _cpu(
    averages: Sequence[Tensor], values: Sequence[Tensor], count: Tensor, keep: float, seed: int, step: Tensor
) -> None:
    assert native is not None
    kernels = {torch.float32: native.average_float32, torch.float64: native.average_float64}
    tasks = _kernel_tasks(averages, values, count, keep, seed, step)
    weight = 1.0 / (count.item() + 1.0)
    for dtype, kernel in kernels.items():
        kernel(tasks[dtype], weight, mask_threshold(keep), seed, step.item(), torch.get_num_threads())
    torch.autograd.graph.increment_version(averages)  # written behind torch's back


if native is not None:
    implement("average_", "cpu", _cpu)


def _cuda(
    averages: Sequence[Tensor], values: Sequence[Tensor], count: Tensor, keep: float, seed: int, step: Tensor
) -> None:
    """One launch for up to 96 pairs of contiguous float32 tensors, and as many for float64; others one by one."""
    kernels = {torch.float32: require_cuda().average_float32, torch.float64: require_cuda().average_float64}
    tasks = _kernel_tasks(averages, values, count, keep, seed, step)
    device = averages[0].device
    count, step = count.to(device), step.to(device)
    with torch.cuda.device(device):
        for dtype, kernel in kernels.items():
            kernel(tasks[dtype], mask_threshold(keep), seed, count.data_ptr(), step.data_ptr(), current_stream())
    torch.autograd.graph.increment_version(averages)  # written behind torch's back


implement("average_", "cuda", cuda_or(average_reference_, _cuda))


def average_(
    averages: Sequence[Tensor],
    values: Sequence[Tensor],
    count: Tensor,
    *,
    keep: float = 1.0,
    seed: int = 0,
    step: Tensor | None = None,
) -> None:
    """``avg <- (n avg + Z v) / (n + 1)`` in place for every pair of tensors.

    Weight & mask averaging (CigL, Algorithm 1); with ``Z = 1`` the uniform average that MOON calls voting.

    Args:
        averages: floating point tensors, updated in place.
        values: tensors of the same shapes.
        count: 0-d int64 tensor ``n``, how many values each average holds already; not changed here.
        keep: keep probability of the mask ``Z`` of tensor number ``stream = 0, 1, ...``; 1 means no mask.
        seed: key of the mask; ``step``: 0-d int64 tensor, which draw (needed where ``keep < 1``); both as in
            :func:`sparse_moon.ops.bernoulli_mask`.

    Raises:
        ValueError: lengths or shapes that differ, ``keep`` outside [0, 1], or a missing step.
    """
    if [a.shape for a in averages] != [v.shape for v in values]:
        raise ValueError("averages and values must have the same shapes, tensor by tensor")
    if not 0.0 <= keep <= 1.0:
        raise ValueError(f"keep must be in [0, 1], got {keep}")
    if count.dim() != 0 or count.dtype != torch.int64:
        raise ValueError(f"count must be a 0-d int64 tensor, got {count.dtype} with shape {tuple(count.shape)}")
    if step is None:
        if keep < 1.0:
            raise ValueError("keep < 1 needs a step, so that each draw differs")
        step = count
    check_counters(0, step)
    if averages:
        with torch.no_grad():
            torch.ops.sparse_moon.average_(list(averages), [v.detach() for v in values], count, keep, seed, step)
