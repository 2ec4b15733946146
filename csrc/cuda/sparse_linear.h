#pragma once
// Unstructured sparse linear layer: y = x W^T + b, dx = dy W and dv[e] = sum_t dy[t, row e] x[t, col e], in fp32, fp16
// and bf16 with fp32 accumulation.
#include <cstdint>

#include "cuda/common.h"

namespace sparse_moon::cuda {

// Rows of a sparse matrix (rows, cols) with n entries, on the device: ptr (rows + 1), col (n, ascending in a row) and,
// where the values are in another order, perm (n): entry e has value values[perm[e]]. The transpose index of a matrix
// is its columns in this form: {cols, rows, n, t_ptr, t_row, t_perm}.
struct SparseRows {
    int64_t rows, cols, n;
    const int32_t *ptr, *col, *perm;
};

// output (tokens, rows) = input (tokens, cols) W^T + bias, all row-major and contiguous, of one dtype, on the device.
// bias (rows) may be null. Workspace: sparse_product_workspace bytes, 256-byte aligned. With {O, I, ...} it is the
// forward product; with the transpose index {I, O, ...}, no bias and the output's gradient as input, the input's
// gradient. Throws std::runtime_error where a launch fails.
void sparse_product(DType dtype, int64_t tokens, const SparseRows& weight, const void* values, const void* bias,
                    const void* input, void* output, void* workspace, cudaStream_t stream);
int64_t sparse_product_workspace(DType dtype, int64_t tokens, int64_t rows, int64_t cols, int64_t n);

// values_grad (n) from grad (tokens, rows) and input (tokens, cols), row-major and contiguous; weight.perm is not read.
// Workspace: sparse_values_grad_workspace bytes, 256-byte aligned. The sums have a fixed order: equal bits every time.
void sparse_values_grad(DType dtype, int64_t tokens, const SparseRows& weight, const void* grad, const void* input,
                        void* values_grad, void* workspace, cudaStream_t stream);
int64_t sparse_values_grad_workspace(DType dtype, int64_t tokens, int64_t rows, int64_t cols, int64_t n);

}  // namespace sparse_moon::cuda
