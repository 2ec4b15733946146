#include "cuda/sparse_linear.h"

#include <climits>
#include <stdexcept>
#include <type_traits>

#include "cuda/sparse_linear_product.h"
#include "cuda/sparse_linear_values_grad.h"

namespace sparse_moon::cuda {
namespace {

template <class T>
void to_lines(const char* op, const void* input, int64_t tokens, int64_t columns, uint4* lines, cudaStream_t stream) {
    const int64_t column_blocks = ceil_div(columns, kLinesColumns);
    const int64_t blocks = ceil_div(tokens, kTokens<T>) * column_blocks;
    const size_t shared = kTokens<T> * (kLinesColumns + 2) * sizeof(T);
    launch(op, write_lines<T>, dim3(static_cast<unsigned>(blocks)), kLinesThreads, shared, stream,
           static_cast<const T*>(input), tokens, columns, static_cast<int>(column_blocks), lines);
}

template <class T>
T* part_of(void* workspace, int64_t offset) {
    return reinterpret_cast<T*>(static_cast<unsigned char*>(workspace) + offset);
}

// Shapes that 32-bit places or the grid cannot hold.
void check_limits(const char* op, int64_t rows, int64_t cols, int64_t n, int64_t blocks) {
    constexpr int64_t kLimit = INT_MAX;
    if (rows > kLimit / 2 || cols > kLimit / 2 || n > kLimit / 2 || blocks > kLimit) {
        throw std::length_error(std::string(op) + ": a shape is too large for 32-bit indices");
    }
}

constexpr const char* kProduct = "sparse_linear";
constexpr const char* kValuesGrad = "sparse_linear_values_grad";

template <class T>
void product(const ProductPlan& plan, int64_t tokens, const SparseRows& w, const T* values, const T* bias,
             const void* input, T* output, void* workspace, cudaStream_t stream) {
    constexpr int kLargeSlices = 32 / kLaneTokens<T>;
    auto* lines = part_of<uint4>(workspace, 0);
    auto* group_ptr = part_of<int32_t>(workspace, plan.pointers);
    auto* pairs = part_of<uint2>(workspace, plan.pairs);
    const int rows = static_cast<int>(w.rows), cols = static_cast<int>(w.cols), slices = static_cast<int>(plan.slices);
    const int chunks = static_cast<int>(plan.chunks.count), chunk_columns = static_cast<int>(plan.chunks.columns);

    to_lines<T>(kProduct, input, tokens, w.cols, lines, stream);
    launch(kProduct, pack_pairs<T>, dim3(static_cast<unsigned>(ceil_div(slices, kPackThreads / 32))), kPackThreads, 0,
           stream, w.ptr, w.col, w.perm, values, rows, slices, chunks, chunk_columns, group_ptr, pairs);
    launch(kProduct, plan.large ? multiply<T, kLargeSlices> : multiply<T, kLargeSlices / 4>,
           dim3(static_cast<unsigned>(plan.tiles * plan.row_groups)), kLinearThreads, plan.shared_bytes, stream, lines,
           group_ptr, reinterpret_cast<const uint4*>(pairs), bias, tokens, rows, cols, slices,
           static_cast<int>(plan.row_groups), chunks, chunk_columns, output);
}

template <class T>
void gradient(const ValuesGradPlan& plan, int64_t tokens, const SparseRows& w, const void* grad, const void* input,
              T* out, void* workspace, cudaStream_t stream) {
    auto* grad_lines = part_of<uint4>(workspace, 0);
    auto* input_lines = part_of<uint4>(workspace, plan.input_lines);
    auto* partials = part_of<float>(workspace, plan.partials);
    to_lines<T>(kValuesGrad, grad, tokens, w.rows, grad_lines, stream);
    to_lines<T>(kValuesGrad, input, tokens, w.cols, input_lines, stream);
    const auto start = [&](auto* sums) {
        using Out = std::remove_pointer_t<decltype(sums)>;
        launch(kValuesGrad, values_grad<T, Out>,
               dim3(static_cast<unsigned>(plan.chunks.count), static_cast<unsigned>(plan.row_blocks),
                    static_cast<unsigned>(plan.splits)),
               kGradThreads, plan.shared_bytes, stream, grad_lines, input_lines, w.ptr, w.col,
               static_cast<int>(w.rows), static_cast<int>(w.cols), w.n, static_cast<int>(plan.rows_per_block),
               static_cast<int>(plan.chunks.columns), static_cast<int>(plan.tiles),
               static_cast<int>(plan.tiles_per_split), sums);
    };
    if (plan.splits == 1) return start(out);
    start(partials);
    launch(kValuesGrad, add_partials<T>, dim3(static_cast<unsigned>(ceil_div(w.n, kAddThreads))), kAddThreads, 0,
           stream, partials, static_cast<int>(plan.splits), w.n, out);
}

}  // namespace

int64_t sparse_product_workspace(DType dtype, int64_t tokens, int64_t rows, int64_t cols, int64_t n) {
    return product_plan(dtype, tokens, rows, cols, n, multiprocessors(kProduct), block_shared_bytes(kProduct))
        .workspace_bytes;
}

void sparse_product(DType dtype, int64_t tokens, const SparseRows& weight, const void* values, const void* bias,
                    const void* input, void* output, void* workspace, cudaStream_t stream) {
    if (tokens == 0 || weight.rows == 0) return;
    const ProductPlan plan =
        product_plan(dtype, tokens, weight.rows, weight.cols, weight.n, multiprocessors(kProduct),
                     block_shared_bytes(kProduct));
    const int64_t lines_blocks = plan.tiles * ceil_div(weight.cols, kLinesColumns);
    check_limits(kProduct, weight.rows, weight.cols, weight.n,
                 std::max(lines_blocks, plan.tiles * plan.row_groups));
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        product<T>(plan, tokens, weight, static_cast<const T*>(values), static_cast<const T*>(bias), input,
                   static_cast<T*>(output), workspace, stream);
    });
}

int64_t sparse_values_grad_workspace(DType dtype, int64_t tokens, int64_t rows, int64_t cols, int64_t n) {
    return values_grad_plan(dtype, tokens, rows, cols, n, multiprocessors(kValuesGrad),
                            block_shared_bytes(kValuesGrad))
        .workspace_bytes;
}

void sparse_values_grad(DType dtype, int64_t tokens, const SparseRows& weight, const void* grad, const void* input,
                        void* values_grad, void* workspace, cudaStream_t stream) {
    if (weight.n == 0) return;
    const ValuesGradPlan plan =
        values_grad_plan(dtype, tokens, weight.rows, weight.cols, weight.n, multiprocessors(kValuesGrad),
                         block_shared_bytes(kValuesGrad));
    const int64_t lines_blocks = plan.tiles * ceil_div(std::max(weight.rows, weight.cols), kLinesColumns);
    check_limits(kValuesGrad, weight.rows, weight.cols, weight.n,
                 std::max(lines_blocks, plan.chunks.count * plan.row_blocks * plan.splits));
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        auto* out = static_cast<T*>(values_grad);
        if (tokens == 0) {
            launch(kValuesGrad, set_zero<T>, dim3(static_cast<unsigned>(ceil_div(weight.n, kAddThreads))), kAddThreads,
                   0, stream, out, weight.n);
        } else {
            gradient<T>(plan, tokens, weight, grad, input, out, workspace, stream);
        }
    });
}

}  // namespace sparse_moon::cuda
