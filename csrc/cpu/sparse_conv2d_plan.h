// What both algorithms of the sparse convolution prepare: where the taps of a kernel read, and the weight's entries in
// the order in which the inner loops meet them.
#pragma once
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

#include "dispatch.h"
#include "sparse_conv2d.h"

namespace sparse_moon::conv2d {

constexpr int64_t kFloat = sizeof(float);

// What one kernel tap does in one dimension.
struct Tap {
    int64_t phase, shift;
};

struct Dimension {
    Axis axis;
    std::vector<Tap> taps;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// out[y] reads in[y stride + k dilation - padding].
Dimension forward_dimension(const Conv2d& conv, int d);

// in[g stride + phase] reads out[g + shift] where g stride + phase = (g + shift) stride + k dilation - padding.
Dimension input_grad_dimension(const Conv2d& conv, int d);

Planes planes(const float* data, int64_t channels, const int64_t* size, bool channels_last);

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

int64_t entry_count(const SparseMatrix& weight);

// Number of elements before each row; the last is the total.
std::vector<int64_t> row_starts(const SparseMatrix& weight);

// Entries row by row.
const Entry* forward_entries(const Conv2d& conv, const SparseMatrix& weight, const Offsets& offsets,
                             const std::vector<int64_t>& starts, int threads);

// Entries by (input channel, phase), read from the transpose index: tap by tap, or, where there are enough of them to
// pay for a counting sort, output channel by output channel, because neighbouring taps then find each other's data in
// the L1 cache (256 x 256 x 8 x 8 at 80 % sparsity, one thread: 32 ms instead of 37).
void input_grad_entries(const Conv2d& conv, const SparseMatrix& weight, const Offsets& offsets, int64_t phases,
                        int threads, Entry* entries, std::vector<int64_t>& starts);

// Threads of which each can keep a partial sum of the values' gradient.
int affordable_threads(const SparseMatrix& weight, int threads);

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

}  // namespace sparse_moon::conv2d
