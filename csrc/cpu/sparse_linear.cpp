#include "sparse_linear.h"

#include <algorithm>
#include <stdexcept>

#include "dispatch.h"

namespace sparse_moon {
namespace {

void check_size(const SparseMatrix& weight) {
    constexpr int64_t kMost = int64_t{1} << 20;  // offsets in a panel, 1088 bytes a feature, are 32-bit numbers
    if (std::max(weight.rows, weight.cols) > kMost) {
        throw std::length_error("the CPU kernels take at most 1048576 input and output features");
    }
}

void run(LinearJob job) {
    check_size(job.matrix);
    const Kernels& isa = kernels();
    const int64_t outputs = job.transposed ? job.matrix.cols : job.matrix.rows;
    expect_writes(job.output, job.tokens * outputs * sizeof(float));
    job.scratch = scratch(Slot::kKernel, isa.linear_scratch(job));
    isa.linear(job);
}

}  // namespace

void sparse_linear(int64_t tokens, const SparseMatrix& weight, const float* input, const float* bias, float* output,
                   int threads) {
    run({weight, false, tokens, input, bias, output, nullptr, threads});
}

void sparse_linear_input_grad(int64_t tokens, const SparseMatrix& weight, const float* grad, float* input_grad,
                              int threads) {
    run({weight, true, tokens, grad, nullptr, input_grad, nullptr, threads});
}

void sparse_linear_values_grad(int64_t tokens, const SparseMatrix& weight, const float* grad, const float* input,
                               float* values_grad, int threads) {
    check_size(weight);
    const Kernels& isa = kernels();
    LinearDotsJob job{weight, tokens, grad, input, values_grad, nullptr, threads};
    job.scratch = scratch(Slot::kKernel, isa.linear_dots_scratch(job));
    isa.linear_dots(job);
}

}  // namespace sparse_moon
