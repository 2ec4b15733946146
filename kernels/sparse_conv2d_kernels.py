"""What the GPU runs of :mod:`sparse_moon.kernels.sparse_conv2d`, which says what is computed and launches it."""

import triton
import triton.language as tl

from sparse_moon.kernels.dot import dot


@triton.jit
def _divide(a, b):
    """a // b of numbers that are not negative: without a sign it takes half the instructions."""
    return (a.to(tl.uint32) // tl.full((), b, tl.uint32)).to(tl.int32)


@triton.jit
def _output_place(m, m_m, out_width, pitch, BW: tl.constexpr):
    """Place of positions m in the output, and which exist there: rows of vectors' positions are padded to the pitch."""
    if BW == 1:
        row = _divide(m, pitch)
        ow = m - row * pitch
        m, m_m = row * out_width + ow, m_m & (ow < out_width)
    return m.to(tl.int64), m_m


@triton.jit
def _gather(
    p_x, m, m_m, column, channel, m_k, channels, images, height, width, out_height, pitch,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    KH: tl.constexpr, KW: tl.constexpr, BW: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    """x[m, k] as a tile (k, m): ``column`` (k) of the matrix, whose block starts at ``channel`` (k), at positions m."""
    tap = column % (KH * KW)
    channel += column // (KH * KW) * BW
    i, j = tap // KW * dilation_h, tap % KW
    row = _divide(m, pitch)
    n = _divide(row, out_height)
    ow, oh = m - row * pitch, row - n * out_height
    mask = m_k[:, None] & m_m[None, :]
    if BW == 1:
        o_m = (n * height + oh * stride_h) * pitch + ow
        o_k = ((channel * KW + j).to(tl.int64) * (images * height) + i) * pitch
    else:
        j *= dilation_w
        h, w = oh * stride_h - padding_h, ow * stride_w - padding_w
        o_m = ((n * height + h) * width + w).to(tl.int64) * channels
        o_k = (i * width + j) * channels + channel
        if HALO:
            h, w = h[None, :] + i[:, None], w[None, :] + j[:, None]
            mask = mask & (h >= 0) & (h < height) & (w >= 0) & (w < width)
    return tl.load((p_x + o_k)[:, None] + o_m[None, :], mask=mask, other=0.0)


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
    acc = tl.zeros((BM, BH), tl.float32)
    for step in range(0, (end - start) * BW, BK):
        k = step + tl.arange(0, BK)
        entry = start + k // BW
        m_k = entry < end
        column = tl.load(p_col + entry, mask=m_k, other=0)
        channel = first_channel + k % BW
        x = _gather(p_x, m, m_m, column, channel, m_k, channels, images, height, width, out_height, pitch,
                    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, KH, KW, BW, HALO)  # fmt: skip
        o_w = entry * (BH * BW) + k % BW
        w = tl.load(p_values + o_w[:, None] + o[None, :] * BW, mask=m_k[:, None], other=0.0)
        acc = dot(tl.trans(x), w, acc, PRECISION)
    if p_bias is not None:
        acc += tl.load(p_bias + row * BH + o).to(tl.float32)[None, :]
    o_m, m_m = _output_place(m, m_m, out_width, pitch, BW)
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
    acc = tl.zeros((BK, BH), tl.float32)
    stop = min((split + 1) * steps * BM, images * out_height * pitch)
    for first in range(split * steps * BM, stop, BM):
        m = first + tl.arange(0, BM)
        m_m = m < images * out_height * pitch
        x = _gather(p_x, m, m_m, column, channel, m_k, channels, images, height, width, out_height, pitch,
                    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, KH, KW, BW, HALO)  # fmt: skip
        o_m, m_m = _output_place(m, m_m, out_width, pitch, BW)
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
    # with s = 1 these are the output's row and column that the first tap connects to this position
    line = _divide(m, width)
    n = _divide(line, height)
    h, w = line - n * height + padding_h, m - line * width + padding_w
    c = tl.arange(0, B)
    p_t_ptr += block * (KH * KW)
    start, end = tl.load(p_t_ptr), tl.load(p_t_ptr + KH * KW)
    acc = tl.zeros((BM, B), tl.float32)
    for step in range(0, (end - start) * B, BK):
        k = step + tl.arange(0, BK)
        entry = start + k // B
        m_k = entry < end
        row = tl.load(p_t_row + entry, mask=m_k, other=0)
        tap = tl.zeros((BK,), tl.int32)
        for q in tl.static_range(1, KH * KW):
            tap += (entry >= tl.load(p_t_ptr + q)).to(tl.int32)
        o = row * B + k % B
        o_w = tl.load(p_t_perm + entry, mask=m_k, other=0) * (B * B) + k % B * B
        m_k = m_k & (row * B // outputs_per_group == group)
        oh = h[None, :] - (tap // KW * dilation_h)[:, None]
        ow = w[None, :] - (tap % KW * dilation_w)[:, None]
        mask = m_k[:, None] & m_m[None, :] & (oh >= 0) & (ow >= 0)
        if STRIDE_H > 1:
            mask = mask & (oh % STRIDE_H == 0)
            oh = oh // STRIDE_H
        if STRIDE_W > 1:
            mask = mask & (ow % STRIDE_W == 0)
            ow = ow // STRIDE_W
        mask = mask & (oh < out_height) & (ow < out_width)
        o_dy = ((n[None, :] * out_height + oh) * out_width + ow).to(tl.int64) * outputs + o[:, None]
        dy = tl.load(p_dy + o_dy, mask=mask, other=0.0)
        weight = tl.load(p_values + o_w[:, None] + c[None, :], mask=m_k[:, None], other=0.0)
        acc = dot(tl.trans(dy), weight, acc, PRECISION)
    o_dx = m.to(tl.int64)[:, None] * channels + (group * channels_per_group + block * B + c)[None, :]
    tl.store(p_dx + o_dx, acc.to(p_dx.dtype.element_ty), mask=m_m[:, None])
