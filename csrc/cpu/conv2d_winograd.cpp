#include "conv2d_winograd.h"

#include <algorithm>
#include <cstdint>

#include "dispatch.h"
#include "sparse_conv2d_plan.h"

namespace sparse_moon {
namespace {

using conv2d::kFloat;
using conv2d::input_planes;
using conv2d::output_planes;

constexpr int64_t kProducts = 16;
// Tiles a chunk: enough of them that loading and storing sums (or weights) is little work, few enough for the cache.
constexpr int64_t kChunk = 128, kLeastChunk = 16;
// Each thread keeps sums of the weight's gradient of its own, so many bytes of them: more output channels are computed
// in turn. The gradients of the last layers are computed at training's peak of memory.
constexpr int64_t kSumBytes = int64_t{2} << 20;
constexpr int64_t kTileBytes = int64_t{2} << 20;  // and of its transformed tiles, where that leaves kLeastChunk
// What threads keep in all at most.
constexpr int64_t kThreadsBytes = int64_t{256} << 20;

int64_t whole_vectors(int64_t channels) {
    const int64_t lanes = kernels().lanes;
    return (channels + lanes - 1) / lanes * lanes;
}

// For `rows` rows of kLanes channels, with zeros in `before` columns and more in front of each row and `after` behind.
PanelShape band_panel(const Planes& planes, int64_t rows, int64_t before, int64_t after) {
    PanelShape shape{};
    shape.channels = 1;
    shape.rows = shape.block_rows = rows;
    shape.row_step = shape.grid_step = 1;
    shape.margin = std::max<int64_t>({before, after, 0});
    shape.pitch = planes.width + shape.margin;
    shape.channel_stride = rows * shape.pitch;
    return shape;
}

WinogradTiles cut_into_tiles(int64_t batch, const Planes& source, const Planes& target, const int64_t* padding,
                             int64_t largest_chunk, int threads) {
    WinogradTiles tiles{};
    tiles.batch = batch;
    tiles.source = source;
    tiles.target = target;
    tiles.padding[0] = padding[0];
    tiles.padding[1] = padding[1];
    tiles.down = (target.height + 1) / 2;
    tiles.across = (target.width + 1) / 2;
    const int64_t count = batch * tiles.down * tiles.across;
    const int64_t chunk = std::clamp(count / threads, kLeastChunk, largest_chunk);
    tiles.band_rows = std::clamp<int64_t>(chunk / tiles.across, 1, tiles.down);
    tiles.chunk_bands = std::max<int64_t>(chunk / (tiles.band_rows * tiles.across), 1);
    tiles.source_panel =
        band_panel(source, 2 * tiles.band_rows + 2, padding[1], 2 * tiles.across + 2 - padding[1] - source.width);
    tiles.target_panel = band_panel(target, 2 * tiles.band_rows, 0, 2 * tiles.across - target.width);
    tiles.threads = static_cast<int>(std::clamp<int64_t>(count / chunk, 1, threads));
    return tiles;
}

void set_scratch(WinogradTiles& tiles, int64_t bytes) {
    tiles.thread_scratch = bytes;
    tiles.scratch = scratch(Slot::kKernel, bytes * tiles.threads);
}

void correlate(int64_t batch, const Planes& source, const Planes& target, const int64_t* padding,
               WinogradWeight weight, const float* bias, int threads) {
    if (batch == 0) return;
    WinogradConv2d job{cut_into_tiles(batch, source, target, padding, kChunk, threads), nullptr, bias, false};
    weight.products = reinterpret_cast<float*>(
        scratch(Slot::kLists, kProducts * whole_vectors(target.channels) * source.channels * kFloat));
    weight.threads = threads;
    kernels().winograd_weight(weight);
    job.weight = weight.products;
    const int64_t bytes = batch * target.channels * target.height * target.width * kFloat;
    job.streaming = bytes >= kStreamBytes;
    expect_writes(target.data, bytes);
    set_scratch(job, kernels().winograd_conv2d_scratch(job));
    kernels().winograd_conv2d(job);
}

}  // namespace

void winograd_conv2d(const Conv2d& conv, const float* weight, const float* input, const float* bias, float* output,
                     bool channels_last, int threads) {
    const WinogradWeight taps{weight, conv.out_channels, conv.in_channels, conv.in_channels * 9, 9, false, nullptr, 1};
    correlate(conv.batch, input_planes(conv, input, channels_last),
              output_planes(conv, output, channels_last), conv.padding, taps, bias, threads);
}

void winograd_input_grad(const Conv2d& conv, const float* weight, const float* grad, float* input_grad,
                         bool channels_last, int threads) {
    const WinogradWeight taps{weight, conv.in_channels, conv.out_channels, 9, conv.in_channels * 9, true, nullptr, 1};
    const int64_t padding[2] = {2 - conv.padding[0], 2 - conv.padding[1]};
    correlate(conv.batch, output_planes(conv, grad, channels_last),
              input_planes(conv, input_grad, channels_last), padding, taps, nullptr, threads);
}

void winograd_weight_grad(const Conv2d& conv, const float* grad, bool grad_channels_last, const float* input,
                          bool input_channels_last, float* weight_grad, int threads) {
    const int64_t lanes = kernels().lanes, output_bytes = kProducts * whole_vectors(conv.in_channels) * kFloat;
    const int64_t part = std::min(std::max<int64_t>(kSumBytes / output_bytes / lanes, 1) * lanes,
                                  whole_vectors(conv.out_channels));
    const int64_t tile_bytes = kProducts * (whole_vectors(conv.in_channels) + part) * kFloat;
    const int64_t chunk = std::clamp(kTileBytes / tile_bytes, kLeastChunk, kChunk);
    const int affordable = std::min(threads, static_cast<int>(kThreadsBytes / (kSumBytes + kTileBytes)));
    WinogradWeightGrad job{
        cut_into_tiles(conv.batch, input_planes(conv, input, input_channels_last),
                       output_planes(conv, grad, grad_channels_last), conv.padding, chunk,
                       affordable),
        weight_grad, 0, 0};
    for (; job.first < conv.out_channels; job.first += part) {
        job.outputs = std::min(part, conv.out_channels - job.first);
        set_scratch(job, kernels().winograd_weight_grad_scratch(job));
        kernels().winograd_weight_grad(job);
    }
}

}  // namespace sparse_moon
