// Python bindings of the CPU kernels. Tensors come as addresses (tensor.data_ptr()), so that one build serves every
// torch version; shapes, dtypes and devices are checked by the Python side, which is the only caller.
#include <pybind11/pybind11.h>

#include "cpu/transpose_index.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
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
