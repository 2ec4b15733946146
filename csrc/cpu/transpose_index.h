#pragma once
#include <cstdint>

namespace sparse_moon {

// Column-ordered index of block-compressed rows, by one counting sort over the entries.
//   row_ptr  [rows + 1]  start of each block row, ascending from 0 to n
//   col      [n]         block column of each entry, in [0, cols)
//   t_ptr    [cols + 1]  out: start of each block column
//   t_row    [n]         out: block row of each entry, in column order
//   t_perm   [n]         out: place of each entry among the row-ordered ones
void transpose_index(const int32_t* row_ptr, const int32_t* col, int64_t rows, int64_t cols, int32_t* t_ptr,
                     int32_t* t_row, int32_t* t_perm);

}  // namespace sparse_moon
