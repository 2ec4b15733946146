#include "sparse_conv2d_panels.h"

#include <algorithm>
#include <vector>

#include "sparse_conv2d_plan.h"

namespace sparse_moon::conv2d {
namespace {

// Panels above this size are divided into blocks of rows. Only a window of a few rows is in use at a time, so that a
// panel may outgrow the L2 cache; larger blocks pack fewer rows twice.
constexpr int64_t kPanelBytes = int64_t{3} << 20;

PanelShape panel_shape(const Axis& height, const Axis& width, int64_t channels, int64_t block_rows) {
    PanelShape shape;
    shape.channels = channels;
    shape.block_rows = block_rows;
    shape.row_step = height.first == height.last ? height.step : 1;
    shape.grid_step = height.step / shape.row_step;
    shape.rows = (block_rows - 1) * shape.grid_step + (height.last - height.first) / shape.row_step + 1;
    const int64_t right = (width.grid - 1) * width.step + width.last - (width.source - 1);
    shape.margin = std::max<int64_t>({0, -width.first, right});
    shape.pitch = width.source + shape.margin;
    shape.channel_stride = (shape.rows * shape.pitch) | 1;
    return shape;
}

// Blocks of rows so that a panel keeps to its size and there is work for all threads.
Groups make_groups(const Axis& height, const Axis& width, int64_t batch, int64_t channels, int64_t lanes, int threads) {
    Groups groups{};
    groups.grid_rows = height.grid;
    groups.full = batch / lanes;
    groups.rest = batch % lanes;
    groups.bands = groups.rest > 0 ? std::clamp<int64_t>(lanes / groups.rest, 1, height.grid) : 0;
    groups.band_rows = groups.rest > 0 ? ceil_div(height.grid, groups.bands) : 0;
    int64_t rows = height.grid;
    while (rows > 1 && panel_shape(height, width, channels, rows).vectors() * lanes * kFloat > kPanelBytes) --rows;
    // Enough units for the threads, as long as the rows that neighbouring units both pack stay a minority.
    const int64_t overlap = (height.last - height.first) / height.step;
    const auto units = [&] {
        return groups.full * ceil_div(height.grid, rows) + (groups.rest > 0 ? ceil_div(groups.band_rows, rows) : 0);
    };
    while (rows > 2 * overlap + 2 && units() < threads) --rows;
    groups.full_blocks = ceil_div(height.grid, rows);
    groups.rest_blocks = groups.rest > 0 ? ceil_div(groups.band_rows, rows) : 0;
    return groups;
}

int64_t most_rows(const Groups& groups) {
    const int64_t full = groups.full > 0 ? ceil_div(groups.grid_rows, groups.full_blocks) : 0;
    const int64_t rest = groups.rest > 0 ? ceil_div(groups.band_rows, groups.rest_blocks) : 0;
    return std::max(full, rest);
}

int64_t split_count(const Groups& groups, int64_t channels, int64_t lanes, int threads) {
    const int64_t wanted = ceil_div(threads, std::max<int64_t>(groups.units(), 1));
    return std::clamp<int64_t>(wanted, 1, ceil_div(channels, lanes));
}

// Of these groups, or with none given of those that suit this product alone.
CorrelateJob make_job(const Conv2d& conv, const Dimension& height, const Dimension& width, Planes source, Planes target,
                      int threads, const Groups* groups = nullptr) {
    const int64_t lanes = kernels().lanes;
    CorrelateJob job{};
    job.height = height.axis;
    job.width = width.axis;
    job.groups = groups ? *groups : make_groups(job.height, job.width, conv.batch, source.channels, lanes, threads);
    job.panel = panel_shape(job.height, job.width, source.channels, most_rows(job.groups));
    job.source = source;
    job.target = target;
    job.splits = split_count(job.groups, target.channels, lanes, threads);
    job.threads = threads;
    job.streaming = target.bytes(conv.batch) >= kStreamBytes;
    expect_writes(target.data, target.bytes(conv.batch));
    return job;
}

// Divides the entries of each output, which are in the order of their channels, into job.chunks parts of the channels.
template <class Job, class Offset>
std::vector<int64_t> cut_into_chunks(Job& job, int64_t outputs, Offset offset) {
    const int64_t channel_bytes = job.panel.channel_stride * kernels().lanes * kFloat;
    std::vector<int64_t> cuts(outputs * (job.chunks - 1));
    job.cuts = cuts.data();
    if (job.chunks == 1) return cuts;
#pragma omp parallel for num_threads(job.threads) schedule(static)
    for (int64_t output = 0; output < outputs; ++output) {
        int64_t k = job.starts[output];
        for (int64_t chunk = 1; chunk < job.chunks; ++chunk) {
            const int64_t end = job.panel.channels * chunk / job.chunks * channel_bytes;
            while (k < job.starts[output + 1] && offset(k) < end) ++k;
            cuts[output * (job.chunks - 1) + chunk - 1] = k;
        }
    }
    return cuts;
}

// What job.cuts points to.
std::vector<int64_t> cut_entries(CorrelateJob& job) {
    job.chunks = kernels().correlate_chunks(job);
    return cut_into_chunks(job, job.target.channels * job.height.phases * job.width.phases,
                           [&](int64_t k) { return job.entries[k].offset; });
}

// The gradient of the values; the caller sets the job's groups and how `grad` is packed.
struct ValuesGrad {
    Conv2d conv;
    Dimension height, width;
    CorrelateDotsJob job{};

    ValuesGrad(const Conv2d& conv_, Planes grad, Planes source)
        : conv(conv_), height(forward_dimension(conv_, 0)), width(forward_dimension(conv_, 1)) {
        job.height = height.axis;
        job.width = width.axis;
        job.source = source;
        job.grad = grad;
    }

    void run(const SparseMatrix& weight, float* values_grad, int threads) {
        job.splits = split_count(job.groups, conv.out_channels, 1, threads);
        const int64_t useful = std::max<int64_t>(job.groups.units() * job.splits, 1);
        job.threads = static_cast<int>(std::min<int64_t>(useful, affordable_threads(weight, threads)));
        job.panel = panel_shape(job.height, job.width, conv.in_channels, most_rows(job.groups));
        const std::vector<int64_t> starts = row_starts(weight);
        job.starts = starts.data();
        list_offsets(conv, weight, Offsets(job.panel, height, width, kernels().lanes), threads, job);
        job.chunks = kernels().correlate_dots_chunks(job);
        const std::vector<int64_t> cuts =
            cut_into_chunks(job, conv.out_channels, [&](int64_t k) { return job.offsets[k]; });
        job.thread_scratch = kernels().correlate_dots_scratch(job);
        job.scratch = scratch(Slot::kKernel, job.thread_scratch * job.threads);
        kernels().correlate_dots(job);
        add_sums(weight, job, threads, values_grad);
    }
};

void run(CorrelateJob& job) {
    const std::vector<int64_t> cuts = cut_entries(job);
    job.thread_scratch = kernels().correlate_scratch(job);
    job.scratch = scratch(Slot::kKernel, job.thread_scratch * job.threads);
    kernels().correlate(job);
}

}  // namespace

void panels_forward(const Conv2d& conv, const SparseMatrix& weight, const void* input, const float* bias,
                    void* output, bool channels_last, int threads) {
    const Dimension height = forward_dimension(conv, 0), width = forward_dimension(conv, 1);
    CorrelateJob job = make_job(conv, height, width, input_planes(conv, input, channels_last),
                                output_planes(conv, output, channels_last), threads);
    const Offsets offsets(job.panel, height, width, kernels().lanes);
    const std::vector<int64_t> starts = row_starts(weight);
    const Entry* entries = forward_entries(conv, weight, offsets, starts, threads);
    job.entries = entries;
    job.starts = starts.data();
    job.bias = bias;
    run(job);
}

void panels_input_grad(const Conv2d& conv, const SparseMatrix& weight, const void* grad, void* input_grad,
                       bool channels_last, int threads) {
    const Dimension height = input_grad_dimension(conv, 0), width = input_grad_dimension(conv, 1);
    CorrelateJob job = make_job(conv, height, width, output_planes(conv, grad, channels_last),
                                input_planes(conv, input_grad, channels_last), threads);
    const Offsets offsets(job.panel, height, width, kernels().lanes);
    Entry* entries = reinterpret_cast<Entry*>(scratch(Slot::kLists, entry_count(weight) * sizeof(Entry)));
    std::vector<int64_t> starts;
    input_grad_entries(conv, weight, offsets, job.height.phases * job.width.phases, threads, entries, starts);
    job.entries = entries;
    job.starts = starts.data();
    run(job);
}

void panels_values_grad(const Conv2d& conv, const SparseMatrix& weight, const void* grad, bool grad_channels_last,
                        const void* input, bool input_channels_last, float* values_grad, int threads) {
    ValuesGrad product(conv, output_planes(conv, grad, grad_channels_last),
                       input_planes(conv, input, input_channels_last));
    product.job.groups =
        make_groups(product.height.axis, product.width.axis, conv.batch, conv.in_channels, kernels().lanes, threads);
    const Axis rows{conv.out_size[0], conv.out_size[0], conv.out_size[0], 1, 1, 0, 0};
    const Axis cols{conv.out_size[1], conv.out_size[1], conv.out_size[1], 1, 1, 0, 0};
    product.job.grad_height = rows;
    product.job.grad_panel = panel_shape(rows, cols, conv.out_channels, most_rows(product.job.groups));
    product.run(weight, values_grad, threads);
}

bool panels_grads(const Conv2d& conv, const SparseMatrix& weight, const void* grad, bool grad_channels_last,
                  const void* input, bool input_channels_last, void* input_grad, float* values_grad, int threads) {
    const Dimension height = input_grad_dimension(conv, 0), width = input_grad_dimension(conv, 1);
    const int64_t lanes = kernels().lanes;
    const int64_t channels = std::max(conv.in_channels, conv.out_channels);
    const Groups groups = make_groups(height.axis, width.axis, conv.batch, channels, lanes, threads);
    // One unit's rows of both products must be the same, and there must be work for all threads.
    if (conv.stride[0] * conv.stride[1] != 1 || conv.in_size[0] != conv.out_size[0] || groups.units() < threads ||
        affordable_threads(weight, threads) < threads) {
        return false;
    }
    CorrelateJob job = make_job(conv, height, width, output_planes(conv, grad, grad_channels_last),
                                input_planes(conv, input_grad, grad_channels_last), threads,
                                &groups);
    const Offsets offsets(job.panel, height, width, lanes);
    Entry* entries = reinterpret_cast<Entry*>(scratch(Slot::kLists, entry_count(weight) * sizeof(Entry)));
    std::vector<int64_t> starts;
    input_grad_entries(conv, weight, offsets, 1, threads, entries, starts);
    job.entries = entries;
    job.starts = starts.data();
    const std::vector<int64_t> cuts = cut_entries(job);

    ValuesGrad product(conv, job.source, input_planes(conv, input, input_channels_last));
    product.job.groups = groups;
    product.job.grad_height = job.height;
    product.job.grad_panel = job.panel;
    product.job.input_grad = &job;
    product.run(weight, values_grad, threads);
    return true;
}

}  // namespace sparse_moon::conv2d
