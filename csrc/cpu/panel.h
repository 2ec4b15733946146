// Between activations in memory and panels (see jobs.h): kLanes x kLanes register transpositions. Planes may be
// contiguous (N, C, H, W), where a lane's neighbouring positions are loaded, or channels_last (N, H, W, C), where a
// lane's neighbouring channels are.
#pragma once
#include "jobs.h"
#include "simd.h"

namespace sparse_moon {
namespace SPARSE_MOON_ISA {

SPARSE_MOON_INLINE int64_t odd(int64_t n) { return n | 1; }
SPARSE_MOON_INLINE int clamp_to(int64_t x, int64_t high) { return static_cast<int>(x < 0 ? 0 : x > high ? high : x); }

// The images, and the grid rows in them, that the lanes of one unit of work stand for.
struct Lanes {
    int64_t image[kLanes];  // -1 where a lane is unused
    int64_t row[kLanes];    // first grid row
    int64_t rows;           // grid rows of the unit, the same in each lane (some may lie below the plane)
};

inline Lanes lanes_of_unit(const Groups& groups, int64_t unit) {
    Lanes lanes;
    const bool full = unit < groups.full * groups.full_blocks;
    const int64_t blocks = full ? groups.full_blocks : groups.rest_blocks;
    const int64_t group = full ? unit / blocks : groups.full;
    const int64_t block = full ? unit % blocks : unit - groups.full * groups.full_blocks;
    const int64_t band_rows = groups.band_rows;
    const int64_t rows = full ? groups.grid_rows : band_rows;
    const int64_t first = rows * block / blocks;
    lanes.rows = rows * (block + 1) / blocks - first;
    for (int64_t l = 0; l < kLanes; ++l) {
        if (full) {
            lanes.image[l] = group * kLanes + l;
            lanes.row[l] = first;
        } else {
            const bool used = l < groups.rest * groups.bands;
            lanes.image[l] = used ? group * kLanes + l / groups.bands : -1;
            lanes.row[l] = used ? first + l % groups.bands * band_rows : 0;
        }
    }
    return lanes;
}

// Zeros in the margins of every row; the rows between them are written by each pack().
inline void clear_margins(const PanelShape& shape, float* panel) {
    for (int64_t c = 0; c < shape.channels; ++c) {
        float* channel = panel + c * shape.channel_stride * kLanes;
        for (int64_t i = 0; i < shape.rows; ++i) {
            std::memset(channel + i * shape.pitch * kLanes, 0, shape.margin * kVecBytes);
        }
        const int64_t used = shape.rows * shape.pitch;
        std::memset(channel + used * kLanes, 0, (shape.channel_stride - used) * kVecBytes);
    }
    std::memset(panel + shape.channels * shape.channel_stride * kLanes, 0, shape.margin * kVecBytes);
}

// Rows of all channels of contiguous planes into a panel. A run is what is loaded as one: all rows where they are
// neighbours in the plane, else a row.
template <class T>
void pack_contiguous(const Planes& planes, const PanelShape& shape, const Lanes& lanes, const int64_t* first_row,
                     int64_t rows, float* panel) {
    const int64_t width = planes.width, area = planes.height * width;
    const int64_t run_rows = shape.row_step == 1 ? rows : 1;
    const int64_t length = run_rows * width;
    for (int64_t run = 0; run < rows / run_rows; ++run) {
        const T* start[kLanes];
        int64_t begin[kLanes], end[kLanes], last_begin = 0, first_end = length;
        for (int l = 0; l < kLanes; ++l) {
            const bool used = lanes.image[l] >= 0;
            const int64_t row = first_row[l] + run * shape.row_step;
            begin[l] = used ? smaller(larger(-row * width, 0), length) : length;
            end[l] = used ? larger(smaller(area - row * width, length), begin[l]) : length;
            last_begin = larger(last_begin, begin[l]);
            first_end = smaller(first_end, begin[l] < end[l] ? end[l] : 0);
            start[l] = planes.numbers<T>() + (used ? lanes.image[l] * planes.channels * area + row * width : 0);
        }
        for (int64_t c = 0; c < planes.channels; ++c) {
            float* out = panel + (c * shape.channel_stride + run * shape.pitch + shape.margin) * kLanes;
            int64_t x = 0;
            for (int64_t f = 0; f < length; f += kLanes) {
                const int64_t count = smaller(kLanes, length - f);
                Vec rows_of_lanes[kLanes];
                if (f >= last_begin && f + kLanes <= first_end) {
#pragma GCC unroll 16
                    for (int l = 0; l < kLanes; ++l) rows_of_lanes[l] = load_unaligned(start[l] + c * area + f);
                } else {
#pragma GCC unroll 1
                    for (int l = 0; l < kLanes; ++l) {
                        rows_of_lanes[l] = load_range(start[l] + c * area + f, clamp_to(begin[l] - f, count),
                                                      clamp_to(end[l] - f, count));
                    }
                }
                transpose(rows_of_lanes);
                if (x + kLanes <= width) {
#pragma GCC unroll 16
                    for (int i = 0; i < kLanes; ++i) store(out + i * kLanes, rows_of_lanes[i]);
                    out += kLanes * kLanes;
                    x += kLanes;
                    if (x == width) x = 0, out += (shape.pitch - width) * kLanes;
                } else if (count == kLanes) {
#pragma GCC unroll 16
                    for (int i = 0; i < kLanes; ++i, out += kLanes) {
                        store(out, rows_of_lanes[i]);
                        if (++x == width) x = 0, out += (shape.pitch - width) * kLanes;
                    }
                } else {
                    alignas(64) float buffer[kLanes * kLanes];
#pragma GCC unroll 16
                    for (int i = 0; i < kLanes; ++i) store(buffer + i * kLanes, rows_of_lanes[i]);
                    for (int64_t i = 0; i < count; ++i, out += kLanes) {
                        store(out, load(buffer + i * kLanes));
                        if (++x == width) x = 0, out += (shape.pitch - width) * kLanes;
                    }
                }
            }
        }
    }
}

// Rows of all channels of channels_last planes into a panel.
template <class T>
void pack_channels_last(const Planes& planes, const PanelShape& shape, const Lanes& lanes, const int64_t* first_row,
                        int64_t rows, float* panel) {
    const int64_t channels = planes.channels, width = planes.width;
    for (int64_t i = 0; i < rows; ++i) {
        const T* start[kLanes];
        bool all = true;
        for (int l = 0; l < kLanes; ++l) {
            const int64_t row = first_row[l] + i * shape.row_step;
            const bool used = lanes.image[l] >= 0 && row >= 0 && row < planes.height;
            const int64_t place = (lanes.image[l] * planes.height + row) * width * channels;
            start[l] = used ? planes.numbers<T>() + place : nullptr;
            all = all && used;
        }
        for (int64_t x = 0; x < width; ++x) {
            for (int64_t c = 0; c < channels; c += kLanes) {
                const int count = static_cast<int>(smaller(kLanes, channels - c));
                Vec rows_of_lanes[kLanes];
                if (all && count == kLanes) {
#pragma GCC unroll 16
                    for (int l = 0; l < kLanes; ++l) rows_of_lanes[l] = load_unaligned(start[l] + x * channels + c);
                } else {
#pragma GCC unroll 1
                    for (int l = 0; l < kLanes; ++l) {
                        rows_of_lanes[l] = start[l] ? load_range(start[l] + x * channels + c, 0, count) : Vec{};
                    }
                }
                transpose(rows_of_lanes);
                float* out = panel + (c * shape.channel_stride + i * shape.pitch + shape.margin + x) * kLanes;
                const int64_t stride = shape.channel_stride * kLanes;
                if (count == kLanes) {
#pragma GCC unroll 16
                    for (int k = 0; k < kLanes; ++k) store(out + k * stride, rows_of_lanes[k]);
                } else {
                    alignas(64) float buffer[kLanes * kLanes];
#pragma GCC unroll 16
                    for (int k = 0; k < kLanes; ++k) store(buffer + k * kLanes, rows_of_lanes[k]);
                    for (int k = 0; k < count; ++k) store(out + k * stride, load(buffer + k * kLanes));
                }
            }
        }
    }
}

// The source rows that `lanes` reads, into a panel whose margins are clear. Rows outside the plane become zeros.
inline void pack(const Planes& planes, const Axis& height, const PanelShape& shape, const Lanes& lanes, float* panel) {
    const int64_t rows = shape.rows - (shape.block_rows - lanes.rows) * shape.grid_step;
    int64_t first_row[kLanes];
    for (int l = 0; l < kLanes; ++l) first_row[l] = lanes.row[l] * height.step + height.first;
    with_number_type(planes.bfloat16, [&](auto number) {
        using T = decltype(number);
        planes.channels_last ? pack_channels_last<T>(planes, shape, lanes, first_row, rows, panel)
                             : pack_contiguous<T>(planes, shape, lanes, first_row, rows, panel);
    });
}

// Where a finished tile goes: for each lane the address of its first element, and how many of its rows exist.
template <class T>
struct Destination {
    T* start[kLanes];
    int64_t rows[kLanes];
    bool streaming;  // past the caches, where whole aligned lines are written
};

template <class T>
SPARSE_MOON_INLINE void advance(Destination<T>& to, int64_t elements) {
    for (int l = 0; l < kLanes; ++l) to.start[l] += to.rows[l] > 0 ? elements : 0;
}

// Vector l to address(l) in every lane that has row `row`, its first `count` elements.
template <class T, class Address>
SPARSE_MOON_INLINE void store_lanes(const Vec (&vectors)[kLanes], const Destination<T>& to, int64_t row, int count,
                                    Address address) {
    bool all = count == kLanes;
    uintptr_t misaligned = 0;
    for (int l = 0; l < kLanes; ++l) {
        all = all && row < to.rows[l];
        misaligned |= reinterpret_cast<uintptr_t>(address(l)) % kVecBytes;
    }
    if (kStreams<T> && all && to.streaming && misaligned == 0) {
#pragma GCC unroll 16
        for (int l = 0; l < kLanes; ++l) store_streaming(address(l), vectors[l]);
    } else if (all) {
#pragma GCC unroll 16
        for (int l = 0; l < kLanes; ++l) store_unaligned(address(l), vectors[l]);
    } else {
        alignas(64) float buffer[kLanes * kLanes];
#pragma GCC unroll 16
        for (int l = 0; l < kLanes; ++l) store(buffer + l * kLanes, vectors[l]);
        for (int l = 0; l < kLanes; ++l) {
            if (row < to.rows[l]) store_first(address(l), load(buffer + l * kLanes), count);
        }
    }
}

// One channel's tile [rows][tile_cols] vectors, of which `cols` columns go to rows of a contiguous plane, `stride`
// elements apart.
template <class T>
void unpack_contiguous(const float* tile, int64_t rows, int64_t cols, int64_t tile_cols, const Destination<T>& to,
                       int64_t stride) {
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < cols; j += kLanes) {
            const int count = static_cast<int>(smaller(kLanes, cols - j));
            const float* from = tile + (r * tile_cols + j) * kLanes;
            Vec columns[kLanes];
            if (count == kLanes) {
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) columns[i] = load(from + i * kLanes);
            } else {
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) columns[i] = i < count ? load(from + i * kLanes) : Vec{};
            }
            transpose(columns);
            store_lanes(columns, to, r, count, [&](int l) { return to.start[l] + r * stride + j; });
        }
    }
}

// `channels` <= kLanes channels' tiles [channels][rows][tile_cols] vectors, of which `cols` columns go to rows of
// channels_last planes, `stride` elements apart, columns `channel_count` apart.
template <class T>
void unpack_channels_last(const float* tile, int64_t channels, int64_t rows, int64_t cols, int64_t tile_cols,
                          const Destination<T>& to, int64_t stride, int64_t channel_count) {
    const int count = static_cast<int>(channels);
    const int64_t size = rows * tile_cols * kLanes;
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < cols; ++j) {
            const float* from = tile + (r * tile_cols + j) * kLanes;
            Vec columns[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) columns[i] = i < count ? load(from + i * size) : Vec{};
            transpose(columns);
            store_lanes(columns, to, r, count, [&](int l) { return to.start[l] + r * stride + j * channel_count; });
        }
    }
}

}  // namespace SPARSE_MOON_ISA
}  // namespace sparse_moon
