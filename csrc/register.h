// How a C++ function becomes one of Python's. Tensors come as addresses (tensor.data_ptr()), so that one build serves
// every torch version; shapes, dtypes and devices are checked by the Python side, which is the only caller.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "conv2d.h"

namespace sparse_moon {

namespace py = pybind11;
using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// What Python passes for a parameter, and what is made of it.
template <class T>
struct FromPython {
    using Type = T;
    static const T& convert(const T& x) { return x; }
};

template <class T>
struct FromPython<T*> {
    using Type = Address;
    static T* convert(Address address) { return pointer<T>(address); }
};

// Batch, (channels, height, width) of input and output, kernel, stride, padding, dilation, groups.
template <class Int>
struct FromPython<Conv2dOf<Int>> {
    using Plane = std::array<Int, 3>;
    using Pair = std::array<Int, 2>;
    using Type = std::tuple<Int, Plane, Plane, Pair, Pair, Pair, Pair, Int>;
    static Conv2dOf<Int> convert(const Type& c) {
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
};

// Defines m.name(names...) as the function; the guard says whether Python's lock is given up meanwhile.
template <class Guard, class R, class... Parameters, class... Names>
void define(py::module_& m, Guard guard, const char* name, R (*function)(Parameters...), Names... names) {
    static_assert(sizeof...(Parameters) == sizeof...(Names), "a name for each parameter");
    m.def(
        name,
        [function](const typename FromPython<std::decay_t<Parameters>>::Type&... arguments) {
            return function(FromPython<std::decay_t<Parameters>>::convert(arguments)...);
        },
        py::arg(names)..., guard);
}

}  // namespace sparse_moon
