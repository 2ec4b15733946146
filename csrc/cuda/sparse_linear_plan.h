#pragma once
// How the work of the sparse linear layer is cut, for the host and its kernels.
//
// Every nonzero needs its own piece of x for each multiplication, so on-chip bandwidth is the limit: 128 bytes a clock
// and multiprocessor are 32 fp32 multiply-adds, a quarter of the peak. Everything here serves that limit:
//  - Activations are first rewritten in *lines*: 128 bytes hold one column for 32 (fp32) or 64 (fp16, bf16) tokens, so
//    a read of any line is free of bank conflicts. All lines of a token tile follow each other: (tile, column, token).
//  - A block keeps a chunk of columns of one token tile in shared memory, the outputs in registers, and streams the
//    nonzeros. Two blocks share a multiprocessor: one computes while the other fills its shared memory.
//  - In the products, nonzeros come as (byte offset of the line, fp32 value) pairs from a copy made once a call, chunk
//    by chunk, in which four rows (a slice) have as many pairs as the longest of them: the inner loop has no branch.
//  - In the values' gradient, work is cut into items: up to eight nonzeros of one row in one chunk.
#include <algorithm>
#include <cstdint>

#include "cuda/common.h"

namespace sparse_moon::cuda {

constexpr int kLineBytes = 128, kLineLanes = 8;  // a lane reads 16 bytes of a line
constexpr int kLinearThreads = 512, kLinearWarps = kLinearThreads / 32;
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kSliceRows = 32 / kLineLanes;
constexpr int kGroupSteps = 2, kGroupPairs = kSliceRows * kGroupSteps;  // pairs come in groups of 64 bytes
constexpr int kBatchGroups = 4, kBatches = 2;  // groups that a warp brings to shared memory at once, one batch ahead
constexpr int64_t kBatchBytes = kBatchGroups * kGroupPairs * 8;

// Columns of a chunk at most: two blocks with their chunks (and batches of pairs, in the product) fit the 228 KB of a
// Hopper multiprocessor (each block costs 1 KB). Where a block may have 99 KB (8.6, 8.9, 12.0), chunks are smaller.
constexpr int64_t kProductColumns = 832, kGradColumns = 704;

// Items of a block in the values' gradient: each of its 48 groups of eight lanes keeps the sums of 20. With a third
// more threads there would be fewer registers than that needs.
constexpr int kItemEntries = 8, kItemsPerLane = 20, kGradThreads = 384;
constexpr int kItems = kItemsPerLane * kGradThreads / kLineLanes;
constexpr int kGradRows = 2 * kGradThreads;  // rows of a block at most: two a thread while the items are counted
constexpr int64_t kItemBytes = kItemEntries * 2 + 4 + 2;

SPARSE_MOON_HOST_DEVICE constexpr int64_t tokens_per_line(DType dtype) { return kLineBytes / size_of(dtype); }

// Bytes of (tokens, columns) activations rewritten in lines.
constexpr int64_t lines_bytes(DType dtype, int64_t tokens, int64_t columns) {
    return ceil_div(tokens, tokens_per_line(dtype)) * columns * kLineBytes;
}

// An even cut of `columns` into chunks of at most `limit`; there is always one.
struct Chunks {
    int64_t count, columns;
};
constexpr Chunks chunks_of(int64_t columns, int64_t limit) {
    const int64_t each = ceil_div(columns, std::max<int64_t>(1, ceil_div(columns, limit)));
    return {std::max<int64_t>(1, ceil_div(columns, std::max<int64_t>(1, each))), each};
}

// First group of a slice in the packed copy, given the number of entries in earlier rows. A slice with m entries in k
// chunks takes at most m / 2 + k groups: a chunk's longest row has at most all its entries, and a chunk has at least
// one group. So no prefix sum is needed, only some room (32 bytes an entry).
SPARSE_MOON_HOST_DEVICE constexpr int64_t first_group(int64_t slice, int64_t entries_before, int64_t chunks) {
    return entries_before / kGroupSteps + slice * (chunks + 1);
}

// How a product (tokens, cols) x (rows, cols)^T with n entries is cut, and where its workspace's parts begin.
struct ProductPlan {
    int64_t tiles, slices, row_groups, rows_per_block;
    bool large;  // blocks of many rows; else of a quarter, for more blocks
    Chunks chunks;
    int64_t pointers, pairs, workspace_bytes;  // lines begin at 0
    int64_t shared_bytes;
};

constexpr ProductPlan product_plan(DType dtype, int64_t tokens, int64_t rows, int64_t cols, int64_t n,
                                   int64_t multiprocessors, int64_t block_shared_bytes) {
    constexpr int64_t kAlignment = 256;
    ProductPlan p{};
    p.tiles = ceil_div(tokens, tokens_per_line(dtype));
    p.slices = ceil_div(rows, kSliceRows);
    // 32 accumulators a thread: for 8 rows of 4 tokens in fp32, 4 rows of 8 tokens else.
    const int64_t slices_of_large = kLinearWarps * 2 * size_of(dtype);
    p.large = p.tiles * ceil_div(p.slices, slices_of_large) >= multiprocessors * kBlocksPerMultiprocessor;
    p.rows_per_block = kSliceRows * slices_of_large / (p.large ? 1 : 4);
    p.row_groups = ceil_div(rows, p.rows_per_block);
    constexpr int64_t kBatchesBytes = kLinearWarps * kBatches * kBatchBytes;
    const int64_t room = (block_shared_bytes - kBatchesBytes) / kLineBytes - 1;
    p.chunks = chunks_of(cols, std::min(kProductColumns, room));
    p.pointers = round_up(lines_bytes(dtype, tokens, cols), kAlignment);
    p.pairs = p.pointers + round_up(p.slices * (p.chunks.count + 1) * 4, kAlignment);
    // a batch that begins with the last group reads beyond it
    p.workspace_bytes = p.pairs + (first_group(p.slices, n, p.chunks.count) + kBatchGroups) * kGroupPairs * 8;
    // the chunk, a line of zeros and the batches; at the end the outputs, transposed, one float beside each row
    p.shared_bytes = std::max((p.chunks.columns + 1) * kLineBytes + kBatchesBytes,
                              tokens_per_line(dtype) * (p.rows_per_block + 1) * 4);
    return p;
}

// How the values' gradient of a (rows, cols) matrix with n entries is cut, and where its workspace's parts begin.
struct ValuesGradPlan {
    int64_t tiles, row_blocks, rows_per_block, splits, tiles_per_split;
    Chunks chunks;
    int64_t input_lines, partials, workspace_bytes;  // the gradient's lines begin at 0
    int64_t shared_bytes;
};

constexpr ValuesGradPlan values_grad_plan(DType dtype, int64_t tokens, int64_t rows, int64_t cols, int64_t n,
                                          int64_t multiprocessors, int64_t block_shared_bytes) {
    constexpr int64_t kAlignment = 256, kMaxSplits = 32;
    ValuesGradPlan p{};
    p.tiles = ceil_div(tokens, tokens_per_line(dtype));
    p.chunks = chunks_of(cols, std::min(kGradColumns, (block_shared_bytes - kItems * kItemBytes) / kLineBytes));
    // A row has n / (rows chunks) entries in a chunk, so that many eighths of an item and about half an item more; a
    // tenth of the room is left for the blocks that have more than the average.
    const int64_t segments = std::max<int64_t>(1, rows * p.chunks.count);
    const int64_t fit = kItems * 9 / 10 * kItemEntries * segments / (n + segments * kItemEntries / 2);
    p.row_blocks = ceil_div(rows, std::clamp<int64_t>(fit, 1, kGradRows));
    p.rows_per_block = ceil_div(rows, std::max<int64_t>(1, p.row_blocks));
    // The number of token ranges with the least time, in tiles: rounds of blocks times the tiles of each, where setting
    // up and adding partial sums costs about one tile.
    const int64_t blocks = p.row_blocks * p.chunks.count, at_once = multiprocessors * kBlocksPerMultiprocessor;
    int64_t best = INT64_MAX;
    for (int64_t splits = 1; splits <= std::min(kMaxSplits, p.tiles); ++splits) {
        const int64_t cost = ceil_div(blocks * splits, at_once) * (ceil_div(p.tiles, splits) + 1);
        if (cost < best) {
            best = cost;
            p.splits = splits;
        }
    }
    if (p.splits > 0) {
        p.tiles_per_split = ceil_div(p.tiles, p.splits);
        p.splits = ceil_div(p.tiles, p.tiles_per_split);
    }
    p.input_lines = round_up(lines_bytes(dtype, tokens, rows), kAlignment);
    p.partials = p.input_lines + round_up(lines_bytes(dtype, tokens, cols), kAlignment);
    p.workspace_bytes = p.partials + (p.splits > 1 ? p.splits * n * 4 : 0);
    p.shared_bytes = p.chunks.columns * kLineBytes + kItems * kItemBytes;
    p.shared_bytes = std::max<int64_t>(p.shared_bytes, kItems * kItemBytes + kGradThreads * 4);
    return p;
}

}  // namespace sparse_moon::cuda
