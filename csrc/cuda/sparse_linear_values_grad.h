// The kernels of the values' gradient.
#pragma once
#include "cuda/sparse_linear_lines.h"

namespace sparse_moon::cuda {
namespace {

// A step of the sum over the eight lanes of a group: of two numbers, a lane keeps the one of its half, for both halves.
__device__ inline float exchange(float low, float high, int part, int half) {
    const bool upper = part & half;
    const float other = __shfl_xor_sync(kAllLanes, upper ? low : high, half);
    return (upper ? high : low) + other;
}

// An item's dot products over the tokens of one tile: lane l returns that of entry l.
template <class T>
__device__ inline float item_sums(const uint4* shared, const uint4* offsets, const unsigned short* rows_and_lengths,
                                  const uint4* my_grad, int item, int part) {
    float g[kLaneTokens<T>];
    unpack_as<T>(__ldg(my_grad + rows_and_lengths[item] / 16 * kLineLanes), g);
    const uint4 lines = offsets[item];
    const auto dot = [&](unsigned line) {
        float x[kLaneTokens<T>];
        unpack_as<T>(shared[line * kLineLanes + part], x);
        float sum = g[0] * x[0];
#pragma unroll
        for (int k = 1; k < kLaneTokens<T>; ++k) sum = fmaf(g[k], x[k], sum);
        return sum;
    };
    // entries 0 and 4, 2 and 6, then 1 and 5, 3 and 7: an order in which few numbers wait for their partner
    const float even = exchange(exchange(dot(lines.x & 0xffffu), dot(lines.z & 0xffffu), part, 4),
                                exchange(dot(lines.y & 0xffffu), dot(lines.w & 0xffffu), part, 4), part, 2);
    const float odd = exchange(exchange(dot(lines.x >> 16), dot(lines.z >> 16), part, 4),
                               exchange(dot(lines.y >> 16), dot(lines.w >> 16), part, 4), part, 2);
    return exchange(even, odd, part, 1);
}

// A block computes, for one range of tokens, the gradients of the entries of some rows in one chunk of columns, in
// rounds of kItems items. Eight lanes do an item: each takes 16 bytes of tokens of up to eight dot products, their sums
// are exchanged, and lane l keeps the sum of entry l. Out is T where there is one range, else fp32 (splits, n).
template <class T, class Out>
__global__ __launch_bounds__(kGradThreads, kBlocksPerMultiprocessor) void values_grad(
    const uint4* grad_lines, const uint4* input_lines, const int32_t* ptr, const int32_t* col, int rows, int cols,
    int64_t n, int rows_per_block, int chunk_columns, int tiles, int tiles_per_split, Out* out) {
    uint4* offsets = dynamic_shared();  // of an item: eight line numbers of 16 bits
    int* entries = reinterpret_cast<int*>(offsets + kItems);
    auto* rows_and_lengths = reinterpret_cast<unsigned short*>(entries + kItems);
    uint4* shared = reinterpret_cast<uint4*>(rows_and_lengths + kItems);
    static_assert(kItems * kItemBytes % 16 == 0 && kItemBytes == 16 + 4 + 2, "as laid out here");

    const int first_column = blockIdx.x * chunk_columns, columns = min(chunk_columns, cols - first_column);
    const int first_row = blockIdx.y * rows_per_block, last_row = min(rows, first_row + rows_per_block);
    const int first_tile = blockIdx.z * tiles_per_split, last_tile = min(tiles, first_tile + tiles_per_split);
    const int thread = threadIdx.x, warp = thread / 32, part = thread % kLineLanes;

    // Nearly always there is one round; what a round needs is counted again for the next, to keep no registers for it.
    int base = 0, all_items = 0;
    do {
        // each thread counts the items of two rows; a prefix sum numbers them
        int begin[2], length[2], items = 0;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = first_row + 2 * thread + r;
            begin[r] = length[r] = 0;
            if (row < last_row) {
                const int end = ptr[row + 1];
                begin[r] = lower_bound(col, ptr[row], end, first_column);
                length[r] = lower_bound(col, begin[r], end, first_column + columns) - begin[r];
            }
            items += (length[r] + kItemEntries - 1) / kItemEntries;
        }
        int* counts = reinterpret_cast<int*>(shared);
        __syncthreads();
        counts[thread] = items;
        __syncthreads();
#pragma unroll 1
        for (int distance = 1; distance < kGradThreads; distance *= 2) {
            const int before = thread >= distance ? counts[thread - distance] : 0;
            __syncthreads();
            counts[thread] += before;
            __syncthreads();
        }
        all_items = counts[kGradThreads - 1];
        int slot = counts[thread] - items - base;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll 1
            for (int i = 0; i < length[r]; i += kItemEntries, ++slot) {
                if (slot >= 0 && slot < kItems) {
                    entries[slot] = begin[r] + i;
                    rows_and_lengths[slot] =
                        static_cast<unsigned short>((2 * thread + r) * 16 + min(kItemEntries, length[r] - i));
                }
            }
        }
        // whole warps work on items, so the last ones are filled up with empty items
        const int count = min(kItems, all_items - base);
        const int filled = (count + kSliceRows - 1) / kSliceRows * kSliceRows;
        if (thread < filled - count) {
            entries[count + thread] = 0;
            rows_and_lengths[count + thread] = 0;
        }
        __syncthreads();
#pragma unroll 1
        for (int i = thread; i < filled * kItemEntries; i += kGradThreads) {
            const int item = i / kItemEntries, j = i % kItemEntries;
            const int line = j < rows_and_lengths[item] % 16 ? col[entries[item] + j] - first_column : 0;
            reinterpret_cast<unsigned short*>(offsets)[i] = static_cast<unsigned short>(line);
        }

        // item i of these eight lanes is mine + i kAtOnce; the warp has `steps` of them
        constexpr int kAtOnce = kGradThreads / kLineLanes;
        const int mine = thread / kLineLanes, steps = (filled - warp * kSliceRows + kAtOnce - 1) / kAtOnce;
        float sum[kItemsPerLane] = {};
#pragma unroll 1
        for (int tile = first_tile; tile < last_tile; ++tile) {
            fill<kGradThreads>(shared, input_lines + (static_cast<int64_t>(tile) * cols + first_column) * kLineLanes,
                               columns);
            const uint4* my_grad = grad_lines + (static_cast<int64_t>(tile) * rows + first_row) * kLineLanes + part;
            // Sums in registers need constant places, but twenty copies of the loop's body would not fit the
            // instruction cache: so the sums move on by one place after each item, and end in their own.
#pragma unroll 1
            for (int i = 0; i < kItemsPerLane; ++i) {
                float first = sum[0];
                if (i < steps) {
                    first += item_sums<T>(shared, offsets, rows_and_lengths, my_grad, mine + i * kAtOnce, part);
                }
#pragma unroll
                for (int k = 0; k + 1 < kItemsPerLane; ++k) sum[k] = sum[k + 1];
                sum[kItemsPerLane - 1] = first;
            }
        }
#pragma unroll
        for (int i = 0; i < kItemsPerLane; ++i) {
            const int item = mine + i * kAtOnce;
            if (i < steps && part < rows_and_lengths[item] % 16) {
                out[blockIdx.z * n + entries[item] + part] = from_float<Out>(sum[i]);
            }
        }
        base += kItems;
    } while (base < all_items);
}

constexpr int kAddThreads = 256;

// values_grad = the sum of the partial sums (splits, n), in order.
template <class T>
__global__ __launch_bounds__(kAddThreads) void add_partials(const float* partials, int splits, int64_t n,
                                                            T* values_grad) {
    const int64_t entry = static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x;
    if (entry >= n) return;
    float sum = partials[entry];
    for (int s = 1; s < splits; ++s) sum += partials[s * n + entry];
    values_grad[entry] = from_float<T>(sum);
}

// A gradient of no tokens.
template <class T>
__global__ __launch_bounds__(kAddThreads) void set_zero(T* x, int64_t n) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x;
    if (i < n) x[i] = from_float<T>(0.0f);
}

}  // namespace
}  // namespace sparse_moon::cuda
