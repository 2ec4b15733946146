#pragma once
#include "jobs.h"

namespace sparse_moon {

// Activations are contiguous, one token after another, float32 or all of a call bfloat16; weight, bias, their gradients
// and all sums are float32. Results have the same bits for the same number of threads.
// Throws std::length_error for more than 2^20 input or output features, std::bad_alloc without memory.

// output (tokens, rows) = input (tokens, cols) W^T + bias; bias may be null. Unless null, `gelu`, like output, gets GELU
// by tanh of it.
void sparse_linear(int64_t tokens, const SparseMatrix& weight, const void* input, const float* bias, void* output,
                   bool bfloat16, int threads, void* gelu = nullptr);

// input_grad (tokens, cols) = grad (tokens, rows) W; unless null, of `before`, of which the input was GELU by tanh.
void sparse_linear_input_grad(int64_t tokens, const SparseMatrix& weight, const void* grad, void* input_grad,
                              bool bfloat16, int threads, void* before = nullptr);

// values_grad [blocks][block_rows][block_cols] = the existing blocks of grad^T input; bias_grad, unless null, is the sum
// of grad over tokens.
void sparse_linear_values_grad(int64_t tokens, const SparseMatrix& weight, const void* grad, const void* input,
                               float* values_grad, bool bfloat16, int threads, float* bias_grad = nullptr);

// Both gradients, and that of the bias unless it is null.
void sparse_linear_grads(int64_t tokens, const SparseMatrix& weight, const void* grad, const void* input,
                         void* input_grad, float* values_grad, float* bias_grad, bool bfloat16, int threads);

}  // namespace sparse_moon
