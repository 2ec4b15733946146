// The linear layer's inner loops for one instruction set: the convolution's, with tokens in the lanes and groups of
// kLanes tokens as the positions of a tile. Up to kTile groups make a block, packed into a panel [features][groups]
// [kLanes]. No thread reads what another has packed: between the caches of two cores such lines travel so slowly that
// two threads were slower than one. Blocks of tokens are therefore what threads share out; where there are too few,
// parts of the outputs, and each packs the block for itself.
//
// A panel of many features outgrows the L2 cache, where every entry would wait for L3. Features are therefore taken in
// chunks that fit, and sums wait in a second panel between chunks.
#pragma once
#include "panel.h"
#include "sparse_linear_gelu_kernels.h"
#include "tile_kernels.h"
#include "token_panel.h"

namespace sparse_moon {
namespace SPARSE_MOON_ISA {

constexpr int64_t kChunkBytes = 640 << 10;
constexpr int64_t kChunkFeatures = 1024;  // longer sums would round worse than those of a blocked dense product
constexpr int64_t kChunkEntries = 16;  // of a row at least, on average: below, loading and storing the sums costs more
constexpr int64_t kFewTokens = 4;  // up to which gradients of values are summed token by token
constexpr int64_t kTokensAnEntry = 16;  // of a column, from which on threads share out tokens rather than rows
constexpr int64_t kLeastGroups = 4;  // of a block that is only there for one more thread to have work

// Few blocks, or as many as `threads` where each still has kLeastGroups groups.
inline TokenBlocks token_blocks(int64_t tokens, int64_t threads) {
    const int64_t groups = larger((tokens + kLanes - 1) / kLanes, 1), fewest = (groups + kTile - 1) / kTile;
    const int64_t even = (fewest + threads - 1) / threads * threads;
    const int64_t count = larger(fewest, smaller(even, groups / kLeastGroups));
    const int64_t each = (groups + count - 1) / count;
    return {(groups + each - 1) / each, each, odd(each)};
}

// Features a chunk: whole blocks of the matrix, whose rows have `entries` on average.
inline int64_t chunk_features(int64_t features, int64_t block, int64_t entries, int64_t stride) {
    const int64_t enough = features * kChunkEntries / larger(entries, 1);
    const int64_t fitting = larger(smaller(kChunkBytes / (stride * kVecBytes), kChunkFeatures), enough);
    const int64_t chunks = larger((features + fitting - 1) / fitting, 1);
    return larger(((features + chunks - 1) / chunks + block - 1) / block * block, block);
}

// Outputs [outputs][groups] vectors to y (tokens, total outputs), from output `first_output` on.
inline void unpack_tokens(const LinearJob& job, const float* tile, int64_t outputs, const TokenBlocks& blocks,
                          int64_t first, int64_t first_output, int64_t total) {
    with_number_type(job.bfloat16, [&](auto number) {
        auto* y = static_cast<decltype(number)*>(job.output);
        const bool streaming = job.streaming && !job.gelu;  // GELU reads what is written here
        unpack_tokens_to(tile, outputs, blocks, first, job.tokens, first_output, total, streaming, y);
    });
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

    // Entries of a row on average, in elements.
    int64_t row_entries() const {
        return starts()[count() / block()] * matrix.block_rows * matrix.block_cols / larger(count(), 1);
    }

    // First row of part `part` of `parts` about equally costly ones, a multiple of `together`.
    int64_t part_begin(int64_t part, int64_t parts, int64_t together) const {
        const int64_t groups = (count() + together - 1) / together;
        if (part == parts) return groups * together;
        const int64_t wanted = cost(count()) * part / parts;
        int64_t low = 0, high = groups;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (cost(smaller(middle * together, count())) < wanted) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return low * together;
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

    // Values of row `within` of block k, one every value_step().
    const float* values_of(int64_t k, int64_t within) const {
        const int64_t bh = matrix.block_rows, bw = matrix.block_cols;
        return matrix.values + (transposed ? matrix.t_perm[k] * bh * bw + within : (k * bh + within) * bw);
    }
    int64_t value_step() const { return transposed ? matrix.block_cols : 1; }

    // The entries of blocks [first, first + blocks) of `row`, for a panel with `bytes` between features, of which the
    // first is feature 0 (an address outside the panel, where it holds a later chunk).
    int64_t list(int64_t row, int64_t first, int64_t blocks, int64_t bytes, Entry* entry) const {
        const int64_t within = row % block(), width = feature_block();
        for (int64_t k = first; k < first + blocks; ++k) {
            for (int64_t j = 0; j < width; ++j) {
                const int64_t feature = columns()[k] * width + j;
                *entry++ = {static_cast<int32_t>(feature * bytes), values_of(k, within)[j * value_step()]};
            }
        }
        return blocks * width;
    }

    // Blocks [first, first + blocks) of `row` as a tile takes them.
    void entries(int64_t, int64_t first, int64_t blocks, int64_t bytes, Entry*, MatrixRow* out) const {
        *out = {columns() + first, matrix.values + first, blocks, bytes};
    }
    void entries(int64_t row, int64_t first, int64_t blocks, int64_t bytes, Entry* scratch, EntryList* out) const {
        *out = {scratch, list(row, first, blocks, bytes, scratch)};
    }
};

// What a thread needs to multiply a block of tokens with a part of the rows; its scratch memory is a panel, the sums
// between chunks (or of kLineRows rows, where there is one chunk), a list of entries, and a cursor a row.
struct LinearPlan {
    TokenBlocks blocks;
    int64_t parts;  // of the rows
    int64_t chunk;  // features
    bool chunked;
    int64_t panel, sums, list, cursors;  // bytes
    int64_t bytes() const { return panel + sums + list + cursors; }
};

inline int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

inline LinearPlan linear_plan(const LinearJob& job) {
    const Rows rows{job.matrix, job.transposed};
    LinearPlan plan;
    plan.blocks = token_blocks(job.tokens, job.threads);
    plan.parts = (job.threads + plan.blocks.count - 1) / plan.blocks.count;
    plan.chunk = chunk_features(rows.features(), rows.feature_block(), rows.row_entries(), plan.blocks.stride);
    plan.chunked = plan.chunk < rows.features();
    const int64_t features = smaller(plan.chunk, rows.features());
    plan.panel = features * plan.blocks.stride * kVecBytes;
    plan.sums = (plan.chunked ? rows.count() : kLineRows) * plan.blocks.groups * kVecBytes;
    plan.list = whole_lines(features * sizeof(Entry));
    plan.cursors = whole_lines(rows.count() * sizeof(int32_t));
    return plan;
}

inline int64_t linear_scratch(const LinearJob& job) { return job.threads * linear_plan(job).bytes(); }

// A block of tokens from `token` on, multiplied with rows [begin, end), begin a multiple of kLineRows.
template <class Entries>
void linear_unit(const LinearJob& job, const LinearPlan& plan, char* scratch, int64_t token, int64_t begin,
                 int64_t end) {
    const Rows rows{job.matrix, job.transposed};
    const TokenBlocks& blocks = plan.blocks;
    const int64_t features = rows.features(), feature_bytes = blocks.stride * kVecBytes;
    const ProductKernel<Entries> from_bias = product_row_kernel<Start::kConstant, Entries>(blocks.groups);
    const ProductKernel<Entries> from_stored = product_row_kernel<Start::kStored, Entries>(blocks.groups);
    float* panel = reinterpret_cast<float*>(scratch);
    float* sums = reinterpret_cast<float*>(scratch + plan.panel);
    Entry* list = reinterpret_cast<Entry*>(scratch + plan.panel + plan.sums);
    int32_t* cursors = reinterpret_cast<int32_t*>(scratch + plan.panel + plan.sums + plan.list);
    for (int64_t row = begin; row < end; ++row) cursors[row - begin] = rows.starts()[row / rows.block()];

    const auto unpack = [&](int64_t row, int64_t count) {
        unpack_tokens(job, sums, count, blocks, token, row, rows.count());
    };
    ProductTile<Entries> tile{};
    tile.out_step = 1;
    for (int64_t base = 0; base == 0 || base < features; base += plan.chunk) {
        pack_tokens(job.input, job.bfloat16, job.tokens, features, token, blocks, base,
                    smaller(base + plan.chunk, features), panel);
        tile.panel = reinterpret_cast<const char*>(panel) - base * feature_bytes;
        const ProductKernel<Entries> kernel = base == 0 ? from_bias : from_stored;
        for (int64_t row = begin; row < end; ++row) {
            // With one chunk, rows are finished in groups that are transposed while they are in the L1 cache.
            const int64_t place = plan.chunked ? row - begin : (row - begin) % kLineRows;
            const int64_t start = cursors[row - begin];
            const int64_t found = rows.advance(row, base + plan.chunk, cursors + (row - begin));
            if (found > 0 || base == 0) {
                rows.entries(row, start, found, feature_bytes, list, &tile.entries);
                tile.initial = job.bias ? job.bias[row] : 0.0f;
                tile.out = sums + place * blocks.groups * kLanes;
                kernel(tile);
            }
            if (!plan.chunked && (place == kLineRows - 1 || row == end - 1)) unpack(row - place, place + 1);
        }
    }
    if (plan.chunked) unpack(begin, end - begin);
    gelu_tokens(job, token, token + blocks.groups * kLanes, begin, end, rows.count());
}

template <class Entries>
void linear_with(const LinearJob& job) {
    const Rows rows{job.matrix, job.transposed};
    const LinearPlan plan = linear_plan(job);
#pragma omp parallel num_threads(job.threads)
    {
        char* scratch = job.scratch + thread_number() * plan.bytes();
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < plan.blocks.count * plan.parts; ++unit) {
            const int64_t block = unit / plan.parts, part = unit % plan.parts;
            linear_unit<Entries>(job, plan, scratch, block * plan.blocks.groups * kLanes,
                                 rows.part_begin(part, plan.parts, kLineRows),
                                 smaller(rows.part_begin(part + 1, plan.parts, kLineRows), rows.count()));
        }
        stream_fence();
    }
}

inline void linear(const LinearJob& job) {
    const bool blocks = job.matrix.block_rows * job.matrix.block_cols > 1;
    return blocks ? linear_with<EntryList>(job) : linear_with<MatrixRow>(job);
}

// Either the rows are divided among the threads, each of which packs all of the input and its part of the gradient, or
// the tokens, of which each packs its own, with sums of its own that are added at the end. Scratch memory of a thread:
// a panel of each, the offsets and sums of one row, a cursor a row, sums of the gradient, and behind those of all
// threads the sums of the values' gradient that all but the first have of their own.
struct LinearDotsPlan {
    bool by_tokens;
    TokenBlocks blocks;
    int64_t chunk;
    int64_t panel, grad, list, cursors, biases;  // bytes
    int64_t bytes() const { return panel + grad + list + cursors + biases; }
};

inline int64_t dots_count(const LinearDotsJob& job) {
    const SparseMatrix& matrix = job.matrix;
    return matrix.row_ptr[matrix.rows / matrix.block_rows] * matrix.block_rows * matrix.block_cols;
}

inline LinearDotsPlan linear_dots_plan(const LinearDotsJob& job) {
    const SparseMatrix& matrix = job.matrix;
    LinearDotsPlan plan;
    plan.by_tokens = job.threads > 1 && job.tokens * matrix.cols >= kTokensAnEntry * dots_count(job);
    plan.blocks = token_blocks(job.tokens, plan.by_tokens ? job.threads : 1);
    const int64_t entries = Rows{matrix, false}.row_entries();
    plan.chunk = chunk_features(matrix.cols, matrix.block_cols, entries, plan.blocks.stride);
    const int64_t features = smaller(plan.chunk, matrix.cols);
    plan.panel = features * plan.blocks.stride * kVecBytes;
    plan.grad = matrix.rows * plan.blocks.stride * kVecBytes;
    plan.list = whole_lines(features * (sizeof(int32_t) + sizeof(float)));
    plan.cursors = whole_lines(matrix.rows * sizeof(int32_t));
    plan.biases = job.bias_grad ? whole_lines(matrix.rows * sizeof(double)) : 0;
    return plan;
}

// Adds what `rows` rows of a panel are in all to their sums; float64, as bias_grad()'s.
inline void add_rows(const float* panel, int64_t rows, const TokenBlocks& blocks, double* sums) {
    for (int64_t row = 0; row < rows; row += kLanes) {
        const int64_t count = smaller(kLanes, rows - row);
        Vec totals[kLanes] = {};
        for (int64_t i = 0; i < count; ++i) {
            const float* vectors = panel + (row + i) * blocks.stride * kLanes;
            for (int64_t g = 0; g < blocks.groups; ++g) totals[i] += load(vectors + g * kLanes);
        }
        alignas(64) float lanes[kLanes];
        store(lanes, sum_lanes(totals));
        for (int64_t i = 0; i < count; ++i) sums[row + i] += lanes[i];
    }
}

inline int64_t linear_dots_scratch(const LinearDotsJob& job) {
    const LinearDotsPlan plan = linear_dots_plan(job);
    const int64_t own = plan.by_tokens ? dots_count(job) * static_cast<int64_t>(sizeof(float)) : 0;
    return job.threads * plan.bytes() + (job.threads - 1) * own;
}

SPARSE_MOON_INLINE double* linear_dots_biases(const LinearDotsPlan& plan, char* scratch) {
    return reinterpret_cast<double*>(scratch + plan.bytes() - plan.biases);
}

// Adds the products of a block of tokens from `token` on, of rows [begin, end), to `sums`, which are as job.sums.
inline void linear_dots_unit(const LinearDotsJob& job, const LinearDotsPlan& plan, char* scratch, int64_t token,
                             int64_t begin, int64_t end, float* sums) {
    const SparseMatrix& matrix = job.matrix;
    const Rows rows{matrix, false};
    const TokenBlocks& blocks = plan.blocks;
    const int64_t bh = matrix.block_rows, bw = matrix.block_cols;
    const int32_t bytes = static_cast<int32_t>(blocks.stride * kVecBytes);
    float* panel = reinterpret_cast<float*>(scratch);
    float* grad = reinterpret_cast<float*>(scratch + plan.panel);
    char* lists = scratch + plan.panel + plan.grad;
    int32_t* offsets = reinterpret_cast<int32_t*>(lists);
    float* row_sums = reinterpret_cast<float*>(offsets + smaller(plan.chunk, matrix.cols));
    int32_t* cursors = reinterpret_cast<int32_t*>(lists + plan.list);
    for (int64_t row = begin; row < end; ++row) cursors[row - begin] = matrix.row_ptr[row / bh];

    pack_tokens(job.grad, job.bfloat16, job.tokens, matrix.rows, token, blocks, begin, end, grad);
    if (job.bias_grad) add_rows(grad, end - begin, blocks, linear_dots_biases(plan, scratch));
    DotTile tile{};
    tile.rows = 1;
    tile.cols = blocks.groups;
    tile.panel_step = kVecBytes;
    for (int64_t base = 0; base < matrix.cols; base += plan.chunk) {
        const int64_t last = smaller(base + plan.chunk, matrix.cols);
        pack_tokens(job.input, job.bfloat16, job.tokens, matrix.cols, token, blocks, base, last, panel);
        tile.panel = reinterpret_cast<const char*>(panel) - base * bytes;
        for (int64_t row = begin; row < end; ++row) {
            const int64_t start = cursors[row - begin];
            const int64_t found = rows.advance(row, base + plan.chunk, cursors + (row - begin));
            if (found == 0) continue;
            tile.grad = reinterpret_cast<const char*>(grad + (row - begin) * blocks.stride * kLanes);
            if (bh * bw == 1) {
                for (int64_t k = 0; k < found; ++k) offsets[k] = matrix.col[start + k] * bytes;
                dot_all(tile, 1, offsets, sums + start, found);
                continue;
            }
            int32_t* offset = offsets;
            for (int64_t k = start; k < start + found; ++k) {
                for (int64_t j = 0; j < bw; ++j) *offset++ = static_cast<int32_t>((matrix.col[k] * bw + j) * bytes);
            }
            std::memset(row_sums, 0, found * bw * sizeof(float));
            dot_all(tile, 1, offsets, row_sums, found * bw);
            for (int64_t k = 0; k < found; ++k) {
                float* out = sums + ((start + k) * bh + row % bh) * bw;
                for (int64_t j = 0; j < bw; ++j) out[j] += row_sums[k * bw + j];
            }
        }
    }
}

// Rows [begin, end) for a few tokens, in whose lanes most of a vector would be empty: the loads of each entry are what
// takes time, and packing would add to them.
template <class Number, int T>
void linear_dots_few(const LinearDotsJob& job, int64_t begin, int64_t end) {
    const SparseMatrix& matrix = job.matrix;
    const auto *given = static_cast<const Number*>(job.grad), *input = static_cast<const Number*>(job.input);
    const int64_t bh = matrix.block_rows, bw = matrix.block_cols;
    for (int64_t row = begin; row < end; ++row) {
        float grad[T];
        double total = 0.0;
        for (int t = 0; t < T; ++t) total += grad[t] = as_float(given[t * matrix.rows + row]);
        if (job.bias_grad) job.bias_grad[row] = static_cast<float>(total);
        const auto dot = [&](int64_t feature) {
            float sum = 0.0f;
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) sum += grad[t] * as_float(input[t * matrix.cols + feature]);
            return sum;
        };
        const int64_t first = matrix.row_ptr[row / bh], last = matrix.row_ptr[row / bh + 1];
        if (bh * bw == 1) {
            for (int64_t k = first; k < last; ++k) job.sums[k] = dot(matrix.col[k]);
            continue;
        }
        for (int64_t k = first; k < last; ++k) {
            float* out = job.sums + (k * bh + row % bh) * bw;
            for (int64_t j = 0; j < bw; ++j) out[j] = dot(matrix.col[k] * bw + j);
        }
    }
}

template <class Number>
void linear_dots_few(const LinearDotsJob& job) {
    static constexpr void (*kFew[])(const LinearDotsJob&, int64_t, int64_t) = {
        linear_dots_few<Number, 0>, linear_dots_few<Number, 1>, linear_dots_few<Number, 2>, linear_dots_few<Number, 3>,
        linear_dots_few<Number, 4>};
    static_assert(sizeof(kFew) / sizeof(*kFew) == kFewTokens + 1, "one for each number of tokens");
    const Rows rows{job.matrix, false};
#pragma omp parallel num_threads(job.threads)
    {
        const int thread = thread_number(), threads = team_size();
        const int64_t end = smaller(rows.part_begin(thread + 1, threads, kLanes), job.matrix.rows);
        kFew[job.tokens](job, rows.part_begin(thread, threads, kLanes), end);
    }
}

inline void linear_dots(const LinearDotsJob& job) {
    if (job.tokens <= kFewTokens) {
        return with_number_type(job.bfloat16, [&](auto number) { linear_dots_few<decltype(number)>(job); });
    }
    const SparseMatrix& matrix = job.matrix;
    const Rows rows{matrix, false};
    const LinearDotsPlan plan = linear_dots_plan(job);
    const int64_t total = dots_count(job), count = plan.blocks.count;
    const auto scratch_of = [&](int64_t thread) { return job.scratch + thread * plan.bytes(); };
    const auto sums_of = [&](int64_t thread) {
        return thread == 0 ? job.sums : reinterpret_cast<float*>(scratch_of(job.threads)) + (thread - 1) * total;
    };
#pragma omp parallel num_threads(job.threads)
    {
        const int thread = thread_number(), threads = team_size();
        const bool by_tokens = plan.by_tokens;
        char* scratch = scratch_of(thread);
        float* sums = by_tokens ? sums_of(thread) : job.sums;
        if (by_tokens) {
            std::memset(sums, 0, total * sizeof(float));
        } else {
#pragma omp for schedule(static)
            for (int64_t k = 0; k < total; ++k) sums[k] = 0.0f;
        }
        const int64_t begin = by_tokens ? 0 : rows.part_begin(thread, threads, kLanes);
        const int64_t own_end = rows.part_begin(thread + 1, threads, kLanes);
        const int64_t end = by_tokens ? matrix.rows : smaller(own_end, matrix.rows);
        const int64_t first = by_tokens ? count * thread / threads : 0;
        const int64_t last = by_tokens ? count * (thread + 1) / threads : count;
        double* biases = linear_dots_biases(plan, scratch);
        std::memset(biases, 0, plan.biases);
        for (int64_t block = first; begin < end && block < last; ++block) {
            linear_dots_unit(job, plan, scratch, block * plan.blocks.groups * kLanes, begin, end, sums);
        }
        if (!by_tokens) {
            for (int64_t row = begin; job.bias_grad && row < end; ++row) {
                job.bias_grad[row] = static_cast<float>(biases[row - begin]);
            }
        } else {
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t k = 0; k < total; ++k) {
                for (int t = 1; t < threads; ++t) job.sums[k] += sums_of(t)[k];
            }
#pragma omp for schedule(static)
            for (int64_t row = 0; row < (job.bias_grad ? matrix.rows : 0); ++row) {
                double all = 0.0;
                for (int t = 0; t < threads; ++t) all += linear_dots_biases(plan, scratch_of(t))[row];
                job.bias_grad[row] = static_cast<float>(all);
            }
        }
    }
}

}  // namespace SPARSE_MOON_ISA
}  // namespace sparse_moon
