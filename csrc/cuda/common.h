#pragma once
// What every CUDA kernel here shares: macros for code that also runs on the host, dtypes, and the launch with its error
// check. Without nvcc only the macros and the declarations remain, so that headers with host logic compile anywhere.
// A test may define SPARSE_MOON_CUDA_ON_HOST and bring its own launch, thread indices, barriers and shuffles, to run
// kernels block by block on the host (tests/cuda_on_host.h).
#include <cstddef>
#include <cstdint>

#include "host_device.h"

#if defined(__CUDACC__) || defined(SPARSE_MOON_CUDA_ON_HOST)
#define SPARSE_MOON_CUDA_KERNELS
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#ifdef __CUDACC__
#include <stdexcept>
#include <string>
#endif

using cudaStream_t = struct CUstream_st*;

namespace sparse_moon::cuda {

enum class DType { float32, float16, bfloat16 };

SPARSE_MOON_HOST_DEVICE constexpr int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

SPARSE_MOON_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

SPARSE_MOON_HOST_DEVICE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

#ifdef __CUDACC__

// Throws std::runtime_error that names the operator.
inline void check(cudaError_t error, const char* op) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

// Multiprocessors of the current device.
inline int multiprocessors(const char* op) {
    int device = 0, count = 0;
    check(cudaGetDevice(&device), op);
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), op);
    return count;
}

// Bytes of shared memory that a block of the current device may ask for.
inline int block_shared_bytes(const char* op) {
    int device = 0, bytes = 0;
    check(cudaGetDevice(&device), op);
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), op);
    return bytes;
}

// Launches kernel(arguments...) with as much dynamic shared memory as asked for, up to the chip's limit for a block.
// Nothing is launched where the grid is empty.
template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared_bytes,
            cudaStream_t stream, Arguments... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    constexpr size_t kWithoutOptIn = 48 * 1024;
    if (shared_bytes > kWithoutOptIn) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(shared_bytes)),
              op);
    }
    kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
    check(cudaGetLastError(), op);
}

// The block's dynamic shared memory.
__device__ inline uint4* dynamic_shared() {
    extern __shared__ uint4 memory[];
    return memory;
}

// Starts copying 16 bytes from global to shared memory. wait_for_copies waits for all that this thread has started,
// wait_for_earlier_copies for all but those of its last end_of_copies.
__device__ inline void copy_async(uint4* shared, const uint4* global) {
    const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
__device__ inline void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ inline void wait_for_earlier_copies() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

#endif  // __CUDACC__

#ifdef SPARSE_MOON_CUDA_KERNELS

// Calls f with a null pointer to the C++ type of the dtype:
//   dispatch(dtype, [&](auto* type) { using T = std::remove_pointer_t<decltype(type)>; ... });
template <class F>
void dispatch(DType dtype, F f) {
    switch (dtype) {
        case DType::float32: return f(static_cast<float*>(nullptr));
        case DType::float16: return f(static_cast<__half*>(nullptr));
        case DType::bfloat16: return f(static_cast<__nv_bfloat16*>(nullptr));
    }
}

// Conversions from and to fp32, the type everything is accumulated in.
__host__ __device__ inline float to_float(float x) { return x; }
__host__ __device__ inline float to_float(__half x) { return __half2float(x); }
__host__ __device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__host__ __device__ inline T from_float(float x);
template <>
__host__ __device__ inline float from_float<float>(float x) {
    return x;
}
template <>
__host__ __device__ inline __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__host__ __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

#endif  // SPARSE_MOON_CUDA_KERNELS

}  // namespace sparse_moon::cuda
