#pragma once
#include "sparse_conv2d.h"

namespace sparse_moon {

// Dense 3 x 3 convolutions with stride, dilation and groups of 1, by Winograd's products (see
// conv2d_winograd_kernels.h): what runs where a weight is not sparse enough to gain from that. Weights are
// (out_channels, in_channels, 3, 3), activations contiguous or channels_last, all float32. Throws std::bad_alloc
// without memory.

// output = conv(input) + bias; bias may be null.
void winograd_conv2d(const Conv2d& conv, const float* weight, const float* input, const float* bias, float* output,
                     bool channels_last, int threads);

// input_grad from grad.
void winograd_input_grad(const Conv2d& conv, const float* weight, const float* grad, float* input_grad,
                         bool channels_last, int threads);

// weight_grad from grad and input, each in its own layout. Depends on `threads` in the last bits.
void winograd_weight_grad(const Conv2d& conv, const float* grad, bool grad_channels_last, const float* input,
                          bool input_channels_last, float* weight_grad, int threads);

}  // namespace sparse_moon
