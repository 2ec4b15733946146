#include "bias_grad.h"

#include <algorithm>

#include "bfloat16.h"

namespace sparse_moon {
namespace {

constexpr int64_t kChannels = 64;  // of a block, whose sums stay in registers or the L1 cache
constexpr int64_t kSums = 16;      // of one channel, so that additions do not wait for each other
constexpr int64_t kLeast = int64_t{1} << 15;  // numbers, below which a second thread takes longer to wake

// Channels [first, last) of rows of all channels.
template <class T>
void sum_rows(const T* grad, int64_t rows, int64_t channels, int64_t first, int64_t last, float* bias_grad) {
    double sums[kChannels] = {};
    for (int64_t row = 0; row < rows; ++row) {
        const T* values = grad + row * channels + first;
        for (int64_t c = 0; c < last - first; ++c) sums[c] += as_float(values[c]);
    }
    for (int64_t c = first; c < last; ++c) bias_grad[c] = static_cast<float>(sums[c - first]);
}

template <class T>
float sum_planes(const T* grad, int64_t images, int64_t image_stride, int64_t plane) {
    double sums[kSums] = {}, total = 0.0;
    for (int64_t n = 0; n < images; ++n) {
        const T* values = grad + n * image_stride;
        int64_t i = 0;
        for (; i + kSums <= plane; i += kSums) {
            for (int64_t j = 0; j < kSums; ++j) sums[j] += as_float(values[i + j]);
        }
        for (; i < plane; ++i) total += as_float(values[i]);
    }
    for (const double sum : sums) total += sum;
    return static_cast<float>(total);
}

template <class T>
void sum_channels(const Planes& planes, int64_t images, float* bias_grad, int threads) {
    const T* grad = planes.numbers<T>();
    const int64_t channels = planes.channels, plane = planes.height * planes.width;
    const bool rows = planes.channels_last || plane == 1;
    const int64_t each = rows ? kChannels : 1, parts = (channels + each - 1) / each;
    const int team = images * channels * plane < kLeast ? 1 : threads;
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = part * each, last = std::min(first + each, channels);
        if (rows) {
            sum_rows(grad, images * plane, channels, first, last, bias_grad);
        } else {
            bias_grad[first] = sum_planes(grad + first * plane, images, channels * plane, plane);
        }
    }
}

}  // namespace

void bias_grad(const Planes& grad, int64_t images, float* bias_grad, int threads) {
    with_number_type(grad.bfloat16,
                     [&](auto number) { sum_channels<decltype(number)>(grad, images, bias_grad, threads); });
}

}  // namespace sparse_moon
