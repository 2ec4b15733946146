// From a convolution to the jobs of its kernels: geometry, workspace and order of launches. `Device` runs the jobs: on
// a stream in sparse_conv2d.cu, on the host in tests/cuda_sparse_conv2d.cpp.
#pragma once
#include <algorithm>
#include <climits>
#include <stdexcept>
#include <type_traits>

#include "cuda/sparse_conv2d.h"
#include "cuda/sparse_conv2d_kernels.h"

namespace sparse_moon::cuda::conv2d {

// Vectors that a thread holds, as far as its registers allow: 64 with 32 warps a block, 128 with 16. Large tiles cost
// least, small ones keep all of the chip busy.
constexpr int kCorrelateTiles[] = {4, 2, 1}, kDotsTiles[] = {8, 4, 2};

// Tiles are chosen for the multiprocessors of a Hopper, with a block each. Not for those of the chip at hand, so that
// results have the same bits on all of them.
constexpr int64_t kMultiprocessors = 132, kMaxSlices = 64;

// Rounds of blocks, times what a block takes: an entry costs about as much as one vector beside those it multiplies.
inline int64_t cost(int64_t blocks, int64_t tiles_of_block, int tile) {
    return ceil_div(blocks, kMultiprocessors) * tiles_of_block * (tile + 1);
}

// Tile size where every block does one tile.
inline int correlate_tile(int64_t vectors, int64_t rows) {
    int best = kCorrelateTiles[0];
    int64_t least = INT64_MAX;
    for (const int tile : kCorrelateTiles) {
        const int64_t this_cost = cost(ceil_div(rows, kWarps) * ceil_div(vectors, tile * kWarp), 1, tile);
        if (this_cost < least) least = this_cost, best = tile;
    }
    return best;
}

// Tile size, and the number of slices that the values' gradient cuts the tiles into.
struct Tiling {
    int tile;
    int32_t slices;
};

// Every block does a slice; of equal ones the coarsest, with the fewest partial sums.
inline Tiling dots_tiling(int64_t vectors, int64_t rows) {
    Tiling best{kDotsTiles[0], 0};
    int64_t least = INT64_MAX;
    for (const int tile : kDotsTiles) {
        const int64_t tiles = ceil_div(vectors, tile * kWarp);
        for (int64_t slices = 1; slices <= std::min(tiles, kMaxSlices); ++slices) {
            const int64_t this_cost = cost(ceil_div(rows, kDotsWarps) * slices, ceil_div(tiles, slices), tile);
            if (this_cost < least) least = this_cost, best = {tile, static_cast<int32_t>(slices)};
        }
    }
    return best;
}

struct Axes {
    Axis height, width;
};

using MakeAxis = Axis (*)(int32_t, int32_t, int32_t, int32_t, int32_t, int32_t);

inline Axes make_axes(const Conv2d& c, MakeAxis make) {
    const auto along = [&](int i) {
        return make(c.in_size[i], c.out_size[i], c.kernel[i], c.stride[i], c.padding[i], c.dilation[i]);
    };
    return {along(0), along(1)};
}

inline Taps make_taps(const Conv2d& c) {
    return {{c.kernel[0], c.kernel[1]},
            {c.stride[0], c.stride[1]},
            {c.padding[0], c.padding[1]},
            {c.dilation[0], c.dilation[1]}};
}

inline PanelShape checked_shape(int32_t batch, int32_t channels, const Axes& axes, int vector) {
    const int64_t positions = static_cast<int64_t>(axes.height.panel) * axes.width.panel;
    const int64_t target = static_cast<int64_t>(axes.height.target) * axes.width.target;
    const PanelShape shape = panel_shape(batch, channels, axes.height, axes.width, vector);
    if (positions > INT_MAX || target > INT_MAX || shape.vectors() > UINT_MAX) {
        throw std::length_error("sparse_conv2d: a plane has 2^31 positions or an activation 2^32 vectors of 16 bytes");
    }
    return shape;
}

// What each pass works with.
struct Plan {
    Axes axes;         // of the correlation
    PanelShape panel;  // of its source: the input, or in the input's gradient grad
    Axes grad_axes;    // values' gradient only: grad as it is
    PanelShape grad_panel;
    Tiling tiling;
    int64_t entries, starts, grad, partial;  // places in the workspace, where the panel comes first
    int64_t bytes;                           // its size
};

// `vector` is the number of images in 16 bytes.
inline Plan make_plan(Conv2dPass pass, const Conv2d& conv, int vector, int32_t n) {
    constexpr int64_t kAlignment = 256, kVecBytes = 16;
    const bool to_input = pass == Conv2dPass::input_grad;
    Plan p{};
    p.axes = make_axes(conv, to_input ? grad_axis : forward_axis);
    p.panel = checked_shape(conv.batch, to_input ? conv.out_channels : conv.in_channels, p.axes, vector);
    p.entries = round_up(p.panel.vectors() * kVecBytes, kAlignment);
    p.bytes = p.entries + round_up(static_cast<int64_t>(n) * sizeof(Entry), kAlignment);
    if (to_input) {
        const int64_t phases = static_cast<int64_t>(conv.stride[0]) * conv.stride[1];
        p.starts = p.bytes;
        p.bytes += (conv.in_channels * phases + 1) * sizeof(int32_t);
    } else if (pass == Conv2dPass::values_grad) {
        p.grad_axes = {plain_axis(conv.out_size[0]), plain_axis(conv.out_size[1])};
        p.grad_panel = checked_shape(conv.batch, conv.out_channels, p.grad_axes, vector);
        p.tiling = dots_tiling(Grid(p.axes.height, p.axes.width, 0, p.panel).vectors(), conv.out_channels);
        p.grad = p.bytes;
        p.partial = p.grad + round_up(p.grad_panel.vectors() * kVecBytes, kAlignment);
        p.bytes = p.partial + static_cast<int64_t>(p.tiling.slices) * n * sizeof(float);
    }
    return p;
}

template <class T>
T* place(void* workspace, int64_t offset) {
    return reinterpret_cast<T*>(static_cast<char*>(workspace) + offset);
}

// Calls run(tile) with one of three tile sizes as a constant.
template <const int (&kTiles)[3], class Run>
void with_tile(int tile, Run run) {
    switch (tile) {
        case kTiles[0]: return run(std::integral_constant<int, kTiles[0]>());
        case kTiles[1]: return run(std::integral_constant<int, kTiles[1]>());
        case kTiles[2]: return run(std::integral_constant<int, kTiles[2]>());
    }
}

template <class T, class Device>
void run_correlate(Device& device, const CorrelateJob<T>& job) {
    const int64_t vectors = Grid(job.height, job.width, 0, job.panel).vectors() * job.phases();
    with_tile<kCorrelateTiles>(correlate_tile(vectors, job.channels),
                               [&](auto tile) { device.template correlate<tile>(job); });
}

// What the jobs of all passes share: the panel that they read, and the entries in its vectors.
template <template <class> class Job, class T>
Job<T> job_over(const Plan& p, const Vec<T>* panel, const Entry* entries) {
    Job<T> job{};
    job.panel = p.panel;
    job.height = p.axes.height;
    job.width = p.axes.width;
    job.source = panel;
    job.entries = entries;
    return job;
}

template <class T, class Device>
void forward(Device& device, const Conv2d& conv, const Conv2dIndex& index, const T* values, const T* input,
             const T* bias, T* output, void* workspace) {
    const Plan p = make_plan(Conv2dPass::forward, conv, kVector<T>, index.n);
    Vec<T>* panel = place<Vec<T>>(workspace, 0);
    Entry* entries = place<Entry>(workspace, p.entries);
    const EntryJob<T> entry_job{p.panel, make_taps(conv), index.n, index.col, values, entries};
    device.prepare(entry_job, PackJob<T>{p.panel, p.axes.height, p.axes.width, input, panel});

    auto job = job_over<CorrelateJob, T>(p, panel, entries);
    job.starts = index.row_ptr;
    job.channels = conv.out_channels;
    job.group_channels = conv.out_channels / conv.groups;
    job.group_stride = conv.in_channels / conv.groups * p.panel.channel_stride();
    job.group_lists = job.group_channels;
    job.channel_lists = 1;
    job.bias = bias;
    job.target = output;
    run_correlate(device, job);
}

template <class T, class Device>
void input_gradient(Device& device, const Conv2d& conv, const Conv2dIndex& index, const T* values, const T* grad,
                    T* input_grad, void* workspace) {
    const Plan p = make_plan(Conv2dPass::input_grad, conv, kVector<T>, index.n);
    Vec<T>* panel = place<Vec<T>>(workspace, 0);
    Entry* entries = place<Entry>(workspace, p.entries);
    int32_t* starts = place<int32_t>(workspace, p.starts);
    const int32_t group_channels = conv.in_channels / conv.groups;
    const GradEntryJob<T> entry_job{p.panel,      p.axes.height, p.axes.width, make_taps(conv), index.n,
                                    group_channels, conv.groups, index.t_ptr,  index.t_row,     index.t_perm,
                                    values,       entries,       starts};
    device.prepare(entry_job, PackJob<T>{p.panel, p.axes.height, p.axes.width, grad, panel});

    auto job = job_over<CorrelateJob, T>(p, panel, entries);
    job.starts = starts;
    job.channels = conv.in_channels;
    job.group_channels = group_channels;
    job.group_stride = 0;  // entries count from the first channel of all
    job.group_lists = job.phases();
    job.channel_lists = conv.groups * job.phases();
    job.bias = nullptr;
    job.target = input_grad;
    run_correlate(device, job);
}

template <class T, class Device>
void values_gradient(Device& device, const Conv2d& conv, const Conv2dIndex& index, const T* grad, const T* input,
                     T* values_grad, void* workspace) {
    const Plan p = make_plan(Conv2dPass::values_grad, conv, kVector<T>, index.n);
    Vec<T>* panel = place<Vec<T>>(workspace, 0);
    Vec<T>* grad_panel = place<Vec<T>>(workspace, p.grad);
    Entry* entries = place<Entry>(workspace, p.entries);
    float* partial = place<float>(workspace, p.partial);
    const EntryJob<T> entry_job{p.panel, make_taps(conv), index.n, index.col, nullptr, entries};
    device.prepare(entry_job, PackJob<T>{p.panel, p.axes.height, p.axes.width, input, panel},
                   PackJob<T>{p.grad_panel, p.grad_axes.height, p.grad_axes.width, grad, grad_panel});

    auto job = job_over<DotsJob, T>(p, panel, entries);
    job.grad_panel = p.grad_panel;
    job.grad = grad_panel;
    job.row_ptr = index.row_ptr;
    job.n = index.n;
    job.channels = conv.out_channels;
    job.group_channels = conv.out_channels / conv.groups;
    job.group_stride = conv.in_channels / conv.groups * p.panel.channel_stride();
    job.slices = p.tiling.slices;
    job.partial = partial;
    with_tile<kDotsTiles>(p.tiling.tile, [&](auto tile) { device.template dots<tile>(job); });
    device.sum(SumJob<T>{index.n, p.tiling.slices, partial, values_grad});
}

}  // namespace sparse_moon::cuda::conv2d
