#pragma once
#include <cstdint>

namespace sparse_moon {

// Where the entries of a block-compressed matrix lie in a dense weight (O, C) or (O, C, kh, kw), contiguous or
// channels_last: with `taps` = kh kw, block column j is tap j % taps of block_cols channels from j / taps * block_cols
// on.
struct MaskedDense {
    int64_t grid_rows;               // block rows
    int64_t block_rows, block_cols;  // shape of a block
    int64_t cols, taps;              // elements of a dense row, C kh kw, and kh kw of them
    int64_t stride_channel, stride_tap;  // in elements; rows are `cols` apart
    const int32_t *row_ptr, *col;
    int threads;
};

// Writes all of `dense`: values [n][block_rows][block_cols] in their places and zeros between them. Elements have
// `bytes` = 2, 4 or 8.
void scatter_values(const MaskedDense& layout, int64_t bytes, const void* values, void* dense);

// Reads the values from their places.
void gather_values(const MaskedDense& layout, int64_t bytes, const void* dense, void* values);

}  // namespace sparse_moon
