#pragma once
#include "jobs.h"

namespace sparse_moon {

// All activations are float32, contiguous, one token after another. Results do not depend on `threads`.
// Throws std::length_error for more than 2^20 input or output features, std::bad_alloc without memory.

// output (tokens, rows) = input (tokens, cols) W^T + bias; bias may be null.
void sparse_linear(int64_t tokens, const SparseMatrix& weight, const float* input, const float* bias, float* output,
                   int threads);

// input_grad (tokens, cols) = grad (tokens, rows) W.
void sparse_linear_input_grad(int64_t tokens, const SparseMatrix& weight, const float* grad, float* input_grad,
                              int threads);

// values_grad [blocks][block_rows][block_cols] = the existing blocks of grad^T input.
void sparse_linear_values_grad(int64_t tokens, const SparseMatrix& weight, const float* grad, const float* input,
                               float* values_grad, int threads);

// Both gradients, and that of the bias, the sum of grad over tokens, unless bias_grad is null.
void sparse_linear_grads(int64_t tokens, const SparseMatrix& weight, const float* grad, const float* input,
                         float* input_grad, float* values_grad, float* bias_grad, int threads);

}  // namespace sparse_moon
