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

// From (channels, height, width) of input and output, and pairs (vertical, horizontal).
template <class Int>
Conv2dOf<Int> conv2d(Int batch, const std::array<Int, 3>& in, const std::array<Int, 3>& out,
                     const std::array<Int, 2>& kernel, const std::array<Int, 2>& stride,
                     const std::array<Int, 2>& padding, const std::array<Int, 2>& dilation, Int groups) {
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

// The arguments of conv2d() as a tuple.
template <class Int>
struct FromPython<Conv2dOf<Int>> {
    using Plane = std::array<Int, 3>;
    using Pair = std::array<Int, 2>;
    using Type = std::tuple<Int, Plane, Plane, Pair, Pair, Pair, Pair, Int>;
    static Conv2dOf<Int> convert(const Type& c) { return std::apply(conv2d<Int>, c); }
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
