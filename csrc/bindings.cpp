// Python bindings of the CPU kernels. Tensors come as addresses (tensor.data_ptr()), so that one build serves every
// torch version; shapes, dtypes and devices are checked by the Python side, which is the only caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/average.h"
#include "cpu/batch_norm_relu.h"
#include "cpu/bernoulli_mask.h"
#include "cpu/check_index.h"
#include "cpu/dispatch.h"
#include "cpu/drop_and_grow.h"
#include "cpu/masked_dense.h"
#include "cpu/sparse_conv2d.h"
#include "cpu/sparse_linear.h"
#include "cpu/transpose_index.h"
#include "cpu/unknown_aware_loss.h"
#include "cpu/winograd.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

using Size2 = std::array<int64_t, 2>;

// rows, cols, block rows, block cols, then the addresses of row_ptr, col, t_ptr, t_row, t_perm and values.
using MatrixTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, std::uintptr_t, std::uintptr_t, std::uintptr_t,
                               std::uintptr_t, std::uintptr_t, std::uintptr_t>;

sparse_moon::SparseMatrix matrix(const MatrixTuple& m) {
    return {std::get<0>(m),
            std::get<1>(m),
            std::get<2>(m),
            std::get<3>(m),
            pointer<const int32_t>(std::get<4>(m)),
            pointer<const int32_t>(std::get<5>(m)),
            pointer<const int32_t>(std::get<6>(m)),
            pointer<const int32_t>(std::get<7>(m)),
            pointer<const int32_t>(std::get<8>(m)),
            pointer<const float>(std::get<9>(m))};
}

// Batch, (channels, height, width) of input and output, kernel, stride, padding, dilation, groups.
using ConvTuple =
    std::tuple<int64_t, std::array<int64_t, 3>, std::array<int64_t, 3>, Size2, Size2, Size2, Size2, int64_t>;

sparse_moon::Conv2d conv2d(const ConvTuple& c) {
    const auto& [batch, in, out, kernel, stride, padding, dilation, groups] = c;
    return {batch,
            in[0],
            {in[1], in[2]},
            out[0],
            {out[1], out[2]},
            {kernel[0], kernel[1]},
            {stride[0], stride[1]},
            {padding[0], padding[1]},
            {dilation[0], dilation[1]},
            groups};
}

void bind_sparse_products(py::module_& m) {
    using Address = std::uintptr_t;
    m.def("supported_isas", &sparse_moon::supported_isas);
    m.def("isa", [] { return sparse_moon::kernels().name; });
    m.def("set_isa", &sparse_moon::set_isa, py::arg("name"));
    m.def(
        "set_flat_panels",
        [](const std::string& where) {
            using sparse_moon::FlatPanels;
            if (where == "faster") return sparse_moon::set_flat_panels(FlatPanels::kWhereFaster);
            if (where == "possible") return sparse_moon::set_flat_panels(FlatPanels::kWherePossible);
            if (where == "never") return sparse_moon::set_flat_panels(FlatPanels::kNever);
            throw std::invalid_argument("where must be faster, possible or never, got " + where);
        },
        py::arg("where"));
    m.def(
        "sparse_linear",
        [](int64_t tokens, const MatrixTuple& weight, Address input, Address bias, Address output, int threads) {
            py::gil_scoped_release unlocked;
            sparse_moon::sparse_linear(tokens, matrix(weight), pointer<const float>(input), pointer<const float>(bias),
                                       pointer<float>(output), threads);
        },
        py::arg("tokens"), py::arg("weight"), py::arg("input"), py::arg("bias"), py::arg("output"), py::arg("threads"));
    m.def(
        "sparse_linear_input_grad",
        [](int64_t tokens, const MatrixTuple& weight, Address grad, Address input_grad, int threads) {
            py::gil_scoped_release unlocked;
            sparse_moon::sparse_linear_input_grad(tokens, matrix(weight), pointer<const float>(grad),
                                                  pointer<float>(input_grad), threads);
        },
        py::arg("tokens"), py::arg("weight"), py::arg("grad"), py::arg("input_grad"), py::arg("threads"));
    m.def(
        "sparse_linear_values_grad",
        [](int64_t tokens, const MatrixTuple& weight, Address grad, Address input, Address values_grad, int threads) {
            py::gil_scoped_release unlocked;
            sparse_moon::sparse_linear_values_grad(tokens, matrix(weight), pointer<const float>(grad),
                                                   pointer<const float>(input), pointer<float>(values_grad), threads);
        },
        py::arg("tokens"), py::arg("weight"), py::arg("grad"), py::arg("input"), py::arg("values_grad"),
        py::arg("threads"));
    m.def(
        "sparse_conv2d",
        [](const ConvTuple& conv, const MatrixTuple& weight, Address input, Address bias, Address output,
           bool channels_last, int threads) {
            py::gil_scoped_release unlocked;
            sparse_moon::sparse_conv2d(conv2d(conv), matrix(weight), pointer<const float>(input),
                                       pointer<const float>(bias), pointer<float>(output), channels_last, threads);
        },
        py::arg("conv"), py::arg("weight"), py::arg("input"), py::arg("bias"), py::arg("output"),
        py::arg("channels_last"), py::arg("threads"));
    m.def(
        "sparse_conv2d_input_grad",
        [](const ConvTuple& conv, const MatrixTuple& weight, Address grad, Address input_grad, bool channels_last,
           int threads) {
            py::gil_scoped_release unlocked;
            sparse_moon::sparse_conv2d_input_grad(conv2d(conv), matrix(weight), pointer<const float>(grad),
                                                  pointer<float>(input_grad), channels_last, threads);
        },
        py::arg("conv"), py::arg("weight"), py::arg("grad"), py::arg("input_grad"), py::arg("channels_last"),
        py::arg("threads"));
    m.def(
        "sparse_conv2d_values_grad",
        [](const ConvTuple& conv, const MatrixTuple& weight, Address grad, bool grad_channels_last, Address input,
           bool input_channels_last, Address values_grad, int threads) {
            py::gil_scoped_release unlocked;
            sparse_moon::sparse_conv2d_values_grad(conv2d(conv), matrix(weight), pointer<const float>(grad),
                                                   grad_channels_last, pointer<const float>(input), input_channels_last,
                                                   pointer<float>(values_grad), threads);
        },
        py::arg("conv"), py::arg("weight"), py::arg("grad"), py::arg("grad_channels_last"), py::arg("input"),
        py::arg("input_channels_last"), py::arg("values_grad"), py::arg("threads"));
    m.def(
        "sparse_conv2d_grads",
        [](const ConvTuple& conv, const MatrixTuple& weight, Address grad, bool grad_channels_last, Address input,
           bool input_channels_last, Address input_grad, Address values_grad, int threads) {
            py::gil_scoped_release unlocked;
            sparse_moon::sparse_conv2d_grads(conv2d(conv), matrix(weight), pointer<const float>(grad),
                                             grad_channels_last, pointer<const float>(input), input_channels_last,
                                             pointer<float>(input_grad), pointer<float>(values_grad), threads);
        },
        py::arg("conv"), py::arg("weight"), py::arg("grad"), py::arg("grad_channels_last"), py::arg("input"),
        py::arg("input_channels_last"), py::arg("input_grad"), py::arg("values_grad"), py::arg("threads"));
}

void bind_winograd(py::module_& m) {
    using Address = std::uintptr_t;
    m.def(
        "winograd_conv2d",
        [](const ConvTuple& conv, Address weight, Address input, Address bias, Address output, bool channels_last,
           int threads) {
            py::gil_scoped_release unlocked;
            sparse_moon::winograd_conv2d(conv2d(conv), pointer<const float>(weight), pointer<const float>(input),
                                         pointer<const float>(bias), pointer<float>(output), channels_last, threads);
        },
        py::arg("conv"), py::arg("weight"), py::arg("input"), py::arg("bias"), py::arg("output"),
        py::arg("channels_last"), py::arg("threads"));
    m.def(
        "winograd_input_grad",
        [](const ConvTuple& conv, Address weight, Address grad, Address input_grad, bool channels_last, int threads) {
            py::gil_scoped_release unlocked;
            sparse_moon::winograd_input_grad(conv2d(conv), pointer<const float>(weight), pointer<const float>(grad),
                                             pointer<float>(input_grad), channels_last, threads);
        },
        py::arg("conv"), py::arg("weight"), py::arg("grad"), py::arg("input_grad"), py::arg("channels_last"),
        py::arg("threads"));
    m.def(
        "winograd_weight_grad",
        [](const ConvTuple& conv, Address grad, bool grad_channels_last, Address input, bool input_channels_last,
           Address weight_grad, int threads) {
            py::gil_scoped_release unlocked;
            sparse_moon::winograd_weight_grad(conv2d(conv), pointer<const float>(grad), grad_channels_last,
                                              pointer<const float>(input), input_channels_last,
                                              pointer<float>(weight_grad), threads);
        },
        py::arg("conv"), py::arg("grad"), py::arg("grad_channels_last"), py::arg("input"),
        py::arg("input_channels_last"), py::arg("weight_grad"), py::arg("threads"));
}

// Block rows, block shape, elements of a dense row, taps, strides of channel and tap, addresses of row_ptr and col,
// threads.
using PlacesTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, std::uintptr_t,
                               std::uintptr_t, int>;

sparse_moon::MaskedDense places(const PlacesTuple& p) {
    const auto& [grid_rows, block_rows, block_cols, cols, taps, stride_channel, stride_tap, row_ptr, col, threads] = p;
    return {grid_rows,      block_rows, block_cols, cols, taps,
            stride_channel, stride_tap, pointer<const int32_t>(row_ptr), pointer<const int32_t>(col), threads};
}

void bind_masked_dense(py::module_& m) {
    const auto bind = [&](const char* name, auto move, const char* from, const char* to) {
        m.def(
            name,
            [move](const PlacesTuple& layout, int64_t bytes, std::uintptr_t source, std::uintptr_t target) {
                py::gil_scoped_release unlocked;
                move(places(layout), bytes, pointer<const void>(source), pointer<void>(target));
            },
            py::arg("places"), py::arg("bytes"), py::arg(from), py::arg(to));
    };
    bind("scatter_values", sparse_moon::scatter_values, "values", "dense");
    bind("gather_values", sparse_moon::gather_values, "dense", "values");
}

// (images, channels, plane), channels_last, relu, batch_statistics, eps, then the addresses of weight, bias, input,
// mean and var.
using BatchNormTuple =
    std::tuple<std::array<int64_t, 3>, bool, bool, bool, double, std::uintptr_t, std::uintptr_t, std::uintptr_t,
               std::uintptr_t, std::uintptr_t>;

sparse_moon::BatchNormReLU batch_norm(const BatchNormTuple& b, int threads) {
    const auto& [shape, channels_last, relu, batch_statistics, eps, weight, bias, input, mean, var] = b;
    return {shape[0], shape[1], shape[2], channels_last, relu, batch_statistics, eps, pointer<const float>(weight),
            pointer<const float>(bias), pointer<const float>(input), pointer<float>(mean), pointer<float>(var), threads,
            nullptr};
}

void bind_batch_norm_relu(py::module_& m) {
    using Address = std::uintptr_t;
    m.def(
        "batch_norm_relu",
        [](const BatchNormTuple& norm, Address residual, Address output, int threads) {
            py::gil_scoped_release unlocked;
            sparse_moon::batch_norm_relu(
                {batch_norm(norm, threads), pointer<const float>(residual), pointer<float>(output)});
        },
        py::arg("norm"), py::arg("residual"), py::arg("output"), py::arg("threads"));
    m.def(
        "batch_norm_relu_backward",
        [](const BatchNormTuple& norm, Address grad, Address output, Address input_grad, Address residual_grad,
           Address weight_grad, Address bias_grad, int threads) {
            py::gil_scoped_release unlocked;
            sparse_moon::batch_norm_relu_backward(
                {batch_norm(norm, threads), pointer<const float>(grad), pointer<const float>(output),
                 pointer<float>(input_grad), pointer<float>(residual_grad), pointer<float>(weight_grad),
                 pointer<float>(bias_grad)});
        },
        py::arg("norm"), py::arg("grad"), py::arg("output"), py::arg("input_grad"), py::arg("residual_grad"),
        py::arg("weight_grad"), py::arg("bias_grad"), py::arg("threads"));
}

using sparse_moon::PhiloxStream;

PhiloxStream philox_stream(int64_t seed, uint32_t stream, int64_t step) {
    return {static_cast<uint64_t>(seed), stream, static_cast<uint64_t>(step)};
}

template <class T>
int64_t unknown_aware_loss(std::uintptr_t logits, std::uintptr_t target, double w, int64_t batch, int64_t classes,
                           std::uintptr_t loss, std::uintptr_t grad, std::uintptr_t statistics, int threads) {
    py::gil_scoped_release unlocked;
    return sparse_moon::unknown_aware_loss(pointer<const T>(logits), pointer<const int64_t>(target), w, batch, classes,
                                           pointer<T>(loss), pointer<T>(grad), pointer<T>(statistics), threads);
}

// Addresses of average and value, number of elements, stream of the random mask.
using AverageTask = std::tuple<std::uintptr_t, std::uintptr_t, int64_t, uint32_t>;

template <class T>
void average(const std::vector<AverageTask>& tasks, double weight, uint64_t threshold, int64_t seed, int64_t step,
             int threads) {
    py::gil_scoped_release unlocked;
    std::vector<sparse_moon::AveragePair<T>> pairs;
    for (const auto& [average, value, size, stream] : tasks) {
        pairs.push_back({pointer<T>(average), pointer<const T>(value), size, stream});
    }
    sparse_moon::average<T>(pairs, static_cast<T>(weight), threshold, philox_stream(seed, 0, step), threads);
}

void bind_small_operators(py::module_& m) {
    m.def(
        "drop_and_grow",
        [](std::uintptr_t drop_score, std::uintptr_t grow_score, std::uintptr_t row_ptr, std::uintptr_t col,
           int64_t rows, int64_t cols, int64_t drop, int64_t grow, std::uintptr_t new_row_ptr, std::uintptr_t new_col,
           std::uintptr_t t_ptr, std::uintptr_t t_row, std::uintptr_t t_perm, std::uintptr_t source) {
            py::gil_scoped_release unlocked;
            sparse_moon::drop_and_grow(pointer<const float>(drop_score), pointer<const float>(grow_score),
                                       pointer<const int32_t>(row_ptr), pointer<const int32_t>(col), rows, cols, drop,
                                       grow, pointer<int32_t>(new_row_ptr), pointer<int32_t>(new_col),
                                       pointer<int32_t>(t_ptr), pointer<int32_t>(t_row), pointer<int32_t>(t_perm),
                                       pointer<int32_t>(source));
        },
        py::arg("drop_score"), py::arg("grow_score"), py::arg("row_ptr"), py::arg("col"), py::arg("rows"),
        py::arg("cols"), py::arg("drop"), py::arg("grow"), py::arg("new_row_ptr"), py::arg("new_col"),
        py::arg("t_ptr"), py::arg("t_row"), py::arg("t_perm"), py::arg("source"));
    m.def("unknown_aware_loss_float32", &unknown_aware_loss<float>);
    m.def("unknown_aware_loss_float64", &unknown_aware_loss<double>);
    m.def("average_float32", &average<float>);
    m.def("average_float64", &average<double>);
    m.def(
        "bernoulli_mask",
        [](int64_t seed, uint32_t stream, int64_t step, uint64_t threshold, int64_t size, std::uintptr_t mask) {
            py::gil_scoped_release unlocked;
            sparse_moon::bernoulli_mask(philox_stream(seed, stream, step), threshold, size, pointer<uint8_t>(mask));
        },
        py::arg("seed"), py::arg("stream"), py::arg("step"), py::arg("threshold"), py::arg("size"), py::arg("mask"));
    m.def(
        "random_scores",
        [](int64_t seed, uint32_t stream, int64_t step, int64_t size, std::uintptr_t scores) {
            py::gil_scoped_release unlocked;
            sparse_moon::random_scores(philox_stream(seed, stream, step), size, pointer<float>(scores));
        },
        py::arg("seed"), py::arg("stream"), py::arg("step"), py::arg("size"), py::arg("scores"));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    py::register_local_exception<std::length_error>(m, "TooLarge", PyExc_ValueError);
    bind_small_operators(m);
    bind_sparse_products(m);
    bind_winograd(m);
    bind_masked_dense(m);
    bind_batch_norm_relu(m);
    m.def(
        "check_index",
        [](std::uintptr_t row_ptr, std::uintptr_t col, std::uintptr_t t_ptr, std::uintptr_t t_row,
           std::uintptr_t t_perm, int64_t rows, int64_t cols, int64_t n) {
            py::gil_scoped_release unlocked;
            const auto [fault, fingerprint] = sparse_moon::check_index(
                pointer<const int32_t>(row_ptr), pointer<const int32_t>(col), pointer<const int32_t>(t_ptr),
                pointer<const int32_t>(t_row), pointer<const int32_t>(t_perm), rows, cols, n);
            return std::make_pair(static_cast<int64_t>(fault), fingerprint);
        },
        py::arg("row_ptr"), py::arg("col"), py::arg("t_ptr"), py::arg("t_row"), py::arg("t_perm"), py::arg("rows"),
        py::arg("cols"), py::arg("n"));
    m.def(
        "transpose_index",
        [](std::uintptr_t row_ptr, std::uintptr_t col, int64_t rows, int64_t cols, std::uintptr_t t_ptr,
           std::uintptr_t t_row, std::uintptr_t t_perm) {
            py::gil_scoped_release unlocked;
            sparse_moon::transpose_index(pointer<const int32_t>(row_ptr), pointer<const int32_t>(col), rows, cols,
                                         pointer<int32_t>(t_ptr), pointer<int32_t>(t_row), pointer<int32_t>(t_perm));
        },
        py::arg("row_ptr"), py::arg("col"), py::arg("rows"), py::arg("cols"), py::arg("t_ptr"), py::arg("t_row"),
        py::arg("t_perm"));
}
