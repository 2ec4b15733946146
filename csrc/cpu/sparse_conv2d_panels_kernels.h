// The convolution's inner loops for one instruction set. A unit of work is a group of kLanes images and a block of
// rows: its source is packed into the thread's panel once, then every target channel runs over its entries.
#pragma once
#include "panel.h"
#include "tile_kernels.h"

namespace sparse_moon {
namespace SPARSE_MOON_ISA {

// Tile of grid positions: about evenly wide, then as high as the registers allow. Where the plane's rows are whole
// vectors, so are a tile's; else tiles are as wide as they can be.
struct TileShape {
    int64_t rows, cols;
};

inline TileShape tile_shape(const CorrelateJob& job, int64_t grid_rows) {
    const Axis& width = job.width;
    const bool whole = job.target.channels_last || job.target.width % kLanes == 0;
    const int64_t widest = whole ? kTile / kLanes * kLanes : kTile;
    static_assert(kTile >= kLanes, "a tile is at least a vector wide");
    const int64_t parts = (width.grid + widest - 1) / widest;
    const int64_t cols = width.step <= 2 ? (width.grid + parts - 1) / parts : 1;
    // evenly high too, because the last tile of a plane is moved back over rows that the one before has computed
    const int64_t highest = smaller(kMaxRows, kTile / cols), bands = (grid_rows + highest - 1) / highest;
    return {(grid_rows + bands - 1) / bands, cols};
}

// What is computed before it is unpacked: a tile of one channel (or of kLanes neighbouring ones, where those are
// neighbours in memory) if its rows are whole vectors; else whole rows of a plane, as many as make whole vectors, of
// many channels. Stores of a vector's first elements cost several times those of a whole one.
struct Region {
    int64_t rows, cols;  // grid positions
    int64_t channels;
};

constexpr int64_t kRegionBytes = 64 << 10;

inline Region region_shape(const CorrelateJob& job, TileShape tile, int64_t grid_rows) {
    const Axis &height = job.height, &width = job.width;
    if (job.chunks > 1) {
        const int64_t bytes = tile.rows * height.phases * tile.cols * width.phases * kVecBytes;
        return {tile.rows, tile.cols, larger(kRegionBytes / bytes / kLanes * kLanes, kLanes)};
    }
    if (job.target.channels_last) return {tile.rows, tile.cols, kLanes};
    const int64_t run = tile.cols * width.phases == job.target.width ? tile.rows * height.phases : 1;
    if (run * tile.cols * width.phases % kLanes == 0) return {tile.rows, tile.cols, 1};
    int64_t rows = tile.rows;
    while (rows < grid_rows && rows * height.phases * job.target.width % kLanes != 0) rows += tile.rows;
    rows = smaller(rows, grid_rows);
    const int64_t channel_bytes = rows * height.phases * width.grid * width.phases * kVecBytes;
    return {rows, width.grid, larger(kRegionBytes / channel_bytes, 1)};
}

// Parts of the source channels of which a tile's share stays in the L1 cache over all outputs, whose sums wait in the
// region between them; one where so few entries would be left a part that loading and storing sums costs more.
// With AVX-512 that is more than the cache holds, and still faster than chunks of half as many entries.
constexpr int64_t kWindow = 768;  // vectors

// For a tile, and outputs that have `entries` in all, with `least` of each left a chunk.
inline int64_t channel_chunks(const PanelShape& panel, const Axis& width, TileShape tile, int64_t outputs,
                              int64_t entries, int64_t least) {
    const int64_t rows = panel.rows - (panel.block_rows - tile.rows) * panel.grid_step;
    const int64_t cols = (tile.cols - 1) * width.step + width.last - width.first + 1;
    const int64_t fitting = larger(kWindow / (rows * cols), 1);
    return larger(smaller((panel.channels + fitting - 1) / fitting, entries / larger(outputs * least, 1)), 1);
}

inline int64_t correlate_chunks(const CorrelateJob& job) {
    constexpr int64_t kLeastEntries = 16;
    const int64_t outputs = job.target.channels * job.height.phases * job.width.phases;
    return channel_chunks(job.panel, job.width, tile_shape(job, job.panel.block_rows), outputs, job.starts[outputs],
                          kLeastEntries);
}

// The entries of one output in one chunk: places [begin, end).
struct Places {
    int64_t begin, end;
};
template <class Job>
SPARSE_MOON_INLINE Places chunk_places(const Job& job, int64_t output, int64_t chunk) {
    const int64_t* cut = job.cuts + output * (job.chunks - 1) + chunk;
    return {chunk == 0 ? job.starts[output] : cut[-1], chunk == job.chunks - 1 ? job.starts[output + 1] : cut[0]};
}

// Bytes that a region takes at most.
inline int64_t region_bytes(const CorrelateJob& job) {
    const int64_t phases = job.height.phases * job.width.phases;
    const int64_t rows = smaller(job.panel.block_rows, kLanes * kMaxRows);  // kLanes tiles' rows are whole vectors
    return larger(larger(kRegionBytes, kLanes * kTile * phases * kVecBytes),
                  rows * phases * job.width.grid * kVecBytes);
}

SPARSE_MOON_INLINE int64_t row_bytes(const PanelShape& shape) { return shape.grid_step * shape.pitch * kVecBytes; }

// Of `rows` rows from grid position (row, col) on.
template <class T>
Destination<T> destination(const CorrelateJob& job, const Lanes& lanes, int64_t row, int64_t rows, int64_t channel,
                           int64_t col) {
    const Planes& target = job.target;
    const int64_t x = col * job.width.phases;
    Destination<T> to;
    for (int l = 0; l < kLanes; ++l) {
        const int64_t y = (lanes.row[l] + row) * job.height.phases;
        to.rows[l] = lanes.image[l] < 0 ? 0 : smaller(target.height - y, rows * job.height.phases);
        int64_t index = lanes.image[l] * target.channels * target.height * target.width;
        if (target.channels_last) {
            index += (y * target.width + x) * target.channels + channel;
        } else {
            index += (channel * target.height + y) * target.width + x;
        }
        to.start[l] = target.numbers<T>() + (to.rows[l] > 0 ? index : 0);
    }
    to.streaming = job.streaming;
    return to;
}

// Channels [first, first + count) of the grid positions from (row, col) on, into `results`, where each channel has
// `size` vectors and each target row `pitch`.
inline void compute_region(const CorrelateJob& job, const float* panel, TileShape shape, Region region, int64_t row,
                           int64_t col, int64_t first, int64_t count, float* results, int64_t size, int64_t pitch) {
    const int64_t down = job.height.phases, across = job.width.phases;
    const ProductKernel<EntryList> first_kernel =
        product_kernel<Start::kConstant>(shape.rows, shape.cols, job.width.step);
    const ProductKernel<EntryList> next_kernel =
        product_kernel<Start::kStored>(shape.rows, shape.cols, job.width.step);
    ProductTile<EntryList> tile;
    tile.row_bytes = row_bytes(job.panel);
    tile.out_step = across;
    tile.out_row = down * pitch;
    // The last tile of a row or column is moved back inside, over positions that are computed twice.
    for (int64_t i = 0; i < region.rows; i += shape.rows) {
        const int64_t r = smaller(i, region.rows - shape.rows);
        for (int64_t j = 0; j < region.cols; j += shape.cols) {
            const int64_t c = smaller(j, region.cols - shape.cols);
            tile.panel = reinterpret_cast<const char*>(panel) + (row + r) * tile.row_bytes +
                         (col + c) * job.width.step * kVecBytes;
            for (int64_t chunk = 0; chunk < job.chunks; ++chunk) {
                const ProductKernel<EntryList> kernel = chunk == 0 ? first_kernel : next_kernel;
                for (int64_t k = 0; k < count; ++k) {
                    tile.initial = job.bias ? job.bias[first + k] : 0.0f;
                    int64_t output = (first + k) * down * across;
                    float* out = results + (k * size + r * tile.out_row + c * across) * kLanes;
                    for (int64_t a = 0; a < down; ++a) {
                        for (int64_t b = 0; b < across; ++b, ++output) {
                            const Places places = chunk_places(job, output, chunk);
                            if (chunk > 0 && places.begin == places.end) continue;
                            tile.entries = {job.entries + places.begin, places.end - places.begin};
                            tile.out = out + (a * pitch + b) * kLanes;
                            kernel(tile);
                        }
                    }
                }
            }
        }
    }
}

template <class T>
void correlate_unit_to(const CorrelateJob& job, const Lanes& lanes, const float* panel, float* results, int64_t first,
                       int64_t last) {
    const Planes& target = job.target;
    const TileShape shape = tile_shape(job, lanes.rows);
    Region region = region_shape(job, shape, lanes.rows);
    const int64_t most_rows = region.rows, pitch = region.cols * job.width.phases;
    for (int64_t i = 0; i < lanes.rows; i += most_rows) {
        const int64_t row = smaller(i, lanes.rows - shape.rows);
        region.rows = smaller(most_rows, lanes.rows - row);
        const int64_t rows = region.rows * job.height.phases, size = rows * pitch;
        for (int64_t j = 0; j < job.width.grid; j += region.cols) {
            const int64_t col = smaller(j, job.width.grid - region.cols);
            const int64_t cols = smaller(pitch, target.width - col * job.width.phases);
            Destination<T> to = destination<T>(job, lanes, row, region.rows, first, col);
            bool whole = cols == target.width && cols == pitch;
            for (int l = 0; l < kLanes; ++l) whole = whole && (to.rows[l] <= 0 || to.rows[l] == rows);
            for (int64_t o = first; o < last; o += region.channels) {
                const int64_t count = smaller(region.channels, last - o);
                compute_region(job, panel, shape, region, row, col, o, count, results, size, pitch);
                if (target.channels_last) {
                    for (int64_t k = 0; k < count; k += kLanes) {
                        const int64_t part = smaller(kLanes, count - k);
                        unpack_channels_last(results + k * size * kLanes, part, rows, cols, pitch, to,
                                             target.width * target.channels, target.channels);
                        advance(to, part);
                    }
                    continue;
                }
                for (int64_t k = 0; k < count; ++k, advance(to, target.height * target.width)) {
                    const float* from = results + k * size * kLanes;
                    whole ? unpack_contiguous(from, 1, rows * cols, 0, to, 0)
                          : unpack_contiguous(from, rows, cols, pitch, to, target.width);
                }
            }
        }
    }
}

// Target channels [first, last) of a unit whose source is packed; `results` has region_bytes(job).
inline void correlate_unit(const CorrelateJob& job, const Lanes& lanes, const float* panel, float* results,
                           int64_t first, int64_t last) {
    with_number_type(job.target.bfloat16, [&](auto number) {
        correlate_unit_to<decltype(number)>(job, lanes, panel, results, first, last);
    });
}

inline int64_t correlate_scratch(const CorrelateJob& job) {
    return job.panel.vectors() * kVecBytes + region_bytes(job);
}

inline void correlate(const CorrelateJob& job) {
    const int64_t units = job.groups.units(), channels = job.target.channels;
#pragma omp parallel num_threads(job.threads)
    {
        float* panel = reinterpret_cast<float*>(job.scratch + thread_number() * job.thread_scratch);
        float* results = panel + job.panel.vectors() * kLanes;
        clear_margins(job.panel, panel);
#pragma omp for schedule(dynamic)
        for (int64_t work = 0; work < units * job.splits; ++work) {
            const Lanes lanes = lanes_of_unit(job.groups, work / job.splits);
            pack(job.source, job.height, job.panel, lanes, panel);
            // A split holds whole groups of kLanes channels, so that no two threads write to one vector's worth.
            const int64_t groups = (channels + kLanes - 1) / kLanes, split = work % job.splits;
            const int64_t first = groups * split / job.splits * kLanes;
            const int64_t last = smaller(groups * (split + 1) / job.splits * kLanes, channels);
            correlate_unit(job, lanes, panel, results, first, last);
        }
        stream_fence();
    }
}

// A tile is large enough that summing over the lanes at its end costs little.
inline TileShape dots_tile_shape(const CorrelateDotsJob& job) {
    constexpr int64_t kPositions = 48, kMaxCols = 64;
    const int64_t parts = (job.width.grid + kMaxCols - 1) / kMaxCols;
    const int64_t cols = (job.width.grid + parts - 1) / parts;
    return {smaller((kPositions + cols - 1) / cols, job.panel.block_rows), cols};
}

inline int64_t correlate_dots_chunks(const CorrelateDotsJob& job) {
    constexpr int64_t kLeastEntries = kDots * 3 / 4;
    const int64_t outputs = job.grad.channels;
    return channel_chunks(job.panel, job.width, dots_tile_shape(job), outputs, job.starts[outputs], kLeastEntries);
}

inline int64_t correlate_dots_scratch(const CorrelateDotsJob& job) {
    const int64_t region = job.input_grad ? region_bytes(*job.input_grad) : 0;
    return (job.panel.vectors() + job.grad_panel.vectors()) * kVecBytes + region;
}

inline void correlate_dots(const CorrelateDotsJob& job) {
    const int64_t units = job.groups.units(), channels = job.grad.channels, total = job.starts[channels];
    const TileShape shape = dots_tile_shape(job);
    const int64_t step = job.width.step;
#pragma omp parallel num_threads(job.threads)
    {
        const int thread = thread_number();
        float* panel = reinterpret_cast<float*>(job.scratch + thread * job.thread_scratch);
        float* grad = panel + job.panel.vectors() * kLanes;
        float* results = grad + job.grad_panel.vectors() * kLanes;
        float* sums = job.sums + thread * total;
        for (int t = thread; t < job.threads; t += team_size()) {
            for (int64_t k = 0; k < total; ++k) job.sums[t * total + k] = 0.0f;
        }
        clear_margins(job.panel, panel);
        clear_margins(job.grad_panel, grad);
        DotTile tile;
        tile.panel_row = row_bytes(job.panel);
        tile.grad_row = row_bytes(job.grad_panel);
        tile.panel_step = step * kVecBytes;
        // A static schedule: which thread adds which unit, and in which order, depends on the number of threads alone.
#pragma omp for schedule(static)
        for (int64_t work = 0; work < units * job.splits; ++work) {
            const Lanes lanes = lanes_of_unit(job.groups, work / job.splits);
            pack(job.grad, job.grad_height, job.grad_panel, lanes, grad);
            if (job.input_grad) {
                correlate_unit(*job.input_grad, lanes, grad, results, 0, job.input_grad->target.channels);
            }
            pack(job.source, job.height, job.panel, lanes, panel);
            const int64_t split = work % job.splits;
            const int64_t first = channels * split / job.splits, last = channels * (split + 1) / job.splits;
            for (int64_t row = 0; row < lanes.rows; row += shape.rows) {
                tile.rows = smaller(shape.rows, lanes.rows - row);
                for (int64_t col = 0; col < job.width.grid; col += shape.cols) {
                    tile.cols = smaller(shape.cols, job.width.grid - col);
                    tile.panel = reinterpret_cast<const char*>(panel) + row * tile.panel_row + col * tile.panel_step;
                    for (int64_t chunk = 0; chunk < job.chunks; ++chunk) {
                        for (int64_t o = first; o < last; ++o) {
                            const Places places = chunk_places(job, o, chunk);
                            tile.grad = reinterpret_cast<const char*>(grad) +
                                        (row - job.grad_height.first) * tile.grad_row +
                                        (o * job.grad_panel.channel_stride + job.grad_panel.margin + col) * kVecBytes;
                            dot_all(tile, step, job.offsets + places.begin, sums + places.begin,
                                    places.end - places.begin);
                        }
                    }
                }
            }
        }
        stream_fence();
    }
}

}  // namespace SPARSE_MOON_ISA
}  // namespace sparse_moon
