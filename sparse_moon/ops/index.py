"""Index arithmetic: block-compressed rows of a matrix, compact values and dense weights.

A layer's weight is seen as a matrix ``(rows, cols)``. For a linear layer that is the weight itself; for a convolution
it is ``(O, C/bw, kh, kw, bw)`` flattened after the first dimension, with ``bw`` the block width, so that a block spans
neighbouring input channels at one kernel tap (with ``bw = 1`` this is the plain flattened weight).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Index = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""``(row_ptr, col, t_ptr, t_row, t_perm)`` as the operators take it; see :class:`sparse_moon.topology.Topology`."""


def block_shape(pattern: str | tuple[int, int]) -> tuple[int, int]:
    """Block shape of a pattern: ``"unstructured"`` is (1, 1), ``"vector8"`` (8, 1), ``"block32"`` (32, 32).

    Raises:
        ValueError: neither such a name nor a pair (1, 1), (V, 1) or (b, b) of positive integers.
    """
    if isinstance(pattern, str):
        kind = pattern.rstrip("0123456789")
        size = pattern[len(kind) :]
        if pattern == "unstructured":
            return (1, 1)
        if size and kind in ("vector", "block") and int(size) > 0:
            return (int(size), 1) if kind == "vector" else (int(size), int(size))
    elif len(pattern) == 2 and all(isinstance(n, int) and n > 0 for n in pattern) and pattern[1] in (1, pattern[0]):
        return (pattern[0], pattern[1])
    raise ValueError(f"pattern must be 'unstructured', 'vectorV', 'blockB', (V, 1) or (b, b), got {pattern!r}")


def block_grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Number of block rows and block columns of a matrix.

    Raises:
        ValueError: the block does not divide the shape.
    """
    if shape[0] % block[0] or shape[1] % block[1]:
        raise ValueError(f"block {block} does not divide a {shape[0]} x {shape[1]} matrix")
    return shape[0] // block[0], shape[1] // block[1]


def weight_to_matrix(weight: Tensor, block_width: int) -> Tensor:
    """Weight ``(O, I)`` or ``(O, C, kh, kw)`` as a matrix ``(O, cols)`` in topology order (see the module's head)."""
    if weight.dim() == 2 or block_width == 1:
        return weight.reshape(weight.shape[0], -1)
    out, channels, kh, kw = weight.shape
    if channels % block_width:
        raise ValueError(f"block width {block_width} does not divide {channels} input channels a group")
    split = weight.reshape(out, channels // block_width, block_width, kh, kw)
    return split.permute(0, 1, 3, 4, 2).reshape(out, -1)


def matrix_to_weight(matrix: Tensor, weight_shape: tuple[int, ...], block_width: int) -> Tensor:
    """Inverse of :func:`weight_to_matrix`."""
    if len(weight_shape) == 2 or block_width == 1:
        return matrix.reshape(weight_shape)
    out, channels, kh, kw = weight_shape
    split = matrix.reshape(out, channels // block_width, kh, kw, block_width)
    return split.permute(0, 1, 4, 2, 3).reshape(weight_shape)


def entry_rows(row_ptr: Tensor, count: int) -> Tensor:
    """Block row of each of ``count`` entries, int64, from the row pointer."""
    rows = torch.arange(row_ptr.numel() - 1, device=row_ptr.device)
    return torch.repeat_interleave(rows, row_ptr.diff().long(), output_size=count)


def entry_positions(row_ptr: Tensor, col: Tensor, grid_cols: int) -> Tensor:
    """Row-major position of each entry in the block grid, int64, ascending."""
    return entry_rows(row_ptr, col.numel()) * grid_cols + col.long()


def blocks_to_matrix(values: Tensor, positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Dense matrix ``(rows, cols)`` with ``values`` (n,) or (n, bh, bw) at grid ``positions`` and zeros elsewhere."""
    if values.dim() == 1:
        return values.new_zeros(grid[0] * grid[1]).index_put((positions,), values).view(grid)
    n, bh, bw = values.shape
    flat = values.new_zeros(grid[0] * grid[1], bh * bw).index_put((positions,), values.reshape(n, bh * bw))
    return flat.view(*grid, bh, bw).permute(0, 2, 1, 3).reshape(grid[0] * bh, grid[1] * bw)


def grid_view(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """Matrix ``(rows, cols)`` as ``(block rows, block cols, bh, bw)``, a view where strides allow."""
    bh, bw = block
    grid = block_grid((matrix.shape[0], matrix.shape[1]), block)
    return matrix.reshape(grid[0], bh, grid[1], bw).permute(0, 2, 1, 3)


def matrix_to_blocks(matrix: Tensor, positions: Tensor, block: tuple[int, int]) -> Tensor:
    """Entries of a dense matrix at grid ``positions``: (n,) for block (1, 1), else (n, bh, bw)."""
    if block == (1, 1):
        return matrix.reshape(-1)[positions]
    blocks = grid_view(matrix, block)
    return blocks[positions // blocks.shape[1], positions % blocks.shape[1]]


def pattern_name(block: tuple[int, int]) -> str:
    """Inverse of :func:`block_shape`."""
    if block == (1, 1):
        return "unstructured"
    return f"vector{block[0]}" if block[1] == 1 else f"block{block[0]}"


def matrix_shape(weight_shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the matrix that stands for a weight of this shape."""
    return weight_shape[0], math.prod(weight_shape[1:])


def block_of(values: Tensor) -> tuple[int, int]:
    """Block shape that compact values imply."""
    return (1, 1) if values.dim() == 1 else (values.shape[1], values.shape[2])


def values_shape(col: Tensor, block: Sequence[int]) -> tuple[int, ...]:
    """Shape of compact values for these entries and block."""
    return (col.numel(),) if tuple(block) == (1, 1) else (col.numel(), *block)


def check_values(values: Tensor) -> None:
    """Raise ``ValueError`` unless these are numbers (n,) or blocks (n, bh, bw)."""
    if values.dim() not in (1, 3) or min(block_of(values)) < 1:
        raise ValueError(f"values must have shape (n,) or (n, bh, bw), got {tuple(values.shape)}")


def check_block(block: Sequence[int]) -> None:
    """Raise ``ValueError`` unless this is a block shape."""
    if len(block) != 2 or min(block) < 1:
        raise ValueError(f"block must be two positive integers, got {list(block)}")


def check_entries(values: Tensor, col: Tensor) -> None:
    """Raise ``ValueError`` unless there is a value for each entry: no kernel trusts that both belong together."""
    if values.shape[0] != col.numel():
        raise ValueError(f"there are values of {values.shape[0]} entries for an index of {col.numel()}")
