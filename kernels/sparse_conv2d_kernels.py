"""What the GPU runs of :mod:`sparse_moon.kernels.sparse_conv2d`, which says what is computed and launches it."""

import triton
import triton.language as tl

from sparse_moon.kernels.dot import dot


@triton.jit
def _divide(a, b):
    """a // b of numbers that are not negative: without a sign it takes half the instructions."""
    return (a.to(tl.uint32) // tl.full((), b, tl.uint32)).to(tl.int32)


@triton.jit
def _output_place(m, line, m_m, out_width, pitch, BW: tl.constexpr):
    """Place of positions m in the output, and which exist there: rows of vectors' positions are padded to the pitch."""
    if BW == 1:
        ow = m - line * pitch
        m, m_m = line * out_width + ow, m_m & (ow < out_width)
    return m.to(tl.int64), m_m


@triton.jit
def _reciprocal(d):
    """What :func:`_times` multiplies and shifts by to divide by d >= 1, in a third of a division's instructions."""
    d, shift = tl.full((), d, tl.int32), tl.full((), 31, tl.int64)  # Triton passes a 1 as a number of Python's
    for bit in tl.static_range(31):
        shift += (d > (1 << bit)).to(tl.int64)
    one = tl.full((), 1, tl.int64)
    return (((one << shift) + d - 1) // d).to(tl.uint32), shift.to(tl.uint64)


@triton.jit
def _times(a, multiplier, shift):
    """a // d of int32 a >= 0, exactly, from the :func:`_reciprocal` of d."""
    return ((a.to(tl.uint32).to(tl.uint64) * multiplier.to(tl.uint64)) >> shift).to(tl.int32)


@triton.jit
def _input_place(
    row, ow, n, channels, height, width, out_height, pitch, stride_h, stride_w, padding_h, padding_w, BW: tl.constexpr
):
    """Of output positions, each column ow of line row of image n: offset of its first tap in the input, and that tap's
    row and column."""
    h = (row - n * out_height) * stride_h
    if BW == 1:
        return (n * height + h) * pitch + ow, h, ow
    else:
        h, w = h - padding_h, ow * stride_w - padding_w
        return ((n * height + h) * width + w).to(tl.int64) * channels, h, w


@triton.jit
def _taps_on_plane(h, w, m_m, height, width, dilation_h, dilation_w, KH: tl.constexpr, KW: tl.constexpr):
    """Bit i: whether row h + i d is on the plane; bit 16 + j: whether column w + j d is. None where not m_m."""
    bits = tl.zeros_like(h)
    for i in tl.static_range(KH):
        y = h + i * dilation_h
        bits |= ((y >= 0) & (y < height)).to(tl.int32) << i
    for j in tl.static_range(KW):
        x = w + j * dilation_w
        bits |= ((x >= 0) & (x < width)).to(tl.int32) << (16 + j)
    return tl.where(m_m, bits, 0)


@triton.jit
def _taps_on_output(
    h, w, m_m, out_height, out_width, dilation_h, dilation_w,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
):  # fmt: skip
    """Bit i: whether (h - i d) / s is a row of the output; bit 16 + j: whether (w - j d) / s is a column of it."""
    bits = tl.zeros_like(h)
    for i in tl.static_range(KH):
        y = h - i * dilation_h
        bits |= ((y >= 0) & (y % STRIDE_H == 0) & (y // STRIDE_H < out_height)).to(tl.int32) << i
    for j in tl.static_range(KW):
        x = w - j * dilation_w
        bits |= ((x >= 0) & (x % STRIDE_W == 0) & (x // STRIDE_W < out_width)).to(tl.int32) << (16 + j)
    return tl.where(m_m, bits, 0)


@triton.jit
def _bits_of(i, j, m_k):
    """Those of :func:`_taps_on_plane` that row i and column j of the taps need; one that is never set where not m_k."""
    one = tl.full((), 1, tl.int32)
    return tl.where(m_k, (one << i) | (one << (16 + j)), one << 31)


@triton.jit
def _offset(
    column, channel, channels, images, height, width, pitch, dilation_h, dilation_w,
    KH: tl.constexpr, KW: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Offset of columns k of the matrix from the first tap, whose block starts at ``channel`` (k), and row and column
    of their taps."""
    tap = column % (KH * KW)
    channel += column // (KH * KW) * BW
    i, j = tap // KW, tap % KW
    if BW == 1:
        return ((channel * KW + j).to(tl.int64) * (images * height) + i * dilation_h) * pitch, i, j
    else:
        return (i * dilation_h * width + j * dilation_w) * channels + channel, i, j


@triton.jit
def forward_kernel(
    p_x, p_values, p_bias, p_row_ptr, p_col, p_y,
    rows, rows_per_group, channels_per_group, channels, images, height, width, out_height, out_width, pitch,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    KH: tl.constexpr, KW: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    HALO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of positions (BM) for one block row (BH)."""
    if BW == 1:
        pitch *= 8  # so that the compiler sees that rows are aligned
    # the block rows of a tile of positions are neighbours in time: they read the same input, from L2
    row, tile = tl.program_id(0) % rows, tl.program_id(0) // rows
    m = tile * BM + tl.arange(0, BM)
    m_m = m < images * out_height * pitch
    o = tl.arange(0, BH)
    first_channel = row // rows_per_group * channels_per_group
    start, end = tl.load(p_row_ptr + row), tl.load(p_row_ptr + row + 1)
    line = _divide(m, pitch)
    o_m, h, w = _input_place(line, m - line * pitch, _divide(line, out_height), channels, height, width, out_height,
                             pitch, stride_h, stride_w, padding_h, padding_w, BW)  # fmt: skip
    # Where taps can miss the plane: one instruction for each load to know, in place of four comparisons.
    on_plane = _taps_on_plane(h, w, m_m, height, width, dilation_h, dilation_w, KH, KW) if HALO else m
    acc = tl.zeros((BM, BH), tl.float32)
    # An entry for each k, or one for a whole step: a scalar. Columns are loaded a step ahead of their use in registers,
    # those of vectors, one a k, by the pipeline.
    entry = start + (0 if BW >= BK else tl.arange(0, BK) // BW)
    column = tl.load(p_col + entry, mask=entry < end, other=0)
    for step in range(0, (end - start) * BW, BK):
        k = step + tl.arange(0, BK)
        entry = start + (step // BW if BW >= BK else k // BW)
        m_k = tl.full((BK,), 1, tl.int1) if BW >= BK else entry < end
        if BW == 1:
            column = tl.load(p_col + entry, mask=m_k, other=0)
        o_k, i, j = _offset(column, first_channel + k % BW, channels, images, height, width, pitch,
                            dilation_h, dilation_w, KH, KW, BW)  # fmt: skip
        needed = _bits_of(i, j, m_k)
        mask = (~on_plane[None, :] & needed[:, None]) == 0 if HALO else m_k[:, None] & m_m[None, :]
        x = tl.load((p_x + o_k)[:, None] + o_m[None, :], mask=mask, other=0.0)
        o_w = entry * (BH * BW) + k % BW
        if BW > 1:
            entry = start + ((step + BK) // BW if BW >= BK else (k + BK) // BW)
            column = tl.load(p_col + entry, mask=entry < end, other=0)
        weight = tl.load(p_values + o_w[:, None] + o[None, :] * BW, mask=m_k[:, None], other=0.0)
        acc = dot(tl.trans(x), weight, acc, PRECISION)
    if p_bias is not None:
        acc += tl.load(p_bias + row * BH + o).to(tl.float32)[None, :]
    o_m, m_m = _output_place(m, line, m_m, out_width, pitch, BW)
    tl.store(
        p_y + (o_m * (rows * BH))[:, None] + (row * BH + o)[None, :], acc.to(p_y.dtype.element_ty), mask=m_m[:, None]
    )


@triton.jit
def values_grad_kernel(
    p_dy, p_x, p_row_ptr, p_col, p_dw,
    rows, rows_per_group, channels_per_group, channels, images, height, width, out_height, out_width, pitch,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, entries, steps,
    KH: tl.constexpr, KW: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    ROWS: tl.constexpr, HALO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BK / BW neighbouring entries of one block row, over ``steps`` tiles of positions."""
    if BW == 1:
        pitch *= 8
    # the block rows are cut into parts of BK / BW entries; this program's part is number `part` of all
    part, split = tl.program_id(0), tl.program_id(1)
    r = tl.arange(0, ROWS)
    starts, ends = tl.load(p_row_ptr + r, mask=r < rows, other=0), tl.load(p_row_ptr + r + 1, mask=r < rows, other=0)
    parts = tl.cdiv(ends - starts, BK // BW)
    before = tl.cumsum(parts, 0) <= part
    row = tl.sum(before.to(tl.int32), 0)
    if row >= rows:  # the host knows only a bound of the number of parts
        return
    start = tl.load(p_row_ptr + row) + (part - tl.sum(tl.where(before, parts, 0), 0)) * (BK // BW)
    k, o = tl.arange(0, BK), tl.arange(0, BH)
    entry = start + k // BW
    m_k = entry < tl.load(p_row_ptr + row + 1)
    column = tl.load(p_col + entry, mask=m_k, other=0)
    channel = row // rows_per_group * channels_per_group + k % BW
    o_k, i, j = _offset(column, channel, channels, images, height, width, pitch, dilation_h, dilation_w, KH, KW, BW)
    # off every plane where there is no entry, so that a load asks twice whether it may
    i, j = tl.where(m_k, i * dilation_h, -(2**30)), j * dilation_w
    by_pitch, pitch_shift = _reciprocal(pitch)
    by_height, height_shift = _reciprocal(out_height)
    acc = tl.zeros((BK, BH), tl.float32)
    stop = min((split + 1) * steps * BM, images * out_height * pitch)
    for first in range(split * steps * BM, stop, BM):
        m = first + tl.arange(0, BM)
        m_m = m < images * out_height * pitch
        # of vectors by a true division, from which the compiler sees that neighbours are neighbours in memory
        line = _divide(m, pitch) if BW == 1 else _times(m, by_pitch, pitch_shift)
        n = _divide(line, out_height) if BW == 1 else _times(line, by_height, height_shift)
        o_m, h, w = _input_place(line, m - line * pitch, n, channels, height, width, out_height, pitch,
                                 stride_h, stride_w, padding_h, padding_w, BW)  # fmt: skip
        if HALO:
            h = tl.where(m_m, h, -(2**30))
            y, z = h[None, :] + i[:, None], w[None, :] + j[:, None]
            mask = y.to(tl.uint32) < tl.full((), height, tl.uint32)
            mask &= z.to(tl.uint32) < tl.full((), width, tl.uint32)
        else:
            mask = m_k[:, None] & m_m[None, :]
        x = tl.load((p_x + o_k)[:, None] + o_m[None, :], mask=mask, other=0.0)
        o_m, m_m = _output_place(m, line, m_m, out_width, pitch, BW)
        dy = tl.load(p_dy + (o_m * (rows * BH))[:, None] + (row * BH + o)[None, :], mask=m_m[:, None], other=0.0)
        acc = dot(x, dy, acc, PRECISION)
    o_w = split.to(tl.int64) * entries * (BH * BW) + entry * (BH * BW) + k % BW
    tl.store(p_dw + o_w[:, None] + o[None, :] * BW, acc.to(p_dw.dtype.element_ty), mask=m_k[:, None])


@triton.jit
def copy_taps_kernel(
    p_x, p_copy, channels, images, height, width, copy_height, out_width, pitch,
    stride_w, padding_h, padding_w, dilation_w, KW: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """copy[c, j, n, h, ow] = x[n, c, h - p, ow s - p + j d], zero off the plane and from ow = out_width on."""
    pitch *= 8
    m, c = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BC + tl.arange(0, BC)
    positions = images * copy_height * pitch
    ow, h, n = m % pitch, m // pitch % copy_height - padding_h, m // pitch // copy_height
    m_h = (m < positions) & (h >= 0) & (h < height) & (ow < out_width)
    for j in tl.static_range(KW):
        w = ow * stride_w - padding_w + j * dilation_w
        m_m = m_h & (w >= 0) & (w < width)
        o_x = ((n * height + h) * width + w).to(tl.int64) * channels
        x = tl.load(p_x + o_x[:, None] + c[None, :], mask=m_m[:, None] & (c < channels)[None, :], other=0.0)
        o_copy = (c * KW + j).to(tl.int64) * positions
        tl.store(p_copy + o_copy[:, None] + m[None, :], tl.trans(x),
                 mask=(c < channels)[:, None] & (m < positions)[None, :])  # fmt: skip


@triton.jit
def input_grad_kernel(
    p_dy, p_values, p_t_ptr, p_t_row, p_t_perm, p_dx,
    outputs, outputs_per_group, channels, channels_per_group, column_blocks, positions, height, width,
    out_height, out_width, padding_h, padding_w, dilation_h, dilation_w,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, B: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of input positions (BM) for the B channels of one block column and its KH * KW taps.

    The taps of a channel block are neighbouring block columns, so its entries are one run of the transpose index.
    """
    blocks_per_group = channels_per_group // B
    block, tile = tl.program_id(0) % column_blocks, tl.program_id(0) // column_blocks
    group, block = block // blocks_per_group, block % blocks_per_group
    m = tile * BM + tl.arange(0, BM)
    m_m = m < positions
    line = _divide(m, width)
    n = _divide(line, height)
    h, w = line - n * height + padding_h, m - line * width + padding_w
    # Taps (i, j) connect this position to row (h - i d) / s and column (w - j d) / s of the output, where those are
    # whole and on the plane. There (h - i d) / s is h / s - i d / s, both rounded down: a sum of what m and k give.
    on_plane = _taps_on_output(h, w, m_m, out_height, out_width, dilation_h, dilation_w, STRIDE_H, STRIDE_W, KH, KW)
    o_m = ((n * out_height + h // STRIDE_H) * out_width + w // STRIDE_W).to(tl.int64) * outputs
    c = tl.arange(0, B)
    p_t_ptr += block * (KH * KW)
    start, end = tl.load(p_t_ptr), tl.load(p_t_ptr + KH * KW)
    tap_ends = ()  # of all taps but the last; loaded in the loop they would go through shared memory in each step
    for q in tl.static_range(1, KH * KW):
        tap_ends += (tl.load(p_t_ptr + q),)
    acc = tl.zeros((BM, B), tl.float32)
    # as in the forward pass
    entry = start + (0 if B >= BK else tl.arange(0, BK) // B)
    row = tl.load(p_t_row + entry, mask=entry < end, other=0)
    place = tl.load(p_t_perm + entry, mask=entry < end, other=0)
    for step in range(0, (end - start) * B, BK):
        k = step + tl.arange(0, BK)
        entry = start + (step // B if B >= BK else k // B)
        tap = tl.zeros_like(entry)
        for q in tl.static_range(KH * KW - 1):
            tap += (entry >= tap_ends[q]).to(tl.int32)
        o = row * B + k % B
        o_w = place * (B * B) + k % B * B
        m_k = tl.full((BK,), 1, tl.int1) if B >= BK else entry < end
        m_k = m_k & (row * B // outputs_per_group == group)
        i, j = tap // KW, tap % KW
        o_k = o - (i * dilation_h // STRIDE_H * out_width + j * dilation_w // STRIDE_W) * outputs
        mask = (~on_plane[None, :] & _bits_of(i, j, m_k)[:, None]) == 0
        dy = tl.load((p_dy + o_k)[:, None] + o_m[None, :], mask=mask, other=0.0)
        weight = tl.load(p_values + o_w[:, None] + c[None, :], mask=m_k[:, None], other=0.0)
        entry = start + ((step + BK) // B if B >= BK else (k + BK) // B)
        row = tl.load(p_t_row + entry, mask=entry < end, other=0)
        place = tl.load(p_t_perm + entry, mask=entry < end, other=0)
        acc = dot(tl.trans(dy), weight, acc, PRECISION)
    o_dx = m.to(tl.int64)[:, None] * channels + (group * channels_per_group + block * B + c)[None, :]
    tl.store(p_dx + o_dx, acc.to(p_dx.dtype.element_ty), mask=m_m[:, None])
