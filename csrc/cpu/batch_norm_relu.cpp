#include "batch_norm_relu.h"

#include <algorithm>

#include "dispatch.h"

namespace sparse_moon {
namespace {

// Waking a thread costs as much as this many numbers.
constexpr int64_t kNumbersPerThread = 16384;

void prepare(BatchNormReLU& job, const Kernels& isa) {
    const int64_t useful = job.images * job.channels * job.plane / kNumbersPerThread;
    job.threads = static_cast<int>(std::clamp<int64_t>(useful, 1, job.threads));
    job.scratch = scratch(Slot::kKernel, isa.batch_norm_relu_scratch(job));
}

}  // namespace

void batch_norm_relu(BatchNormReLUForward job) {
    const Kernels& isa = kernels();
    prepare(job, isa);
    isa.batch_norm_relu(job);
}

void batch_norm_relu_backward(BatchNormReLUBackward job) {
    const Kernels& isa = kernels();
    prepare(job, isa);
    isa.batch_norm_relu_backward(job);
}

}  // namespace sparse_moon
