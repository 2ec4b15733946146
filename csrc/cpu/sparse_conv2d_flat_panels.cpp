#include "sparse_conv2d_flat_panels.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "sparse_conv2d_plan.h"

namespace sparse_moon {
namespace conv2d {
namespace {

// Flat panels: what a panel should take where there is a choice, and may take. Rows come in blocks of a number that
// makes whole vectors, whatever the pitch.
constexpr int64_t kFlatBytes = int64_t{256} << 10;
constexpr int64_t kFlatMostBytes = int64_t{1} << 20;
constexpr int64_t kRowBlock = 16;
constexpr int64_t kShortestRow = 8;
constexpr int64_t kLine = 64 / kFloat;
constexpr int64_t kFlatSlack = 16 * kLine;  // at least a tile, of whichever instruction set

std::atomic<FlatPanels> flat_panels{FlatPanels::kWhereFaster};

// Entries a channel up to which flat panels are the faster ones. They spare the transpositions, worth 6 entries a
// channel where images are large enough that lanes of several meet in the same cache sets, else 1; and more with
// AVX-512 where rows are no whole vectors, because strips of many rows are then written at once, and do not stay in the
// L2 cache. An entry costs 1.1 times as much (1.3 times where vectors of AVX-512 cross cache lines), and as much more
// as there is between rows. (Of the time without them, forward and backward, where this chooses them: 0.54 to 1.04 with
// AVX2 on Zen 3, 17 shapes at 90 to 99.5 % sparsity; 0.49 to 1.06 with AVX-512 on Zen 4, 16 shapes at 50 to 99 %.)
double flat_entries(const Conv2d& conv) {
    constexpr int64_t kLargeImage = int64_t{64} << 10;
    constexpr double kMost = 40;
    const int64_t in_area = conv.in_size[0] * conv.in_size[1], out_area = conv.out_size[0] * conv.out_size[1];
    const int64_t image = std::max(conv.in_channels * in_area, conv.out_channels * out_area) * kFloat;
    const double line = (conv.in_size[0] + conv.padding[0]) * (conv.in_size[1] + conv.padding[1]);
    const bool avx512 = kernels().lanes > 8;
    const double large = avx512 && conv.out_size[1] % kernels().lanes != 0 ? 15 : 6;
    const double cost = avx512 && conv.kernel[1] > 1 ? 1.3 : 1.1;
    return std::min(kMost, (image >= kLargeImage ? large : 1) / (cost * line / std::min(in_area, out_area) - 1));
}

// Whether other panels, in whose lanes are images or bands of their rows, would take so many more vectors a channel for
// a small batch that flat ones are the faster ones whatever the number of entries.
bool fills_few_lanes(const Conv2d& conv) {
    constexpr double kFewer = 1.5;
    const int64_t lanes = kernels().lanes, height = conv.out_size[0], width = conv.out_size[1];
    if (conv.batch >= lanes) return false;
    const int64_t bands = std::clamp<int64_t>(lanes / conv.batch, 1, height);
    const int64_t line = conv.batch * (conv.in_size[0] + conv.padding[0]) * (conv.in_size[1] + conv.padding[1]);
    return kFewer * ceil_div(line, lanes) <= ceil_div(height, bands) * width;
}

// Bytes of a number in each channel of the larger activation.
int64_t flat_column(const Conv2d& conv) {
    return std::max({conv.in_channels, conv.out_channels, int64_t{1}}) * kFloat;
}

// For what a product along these axes reads. Both gradients and the forward pass have the same pitch and units.
FlatPanel flat_panel(const Conv2d& conv, const Axis& height, const Axis& width, int threads) {
    FlatPanel panel{};
    const auto whole = [](int64_t n) { return ceil_div(n, kLine) * kLine; };
    panel.pitch = conv.in_size[1] + conv.padding[1];
    panel.above = std::max<int64_t>(-height.first, 0);
    panel.below = std::max<int64_t>(height.last, 0);
    const int64_t row_bytes = flat_column(conv) * panel.pitch, rows = conv.in_size[0] + conv.padding[0];
    if (row_bytes * rows <= kFlatMostBytes) {
        panel.images = std::clamp<int64_t>(kFlatBytes / (row_bytes * rows), 1, std::max<int64_t>(conv.batch / threads, 1));
        panel.image_stride = panel.pitch * rows;
    } else {
        panel.images = 1;
        panel.block_rows = std::max<int64_t>(kFlatBytes / row_bytes / kRowBlock, 1) * kRowBlock;
        panel.image_stride = panel.pitch * (panel.block_rows + panel.below);
    }
    panel.lead = whole(panel.above * panel.pitch + std::max<int64_t>(-width.first, 0));
    panel.channel_stride = whole(panel.lead + panel.images * panel.image_stride);
    if (panel.channel_stride / kLine % 2 == 0) panel.channel_stride += kLine;
    panel.slack = whole(panel.below * panel.pitch + std::max<int64_t>(width.last, 0)) + kFlatSlack;
    return panel;
}

Offsets flat_offsets(const FlatPanel& panel, const Dimension& height, const Dimension& width) {
    PanelShape shape{};
    shape.row_step = 1;
    shape.margin = panel.lead + height.axis.first * panel.pitch;
    shape.pitch = panel.pitch;
    shape.channel_stride = panel.channel_stride;
    return Offsets(shape, height, width, 1);
}

FlatCorrelateJob flat_job(const Conv2d& conv, const FlatPanel& panel, Planes source, Planes target, int threads) {
    FlatCorrelateJob job{};
    job.batch = conv.batch;
    job.panel = panel;
    job.source = source;
    job.target = target;
    job.threads = threads;
    expect_writes(target.data, target.bytes(conv.batch));
    return job;
}

void run(FlatCorrelateJob& job) {
    job.thread_scratch = kernels().flat_correlate_scratch(job);
    job.scratch = scratch(Slot::kKernel, job.thread_scratch * job.threads);
    kernels().flat_correlate(job);
}

}  // namespace

bool goes_flat(const Conv2d& conv, const SparseMatrix& weight, bool channels_last) {
    const FlatPanels where = flat_panels.load(std::memory_order_relaxed);
    bool fits = where != FlatPanels::kNever && !channels_last;
    for (int d = 0; d < 2; ++d) {
        fits = fits && conv.stride[d] == 1 && conv.padding[d] <= (conv.kernel[d] - 1) * conv.dilation[d];
    }
    const int64_t rows = std::min(conv.in_size[0], kRowBlock) + (conv.kernel[0] - 1) * conv.dilation[0];
    fits = fits && flat_column(conv) * rows * (conv.in_size[1] + conv.padding[1]) <= kFlatMostBytes;
    if (where == FlatPanels::kWherePossible || !fits) return fits;
    if (fills_few_lanes(conv)) return true;
    return std::min(conv.in_size[1], conv.out_size[1]) >= kShortestRow &&
           entry_count(weight) <= flat_entries(conv) * (conv.in_channels + conv.out_channels);
}

void flat_forward(const Conv2d& conv, const SparseMatrix& weight, const void* input, const float* bias, void* output,
                  int threads) {
    const Dimension height = forward_dimension(conv, 0), width = forward_dimension(conv, 1);
    FlatCorrelateJob job =
        flat_job(conv, flat_panel(conv, height.axis, width.axis, threads),
                 input_planes(conv, input, false),
                 output_planes(conv, output, false), threads);
    const std::vector<int64_t> starts = row_starts(weight);
    job.entries = forward_entries(conv, weight, flat_offsets(job.panel, height, width), starts, threads);
    job.starts = starts.data();
    job.bias = bias;
    run(job);
}

void flat_grads(const Conv2d& conv, const SparseMatrix& weight, const void* grad, const void* input,
                void* input_grad, float* values_grad, int threads) {
    const Dimension height = input_grad_dimension(conv, 0), width = input_grad_dimension(conv, 1);
    const FlatPanel grad_panel = flat_panel(conv, height.axis, width.axis, threads);
    const Planes grads = output_planes(conv, grad, false);
    const int used = values_grad ? affordable_threads(weight, threads) : threads;
    FlatCorrelateJob job{};
    std::vector<int64_t> starts;
    if (input_grad) {
        job = flat_job(conv, grad_panel, grads, input_planes(conv, input_grad, false), used);
        Entry* entries = reinterpret_cast<Entry*>(scratch(Slot::kLists, entry_count(weight) * sizeof(Entry)));
        input_grad_entries(conv, weight, flat_offsets(grad_panel, height, width), 1, threads, entries, starts);
        job.entries = entries;
        job.starts = starts.data();
        if (!values_grad) return run(job);
    }
    const Dimension down = forward_dimension(conv, 0), across = forward_dimension(conv, 1);
    FlatDotsJob dots{};
    dots.batch = conv.batch;
    dots.panel = flat_panel(conv, down.axis, across.axis, threads);
    dots.grad_panel = grad_panel;
    dots.source = input_planes(conv, input, false);
    dots.grad = grads;
    dots.input_grad = input_grad ? &job : nullptr;
    dots.threads = used;
    const std::vector<int64_t> rows = row_starts(weight);
    dots.starts = rows.data();
    list_offsets(conv, weight, flat_offsets(dots.panel, down, across), threads, dots);
    dots.thread_scratch = kernels().flat_dots_scratch(dots);
    dots.scratch = scratch(Slot::kKernel, dots.thread_scratch * dots.threads);
    kernels().flat_dots(dots);
    add_sums(weight, dots, threads, values_grad);
}

}  // namespace conv2d

void set_flat_panels(FlatPanels where) { conv2d::flat_panels.store(where, std::memory_order_relaxed); }

}  // namespace sparse_moon
