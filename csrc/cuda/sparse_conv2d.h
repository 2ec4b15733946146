#pragma once
#include "conv2d.h"
#include "cuda/common.h"

namespace sparse_moon::cuda {

using Conv2d = Conv2dOf<int32_t>;

// Unstructured weight: a matrix (out_channels, in_channels / groups * kernel[0] * kernel[1]) with n entries in
// compressed rows and their transpose index, as in sparse_moon/topology.py. All on the device.
struct Conv2dIndex {
    int32_t n;
    const int32_t* row_ptr;  // out_channels + 1 ints
    const int32_t* col;      // n ints
    const int32_t* t_ptr;    // columns + 1 ints
    const int32_t* t_row;    // n ints
    const int32_t* t_perm;   // n ints
};

enum class Conv2dPass { forward, input_grad, values_grad };

// Bytes of device memory that a pass needs as its workspace, aligned to 256 bytes; what is in it does not matter.
// Throws std::length_error where an activation outgrows 32-bit counts of 16-byte vectors.
int64_t sparse_conv2d_workspace(Conv2dPass pass, const Conv2d& conv, DType dtype, int32_t n);

// Activations are channels_last without gaps, (batch, height, width, channels) in memory; those that are written begin
// at a multiple of 16 bytes. All tensors are on the device, in one dtype; sums are in fp32. Launches are asynchronous,
// two or three a call, and can be captured in a graph; equal calls give equal bits. Throws std::runtime_error where a
// launch fails.

// output (batch, out_size, out_channels) = conv(input) + bias; bias, out_channels numbers, may be null.
void sparse_conv2d(const Conv2d& conv, DType dtype, const Conv2dIndex& index, const void* values, const void* input,
                   const void* bias, void* output, void* workspace, cudaStream_t stream);

// input_grad (batch, in_size, in_channels) from grad (batch, out_size, out_channels).
void sparse_conv2d_input_grad(const Conv2d& conv, DType dtype, const Conv2dIndex& index, const void* values,
                              const void* grad, void* input_grad, void* workspace, cudaStream_t stream);

// values_grad, n numbers, from grad and input.
void sparse_conv2d_values_grad(const Conv2d& conv, DType dtype, const Conv2dIndex& index, const void* grad,
                               const void* input, void* values_grad, void* workspace, cudaStream_t stream);

}  // namespace sparse_moon::cuda
