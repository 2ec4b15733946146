#pragma once
#include "conv2d.h"
#include "jobs.h"

namespace sparse_moon {

// bfloat16: how input, output and their gradients are stored, which are float32 otherwise.
struct Conv2d : Conv2dOf<int64_t> {
    bool bfloat16 = false;
};

// Which convolutions run from flat panels (see jobs.h): where that is faster, unless something else is asked for, for
// tests and measurements, in all threads from the next call on.
enum class FlatPanels { kWhereFaster, kWherePossible, kNever };
void set_flat_panels(FlatPanels where);

// The weight is a matrix (out_channels, in_channels / groups * kernel[0] * kernel[1]) whose columns are ordered
// (channel / bw, tap, channel % bw) with bw the block width, as in sparse_moon/topology.py. Activations are
// contiguous or channels_last, all of one call as conv.bfloat16 says; weight, bias, their gradients and all sums are
// float32. Results do not depend on `threads`, but for the order of sums: that of the values' gradient always, those of
// all in a batch of fewer images than threads, and where pixels become the tokens of a linear layer. Throws
// std::length_error where a panel would outgrow 32-bit offsets, std::bad_alloc without memory.

// output (batch, out_channels, out_size) = conv(input) + bias; bias may be null.
void sparse_conv2d(const Conv2d& conv, const SparseMatrix& weight, const void* input, const float* bias, void* output,
                   bool channels_last, int threads);

// input_grad (batch, in_channels, in_size) from grad (batch, out_channels, out_size), both in one layout.
void sparse_conv2d_input_grad(const Conv2d& conv, const SparseMatrix& weight, const void* grad, void* input_grad,
                              bool channels_last, int threads);

// values_grad [blocks][block_rows][block_cols] from grad and input, each in its own layout.
void sparse_conv2d_values_grad(const Conv2d& conv, const SparseMatrix& weight, const void* grad,
                               bool grad_channels_last, const void* input, bool input_channels_last,
                               float* values_grad, int threads);

// Both gradients; grad is packed once for both where the convolution keeps the plane's height, without a stride, and
// the batch has work for all threads. That of the bias, too (see bias_grad.h), unless bias_grad is null.
void sparse_conv2d_grads(const Conv2d& conv, const SparseMatrix& weight, const void* grad, bool grad_channels_last,
                         const void* input, bool input_channels_last, void* input_grad, float* values_grad,
                         float* bias_grad, int threads);

}  // namespace sparse_moon
