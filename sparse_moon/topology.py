"""Which weights exist: block-compressed rows of a matrix, and its transpose index; see :mod:`sparse_moon.ops.index`."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparse_moon.allocation import check_sparsity
from sparse_moon.ops.check_index import FAULTS, check_index
from sparse_moon.ops.index import (
    Index,
    block_grid,
    block_shape,
    blocks_to_matrix,
    entry_positions,
    grid_view,
    matrix_shape,
    matrix_to_blocks,
    matrix_to_weight,
    pattern_name,
    values_shape,
    weight_to_matrix,
)
from sparse_moon.ops.plan import Geometry, Plan, index_state, is_plain
from sparse_moon.ops.transpose_index import build_index, transpose_index

__all__ = [
    "Index",
    "Selection",
    "Topology",
    "block_grid",
    "block_shape",
    "blocks_of",
    "build_index",
    "entry_positions",
    "matrix_shape",
    "matrix_to_weight",
    "pattern_name",
    "topology_of",
    "weight_to_matrix",
]


Selection = Literal["random", "magnitude", "constant_fan_in"]

_MOST_BLOCKS = 2**31 - 1


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
        fingerprint: of the set of entries (see :mod:`sparse_moon.ops.check_index`); None without memory.
        past: fingerprints that it had before it moved to this one.
        moves: how often any topology of this process has moved.
        left: fingerprints that any of them had before it moved.
    """

    moves: ClassVar[int] = 0
    left: ClassVar[set[int]] = set()

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
        if positions.numel() > _MOST_BLOCKS or max(self.grid) >= _MOST_BLOCKS:
            raise ValueError(
                f"indices have 32 bits: at most {_MOST_BLOCKS} blocks, got {positions.numel()} of {self.grid}"
            )
        row_ptr, col, t_ptr, t_row, t_perm = build_index(positions, self.grid)
        self.register_buffer("row_ptr", row_ptr)
        self.register_buffer("col", col)
        self.register_buffer("t_ptr", t_ptr, persistent=False)
        self.register_buffer("t_row", t_row, persistent=False)
        self.register_buffer("t_perm", t_perm, persistent=False)
        self.past: set[int] = set()
        self._adopt()

    def _adopt(self) -> None:
        """Take the present index for the right one; what other code makes of it is found by :meth:`check`."""
        self._note(self.index)
        self.fingerprint = None if self.col.device.type == "meta" else check_index(self.index)[1]
        self._broadcast = False

    def _note(self, index: Index) -> None:
        """Take note of the index as it is now."""
        self._index, self._state = index, index_state(index)

    def check(self, *, broadcast: bool = False) -> Index:
        """Look at the index where it was written to since the last look; every product asks for that.

        Averaging of a model's buffers, copying into them, ``to_empty``: what does not come in through
        ``load_state_dict`` or a training method leaves values and index that do not belong together, or an index that
        is none.

        Args:
            broadcast: other entries are taken over where they are an index: those of rank 0, which
                DistributedDataParallel sends with the values when it is built, and again before each forward pass.

        Returns:
            The index tensors; the same tuple as long as nothing writes to them.

        Raises:
            RuntimeError: the index is not the one that this topology was given.
        """
        index = self.index
        if torch.compiler.is_compiling():
            return index  # operators look for themselves when they are called by the dispatcher
        seen = self._index
        if (
            seen[0] is index[0]
            and seen[1] is index[1]
            and seen[2] is index[2]
            and seen[3] is index[3]
            and seen[4] is index[4]
            and self._state == index_state(index)
        ):
            return seen
        if not is_plain(index[1]):
            return index
        ddp = DistributedDataParallel._get_active_ddp_module()
        in_parallel = ddp is not None and any(module is self for module in ddp.modules())
        # where a look waits for the device, one is enough for what comes from rank 0 before each forward pass
        if not (in_parallel and self._broadcast and self.col.is_cuda):
            self._check_now(index, adopt=(in_parallel and not self._broadcast) or broadcast)
            self._broadcast |= in_parallel
        self._note(index)
        return index

    def _check_now(self, index: Index, *, adopt: bool) -> None:
        fault, fingerprint = check_index(index)
        if not fault and adopt:
            self.fingerprint = fingerprint
        elif not fault and fingerprint != self.fingerprint:
            fault = "it lists other entries"
        if fault:
            raise RuntimeError(
                f"the index of a sparse layer ({self.shape[0]} x {self.shape[1]}) was changed by other code, so that "
                f"its values have lost their places: {fault}. Average models with sm.EMA or sm.WeightAverage; write "
                "into a model with load_state_dict, also after to_empty and after loading in place"
            )

    def plan(self, geometry: Geometry | None = None) -> Plan:
        """What operators take: the index, checked, and the convolution where it is one."""
        index = self.check()
        geometry = None if geometry is None else Geometry.of(*geometry)
        return Plan(index, self.block, geometry, index_state(index) if is_plain(index[1]) else None)

    @classmethod
    def random(
        cls,
        shape: tuple[int, int],
        density: float,
        block: tuple[int, int] = (1, 1),
        *,
        constant_fan_in: bool = False,
    ) -> "Topology":
        """Exactly :func:`blocks_of` this density, drawn without replacement by torch's default CPU generator."""
        grid = block_grid(shape, block)
        count = blocks_of(density, grid, constant_fan_in=constant_fan_in)
        if constant_fan_in:
            fan_in = count // max(grid[0], 1)
            drawn = torch.rand(grid, device="cpu").argsort(1)[:, :fan_in].sort(1).values
            return cls((drawn + torch.arange(grid[0], device="cpu")[:, None] * grid[1]).flatten(), shape, block)
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
        """The :func:`blocks_of` this density with the largest sum of ``scores`` (rows, cols), first on ties."""
        per_block = _sum(grid_view(scores, block), (2, 3))
        count = blocks_of(density, (per_block.shape[0], per_block.shape[1]))
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
        return values_shape(self.col, self.block)

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
        return magnitudes if self.block == (1, 1) else _sum(grid_view(magnitudes, self.block), (2, 3))

    def value_scores(self, values: Tensor) -> Tensor:
        """Sum of ``|values|`` in every existing block: (n,)."""
        return values.abs() if self.block == (1, 1) else _sum(values.abs(), (1, 2))

    def replace_(self, index: Index) -> None:
        """Take over new indices; with the same number of blocks in place."""
        if index[1].numel() == self.num_blocks:
            for old, new in zip(self.index, index, strict=True):
                old.copy_(new)
        else:
            self.row_ptr, self.col, self.t_ptr, self.t_row, self.t_perm = index
        before = self.fingerprint
        self._adopt()
        if before is not None and before != self.fingerprint:
            self.past.add(before)
            Topology.left.add(before)
            Topology.moves += 1

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        Topology.left |= self.past

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
        if row_ptr is not None and col is not None:
            problem = self.problem(row_ptr, col, prefix)
            if problem:
                error_msgs.append(problem)
                return
        elif row_ptr is not None or col is not None:
            error_msgs.append(f"topology at {prefix.rstrip('.')!r}: row_ptr and col must come together")
            return
        with torch.inference_mode(False):  # whose tensors no training could use
            if col is not None and col.shape != self.col.shape:  # another topology of the same matrix
                self.col = torch.empty(col.shape, dtype=torch.int32, device=self.col.device)
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            if col is not None:
                self._own_index(copy=bool(local_metadata.get("assign_to_params_buffers")))
                self._adopt()
                self.past = set()

    def _own_index(self, *, copy: bool) -> None:
        """Make the index of what was loaded: int32 tensors that belong to no other model, with their transpose."""
        row_ptr, col = (t.detach().to(torch.int32, copy=copy or t.is_inference()) for t in (self.row_ptr, self.col))
        self.row_ptr, self.col = row_ptr, col
        self.t_ptr, self.t_row, self.t_perm = transpose_index(row_ptr, col, self.grid[1])

    def problem(self, row_ptr: Tensor, col: Tensor, prefix: str) -> str | None:
        """What is wrong with foreign indices, or None."""
        if row_ptr.shape != self.row_ptr.shape:
            shapes = f"{tuple(row_ptr.shape)} in the checkpoint, {tuple(self.row_ptr.shape)} here"
            return f"size mismatch for {prefix}row_ptr: {shapes}"
        fault = ""
        if any(t.dim() != 1 or t.is_floating_point() or t.is_complex() for t in (row_ptr, col)):
            fault = f"indices must be integers with one dimension, got {row_ptr.dtype} and {col.dtype}"
        elif row_ptr.device.type != "meta" and col.device.type != "meta":
            if row_ptr[0] != 0 or row_ptr[-1] != col.numel() or (row_ptr.diff() < 0).any():
                fault = FAULTS[1]
            elif col.numel() and (col.min() < 0 or col.max() >= self.grid[1]):
                fault = f"columns outside [0, {self.grid[1]})"
            elif (entry_positions(row_ptr, col, self.grid[1]).diff() <= 0).any():
                fault = FAULTS[2]
        return f"topology at {prefix.rstrip('.')!r} is damaged: {fault}" if fault else None

    def extra_repr(self) -> str:
        return f"{self.shape[0]} x {self.shape[1]}, block={self.block}, sparsity={self.sparsity:.4f}"


def blocks_of(density: float, grid: tuple[int, int], *, constant_fan_in: bool = False) -> int:
    """How many blocks of a grid a density stands for: ``round(density * blocks)``.

    Args:
        constant_fan_in: the same number in every block row, ``round(density * block cols)``, at least 1 unless the
            density is 0.
    """
    rows, cols = grid
    if constant_fan_in:
        return rows * max(round(density * cols), int(density > 0.0))
    return round(density * rows * cols)


def topology_of(
    weight: Tensor, mask: Tensor | None, sparsity: float | None, block: tuple[int, int], selection: str
) -> Topology:
    """Topology of a dense weight: of its mask, or of a share of it chosen at random or by magnitude."""
    if (mask is None) == (sparsity is None):
        raise ValueError("give either a mask or a sparsity")
    if mask is not None:
        if mask.shape != weight.shape:
            raise ValueError(f"mask must have the weight's shape {tuple(weight.shape)}, got {tuple(mask.shape)}")
        return Topology.from_mask(weight_to_matrix(mask, block[1]), block)
    sparsity = cast(float, sparsity)
    check_sparsity(sparsity)
    if selection in ("random", "constant_fan_in"):
        fan_in = selection == "constant_fan_in"
        return Topology.random(matrix_shape(tuple(weight.shape)), 1.0 - sparsity, block, constant_fan_in=fan_in)
    if selection == "magnitude":
        return Topology.from_scores(weight_to_matrix(weight.detach().abs(), block[1]), 1.0 - sparsity, block)
    raise ValueError(f"selection must be one of {get_args(Selection)}, got {selection!r}")


def _sum(tensor: Tensor, dims: tuple[int, int]) -> Tensor:
    """Over these dimensions, of 16-bit numbers in float32: else blocks would tie that are not alike."""
    return tensor.sum(dims, dtype=torch.float32 if tensor.dtype in (torch.bfloat16, torch.float16) else None)
