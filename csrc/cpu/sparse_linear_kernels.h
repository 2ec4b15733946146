// The linear layer's inner loops for one instruction set: the convolution's, with tokens in the lanes and groups of
// kLanes tokens as the positions of a tile. Threads pack a block of up to kTile groups together into one panel
// [features][groups][kLanes], then divide the outputs among themselves, so that results do not depend on their number.
//
// A panel of many features outgrows the L2 cache, where every entry would wait for L3. Features are therefore taken in
// chunks that fit, and sums wait in a second panel between chunks.
#pragma once
#include "panel.h"
#include "tile_kernels.h"

namespace sparse_moon {
namespace SPARSE_MOON_ISA {

constexpr int64_t kChunkBytes = 640 << 10;
constexpr int64_t kChunkFeatures = 1024;  // longer sums would round worse than those of a blocked dense product

// Tokens of one block, and the panels' geometry that follows.
struct TokenBlocks {
    int64_t count;   // blocks
    int64_t groups;  // groups of kLanes tokens a block, at most kTile
    int64_t stride;  // vectors between features, odd
};

inline TokenBlocks token_blocks(int64_t tokens) {
    const int64_t groups = larger((tokens + kLanes - 1) / kLanes, 1), count = (groups + kTile - 1) / kTile;
    const int64_t each = (groups + count - 1) / count;
    return {count, each, odd(each)};
}

// Features a chunk: whole blocks of the matrix.
inline int64_t chunk_features(int64_t features, int64_t block, int64_t stride) {
    const int64_t fitting = smaller(kChunkBytes / (stride * kVecBytes), kChunkFeatures);
    const int64_t chunks = larger((features + fitting - 1) / fitting, 1);
    return larger(((features + chunks - 1) / chunks + block - 1) / block * block, block);
}

// Tokens [first, first + groups kLanes) of features [begin, end) into a panel; tokens past the end become zeros.
inline void pack_tokens(const float* x, int64_t tokens, int64_t features, int64_t first, const TokenBlocks& blocks,
                        int64_t begin, int64_t end, float* panel) {
    for (int64_t f = begin; f < end; f += kLanes) {
        const int count = static_cast<int>(smaller(kLanes, end - f));
        for (int64_t g = 0; g < blocks.groups; ++g) {
            const int64_t token = first + g * kLanes;
            const float* start = x + token * features + f;
            Vec rows[kLanes];
            if (count == kLanes && token + kLanes <= tokens) {
#pragma GCC unroll 16
                for (int l = 0; l < kLanes; ++l) rows[l] = load_unaligned(start + l * features);
            } else {
#pragma GCC unroll 1
                for (int l = 0; l < kLanes; ++l) {
                    rows[l] = token + l < tokens ? load_range(start + l * features, 0, count) : Vec{};
                }
            }
            transpose(rows);
            alignas(64) float buffer[kLanes * kLanes];
            float* out = panel + (f * blocks.stride + g) * kLanes;
            if (count == kLanes) {
#pragma GCC unroll 16
                for (int k = 0; k < kLanes; ++k) store(out + k * blocks.stride * kLanes, rows[k]);
            } else {
#pragma GCC unroll 16
                for (int k = 0; k < kLanes; ++k) store(buffer + k * kLanes, rows[k]);
                for (int k = 0; k < count; ++k) store(out + k * blocks.stride * kLanes, load(buffer + k * kLanes));
            }
        }
    }
}

// Up to kLanes outputs [outputs][groups] vectors to y (tokens, total outputs), from output `first_output` on.
inline void unpack_tokens(const float* tile, int64_t outputs, const TokenBlocks& blocks, int64_t first, int64_t tokens,
                          int64_t first_output, int64_t total, float* y) {
    const int count = static_cast<int>(outputs);
    for (int64_t g = 0; g < blocks.groups; ++g) {
        Vec columns[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) columns[i] = i < count ? load(tile + (i * blocks.groups + g) * kLanes) : Vec{};
        transpose(columns);
        alignas(64) float buffer[kLanes * kLanes];
#pragma GCC unroll 16
        for (int l = 0; l < kLanes; ++l) store(buffer + l * kLanes, columns[l]);
        const int64_t token = first + g * kLanes;
        for (int64_t l = 0; l < smaller(kLanes, tokens - token); ++l) {
            float* out = y + (token + l) * total + first_output;
            if (count == kLanes) {
                store_unaligned(out, load(buffer + l * kLanes));
            } else {
                store_first(out, load(buffer + l * kLanes), count);
            }
        }
    }
}

// A matrix, or its transpose, as rows of weights over features.
struct Rows {
    const SparseMatrix& matrix;
    bool transposed;

    int64_t count() const { return transposed ? matrix.cols : matrix.rows; }
    int64_t features() const { return transposed ? matrix.rows : matrix.cols; }
    int64_t block() const { return transposed ? matrix.block_cols : matrix.block_rows; }          // rows of a block
    int64_t feature_block() const { return transposed ? matrix.block_rows : matrix.block_cols; }  // features of it
    const int32_t* starts() const { return transposed ? matrix.t_ptr : matrix.row_ptr; }          // of each block row
    const int32_t* columns() const { return transposed ? matrix.t_row : matrix.col; }             // of each entry

    // Cost of all rows before `row`, in entries; a row itself costs about as much as four.
    int64_t cost(int64_t row) const {
        const int64_t size = matrix.block_rows * matrix.block_cols, whole = row / block(), part = row % block();
        int64_t entries = starts()[whole] * size;
        if (part > 0) entries += (starts()[whole + 1] - starts()[whole]) * feature_block() * part;
        return entries + 4 * row;
    }

    // First row of part `part` of `parts` about equally costly ones, a multiple of kLanes.
    int64_t part_begin(int part, int parts) const {
        const int64_t groups = (count() + kLanes - 1) / kLanes;
        if (part == parts) return groups * kLanes;
        const int64_t wanted = cost(count()) * part / parts;
        int64_t low = 0, high = groups;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (cost(smaller(middle * kLanes, count())) < wanted) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return low * kLanes;
    }

    // Blocks of `row` from *cursor on that start before feature `end`; moves the cursor behind them.
    int64_t advance(int64_t row, int64_t end, int32_t* cursor) const {
        const int32_t first = *cursor, last = starts()[row / block() + 1];
        int32_t k = last;
        if (end < features()) {
            const int32_t bound = static_cast<int32_t>(end / feature_block());
            int32_t size = last - first;
            for (k = first; size > 0;) {
                const int32_t half = (size + 1) / 2;
                k += columns()[k + half - 1] < bound ? half : 0;
                size -= half;
            }
        }
        *cursor = k;
        return k - first;
    }

    // The entries of blocks [first, first + blocks) of `row`, for a panel with `bytes` between features.
    int64_t list(int64_t row, int64_t first, int64_t blocks, int64_t bytes, Entry* entry) const {
        const int64_t bh = matrix.block_rows, bw = matrix.block_cols, within = row % block(), width = feature_block();
        for (int64_t k = first; k < first + blocks; ++k) {
            const int64_t place = transposed ? matrix.t_perm[k] * bh * bw + within : (k * bh + within) * bw;
            const int64_t step = transposed ? bw : 1;
            for (int64_t j = 0; j < width; ++j) {
                const int64_t feature = columns()[k] * width + j;
                *entry++ = {static_cast<int32_t>(feature * bytes), matrix.values[place + j * step]};
            }
        }
        return blocks * width;
    }

    // Blocks [first, first + blocks) of `row` as a tile takes them.
    void entries(int64_t, int64_t first, int64_t blocks, int64_t bytes, Entry*, MatrixRow* out) const {
        *out = {matrix.col + first, matrix.values + first, blocks, bytes};
    }
    void entries(int64_t, int64_t first, int64_t blocks, int64_t bytes, Entry*, MatrixColumn* out) const {
        *out = {matrix.t_row + first, matrix.t_perm + first, matrix.values, blocks, bytes};
    }
    void entries(int64_t row, int64_t first, int64_t blocks, int64_t bytes, Entry* scratch, EntryList* out) const {
        *out = {scratch, list(row, first, blocks, bytes, scratch)};
    }
};

// Scratch memory: the panel, the sums between chunks (all rows, or a group for each thread where there is one chunk),
// a list a thread, a cursor a row.
struct LinearPlan {
    TokenBlocks blocks;
    int64_t chunk;  // features
    bool chunked;
    int64_t panel, sums, lists, cursors;  // bytes
    int64_t bytes() const { return panel + sums + lists + cursors; }
};

inline int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

inline LinearPlan linear_plan(const LinearJob& job) {
    const Rows rows{job.matrix, job.transposed};
    LinearPlan plan;
    plan.blocks = token_blocks(job.tokens);
    plan.chunk = chunk_features(rows.features(), rows.feature_block(), plan.blocks.stride);
    plan.chunked = plan.chunk < rows.features();
    plan.panel = rows.features() * plan.blocks.stride * kVecBytes;
    const int64_t padded = (rows.count() + kLanes - 1) / kLanes * kLanes;
    plan.sums = (plan.chunked ? padded : job.threads * kLanes) * plan.blocks.groups * kVecBytes;
    plan.lists = job.threads * whole_lines(smaller(plan.chunk, rows.features()) * sizeof(Entry));
    plan.cursors = whole_lines(rows.count() * sizeof(int32_t));
    return plan;
}

inline int64_t linear_scratch(const LinearJob& job) { return linear_plan(job).bytes(); }

template <class Entries>
void linear_with(const LinearJob& job) {
    const Rows rows{job.matrix, job.transposed};
    const LinearPlan plan = linear_plan(job);
    const TokenBlocks& blocks = plan.blocks;
    const int64_t features = rows.features(), count = rows.count(), feature_bytes = blocks.stride * kVecBytes;
    const int64_t feature_groups = (features + kLanes - 1) / kLanes;
    float* panel = reinterpret_cast<float*>(job.scratch);
    const ProductKernel<Entries> from_bias = product_row_kernel<Start::kConstant, Entries>(blocks.groups);
    const ProductKernel<Entries> from_stored = product_row_kernel<Start::kStored, Entries>(blocks.groups);
#pragma omp parallel num_threads(job.threads)
    {
        const int thread = thread_number(), threads = team_size();
        const int64_t begin = rows.part_begin(thread, threads), end = rows.part_begin(thread + 1, threads);
        float* all_sums = reinterpret_cast<float*>(job.scratch + plan.panel);
        float* sums = all_sums + (plan.chunked ? begin : thread * kLanes) * blocks.groups * kLanes;
        char* after_sums = job.scratch + plan.panel + plan.sums;
        Entry* list = reinterpret_cast<Entry*>(after_sums + plan.lists / job.threads * thread);
        int32_t* cursors = reinterpret_cast<int32_t*>(after_sums + plan.lists);
        // With one chunk, rows are finished in groups that are transposed while they are in the L1 cache.
        const int64_t span = plan.chunked ? larger(end - begin, 1) : kLanes;
        ProductTile<Entries> tile{};
        tile.panel = reinterpret_cast<const char*>(panel);
        tile.out_step = 1;
        for (int64_t block = 0; block < blocks.count; ++block) {
            const int64_t token = block * blocks.groups * kLanes;
            pack_tokens(job.input, job.tokens, features, token, blocks, feature_groups * thread / threads * kLanes,
                        smaller(feature_groups * (thread + 1) / threads * kLanes, features), panel);
            for (int64_t row = begin; row < smaller(end, count); ++row) {
                cursors[row] = rows.starts()[row / rows.block()];
            }
#pragma omp barrier
            for (int64_t first = begin; first < end; first += span) {
                const int64_t last = smaller(smaller(first + span, end), count);
                for (int64_t base = 0; base == 0 || base < features; base += plan.chunk) {
                    const ProductKernel<Entries> kernel = base == 0 ? from_bias : from_stored;
                    for (int64_t row = first; row < last; ++row) {
                        const int64_t start = cursors[row];
                        const int64_t found = rows.advance(row, base + plan.chunk, cursors + row);
                        if (found == 0 && base > 0) continue;
                        rows.entries(row, start, found, feature_bytes, list, &tile.entries);
                        tile.initial = job.bias ? job.bias[row] : 0.0f;
                        tile.out = sums + (row - first) * blocks.groups * kLanes;
                        kernel(tile);
                    }
                }
                for (int64_t row = first; row < last; row += kLanes) {
                    unpack_tokens(sums + (row - first) * blocks.groups * kLanes, smaller(kLanes, last - row), blocks,
                                  token, job.tokens, row, count, job.output);
                }
            }
#pragma omp barrier
        }
    }
}

inline void linear(const LinearJob& job) {
    if (job.matrix.block_rows * job.matrix.block_cols > 1) return linear_with<EntryList>(job);
    return job.transposed ? linear_with<MatrixColumn>(job) : linear_with<MatrixRow>(job);
}

// Scratch memory: a panel of the input, one of the gradient, and for each thread the offsets and sums of one row.
struct LinearDotsPlan {
    TokenBlocks blocks;
    int64_t chunk;
    int64_t panel, grad, lists, cursors;  // bytes
    int64_t bytes() const { return panel + grad + lists + cursors; }
};

inline LinearDotsPlan linear_dots_plan(const LinearDotsJob& job) {
    LinearDotsPlan plan;
    plan.blocks = token_blocks(job.tokens);
    plan.chunk = chunk_features(job.matrix.cols, job.matrix.block_cols, plan.blocks.stride);
    plan.panel = job.matrix.cols * plan.blocks.stride * kVecBytes;
    plan.grad = job.matrix.rows * plan.blocks.stride * kVecBytes;
    plan.lists = job.threads * whole_lines(smaller(plan.chunk, job.matrix.cols) * (sizeof(int32_t) + sizeof(float)));
    plan.cursors = whole_lines(job.matrix.rows * sizeof(int32_t));
    return plan;
}

inline int64_t linear_dots_scratch(const LinearDotsJob& job) { return linear_dots_plan(job).bytes(); }

inline void linear_dots(const LinearDotsJob& job) {
    const SparseMatrix& matrix = job.matrix;
    const Rows rows{matrix, false};
    const LinearDotsPlan plan = linear_dots_plan(job);
    const TokenBlocks& blocks = plan.blocks;
    const int64_t bh = matrix.block_rows, bw = matrix.block_cols;
    const int64_t input_groups = (matrix.cols + kLanes - 1) / kLanes, grad_groups = (matrix.rows + kLanes - 1) / kLanes;
    const int64_t total = matrix.row_ptr[matrix.rows / bh] * bh * bw;
    float* panel = reinterpret_cast<float*>(job.scratch);
    float* grad = reinterpret_cast<float*>(job.scratch + plan.panel);
#pragma omp parallel num_threads(job.threads)
    {
        const int thread = thread_number(), threads = team_size();
        const int64_t begin = rows.part_begin(thread, threads);
        const int64_t end = smaller(rows.part_begin(thread + 1, threads), matrix.rows);
        char* lists = job.scratch + plan.panel + plan.grad;
        int32_t* offsets = reinterpret_cast<int32_t*>(lists + plan.lists / job.threads * thread);
        float* row_sums = reinterpret_cast<float*>(offsets + smaller(plan.chunk, matrix.cols));
        int32_t* cursors = reinterpret_cast<int32_t*>(lists + plan.lists);
        const int64_t zero_begin = total * thread / threads, zero_end = total * (thread + 1) / threads;
        for (int64_t k = zero_begin; k < zero_end; ++k) job.sums[k] = 0.0f;
        DotTile tile{};
        tile.panel = reinterpret_cast<const char*>(panel);
        tile.rows = 1;
        tile.cols = blocks.groups;
        tile.panel_step = kVecBytes;
        for (int64_t block = 0; block < blocks.count; ++block) {
            const int64_t token = block * blocks.groups * kLanes;
            pack_tokens(job.input, job.tokens, matrix.cols, token, blocks, input_groups * thread / threads * kLanes,
                        smaller(input_groups * (thread + 1) / threads * kLanes, matrix.cols), panel);
            pack_tokens(job.grad, job.tokens, matrix.rows, token, blocks, grad_groups * thread / threads * kLanes,
                        smaller(grad_groups * (thread + 1) / threads * kLanes, matrix.rows), grad);
            for (int64_t row = begin; row < end; ++row) cursors[row] = matrix.row_ptr[row / bh];
#pragma omp barrier
            for (int64_t base = 0; base < matrix.cols; base += plan.chunk) {
                for (int64_t row = begin; row < end; ++row) {
                    const int64_t start = cursors[row];
                    const int64_t found = rows.advance(row, base + plan.chunk, cursors + row);
                    if (found == 0) continue;
                    tile.grad = reinterpret_cast<const char*>(grad + row * blocks.stride * kLanes);
                    const int32_t bytes = static_cast<int32_t>(blocks.stride * kVecBytes);
                    if (bh * bw == 1) {
                        for (int64_t k = 0; k < found; ++k) offsets[k] = matrix.col[start + k] * bytes;
                        dot_all(tile, 1, offsets, job.sums + start, found);
                        continue;
                    }
                    int32_t* offset = offsets;
                    for (int64_t k = start; k < start + found; ++k) {
                        for (int64_t j = 0; j < bw; ++j) {
                            *offset++ = static_cast<int32_t>((matrix.col[k] * bw + j) * bytes);
                        }
                    }
                    std::memset(row_sums, 0, found * bw * sizeof(float));
                    dot_all(tile, 1, offsets, row_sums, found * bw);
                    for (int64_t k = 0; k < found; ++k) {
                        float* out = job.sums + ((start + k) * bh + row % bh) * bw;
                        for (int64_t j = 0; j < bw; ++j) out[j] += row_sums[k * bw + j];
                    }
                }
            }
#pragma omp barrier
        }
    }
}

}  // namespace SPARSE_MOON_ISA
}  // namespace sparse_moon
