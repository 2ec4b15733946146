// Dense 3 x 3 convolutions by Winograd's products (Lavin and Gray 2016, "Fast algorithms for convolutional neural
// networks", equations 5 to 8), of tiles of 2 x 2 output and 4 x 4 input positions. With
//       | 1  0 -1  0 |        | 1   0   0  |
//   B = | 0  1  1  0 |    G = | 1/2 1/2 1/2|    A = | 1  1  1  0 |
//       | 0 -1  1  0 |        | 1/2 -1/2 1/2|       | 0  1 -1  1 |
//       | 0 -1  0  1 |        | 0   0   1  |
// a tile d of the input and a weight w give the output A ((G w G') * (B d B')) A', with * element by element, and a
// tile g of the output's gradient gives the weight's G' ((A' g A) * (B d B')) G: 16 products in place of 36. Over all
// channels, those are 16 matrix products. (Transforms of larger tiles save more products, but multiply rounding errors;
// with these they are about as large as those of the direct sum.)
//
// Lanes are channels. Transformed activations lie as [products][vectors of channels][tiles of a chunk], vectors each.
#pragma once
#include "panel.h"

namespace sparse_moon {
namespace SPARSE_MOON_ISA {

constexpr int kProducts = 16;
constexpr int kSumRows = kRegisters == 32 ? 8 : 4;  // rows of sums that registers hold at once
constexpr int kSumVectors = 2;                      // and vectors of each
constexpr int64_t kSumChannels = 128;               // input channels whose weights stay in the L1 cache
static_assert(kLanes % kSumRows == 0, "a vector of channels is a whole number of parts");
static_assert(kSumChannels % kLanes == 0, "a part of the channels is whole vectors");
static_assert(kSumRows * kSumVectors + kSumVectors < kRegisters, "sums must fit the registers");

SPARSE_MOON_INLINE int64_t channel_vectors(int64_t channels) { return (channels + kLanes - 1) / kLanes; }

// What a thread's memory holds, in vectors.
struct WinogradLayout {
    int64_t inputs, outputs;              // vectors of channels
    int64_t tiles;                        // of a chunk, whole parts of kSumRows
    int64_t input_stride, output_stride;  // between products, odd, see jobs.h
    int64_t panel;

    WinogradLayout(const WinogradTiles& job, int64_t output_channels)
        : inputs(channel_vectors(job.source.channels)),
          outputs(channel_vectors(output_channels)),
          tiles((job.chunk_bands * job.band_rows * job.across + kSumRows - 1) / kSumRows * kSumRows),
          input_stride(odd(inputs * tiles)),
          output_stride(odd(outputs * tiles)),
          panel(larger(job.source_panel.vectors(), job.target_panel.vectors())) {}

    int64_t sums() const { return kProducts * outputs * kLanes * inputs; }
    int64_t vectors() const { return kProducts * (input_stride + output_stride) + panel; }
};

// Rows from `row` on of kLanes channels of an image, into a panel whose margins are clear.
inline void pack_band(const Planes& planes, const PanelShape& shape, int64_t image, int64_t channel, int64_t row,
                      float* panel) {
    if (!planes.channels_last) {
        // each channel of each image as an image of its own, a channel a lane
        const Planes single{planes.data, 1, planes.height, planes.width, false};
        Lanes lanes;
        int64_t first_row[kLanes];
        for (int l = 0; l < kLanes; ++l) {
            lanes.image[l] = channel + l < planes.channels ? image * planes.channels + channel + l : -1;
            first_row[l] = row;
        }
        return pack_contiguous<float>(single, shape, lanes, first_row, shape.rows, panel);
    }
    const int count = static_cast<int>(smaller(planes.channels - channel, kLanes));
    for (int64_t i = 0; i < shape.rows; ++i) {
        float* out = panel + (i * shape.pitch + shape.margin) * kLanes;
        if (row + i < 0 || row + i >= planes.height) {
            std::memset(out, 0, planes.width * kVecBytes);
            continue;
        }
        const float* from =
            planes.numbers<float>() + (image * planes.height + row + i) * planes.width * planes.channels + channel;
        for (int64_t x = 0; x < planes.width; ++x, from += planes.channels, out += kLanes) {
            store(out, count == kLanes ? load_unaligned(from) : load_range(from, 0, count));
        }
    }
}

// A panel's rows to those from `row` on of kLanes channels of an image; rows below the plane are left out.
inline void unpack_band(const float* panel, int64_t pitch, int64_t rows, int64_t image, int64_t channel, int64_t row,
                        bool streaming, const Planes& planes) {
    rows = smaller(rows, planes.height - row);
    if (!planes.channels_last) {
        Destination<float> to;
        for (int64_t l = 0; l < kLanes; ++l) {
            const bool used = channel + l < planes.channels;
            const int64_t plane = used ? image * planes.channels + channel + l : 0;
            to.start[l] = planes.numbers<float>() + (plane * planes.height + row) * planes.width;
            to.rows[l] = used ? rows : 0;
        }
        to.streaming = streaming;
        const bool whole = pitch == planes.width;  // all rows are one line
        return unpack_contiguous(panel, whole ? 1 : rows, whole ? rows * pitch : planes.width, pitch, to, planes.width);
    }
    const int count = static_cast<int>(smaller(planes.channels - channel, kLanes));
    for (int64_t i = 0; i < rows; ++i) {
        const float* from = panel + i * pitch * kLanes;
        float* to =
            planes.numbers<float>() + (image * planes.height + row + i) * planes.width * planes.channels + channel;
        for (int64_t x = 0; x < planes.width; ++x, from += kLanes, to += planes.channels) {
            if (count < kLanes) {
                store_first(to, load(from), count);
            } else if (kStreams<float> && streaming && reinterpret_cast<uintptr_t>(to) % kVecBytes == 0) {
                store_streaming(to, load(from));
            } else {
                store_unaligned(to, load(from));
            }
        }
    }
}

// Calls use(image, first tile row, tile rows, first tile of the chunk) for `count` bands from `band` on; returns the
// number of tiles.
template <class Use>
int64_t each_band(const WinogradTiles& job, int64_t band, int64_t count, Use use) {
    const int64_t image_bands = (job.down + job.band_rows - 1) / job.band_rows;
    int64_t tiles = 0;
    for (int64_t b = band; b < band + count; ++b) {
        const int64_t row = b % image_bands * job.band_rows;
        const int64_t rows = smaller(job.band_rows, job.down - row);
        use(b / image_bands, row, rows, tiles);
        tiles += rows * job.across;
    }
    return tiles;
}

// Calls use(first band, number of bands) for this thread's chunks.
template <class Use>
void each_chunk(const WinogradTiles& job, Use use) {
    const int64_t bands = job.batch * ((job.down + job.band_rows - 1) / job.band_rows);
    const int64_t thread = thread_number(), threads = team_size();
    const int64_t end = bands * (thread + 1) / threads;
    for (int64_t band = bands * thread / threads; band < end; band += job.chunk_bands) {
        use(band, smaller(job.chunk_bands, end - band));
    }
}

SPARSE_MOON_INLINE void transform_input(const Vec (&d)[4], Vec (&out)[4]) {
    out[0] = d[0] - d[2];
    out[1] = d[1] + d[2];
    out[2] = d[2] - d[1];
    out[3] = d[3] - d[1];
}

SPARSE_MOON_INLINE void transform_weight(const Vec (&w)[3], Vec (&out)[4]) {
    const Vec ends = (w[0] + w[2]) * 0.5f, middle = w[1] * 0.5f;
    out[0] = w[0];
    out[1] = ends + middle;
    out[2] = ends - middle;
    out[3] = w[2];
}

SPARSE_MOON_INLINE void transform_output(const Vec (&m)[4], Vec (&out)[2]) {
    out[0] = m[0] + m[1] + m[2];
    out[1] = m[1] - m[2] + m[3];
}

SPARSE_MOON_INLINE void transform_output_grad(const Vec (&g)[2], Vec (&out)[4]) {
    out[0] = g[0];
    out[1] = g[0] + g[1];
    out[2] = g[0] - g[1];
    out[3] = g[1];
}

SPARSE_MOON_INLINE void transform_weight_grad(const Vec (&m)[4], Vec (&out)[3]) {
    const Vec both = (m[1] + m[2]) * 0.5f;
    out[0] = m[0] + both;
    out[1] = (m[1] - m[2]) * 0.5f;
    out[2] = both + m[3];
}

// T X T' for the X of From x From numbers that from(y, x) returns, into to(y, x, number).
template <int From, int To, class Transform, class Load, class Store>
SPARSE_MOON_INLINE void transform_square(Transform transform, Load from, Store to) {
    Vec half[From][To];
#pragma GCC unroll 4
    for (int x = 0; x < From; ++x) {
        Vec column[From];
#pragma GCC unroll 4
        for (int y = 0; y < From; ++y) column[y] = from(y, x);
        transform(column, half[x]);
    }
#pragma GCC unroll 4
    for (int y = 0; y < To; ++y) {
        Vec row[From], out[To];
#pragma GCC unroll 4
        for (int x = 0; x < From; ++x) row[x] = half[x][y];
        transform(row, out);
#pragma GCC unroll 4
        for (int x = 0; x < To; ++x) to(y, x, out[x]);
    }
}

// Tiles of a panel, whose first is at `panel`, to their products.
template <int Size, class Transform>
SPARSE_MOON_INLINE void transform_tiles(Transform transform, const float* panel, int64_t pitch, int64_t rows,
                                        int64_t cols, float* out, int64_t stride) {
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < cols; ++j, out += kLanes) {
            const float* tile = panel + (2 * i * pitch + 2 * j) * kLanes;
            transform_square<Size, 4>(
                transform, [&](int y, int x) { return load(tile + (y * pitch + x) * kLanes); },
                [&](int y, int x, Vec v) { store(out + (y * 4 + x) * stride * kLanes, v); });
        }
    }
}

// Products of the input of a chunk; returns their number of tiles.
inline int64_t transform_inputs(const WinogradTiles& job, const WinogradLayout& layout, int64_t band, int64_t count,
                                float* panel, float* products) {
    const PanelShape& shape = job.source_panel;
    int64_t tiles = 0;
    clear_margins(shape, panel);
    for (int64_t v = 0; v < layout.inputs; ++v) {
        tiles = each_band(job, band, count, [&](int64_t image, int64_t row, int64_t rows, int64_t tile) {
            pack_band(job.source, shape, image, v * kLanes, 2 * row - job.padding[0], panel);
            transform_tiles<4>([](const Vec (&d)[4], Vec (&out)[4]) { transform_input(d, out); },
                               panel + (shape.margin - job.padding[1]) * kLanes, shape.pitch, rows, job.across,
                               products + (v * layout.tiles + tile) * kLanes, layout.input_stride);
        });
    }
    return tiles;
}

// sums[r][v] += sum over k of scalar(k, r) * vector(k, v), or = where it is the first of its parts.
template <int V, class Broadcast, class Vector>
SPARSE_MOON_INLINE void add_products(int64_t count, bool first, Broadcast scalar, Vector vector, float* sums,
                                     int64_t row_stride, int64_t vector_stride) {
    Vec total[kSumRows][V] = {};
    for (int64_t k = 0; k < count; ++k) {
        Vec held[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) held[v] = vector(k, v);
#pragma GCC unroll 8
        for (int r = 0; r < kSumRows; ++r) {
            const Vec all = broadcast(scalar(k, r));
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) total[r][v] += all * held[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kSumRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            float* sum = sums + r * row_stride + v * vector_stride;
            store(sum, first ? total[r][v] : load(sum) + total[r][v]);
        }
    }
}

// ---- output, or the input's gradient

inline int64_t winograd_conv2d_scratch(const WinogradConv2d& job) {
    return WinogradLayout(job, job.target.channels).vectors() * kVecBytes;
}

// [products][vectors of output channels][input channels]
inline void winograd_weight(const WinogradWeight& weight) {
    const int64_t outputs = channel_vectors(weight.outputs), stride = outputs * weight.inputs;
#pragma omp parallel for num_threads(weight.threads) schedule(static)
    for (int64_t v = 0; v < outputs; ++v) {
        const int64_t count = smaller(weight.outputs - v * kLanes, kLanes);
        alignas(64) float taps[9][kLanes] = {};
        for (int64_t c = 0; c < weight.inputs; ++c) {
            const float* from = weight.taps + v * kLanes * weight.output_stride + c * weight.input_stride;
            for (int64_t l = 0; l < count; ++l) {
                for (int tap = 0; tap < 9; ++tap) {
                    taps[tap][l] = from[l * weight.output_stride + (weight.mirrored ? 8 - tap : tap)];
                }
            }
            float* out = weight.products + (v * weight.inputs + c) * kLanes;
            transform_square<3, 4>([](const Vec (&w)[3], Vec (&out)[4]) { transform_weight(w, out); },
                                   [&](int y, int x) { return load(taps[y * 3 + x]); },
                                   [&](int y, int x, Vec p) { store(out + (y * 4 + x) * stride * kLanes, p); });
        }
    }
}

template <int V>
void multiply_tiles(const float* inputs, int64_t input_vector, const float* weight, int64_t weight_vector,
                    int64_t channels, bool first, float* outputs, int64_t output_vector) {
    add_products<V>(
        channels, first,
        [&](int64_t c, int r) { return inputs[c / kLanes * input_vector + r * kLanes + c % kLanes]; },
        [&](int64_t c, int v) { return load(weight + v * weight_vector + c * kLanes); }, outputs, kLanes,
        output_vector);
}

inline void multiply_chunk(const WinogradConv2d& job, const WinogradLayout& layout, const float* inputs, int64_t tiles,
                           float* outputs) {
    const int64_t channels = job.source.channels, vector = layout.tiles * kLanes;
    for (int64_t product = 0; product < kProducts; ++product) {
        const float* input = inputs + product * layout.input_stride * kLanes;
        const float* weight = job.weight + product * layout.outputs * channels * kLanes;
        float* output = outputs + product * layout.output_stride * kLanes;
        for (int64_t v = 0; v < layout.outputs; v += kSumVectors) {
            const auto multiply = layout.outputs - v < kSumVectors ? multiply_tiles<1> : multiply_tiles<kSumVectors>;
            for (int64_t c = 0; c < channels; c += kSumChannels) {
                for (int64_t t = 0; t < tiles; t += kSumRows) {
                    multiply(input + c / kLanes * vector + t * kLanes, vector, weight + (v * channels + c) * kLanes,
                             channels * kLanes, smaller(channels - c, kSumChannels), c == 0,
                             output + v * vector + t * kLanes, vector);
                }
            }
        }
    }
}

// From the products of a vector of output channels: tiles of a band, into a panel without margins.
inline void transform_outputs(const float* products, int64_t stride, Vec bias, int64_t rows, int64_t cols,
                              float* panel) {
    const int64_t pitch = 2 * cols;
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < cols; ++j, products += kLanes) {
            float* tile = panel + (2 * i * pitch + 2 * j) * kLanes;
            transform_square<4, 2>([](const Vec (&m)[4], Vec (&out)[2]) { transform_output(m, out); },
                                   [&](int y, int x) { return load(products + (y * 4 + x) * stride * kLanes); },
                                   [&](int y, int x, Vec v) { store(tile + (y * pitch + x) * kLanes, v + bias); });
        }
    }
}

inline void winograd_conv2d(const WinogradConv2d& job) {
    const WinogradLayout layout(job, job.target.channels);
#pragma omp parallel num_threads(job.threads)
    {
        float* inputs = reinterpret_cast<float*>(job.scratch + thread_number() * job.thread_scratch);
        float* outputs = inputs + kProducts * layout.input_stride * kLanes;
        float* panel = outputs + kProducts * layout.output_stride * kLanes;
        each_chunk(job, [&](int64_t band, int64_t count) {
            const int64_t tiles = transform_inputs(job, layout, band, count, panel, inputs);
            multiply_chunk(job, layout, inputs, tiles, outputs);
            for (int64_t v = 0; v < layout.outputs; ++v) {
                const int channels = static_cast<int>(smaller(job.target.channels - v * kLanes, kLanes));
                const Vec bias = job.bias ? load_range(job.bias + v * kLanes, 0, channels) : Vec{};
                each_band(job, band, count, [&](int64_t image, int64_t row, int64_t rows, int64_t tile) {
                    transform_outputs(outputs + (v * layout.tiles + tile) * kLanes, layout.output_stride, bias, rows,
                                      job.across, panel);
                    unpack_band(panel, 2 * job.across, 2 * rows, image, v * kLanes, 2 * row, job.streaming, job.target);
                });
            }
        });
        stream_fence();
    }
}

// ---- the weight's gradient

inline int64_t winograd_weight_grad_scratch(const WinogradWeightGrad& job) {
    const WinogradLayout layout(job, job.outputs);
    return (layout.vectors() + layout.sums()) * kVecBytes;
}

template <int V>
void multiply_grads(const float* grad, const float* input, int64_t input_vector, int64_t tiles, bool first, float* sums,
                    int64_t sum_row) {
    add_products<V>(
        tiles, first, [&](int64_t t, int r) { return grad[t * kLanes + r]; },
        [&](int64_t t, int v) { return load(input + v * input_vector + t * kLanes); }, sums, sum_row, kLanes);
}

// sums[product][output channel][input channel] of a chunk.
inline void add_chunk(const WinogradLayout& layout, const float* inputs, const float* grads, int64_t tiles, bool first,
                      float* sums) {
    const int64_t sum_row = layout.inputs * kLanes, vector = layout.tiles * kLanes;
    for (int64_t product = 0; product < kProducts; ++product) {
        const float* input = inputs + product * layout.input_stride * kLanes;
        const float* grad = grads + product * layout.output_stride * kLanes;
        float* sum = sums + product * layout.outputs * kLanes * sum_row;
        for (int64_t v = 0; v < layout.inputs; v += kSumVectors) {
            const auto multiply = layout.inputs - v < kSumVectors ? multiply_grads<1> : multiply_grads<kSumVectors>;
            for (int64_t o = 0; o < layout.outputs * kLanes; o += kSumRows) {
                multiply(grad + o / kLanes * vector + o % kLanes, input + v * vector, vector, tiles, first,
                         sum + o * sum_row + v * kLanes, sum_row);
            }
        }
    }
}

// The gradient of output channel job.first + output from the sums of `threads` threads.
inline void finish_output(const WinogradWeightGrad& job, const WinogradLayout& layout, int64_t output, int threads) {
    const int64_t channels = job.source.channels, product = layout.outputs * kLanes * layout.inputs * kLanes;
    for (int64_t v = 0; v < layout.inputs; ++v) {
        alignas(64) float taps[9][kLanes];
        transform_square<4, 3>(
            [](const Vec (&m)[4], Vec (&out)[3]) { transform_weight_grad(m, out); },
            [&](int y, int x) {
                Vec total{};
                for (int thread = 0; thread < threads; ++thread) {
                    const float* sums = reinterpret_cast<const float*>(job.scratch + thread * job.thread_scratch);
                    total += load(sums + (y * 4 + x) * product + (output * layout.inputs + v) * kLanes);
                }
                return total;
            },
            [&](int y, int x, Vec tap) { store(taps[y * 3 + x], tap); });
        float* to = job.weight_grad + ((job.first + output) * channels + v * kLanes) * 9;
        const int64_t count = smaller(channels - v * kLanes, kLanes);
        for (int64_t c = 0; c < count; ++c) {
            for (int tap = 0; tap < 9; ++tap) *to++ = taps[tap][c];
        }
    }
}

inline void winograd_weight_grad(const WinogradWeightGrad& job) {
    const WinogradLayout layout(job, job.outputs);
#pragma omp parallel num_threads(job.threads)
    {
        const int64_t thread = thread_number(), threads = team_size();
        float* sums = reinterpret_cast<float*>(job.scratch + thread * job.thread_scratch);
        float* inputs = sums + layout.sums() * kLanes;
        float* grads = inputs + kProducts * layout.input_stride * kLanes;
        float* panel = grads + kProducts * layout.output_stride * kLanes;
        const PanelShape& shape = job.target_panel;
        bool first = true;
        each_chunk(job, [&](int64_t band, int64_t count) {
            const int64_t tiles = transform_inputs(job, layout, band, count, panel, inputs);
            clear_margins(shape, panel);
            for (int64_t v = 0; v < layout.outputs; ++v) {
                each_band(job, band, count, [&](int64_t image, int64_t row, int64_t rows, int64_t tile) {
                    pack_band(job.target, shape, image, job.first + v * kLanes, 2 * row, panel);
                    transform_tiles<2>([](const Vec (&g)[2], Vec (&out)[4]) { transform_output_grad(g, out); },
                                       panel + shape.margin * kLanes, shape.pitch, rows, job.across,
                                       grads + (v * layout.tiles + tile) * kLanes, layout.output_stride);
                });
            }
            add_chunk(layout, inputs, grads, tiles, first, sums);
            first = false;
        });
        if (first) std::memset(sums, 0, layout.sums() * kVecBytes);  // no chunk
#pragma omp barrier
        for (int64_t o = job.outputs * thread / threads; o < job.outputs * (thread + 1) / threads; ++o) {
            finish_output(job, layout, o, static_cast<int>(threads));
        }
    }
}

}  // namespace SPARSE_MOON_ISA
}  // namespace sparse_moon
