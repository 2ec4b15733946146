"""Which weights exist: block-compressed rows of a matrix, and its transpose index.

A layer's weight is seen as a matrix ``(rows, cols)``. For a linear layer that is the weight itself; for a convolution
it is ``(O, C/bw, kh, kw, bw)`` flattened after the first dimension, with ``bw`` the block width, so that a block spans
neighbouring input channels at one kernel tap (with ``bw = 1`` this is the plain flattened weight).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Index = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""``(row_ptr, col, t_ptr, t_row, t_perm)`` as the operators take it; see :class:`Topology`."""


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


def build_index(positions: Tensor, grid: tuple[int, int]) -> Index:
    """All index tensors (int32) of ascending int64 grid ``positions``."""
    row = torch.div(positions, grid[1], rounding_mode="floor")
    row_ptr = positions.new_zeros(grid[0] + 1)
    row_ptr[1:] = torch.bincount(row, minlength=grid[0]).cumsum(0)
    col = positions - row * grid[1]
    row_ptr, col = row_ptr.int(), col.int()
    return row_ptr, col, *torch.ops.sparse_moon.transpose_index(row_ptr, col, grid[1])


class Topology(nn.Module):
    """The set of non-zero blocks of a matrix, held as int32 buffers.

    int32 throughout, because neither NCCL nor gloo can broadcast int16 buffers (DistributedDataParallel does).

    Attributes:
        shape: ``(rows, cols)`` of the dense matrix, in elements.
        block: block shape ``(bh, bw)``; (1, 1) is unstructured, (V, 1) a vector along the rows (output channels).
        row_ptr: (rows / bh + 1,) start of each block row among the entries.
        col: (n,) block column of each entry, ascending within a row.
        t_ptr, t_row, t_perm: the transpose index: start of each block column, and for each entry in column order its
            block row and its place among the row-ordered entries. Not part of ``state_dict``: rebuilt on load.
        probe: None, or in a batch that ends with a topology update a leaf of this shape whose gradient is to be the
            dense weight gradient (see :class:`sparse_moon.algorithms.RigL`).
        transform: None, or what layers of this topology apply to their values before each product (see
            :class:`sparse_moon.random_mask.RandomMask`). Here, because layers that share values share it.
    """

    row_ptr: Tensor
    col: Tensor
    t_ptr: Tensor
    t_row: Tensor
    t_perm: Tensor

    def __init__(self, positions: Tensor, shape: tuple[int, int], block: tuple[int, int] = (1, 1)) -> None:
        """``positions``: row-major places of the existing blocks in the block grid, int64, unique and ascending."""
        super().__init__()
        self.shape = shape
        self.block = block
        self.grid = block_grid(shape, block)
        self.probe: Tensor | None = None
        self.transform: Callable[[Tensor], Tensor] | None = None
        row_ptr, col, t_ptr, t_row, t_perm = build_index(positions, self.grid)
        self.register_buffer("row_ptr", row_ptr)
        self.register_buffer("col", col)
        self.register_buffer("t_ptr", t_ptr, persistent=False)
        self.register_buffer("t_row", t_row, persistent=False)
        self.register_buffer("t_perm", t_perm, persistent=False)

    @classmethod
    def random(
        cls,
        shape: tuple[int, int],
        density: float,
        block: tuple[int, int] = (1, 1),
        *,
        constant_fan_in: bool = False,
    ) -> "Topology":
        """Exactly ``round(density * blocks)`` blocks drawn without replacement by torch's default CPU generator.

        Args:
            constant_fan_in: the same number in every block row, ``round(density * block cols)``, at least 1 unless the
                density is 0.
        """
        grid = block_grid(shape, block)
        if constant_fan_in:
            fan_in = max(round(density * grid[1]), int(density > 0.0))
            drawn = torch.rand(grid, device="cpu").argsort(1)[:, :fan_in].sort(1).values
            return cls((drawn + torch.arange(grid[0], device="cpu")[:, None] * grid[1]).flatten(), shape, block)
        count = round(density * grid[0] * grid[1])
        return cls(torch.randperm(grid[0] * grid[1], device="cpu")[:count].sort().values, shape, block)

    @classmethod
    def from_mask(cls, mask: Tensor, block: tuple[int, int] = (1, 1)) -> "Topology":
        """From a bool mask ``(rows, cols)``, True = kept.

        Raises:
            ValueError: not a 2-d bool mask, or one that keeps only a part of some block.
        """
        if mask.dtype != torch.bool or mask.dim() != 2:
            raise ValueError(f"mask must be bool with 2 dimensions, got {mask.dtype} with shape {tuple(mask.shape)}")
        blocks = grid_view(mask, block).flatten(2)
        kept = blocks.all(2)
        if not torch.equal(kept, blocks.any(2)):
            raise ValueError(f"mask does not consist of whole {block} blocks")
        return cls(kept.flatten().nonzero().flatten(), (mask.shape[0], mask.shape[1]), block)

    @classmethod
    def from_scores(cls, scores: Tensor, density: float, block: tuple[int, int] = (1, 1)) -> "Topology":
        """The ``round(density * blocks)`` blocks with the largest sum of ``scores`` (rows, cols), first on ties."""
        per_block = grid_view(scores, block).sum((2, 3))
        count = round(density * per_block.numel())
        best = per_block.flatten().sort(descending=True, stable=True).indices[:count]
        return cls(best.sort().values, (scores.shape[0], scores.shape[1]), block)

    @property
    def index(self) -> Index:
        """The five index tensors, in the order in which the operators take them."""
        buffers: Any = self._buffers  # in every product: five attributes of a module take ten times as long
        return buffers["row_ptr"], buffers["col"], buffers["t_ptr"], buffers["t_row"], buffers["t_perm"]

    @property
    def num_blocks(self) -> int:
        """Number of existing blocks."""
        return self.col.numel()

    @property
    def nnz(self) -> int:
        """Number of existing weights."""
        return self.num_blocks * self.block[0] * self.block[1]

    @property
    def numel(self) -> int:
        """Number of weights of the dense matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """Share of weights that do not exist."""
        return 1.0 - self.nnz / max(self.numel, 1)

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of the compact values: (n,) for block (1, 1), else (n, bh, bw)."""
        return (self.num_blocks,) if self.block == (1, 1) else (self.num_blocks, *self.block)

    def positions(self) -> Tensor:
        """Row-major place of each existing block in the block grid, int64, ascending."""
        return entry_positions(self.row_ptr, self.col, self.grid[1])

    def mask(self) -> Tensor:
        """Bool ``(rows, cols)``, True = exists."""
        ones = torch.ones(self.values_shape, dtype=torch.bool, device=self.col.device)
        return self.to_dense(ones)

    def to_dense(self, values: Tensor) -> Tensor:
        """Dense matrix ``(rows, cols)`` of compact ``values``; differentiable."""
        return blocks_to_matrix(values, self.positions(), self.grid)

    def gather(self, matrix: Tensor) -> Tensor:
        """Compact values of a dense matrix ``(rows, cols)``; differentiable."""
        return matrix_to_blocks(matrix, self.positions(), self.block)

    def block_scores(self, matrix: Tensor, *, overwrite: bool = False) -> Tensor:
        """Sum of ``|matrix|`` in every block, existing or not: ``(rows, cols)`` to ``(rows / bh, cols / bw)``.

        With ``overwrite`` the matrix may be lost, which saves memory of its size.
        """
        magnitudes = matrix.abs_() if overwrite else matrix.abs()
        return magnitudes if self.block == (1, 1) else grid_view(magnitudes, self.block).sum((2, 3))

    def value_scores(self, values: Tensor) -> Tensor:
        """Sum of ``|values|`` in every existing block: (n,)."""
        return values.abs() if self.block == (1, 1) else values.abs().sum((1, 2))

    def replace_(self, index: Index) -> None:
        """Take over new indices; with the same number of blocks in place."""
        if index[1].numel() == self.num_blocks:
            for old, new in zip(self.index, index, strict=True):
                old.copy_(new)
        else:
            self.row_ptr, self.col, self.t_ptr, self.t_row, self.t_perm = index

    def same_as(self, other: "Topology") -> bool:
        """Whether both describe the same set of blocks (waits for the device)."""
        return torch.equal(self.row_ptr, other.row_ptr) and torch.equal(self.col, other.col)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        row_ptr, col = state_dict.get(prefix + "row_ptr"), state_dict.get(prefix + "col")
        if row_ptr is not None and row_ptr.shape != self.row_ptr.shape:
            shapes = f"{tuple(row_ptr.shape)} in the checkpoint, {tuple(self.row_ptr.shape)} here"
            error_msgs.append(f"size mismatch for {prefix}row_ptr: {shapes}")
            return
        if row_ptr is not None and col is not None:
            problem = self._problem(row_ptr, col)
            if problem:
                error_msgs.append(f"topology at {prefix.rstrip('.')!r} is damaged: {problem}")
                return
            if col.shape != self.col.shape:  # another topology of the same matrix
                self.col = self.col.new_empty(col.shape)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if row_ptr is not None and col is not None:
            transposed = torch.ops.sparse_moon.transpose_index(self.row_ptr, self.col, self.grid[1])
            self.t_ptr, self.t_row, self.t_perm = transposed

    def _problem(self, row_ptr: Tensor, col: Tensor) -> str | None:
        """What is wrong with foreign indices, or None."""
        counts = row_ptr.diff()
        if row_ptr[0] != 0 or row_ptr[-1] != col.numel() or (counts < 0).any():
            return "row pointers do not ascend from 0 to the number of entries"
        if col.numel() and (col.min() < 0 or col.max() >= self.grid[1]):
            return f"columns outside [0, {self.grid[1]})"
        if (entry_positions(row_ptr, col, self.grid[1]).diff() <= 0).any():
            return "columns do not ascend within their row"
        return None

    def extra_repr(self) -> str:
        return f"{self.shape[0]} x {self.shape[1]}, block={self.block}, sparsity={self.sparsity:.4f}"


def pattern_name(block: tuple[int, int]) -> str:
    """Inverse of :func:`block_shape`."""
    if block == (1, 1):
        return "unstructured"
    return f"vector{block[0]}" if block[1] == 1 else f"block{block[0]}"


def matrix_shape(weight_shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the matrix that stands for a weight of this shape."""
    return weight_shape[0], math.prod(weight_shape[1:])
