"""The products of a block-sparse linear layer, ``y = x W^T + b``.

Shapes: x (N, I), W (O, I) of blocks (bh, bw), y (N, O), values (n, bh, bw); entry e is in block row r(e), column c(e)::

    y[t, r bh + i]  = b[r bh + i] + sum over e in row r, j    x[t, c(e) bw + j]  values[e, i, j]
    dx[t, c bw + j] =               sum over e in column c, i dy[t, r(e) bh + i] values[e, i, j]
    dvalues[e, i, j] =              sum over t                dy[t, r(e) bh + i] x[t, c(e) bw + j]

Tokens (or gathered columns of x) are the M side of every product and the block side is N, so that blocks of 16 fill the
matrix units too. Where blocks are narrower than a step of K, the columns of several entries are gathered into one step.

Vectors (V, 1) use single columns of x, 2 bytes out of every 32-byte sector. Their kernels read x transposed, (I, N),
where a column is contiguous; the transposition is one pass over x into a workspace.
"""

from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_moon.kernels.dot import dot
from sparse_moon.kernels.launch import Launch, Variant, Variants

BLOCKS = ((16, 16), (32, 32), (64, 64), (128, 128), (8, 1), (16, 1), (32, 1))
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Programs that fill the chip: one and a half for each of the 132 multiprocessors of an H100 or H200, two of which fit.
_ENOUGH_PROGRAMS = 200
# Tokens to which the workspace of a transposed operand is padded (with zeros): every tile of tokens divides it.
_PADDING = 128


@triton.jit
def _at(p_x, o_token, o_feature, s_x, TRANSPOSED: tl.constexpr):
    """Pointers into x, held as (tokens, features) or as (features, tokens), with rows s_x apart."""
    if TRANSPOSED:
        return p_x + o_feature.to(tl.int64) * s_x + o_token
    else:
        return p_x + o_token.to(tl.int64) * s_x + o_feature


@triton.jit
def _product_kernel(
    p_x, p_values, p_bias, p_output, p_ptr, p_other, p_place, n_tokens, n_rows, s_x, s_output,
    B_T: tl.constexpr, B_N: tl.constexpr, B_W: tl.constexpr, B_K: tl.constexpr, S_N: tl.constexpr, S_W: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output (n_tokens, n_rows * B_N) from x: one tile (B_T, B_N) a program.

    Row r's entries are [p_ptr[r], p_ptr[r + 1]); entry e multiplies the B_W features of x from p_other[e] * B_W with
    the block at place p_place[e] (e itself where None), whose element (w, n) lies at w * S_W + n * S_N.
    Programs that share tokens follow each other, so that their panel of x stays in the L2.
    """
    row, tile = tl.program_id(0) % n_rows, tl.program_id(0) // n_rows
    o_n, o_k = tl.arange(0, B_N), tl.arange(0, B_K)
    o_t = tile.to(tl.int64) * B_T + tl.arange(0, B_T)
    # tokens past the end: the workspace is padded; otherwise the last token once more, as its result is not stored
    o_read = o_t if TRANSPOSED else tl.minimum(o_t, n_tokens - 1)
    p_block = p_values + o_n[None, :] * S_N
    first, last = tl.load(p_ptr + row), tl.load(p_ptr + row + 1)
    acc = tl.zeros((B_T, B_N), tl.float32)
    # In both loops the indices of the next step are loaded a step ahead: the pipeline issues the tiles' loads early,
    # and would otherwise wait for their addresses in every step.
    if B_W >= B_K:
        STEPS: tl.constexpr = B_W // B_K  # a block
        other = tl.load(p_other + first, mask=first < last, other=0)
        place = first if p_place is None else tl.load(p_place + first, mask=first < last, other=0)
        for step in range((last - first) * STEPS):
            o_w = step % STEPS * B_K + o_k
            x = tl.load(_at(p_x, o_read[:, None], (other * B_W + o_w)[None, :], s_x, TRANSPOSED))
            w = tl.load(p_block + place.to(tl.int64) * (B_N * B_W) + o_w[:, None] * S_W)
            acc = dot(x, w, acc, PRECISION)
            e = first + (step + 1) // STEPS
            other = tl.load(p_other + e, mask=e < last, other=0)
            place = e if p_place is None else tl.load(p_place + e, mask=e < last, other=0)
    else:
        ENTRIES: tl.constexpr = B_K // B_W  # a step
        o_w = o_k % B_W
        e = first + o_k // B_W
        other = tl.load(p_other + e, mask=e < last, other=0)
        place = e if p_place is None else tl.load(p_place + e, mask=e < last, other=0)
        for step in range(tl.cdiv(last - first, ENTRIES)):
            m = first + step * ENTRIES + o_k // B_W < last
            x = tl.load(_at(p_x, o_read[:, None], (other * B_W + o_w)[None, :], s_x, TRANSPOSED), m[None, :], 0.0)
            p_w = p_block + (place.to(tl.int64) * (B_N * B_W) + o_w * S_W)[:, None]
            w = tl.load(p_w, m[:, None], 0.0)
            acc = dot(x, w, acc, PRECISION)
            e = first + (step + 1) * ENTRIES + o_k // B_W
            other = tl.load(p_other + e, mask=e < last, other=0)
            place = e if p_place is None else tl.load(p_place + e, mask=e < last, other=0)
    o_column = row * B_N + o_n
    if p_bias is not None:
        acc += tl.load(p_bias + o_column).to(tl.float32)[None, :]
    p_tile = p_output + o_t[:, None] * s_output + o_column[None, :]
    tl.store(p_tile, acc.to(p_output.dtype.element_ty), mask=(o_t < n_tokens)[:, None])


@triton.jit
def _row_of(p_ptr, group, n_rows, GROUP: tl.constexpr, B_R: tl.constexpr):
    """The row that owns a group of entries, where row r owns the groups from p_ptr[r] // GROUP + r.

    Enough for its ceil(entries / GROUP) groups, so that a grid of n // GROUP + n_rows programs needs no count from
    the device; the last group of a row can be empty. With GROUP = 1 a group is an entry and none is empty. Counting
    the rows that start at or before the group is one load of the row pointer, where a search would be a chain of loads.
    """
    count = tl.zeros((), tl.int32)
    for start in range(0, n_rows, B_R):
        o_r = start + tl.arange(0, B_R)
        begin = tl.load(p_ptr + o_r, mask=o_r < n_rows, other=0) // GROUP + (o_r if GROUP > 1 else 0)
        count += tl.sum(((begin <= group) & (o_r < n_rows)).to(tl.int32), 0)
    return count - 1


@triton.jit
def _values_grad_kernel(
    p_grad, p_x, p_output, p_ptr, p_col, n_tokens, n_rows, n_entries, split_tokens, s_grad, s_x,
    B_H: tl.constexpr, B_W: tl.constexpr, GROUP: tl.constexpr, B_T: tl.constexpr, B_R: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output (splits, n_entries, B_H, B_W): GROUP entries of one row a program, over split_tokens tokens."""
    group, split = tl.program_id(0), tl.program_id(1)
    row = _row_of(p_ptr, group, n_rows, GROUP, B_R)
    first, last = tl.load(p_ptr + row), tl.load(p_ptr + row + 1)
    if GROUP > 1:
        first += (group - first // GROUP - row) * GROUP
    else:
        first = group
    o_m, o_h = tl.arange(0, GROUP * B_W), tl.arange(0, B_H)
    e = first + o_m // B_W
    m_e = e < last
    o_feature = tl.load(p_col + e, mask=m_e, other=0) * B_W + o_m % B_W
    begin = split * split_tokens
    end = tl.where(first < last, tl.minimum(begin + split_tokens, n_tokens), begin)
    acc = tl.zeros((GROUP * B_W, B_H), tl.float32)
    for t in range(begin, end, B_T):
        o_t = t + tl.arange(0, B_T)
        m_t = o_t < end
        # the transposed workspace is padded; a mask along its contiguous side would break its 16-byte loads
        m_x = m_e[:, None] if TRANSPOSED else m_e[:, None] & m_t[None, :]
        x = tl.load(_at(p_x, o_t[None, :], o_feature[:, None], s_x, TRANSPOSED), m_x, 0.0)
        grad = tl.load(_at(p_grad, o_t[:, None], (row * B_H + o_h)[None, :], s_grad, False), m_t[:, None], 0.0)
        acc = dot(x, grad, acc, PRECISION)
    o_entry = (split.to(tl.int64) * n_entries + e) * (B_H * B_W) + o_m % B_W
    p_tile = p_output + o_entry[:, None] + o_h[None, :] * B_W
    tl.store(p_tile, acc.to(p_output.dtype.element_ty), mask=m_e[:, None])


@triton.jit
def _sum_splits_kernel(p_parts, p_output, numel, n_splits, B: tl.constexpr):
    """Output (numel,) = sum of parts (n_splits, numel) in their order."""
    o = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    p_part = p_parts + o
    acc = tl.zeros((B,), tl.float32)
    for _ in range(n_splits):
        acc += tl.load(p_part, mask=o < numel, other=0.0)
        p_part += numel
    tl.store(p_output + o, acc.to(p_output.dtype.element_ty), mask=o < numel)


@triton.jit
def _transpose_kernel(p_x, p_output, n_tokens, n_features, s_x, s_output, B: tl.constexpr):
    """Output (n_features, s_output) = x (n_tokens, n_features) transposed, zeros past the last token."""
    tiles = tl.cdiv(n_features, B)
    o_f = tl.program_id(0) % tiles * B + tl.arange(0, B)
    o_t = (tl.program_id(0) // tiles).to(tl.int64) * B + tl.arange(0, B)
    m_f = o_f < n_features
    x = tl.load(p_x + o_t[:, None] * s_x + o_f[None, :], (o_t < n_tokens)[:, None] & m_f[None, :], 0.0)
    tl.store(p_output + o_f.to(tl.int64)[:, None] * s_output + o_t[None, :], tl.trans(x), mask=m_f[:, None])


@triton.jit
def _vector_input_grad_kernel(
    p_grad, p_values, p_output, p_ptr, p_row, p_place, n_tokens, n_columns, s_grad, s_output,
    V: tl.constexpr, B_C: tl.constexpr, B_T: tl.constexpr,
):  # fmt: skip
    """Output (n_tokens, n_columns) from the transposed grad (O, s_grad), a tile (B_T, B_C) a program.

    Columns have different rows, so there is no tile product: a sum over each column's entries in fp32, the j-th entries
    of all columns at a time. Rows ascend in each, so neighbouring columns read nearly the same rows, from the L1.
    """
    tiles = tl.cdiv(n_columns, B_C)
    o_c = tl.program_id(0) % tiles * B_C + tl.arange(0, B_C)
    o_t = (tl.program_id(0) // tiles).to(tl.int64) * B_T + tl.arange(0, B_T)
    m_c = o_c < n_columns
    begin = tl.load(p_ptr + o_c, mask=m_c, other=0)
    count = tl.load(p_ptr + o_c + 1, mask=m_c, other=0) - begin
    acc = tl.zeros((B_C, B_T), tl.float32)
    for j in range(tl.max(count, 0)):
        m = j < count
        row = tl.load(p_row + begin + j, mask=m, other=0)
        place = tl.load(p_place + begin + j, mask=m, other=0)
        for v in tl.static_range(V):
            w = tl.load(p_values + place.to(tl.int64) * V + v, mask=m, other=0.0).to(tl.float32)
            p_tile = p_grad + (row * V + v).to(tl.int64)[:, None] * s_grad + o_t[None, :]
            acc += w[:, None] * tl.load(p_tile, mask=m[:, None], other=0.0).to(tl.float32)
    p_tile = p_output + o_t[None, :] * s_output + o_c[:, None]
    tl.store(p_tile, acc.to(p_output.dtype.element_ty), mask=m_c[:, None] & (o_t < n_tokens)[None, :])


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


def _values_grad_tile(block: tuple[int, int], dtype: torch.dtype, precision: str) -> _Tile:
    if precision == "ieee":
        return _Tile(16, 128, 8, 2) if block[1] == 128 else _Tile(16, 64, 4, 2)
    if block[1] == 1:
        return _Tile(64, 64, 4, 4)  # one wgmma of entries: a row's last group is half empty on average
    tokens = 64 if dtype != torch.float32 else 32
    if block[1] == 128:
        return _Tile(tokens, 128, 8, 3)  # as in the forward
    return _Tile(tokens, 128, 4, 4)  # 2 to 8 blocks of a row for each read of grad


def takes(block: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether there is a kernel for blocks of this shape and operands of this dtype."""
    return block in BLOCKS and dtype in DTYPES


def _precision(dtype: torch.dtype, allow_tf32: bool) -> str:
    return "tf32" if allow_tf32 or dtype != torch.float32 else "ieee"


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
    return output, Launch(_transpose_kernel, grid, arguments, num_warps=4, num_stages=1)


def _product(
    x: Tensor, s_x: int, values: Tensor, bias: Tensor | None, index: tuple[Tensor, Tensor, Tensor | None],
    output: Tensor, block: tuple[int, int], transpose: bool, precision: str,
) -> Launch:  # fmt: skip
    """``index``: pointer, other side and place of the entries of each row of the output's blocks."""
    (tokens, features), (bh, bw) = output.shape, block
    outputs, width = (bw, bh) if transpose else (bh, bw)
    n_rows = features // outputs
    tile = _product_tile(outputs, x.dtype, precision)
    arguments: dict[str, Any] = {
        "p_x": x, "p_values": values, "p_bias": bias, "p_output": output,
        "p_ptr": index[0], "p_other": index[1], "p_place": index[2],
        "n_tokens": tokens, "n_rows": n_rows, "s_x": s_x, "s_output": _row_stride("output", output),
        "B_T": tile.tokens, "B_N": outputs, "B_W": width, "B_K": tile.depth,
        "S_N": 1 if transpose else bw, "S_W": bw if transpose else 1,
        "TRANSPOSED": bw == 1, "PRECISION": precision,
    }  # fmt: skip
    grid = (n_rows * triton.cdiv(tokens, tile.tokens),)
    return Launch(_product_kernel, grid, arguments, tile.num_warps, tile.num_stages)


def _forward(
    input: Tensor, values: Tensor, bias: Tensor | None, row_ptr: Tensor, col: Tensor, output: Tensor, allow_tf32: bool
) -> list[Launch]:
    block, launches = _block(values), []
    x, s_x = input, _row_stride("input", input)
    if block[1] == 1:
        x, launch = _transposed("input", input)
        launches.append(launch)
        s_x = x.shape[1]
    index, precision = (row_ptr, col, None), _precision(input.dtype, allow_tf32)
    return [*launches, _product(x, s_x, values, bias, index, output, block, False, precision)]


def _input_grad(
    grad: Tensor, values: Tensor, t_ptr: Tensor, t_row: Tensor, t_perm: Tensor, output: Tensor, allow_tf32: bool
) -> list[Launch]:
    block = _block(values)
    if block[1] > 1:
        index, precision = (t_ptr, t_row, t_perm), _precision(grad.dtype, allow_tf32)
        return [_product(grad, _row_stride("grad", grad), values, None, index, output, block, True, precision)]
    (tokens, columns), (x, launch) = output.shape, _transposed("grad", grad)
    arguments = {
        "p_grad": x, "p_values": values, "p_output": output, "p_ptr": t_ptr, "p_row": t_row, "p_place": t_perm,
        "n_tokens": tokens, "n_columns": columns, "s_grad": x.shape[1], "s_output": _row_stride("output", output),
        "V": block[0], "B_C": 32, "B_T": 64,
    }  # fmt: skip
    grid = (triton.cdiv(columns, 32) * triton.cdiv(tokens, 64),)
    return [launch, Launch(_vector_input_grad_kernel, grid, arguments, num_warps=4, num_stages=1)]


def _splits(programs: int, tokens: int) -> int:
    """Into how many ranges of tokens the gradient of the values is split.

    As few as give every multiprocessor work, since each costs a pass over fp32 copies of the values, and none shorter
    than 256 tokens, which would be all start-up.
    """
    return max(1, min(triton.cdiv(_ENOUGH_PROGRAMS, max(programs, 1)), tokens // 256))


def _values_grad(
    grad: Tensor, input: Tensor, row_ptr: Tensor, col: Tensor, output: Tensor, allow_tf32: bool
) -> list[Launch]:
    (n, bh, bw), tokens, n_rows = (output.shape[0], *_block(output)), input.shape[0], row_ptr.numel() - 1
    precision, launches = _precision(input.dtype, allow_tf32), []
    x, s_x = input, _row_stride("input", input)
    if bw == 1:
        x, launch = _transposed("input", input)
        launches.append(launch)
        s_x = x.shape[1]
    tile = _values_grad_tile((bh, bw), input.dtype, precision)
    group = tile.depth // bw
    splits = _splits(n // group, tokens)
    parts = output if splits == 1 else output.new_empty((splits, n, bh, bw), dtype=torch.float32)
    arguments: dict[str, Any] = {
        "p_grad": grad, "p_x": x, "p_output": parts, "p_ptr": row_ptr, "p_col": col,
        "n_tokens": tokens, "n_rows": n_rows, "n_entries": n,
        "split_tokens": triton.cdiv(triton.cdiv(tokens, splits), tile.tokens) * tile.tokens,
        "s_grad": _row_stride("grad", grad), "s_x": s_x,
        "B_H": bh, "B_W": bw, "GROUP": group, "B_T": tile.tokens, "B_R": 1024,
        "TRANSPOSED": bw == 1, "PRECISION": precision,
    }  # fmt: skip
    grid = ((n // group + n_rows if group > 1 else n) if n else 0, splits)
    launches.append(Launch(_values_grad_kernel, grid, arguments, tile.num_warps, tile.num_stages))
    if splits > 1:
        arguments = {"p_parts": parts, "p_output": output, "numel": output.numel(), "n_splits": splits, "B": 1024}
        launches.append(Launch(_sum_splits_kernel, (triton.cdiv(output.numel(), 1024),), arguments, 4, 1))
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
) -> None:
    """Write ``input W^T + bias`` to ``output``.

    Args:
        input: (N, I), fp16, bf16 or fp32; rows may lie further apart than I.
        values: (n, bh, bw) of a block shape in ``BLOCKS``, contiguous, dtype of ``input``.
        bias: (O,) or None.
        row_ptr, col: the entries of each block row, int32; see :class:`sparse_moon.topology.Topology`.
        output: (N, O), dtype of ``input``.
        allow_tf32: whether products of fp32 operands may be rounded to TF32.

    Raises:
        ValueError: a block shape or dtype without a kernel, or an operand whose last dimension is not contiguous.
    """
    for launch in _forward(input, values, bias, row_ptr, col, output, allow_tf32):
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
) -> None:
    """Write ``grad W`` (N, I) to ``output``, from ``grad`` (N, O) and the transpose index; else as the forward.

    For vectors this is a reduction on the CUDA cores in fp32, whatever ``allow_tf32`` is.
    """
    for launch in _input_grad(grad, values, t_ptr, t_row, t_perm, output, allow_tf32):
        launch()


def sparse_linear_values_grad(
    grad: Tensor,
    input: Tensor,
    row_ptr: Tensor,
    col: Tensor,
    output: Tensor,
    *,
    allow_tf32: bool,
) -> None:
    """Write the existing blocks of ``grad^T input`` to ``output`` (n, bh, bw), ``grad`` (N, O) and ``input`` (N, I).

    Sums over tokens in an order that depends on the shapes alone: the same operands give the same bits.
    """
    for launch in _values_grad(grad, input, row_ptr, col, output, allow_tf32):
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
            *_values_grad(long[1], long[0], row_ptr, col, values, allow_tf32),
            *_values_grad(short[1], short[0], row_ptr, col, values, allow_tf32),
        ]
        for launch in launches:
            precision = launch.arguments.get("PRECISION")
            name = f"{launch.kernel.__name__} of {block} blocks, {dtype}, {precision}"
            yield Variant(name, launch, precision == "tf32")
