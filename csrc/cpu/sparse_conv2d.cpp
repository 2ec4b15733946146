// Which algorithm a sparse convolution runs by.
#include "sparse_conv2d.h"

#include <algorithm>

#include "bias_grad.h"
#include "dispatch.h"
#include "sparse_conv2d_columns.h"
#include "sparse_conv2d_flat_panels.h"
#include "sparse_conv2d_panels.h"
#include "sparse_conv2d_plan.h"
#include "sparse_linear.h"
#include "subsample.h"

namespace sparse_moon {
namespace {

// Whether every position of the output sees that position of the input alone.
bool is_pointwise(const Conv2d& conv) {
    return has_one_tap(conv) && conv.stride[0] * conv.stride[1] == 1;
}

// Such a convolution of activations that are all channels_last is a linear layer, with positions as its tokens.
bool is_linear(const Conv2d& conv, bool channels_last) {
    return channels_last && conv.groups == 1 && is_pointwise(conv);
}

int64_t positions(const Conv2d& conv) { return conv.batch * conv.out_size[0] * conv.out_size[1]; }

// Others see a plane as a line of positions: rows of whole tiles are stored in whole cache lines.
Conv2d with_even_rows(Conv2d conv) {
    constexpr int64_t kTile = 16;
    const int64_t area = conv.in_size[0] * conv.in_size[1];
    if (is_pointwise(conv) && area % kTile == 0 && conv.in_size[1] % kTile != 0) {
        conv.in_size[0] = conv.out_size[0] = area / kTile;
        conv.in_size[1] = conv.out_size[1] = kTile;
    }
    return conv;
}

// A convolution that subsamples contiguous planes, as one without a stride of the pixels that it sees: 1.1 to 2.8 times
// as fast as from panels of whole planes. Memory for the pixels of an input, and of a gradient.
struct Subsampled {
    Conv2d conv;
    char *input, *input_grad;

    explicit Subsampled(const Conv2d& given) : conv(without_stride(given)) {
        const int64_t bytes = conv2d::input_planes(conv, nullptr, false).bytes(conv.batch), line = 64;
        input = scratch(Slot::kColumns, 2 * ceil_div(bytes, line) * line);
        input_grad = input + ceil_div(bytes, line) * line;
    }
};

}  // namespace

void sparse_conv2d(const Conv2d& given, const SparseMatrix& weight, const void* input, const float* bias,
                   void* output, bool channels_last, int threads) {
    if (is_linear(given, channels_last)) {
        return sparse_linear(positions(given), weight, input, bias, output, given.bfloat16, threads);
    }
    if (is_subsampling(given) && !channels_last) {
        const Subsampled pixels(given);
        subsample(given, input, pixels.input, threads);
        return sparse_conv2d(pixels.conv, weight, pixels.input, bias, output, false, threads);
    }
    const Conv2d conv = with_even_rows(given);
    if (conv.batch == 0) return;
    if (conv2d::goes_by_columns(conv, channels_last)) {
        return conv2d::columns_forward(conv, weight, input, bias, output, channels_last, threads);
    }
    if (conv2d::goes_flat(conv, weight, channels_last)) {
        return conv2d::flat_forward(conv, weight, input, bias, output, threads);
    }
    conv2d::panels_forward(conv, weight, input, bias, output, channels_last, threads);
}

void sparse_conv2d_input_grad(const Conv2d& given, const SparseMatrix& weight, const void* grad, void* input_grad,
                              bool channels_last, int threads) {
    if (is_linear(given, channels_last)) {
        return sparse_linear_input_grad(positions(given), weight, grad, input_grad, given.bfloat16, threads);
    }
    if (is_subsampling(given) && !channels_last) {
        const Subsampled pixels(given);
        sparse_conv2d_input_grad(pixels.conv, weight, grad, pixels.input_grad, false, threads);
        return spread(given, pixels.input_grad, input_grad, threads);
    }
    const Conv2d conv = with_even_rows(given);
    if (conv.batch == 0) return;
    if (conv2d::goes_by_columns(conv, channels_last)) {
        return conv2d::columns_grads(conv, weight, grad, channels_last, nullptr, channels_last, input_grad, nullptr,
                                     threads);
    }
    if (conv2d::goes_flat(conv, weight, channels_last)) {
        return conv2d::flat_grads(conv, weight, grad, nullptr, input_grad, nullptr, threads);
    }
    conv2d::panels_input_grad(conv, weight, grad, input_grad, channels_last, threads);
}

void sparse_conv2d_values_grad(const Conv2d& given, const SparseMatrix& weight, const void* grad,
                               bool grad_channels_last, const void* input, bool input_channels_last,
                               float* values_grad, int threads) {
    if (is_linear(given, grad_channels_last && input_channels_last)) {
        return sparse_linear_values_grad(positions(given), weight, grad, input, values_grad, given.bfloat16, threads);
    }
    if (is_subsampling(given) && !grad_channels_last && !input_channels_last) {
        const Subsampled pixels(given);
        subsample(given, input, pixels.input, threads);
        return sparse_conv2d_values_grad(pixels.conv, weight, grad, false, pixels.input, false, values_grad, threads);
    }
    const Conv2d conv = with_even_rows(given);
    if (conv.batch == 0) {
        std::fill_n(values_grad, conv2d::entry_count(weight), 0.0f);
        return;
    }
    if (conv2d::goes_by_columns(conv, grad_channels_last && input_channels_last)) {
        return conv2d::columns_grads(conv, weight, grad, grad_channels_last, input, input_channels_last, nullptr,
                                     values_grad, threads);
    }
    if (conv2d::goes_flat(conv, weight, grad_channels_last || input_channels_last)) {
        return conv2d::flat_grads(conv, weight, grad, input, nullptr, values_grad, threads);
    }
    conv2d::panels_values_grad(conv, weight, grad, grad_channels_last, input, input_channels_last, values_grad,
                               threads);
}

void sparse_conv2d_grads(const Conv2d& given, const SparseMatrix& weight, const void* grad, bool grad_channels_last,
                         const void* input, bool input_channels_last, void* input_grad, float* values_grad,
                         float* bias_grad, int threads) {
    if (is_linear(given, grad_channels_last && input_channels_last)) {
        return sparse_linear_grads(positions(given), weight, grad, input, input_grad, values_grad, bias_grad,
                                   given.bfloat16, threads);
    }
    if (is_subsampling(given) && !grad_channels_last && !input_channels_last) {
        const Subsampled pixels(given);
        subsample(given, input, pixels.input, threads);
        sparse_conv2d_grads(pixels.conv, weight, grad, false, pixels.input, false, pixels.input_grad, values_grad,
                            bias_grad, threads);
        return spread(given, pixels.input_grad, input_grad, threads);
    }
    const Conv2d conv = with_even_rows(given);
    if (bias_grad) {
        sparse_moon::bias_grad(conv2d::output_planes(conv, grad, grad_channels_last), conv.batch, bias_grad, threads);
    }
    if (conv.batch > 0 && conv2d::goes_by_columns(conv, grad_channels_last && input_channels_last)) {
        return conv2d::columns_grads(conv, weight, grad, grad_channels_last, input, input_channels_last, input_grad,
                                     values_grad, threads);
    }
    if (conv.batch > 0 && conv2d::goes_flat(conv, weight, grad_channels_last || input_channels_last)) {
        return conv2d::flat_grads(conv, weight, grad, input, input_grad, values_grad, threads);
    }
    const bool together =
        conv.batch > 0 && conv2d::panels_grads(conv, weight, grad, grad_channels_last, input, input_channels_last,
                                               input_grad, values_grad, threads);
    if (together) return;
    sparse_conv2d_input_grad(given, weight, grad, input_grad, grad_channels_last, threads);
    sparse_conv2d_values_grad(given, weight, grad, grad_channels_last, input, input_channels_last, values_grad,
                              threads);
}

}  // namespace sparse_moon
