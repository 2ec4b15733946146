#include "sparse_conv2d_plan.h"

#include <algorithm>

namespace sparse_moon::conv2d {
namespace {

// The values' gradient keeps a partial sum a thread; so many bytes of them at most.
constexpr int64_t kPartialSumBytes = int64_t{256} << 20;

// Vectors of gradients that each entry of the input's gradient meets, from which on their order is worth a sort.
constexpr int64_t kSortedVectors = 64;

int64_t floor_mod(int64_t a, int64_t b) { return (a % b + b) % b; }

void find_range(Dimension& dimension) {
    dimension.axis.first = std::numeric_limits<int64_t>::max();
    dimension.axis.last = std::numeric_limits<int64_t>::min();
    for (const Tap& tap : dimension.taps) {
        dimension.axis.first = std::min(dimension.axis.first, tap.shift);
        dimension.axis.last = std::max(dimension.axis.last, tap.shift);
    }
}

}  // namespace

Dimension forward_dimension(const Conv2d& conv, int d) {
    Dimension result{{conv.in_size[d], conv.out_size[d], conv.out_size[d], conv.stride[d], 1, 0, 0}, {}};
    for (int64_t k = 0; k < conv.kernel[d]; ++k) result.taps.push_back({0, k * conv.dilation[d] - conv.padding[d]});
    find_range(result);
    return result;
}

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

Planes input_planes(const Conv2d& conv, const void* data, bool channels_last) {
    return {const_cast<void*>(data), conv.in_channels, conv.in_size[0], conv.in_size[1], channels_last, conv.bfloat16};
}

Planes output_planes(const Conv2d& conv, const void* data, bool channels_last) {
    return {const_cast<void*>(data), conv.out_channels, conv.out_size[0], conv.out_size[1], channels_last,
            conv.bfloat16};
}

int64_t entry_count(const SparseMatrix& weight) {
    return weight.row_ptr[weight.rows / weight.block_rows] * weight.block_rows * weight.block_cols;
}

std::vector<int64_t> row_starts(const SparseMatrix& weight) {
    std::vector<int64_t> starts(weight.rows + 1);
    for (int64_t row = 0; row < weight.rows; ++row) {
        const int64_t block_row = row / weight.block_rows;
        starts[row + 1] =
            starts[row] + (weight.row_ptr[block_row + 1] - weight.row_ptr[block_row]) * weight.block_cols;
    }
    return starts;
}

const Entry* forward_entries(const Conv2d& conv, const SparseMatrix& weight, const Offsets& offsets,
                             const std::vector<int64_t>& starts, int threads) {
    Entry* entries = reinterpret_cast<Entry*>(scratch(Slot::kLists, starts.back() * sizeof(Entry)));
    const EntryOffsets places(conv, weight, offsets);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < weight.rows; ++row) {
        Entry* entry = entries + starts[row];
        places.for_each(row, [&](int32_t offset, int64_t place) { *entry++ = {offset, weight.values[place]}; });
    }
    return entries;
}

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
    const bool sorted = conv.batch * conv.out_size[0] * conv.out_size[1] >= kSortedVectors * kernels().lanes;
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
            if (!sorted || 8 * (end - begin) < group_rows) {
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

int affordable_threads(const SparseMatrix& weight, int threads) {
    const int64_t affordable = kPartialSumBytes / (std::max<int64_t>(entry_count(weight), 1) * kFloat);
    return static_cast<int>(std::clamp<int64_t>(affordable, 1, threads));
}

}  // namespace sparse_moon::conv2d
