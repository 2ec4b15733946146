// The kernels of the product: the packed copy of the nonzeros, and what multiplies by it.
#pragma once
#include "cuda/sparse_linear_lines.h"

namespace sparse_moon::cuda {
namespace {

constexpr int kPackThreads = 128;

// One warp a slice: copies the entries of four rows as (offset, value) pairs, chunk by chunk. A group holds for each of
// the rows the pairs of two steps; a row that is shorter than the longest ends in zeros times the line of zeros.
template <class T>
__global__ __launch_bounds__(kPackThreads) void pack_pairs(const int32_t* ptr, const int32_t* col, const int32_t* perm,
                                                           const T* values, int rows, int slices, int chunks,
                                                           int chunk_columns, int32_t* group_ptr, uint2* pairs) {
    const int slice = blockIdx.x * (kPackThreads / 32) + threadIdx.x / 32;
    if (slice >= slices) return;
    const int lane = threadIdx.x % 32, part = lane % kLineLanes, sub = lane / kLineLanes;
    const int row = slice * kSliceRows + sub;
    int position = ptr[min(row, rows)];
    const int end = ptr[min(row + 1, rows)];
    int group = static_cast<int>(first_group(slice, ptr[slice * kSliceRows], chunks));
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const int first_column = chunk * chunk_columns;
        const int stop = chunk + 1 < chunks ? lower_bound(col, position, end, first_column + chunk_columns) : end;
        const int length = stop - position;
        int longest = max(length, __shfl_xor_sync(kAllLanes, length, kLineLanes));
        longest = max(longest, __shfl_xor_sync(kAllLanes, longest, 2 * kLineLanes));
        const int groups = max(1, (longest + kGroupSteps - 1) / kGroupSteps);
        if (lane == 0) group_ptr[static_cast<int64_t>(slice) * (chunks + 1) + chunk] = group;
        for (int step = part; step < groups * kGroupSteps; step += kLineLanes) {
            uint2 pair = {static_cast<unsigned>(chunk_columns) * kLineBytes, 0u};
            if (step < length) {
                const int entry = position + step;
                pair.x = static_cast<unsigned>(col[entry] - first_column) * kLineBytes;
                pair.y = __float_as_uint(to_float(values[perm ? perm[entry] : entry]));
            }
            const int64_t place = static_cast<int64_t>(group + step / kGroupSteps) * kGroupPairs;
            pairs[place + sub * kGroupSteps + step % kGroupSteps] = pair;
        }
        group += groups;
        position = stop;
    }
    if (lane == 0) group_ptr[static_cast<int64_t>(slice) * (chunks + 1) + chunks] = group;
}

// The two nonzeros of a group that belong to this lane's row: sum += value * line.
template <class T>
__device__ inline void multiply_add(const unsigned char* shared, const uint4& two, float (&sum)[kLaneTokens<T>]) {
    const uint4 first = *reinterpret_cast<const uint4*>(shared + two.x);
    const uint4 second = *reinterpret_cast<const uint4*>(shared + two.z);
    float x[kLaneTokens<T>];
    unpack_as<T>(first, x);
#pragma unroll
    for (int k = 0; k < kLaneTokens<T>; ++k) sum[k] = fmaf(__uint_as_float(two.y), x[k], sum[k]);
    unpack_as<T>(second, x);
#pragma unroll
    for (int k = 0; k < kLaneTokens<T>; ++k) sum[k] = fmaf(__uint_as_float(two.w), x[k], sum[k]);
}

// A block computes one token tile of kSlices * kLinearWarps slices. In each warp, four groups of eight lanes work on
// the four rows of a slice, each lane on 16 bytes of tokens; the sums of the warp's kSlices slices stay in registers.
template <class T, int kSlices>
__global__ __launch_bounds__(kLinearThreads, kBlocksPerMultiprocessor) void multiply(
    const uint4* lines, const int32_t* group_ptr, const uint4* pairs, const T* bias, int64_t tokens, int rows, int cols,
    int slices, int row_groups, int chunks, int chunk_columns, T* output) {
    constexpr int kRows = kSlices * kLinearWarps * kSliceRows;
    constexpr int kBatchLanes = kBatchGroups * kSliceRows;  // 16 bytes each
    static_assert(kBatches == 2 && kBatchLanes <= 32, "a warp turns from one to the other, and copies one at once");
    uint4* shared = dynamic_shared();
    const int64_t tile = blockIdx.x / row_groups;
    const int row_group = static_cast<int>(blockIdx.x % row_groups);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane % kLineLanes, sub = lane / kLineLanes;
    const int first_slice = row_group * (kRows / kSliceRows) + warp;
    const unsigned char* my_shared = reinterpret_cast<const unsigned char*>(shared + part);
    uint4* batches = shared + (chunk_columns + 1) * kLineLanes + warp * kBatches * kBatchLanes;
    lines += tile * cols * kLineLanes;
    // The pairs come from L2, which takes longer to answer than the warps of a multiprocessor to compute a group each:
    // so they are asked for a batch ahead, and wait in shared memory.
    int newest = 0;
    const auto ask_for = [&](int group) {
        newest ^= kBatchLanes;
        if (lane < kBatchLanes) {
            copy_async(batches + newest + lane, pairs + static_cast<int64_t>(group) * kSliceRows + lane);
        }
        end_of_copies();
    };

    if (threadIdx.x < kLineLanes) shared[chunk_columns * kLineLanes + threadIdx.x] = uint4{0, 0, 0, 0};
    float sum[kSlices][kLaneTokens<T>] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const int first_column = chunk * chunk_columns;
        // The bounds of one slice are read ahead of their use too; every slice has a group.
        const auto bounds_of = [&](int slice) {
            return group_ptr + static_cast<int64_t>(slice) * (chunks + 1) + chunk;
        };
        int begin = 0, end = 0;
        if (first_slice < slices) {
            const int32_t* bounds = bounds_of(first_slice);
            begin = bounds[0];
            end = bounds[1];
            ask_for(begin);
        }
        fill<kLinearThreads>(shared, lines + static_cast<int64_t>(first_column) * kLineLanes,
                             min(chunk_columns, cols - first_column));
        if (first_slice >= slices) continue;
#pragma unroll
        for (int i = 0; i < kSlices; ++i) {
            if (first_slice + i * kLinearWarps >= slices) break;
            int next_begin = begin, next_end = end;
            if (i + 1 < kSlices && first_slice + (i + 1) * kLinearWarps < slices) {
                const int32_t* bounds = bounds_of(first_slice + (i + 1) * kLinearWarps);
                next_begin = bounds[0];
                next_end = bounds[1];
            }
#pragma unroll 1
            do {
                const uint4* two = batches + newest + sub;
                const int count = min(kBatchGroups, end - begin);
                begin += count;
                ask_for(begin < end ? begin : next_begin);
                wait_for_earlier_copies();
                __syncwarp();
#pragma unroll 1
                for (int g = 0; g < count; ++g) multiply_add<T>(my_shared, two[g * kSliceRows], sum[i]);
                __syncwarp();
            } while (begin < end);
            begin = next_begin;
            end = next_end;
        }
    }

    // Through shared memory to rows of outputs; one float beside each token's row keeps the writes free of conflicts.
    wait_for_copies();
    __syncthreads();
    float(*square)[kRows + 1] = reinterpret_cast<float(*)[kRows + 1]>(shared);
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
#pragma unroll
        for (int k = 0; k < kLaneTokens<T>; ++k) {
            square[part * kLaneTokens<T> + k][(i * kLinearWarps + warp) * kSliceRows + sub] = sum[i][k];
        }
    }
    __syncthreads();
    const int first_row = row_group * kRows, count = min(kRows, rows - first_row);
    for (int t = warp; t < kTokens<T>; t += kLinearWarps) {
        const int64_t token = tile * kTokens<T> + t;
        if (token >= tokens) break;
        for (int r = lane; r < count; r += 32) {
            const float b = bias ? to_float(bias[first_row + r]) : 0.0f;
            output[token * rows + first_row + r] = from_float<T>(square[t][r] + b);
        }
    }
}

}  // namespace
}  // namespace sparse_moon::cuda
