"""The CUDA kernels of the small operators: outputs and workspaces here, launches in C++.

Arguments are those of the operators of the same names (``sparse_moon::drop_and_grow`` and so on), on one GPU. Indices,
masks and random scores have the bits of the CPU kernels, and the averages too where the CPU kernel is built for x86-64.
Nothing here waits for the GPU as long as ``count`` and ``step`` lie there, so calls can be captured in a CUDA graph.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_moon.ops.average_ import kernel_tasks
from sparse_moon.ops.bernoulli_mask import mask_threshold
from sparse_moon.ops.drop_and_grow import drop_and_grow_reference
from sparse_moon.ops.native import current_stream, require_cuda
from sparse_moon.ops.transpose_index import transpose_index_reference

Layer = tuple[Tensor, Tensor, Tensor, Tensor, int, int]
"""``(drop_score, grow_score, row_ptr, col, drop, grow)`` of one layer."""

Updated = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""``(row_ptr, col, t_ptr, t_row, t_perm, source)`` of one layer after the update."""

_MOST_POSITIONS = 2**31 - 1
_EXACT_IN_FLOAT32 = {torch.float32, torch.float16, torch.bfloat16}


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def transpose_index(row_ptr: Tensor, col: Tensor, grid_cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(t_ptr, t_row, t_perm)`` of int32 rows; see :class:`sparse_moon.topology.Topology`."""
    if not 0 < (row_ptr.numel() - 1) * grid_cols <= _MOST_POSITIONS:
        return transpose_index_reference(row_ptr, col, grid_cols)
    row_ptr, col = row_ptr.contiguous(), col.contiguous()
    outputs = col.new_empty(grid_cols + 1), torch.empty_like(col), torch.empty_like(col)
    matrices = [(_addresses([row_ptr, col, *outputs]), (row_ptr.numel() - 1, grid_cols))]
    with torch.cuda.device(col.device):
        size = require_cuda().transpose_index_workspace(matrices)
        workspace = torch.empty(size, dtype=torch.uint8, device=col.device)
        require_cuda().transpose_index(matrices, workspace.data_ptr(), current_stream())
    return outputs


def drop_and_grow(
    drop_score: Tensor, grow_score: Tensor, row_ptr: Tensor, col: Tensor, drop: int, grow: int
) -> Updated:
    """One layer of :func:`drop_and_grow_layers`."""
    return drop_and_grow_layers([(drop_score, grow_score, row_ptr, col, drop, grow)])[0]


def drop_and_grow_layers(layers: Sequence[Layer]) -> list[Updated]:
    """Update all layers at once: about a dozen launches for up to 36 of them.

    Float64 scores, an empty grid and one of 2^31 positions or more take the reference path, layer by layer.

    Args:
        layers: ``drop_score`` (n,), ``grow_score`` (R, C), int32 ``row_ptr`` (R + 1,) and ``col`` (n,), ``drop`` in
            [0, n] and ``grow`` in [0, R C - n + drop]; all on one GPU.

    Raises:
        ValueError: a count outside its range.
    """
    for _, grow_score, _, col, drop, grow in layers:
        n, positions = col.numel(), grow_score.numel()
        if not 0 <= drop <= n or not 0 <= grow <= positions - n + drop:
            raise ValueError(f"expected to drop 0 to {n} of {positions} and to grow into what is left, "
                             f"got {drop} and {grow}")  # fmt: skip
    inputs = [_as_kernel_takes(layer) if _fits_kernel(layer) else None for layer in layers]
    results = [drop_and_grow_reference(*layer) if ours is None else _empty(ours)
               for layer, ours in zip(layers, inputs, strict=True)]  # fmt: skip
    batch = [
        (_addresses([*layer[:4], *result]), (*layer[1].shape, layer[3].numel(), *layer[4:]))
        for layer, result in zip(inputs, results, strict=True)
        if layer is not None
    ]
    if batch:
        device = results[0][0].device
        with torch.cuda.device(device):
            workspace = torch.empty(require_cuda().drop_and_grow_workspace(batch), dtype=torch.uint8, device=device)
            require_cuda().drop_and_grow(batch, workspace.data_ptr(), current_stream())
    return results


def _fits_kernel(layer: Layer) -> bool:
    drop_score, grow_score = layer[:2]
    return {drop_score.dtype, grow_score.dtype} <= _EXACT_IN_FLOAT32 and 0 < grow_score.numel() <= _MOST_POSITIONS


def _as_kernel_takes(layer: Layer) -> Layer:
    drop_score, grow_score, row_ptr, col, drop, grow = layer
    if grow:  # not read otherwise
        grow_score = grow_score.float().contiguous()
    return drop_score.float().contiguous(), grow_score, row_ptr.contiguous(), col.contiguous(), drop, grow


def _empty(layer: Layer) -> Updated:
    _, grow_score, row_ptr, col, drop, grow = layer
    t_ptr = row_ptr.new_empty(grow_score.shape[1] + 1)
    new_col, t_row, t_perm, source = (col.new_empty(col.numel() - drop + grow) for _ in range(4))
    return torch.empty_like(row_ptr), new_col, t_ptr, t_row, t_perm, source


def bernoulli_mask(like: Tensor, keep: float, seed: int, stream: int, step: Tensor) -> Tensor:
    """Random bool mask of the shape of ``like``."""
    mask, step = torch.empty(like.shape, dtype=torch.bool, device=like.device), step.to(like.device)
    with torch.cuda.device(like.device):
        require_cuda().bernoulli_mask(
            seed, stream, step.data_ptr(), mask_threshold(keep), mask.numel(), mask.data_ptr(), current_stream()
        )
    return mask


def random_scores(size: int, seed: int, stream: int, step: Tensor) -> Tensor:
    """(size,) random float32 scores on the device of ``step``."""
    scores = torch.empty(size, dtype=torch.float32, device=step.device)
    with torch.cuda.device(step.device):
        require_cuda().random_scores(seed, stream, step.data_ptr(), size, scores.data_ptr(), current_stream())
    return scores


def average_(
    averages: Sequence[Tensor], values: Sequence[Tensor], count: Tensor, keep: float, seed: int, step: Tensor
) -> None:
    """``avg <- avg + (Z v - avg) / (n + 1)`` in place for every pair, all on one GPU.

    One launch for up to 96 pairs of contiguous float32 tensors, and as many for float64; others one by one.
    """
    kernels = {torch.float32: require_cuda().average_float32, torch.float64: require_cuda().average_float64}
    tasks = kernel_tasks(averages, values, count, keep, seed, step)
    device = averages[0].device
    count, step = count.to(device), step.to(device)
    with torch.cuda.device(device):
        for dtype, kernel in kernels.items():
            kernel(tasks[dtype], mask_threshold(keep), seed, count.data_ptr(), step.data_ptr(), current_stream())
    torch.autograd.graph.increment_version(averages)  # written behind torch's back
