#include "cuda/sparse_linear.h"

#include <climits>
#include <stdexcept>
#include <type_traits>

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

template <class T>
void to_lines(const char* op, const void* input, int64_t tokens, int64_t columns, uint4* lines, cudaStream_t stream) {
    const int64_t column_blocks = ceil_div(columns, kLinesColumns);
    const int64_t blocks = ceil_div(tokens, kTokens<T>) * column_blocks;
    const size_t shared = kTokens<T> * (kLinesColumns + 2) * sizeof(T);
    launch(op, write_lines<T>, dim3(static_cast<unsigned>(blocks)), kLinesThreads, shared, stream,
           static_cast<const T*>(input), tokens, columns, static_cast<int>(column_blocks), lines);
}

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

// Copies the lines of a chunk to shared memory, between two barriers.
template <int kThreads>
__device__ void fill(uint4* shared, const uint4* lines, int columns) {
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < columns * kLineLanes; i += kThreads) copy_async(shared + i, lines + i);
    wait_for_copies();
    __syncthreads();
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

template <class T>
T* part_of(void* workspace, int64_t offset) {
    return reinterpret_cast<T*>(static_cast<unsigned char*>(workspace) + offset);
}

// Shapes that 32-bit places or the grid cannot hold.
void check_limits(const char* op, int64_t rows, int64_t cols, int64_t n, int64_t blocks) {
    constexpr int64_t kLimit = INT_MAX;
    if (rows > kLimit / 2 || cols > kLimit / 2 || n > kLimit / 2 || blocks > kLimit) {
        throw std::length_error(std::string(op) + ": a shape is too large for 32-bit indices");
    }
}

constexpr const char* kProduct = "sparse_linear";
constexpr const char* kValuesGrad = "sparse_linear_values_grad";

template <class T>
void product(const ProductPlan& plan, int64_t tokens, const SparseRows& w, const T* values, const T* bias,
             const void* input, T* output, void* workspace, cudaStream_t stream) {
    constexpr int kLargeSlices = 32 / kLaneTokens<T>;
    auto* lines = part_of<uint4>(workspace, 0);
    auto* group_ptr = part_of<int32_t>(workspace, plan.pointers);
    auto* pairs = part_of<uint2>(workspace, plan.pairs);
    const int rows = static_cast<int>(w.rows), cols = static_cast<int>(w.cols), slices = static_cast<int>(plan.slices);
    const int chunks = static_cast<int>(plan.chunks.count), chunk_columns = static_cast<int>(plan.chunks.columns);

    to_lines<T>(kProduct, input, tokens, w.cols, lines, stream);
    launch(kProduct, pack_pairs<T>, dim3(static_cast<unsigned>(ceil_div(slices, kPackThreads / 32))), kPackThreads, 0,
           stream, w.ptr, w.col, w.perm, values, rows, slices, chunks, chunk_columns, group_ptr, pairs);
    launch(kProduct, plan.large ? multiply<T, kLargeSlices> : multiply<T, kLargeSlices / 4>,
           dim3(static_cast<unsigned>(plan.tiles * plan.row_groups)), kLinearThreads, plan.shared_bytes, stream, lines,
           group_ptr, reinterpret_cast<const uint4*>(pairs), bias, tokens, rows, cols, slices,
           static_cast<int>(plan.row_groups), chunks, chunk_columns, output);
}

template <class T>
void gradient(const ValuesGradPlan& plan, int64_t tokens, const SparseRows& w, const void* grad, const void* input,
              T* out, void* workspace, cudaStream_t stream) {
    auto* grad_lines = part_of<uint4>(workspace, 0);
    auto* input_lines = part_of<uint4>(workspace, plan.input_lines);
    auto* partials = part_of<float>(workspace, plan.partials);
    to_lines<T>(kValuesGrad, grad, tokens, w.rows, grad_lines, stream);
    to_lines<T>(kValuesGrad, input, tokens, w.cols, input_lines, stream);
    const auto start = [&](auto* sums) {
        using Out = std::remove_pointer_t<decltype(sums)>;
        launch(kValuesGrad, values_grad<T, Out>,
               dim3(static_cast<unsigned>(plan.chunks.count), static_cast<unsigned>(plan.row_blocks),
                    static_cast<unsigned>(plan.splits)),
               kGradThreads, plan.shared_bytes, stream, grad_lines, input_lines, w.ptr, w.col,
               static_cast<int>(w.rows), static_cast<int>(w.cols), w.n, static_cast<int>(plan.rows_per_block),
               static_cast<int>(plan.chunks.columns), static_cast<int>(plan.tiles),
               static_cast<int>(plan.tiles_per_split), sums);
    };
    if (plan.splits == 1) return start(out);
    start(partials);
    launch(kValuesGrad, add_partials<T>, dim3(static_cast<unsigned>(ceil_div(w.n, kAddThreads))), kAddThreads, 0,
           stream, partials, static_cast<int>(plan.splits), w.n, out);
}

// A gradient of no tokens.
template <class T>
__global__ __launch_bounds__(kAddThreads) void set_zero(T* x, int64_t n) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x;
    if (i < n) x[i] = from_float<T>(0.0f);
}

}  // namespace

int64_t sparse_product_workspace(DType dtype, int64_t tokens, int64_t rows, int64_t cols, int64_t n) {
    return product_plan(dtype, tokens, rows, cols, n, multiprocessors(kProduct)).workspace_bytes;
}

void sparse_product(DType dtype, int64_t tokens, const SparseRows& weight, const void* values, const void* bias,
                    const void* input, void* output, void* workspace, cudaStream_t stream) {
    if (tokens == 0 || weight.rows == 0) return;
    const ProductPlan plan =
        product_plan(dtype, tokens, weight.rows, weight.cols, weight.n, multiprocessors(kProduct));
    const int64_t lines_blocks = plan.tiles * ceil_div(weight.cols, kLinesColumns);
    check_limits(kProduct, weight.rows, weight.cols, weight.n,
                 std::max(lines_blocks, plan.tiles * plan.row_groups));
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        product<T>(plan, tokens, weight, static_cast<const T*>(values), static_cast<const T*>(bias), input,
                   static_cast<T*>(output), workspace, stream);
    });
}

int64_t sparse_values_grad_workspace(DType dtype, int64_t tokens, int64_t rows, int64_t cols, int64_t n) {
    return values_grad_plan(dtype, tokens, rows, cols, n, multiprocessors(kValuesGrad)).workspace_bytes;
}

void sparse_values_grad(DType dtype, int64_t tokens, const SparseRows& weight, const void* grad, const void* input,
                        void* values_grad, void* workspace, cudaStream_t stream) {
    if (weight.n == 0) return;
    const ValuesGradPlan plan =
        values_grad_plan(dtype, tokens, weight.rows, weight.cols, weight.n, multiprocessors(kValuesGrad));
    const int64_t lines_blocks = plan.tiles * ceil_div(std::max(weight.rows, weight.cols), kLinesColumns);
    check_limits(kValuesGrad, weight.rows, weight.cols, weight.n,
                 std::max(lines_blocks, plan.chunks.count * plan.row_blocks * plan.splits));
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        auto* out = static_cast<T*>(values_grad);
        if (tokens == 0) {
            launch(kValuesGrad, set_zero<T>, dim3(static_cast<unsigned>(ceil_div(weight.n, kAddThreads))), kAddThreads,
                   0, stream, out, weight.n);
        } else {
            gradient<T>(plan, tokens, weight, grad, input, out, workspace, stream);
        }
    });
}

}  // namespace sparse_moon::cuda
