#pragma once
#include <cstdint>

namespace sparse_moon {

// Python passes these numbers.
enum class Activation { kNone, kReLU, kReLU6, kSiLU, kHardswish };

// A batch of planes of float32 or bfloat16 and what normalises it. All activations of one call are of one type and have
// the same layout, without gaps:
// (images, channels, plane), or with channels_last (images, plane, channels).
struct BatchNormReLU {
    int64_t images, channels, plane;
    bool channels_last, bfloat16;
    Activation activation;
    bool batch_statistics;  // those of this batch (training), or given ones that are constants (evaluation)
    double eps;
    const float *weight, *bias;  // [channels], each or null for 1 and 0
    const void* input;
    float *mean, *var;  // [channels] variance is biased; written by a forward pass with batch statistics, else read
    int threads;        // at most so many; small batches take fewer
    char* scratch;      // [batch_norm_relu_scratch(job)] bytes, 64-byte aligned
};

// output = activation((input - mean) weight / sqrt(var + eps) + bias + residual). A residual only without activation or
// with one that shows in its output where it is flat: ReLU and ReLU6.
struct BatchNormReLUForward : BatchNormReLU {
    const void* residual;  // or null
    void* output;
};

// With g = grad times the derivative of the activation (that of ReLU and ReLU6 is 0 where they are flat, at the ends too,
// and 1 for what is not a number), and xhat = (input - mean) / sqrt(var + eps):
//   bias_grad = sum g, weight_grad = sum g xhat, residual_grad = g,
//   input_grad = weight / sqrt(var + eps) (g - mean(g) - xhat mean(g xhat)), the means only with batch statistics.
struct BatchNormReLUBackward : BatchNormReLU {
    const void* grad;
    const void* output;   // of the forward pass; null without residual: then what was activated is computed again
    void* input_grad;
    void* residual_grad;  // null exactly where output is null
    float *weight_grad, *bias_grad;  // [channels]
};

// Sums are float64. Contiguous planes: a thread holds a few channels at a time, so that the second pass over them finds
// them in its cache, and results do not depend on the number of threads; with channels_last they do, in the last bits.
// Throws std::bad_alloc without memory.
void batch_norm_relu(BatchNormReLUForward job);
void batch_norm_relu_backward(BatchNormReLUBackward job);

}  // namespace sparse_moon
