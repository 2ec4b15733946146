#pragma once
#include <cstdint>

namespace sparse_moon {

enum class IndexFault : int64_t { kNone = 0, kRowPtr = 1, kColumns = 2, kTranspose = 3 };

struct IndexCheck {
    IndexFault fault;
    int64_t fingerprint;  // of the set of entries; 0 where there is a fault
};

// Whether an index is one: row pointers that ascend from 0 to n, columns that ascend within their row and lie in
// [0, cols), and the transpose index of just these entries. Whatever the arrays hold, nothing outside them is read.
//   row_ptr [rows + 1], col [n], t_ptr [cols + 1], t_row [n], t_perm [n]
// The fingerprint is the sum, modulo 2^64, of a mixed row-major position of each entry.
IndexCheck check_index(const int32_t* row_ptr, const int32_t* col, const int32_t* t_ptr, const int32_t* t_row,
                       const int32_t* t_perm, int64_t rows, int64_t cols, int64_t n);

}  // namespace sparse_moon
