// What Python sees of the CPU kernels: the module sparse_moon._C.
#include "register.h"

#include <memory>

#include "cpu/average.h"
#include "cpu/batch_norm_relu.h"
#include "cpu/bernoulli_mask.h"
#include "cpu/check_index.h"
#include "cpu/conv2d_winograd.h"
#include "cpu/dispatch.h"
#include "cpu/drop_and_grow.h"
#include "cpu/masked_dense.h"
#include "cpu/sparse_conv2d.h"
#include "cpu/sparse_linear.h"
#include "cpu/sparse_linear_runs.h"
#include "cpu/transpose_index.h"
#include "cpu/unknown_aware_loss.h"

namespace sparse_moon {

// A SparseMatrix without values, which Python keeps from call to call.
struct KeptMatrix {
    SparseMatrix matrix;
    std::shared_ptr<KeptRuns> runs;
};

// That, and the address of its values.
template <>
struct FromPython<SparseMatrix> {
    using Type = std::pair<KeptMatrix, Address>;
    static SparseMatrix convert(const Type& m) {
        SparseMatrix matrix = m.first.matrix;
        matrix.values = pointer<const float>(m.second);
        return matrix;
    }
};

// Kept from call to call, too.
template <>
struct FromPython<Conv2d> {
    using Type = Conv2d;
    static const Conv2d& convert(const Conv2d& conv) { return conv; }
};

// Block rows, block shape, elements of a dense row, taps, strides of channel and tap, addresses of row_ptr and col,
// threads.
template <>
struct FromPython<MaskedDense> {
    using Type = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, Address, Address, int>;
    static MaskedDense convert(const Type& p) {
        const auto& [grid_rows, block_rows, block_cols, cols, taps, stride_channel, stride_tap, row_ptr, col, threads] =
            p;
        return {grid_rows,      block_rows, block_cols, cols, taps,
                stride_channel, stride_tap, pointer<const int32_t>(row_ptr), pointer<const int32_t>(col), threads};
    }
};

// (images, channels, plane), channels_last, bfloat16, activation, batch_statistics, eps, then the addresses of weight,
// bias, input, mean and var; the number of threads comes for itself.
template <>
struct FromPython<BatchNormReLU> {
    using Type = std::tuple<std::array<int64_t, 3>, bool, bool, int, bool, double, Address, Address, Address, Address,
                            Address>;
    static BatchNormReLU convert(const Type& b) {
        const auto& [shape, channels_last, bfloat16, activation, batch_statistics, eps, weight, bias, input, mean,
                     var] = b;
        return {shape[0], shape[1], shape[2], channels_last, bfloat16, static_cast<Activation>(activation),
                batch_statistics, eps, pointer<const float>(weight), pointer<const float>(bias),
                pointer<const void>(input), pointer<float>(mean), pointer<float>(var), 1, nullptr};
    }
};

namespace {

KeptMatrix kept_matrix(int64_t rows, int64_t cols, int64_t block_rows, int64_t block_cols, Address row_ptr,
                           Address col, Address t_ptr, Address t_row, Address t_perm) {
    auto runs = std::make_shared<KeptRuns>();
    const SparseMatrix matrix{rows,
                              cols,
                              block_rows,
                              block_cols,
                              pointer<const int32_t>(row_ptr),
                              pointer<const int32_t>(col),
                              pointer<const int32_t>(t_ptr),
                              pointer<const int32_t>(t_row),
                              pointer<const int32_t>(t_perm),
                              nullptr,
                              runs.get()};
    return {matrix, runs};
}

Conv2d convolution(int64_t batch, const std::array<int64_t, 3>& input, const std::array<int64_t, 3>& output,
                   const std::array<int64_t, 2>& kernel, const std::array<int64_t, 2>& stride,
                   const std::array<int64_t, 2>& padding, const std::array<int64_t, 2>& dilation, int64_t groups,
                   bool bfloat16) {
    return {conv2d<int64_t>(batch, input, output, kernel, stride, padding, dilation, groups), bfloat16};
}

void set_flat_panels_where(const std::string& where) {
    if (where == "faster") return set_flat_panels(FlatPanels::kWhereFaster);
    if (where == "possible") return set_flat_panels(FlatPanels::kWherePossible);
    if (where == "never") return set_flat_panels(FlatPanels::kNever);
    throw std::invalid_argument("where must be faster, possible or never, got " + where);
}

void forward(BatchNormReLU norm, const void* residual, void* output, int threads) {
    norm.threads = threads;
    batch_norm_relu({norm, residual, output});
}

void backward(BatchNormReLU norm, const void* grad, const void* output, void* input_grad, void* residual_grad,
              float* weight_grad, float* bias_grad, int threads) {
    norm.threads = threads;
    batch_norm_relu_backward({norm, grad, output, input_grad, residual_grad, weight_grad, bias_grad});
}

std::pair<int64_t, int64_t> fault_and_fingerprint(const int32_t* row_ptr, const int32_t* col, const int32_t* t_ptr,
                                                  const int32_t* t_row, const int32_t* t_perm, int64_t rows,
                                                  int64_t cols, int64_t n) {
    const auto [fault, fingerprint] = check_index(row_ptr, col, t_ptr, t_row, t_perm, rows, cols, n);
    return {static_cast<int64_t>(fault), fingerprint};
}

PhiloxStream philox_stream(int64_t seed, uint32_t stream, int64_t step) {
    return {static_cast<uint64_t>(seed), stream, static_cast<uint64_t>(step)};
}

void mask(int64_t seed, uint32_t stream, int64_t step, uint64_t threshold, int64_t size, uint8_t* mask) {
    bernoulli_mask(philox_stream(seed, stream, step), threshold, size, mask);
}

void scores(int64_t seed, uint32_t stream, int64_t step, int64_t size, float* scores) {
    random_scores(philox_stream(seed, stream, step), size, scores);
}

// Addresses of average and value, number of elements, stream of the random mask.
using AverageTask = std::tuple<Address, Address, int64_t, uint32_t>;

template <class T>
void average_tensors(const std::vector<AverageTask>& tasks, double weight, uint64_t threshold, int64_t seed,
                     int64_t step, int threads) {
    std::vector<AveragePair<T>> pairs;
    for (const auto& [average, value, size, stream] : tasks) {
        pairs.push_back({pointer<T>(average), pointer<const T>(value), size, stream});
    }
    average<T>(pairs, static_cast<T>(weight), threshold, philox_stream(seed, 0, step), threads);
}

}  // namespace
}  // namespace sparse_moon

PYBIND11_MODULE(_C, m) {
    using namespace sparse_moon;
    py::register_local_exception<std::length_error>(m, "TooLarge", PyExc_ValueError);
    const auto def = [&m](const char* name, auto function, auto... names) {
        define(m, py::call_guard<py::gil_scoped_release>(), name, function, names...);
    };

    m.def("supported_isas", &supported_isas);
    m.def("vendor", &vendor);
    m.def("isa", [] { return kernels().name; });
    m.def("set_isa", &set_isa, py::arg("name"));
    m.def("set_flat_panels", &set_flat_panels_where, py::arg("where"));

    // valid as long as the index lies where it lay
    py::class_<KeptMatrix>(m, "SparseMatrix")
        .def(py::init(&kept_matrix), py::arg("rows"), py::arg("cols"), py::arg("block_rows"), py::arg("block_cols"),
             py::arg("row_ptr"), py::arg("col"), py::arg("t_ptr"), py::arg("t_row"), py::arg("t_perm"));
    py::class_<Conv2d>(m, "Conv2d")
        .def(py::init(&convolution), py::arg("batch"), py::arg("input"), py::arg("output"), py::arg("kernel"),
             py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("groups"),
             py::arg("bfloat16") = false);

    def("sparse_linear", &sparse_linear, "tokens", "weight", "input", "bias", "output", "bfloat16", "threads",
        "gelu");
    def("sparse_linear_input_grad", &sparse_linear_input_grad, "tokens", "weight", "grad", "input_grad", "bfloat16",
        "threads", "before");
    def("sparse_linear_values_grad", &sparse_linear_values_grad, "tokens", "weight", "grad", "input", "values_grad",
        "bfloat16", "threads", "bias_grad");
    def("sparse_linear_grads", &sparse_linear_grads, "tokens", "weight", "grad", "input", "input_grad", "values_grad",
        "bias_grad", "bfloat16", "threads");

    def("sparse_conv2d", &sparse_conv2d, "conv", "weight", "input", "bias", "output", "channels_last", "threads");
    def("sparse_conv2d_input_grad", &sparse_conv2d_input_grad, "conv", "weight", "grad", "input_grad", "channels_last",
        "threads");
    def("sparse_conv2d_values_grad", &sparse_conv2d_values_grad, "conv", "weight", "grad", "grad_channels_last",
        "input", "input_channels_last", "values_grad", "threads");
    def("sparse_conv2d_grads", &sparse_conv2d_grads, "conv", "weight", "grad", "grad_channels_last", "input",
        "input_channels_last", "input_grad", "values_grad", "bias_grad", "threads");
    def("winograd_conv2d", &winograd_conv2d, "conv", "weight", "input", "bias", "output", "channels_last", "threads");
    def("winograd_input_grad", &winograd_input_grad, "conv", "weight", "grad", "input_grad", "channels_last",
        "threads");
    def("winograd_weight_grad", &winograd_weight_grad, "conv", "grad", "grad_channels_last", "input",
        "input_channels_last", "weight_grad", "threads");

    def("scatter_values", &scatter_values, "places", "bytes", "values", "dense");
    def("gather_values", &gather_values, "places", "bytes", "dense", "values");
    def("check_index", &fault_and_fingerprint, "row_ptr", "col", "t_ptr", "t_row", "t_perm", "rows", "cols", "n");
    def("transpose_index", &transpose_index, "row_ptr", "col", "rows", "cols", "t_ptr", "t_row", "t_perm");
    def("drop_and_grow", &drop_and_grow, "drop_score", "grow_score", "row_ptr", "col", "rows", "cols", "drop", "grow",
        "new_row_ptr", "new_col", "t_ptr", "t_row", "t_perm", "source");

    def("batch_norm_relu", &forward, "norm", "residual", "output", "threads");
    def("batch_norm_relu_backward", &backward, "norm", "grad", "output", "input_grad", "residual_grad", "weight_grad",
        "bias_grad", "threads");
    def("unknown_aware_loss_float32", &unknown_aware_loss<float>, "logits", "target", "w", "batch", "classes", "loss",
        "grad", "statistics", "threads");
    def("unknown_aware_loss_float64", &unknown_aware_loss<double>, "logits", "target", "w", "batch", "classes", "loss",
        "grad", "statistics", "threads");
    def("average_float32", &average_tensors<float>, "tensors", "weight", "threshold", "seed", "step", "threads");
    def("average_float64", &average_tensors<double>, "tensors", "weight", "threshold", "seed", "step", "threads");
    def("bernoulli_mask", &mask, "seed", "stream", "step", "threshold", "size", "mask");
    def("random_scores", &scores, "seed", "stream", "step", "size", "scores");
}
