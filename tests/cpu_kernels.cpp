// Runs the sparse products on heap arrays of exactly the right size, with every instruction set that the processor
// has, and compares them with loops in double precision. Meant for the address and undefined behaviour sanitizers.
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "cpu/batch_norm_relu.h"
#include "cpu/conv2d_winograd.h"
#include "cpu/dispatch.h"
#include "cpu/sparse_conv2d.h"
#include "cpu/sparse_linear.h"
#include "cpu/transpose_index.h"

using namespace sparse_moon;

namespace {

std::mt19937 generator(0);

std::vector<float> random_values(int64_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> values(count);
    for (float& value : values) value = normal(generator);
    return values;
}

// A random block-compressed matrix and its dense form, columns in topology order.
struct Weight {
    std::vector<int32_t> row_ptr, col, t_ptr, t_row, t_perm;
    std::vector<float> values;
    SparseMatrix matrix;

    Weight(int64_t rows, int64_t cols, int64_t bh, int64_t bw, double density) : row_ptr{0} {
        std::bernoulli_distribution exists(density);
        for (int64_t r = 0; r < rows / bh; ++r) {
            for (int64_t c = 0; c < cols / bw; ++c) {
                if (exists(generator)) col.push_back(static_cast<int32_t>(c));
            }
            row_ptr.push_back(static_cast<int32_t>(col.size()));
        }
        t_ptr.resize(cols / bw + 1);
        t_row.resize(col.size());
        t_perm.resize(col.size());
        transpose_index(row_ptr.data(), col.data(), rows / bh, cols / bw, t_ptr.data(), t_row.data(), t_perm.data());
        values = random_values(static_cast<int64_t>(col.size()) * bh * bw);
        matrix = {rows,        cols,         bh,           bw,           row_ptr.data(), col.data(),
                  t_ptr.data(), t_row.data(), t_perm.data(), values.data()};
    }

    // visit(row, column, place of the value)
    template <class Visit>
    void each(Visit visit) const {
        const int64_t bh = matrix.block_rows, bw = matrix.block_cols;
        for (int64_t r = 0; r < matrix.rows / bh; ++r) {
            for (int64_t e = row_ptr[r]; e < row_ptr[r + 1]; ++e) {
                for (int64_t i = 0; i < bh; ++i) {
                    for (int64_t j = 0; j < bw; ++j) visit(r * bh + i, col[e] * bw + j, (e * bh + i) * bw + j);
                }
            }
        }
    }
};

int failures = 0;

void compare(const char* what, const std::string& isa, const std::vector<float>& got, const std::vector<double>& want) {
    double largest = 0, error = 0;
    for (size_t i = 0; i < want.size(); ++i) {
        largest = std::fmax(largest, std::fabs(want[i]));
        const double difference = std::fabs(got[i] - want[i]);
        error = difference <= error ? error : difference;  // keeps a NaN
    }
    if (!(error <= 1e-5 * largest)) {
        std::printf("%s, %s: error %g of %g\n", what, isa.c_str(), error, largest);
        ++failures;
    }
}

// And its derivative, unless null.
double gelu_tanh(double x, double* derivative) {
    const double root = std::sqrt(2 / M_PI), u = root * (x + 0.044715 * x * x * x), share = 1 / (1 + std::exp(-2 * u));
    if (derivative) *derivative = share + x * 2 * share * (1 - share) * root * (1 + 0.134145 * x * x);
    return x * share;
}

void check_linear(int64_t tokens, int64_t in, int64_t out, int64_t bh, int64_t bw, double density) {
    const Weight weight(out, in, bh, bw, density);
    const std::vector<float> x = random_values(tokens * in), grad = random_values(tokens * out);
    const std::vector<float> bias = random_values(out);
    std::vector<double> y(tokens * out), dx(tokens * in), dv(weight.values.size()), db(out);
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t o = 0; o < out; ++o) y[t * out + o] = bias[o], db[o] += grad[t * out + o];
        weight.each([&](int64_t row, int64_t column, int64_t place) {
            y[t * out + row] += double(weight.values[place]) * x[t * in + column];
            dx[t * in + column] += double(weight.values[place]) * grad[t * out + row];
            dv[place] += double(grad[t * out + row]) * x[t * in + column];
        });
    }
    for (const std::string& isa : supported_isas()) {
        set_isa(isa);
        std::vector<float> got_y(y.size(), NAN), got_dx(dx.size(), NAN), got_dv(dv.size(), NAN);
        sparse_linear(tokens, weight.matrix, x.data(), bias.data(), got_y.data(), false, 2);
        sparse_linear_input_grad(tokens, weight.matrix, grad.data(), got_dx.data(), false, 2);
        sparse_linear_values_grad(tokens, weight.matrix, grad.data(), x.data(), got_dv.data(), false, 2);
        compare("sparse_linear", isa, got_y, y);
        compare("sparse_linear_input_grad", isa, got_dx, dx);
        compare("sparse_linear_values_grad", isa, got_dv, dv);
        std::vector<float> got_db(db.size(), NAN);
        got_dx.assign(dx.size(), NAN), got_dv.assign(dv.size(), NAN);
        sparse_linear_grads(tokens, weight.matrix, grad.data(), x.data(), got_dx.data(), got_dv.data(), got_db.data(),
                            false, 2);
        compare("sparse_linear_grads: input", isa, got_dx, dx);
        compare("sparse_linear_grads: values", isa, got_dv, dv);
        compare("sparse_linear_grads: bias", isa, got_db, db);
        got_db.assign(db.size(), NAN), got_dv.assign(dv.size(), NAN);
        sparse_linear_values_grad(tokens, weight.matrix, grad.data(), x.data(), got_dv.data(), false, 2, got_db.data());
        compare("sparse_linear_values_grad: bias", isa, got_db, db);
        std::vector<double> activated(y.size()), passed(dx.size());
        for (size_t i = 0; i < y.size(); ++i) activated[i] = gelu_tanh(y[i], nullptr);
        for (size_t i = 0; i < dx.size(); ++i) gelu_tanh(x[i], &passed[i]), passed[i] *= dx[i];
        std::vector<float> gelu(y.size(), NAN), before = x;
        got_y.assign(y.size(), NAN), got_dx.assign(dx.size(), NAN);
        sparse_linear(tokens, weight.matrix, x.data(), bias.data(), got_y.data(), false, 2, gelu.data());
        sparse_linear_input_grad(tokens, weight.matrix, grad.data(), got_dx.data(), false, 2, before.data());
        compare("sparse_linear: before GELU", isa, got_y, y);
        compare("sparse_linear: GELU", isa, gelu, activated);
        compare("sparse_linear_input_grad: GELU", isa, got_dx, passed);
    }
}

// The same products as a dense convolution's; dv are those of the weight's entries.
void check_winograd(const Conv2d& conv, const Weight& weight, const std::string& isa, bool channels_last,
                    const std::vector<float>& x, const std::vector<float>& grad, const std::vector<double>& y,
                    const std::vector<double>& dx, const std::vector<double>& dv) {
    std::vector<float> dense(conv.out_channels * conv.in_channels * 9), got_dense(dense.size(), NAN);
    std::vector<float> got_y(y.size(), NAN), got_dx(dx.size(), NAN), got_dv(dv.size(), NAN);
    const auto at = [&](int64_t row, int64_t column) { return row * conv.in_channels * 9 + column; };
    weight.each([&](int64_t row, int64_t col, int64_t place) { dense[at(row, col)] = weight.values[place]; });
    winograd_conv2d(conv, dense.data(), x.data(), nullptr, got_y.data(), channels_last, 2);
    winograd_input_grad(conv, dense.data(), grad.data(), got_dx.data(), channels_last, 2);
    winograd_weight_grad(conv, grad.data(), channels_last, x.data(), channels_last, got_dense.data(), 2);
    weight.each([&](int64_t row, int64_t col, int64_t place) { got_dv[place] = got_dense[at(row, col)]; });
    compare("winograd_conv2d", isa, got_y, y);
    compare("winograd_input_grad", isa, got_dx, dx);
    compare("winograd_weight_grad", isa, got_dv, dv);
}

void check_conv2d(Conv2d conv, int64_t bh, int64_t bw, double density, bool channels_last) {
    for (int d = 0; d < 2; ++d) {
        const int64_t reach = conv.dilation[d] * (conv.kernel[d] - 1) + 1;
        conv.out_size[d] = (conv.in_size[d] + 2 * conv.padding[d] - reach) / conv.stride[d] + 1;
    }
    const int64_t taps = conv.kernel[0] * conv.kernel[1], group_in = conv.in_channels / conv.groups;
    const Weight weight(conv.out_channels, group_in * taps, bh, bw, density);
    const int64_t in_area = conv.in_size[0] * conv.in_size[1], out_area = conv.out_size[0] * conv.out_size[1];
    const std::vector<float> x = random_values(conv.batch * conv.in_channels * in_area);
    const std::vector<float> grad = random_values(conv.batch * conv.out_channels * out_area);
    const auto index = [&](int64_t n, int64_t channel, int64_t row, int64_t column, int64_t channels,
                           const int64_t* size) {
        return channels_last ? ((n * size[0] + row) * size[1] + column) * channels + channel
                             : ((n * channels + channel) * size[0] + row) * size[1] + column;
    };
    std::vector<double> y(grad.size()), dx(x.size()), dv(weight.values.size()), db(conv.out_channels);
    for (size_t i = 0; i < grad.size(); ++i) db[channels_last ? i % db.size() : i / out_area % db.size()] += grad[i];
    weight.each([&](int64_t o, int64_t column, int64_t place) {
        const int64_t c = o / (conv.out_channels / conv.groups) * group_in + column / bw / taps * bw + column % bw;
        const int64_t tap = column / bw % taps;
        for (int64_t n = 0; n < conv.batch; ++n) {
            for (int64_t h = 0; h < conv.out_size[0]; ++h) {
                for (int64_t w = 0; w < conv.out_size[1]; ++w) {
                    const int64_t row = h * conv.stride[0] + tap / conv.kernel[1] * conv.dilation[0] - conv.padding[0];
                    const int64_t at = w * conv.stride[1] + tap % conv.kernel[1] * conv.dilation[1] - conv.padding[1];
                    if (row < 0 || row >= conv.in_size[0] || at < 0 || at >= conv.in_size[1]) continue;
                    const int64_t to = index(n, o, h, w, conv.out_channels, conv.out_size);
                    const int64_t from = index(n, c, row, at, conv.in_channels, conv.in_size);
                    y[to] += double(weight.values[place]) * x[from];
                    dx[from] += double(weight.values[place]) * grad[to];
                    dv[place] += double(grad[to]) * x[from];
                }
            }
        }
    });
    bool plain = conv.groups == 1 && bw == 1;
    for (int d = 0; d < 2; ++d) plain = plain && conv.kernel[d] == 3 && conv.stride[d] == 1 && conv.dilation[d] == 1;
    for (const std::string& isa : supported_isas()) {
        set_isa(isa);
        if (plain) check_winograd(conv, weight, isa, channels_last, x, grad, y, dx, dv);
        for (const FlatPanels flat : {FlatPanels::kWherePossible, FlatPanels::kNever}) {
            set_flat_panels(flat);
            std::vector<float> got_y(y.size(), NAN), got_dx(dx.size(), NAN), got_dv(dv.size(), NAN);
            std::vector<float> got_db(db.size(), NAN);
            sparse_conv2d(conv, weight.matrix, x.data(), nullptr, got_y.data(), channels_last, 2);
            sparse_conv2d_input_grad(conv, weight.matrix, grad.data(), got_dx.data(), channels_last, 2);
            sparse_conv2d_values_grad(conv, weight.matrix, grad.data(), channels_last, x.data(), channels_last,
                                      got_dv.data(), 2);
            compare("sparse_conv2d", isa, got_y, y);
            compare("sparse_conv2d_input_grad", isa, got_dx, dx);
            compare("sparse_conv2d_values_grad", isa, got_dv, dv);
            got_dx.assign(dx.size(), NAN), got_dv.assign(dv.size(), NAN);
            sparse_conv2d_grads(conv, weight.matrix, grad.data(), channels_last, x.data(), channels_last, got_dx.data(),
                                got_dv.data(), got_db.data(), 2);
            compare("sparse_conv2d_grads: input", isa, got_dx, dx);
            compare("sparse_conv2d_grads: values", isa, got_dv, dv);
            compare("sparse_conv2d_grads: bias", isa, got_db, db);
        }
    }
}

void check_batch_norm(int64_t images, int64_t channels, int64_t plane, bool channels_last, bool batch_statistics,
                      bool with_residual, Activation activation) {
    const int64_t size = images * channels * plane;
    const double eps = 1e-3, count = static_cast<double>(images * plane);
    const std::vector<float> x = random_values(size), grad = random_values(size), residual = random_values(size);
    const std::vector<float> weight = random_values(channels), bias = random_values(channels);
    std::vector<double> mean(channels, 0.25), var(channels, 2.0), y(size), dx(size), dr(size), dw(channels), db(channels);
    const auto each = [&](int64_t c, auto visit) {
        for (int64_t n = 0; n < images; ++n) {
            for (int64_t p = 0; p < plane; ++p) {
                visit(channels_last ? (n * plane + p) * channels + c : (n * channels + c) * plane + p);
            }
        }
    };
    for (int64_t c = 0; c < channels; ++c) {
        if (batch_statistics) {
            mean[c] = var[c] = 0;
            each(c, [&](int64_t i) { mean[c] += x[i] / count; });
            each(c, [&](int64_t i) { var[c] += (x[i] - mean[c]) * (x[i] - mean[c]) / count; });
        }
        const double scale = 1 / std::sqrt(var[c] + eps);
        each(c, [&](int64_t i) {
            const double normal = (x[i] - mean[c]) * scale;
            const double v = normal * weight[c] + bias[c] + (with_residual ? residual[i] : 0);
            const double s = 1 / (1 + std::exp(-v)), part = std::fmin(std::fmax(v + 3, 0), 6) / 6;
            double slope = 1;
            switch (activation) {
                case Activation::kNone: y[i] = v; break;
                case Activation::kReLU: y[i] = std::fmax(v, 0), slope = v > 0; break;
                case Activation::kReLU6: y[i] = std::fmin(std::fmax(v, 0), 6), slope = v > 0 && v < 6; break;
                case Activation::kSiLU: y[i] = v * s, slope = s * (1 + v * (1 - s)); break;
                case Activation::kHardswish: y[i] = v * part, slope = part + (std::fabs(v) < 3 ? v / 6 : 0); break;
            }
            dr[i] = slope * grad[i];
            db[c] += dr[i];
            dw[c] += dr[i] * normal;
        });
        const double taken = batch_statistics ? 1 / count : 0;
        each(c, [&](int64_t i) {
            dx[i] = weight[c] * scale * (dr[i] - taken * (db[c] + (x[i] - mean[c]) * scale * dw[c]));
        });
    }
    const bool masked = with_residual && activation != Activation::kNone;  // else the residual's gradient is grad
    for (const std::string& isa : supported_isas()) {
        set_isa(isa);
        std::vector<float> got_mean(mean.begin(), mean.end()), got_var(var.begin(), var.end());
        if (batch_statistics) got_mean.assign(channels, NAN), got_var.assign(channels, NAN);
        std::vector<float> got_y(size, NAN), got_dx(size, NAN), got_dr(size, NAN), got_dw(channels, NAN);
        std::vector<float> got_db(channels, NAN);
        const BatchNormReLU norm = {images, channels, plane, channels_last, false, activation, batch_statistics, eps,
                                    weight.data(), bias.data(), x.data(), got_mean.data(), got_var.data(), 2, nullptr};
        batch_norm_relu({norm, with_residual ? residual.data() : nullptr, got_y.data()});
        batch_norm_relu_backward({norm, grad.data(), masked ? got_y.data() : nullptr, got_dx.data(),
                                  masked ? got_dr.data() : nullptr, got_dw.data(), got_db.data()});
        compare("batch_norm_relu", isa, got_y, y);
        compare("batch_norm_relu mean", isa, got_mean, mean);
        compare("batch_norm_relu variance", isa, got_var, var);
        compare("batch_norm_relu_backward", isa, got_dx, dx);
        compare("batch_norm_relu_backward weight", isa, got_dw, dw);
        compare("batch_norm_relu_backward bias", isa, got_db, db);
        if (masked) compare("batch_norm_relu_backward residual", isa, got_dr, dr);
    }
}

}  // namespace

int main() {
    for (const bool channels_last : {false, true}) {
        for (const bool batch_statistics : {false, true}) {
            for (const bool with_residual : {false, true}) {
                for (const Activation a : {Activation::kNone, Activation::kReLU, Activation::kReLU6, Activation::kSiLU,
                                           Activation::kHardswish}) {
                    if (with_residual && a > Activation::kReLU6) continue;
                    check_batch_norm(5, 17, 13, channels_last, batch_statistics, with_residual, a);
                    check_batch_norm(2, 3, 1500, channels_last, batch_statistics, with_residual, a);
                    check_batch_norm(19, 40, 1, channels_last, batch_statistics, with_residual, a);
                }
            }
        }
    }
    check_linear(37, 50, 33, 1, 1, 0.3);
    check_linear(5, 1500, 9, 1, 1, 0.1);
    check_linear(300, 24, 18, 3, 1, 0.4);
    check_linear(18, 40, 44, 4, 4, 0.5);
    check_linear(3, 7, 5, 1, 1, 0.0);
    check_linear(150, 4500, 40, 1, 1, 0.02);  // features are packed in twice
    check_linear(67, 230, 300, 1, 1, 0.7);    // in several chunks, with rows in several blocks
    check_linear(90, 240, 396, 12, 8, 0.6);
    for (int64_t tokens = 0; tokens <= 5; ++tokens) {  // few, on one thread and on two
        check_linear(tokens, 30, 21, 1, 1, 0.4);
        check_linear(tokens, 24, 40, 4, 4, 0.5);
        check_linear(tokens, 300, 120, 1, 1, 0.6);
    }
    for (const bool channels_last : {false, true}) {
        check_conv2d({17, 5, {9, 7}, 18, {}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1}, 1, 1, 0.3, channels_last);
        check_conv2d({3, 8, {8, 16}, 6, {}, {3, 3}, {2, 2}, {1, 1}, {1, 1}, 2}, 3, 1, 0.4, channels_last);
        check_conv2d({9, 80, {6, 9}, 70, {}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1}, 1, 1, 0.5, channels_last);
        check_conv2d({20, 4, {5, 33}, 3, {}, {1, 1}, {2, 2}, {0, 0}, {1, 1}, 1}, 1, 1, 0.7, channels_last);
        check_conv2d({1, 6, {4, 7}, 40, {}, {3, 3}, {2, 2}, {1, 1}, {1, 1}, 1}, 2, 3, 0.4, channels_last);
        check_conv2d({2, 4, {11, 10}, 4, {}, {5, 2}, {3, 1}, {4, 0}, {2, 3}, 1}, 2, 2, 0.6, channels_last);
        check_conv2d({30, 5, {4, 3}, 6, {}, {3, 3}, {1, 1}, {1, 2}, {1, 1}, 1}, 1, 1, 0.05, channels_last);
        check_conv2d({5, 3, {3, 200}, 4, {}, {3, 1}, {1, 1}, {1, 0}, {1, 1}, 1}, 1, 1, 0.2, channels_last);
        check_conv2d({3, 2, {40, 3000}, 3, {}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1}, 1, 1, 0.1, channels_last);
        check_conv2d({1, 3, {4, 4}, 20, {}, {7, 7}, {1, 1}, {3, 3}, {1, 1}, 1}, 1, 1, 0.0, channels_last);
    }
    // channels that threads share, because there is one unit
    check_conv2d({1, 6, {4, 4}, 21, {}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1}, 1, 1, 0.4, false);
    check_conv2d({1, 12, {8, 8}, 9, {}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1}, 3, 1, 0.5, false);
    if (failures == 0) std::printf("passed\n");
    return failures;
}
