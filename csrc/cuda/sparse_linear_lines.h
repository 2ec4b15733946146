// Lines (see sparse_linear_plan.h): how activations are rewritten in them, copied to shared memory and read from there.
#pragma once
#include "cuda/sparse_linear_plan.h"

namespace sparse_moon::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
constexpr int kTokens = kLineBytes / static_cast<int>(sizeof(T));  // of a line

template <class T>
constexpr int kLaneTokens = 16 / static_cast<int>(sizeof(T));

// The tokens that a lane reads, as fp32.
__device__ inline void unpack(const uint4& bits, float (&x)[4], const float*) {
    x[0] = __uint_as_float(bits.x);
    x[1] = __uint_as_float(bits.y);
    x[2] = __uint_as_float(bits.z);
    x[3] = __uint_as_float(bits.w);
}

__device__ inline void unpack(const uint4& bits, float (&x)[8], const __half*) {
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] & 0xffffu)));
        x[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] >> 16)));
    }
}

__device__ inline void unpack(const uint4& bits, float (&x)[8], const __nv_bfloat16*) {
    const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

template <class T>
__device__ void unpack_as(const uint4& bits, float (&x)[kLaneTokens<T>]) {
    unpack(bits, x, static_cast<const T*>(nullptr));
}

constexpr int kLinesThreads = 256, kLinesColumns = 64;

// Rewrites (tokens, columns) activations in lines; tokens beyond the last are zero. A block does 64 columns' lines.
template <class T>
__global__ __launch_bounds__(kLinesThreads) void write_lines(const T* input, int64_t tokens, int64_t columns,
                                                             int column_blocks, uint4* lines) {
    // two bytes more in fp32's words keep both the rows and the columns of the square free of bank conflicts
    constexpr int kStride = kLinesColumns + (sizeof(T) == 4 ? 1 : 2);
    T(*square)[kStride] = reinterpret_cast<T(*)[kStride]>(dynamic_shared());
    const int64_t tile = blockIdx.x / column_blocks;
    const int64_t first_column = static_cast<int64_t>(blockIdx.x % column_blocks) * kLinesColumns;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int t = warp; t < kTokens<T>; t += kLinesThreads / 32) {
        const int64_t token = tile * kTokens<T> + t;
        for (int c = lane; c < kLinesColumns; c += 32) {
            const bool inside = token < tokens && first_column + c < columns;
            square[t][c] = inside ? input[token * columns + first_column + c] : from_float<T>(0.0f);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kLinesColumns * kLineLanes; i += kLinesThreads) {
        const int c = i / kLineLanes, part = i % kLineLanes;
        if (first_column + c < columns) {
            struct alignas(16) {
                T token[kLaneTokens<T>];
            } mine;
#pragma unroll
            for (int k = 0; k < kLaneTokens<T>; ++k) mine.token[k] = square[part * kLaneTokens<T> + k][c];
            lines[(tile * columns + first_column + c) * kLineLanes + part] = *reinterpret_cast<const uint4*>(&mine);
        }
    }
}

// Copies the lines of a chunk to shared memory, between two barriers.
template <int kThreads>
__device__ void fill(uint4* shared, const uint4* lines, int columns) {
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < columns * kLineLanes; i += kThreads) copy_async(shared + i, lines + i);
    wait_for_copies();
    __syncthreads();
}

// First place in [begin, end) whose column is at least `bound`, or end.
__device__ inline int lower_bound(const int32_t* col, int begin, int end, int bound) {
    while (begin < end) {
        const int middle = begin + (end - begin) / 2;
        if (col[middle] < bound) {
            begin = middle + 1;
        } else {
            end = middle;
        }
    }
    return begin;
}

}  // namespace
}  // namespace sparse_moon::cuda
