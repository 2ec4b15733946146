#include "sparse_conv2d.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "dispatch.h"

namespace sparse_moon {
namespace {

constexpr int64_t kFloat = sizeof(float);
// Panels above this size are divided into blocks of rows. Only a window of a few rows is in use at a time, so that a
// panel may outgrow the L2 cache; larger blocks pack fewer rows twice.
constexpr int64_t kPanelBytes = int64_t{3} << 20;

// The values' gradient keeps a partial sum a thread; so many bytes of them at most.
constexpr int64_t kPartialSumBytes = int64_t{256} << 20;

// Flat panels: what a panel should take where there is a choice, and may take. Rows come in blocks of a number that
// makes whole vectors, whatever the pitch.
constexpr int64_t kFlatBytes = int64_t{256} << 10;
constexpr int64_t kFlatMostBytes = int64_t{1} << 20;
constexpr int64_t kRowBlock = 16;
constexpr int64_t kShortestRow = 8;
constexpr int64_t kLine = 64 / kFloat;
constexpr int64_t kFlatSlack = 16 * kLine;  // at least a tile, of whichever instruction set

// What one kernel tap does in one dimension.
struct Tap {
    int64_t phase, shift;
};

struct Dimension {
    Axis axis;
    std::vector<Tap> taps;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t floor_mod(int64_t a, int64_t b) { return (a % b + b) % b; }

void find_range(Dimension& dimension) {
    dimension.axis.first = std::numeric_limits<int64_t>::max();
    dimension.axis.last = std::numeric_limits<int64_t>::min();
    for (const Tap& tap : dimension.taps) {
        dimension.axis.first = std::min(dimension.axis.first, tap.shift);
        dimension.axis.last = std::max(dimension.axis.last, tap.shift);
    }
}

// out[y] reads in[y stride + k dilation - padding].
Dimension forward_dimension(const Conv2d& conv, int d) {
    Dimension result{{conv.in_size[d], conv.out_size[d], conv.out_size[d], conv.stride[d], 1, 0, 0}, {}};
    for (int64_t k = 0; k < conv.kernel[d]; ++k) result.taps.push_back({0, k * conv.dilation[d] - conv.padding[d]});
    find_range(result);
    return result;
}

// in[g stride + phase] reads out[g + shift] where g stride + phase = (g + shift) stride + k dilation - padding.
Dimension input_grad_dimension(const Conv2d& conv, int d) {
    const int64_t stride = conv.stride[d];
    Dimension result{{conv.out_size[d], conv.in_size[d], ceil_div(conv.in_size[d], stride), 1, stride, 0, 0}, {}};
    for (int64_t k = 0; k < conv.kernel[d]; ++k) {
        const int64_t reach = k * conv.dilation[d] - conv.padding[d];
        const int64_t phase = floor_mod(reach, stride);
        result.taps.push_back({phase, (phase - reach) / stride});
    }
    find_range(result);
    return result;
}

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

// Offset in a panel of a channel shifted by a tap of each dimension, in bytes.
class Offsets {
public:
    Offsets(const PanelShape& shape, const Dimension& height, const Dimension& width, int64_t lanes)
        : channel_(shape.channel_stride * lanes * kFloat) {
        if (shape.vectors() * lanes * kFloat > std::numeric_limits<int32_t>::max()) {
            throw std::length_error("a row of this convolution is too large for the CPU kernels");
        }
        for (const Tap& down : height.taps) {
            for (const Tap& across : width.taps) {
                const int64_t row = (down.shift - height.axis.first) / shape.row_step;
                const int64_t position = row * shape.pitch + shape.margin + across.shift;
                taps_.push_back(static_cast<int32_t>(position * lanes * kFloat));
                phases_.push_back(static_cast<int32_t>(down.phase * width.axis.phases + across.phase));
            }
        }
    }

    int32_t operator()(int64_t channel, int64_t tap) const {
        return static_cast<int32_t>(channel * channel_) + taps_[tap];
    }
    int32_t phase(int64_t tap) const { return phases_[tap]; }

private:
    int64_t channel_;
    std::vector<int32_t> taps_, phases_;
};

// Calls visit(row, channel, tap, place of the value) for the entries of weight rows [first, last), row by row. Channels
// are those of the whole input, of which a row sees its group's.
template <class Visit>
void for_each_entry(const Conv2d& conv, const SparseMatrix& weight, int64_t first, int64_t last, Visit visit) {
    const int64_t bh = weight.block_rows, bw = weight.block_cols, taps = conv.kernel[0] * conv.kernel[1];
    const int64_t group_rows = conv.out_channels / conv.groups, group_channels = conv.in_channels / conv.groups;
    for (int64_t row = first; row < last; ++row) {
        const int64_t block_row = row / bh, i = row % bh, base = row / group_rows * group_channels;
        for (int64_t e = weight.row_ptr[block_row]; e < weight.row_ptr[block_row + 1]; ++e) {
            const uint32_t col = static_cast<uint32_t>(weight.col[e]), tap_count = static_cast<uint32_t>(taps);
            const int64_t channel = base + col / tap_count * bw, tap = col % tap_count;
            for (int64_t j = 0; j < bw; ++j) visit(row, channel + j, tap, (e * bh + i) * bw + j);
        }
    }
}

// Number of elements before each row; the last is the total.
std::vector<int64_t> row_starts(const SparseMatrix& weight) {
    std::vector<int64_t> starts(weight.rows + 1);
    for (int64_t row = 0; row < weight.rows; ++row) {
        const int64_t block_row = row / weight.block_rows;
        starts[row + 1] =
            starts[row] + (weight.row_ptr[block_row + 1] - weight.row_ptr[block_row]) * weight.block_cols;
    }
    return starts;
}

// Entries row by row.
const Entry* forward_entries(const Conv2d& conv, const SparseMatrix& weight, const Offsets& offsets,
                             const std::vector<int64_t>& starts, int threads) {
    Entry* entries = reinterpret_cast<Entry*>(scratch(Slot::kLists, starts.back() * sizeof(Entry)));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < weight.rows; ++row) {
        Entry* entry = entries + starts[row];
        for_each_entry(conv, weight, row, row + 1, [&](int64_t, int64_t channel, int64_t tap, int64_t place) {
            *entry++ = {offsets(channel, tap), weight.values[place]};
        });
    }
    return entries;
}

// Entries by (input channel, phase), read from the transpose index: tap by tap, or, where there are enough of them to
// pay for a counting sort, output channel by output channel, because neighbouring taps then find each other's data in
// the L1 cache (256 x 256 x 8 x 8 at 80 % sparsity, one thread: 32 ms instead of 37).
void input_grad_entries(const Conv2d& conv, const SparseMatrix& weight, const Offsets& offsets, int64_t phases,
                        int threads, Entry* entries, std::vector<int64_t>& starts) {
    const int64_t bh = weight.block_rows, bw = weight.block_cols, taps = conv.kernel[0] * conv.kernel[1];
    const int64_t group_rows = conv.out_channels / conv.groups, group_channels = conv.in_channels / conv.groups;
    // Calls visit(row, place of the value) for what input channel `channel` meets in one tap.
    const auto each = [&](int64_t channel, int64_t tap, auto visit) {
        const int64_t first_row = channel / group_channels * group_rows, last_row = first_row + group_rows;
        const int64_t column = channel % group_channels, block_col = column / bw * taps + tap, j = column % bw;
        for (int64_t k = weight.t_ptr[block_col]; k < weight.t_ptr[block_col + 1]; ++k) {
            const int64_t row = weight.t_row[k] * bh, place = weight.t_perm[k] * bh * bw + j;
            for (int64_t i = 0; i < bh; ++i) {
                if (row + i >= first_row && row + i < last_row) visit(row + i, place + i * bw);
            }
        }
    };
    starts.assign(conv.in_channels * phases + 1, 0);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t channel = 0; channel < conv.in_channels; ++channel) {
        for (int64_t tap = 0; tap < taps; ++tap) {
            int64_t& count = starts[channel * phases + offsets.phase(tap) + 1];
            if (conv.groups == 1) {
                const int64_t block_col = channel / bw * taps + tap;
                count += (weight.t_ptr[block_col + 1] - weight.t_ptr[block_col]) * bh;
            } else {
                each(channel, tap, [&](int64_t, int64_t) { ++count; });
            }
        }
    }
    for (size_t b = 1; b < starts.size(); ++b) starts[b] += starts[b - 1];
    std::vector<int64_t> scratch_counts(threads * (group_rows + 1));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t channel = 0; channel < conv.in_channels; ++channel) {
        const int64_t first_row = channel / group_channels * group_rows;
        int64_t* slots = scratch_counts.data() + thread_number() * (group_rows + 1);
        for (int64_t phase = 0; phase < phases; ++phase) {
            const int64_t begin = starts[channel * phases + phase], end = starts[channel * phases + phase + 1];
            const auto each_of_phase = [&](auto visit) {
                for (int64_t tap = 0; tap < taps; ++tap) {
                    if (offsets.phase(tap) != phase) continue;
                    each(channel, tap, [&](int64_t row, int64_t place) { visit(row, tap, place); });
                }
            };
            if (8 * (end - begin) < group_rows) {
                Entry* entry = entries + begin;
                each_of_phase([&](int64_t row, int64_t tap, int64_t place) {
                    *entry++ = {offsets(row, tap), weight.values[place]};
                });
                continue;
            }
            std::fill_n(slots, group_rows + 1, 0);
            each_of_phase([&](int64_t row, int64_t, int64_t) { ++slots[row - first_row + 1]; });
            slots[0] = begin;
            for (int64_t row = 0; row < group_rows; ++row) slots[row + 1] += slots[row];
            each_of_phase([&](int64_t row, int64_t tap, int64_t place) {
                entries[slots[row - first_row]++] = {offsets(row, tap), weight.values[place]};
            });
        }
    }
}

Planes planes(const float* data, int64_t channels, const int64_t* size, bool channels_last) {
    return {const_cast<float*>(data), channels, size[0], size[1], channels_last};
}

// A 1 x 1 convolution sees a plane as a line of positions: rows of whole tiles are stored in whole cache lines.
Conv2d with_even_rows(Conv2d conv) {
    constexpr int64_t kTile = 16;
    const int64_t area = conv.in_size[0] * conv.in_size[1];
    bool plain = area % kTile == 0 && conv.in_size[1] % kTile != 0;
    for (int d = 0; d < 2; ++d) plain = plain && conv.kernel[d] == 1 && conv.stride[d] == 1 && conv.padding[d] == 0;
    if (plain) {
        conv.in_size[0] = conv.out_size[0] = area / kTile;
        conv.in_size[1] = conv.out_size[1] = kTile;
    }
    return conv;
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
    const int64_t bytes = conv.batch * target.channels * target.height * target.width * kFloat;
    job.streaming = bytes >= kStreamBytes;
    expect_writes(target.data, bytes);
    return job;
}

int64_t entry_count(const SparseMatrix& weight) {
    return weight.row_ptr[weight.rows / weight.block_rows] * weight.block_rows * weight.block_cols;
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

// Threads of which each can keep a partial sum of the values' gradient.
int affordable_threads(const SparseMatrix& weight, int threads) {
    const int64_t affordable = kPartialSumBytes / (std::max<int64_t>(entry_count(weight), 1) * kFloat);
    return static_cast<int>(std::clamp<int64_t>(affordable, 1, threads));
}

// Sets what the entries of job.starts are to a dot product: their offsets, and room for the sums of job.threads.
template <class Job>
void list_offsets(const Conv2d& conv, const SparseMatrix& weight, const Offsets& offsets, int threads, Job& job) {
    const int64_t count = job.starts[weight.rows];
    char* memory = scratch(Slot::kSums, count * (static_cast<int64_t>(sizeof(int32_t)) + job.threads * kFloat));
    int32_t* list = reinterpret_cast<int32_t*>(memory);
    job.offsets = list;
    job.sums = reinterpret_cast<float*>(memory + count * sizeof(int32_t));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < weight.rows; ++row) {
        int32_t* offset = list + job.starts[row];
        for_each_entry(conv, weight, row, row + 1,
                       [&](int64_t, int64_t channel, int64_t tap, int64_t) { *offset++ = offsets(channel, tap); });
    }
}

// The threads' sums, in the layout of the values.
template <class Job>
void add_sums(const Conv2d& conv, const SparseMatrix& weight, const Job& job, int threads, float* values_grad) {
    const int64_t count = job.starts[weight.rows];
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < weight.rows; ++row) {
        int64_t k = job.starts[row];
        for_each_entry(conv, weight, row, row + 1, [&](int64_t, int64_t, int64_t, int64_t place) {
            float total = 0.0f;
            for (int t = 0; t < job.threads; ++t) total += job.sums[t * count + k];
            values_grad[place] = total;
            ++k;
        });
    }
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
        add_sums(conv, weight, job, threads, values_grad);
    }
};

void run(CorrelateJob& job) {
    const std::vector<int64_t> cuts = cut_entries(job);
    job.thread_scratch = kernels().correlate_scratch(job);
    job.scratch = scratch(Slot::kKernel, job.thread_scratch * job.threads);
    kernels().correlate(job);
}

// ---- flat panels

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

// Bytes of a number in each channel of the larger activation.
int64_t flat_column(const Conv2d& conv) { return std::max(conv.in_channels, conv.out_channels) * kFloat; }

// Whether a product runs from flat panels.
bool goes_flat(const Conv2d& conv, const SparseMatrix& weight, bool channels_last, int threads) {
    const FlatPanels where = flat_panels.load(std::memory_order_relaxed);
    bool fits = where != FlatPanels::kNever && !channels_last && conv.batch >= threads;
    for (int d = 0; d < 2; ++d) {
        fits = fits && conv.stride[d] == 1 && conv.padding[d] <= (conv.kernel[d] - 1) * conv.dilation[d];
    }
    const int64_t rows = std::min(conv.in_size[0], kRowBlock) + (conv.kernel[0] - 1) * conv.dilation[0];
    fits = fits && flat_column(conv) * rows * (conv.in_size[1] + conv.padding[1]) <= kFlatMostBytes;
    if (where == FlatPanels::kWherePossible) return fits;
    return fits && std::min(conv.in_size[1], conv.out_size[1]) >= kShortestRow &&
           entry_count(weight) <= flat_entries(conv) * (conv.in_channels + conv.out_channels);
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
        panel.images = std::clamp<int64_t>(kFlatBytes / (row_bytes * rows), 1, conv.batch / threads);
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
    expect_writes(target.data, conv.batch * target.channels * target.height * target.width * kFloat);
    return job;
}

void run(FlatCorrelateJob& job) {
    job.thread_scratch = kernels().flat_correlate_scratch(job);
    job.scratch = scratch(Slot::kKernel, job.thread_scratch * job.threads);
    kernels().flat_correlate(job);
}

void flat_forward(const Conv2d& conv, const SparseMatrix& weight, const float* input, const float* bias, float* output,
                  int threads) {
    const Dimension height = forward_dimension(conv, 0), width = forward_dimension(conv, 1);
    FlatCorrelateJob job =
        flat_job(conv, flat_panel(conv, height.axis, width.axis, threads),
                 planes(input, conv.in_channels, conv.in_size, false),
                 planes(output, conv.out_channels, conv.out_size, false), threads);
    const std::vector<int64_t> starts = row_starts(weight);
    job.entries = forward_entries(conv, weight, flat_offsets(job.panel, height, width), starts, threads);
    job.starts = starts.data();
    job.bias = bias;
    run(job);
}

// The gradient of the input and, where values_grad is not null, of the values; or without input_grad of those alone.
void flat_grads(const Conv2d& conv, const SparseMatrix& weight, const float* grad, const float* input,
                float* input_grad, float* values_grad, int threads) {
    const Dimension height = input_grad_dimension(conv, 0), width = input_grad_dimension(conv, 1);
    const FlatPanel grad_panel = flat_panel(conv, height.axis, width.axis, threads);
    const Planes grads = planes(grad, conv.out_channels, conv.out_size, false);
    const int used = values_grad ? affordable_threads(weight, threads) : threads;
    FlatCorrelateJob job{};
    std::vector<int64_t> starts;
    if (input_grad) {
        job = flat_job(conv, grad_panel, grads, planes(input_grad, conv.in_channels, conv.in_size, false), used);
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
    dots.source = planes(input, conv.in_channels, conv.in_size, false);
    dots.grad = grads;
    dots.input_grad = input_grad ? &job : nullptr;
    dots.threads = used;
    const std::vector<int64_t> rows = row_starts(weight);
    dots.starts = rows.data();
    list_offsets(conv, weight, flat_offsets(dots.panel, down, across), threads, dots);
    dots.thread_scratch = kernels().flat_dots_scratch(dots);
    dots.scratch = scratch(Slot::kKernel, dots.thread_scratch * dots.threads);
    kernels().flat_dots(dots);
    add_sums(conv, weight, dots, threads, values_grad);
}

}  // namespace

void set_flat_panels(FlatPanels where) { flat_panels.store(where, std::memory_order_relaxed); }

void sparse_conv2d(const Conv2d& given, const SparseMatrix& weight, const float* input, const float* bias,
                   float* output, bool channels_last, int threads) {
    const Conv2d conv = with_even_rows(given);
    if (conv.batch == 0) return;
    if (goes_flat(conv, weight, channels_last, threads)) {
        return flat_forward(conv, weight, input, bias, output, threads);
    }
    const Dimension height = forward_dimension(conv, 0), width = forward_dimension(conv, 1);
    CorrelateJob job = make_job(conv, height, width, planes(input, conv.in_channels, conv.in_size, channels_last),
                                planes(output, conv.out_channels, conv.out_size, channels_last), threads);
    const Offsets offsets(job.panel, height, width, kernels().lanes);
    const std::vector<int64_t> starts = row_starts(weight);
    const Entry* entries = forward_entries(conv, weight, offsets, starts, threads);
    job.entries = entries;
    job.starts = starts.data();
    job.bias = bias;
    run(job);
}

void sparse_conv2d_input_grad(const Conv2d& given, const SparseMatrix& weight, const float* grad, float* input_grad,
                              bool channels_last, int threads) {
    const Conv2d conv = with_even_rows(given);
    if (conv.batch == 0) return;
    if (goes_flat(conv, weight, channels_last, threads)) {
        return flat_grads(conv, weight, grad, nullptr, input_grad, nullptr, threads);
    }
    const Dimension height = input_grad_dimension(conv, 0), width = input_grad_dimension(conv, 1);
    CorrelateJob job = make_job(conv, height, width, planes(grad, conv.out_channels, conv.out_size, channels_last),
                                planes(input_grad, conv.in_channels, conv.in_size, channels_last), threads);
    const Offsets offsets(job.panel, height, width, kernels().lanes);
    Entry* entries = reinterpret_cast<Entry*>(scratch(Slot::kLists, entry_count(weight) * sizeof(Entry)));
    std::vector<int64_t> starts;
    input_grad_entries(conv, weight, offsets, job.height.phases * job.width.phases, threads, entries, starts);
    job.entries = entries;
    job.starts = starts.data();
    run(job);
}

void sparse_conv2d_values_grad(const Conv2d& given, const SparseMatrix& weight, const float* grad,
                               bool grad_channels_last, const float* input, bool input_channels_last,
                               float* values_grad, int threads) {
    const Conv2d conv = with_even_rows(given);
    if (conv.batch == 0) {
        std::fill_n(values_grad, entry_count(weight), 0.0f);
        return;
    }
    if (goes_flat(conv, weight, grad_channels_last || input_channels_last, threads)) {
        return flat_grads(conv, weight, grad, input, nullptr, values_grad, threads);
    }
    ValuesGrad product(conv, planes(grad, conv.out_channels, conv.out_size, grad_channels_last),
                       planes(input, conv.in_channels, conv.in_size, input_channels_last));
    product.job.groups =
        make_groups(product.height.axis, product.width.axis, conv.batch, conv.in_channels, kernels().lanes, threads);
    const Axis rows{conv.out_size[0], conv.out_size[0], conv.out_size[0], 1, 1, 0, 0};
    const Axis cols{conv.out_size[1], conv.out_size[1], conv.out_size[1], 1, 1, 0, 0};
    product.job.grad_height = rows;
    product.job.grad_panel = panel_shape(rows, cols, conv.out_channels, most_rows(product.job.groups));
    product.run(weight, values_grad, threads);
}

void sparse_conv2d_grads(const Conv2d& given, const SparseMatrix& weight, const float* grad, bool grad_channels_last,
                         const float* input, bool input_channels_last, float* input_grad, float* values_grad,
                         int threads) {
    const Conv2d conv = with_even_rows(given);
    if (conv.batch > 0 && goes_flat(conv, weight, grad_channels_last || input_channels_last, threads)) {
        return flat_grads(conv, weight, grad, input, input_grad, values_grad, threads);
    }
    const Dimension height = input_grad_dimension(conv, 0), width = input_grad_dimension(conv, 1);
    const int64_t lanes = kernels().lanes;
    const int64_t channels = std::max(conv.in_channels, conv.out_channels);
    const Groups groups = make_groups(height.axis, width.axis, conv.batch, channels, lanes, threads);
    // One unit's rows of both products must be the same, and there must be work for all threads.
    if (conv.batch == 0 || conv.stride[0] * conv.stride[1] != 1 || conv.in_size[0] != conv.out_size[0] ||
        groups.units() < threads || affordable_threads(weight, threads) < threads) {
        sparse_conv2d_input_grad(given, weight, grad, input_grad, grad_channels_last, threads);
        sparse_conv2d_values_grad(given, weight, grad, grad_channels_last, input, input_channels_last, values_grad,
                                  threads);
        return;
    }
    CorrelateJob job = make_job(conv, height, width, planes(grad, conv.out_channels, conv.out_size, grad_channels_last),
                                planes(input_grad, conv.in_channels, conv.in_size, grad_channels_last), threads,
                                &groups);
    const Offsets offsets(job.panel, height, width, lanes);
    Entry* entries = reinterpret_cast<Entry*>(scratch(Slot::kLists, entry_count(weight) * sizeof(Entry)));
    std::vector<int64_t> starts;
    input_grad_entries(conv, weight, offsets, 1, threads, entries, starts);
    job.entries = entries;
    job.starts = starts.data();
    const std::vector<int64_t> cuts = cut_entries(job);

    ValuesGrad product(conv, job.source, planes(input, conv.in_channels, conv.in_size, input_channels_last));
    product.job.groups = groups;
    product.job.grad_height = job.height;
    product.job.grad_panel = job.panel;
    product.job.input_grad = &job;
    product.run(weight, values_grad, threads);
}

}  // namespace sparse_moon
