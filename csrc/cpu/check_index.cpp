#include "check_index.h"

namespace sparse_moon {
namespace {

bool is_pointer(const int32_t* ptr, int64_t count, int64_t n) {
    if (ptr[0] != 0 || ptr[count] != n) return false;
    for (int64_t i = 0; i < count; ++i) {
        if (ptr[i] > ptr[i + 1]) return false;
    }
    return true;
}

// As _mixed in ops/check_index.py. Right shifts keep the sign, as torch's do.
int64_t mixed(int64_t position) {
    uint64_t x = static_cast<uint64_t>(position + 1) * 0x9E3779B97F4A7C15u;
    x ^= static_cast<uint64_t>(static_cast<int64_t>(x) >> 29);
    x *= 0xBF58476D1CE4E5B9u;
    x ^= static_cast<uint64_t>(static_cast<int64_t>(x) >> 32);
    return static_cast<int64_t>(x);
}

}  // namespace

IndexCheck check_index(const int32_t* row_ptr, const int32_t* col, const int32_t* t_ptr, const int32_t* t_row,
                       const int32_t* t_perm, int64_t rows, int64_t cols, int64_t n) {
    if (!is_pointer(row_ptr, rows, n)) return {IndexFault::kRowPtr, 0};
    uint64_t fingerprint = 0;
    for (int64_t r = 0; r < rows; ++r) {
        int64_t before = -1;
        for (int32_t i = row_ptr[r]; i < row_ptr[r + 1]; ++i) {
            if (col[i] <= before || col[i] >= cols) return {IndexFault::kColumns, 0};
            before = col[i];
            fingerprint += static_cast<uint64_t>(mixed(r * cols + before));
        }
    }
    if (!is_pointer(t_ptr, cols, n)) return {IndexFault::kTranspose, 0};
    for (int64_t c = 0; c < cols; ++c) {
        int64_t before = -1;
        for (int32_t i = t_ptr[c]; i < t_ptr[c + 1]; ++i) {
            const int64_t row = t_row[i], entry = t_perm[i];
            if (row <= before || row >= rows || entry < row_ptr[row] || entry >= row_ptr[row + 1] || col[entry] != c) {
                return {IndexFault::kTranspose, 0};
            }
            before = row;
        }
    }
    return {IndexFault::kNone, static_cast<int64_t>(fingerprint)};
}

}  // namespace sparse_moon
