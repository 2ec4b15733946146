"""The products of a block-sparse linear layer, ``y = x W^T + b``.

Shapes: x (N, I), W (O, I) of blocks (bh, bw), y (N, O), values (n, bh, bw); entry e is in block row r(e), column c(e)::

    y[t, r bh + i]  = b[r bh + i] + sum over e in row r, j    x[t, c(e) bw + j]  values[e, i, j]
    dx[t, c bw + j] =               sum over e in column c, i dy[t, r(e) bh + i] values[e, i, j]
    dvalues[e, i, j] =              sum over t                dy[t, r(e) bh + i] x[t, c(e) bw + j]
    db[i] =                         sum over t                dy[t, i]

Tokens (or gathered columns of x) are the M side of every product and the block side is N, so that blocks of 16 fill the
matrix units too. Where blocks are narrower than a step of K, the columns of several entries are gathered into one step.

Vectors (V, 1) use single columns of x, 2 bytes out of every 32-byte sector. Their kernels read x transposed, (I, N),
where a column is contiguous; the transposition is one pass over x into a workspace.
"""

from itertools import product
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sparse_moon.kernels.dot import precision_of
from sparse_moon.kernels.launch import Launch, Variant, Variants
from sparse_moon.kernels.sparse_linear_kernels import (
    product_kernel,
    transpose_kernel,
    values_grad_kernel,
    vector_input_grad_kernel,
)
from sparse_moon.kernels.sum_splits import sum_splits

BLOCKS = ((16, 16), (32, 32), (64, 64), (128, 128), (8, 1), (16, 1), (32, 1))
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ACTIVATIONS = ("gelu", "gelu_tanh")

# Programs that fill the chip: one and a half for each of the 132 multiprocessors of an H100 or H200, two of which fit.
_ENOUGH_PROGRAMS = 200
# Tokens to which the workspace of a transposed operand is padded (with zeros): every tile of tokens divides it.
_PADDING = 128


class Activated(NamedTuple):
    """GELU where a product ends: the output is its activation, an input gradient is that of what was activated.

    Attributes:
        before: (N, O) of the forward pass, written; (N, I) of the input gradient, read: what is activated, in the dtype
            of the operands.
        activation: ``"gelu"`` or ``"gelu_tanh"``, see :mod:`sparse_moon.kernels.gelu`.
    """

    before: Tensor
    activation: str


class _Tile(NamedTuple):
    """How a product is cut up."""

    tokens: int
    """Of an output tile; in the gradient of the values, of a step."""
    depth: int
    """Of a step; in the gradient of the values, columns of x in an output tile."""
    num_warps: int
    num_stages: int


def _product_tile(outputs: int, dtype: torch.dtype, precision: str) -> _Tile:
    if precision == "ieee":
        return _Tile(64, 16, 4, 3)  # plain FMA keeps its operands in registers: larger tiles spill
    depth = 64 if dtype != torch.float32 else 32  # 128 bytes: one row of swizzled shared memory
    if outputs == 128:
        return _Tile(128, depth, 8, 3)  # 64 accumulators a thread, 96 KB of stages: two programs a multiprocessor
    return _Tile(128, depth, 4, 3)  # 51 to 72 KB of stages: three or four programs, which hide each other's start


def _values_grad_tile(block: tuple[int, int], dtype: torch.dtype, precision: str, sums: bool) -> _Tile:
    if precision == "ieee":
        return _Tile(16, 128, 8, 2) if block[1] == 128 else _Tile(16, 64, 4, 2)
    if block[1] == 1:
        return _Tile(64, 64, 4, 4)  # one wgmma of entries: a row's last group is half empty on average
    tokens = 64 if dtype != torch.float32 else 32
    if block[1] == 128:
        # as in the forward; with sums of grad shorter steps, so that the registers still hold two programs
        return _Tile(tokens // 2, 128, 8, 4) if sums else _Tile(tokens, 128, 8, 3)
    return _Tile(tokens, 128, 4, 4)  # 2 to 8 blocks of a row for each read of grad


def takes(block: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether there is a kernel for blocks of this shape and operands of this dtype."""
    return block in BLOCKS and dtype in DTYPES


def _block(values: Tensor) -> tuple[int, int]:
    block = (values.shape[1], values.shape[2]) if values.dim() == 3 else (1, 1)
    if not takes(block, values.dtype):
        raise ValueError(f"block must be one of {BLOCKS} and dtype one of {DTYPES}, got {block}, {values.dtype}")
    return block


def _row_stride(name: str, x: Tensor) -> int:
    if x.dim() != 2 or (x.stride(1) != 1 and x.shape[1] > 1):
        raise ValueError(f"{name} must have 2 dimensions, the last contiguous, got {tuple(x.shape)}, {x.stride()}")
    return x.stride(0)


def _transposed(name: str, x: Tensor) -> tuple[Tensor, Launch]:
    """A workspace (features, tokens padded) and the launch that fills it."""
    tokens, features = x.shape
    output = x.new_empty(features, triton.cdiv(tokens, _PADDING) * _PADDING)
    arguments = {
        "p_x": x, "p_output": output, "n_tokens": tokens, "n_features": features,
        "s_x": _row_stride(name, x), "s_output": output.shape[1], "B": 64,
    }  # fmt: skip
    grid = (triton.cdiv(features, 64) * (output.shape[1] // 64),)
    return output, Launch(transpose_kernel, grid, arguments, num_warps=4, num_stages=1)


def _product(
    x: Tensor, s_x: int, values: Tensor, bias: Tensor | None, index: tuple[Tensor, Tensor, Tensor | None],
    output: Tensor, block: tuple[int, int], transpose: bool, precision: str, activated: Activated | None,
) -> Launch:  # fmt: skip
    """``index``: pointer, other side and place of the entries of each row of the output's blocks."""
    (tokens, features), (bh, bw) = output.shape, block
    outputs, width = (bw, bh) if transpose else (bh, bw)
    n_rows = features // outputs
    tile = _product_tile(outputs, x.dtype, precision)
    arguments: dict[str, Any] = {
        "p_x": x, "p_values": values, "p_bias": bias, "p_output": output,
        "p_before": activated.before if activated else None,
        "p_ptr": index[0], "p_other": index[1], "p_place": index[2],
        "n_tokens": tokens, "n_rows": n_rows, "s_x": s_x, "s_output": _row_stride("output", output),
        "s_before": _row_stride("before", activated.before) if activated else 0,
        "B_T": tile.tokens, "B_N": outputs, "B_W": width, "B_K": tile.depth,
        "S_N": 1 if transpose else bw, "S_W": bw if transpose else 1,
        "TRANSPOSED": bw == 1, "PRECISION": precision,
        "ACTIVATION": activated.activation if activated else None, "BACKWARD": transpose,
    }  # fmt: skip
    grid = (n_rows * triton.cdiv(tokens, tile.tokens),)
    return Launch(product_kernel, grid, arguments, tile.num_warps, tile.num_stages)


def _forward(
    input: Tensor, values: Tensor, bias: Tensor | None, row_ptr: Tensor, col: Tensor, output: Tensor, allow_tf32: bool,
    activated: Activated | None = None,
) -> list[Launch]:  # fmt: skip
    block, launches = _block(values), []
    x, s_x = input, _row_stride("input", input)
    if block[1] == 1:
        x, launch = _transposed("input", input)
        launches.append(launch)
        s_x = x.shape[1]
    index, precision = (row_ptr, col, None), precision_of(input.dtype, allow_tf32)
    return [*launches, _product(x, s_x, values, bias, index, output, block, False, precision, activated)]


def _input_grad(
    grad: Tensor, values: Tensor, t_ptr: Tensor, t_row: Tensor, t_perm: Tensor, output: Tensor, allow_tf32: bool,
    activated: Activated | None = None,
) -> list[Launch]:  # fmt: skip
    block = _block(values)
    if block[1] > 1:
        index, precision = (t_ptr, t_row, t_perm), precision_of(grad.dtype, allow_tf32)
        s_grad = _row_stride("grad", grad)
        return [_product(grad, s_grad, values, None, index, output, block, True, precision, activated)]
    if activated:
        raise ValueError("the input gradient of vectors has no activation")
    (tokens, columns), (x, launch) = output.shape, _transposed("grad", grad)
    arguments = {
        "p_grad": x, "p_values": values, "p_output": output, "p_ptr": t_ptr, "p_row": t_row, "p_place": t_perm,
        "n_tokens": tokens, "n_columns": columns, "s_grad": x.shape[1], "s_output": _row_stride("output", output),
        "V": block[0], "B_C": 32, "B_T": 64,
    }  # fmt: skip
    grid = (triton.cdiv(columns, 32) * triton.cdiv(tokens, 64),)
    return [launch, Launch(vector_input_grad_kernel, grid, arguments, num_warps=4, num_stages=1)]


def _splits(programs: int, tokens: int) -> int:
    """Into how many ranges of tokens the gradient of the values is split.

    As few as give every multiprocessor work, since each costs a pass over fp32 copies of the values, and none shorter
    than 256 tokens, which would be all start-up.
    """
    return max(1, min(triton.cdiv(_ENOUGH_PROGRAMS, max(programs, 1)), tokens // 256))


def values_grad_launches(
    grad: Tensor, input: Tensor, row_ptr: Tensor, col: Tensor, output: Tensor, allow_tf32: bool,
    bias_grad: Tensor | None = None,
) -> list[Launch]:  # fmt: skip
    """What :func:`sparse_linear_values_grad` launches, in order."""
    (n, bh, bw), tokens, n_rows = (output.shape[0], *_block(output)), input.shape[0], row_ptr.numel() - 1
    precision, launches = precision_of(input.dtype, allow_tf32), []
    x, s_x = input, _row_stride("input", input)
    if bw == 1:
        x, launch = _transposed("input", input)
        launches.append(launch)
        s_x = x.shape[1]
    tile = _values_grad_tile((bh, bw), input.dtype, precision, bias_grad is not None)
    group = tile.depth // bw
    splits = _splits(n // group, tokens)
    # of grad that one load of the program's threads takes, 16 bytes each: those above each other are in one thread
    rows = min(tile.num_warps * 32 * 16 // grad.element_size() // bh, tile.tokens)
    parts, bias_parts, spare = output, bias_grad, group > 1 or bias_grad is not None
    if splits > 1:
        parts = output.new_empty((splits, n, bh, bw), dtype=torch.float32)
        if bias_grad is not None:
            bias_parts = output.new_empty((splits, n_rows * bh), dtype=torch.float32)
    arguments: dict[str, Any] = {
        "p_grad": grad, "p_x": x, "p_output": parts, "p_bias": bias_parts, "p_ptr": row_ptr, "p_col": col,
        "n_tokens": tokens, "n_rows": n_rows, "n_entries": n,
        "split_tokens": triton.cdiv(triton.cdiv(tokens, splits), tile.tokens) * tile.tokens,
        "s_grad": _row_stride("grad", grad), "s_x": s_x,
        "B_H": bh, "B_W": bw, "GROUP": group, "SPARE": spare, "B_T": tile.tokens, "ROWS": rows, "B_R": 1024,
        "TRANSPOSED": bw == 1, "PRECISION": precision,
    }  # fmt: skip
    programs = n // group + n_rows if spare else n
    grid = (programs if n or bias_grad is not None else 0, splits)
    launches.append(Launch(values_grad_kernel, grid, arguments, tile.num_warps, tile.num_stages))
    if splits > 1:
        launches.append(sum_splits(parts, output, 1024, num_warps=4))
        if bias_grad is not None and bias_parts is not None:
            launches.append(sum_splits(bias_parts, bias_grad, 128, num_warps=4))
    return launches


def sparse_linear(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    row_ptr: Tensor,
    col: Tensor,
    output: Tensor,
    *,
    allow_tf32: bool,
    activated: Activated | None = None,
) -> None:
    """Write ``input W^T + bias``, or its activation, to ``output``.

    Args:
        input: (N, I), fp16, bf16 or fp32; rows may lie further apart than I.
        values: (n, bh, bw) of a block shape in ``BLOCKS``, contiguous, dtype of ``input``.
        bias: (O,) or None.
        row_ptr, col: the entries of each block row, int32; see :class:`sparse_moon.topology.Topology`.
        output: (N, O), dtype of ``input``.
        allow_tf32: whether products of fp32 operands may be rounded to TF32.
        activated: GELU of the rounded sum, which is kept.

    Raises:
        ValueError: a block shape or dtype without a kernel, or an operand whose last dimension is not contiguous.
    """
    for launch in _forward(input, values, bias, row_ptr, col, output, allow_tf32, activated):
        launch()


def sparse_linear_input_grad(
    grad: Tensor,
    values: Tensor,
    t_ptr: Tensor,
    t_row: Tensor,
    t_perm: Tensor,
    output: Tensor,
    *,
    allow_tf32: bool,
    activated: Activated | None = None,
) -> None:
    """Write ``grad W`` (N, I) to ``output``, from ``grad`` (N, O) and the transpose index; else as the forward.

    With ``activated`` it is multiplied with the derivative. For vectors, which have no such thing, this is a reduction
    on the CUDA cores in fp32, whatever ``allow_tf32`` is.
    """
    for launch in _input_grad(grad, values, t_ptr, t_row, t_perm, output, allow_tf32, activated):
        launch()


def sparse_linear_values_grad(
    grad: Tensor,
    input: Tensor,
    row_ptr: Tensor,
    col: Tensor,
    output: Tensor,
    *,
    allow_tf32: bool,
    bias_grad: Tensor | None = None,
) -> None:
    """Write the existing blocks of ``grad^T input`` to ``output`` (n, bh, bw), ``grad`` (N, O) and ``input`` (N, I).

    Sums over tokens in an order that depends on the shapes alone: the same operands give the same bits. ``bias_grad``
    (O,), contiguous, gets the sum of ``grad`` over the tokens, which the tiles have in registers.
    """
    for launch in values_grad_launches(grad, input, row_ptr, col, output, allow_tf32, bias_grad):
        launch()


def variants() -> Variants:
    """Every configuration, on operands without memory; the values gradient both in one pass and split."""

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows, columns, n = 16, 16, 64
    row_ptr, col, t_ptr = empty(rows + 1), empty(n), empty(columns + 1)
    for block, dtype, allow_tf32 in product(BLOCKS, DTYPES, (False, True)):
        if allow_tf32 and dtype != torch.float32:
            continue
        # fp16 differs from bf16 in the types of its instructions alone: one block for each path through the kernels
        if dtype == torch.float16 and block not in ((16, 16), (64, 64), (8, 1)):
            continue
        values, bias = empty(n, *block, dtype=dtype), empty(rows * block[0], dtype=dtype)
        long, short = ((empty(tokens, columns * block[1], dtype=dtype), empty(tokens, rows * block[0], dtype=dtype))
                       for tokens in (4096, 128))  # fmt: skip
        launches = [
            *_forward(long[0], values, bias, row_ptr, col, long[1], allow_tf32),
            *_input_grad(long[1], values, t_ptr, col, col, long[0], allow_tf32),
            *values_grad_launches(long[1], long[0], row_ptr, col, values, allow_tf32),
            *values_grad_launches(short[1], short[0], row_ptr, col, values, allow_tf32, bias),
        ]
        if dtype != torch.float16:
            launches += values_grad_launches(long[1], long[0], row_ptr, col, values, allow_tf32, bias)
        for activation in ACTIVATIONS if dtype != torch.float16 else ():
            after, before = (Activated(end, activation) for end in (long[1], long[0]))
            launches += _forward(long[0], values, bias, row_ptr, col, long[1], allow_tf32, after)
            if block[1] > 1:
                launches += _input_grad(long[1], values, t_ptr, col, col, long[0], allow_tf32, before)
        for launch in launches:
            precision = launch.arguments.get("PRECISION")
            ends = [launch.arguments.get("ACTIVATION"), "sums" if launch.arguments.get("p_bias") is not None else None]
            name = f"{launch.kernel.__name__} of {block} blocks, {dtype}, {precision}, {ends}"
            yield Variant(name, launch, precision == "tf32")
