#include "sparse_linear_runs.h"

#include <algorithm>
#include <atomic>
#include <new>

#include "dispatch.h"

namespace sparse_moon {
namespace {

constexpr int64_t kBlockRows = 256;      // sums of 64 KB
constexpr int64_t kLeastBlocks = 4;      // so that threads can share out the rows
constexpr int64_t kLeastFeatures = 112;  // panels of 28 KB
constexpr int64_t kMostFeatures = 1024;
constexpr int64_t kRunEntries = 8;       // on average: loading and storing the sums costs as much as two
constexpr int64_t kMostLanes = 16;       // of any instruction set: blocks of rows, and gaps behind groups, are as many

}  // namespace

KeptRuns::Side KeptRuns::make(const SparseMatrix& matrix, bool transposed) {
    const int64_t rows = transposed ? matrix.cols : matrix.rows, features = transposed ? matrix.rows : matrix.cols;
    const int64_t height = transposed ? matrix.block_cols : matrix.block_rows;
    const int64_t width = transposed ? matrix.block_rows : matrix.block_cols;
    const int32_t* ptr = transposed ? matrix.t_ptr : matrix.row_ptr;
    const int32_t* column = transposed ? matrix.t_row : matrix.col;

    const int64_t row_entries = std::max<int64_t>(ptr[rows / height] * height * width / std::max<int64_t>(rows, 1), 1);
    const int64_t enough = std::clamp(kRunEntries * features / row_entries, kLeastFeatures, kMostFeatures);
    const int64_t even = ceil_div(features, std::max<int64_t>(ceil_div(features, enough), 1));
    Side side;
    RunGroups& sizes = side.sizes;
    sizes.chunk_features = std::max(ceil_div(even, width) * width, width);
    sizes.chunks = std::max<int64_t>(ceil_div(features, sizes.chunk_features), 1);
    const int64_t block_rows = std::min(kBlockRows, ceil_div(rows, kLeastBlocks * kMostLanes) * kMostLanes);
    sizes.block_rows = std::max<int64_t>(block_rows / height, 1) * height;
    sizes.blocks = ceil_div(rows, sizes.block_rows);

    std::vector<std::vector<Run>> groups(sizes.blocks * sizes.chunks);
    std::atomic<bool> no_memory{false};  // no exception may leave a thread
    const auto list = [&](int64_t block) {
        const int64_t first = block * sizes.block_rows, last = std::min(first + sizes.block_rows, rows);
        for (int64_t row = first; row < last; ++row) {
            const int64_t end = ptr[row / height + 1];
            for (int64_t k = ptr[row / height]; k < end;) {
                const int64_t chunk = column[k] * width / sizes.chunk_features, begin = k;
                while (k < end && column[k] * width < (chunk + 1) * sizes.chunk_features) ++k;
                groups[block * sizes.chunks + chunk].push_back({static_cast<uint32_t>(begin),
                                                                static_cast<uint16_t>(row - first),
                                                                static_cast<uint16_t>(k - begin)});
            }
        }
        for (int64_t chunk = 0; chunk < sizes.chunks; ++chunk) {
            std::vector<Run>& group = groups[block * sizes.chunks + chunk];
            std::sort(group.begin(), group.end(), [](const Run& a, const Run& b) {
                return a.blocks != b.blocks ? a.blocks < b.blocks : a.row < b.row;
            });
        }
    };
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < sizes.blocks; ++block) {
        try {
            list(block);
        } catch (const std::bad_alloc&) {
            no_memory = true;
        }
    }
    if (no_memory) throw std::bad_alloc();
    int64_t entries = 0;
    for (const std::vector<Run>& group : groups) {
        side.starts.push_back(static_cast<int64_t>(side.runs.size()));
        side.entry_starts.push_back(entries);
        side.runs.insert(side.runs.end(), group.begin(), group.end());
        for (const Run& run : group) entries += run.blocks * width;
        entries = ceil_div(entries + kMostLanes, kMostLanes) * kMostLanes;
    }
    side.starts.push_back(static_cast<int64_t>(side.runs.size()));
    side.entry_starts.push_back(entries);
    sizes.runs = side.runs.data();
    sizes.starts = side.starts.data();
    sizes.entry_starts = side.entry_starts.data();
    return side;
}

RunGroups KeptRuns::of(const SparseMatrix& matrix, bool transposed) {
    std::call_once(made_[transposed], [&] { sides_[transposed] = make(matrix, transposed); });
    return sides_[transposed].sizes;
}

}  // namespace sparse_moon
