#include "sparse_conv2d_columns.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "sparse_conv2d_plan.h"
#include "sparse_linear.h"
#include "subsample.h"

namespace sparse_moon::conv2d {
namespace {

constexpr int64_t kMostColumns = int64_t{1} << 20;  // of a linear layer

int64_t positions(const Conv2d& conv) { return conv.batch * conv.out_size[0] * conv.out_size[1]; }
int64_t taps(const Conv2d& conv) { return conv.kernel[0] * conv.kernel[1]; }
int64_t columns(const Conv2d& conv) { return conv.in_channels * taps(conv); }

// Where a tap reads: input = output stride + tap dilation - padding, in each dimension.
struct Window {
    const Conv2d& conv;

    int64_t source(int d, int64_t target, int64_t tap) const {
        return target * conv.stride[d] + tap * conv.dilation[d] - conv.padding[d];
    }
    // The output that reads there by this tap; -1 where none does.
    int64_t target(int d, int64_t source, int64_t tap) const {
        const int64_t reach = source + conv.padding[d] - tap * conv.dilation[d];
        if (reach < 0 || reach % conv.stride[d] != 0 || reach / conv.stride[d] >= conv.out_size[d]) return -1;
        return reach / conv.stride[d];
    }
};

// Numbers of the pixels of a plane: `step` apart from one channel to the next.
template <class T>
struct Pixels {
    T* data;
    int64_t channels, height, width, step;

    explicit Pixels(const Planes& planes)
        : data(planes.numbers<T>()), channels(planes.channels), height(planes.height), width(planes.width),
          step(planes.channels_last ? 1 : planes.height * planes.width) {}
    T* at(int64_t image, int64_t y, int64_t x) const {
        const int64_t pixel = y * width + x;
        return data + image * channels * height * width + (step == 1 ? pixel * channels : pixel);
    }
};

// columns [position][column], as the weight orders them: (channel / block_cols, tap, channel % block_cols).
template <class From, class To>
void gather(const Conv2d& conv, const Planes& planes, int64_t block_cols, To* result, int threads) {
    const Pixels<From> pixels(planes);
    const Window window{conv};
    const int64_t all_taps = taps(conv), width = columns(conv);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t image = 0; image < conv.batch; ++image) {
        for (int64_t y = 0; y < conv.out_size[0]; ++y) {
            To* row = result + (image * conv.out_size[0] + y) * conv.out_size[1] * width;
            for (int64_t x = 0; x < conv.out_size[1]; ++x, row += width) {
                for (int64_t tap = 0; tap < all_taps; ++tap) {
                    const int64_t sy = window.source(0, y, tap / conv.kernel[1]);
                    const int64_t sx = window.source(1, x, tap % conv.kernel[1]);
                    const bool inside = sy >= 0 && sy < pixels.height && sx >= 0 && sx < pixels.width;
                    const From* pixel = inside ? pixels.at(image, sy, sx) : nullptr;
                    if constexpr (std::is_same_v<From, To>) {
                        if (all_taps == 1 && inside && pixels.step == 1) {
                            std::copy_n(pixel, width, row);
                            continue;
                        }
                    }
                    for (int64_t first = 0; first < conv.in_channels; first += block_cols) {
                        To* block = row + first * all_taps + tap * block_cols;
                        for (int64_t j = 0; j < block_cols; ++j) {
                            store_float(block + j, inside ? as_float(pixel[(first + j) * pixels.step]) : 0.0f);
                        }
                    }
                }
            }
        }
    }
}

// Inverse: each pixel becomes the sum of what columns hold of it.
template <class From, class To>
void scatter(const Conv2d& conv, const From* all_columns, int64_t block_cols, const Planes& planes, int threads) {
    const Pixels<To> pixels(planes);
    const Window window{conv};
    const int64_t all_taps = taps(conv), width = columns(conv);
    std::vector<const From*> all_parts(threads * all_taps);
#pragma omp parallel num_threads(threads)
    {
        const From** parts = all_parts.data() + thread_number() * all_taps;
#pragma omp for collapse(2) schedule(static)
        for (int64_t image = 0; image < conv.batch; ++image) {
            for (int64_t y = 0; y < pixels.height; ++y) {
                for (int64_t x = 0; x < pixels.width; ++x) {
                    To* pixel = pixels.at(image, y, x);
                    int64_t count = 0;
                    for (int64_t tap = 0; tap < all_taps; ++tap) {
                        const int64_t ty = window.target(0, y, tap / conv.kernel[1]);
                        const int64_t tx = window.target(1, x, tap % conv.kernel[1]);
                        if (ty < 0 || tx < 0) continue;
                        const int64_t position = (image * conv.out_size[0] + ty) * conv.out_size[1] + tx;
                        parts[count++] = all_columns + position * width + tap * block_cols;
                    }
                    if constexpr (std::is_same_v<From, To>) {
                        if (all_taps == 1 && pixels.step == 1) {
                            count ? std::copy_n(parts[0], width, pixel) : std::fill_n(pixel, width, To{});
                            continue;
                        }
                    }
                    for (int64_t first = 0; first < conv.in_channels; first += block_cols) {
                        for (int64_t j = 0; j < block_cols; ++j) {
                            float sum = 0.0f;
                            for (int64_t k = 0; k < count; ++k) sum += as_float(parts[k][first * all_taps + j]);
                            store_float(pixel + (first + j) * pixels.step, sum);
                        }
                    }
                }
            }
        }
    }
}

// The output as the input of a convolution of one pixel without a stride: its columns are the tokens of its channels.
Conv2d outputs_of(const Conv2d& conv) {
    Conv2d own = conv;
    own.in_channels = own.out_channels = conv.out_channels;
    for (int d = 0; d < 2; ++d) {
        own.in_size[d] = own.out_size[d] = conv.out_size[d];
        own.kernel[d] = own.stride[d] = own.dilation[d] = 1;
        own.padding[d] = 0;
    }
    return own;
}

// Columns are in bfloat16 where that takes no sums: what several taps have read is added in float32.
bool are_halves(const Conv2d& conv) { return conv.bfloat16 && taps(conv) == 1; }

// Whether the output and its gradient are tokens as they are.
bool are_tokens(const Conv2d& conv, bool channels_last) { return channels_last && conv.bfloat16 == are_halves(conv); }

// Memory for columns or their gradient, and for the output or its gradient as tokens.
struct Room {
    char *columns, *tokens;

    Room(const Conv2d& conv, bool channels_last) {
        constexpr int64_t kLine = 64;
        const auto bytes = [&](int64_t width) {
            return ceil_div(positions(conv) * width * number_bytes(are_halves(conv)), kLine) * kLine;
        };
        const int64_t first = bytes(conv2d::columns(conv));
        columns = scratch(Slot::kColumns, first + (are_tokens(conv, channels_last) ? 0 : bytes(conv.out_channels)));
        tokens = columns + first;
    }
};

void to_columns(const Conv2d& conv, const Planes& planes, int64_t block_cols, void* result, bool half, int threads) {
    with_number_type(planes.bfloat16, [&](auto activation) {
        with_number_type(half, [&](auto column) {
            gather<decltype(activation)>(conv, planes, block_cols, static_cast<decltype(column)*>(result), threads);
        });
    });
}

void from_columns(const Conv2d& conv, const void* all_columns, bool half, int64_t block_cols, const Planes& planes,
                  int threads) {
    with_number_type(planes.bfloat16, [&](auto activation) {
        with_number_type(half, [&](auto column) {
            const auto* from = static_cast<const decltype(column)*>(all_columns);
            scatter<decltype(column), decltype(activation)>(conv, from, block_cols, planes, threads);
        });
    });
}

}  // namespace

bool goes_by_columns(const Conv2d& conv, bool channels_last) {
    if (conv.groups != 1 || conv.stride[0] * conv.stride[1] == 1 || columns(conv) > kMostColumns) return false;
    if (is_subsampling(conv) && channels_last) return true;
    return 4 * conv.batch * conv.out_size[0] <= kernels().lanes;  // each a row of an image, in a panel
}

void columns_forward(const Conv2d& conv, const SparseMatrix& weight, const void* input, const float* bias, void* output,
                     bool channels_last, int threads) {
    const Room room(conv, channels_last);
    const bool half = are_halves(conv);
    void* tokens = are_tokens(conv, channels_last) ? output : room.tokens;
    to_columns(conv, input_planes(conv, input, channels_last), weight.block_cols, room.columns, half, threads);
    sparse_linear(positions(conv), weight, room.columns, bias, tokens, half, threads);
    if (tokens == output) return;
    from_columns(outputs_of(conv), tokens, half, 1, output_planes(conv, output, channels_last), threads);
}

void columns_grads(const Conv2d& conv, const SparseMatrix& weight, const void* grad, bool grad_channels_last,
                   const void* input, bool input_channels_last, void* input_grad, float* values_grad, int threads) {
    const Room room(conv, grad_channels_last);
    const bool half = are_halves(conv);
    const void* tokens = grad;
    if (!are_tokens(conv, grad_channels_last)) {
        to_columns(outputs_of(conv), output_planes(conv, grad, grad_channels_last), 1, room.tokens, half, threads);
        tokens = room.tokens;
    }
    if (values_grad) {
        const Planes planes = input_planes(conv, input, input_channels_last);
        to_columns(conv, planes, weight.block_cols, room.columns, half, threads);
        sparse_linear_values_grad(positions(conv), weight, tokens, room.columns, values_grad, half, threads);
    }
    if (input_grad) {
        const Planes planes = input_planes(conv, input_grad, grad_channels_last);
        sparse_linear_input_grad(positions(conv), weight, tokens, room.columns, half, threads);
        from_columns(conv, room.columns, half, weight.block_cols, planes, threads);
    }
}

}  // namespace sparse_moon::conv2d
