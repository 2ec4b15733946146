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

// out[y] reads in[y stride + k dilation - padding].
Dimension forward_dimension(const Conv2d& conv, int d);

// in[g stride + phase] reads out[g + shift] where g stride + phase = (g + shift) stride + k dilation - padding.
Dimension input_grad_dimension(const Conv2d& conv, int d);

Planes input_planes(const Conv2d& conv, const void* data, bool channels_last);
Planes output_planes(const Conv2d& conv, const void* data, bool channels_last);

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
    int64_t channel_bytes() const { return channel_; }

private:
    int64_t channel_;
    std::vector<int32_t> taps_, phases_;
};

// Calls visit(offset, place of the value) for the entries of the weight's rows, whose channels are those of the whole
// input, of which a row sees its group's. Offsets of columns come from a table: a division for every entry took as long
// as its products with a few vectors.
class EntryOffsets {
public:
    EntryOffsets(const Conv2d& conv, const SparseMatrix& weight, const Offsets& offsets)
        : weight_(weight), channel_(offsets.channel_bytes()), group_rows_(conv.out_channels / conv.groups),
          group_bytes_(conv.in_channels / conv.groups * channel_) {
        const int64_t taps = conv.kernel[0] * conv.kernel[1], channels = conv.in_channels / conv.groups;
        columns_.reserve(channels / weight.block_cols * taps);
        for (int64_t channel = 0; channel < channels; channel += weight.block_cols) {
            for (int64_t tap = 0; tap < taps; ++tap) columns_.push_back(offsets(channel, tap));
        }
    }

    template <class Visit>
    void for_each(int64_t row, Visit visit) const {
        const int64_t bh = weight_.block_rows, bw = weight_.block_cols, block_row = row / bh, i = row % bh;
        const int32_t base = static_cast<int32_t>(row / group_rows_ * group_bytes_);
        const int64_t last = weight_.row_ptr[block_row + 1];
        if (bh * bw == 1) {
            for (int64_t e = weight_.row_ptr[row]; e < last; ++e) visit(base + columns_[weight_.col[e]], e);
            return;
        }
        for (int64_t e = weight_.row_ptr[block_row]; e < last; ++e) {
            const int32_t offset = base + columns_[weight_.col[e]];
            for (int64_t j = 0; j < bw; ++j) {
                visit(offset + static_cast<int32_t>(j * channel_), (e * bh + i) * bw + j);
            }
        }
    }

private:
    const SparseMatrix& weight_;
    int64_t channel_, group_rows_, group_bytes_;
    std::vector<int32_t> columns_;
};

int64_t entry_count(const SparseMatrix& weight);

// Number of elements before each row; the last is the total.
std::vector<int64_t> row_starts(const SparseMatrix& weight);

// Entries row by row.
const Entry* forward_entries(const Conv2d& conv, const SparseMatrix& weight, const Offsets& offsets,
                             const std::vector<int64_t>& starts, int threads);

// Entries by (input channel, phase), read from the transpose index: tap by tap, or, where there are enough of them to
// pay for a counting sort and each meets many vectors, output channel by output channel, because neighbouring taps then
// find each other's data in the L1 cache (256 x 256 x 8 x 8 at 80 % sparsity, one thread: 32 ms instead of 37).
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
    const EntryOffsets entries(conv, weight, offsets);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < weight.rows; ++row) {
        int32_t* to = list + job.starts[row];
        entries.for_each(row, [&](int32_t offset, int64_t) { *to++ = offset; });
    }
}

// The threads' sums, in the layout of the values.
template <class Job>
void add_sums(const SparseMatrix& weight, const Job& job, int threads, float* values_grad) {
    const int64_t bh = weight.block_rows, bw = weight.block_cols, count = job.starts[weight.rows];
    const auto sum = [&](int64_t k) {
        float total = 0.0f;
        for (int t = 0; t < job.threads; ++t) total += job.sums[t * count + k];
        return total;
    };
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < weight.rows; ++row) {
        const int64_t first = weight.row_ptr[row / bh], last = weight.row_ptr[row / bh + 1];
        int64_t k = job.starts[row];
        for (int64_t e = first; e < last; ++e) {
            for (int64_t j = 0; j < bw; ++j) values_grad[(e * bh + row % bh) * bw + j] = sum(k++);
        }
    }
}

}  // namespace sparse_moon::conv2d
