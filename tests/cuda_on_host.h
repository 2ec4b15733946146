// Runs CUDA kernels of blocks of threads (cuda_block.h) on the host. The sanitizers see the kernels' own code, and
// dynamic shared memory has exactly the size that was asked for. Include it before the kernel's source.
#pragma once
#define SPARSE_MOON_CUDA_ON_HOST
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>
#include <utility>

#include "cuda_block.h"

using std::max;
using std::min;

namespace cuda_on_host {

inline std::unique_ptr<uint4[]> shared;
inline int multiprocessor_count = 4, block_bytes = 227 * 1024;

// A thread's copies that nobody has waited for: since its last end_of_copies, before that, and before the one before.
struct Copies {
    std::vector<std::pair<uint4*, const uint4*>> open, last, earlier;
};
inline std::map<uint32_t, Copies> copies;  // by thread

}  // namespace cuda_on_host

#undef __launch_bounds__
#define __launch_bounds__(...)

inline float __uint_as_float(unsigned x) {
    float y;
    std::memcpy(&y, &x, 4);
    return y;
}

inline unsigned __float_as_uint(float x) {
    unsigned y;
    std::memcpy(&y, &x, 4);
    return y;
}

#include "cuda/common.h"

namespace sparse_moon::cuda {

inline uint4* dynamic_shared() { return cuda_on_host::shared.get(); }
// Copies happen as late as they may: when their thread waits for them.
inline void copy_async(uint4* shared, const uint4* global) {
    cuda_on_host::copies[threadIdx.x].open.push_back({shared, global});
}
inline void end_of_copies() {
    auto& [open, last, earlier] = cuda_on_host::copies[threadIdx.x];
    earlier.insert(earlier.end(), last.begin(), last.end());
    last = std::exchange(open, {});
}
inline void wait_for_earlier_copies() {
    for (const auto& [to, from] : std::exchange(cuda_on_host::copies[threadIdx.x].earlier, {})) *to = *from;
}
inline void wait_for_copies() {
    end_of_copies();
    end_of_copies();
    wait_for_earlier_copies();
}
inline int multiprocessors(const char*) { return cuda_on_host::multiprocessor_count; }
inline int block_shared_bytes(const char*) { return cuda_on_host::block_bytes; }

template <class... Parameters, class... Arguments>
void launch(const char*, void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared_bytes, cudaStream_t,
            Arguments... arguments) {
    namespace host = cuda_on_host;
    for (uint32_t z = 0; z < grid.z; ++z) {
        for (uint32_t y = 0; y < grid.y; ++y) {
            for (const uint32_t x : host::some_order(grid.x)) {
                host::block_index = {x, y, z};
                host::shared.reset(new uint4[(shared_bytes + 15) / 16]);
                std::memset(host::shared.get(), 0xff, (shared_bytes + 15) / 16 * 16);  // NaN, as what nobody wrote
                host::copies.clear();
                host::block.run(threads, [&] { kernel(arguments...); });
            }
        }
    }
}

}  // namespace sparse_moon::cuda
