// The convolution's inner loops for one instruction set. A unit of work is a group of kLanes images and a block of
// rows: its source is packed into the thread's panel once, then every target channel runs over its entries.
#pragma once
#include "panel.h"
#include "tile_kernels.h"

namespace sparse_moon {
namespace SPARSE_MOON_ISA {

// Tile of grid positions: at most as wide as whole vectors are stored and so that it divides the row about evenly, then
// as high as the registers allow.
struct TileShape {
    int64_t rows, cols;
};

inline TileShape tile_shape(int64_t grid_rows, int64_t grid_cols, int64_t step) {
    constexpr int64_t kWidest = kTile / kLanes * kLanes;
    static_assert(kWidest > 0 && kWidest <= kMaxCols, "a tile is at least a vector wide");
    const int64_t parts = (grid_cols + kWidest - 1) / kWidest;
    const int64_t cols = step <= 2 ? (grid_cols + parts - 1) / parts : 1;
    return {smaller(smaller(kMaxRows, kTile / cols), grid_rows), cols};
}

SPARSE_MOON_INLINE int64_t row_bytes(const PanelShape& shape) { return shape.grid_step * shape.pitch * kVecBytes; }

inline Destination destination(const Planes& target, const Axis& height, const Lanes& lanes, int64_t row, int64_t rows,
                               int64_t phase, int64_t channel, int64_t col) {
    Destination to;
    for (int l = 0; l < kLanes; ++l) {
        const int64_t first = lanes.row[l] + row;
        const int64_t existing = (target.height - phase + height.phases - 1) / height.phases - first;
        to.rows[l] = lanes.image[l] < 0 ? 0 : smaller(existing, rows);
        const int64_t y = first * height.phases + phase;
        int64_t index = lanes.image[l] * target.channels * target.height * target.width;
        if (target.channels_last) {
            index += (y * target.width + col) * target.channels + channel;
        } else {
            index += (channel * target.height + y) * target.width + col;
        }
        to.start[l] = target.data + (to.rows[l] > 0 ? index : 0);
    }
    return to;
}

// All target channels in [first, last) of one tile at grid (row, col) of a unit.
inline void correlate_tile(const CorrelateJob& job, const Lanes& lanes, const float* panel, float* scratch,
                           TileShape shape, int64_t row, int64_t col, int64_t first, int64_t last) {
    const Axis &height = job.height, &width = job.width;
    const Planes& target = job.target;
    const int64_t phases = height.phases * width.phases;
    const int64_t scratch_cols = shape.cols * width.phases;
    const int64_t tile_size = shape.rows * scratch_cols * kLanes;
    const int64_t group = target.channels_last ? kLanes : 1;
    const int64_t target_col = col * width.phases;
    const int64_t cols = smaller(scratch_cols, target.width - target_col);
    const ProductKernel<EntryList> kernel = product_kernel(shape.rows, shape.cols, width.step);

    ProductTile<EntryList> tile;
    tile.row_bytes = row_bytes(job.panel);
    tile.panel = reinterpret_cast<const char*>(panel) + row * tile.row_bytes + col * width.step * kVecBytes;
    tile.out_step = width.phases;
    for (int64_t a = 0; a < height.phases; ++a) {
        Destination to = destination(target, height, lanes, row, shape.rows, a, first, target_col);
        to.streaming = job.streaming;
        bool whole = !target.channels_last && cols == target.width && height.phases == 1 && cols == scratch_cols;
        for (int l = 0; l < kLanes; ++l) whole = whole && (to.rows[l] <= 0 || to.rows[l] == shape.rows);
        tile.out_row = scratch_cols;
        for (int64_t o = first; o < last; o += group) {
            const int64_t count = smaller(group, last - o);
            for (int64_t k = 0; k < count; ++k) {
                tile.initial = job.bias ? job.bias[o + k] : 0.0f;
                for (int64_t b = 0; b < width.phases; ++b) {
                    const int64_t* range = job.starts + (o + k) * phases + a * width.phases + b;
                    tile.entries = {job.entries + range[0], range[1] - range[0]};
                    tile.out = scratch + k * tile_size + b * kLanes;
                    kernel(tile);
                }
            }
            const int64_t stride = height.phases * target.width;
            if (target.channels_last) {
                unpack_channels_last(scratch, count, shape.rows, cols, scratch_cols, to, stride * target.channels,
                                     target.channels);
            } else if (whole) {
                unpack_contiguous(scratch, 1, shape.rows * cols, 0, to, stride);
            } else {
                unpack_contiguous(scratch, shape.rows, cols, scratch_cols, to, stride);
            }
            const int64_t advance = target.channels_last ? count : target.height * target.width;
            for (int l = 0; l < kLanes; ++l) to.start[l] += to.rows[l] > 0 ? advance : 0;
        }
    }
}

inline int64_t tile_scratch(const CorrelateJob& job) {
    const int64_t channels = job.target.channels_last ? kLanes : 1;
    return channels * kTile * job.width.phases * kVecBytes;
}

inline int64_t correlate_scratch(const CorrelateJob& job) {
    return job.panel.vectors() * kVecBytes + tile_scratch(job);
}

// Target channels [first, last) of a unit whose source is packed.
inline void correlate_unit(const CorrelateJob& job, const Lanes& lanes, const float* panel, float* scratch,
                           int64_t first, int64_t last) {
    const TileShape shape = tile_shape(lanes.rows, job.width.grid, job.width.step);
    // The last tile of a row or column is moved back inside, over positions that are computed twice.
    for (int64_t row = 0; row < lanes.rows; row += shape.rows) {
        for (int64_t col = 0; col < job.width.grid; col += shape.cols) {
            correlate_tile(job, lanes, panel, scratch, shape, smaller(row, lanes.rows - shape.rows),
                           smaller(col, job.width.grid - shape.cols), first, last);
        }
    }
}

inline void correlate(const CorrelateJob& job) {
    const int64_t units = job.groups.units(), channels = job.target.channels;
#pragma omp parallel num_threads(job.threads)
    {
        float* panel = reinterpret_cast<float*>(job.scratch + thread_number() * job.thread_scratch);
        float* scratch = panel + job.panel.vectors() * kLanes;
        clear_margins(job.panel, panel);
#pragma omp for schedule(dynamic)
        for (int64_t work = 0; work < units * job.splits; ++work) {
            const Lanes lanes = lanes_of_unit(job.groups, work / job.splits);
            pack(job.source, job.height, job.panel, lanes, panel);
            // A split holds whole groups of kLanes channels, so that no two threads write to one vector's worth.
            const int64_t groups = (channels + kLanes - 1) / kLanes, split = work % job.splits;
            const int64_t first = groups * split / job.splits * kLanes;
            const int64_t last = smaller(groups * (split + 1) / job.splits * kLanes, channels);
            correlate_unit(job, lanes, panel, scratch, first, last);
        }
        stream_fence();
    }
}

inline int64_t correlate_dots_scratch(const CorrelateDotsJob& job) {
    const int64_t tile = job.input_grad ? tile_scratch(*job.input_grad) : 0;
    return (job.panel.vectors() + job.grad_panel.vectors()) * kVecBytes + tile;
}

inline void correlate_dots(const CorrelateDotsJob& job) {
    const int64_t units = job.groups.units(), channels = job.grad.channels, total = job.starts[channels];
    // A tile is large enough that summing over the lanes at its end costs little, and small enough that the part of
    // the panel under it stays in the L2 cache over all output channels.
    constexpr int64_t kPositions = 48, kMaxTileCols = 64;
    const int64_t parts = (job.width.grid + kMaxTileCols - 1) / kMaxTileCols;
    const int64_t tile_cols = (job.width.grid + parts - 1) / parts;
    const int64_t tile_rows = (kPositions + tile_cols - 1) / tile_cols;
    const int64_t step = job.width.step;
#pragma omp parallel num_threads(job.threads)
    {
        const int thread = thread_number();
        float* panel = reinterpret_cast<float*>(job.scratch + thread * job.thread_scratch);
        float* grad = panel + job.panel.vectors() * kLanes;
        float* tiles = grad + job.grad_panel.vectors() * kLanes;
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
                correlate_unit(*job.input_grad, lanes, grad, tiles, 0, job.input_grad->target.channels);
            }
            pack(job.source, job.height, job.panel, lanes, panel);
            const int64_t split = work % job.splits;
            const int64_t first = channels * split / job.splits, last = channels * (split + 1) / job.splits;
            for (int64_t row = 0; row < lanes.rows; row += tile_rows) {
                tile.rows = smaller(tile_rows, lanes.rows - row);
                for (int64_t col = 0; col < job.width.grid; col += tile_cols) {
                    tile.cols = smaller(tile_cols, job.width.grid - col);
                    tile.panel = reinterpret_cast<const char*>(panel) + row * tile.panel_row + col * tile.panel_step;
                    for (int64_t o = first; o < last; ++o) {
                        tile.grad = reinterpret_cast<const char*>(grad) +
                                    (row - job.grad_height.first) * tile.grad_row +
                                    (o * job.grad_panel.channel_stride + job.grad_panel.margin + col) * kVecBytes;
                        dot_all(tile, step, job.offsets + job.starts[o], sums + job.starts[o],
                                job.starts[o + 1] - job.starts[o]);
                    }
                }
            }
        }
        stream_fence();
    }
}

}  // namespace SPARSE_MOON_ISA
}  // namespace sparse_moon
