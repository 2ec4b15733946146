#include "sparse_linear.h"

#include "dispatch.h"

namespace sparse_moon {
namespace {

void run(LinearJob job) {
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
    const Kernels& isa = kernels();
    LinearDotsJob job{weight, tokens, grad, input, values_grad, nullptr, threads};
    job.scratch = scratch(Slot::kKernel, isa.linear_dots_scratch(job));
    isa.linear_dots(job);
}

}  // namespace sparse_moon
