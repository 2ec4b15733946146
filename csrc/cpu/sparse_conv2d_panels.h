// The sparse convolution from panels that hold images side by side, one a lane: any stride, any layout (see jobs.h).
#pragma once
#include "sparse_conv2d.h"

namespace sparse_moon::conv2d {

// As the functions of sparse_conv2d.h, of a batch that is not empty.
void panels_forward(const Conv2d& conv, const SparseMatrix& weight, const void* input, const float* bias,
                    void* output, bool channels_last, int threads);
void panels_input_grad(const Conv2d& conv, const SparseMatrix& weight, const void* grad, void* input_grad,
                       bool channels_last, int threads);
void panels_values_grad(const Conv2d& conv, const SparseMatrix& weight, const void* grad, bool grad_channels_last,
                        const void* input, bool input_channels_last, float* values_grad, int threads);

// Both gradients, of which `grad` is packed once; or false, and nothing done, where that is not possible.
bool panels_grads(const Conv2d& conv, const SparseMatrix& weight, const void* grad, bool grad_channels_last,
                  const void* input, bool input_channels_last, void* input_grad, float* values_grad, int threads);

}  // namespace sparse_moon::conv2d
