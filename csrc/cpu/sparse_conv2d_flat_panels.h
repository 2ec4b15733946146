// The sparse convolution from flat panels, into which images are copied as they are (see jobs.h): contiguous
// activations and a stride of 1 only.
#pragma once
#include "sparse_conv2d.h"

namespace sparse_moon::conv2d {

// Whether a product of a batch that is not empty runs from flat panels: see set_flat_panels in sparse_conv2d.h.
bool goes_flat(const Conv2d& conv, const SparseMatrix& weight, bool channels_last);

void flat_forward(const Conv2d& conv, const SparseMatrix& weight, const void* input, const float* bias, void* output,
                  int threads);

// The gradient of the input and, where values_grad is not null, of the values; or without input_grad of those alone.
void flat_grads(const Conv2d& conv, const SparseMatrix& weight, const void* grad, const void* input,
                void* input_grad, float* values_grad, int threads);

}  // namespace sparse_moon::conv2d
