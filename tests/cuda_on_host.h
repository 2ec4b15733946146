// Runs CUDA kernels of blocks of threads (cuda_block.h) on the host. The sanitizers see the kernels' own code, and
// dynamic shared memory has exactly the size that was asked for. Include it before the kernel's source.
#pragma once
#define SPARSE_MOON_CUDA_ON_HOST
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>

#include "cuda_block.h"

using std::max;
using std::min;

namespace cuda_on_host {

inline std::unique_ptr<uint4[]> shared;
inline int multiprocessor_count = 4;

struct Copy {
    uint4* to;
    const uint4* from;
    bool ends_group;  // and nothing else
};
inline std::map<uint32_t, std::vector<Copy>> copies;  // by thread, started and not waited for

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
    cuda_on_host::copies[threadIdx.x].push_back({shared, global, false});
}
inline void copy_now(bool all) {
    auto& copies = cuda_on_host::copies[threadIdx.x];
    size_t count = copies.size();
    while (!all && count > 0 && !copies[count - 1].ends_group) --count;  // since the last end of a group: none so far
    if (!all && count > 0) --count;
    while (!all && count > 0 && !copies[count - 1].ends_group) --count;  // the last group
    for (size_t i = 0; i < count; ++i) {
        if (copies[i].to) *copies[i].to = *copies[i].from;
    }
    copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(count));
}
inline void end_of_copies() { cuda_on_host::copies[threadIdx.x].push_back({nullptr, nullptr, true}); }
inline void wait_for_copies() { copy_now(true); }
inline void wait_for_earlier_copies() { copy_now(false); }
inline int multiprocessors(const char*) { return cuda_on_host::multiprocessor_count; }

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
