// Python bindings of the CUDA kernels. As for the CPU kernels, tensors come as addresses (tensor.data_ptr()), and so
// does the stream (torch.cuda.current_stream().cuda_stream); shapes, dtypes and devices are checked by the Python side,
// which is the only caller, allocates outputs and workspaces, and makes the tensors' device current.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/average.h"
#include "cuda/bernoulli_mask.h"
#include "cuda/common.h"
#include "cuda/drop_and_grow.h"
#include "cuda/sparse_conv2d.h"
#include "cuda/sparse_linear.h"
#include "cuda/transpose_index.h"

namespace py = pybind11;

namespace {

using namespace sparse_moon::cuda;
using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// "torch.float32" and so on: str(tensor.dtype).
DType dtype(const std::string& name) {
    if (name == "torch.float32") return DType::float32;
    if (name == "torch.float16") return DType::float16;
    if (name == "torch.bfloat16") return DType::bfloat16;
    throw std::invalid_argument("expected float32, float16 or bfloat16, got " + name);
}

// rows, cols, entries, then the addresses of ptr, col and perm (0: values are in the order of the entries).
using RowsTuple = std::tuple<int64_t, int64_t, int64_t, Address, Address, Address>;

SparseRows sparse_rows(const RowsTuple& w) {
    const auto& [rows, cols, n, ptr, col, perm] = w;
    return {rows, cols, n, pointer<const int32_t>(ptr), pointer<const int32_t>(col), pointer<const int32_t>(perm)};
}

void bind_sparse_linear(py::module_& m) {
    m.def(
        "sparse_linear_workspace",
        [](const std::string& type, int64_t tokens, int64_t rows, int64_t cols, int64_t n) {
            return sparse_product_workspace(dtype(type), tokens, rows, cols, n);
        },
        py::arg("dtype"), py::arg("tokens"), py::arg("rows"), py::arg("cols"), py::arg("n"));
    m.def(
        "sparse_linear",
        [](const std::string& type, int64_t tokens, const RowsTuple& weight, Address values, Address bias,
           Address input, Address output, Address workspace, Address stream) {
            sparse_product(dtype(type), tokens, sparse_rows(weight), pointer<const void>(values),
                           pointer<const void>(bias), pointer<const void>(input), pointer<void>(output),
                           pointer<void>(workspace), reinterpret_cast<cudaStream_t>(stream));
        },
        py::arg("dtype"), py::arg("tokens"), py::arg("weight"), py::arg("values"), py::arg("bias"), py::arg("input"),
        py::arg("output"), py::arg("workspace"), py::arg("stream"));
    m.def(
        "sparse_linear_values_grad_workspace",
        [](const std::string& type, int64_t tokens, int64_t rows, int64_t cols, int64_t n) {
            return sparse_values_grad_workspace(dtype(type), tokens, rows, cols, n);
        },
        py::arg("dtype"), py::arg("tokens"), py::arg("rows"), py::arg("cols"), py::arg("n"));
    m.def(
        "sparse_linear_values_grad",
        [](const std::string& type, int64_t tokens, const RowsTuple& weight, Address grad, Address input,
           Address values_grad, Address workspace, Address stream) {
            sparse_values_grad(dtype(type), tokens, sparse_rows(weight), pointer<const void>(grad),
                               pointer<const void>(input), pointer<void>(values_grad), pointer<void>(workspace),
                               reinterpret_cast<cudaStream_t>(stream));
        },
        py::arg("dtype"), py::arg("tokens"), py::arg("weight"), py::arg("grad"), py::arg("input"),
        py::arg("values_grad"), py::arg("workspace"), py::arg("stream"));
}

using Size2 = std::array<int32_t, 2>;

// Batch, (channels, height, width) of input and output, kernel, stride, padding, dilation, groups.
using ConvTuple =
    std::tuple<int32_t, std::array<int32_t, 3>, std::array<int32_t, 3>, Size2, Size2, Size2, Size2, int32_t>;

Conv2d conv2d_of(const ConvTuple& c) {
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

// Number of entries, then the addresses of row_ptr, col, t_ptr, t_row and t_perm.
using ConvIndexTuple = std::tuple<int32_t, std::array<Address, 5>>;

Conv2dIndex conv2d_index(const ConvIndexTuple& index) {
    const auto& [n, address] = index;
    return {n,
            pointer<const int32_t>(address[0]),
            pointer<const int32_t>(address[1]),
            pointer<const int32_t>(address[2]),
            pointer<const int32_t>(address[3]),
            pointer<const int32_t>(address[4])};
}

Conv2dPass conv2d_pass(const std::string& name) {
    if (name == "forward") return Conv2dPass::forward;
    if (name == "input_grad") return Conv2dPass::input_grad;
    if (name == "values_grad") return Conv2dPass::values_grad;
    throw std::invalid_argument("expected forward, input_grad or values_grad, got " + name);
}

void bind_sparse_conv2d(py::module_& m) {
    m.def(
        "sparse_conv2d_workspace",
        [](const std::string& pass, const ConvTuple& conv, const std::string& type, int32_t n) {
            return sparse_conv2d_workspace(conv2d_pass(pass), conv2d_of(conv), dtype(type), n);
        },
        py::arg("pass_"), py::arg("conv"), py::arg("dtype"), py::arg("n"));
    m.def(
        "sparse_conv2d",
        [](const ConvTuple& conv, const std::string& type, const ConvIndexTuple& index, Address values, Address input,
           Address bias, Address output, Address workspace, Address stream) {
            sparse_conv2d(conv2d_of(conv), dtype(type), conv2d_index(index), pointer<const void>(values),
                          pointer<const void>(input), pointer<const void>(bias), pointer<void>(output),
                          pointer<void>(workspace), reinterpret_cast<cudaStream_t>(stream));
        },
        py::arg("conv"), py::arg("dtype"), py::arg("index"), py::arg("values"), py::arg("input"), py::arg("bias"),
        py::arg("output"), py::arg("workspace"), py::arg("stream"));
    m.def(
        "sparse_conv2d_input_grad",
        [](const ConvTuple& conv, const std::string& type, const ConvIndexTuple& index, Address values, Address grad,
           Address input_grad, Address workspace, Address stream) {
            sparse_conv2d_input_grad(conv2d_of(conv), dtype(type), conv2d_index(index), pointer<const void>(values),
                                     pointer<const void>(grad), pointer<void>(input_grad), pointer<void>(workspace),
                                     reinterpret_cast<cudaStream_t>(stream));
        },
        py::arg("conv"), py::arg("dtype"), py::arg("index"), py::arg("values"), py::arg("grad"), py::arg("input_grad"),
        py::arg("workspace"), py::arg("stream"));
    m.def(
        "sparse_conv2d_values_grad",
        [](const ConvTuple& conv, const std::string& type, const ConvIndexTuple& index, Address grad, Address input,
           Address values_grad, Address workspace, Address stream) {
            sparse_conv2d_values_grad(conv2d_of(conv), dtype(type), conv2d_index(index), pointer<const void>(grad),
                                      pointer<const void>(input), pointer<void>(values_grad), pointer<void>(workspace),
                                      reinterpret_cast<cudaStream_t>(stream));
        },
        py::arg("conv"), py::arg("dtype"), py::arg("index"), py::arg("grad"), py::arg("input"), py::arg("values_grad"),
        py::arg("workspace"), py::arg("stream"));
}

RandomWords random_words(int64_t seed, uint32_t number, Address step) {
    return {static_cast<uint64_t>(seed), number, pointer<const int64_t>(step)};
}

// Addresses of row_ptr, col, t_ptr, t_row and t_perm; rows and cols.
using TransposeTuple = std::tuple<std::array<Address, 5>, std::array<int64_t, 2>>;

std::vector<TransposeTask> transpose_tasks(const std::vector<TransposeTuple>& tuples) {
    std::vector<TransposeTask> tasks;
    for (const auto& [address, size] : tuples) {
        tasks.push_back({pointer<const int32_t>(address[0]), pointer<const int32_t>(address[1]),
                         pointer<int32_t>(address[2]), pointer<int32_t>(address[3]), pointer<int32_t>(address[4]),
                         size[0], size[1]});
    }
    return tasks;
}

// Addresses of drop_score, grow_score, row_ptr, col, new_row_ptr, new_col, t_ptr, t_row, t_perm and source; rows, cols,
// entries, drop and grow.
using DropAndGrowTuple = std::tuple<std::array<Address, 10>, std::array<int64_t, 5>>;

std::vector<DropAndGrow> drop_and_grow_layers(const std::vector<DropAndGrowTuple>& tuples) {
    std::vector<DropAndGrow> layers;
    for (const auto& [address, size] : tuples) {
        layers.push_back({pointer<const float>(address[0]), pointer<const float>(address[1]),
                          pointer<const int32_t>(address[2]), pointer<const int32_t>(address[3]),
                          pointer<int32_t>(address[4]), pointer<int32_t>(address[5]), pointer<int32_t>(address[6]),
                          pointer<int32_t>(address[7]), pointer<int32_t>(address[8]), pointer<int32_t>(address[9]),
                          size[0], size[1], size[2], size[3], size[4]});
    }
    return layers;
}

// Addresses of average and value, number of elements, stream of the random mask.
using AverageTuple = std::tuple<Address, Address, int64_t, uint32_t>;

template <class T>
void average_tensors(const std::vector<AverageTuple>& tuples, uint64_t threshold, int64_t seed, Address count,
                     Address step, Address stream) {
    std::vector<AverageTask<T>> tasks;
    for (const auto& [average, value, size, number] : tuples) {
        tasks.push_back({pointer<T>(average), pointer<const T>(value), size, number});
    }
    average(tasks.data(), tasks.size(), threshold, static_cast<uint64_t>(seed), pointer<const int64_t>(count),
            pointer<const int64_t>(step), reinterpret_cast<cudaStream_t>(stream));
}

void bind_small_operators(py::module_& m) {
    m.def(
        "transpose_index_workspace",
        [](const std::vector<TransposeTuple>& matrices) {
            const auto tasks = transpose_tasks(matrices);
            return transpose_index_workspace(tasks.data(), tasks.size());
        },
        py::arg("matrices"));
    m.def(
        "transpose_index",
        [](const std::vector<TransposeTuple>& matrices, Address workspace, Address stream) {
            const auto tasks = transpose_tasks(matrices);
            transpose_index(tasks.data(), tasks.size(), pointer<void>(workspace),
                            reinterpret_cast<cudaStream_t>(stream));
        },
        py::arg("matrices"), py::arg("workspace"), py::arg("stream"));
    m.def(
        "drop_and_grow_workspace",
        [](const std::vector<DropAndGrowTuple>& tuples) {
            const auto layers = drop_and_grow_layers(tuples);
            return drop_and_grow_workspace(layers.data(), layers.size());
        },
        py::arg("layers"));
    m.def(
        "drop_and_grow",
        [](const std::vector<DropAndGrowTuple>& tuples, Address workspace, Address stream) {
            const auto layers = drop_and_grow_layers(tuples);
            drop_and_grow(layers.data(), layers.size(), pointer<void>(workspace),
                          reinterpret_cast<cudaStream_t>(stream));
        },
        py::arg("layers"), py::arg("workspace"), py::arg("stream"));
    m.def("average_float32", &average_tensors<float>, py::arg("tensors"), py::arg("threshold"), py::arg("seed"),
          py::arg("count"), py::arg("step"), py::arg("stream"));
    m.def("average_float64", &average_tensors<double>, py::arg("tensors"), py::arg("threshold"), py::arg("seed"),
          py::arg("count"), py::arg("step"), py::arg("stream"));
    m.def(
        "bernoulli_mask",
        [](int64_t seed, uint32_t number, Address step, uint64_t threshold, int64_t size, Address mask,
           Address stream) {
            bernoulli_mask(random_words(seed, number, step), threshold, size, pointer<uint8_t>(mask),
                           reinterpret_cast<cudaStream_t>(stream));
        },
        py::arg("seed"), py::arg("number"), py::arg("step"), py::arg("threshold"), py::arg("size"), py::arg("mask"),
        py::arg("stream"));
    m.def(
        "random_scores",
        [](int64_t seed, uint32_t number, Address step, int64_t size, Address scores, Address stream) {
            random_scores(random_words(seed, number, step), size, pointer<float>(scores),
                          reinterpret_cast<cudaStream_t>(stream));
        },
        py::arg("seed"), py::arg("number"), py::arg("step"), py::arg("size"), py::arg("scores"), py::arg("stream"));
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
    py::register_local_exception<std::length_error>(m, "TooLarge", PyExc_ValueError);
    bind_sparse_linear(m);
    bind_sparse_conv2d(m);
    bind_small_operators(m);
}
