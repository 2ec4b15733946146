#include "sparse_linear.h"

#include <algorithm>
#include <stdexcept>

#include "dispatch.h"
#include "sparse_linear_runs.h"

namespace sparse_moon {
namespace {

void check_size(const SparseMatrix& weight) {
    constexpr int64_t kMost = int64_t{1} << 20;  // offsets in a panel, 1088 bytes a feature, are 32-bit numbers
    if (std::max(weight.rows, weight.cols) > kMost) {
        throw std::length_error("the CPU kernels take at most 1048576 input and output features");
    }
}

// Starting a team costs as much as some ten thousand entries, each of which takes all lanes whatever is in them.
int useful_threads(const SparseMatrix& weight, int64_t tokens, int threads) {
    constexpr int64_t kThreadEntries = 8192;
    const int64_t entries = weight.row_ptr[weight.rows / weight.block_rows] * weight.block_rows * weight.block_cols;
    const int64_t vectors = (tokens + kernels().lanes - 1) / kernels().lanes;
    return static_cast<int>(std::clamp<int64_t>(entries * vectors / kThreadEntries, 1, threads));
}

// Whether listing the runs and reading panels from L1 pays: for more than two vectors of tokens that meet many entries.
bool takes_runs(const LinearJob& job) {
    constexpr int64_t kLeast = 8000;  // tokens times entries of a row
    constexpr int64_t kLargestBlock = 1024;  // places in a chunk, whole blocks, are numbers of 16 bits
    const SparseMatrix& matrix = job.matrix;
    if (std::max(matrix.block_rows, matrix.block_cols) > kLargestBlock) return false;
    const int64_t rows = std::max<int64_t>(job.transposed ? matrix.cols : matrix.rows, 1);
    const int64_t entries = matrix.row_ptr[matrix.rows / matrix.block_rows] * matrix.block_rows * matrix.block_cols;
    return job.tokens > 2 * kernels().lanes && job.tokens * (entries / rows) >= kLeast;
}

LinearJob prepared(LinearJob job) {
    check_size(job.matrix);
    job.threads = useful_threads(job.matrix, job.tokens, job.threads);
    const int64_t outputs = job.transposed ? job.matrix.cols : job.matrix.rows;
    const int64_t bytes = job.tokens * outputs * number_bytes(job.bfloat16);
    job.streaming = bytes >= kStreamBytes;
    expect_writes(job.output, bytes);
    if (job.gelu && !job.transposed) expect_writes(job.gelu, bytes);
    return job;
}

void run(LinearJob job) {
    const Kernels& isa = kernels();
    job.scratch = scratch(Slot::kKernel, isa.linear_scratch(job));
    isa.linear(job);
}

void run_runs(const LinearJob& linear) {
    const Kernels& isa = kernels();
    KeptRuns own;
    KeptRuns& runs = linear.matrix.runs ? *linear.matrix.runs : own;
    LinearRunsJob job{linear, runs.of(linear.matrix, linear.transposed), nullptr, nullptr};
    const int64_t entries = job.groups.entry_starts[job.groups.blocks * job.groups.chunks];
    job.values = reinterpret_cast<float*>(scratch(Slot::kLists, entries * (sizeof(float) + sizeof(uint16_t))));
    job.features = reinterpret_cast<uint16_t*>(job.values + entries);
    job.linear.scratch = scratch(Slot::kKernel, job.linear.threads * isa.linear_runs_scratch(job));
    isa.linear_runs(job);
}

void run_dots(LinearDotsJob job) {
    check_size(job.matrix);
    const Kernels& isa = kernels();
    job.threads = useful_threads(job.matrix, job.tokens, job.threads);
    job.scratch = scratch(Slot::kKernel, isa.linear_dots_scratch(job));
    isa.linear_dots(job);
}

}  // namespace

void sparse_linear(int64_t tokens, const SparseMatrix& weight, const void* input, const float* bias, void* output,
                   bool bfloat16, int threads, void* gelu) {
    const LinearJob job =
        prepared({weight, false, tokens, bfloat16, input, bias, output, false, nullptr, threads, gelu});
    takes_runs(job) ? run_runs(job) : run(job);
}

void sparse_linear_input_grad(int64_t tokens, const SparseMatrix& weight, const void* grad, void* input_grad,
                              bool bfloat16, int threads, void* before) {
    LinearJob job =
        prepared({weight, true, tokens, bfloat16, grad, nullptr, input_grad, false, nullptr, threads, before});
    if (takes_runs(job)) return run_runs(job);
    if (weight.block_rows * weight.block_cols == 1) {
        // Once here rather than for every block of tokens: the places are anywhere in memory.
        const int64_t n = weight.t_ptr[weight.cols];
        float* values = reinterpret_cast<float*>(scratch(Slot::kLists, n * sizeof(float)));
#pragma omp parallel for schedule(static) num_threads(job.threads)
        for (int64_t k = 0; k < n; ++k) values[k] = weight.values[weight.t_perm[k]];
        job.matrix.values = values;
    }
    run(job);
}

void sparse_linear_values_grad(int64_t tokens, const SparseMatrix& weight, const void* grad, const void* input,
                               float* values_grad, bool bfloat16, int threads, float* bias_grad) {
    run_dots({weight, tokens, bfloat16, grad, input, values_grad, bias_grad, nullptr, threads});
}

void sparse_linear_grads(int64_t tokens, const SparseMatrix& weight, const void* grad, const void* input,
                         void* input_grad, float* values_grad, float* bias_grad, bool bfloat16,
                         int threads) {
    sparse_linear_input_grad(tokens, weight, grad, input_grad, bfloat16, threads);
    run_dots({weight, tokens, bfloat16, grad, input, values_grad, bias_grad, nullptr, threads});
}

}  // namespace sparse_moon
