// The sparse convolution as a linear layer: what each position of the output sees is copied into a row of its own,
// which is then one token.
#pragma once
#include "sparse_conv2d.h"

namespace sparse_moon::conv2d {

// Whether a product of a batch that is not empty runs by columns: convolutions with a stride, of one pixel on
// activations that are all channels_last (1024 to 2048 channels, 8 x 8, 8 images, 90 %: 3.1 ms instead of 5.0), or of
// so small a batch that it would fill a quarter of a panel's lanes (256 to 512, 3 x 3, one image of 8 x 8, 95 %: 0.65
// instead of 1.1).
bool goes_by_columns(const Conv2d& conv, bool channels_last);

void columns_forward(const Conv2d& conv, const SparseMatrix& weight, const void* input, const float* bias, void* output,
                     bool channels_last, int threads);

// The gradients of the input, in the layout of grad, and of the values: those that are not null.
void columns_grads(const Conv2d& conv, const SparseMatrix& weight, const void* grad, bool grad_channels_last,
                   const void* input, bool input_channels_last, void* input_grad, float* values_grad, int threads);

}  // namespace sparse_moon::conv2d
