#include "transpose_index.h"

#include <algorithm>
#include <vector>

namespace sparse_moon {

void transpose_index(const int32_t* row_ptr, const int32_t* col, int64_t rows, int64_t cols, int32_t* t_ptr,
                     int32_t* t_row, int32_t* t_perm) {
    const int32_t n = row_ptr[rows];
    std::fill(t_ptr, t_ptr + cols + 1, 0);
    for (int32_t i = 0; i < n; ++i) ++t_ptr[col[i] + 1];
    for (int64_t c = 0; c < cols; ++c) t_ptr[c + 1] += t_ptr[c];

    std::vector<int32_t> next(t_ptr, t_ptr + cols);
    for (int64_t r = 0; r < rows; ++r) {
        for (int32_t i = row_ptr[r]; i < row_ptr[r + 1]; ++i) {
            const int32_t slot = next[col[i]]++;
            t_row[slot] = static_cast<int32_t>(r);
            t_perm[slot] = i;
        }
    }
}

}  // namespace sparse_moon
