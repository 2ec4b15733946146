// GELU of what a linear layer's product is, or its derivative there, for a block of tokens while the caches have it.
#pragma once
#include "activation_kernels.h"
#include "jobs.h"

namespace sparse_moon {
namespace SPARSE_MOON_ISA {

template <class T>
void gelu_tokens_of(const LinearJob& job, int64_t token, int64_t last, int64_t begin, int64_t end, int64_t total) {
    const bool lines = total * sizeof(T) % 64 == 0 && reinterpret_cast<uintptr_t>(job.gelu) % 64 == 0;
    const bool past = job.streaming && lines && begin % kLanes == 0;
    for (; token < last; ++token) {
        T* product = static_cast<T*>(job.output) + token * total;
        T* other = static_cast<T*>(job.gelu) + token * total;
        for (int64_t i = begin; i < end; i += kLanes) {
            const int count = static_cast<int>(smaller(kLanes, end - i));
            const bool whole = count == kLanes;
            const Vec v = whole ? load_unaligned(product + i) : load_range(product + i, 0, count);
            if (job.transposed) {
                const Vec before = whole ? load_unaligned(other + i) : load_range(other + i, 0, count);
                const Vec grad = v * gelu_tanh_derivative(before);
                whole ? store_unaligned(product + i, grad) : store_first(product + i, grad, count);
            } else if (whole && past) {
                store_streaming(other + i, gelu_tanh(v));
            } else {
                whole ? store_unaligned(other + i, gelu_tanh(v)) : store_first(other + i, gelu_tanh(v), count);
            }
        }
    }
}

// Outputs [begin, end) of `total` of tokens [token, last), where the job has GELU; all have been written.
inline void gelu_tokens(const LinearJob& job, int64_t token, int64_t last, int64_t begin, int64_t end, int64_t total) {
    if (!job.gelu) return;
    with_number_type(job.bfloat16, [&](auto number) {
        gelu_tokens_of<decltype(number)>(job, token, smaller(last, job.tokens), begin, end, total);
    });
}

}  // namespace SPARSE_MOON_ISA
}  // namespace sparse_moon
