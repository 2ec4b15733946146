// The convolution's inner loops from flat panels (see jobs.h), for one instruction set. Images are copied into the
// panel as they are, where other panels transpose them, so that a product costs less beside its entries; an entry costs
// more, because vectors cross cache lines and cover what lies between rows.
#pragma once
#include <type_traits>

#include "tile_kernels.h"

namespace sparse_moon {
namespace SPARSE_MOON_ISA {

constexpr int64_t kFlatDots = 48 * kLanes;  // numbers of a dot product's tile
constexpr int64_t kFlatLine = 512;          // numbers of a line that is computed at once, where images are small

SPARSE_MOON_INLINE int64_t flat_panel_floats(const FlatPanel& panel, int64_t channels) {
    return whole_cache_lines(channels * panel.channel_stride + panel.slack);
}

SPARSE_MOON_INLINE int64_t flat_together(const FlatPanel& panel) {
    return larger(smaller(kFlatLine / panel.image_stride, panel.images), 1);
}

SPARSE_MOON_INLINE int64_t flat_line_floats(const FlatPanel& panel) {
    return whole_cache_lines(flat_together(panel) * panel.image_stride + kLanes);
}

// Whole vectors, the last of which overlaps the one before: copies of a part of a vector take several times as long.
template <class From, class To>
SPARSE_MOON_INLINE void copy_numbers(const From* from, To* to, int64_t n) {
    if (n >= kLanes) {
        for (int64_t i = 0; i < n - kLanes; i += kLanes) store_unaligned(to + i, load_unaligned(from + i));
        store_unaligned(to + n - kLanes, load_unaligned(from + n - kLanes));
        return;
    }
    constexpr int64_t kQuarter = 4;
    if (std::is_same_v<From, To> && n >= kQuarter) {
        for (int64_t i = 0; i < n - kQuarter; i += kQuarter) std::memcpy(to + i, from + i, sizeof(From) * kQuarter);
        std::memcpy(to + n - kQuarter, from + n - kQuarter, sizeof(From) * kQuarter);
        return;
    }
    store_first(to, load_range(from, 0, static_cast<int>(n)), static_cast<int>(n));
}

// Some images, and the block of their rows from `row` on.
struct FlatUnit {
    int64_t first, images, row;
};

SPARSE_MOON_INLINE int64_t flat_blocks(const FlatPanel& panel, int64_t rows) {
    return panel.block_rows ? (rows + panel.block_rows - 1) / panel.block_rows : 1;
}

SPARSE_MOON_INLINE int64_t flat_units(const FlatPanel& panel, int64_t batch, int64_t rows) {
    return (batch + panel.images - 1) / panel.images * flat_blocks(panel, rows);
}

SPARSE_MOON_INLINE FlatUnit flat_unit(const FlatPanel& panel, int64_t batch, int64_t rows, int64_t unit) {
    const int64_t blocks = flat_blocks(panel, rows), first = unit / blocks * panel.images;
    return {first, smaller(panel.images, batch - first), unit % blocks * panel.block_rows};
}

// Into how many parts the channels of a unit's results are divided, so that there is work for all threads; each part
// packs the source for itself.
SPARSE_MOON_INLINE int64_t flat_parts(int64_t units, int64_t channels, int64_t threads) {
    return larger(smaller(threads / larger(units, 1), channels), 1);
}

// How many of the numbers of a line are positions of the unit's own rows, of a plane of so many rows.
SPARSE_MOON_INLINE int64_t flat_numbers(const FlatPanel& panel, const FlatUnit& unit, int64_t height) {
    if (!panel.block_rows) return unit.images * panel.image_stride;
    return smaller(panel.block_rows, height - unit.row) * panel.pitch;
}

// A unit's source into a panel that is zero but for such rows.
template <class T>
void flat_pack_from(const Planes& planes, const FlatPanel& shape, const FlatUnit& unit, float* panel) {
    const int64_t height = planes.height, width = planes.width, area = height * width;
    const int64_t begin = shape.block_rows ? unit.row - shape.above : 0;
    const int64_t end = shape.block_rows ? unit.row + shape.block_rows + shape.below : height;
    for (int64_t i = 0; i < unit.images; ++i) {
        const T* from = planes.numbers<T>() + (unit.first + i) * planes.channels * area;
        float* to = panel + shape.lead + i * shape.image_stride - unit.row * shape.pitch;
        for (int64_t c = 0; c < planes.channels; ++c, from += area, to += shape.channel_stride) {
            for (int64_t y = begin; y < end; ++y) {
                if (y >= 0 && y < height) {
                    copy_numbers(from + y * width, to + y * shape.pitch, width);
                } else {
                    std::memset(to + y * shape.pitch, 0, width * sizeof(float));
                }
            }
        }
    }
    if (unit.images == shape.images) return;
    // the last vector of the line reaches into what an earlier unit has left, but not into the next channel
    const int64_t behind = shape.lead + unit.images * shape.image_stride;
    const int64_t zeros = smaller(kLanes, shape.channel_stride - behind);
    for (int64_t c = 0; c < planes.channels; ++c) {
        std::memset(panel + c * shape.channel_stride + behind, 0, zeros * sizeof(float));
    }
}

inline void flat_pack(const Planes& planes, const FlatPanel& shape, const FlatUnit& unit, float* panel) {
    with_number_type(planes.bfloat16,
                     [&](auto number) { flat_pack_from<decltype(number)>(planes, shape, unit, panel); });
}

// One channel's rows [row, row + rows) of planes out of its line, from image `first` on.
template <class T>
SPARSE_MOON_INLINE void flat_unpack(const FlatCorrelateJob& job, const float* line, int64_t first, int64_t images,
                                    int64_t row, int64_t rows, int64_t channel) {
    const Planes& target = job.target;
    for (int64_t i = 0; i < images; ++i) {
        const int64_t plane = (first + i) * target.channels + channel;
        T* to = target.numbers<T>() + (plane * target.height + row) * target.width;
        const float* from = line + i * job.panel.image_stride;
        for (int64_t y = 0; y < rows; ++y) {
            copy_numbers(from + y * job.panel.pitch, to + y * target.width, target.width);
        }
    }
}

// A part of the target channels of a unit whose source is packed. A channel's planes are finished one after the other,
// so that memory is written in order.
inline void flat_correlate_unit(const FlatCorrelateJob& job, const float* panel, float* line, const FlatUnit& unit,
                                int64_t part, int64_t parts) {
    const int64_t first_channel = job.target.channels * part / parts;
    const int64_t last_channel = job.target.channels * (part + 1) / parts;
    const int64_t together = flat_together(job.panel), height = job.target.height;
    const int64_t rows = job.panel.block_rows ? smaller(job.panel.block_rows, height - unit.row) : height;
    for (int64_t i = 0; i < unit.images; i += together) {
        const FlatUnit images{unit.first + i, smaller(together, unit.images - i), unit.row};
        const int64_t vectors = (flat_numbers(job.panel, images, height) + kLanes - 1) / kLanes;
        const int64_t tiles = (vectors + kTile - 1) / kTile;
        for (int64_t o = first_channel; o < last_channel; ++o) {
            ProductTile<EntryList> tile;
            tile.row_bytes = tile.out_row = 0;
            tile.out_step = 1;
            tile.initial = job.bias ? job.bias[o] : 0.0f;
            tile.entries = {job.entries + job.starts[o], job.starts[o + 1] - job.starts[o]};
            for (int64_t t = 0; t < tiles; ++t) {
                const int64_t begin = vectors * t / tiles, end = vectors * (t + 1) / tiles;
                tile.panel = reinterpret_cast<const char*>(panel + i * job.panel.image_stride + begin * kLanes);
                tile.out = line + begin * kLanes;
                product_row_kernel<Start::kConstant, EntryList>(end - begin)(tile);
            }
            with_number_type(job.target.bfloat16, [&](auto number) {
                flat_unpack<decltype(number)>(job, line, images.first, images.images, unit.row, rows, o);
            });
        }
    }
}

inline int64_t flat_correlate_scratch(const FlatCorrelateJob& job) {
    const int64_t floats = flat_panel_floats(job.panel, job.source.channels) + flat_line_floats(job.panel);
    return floats * static_cast<int64_t>(sizeof(float));
}

inline void flat_correlate(const FlatCorrelateJob& job) {
    const int64_t floats = flat_panel_floats(job.panel, job.source.channels);
    const int64_t units = flat_units(job.panel, job.batch, job.target.height);
    const int64_t parts = flat_parts(units, job.target.channels, job.threads);
#pragma omp parallel num_threads(job.threads)
    {
        float* panel = reinterpret_cast<float*>(job.scratch + thread_number() * job.thread_scratch);
        std::memset(panel, 0, floats * sizeof(float));
#pragma omp for schedule(dynamic)
        for (int64_t u = 0; u < units * parts; ++u) {
            const FlatUnit unit = flat_unit(job.panel, job.batch, job.target.height, u / parts);
            flat_pack(job.source, job.panel, unit, panel);
            flat_correlate_unit(job, panel, panel + floats, unit, u % parts, parts);
        }
    }
}

inline int64_t flat_dots_scratch(const FlatDotsJob& job) {
    const int64_t panels =
        flat_panel_floats(job.panel, job.source.channels) + flat_panel_floats(job.grad_panel, job.grad.channels);
    return (panels + flat_line_floats(job.panel)) * static_cast<int64_t>(sizeof(float));
}

inline void flat_dots(const FlatDotsJob& job) {
    const int64_t floats = flat_panel_floats(job.panel, job.source.channels);
    const int64_t grad_floats = flat_panel_floats(job.grad_panel, job.grad.channels);
    const int64_t channels = job.grad.channels, total = job.starts[channels];
    const int64_t rows = larger(job.source.height, job.grad.height), units = flat_units(job.panel, job.batch, rows);
    const int64_t parts = flat_parts(units, smaller(job.source.channels, channels), job.threads);
#pragma omp parallel num_threads(job.threads)
    {
        const int thread = thread_number();
        float* panel = reinterpret_cast<float*>(job.scratch + thread * job.thread_scratch);
        float* grad = panel + floats;
        float* sums = job.sums + thread * total;
        for (int t = thread; t < job.threads; t += team_size()) {
            for (int64_t k = 0; k < total; ++k) job.sums[t * total + k] = 0.0f;
        }
        std::memset(panel, 0, (floats + grad_floats) * sizeof(float));
        DotTile tile;
        tile.panel_row = tile.grad_row = 0;
        tile.panel_step = kVecBytes;
        tile.rows = 1;
        // A static schedule: which thread adds which unit, and in which order, depends on the number of threads alone.
#pragma omp for schedule(static)
        for (int64_t u = 0; u < units * parts; ++u) {
            const FlatUnit unit = flat_unit(job.panel, job.batch, rows, u / parts);
            const int64_t part = u % parts;
            flat_pack(job.grad, job.grad_panel, unit, grad);
            if (job.input_grad) flat_correlate_unit(*job.input_grad, grad, grad + grad_floats, unit, part, parts);
            flat_pack(job.source, job.panel, unit, panel);
            const int64_t numbers = flat_numbers(job.panel, unit, job.grad.height);
            for (int64_t begin = 0; begin < numbers; begin += kFlatDots) {
                tile.cols = (smaller(kFlatDots, numbers - begin) + kLanes - 1) / kLanes;
                tile.panel = reinterpret_cast<const char*>(panel + begin);
                for (int64_t o = channels * part / parts; o < channels * (part + 1) / parts; ++o) {
                    tile.grad = reinterpret_cast<const char*>(grad + o * job.grad_panel.channel_stride +
                                                              job.grad_panel.lead + begin);
                    dot_all(tile, 1, job.offsets + job.starts[o], sums + job.starts[o],
                            job.starts[o + 1] - job.starts[o]);
                }
            }
        }
    }
}

}  // namespace SPARSE_MOON_ISA
}  // namespace sparse_moon
