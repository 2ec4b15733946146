"""What the GPU runs of :mod:`sparse_moon.kernels.sparse_linear`, which says what is computed and launches it."""

import triton
import triton.language as tl

from sparse_moon.kernels.dot import dot
from sparse_moon.kernels.gelu import gelu, gelu_derivative


@triton.jit
def _at(p_x, o_token, o_feature, s_x, TRANSPOSED: tl.constexpr):
    """Pointers into x, held as (tokens, features) or as (features, tokens), with rows s_x apart."""
    if TRANSPOSED:
        return p_x + o_feature.to(tl.int64) * s_x + o_token
    else:
        return p_x + o_token.to(tl.int64) * s_x + o_feature


@triton.jit
def _half(acc, second: tl.constexpr, B_T: tl.constexpr, COLUMNS: tl.constexpr):
    """The first or second COLUMNS columns of acc (B_T, 2 * COLUMNS)."""
    halves = tl.split(tl.permute(tl.reshape(acc, (B_T, 2, COLUMNS)), (0, 2, 1)))
    return halves[second]


@triton.jit
def _store(
    acc, p_output, p_before, o_t, o_column, n_tokens, s_output, s_before,
    ACTIVATION: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """A product's tile to the output, as :func:`product_kernel` says."""
    m_t = (o_t < n_tokens)[:, None]
    if ACTIVATION is not None:
        p_tile = p_before + o_t[:, None] * s_before + o_column[None, :]
        if BACKWARD:
            acc *= gelu_derivative(tl.load(p_tile, m_t, 0.0), ACTIVATION)
        else:
            before = acc.to(p_before.dtype.element_ty)
            tl.store(p_tile, before, mask=m_t)
            acc = gelu(before, ACTIVATION)
    p_tile = p_output + o_t[:, None] * s_output + o_column[None, :]
    tl.store(p_tile, acc.to(p_output.dtype.element_ty), mask=m_t)


@triton.jit
def product_kernel(
    p_x, p_values, p_bias, p_output, p_before, p_ptr, p_other, p_place, n_tokens, n_rows, s_x, s_output, s_before,
    B_T: tl.constexpr, B_N: tl.constexpr, B_W: tl.constexpr, B_K: tl.constexpr, S_N: tl.constexpr, S_W: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, ACTIVATION: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Output (n_tokens, n_rows * B_N) from x: one tile (B_T, B_N) a program.

    With an ACTIVATION, of the product, which is written to p_before as well; BACKWARD, the product is a gradient and is
    multiplied with the derivative at what p_before holds.

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
    if ACTIVATION is None or B_N <= 32:
        _store(acc, p_output, p_before, o_t, o_column, n_tokens, s_output, s_before, ACTIVATION, BACKWARD)
    else:  # 32 columns at a time: all at once would take the registers of another program
        HALF: tl.constexpr = B_N // 2
        for part in tl.static_range(B_N // 32):
            columns, o_part = _half(acc, part * 64 // B_N, B_T, HALF), row * B_N + part * 32 + tl.arange(0, 32)
            if HALF > 32:
                columns = _half(columns, part % 2, B_T, 32)
            _store(columns, p_output, p_before, o_t, o_part, n_tokens, s_output, s_before, ACTIVATION, BACKWARD)


@triton.jit
def _row_of(p_ptr, group, n_rows, GROUP: tl.constexpr, SPARE: tl.constexpr, B_R: tl.constexpr):
    """The row that owns a group of entries, where row r owns the groups from p_ptr[r] // GROUP + r.

    Enough for its ceil(entries / GROUP) groups, so that a grid of n // GROUP + n_rows programs needs no count from
    the device; the last group of a row can be empty. Without SPARE a group is an entry, and none is empty. Counting
    the rows that start at or before the group is one load of the row pointer, where a search would be a chain of loads.
    """
    count = tl.zeros((), tl.int32)
    for start in range(0, n_rows, B_R):
        o_r = start + tl.arange(0, B_R)
        begin = tl.load(p_ptr + o_r, mask=o_r < n_rows, other=0) // GROUP + (o_r if SPARE else 0)
        count += tl.sum(((begin <= group) & (o_r < n_rows)).to(tl.int32), 0)
    return count - 1


@triton.jit
def values_grad_kernel(
    p_grad, p_x, p_output, p_bias, p_ptr, p_col, n_tokens, n_rows, n_entries, split_tokens, s_grad, s_x,
    B_H: tl.constexpr, B_W: tl.constexpr, GROUP: tl.constexpr, SPARE: tl.constexpr, B_T: tl.constexpr,
    ROWS: tl.constexpr, B_R: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output (splits, n_entries, B_H, B_W): GROUP entries of one row a program, over split_tokens tokens.

    And with SPARE groups, so that each row has one, p_bias (splits, n_rows * B_H): sums of grad over the same tokens.
    """
    group, split = tl.program_id(0), tl.program_id(1)
    row = _row_of(p_ptr, group, n_rows, GROUP, SPARE, B_R)
    first, last = tl.load(p_ptr + row), tl.load(p_ptr + row + 1)
    number = group - first // GROUP - row if SPARE else group - first
    first += number * GROUP
    o_m, o_h = tl.arange(0, GROUP * B_W), tl.arange(0, B_H)
    e = first + o_m // B_W
    m_e = e < last
    o_feature = tl.load(p_col + e, mask=m_e, other=0) * B_W + o_m % B_W
    begin = split * split_tokens
    has_work = first < last
    if p_bias is not None:
        has_work |= number == 0
    end = tl.where(has_work, tl.minimum(begin + split_tokens, n_tokens), begin)
    acc = tl.zeros((GROUP * B_W, B_H), tl.float32)
    sums = tl.zeros((ROWS, B_H), tl.float32)
    for t in range(begin, end, B_T):
        o_t = t + tl.arange(0, B_T)
        m_t = o_t < end
        # the transposed workspace is padded; a mask along its contiguous side would break its 16-byte loads
        m_x = m_e[:, None] if TRANSPOSED else m_e[:, None] & m_t[None, :]
        x = tl.load(_at(p_x, o_t[None, :], o_feature[:, None], s_x, TRANSPOSED), m_x, 0.0)
        grad = tl.load(_at(p_grad, o_t[:, None], (row * B_H + o_h)[None, :], s_grad, False), m_t[:, None], 0.0)
        acc = dot(x, grad, acc, PRECISION)
        if p_bias is not None:
            sums += tl.sum(tl.reshape(grad.to(tl.float32), (B_T // ROWS, ROWS, B_H)), 0)
    if p_bias is not None:
        p_sums = p_bias + (split * n_rows + row) * B_H + o_h
        tl.store(p_sums, tl.sum(sums, 0).to(p_bias.dtype.element_ty), mask=(o_h >= 0) & (number == 0))
    o_entry = (split.to(tl.int64) * n_entries + e) * (B_H * B_W) + o_m % B_W
    p_tile = p_output + o_entry[:, None] + o_h[None, :] * B_W
    tl.store(p_tile, acc.to(p_output.dtype.element_ty), mask=m_e[:, None])


@triton.jit
def transpose_kernel(p_x, p_output, n_tokens, n_features, s_x, s_output, B: tl.constexpr):
    """Output (n_features, s_output) = x (n_tokens, n_features) transposed, zeros past the last token."""
    tiles = tl.cdiv(n_features, B)
    o_f = tl.program_id(0) % tiles * B + tl.arange(0, B)
    o_t = (tl.program_id(0) // tiles).to(tl.int64) * B + tl.arange(0, B)
    m_f = o_f < n_features
    x = tl.load(p_x + o_t[:, None] * s_x + o_f[None, :], (o_t < n_tokens)[:, None] & m_f[None, :], 0.0)
    tl.store(p_output + o_f.to(tl.int64)[:, None] * s_output + o_t[None, :], tl.trans(x), mask=m_f[:, None])


@triton.jit
def vector_input_grad_kernel(
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
