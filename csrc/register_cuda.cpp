// What Python sees of the CUDA kernels: the module sparse_moon._C_cuda. The stream comes as an address too
// (torch.cuda.current_stream().cuda_stream). The Python side allocates outputs and workspaces, and makes the tensors'
// device current.
#include "register.h"

#include "cuda/average.h"
#include "cuda/bernoulli_mask.h"
#include "cuda/common.h"
#include "cuda/drop_and_grow.h"
#include "cuda/sparse_conv2d.h"
#include "cuda/sparse_linear.h"
#include "cuda/transpose_index.h"

namespace sparse_moon {

using namespace cuda;

// "torch.float32" and so on: str(tensor.dtype).
template <>
struct FromPython<DType> {
    using Type = std::string;
    static DType convert(const std::string& name) {
        if (name == "torch.float32") return DType::float32;
        if (name == "torch.float16") return DType::float16;
        if (name == "torch.bfloat16") return DType::bfloat16;
        throw std::invalid_argument("expected float32, float16 or bfloat16, got " + name);
    }
};

// rows, cols, entries, then the addresses of ptr, col and perm (0: values are in the order of the entries).
template <>
struct FromPython<SparseRows> {
    using Type = std::tuple<int64_t, int64_t, int64_t, Address, Address, Address>;
    static SparseRows convert(const Type& w) {
        const auto& [rows, cols, n, ptr, col, perm] = w;
        return {rows, cols, n, pointer<const int32_t>(ptr), pointer<const int32_t>(col), pointer<const int32_t>(perm)};
    }
};

// Number of entries, then the addresses of row_ptr, col, t_ptr, t_row and t_perm.
template <>
struct FromPython<Conv2dIndex> {
    using Type = std::tuple<int32_t, std::array<Address, 5>>;
    static Conv2dIndex convert(const Type& index) {
        const auto& [n, address] = index;
        return {n,
                pointer<const int32_t>(address[0]),
                pointer<const int32_t>(address[1]),
                pointer<const int32_t>(address[2]),
                pointer<const int32_t>(address[3]),
                pointer<const int32_t>(address[4])};
    }
};

template <>
struct FromPython<Conv2dPass> {
    using Type = std::string;
    static Conv2dPass convert(const std::string& name) {
        if (name == "forward") return Conv2dPass::forward;
        if (name == "input_grad") return Conv2dPass::input_grad;
        if (name == "values_grad") return Conv2dPass::values_grad;
        throw std::invalid_argument("expected forward, input_grad or values_grad, got " + name);
    }
};

namespace {

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
void average_tensors(const std::vector<AverageTuple>& tuples, uint64_t threshold, int64_t seed, const int64_t* count,
                     const int64_t* step, cudaStream_t stream) {
    std::vector<AverageTask<T>> tasks;
    for (const auto& [average, value, size, number] : tuples) {
        tasks.push_back({pointer<T>(average), pointer<const T>(value), size, number});
    }
    average(tasks.data(), tasks.size(), threshold, static_cast<uint64_t>(seed), count, step, stream);
}

int64_t transpose_workspace(const std::vector<TransposeTuple>& matrices) {
    const auto tasks = transpose_tasks(matrices);
    return transpose_index_workspace(tasks.data(), tasks.size());
}

void transpose(const std::vector<TransposeTuple>& matrices, void* workspace, cudaStream_t stream) {
    const auto tasks = transpose_tasks(matrices);
    transpose_index(tasks.data(), tasks.size(), workspace, stream);
}

int64_t layers_workspace(const std::vector<DropAndGrowTuple>& tuples) {
    const auto layers = drop_and_grow_layers(tuples);
    return drop_and_grow_workspace(layers.data(), layers.size());
}

void drop_and_grow_all(const std::vector<DropAndGrowTuple>& tuples, void* workspace, cudaStream_t stream) {
    const auto layers = drop_and_grow_layers(tuples);
    drop_and_grow(layers.data(), layers.size(), workspace, stream);
}

void mask(int64_t seed, uint32_t number, const int64_t* step, uint64_t threshold, int64_t size, uint8_t* mask,
          cudaStream_t stream) {
    bernoulli_mask({static_cast<uint64_t>(seed), number, step}, threshold, size, mask, stream);
}

void scores(int64_t seed, uint32_t number, const int64_t* step, int64_t size, float* scores, cudaStream_t stream) {
    random_scores({static_cast<uint64_t>(seed), number, step}, size, scores, stream);
}

}  // namespace
}  // namespace sparse_moon

PYBIND11_MODULE(_C_cuda, m) {
    using namespace sparse_moon;
    py::register_local_exception<std::length_error>(m, "TooLarge", PyExc_ValueError);
    const auto def = [&m](const char* name, auto function, auto... names) {
        define(m, py::call_guard<>(), name, function, names...);
    };

    def("sparse_linear_workspace", &sparse_product_workspace, "dtype", "tokens", "rows", "cols", "n");
    def("sparse_linear", &sparse_product, "dtype", "tokens", "weight", "values", "bias", "input", "output", "workspace",
        "stream");
    def("sparse_linear_values_grad_workspace", &sparse_values_grad_workspace, "dtype", "tokens", "rows", "cols", "n");
    def("sparse_linear_values_grad", &sparse_values_grad, "dtype", "tokens", "weight", "grad", "input", "values_grad",
        "workspace", "stream");

    def("sparse_conv2d_workspace", &sparse_conv2d_workspace, "pass_", "conv", "dtype", "n");
    def("sparse_conv2d", &sparse_conv2d, "conv", "dtype", "index", "values", "input", "bias", "output", "workspace",
        "stream");
    def("sparse_conv2d_input_grad", &sparse_conv2d_input_grad, "conv", "dtype", "index", "values", "grad", "input_grad",
        "workspace", "stream");
    def("sparse_conv2d_values_grad", &sparse_conv2d_values_grad, "conv", "dtype", "index", "grad", "input",
        "values_grad", "workspace", "stream");

    def("transpose_index_workspace", &transpose_workspace, "matrices");
    def("transpose_index", &transpose, "matrices", "workspace", "stream");
    def("drop_and_grow_workspace", &layers_workspace, "layers");
    def("drop_and_grow", &drop_and_grow_all, "layers", "workspace", "stream");
    def("average_float32", &average_tensors<float>, "tensors", "threshold", "seed", "count", "step", "stream");
    def("average_float64", &average_tensors<double>, "tensors", "threshold", "seed", "count", "step", "stream");
    def("bernoulli_mask", &mask, "seed", "number", "step", "threshold", "size", "mask", "stream");
    def("random_scores", &scores, "seed", "number", "step", "size", "scores", "stream");
}
