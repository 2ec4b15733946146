// What passes of batch norm over either layout have in common: vectors of numbers, their sums, and what follows from
// them.
#pragma once
#include <type_traits>

#include "activation_kernels.h"
#include "batch_norm_relu.h"
#include "simd.h"

namespace sparse_moon {
namespace SPARSE_MOON_ISA {
namespace batch_norm {

// A whole vector, or the first lanes of one.
struct Whole {};
struct First {
    int lanes;
};
template <class T>
SPARSE_MOON_INLINE Vec get(const T* p, Whole) {
    return load_unaligned(p);
}
template <class T>
SPARSE_MOON_INLINE Vec get(const T* p, First part) {
    return load_range(p, 0, part.lanes);
}
template <class T>
SPARSE_MOON_INLINE void put(T* p, Vec v, Whole) {
    store_unaligned(p, v);
}
template <class T>
SPARSE_MOON_INLINE void put(T* p, Vec v, First part) {
    store_first(p, v, part.lanes);
}

// Past the caches where that is set.
template <class T, class Part>
SPARSE_MOON_INLINE void put_result(T* p, Vec v, Part part, bool past) {
    if (std::is_same_v<Part, Whole> && past) return store_streaming(p, v);
    put(p, v, part);
}

typedef int32_t Lanes __attribute__((vector_size(4 * kLanes)));
template <int... I>
SPARSE_MOON_INLINE Lanes lane_numbers(std::integer_sequence<int, I...>) {
    return Lanes{I...};
}

SPARSE_MOON_INLINE Vec keep(Vec v, Whole) { return v; }
SPARSE_MOON_INLINE Vec keep(Vec v, First part) {
    return lane_numbers(std::make_integer_sequence<int, kLanes>{}) < part.lanes ? v : Vec{};
}

template <class Body>
SPARSE_MOON_INLINE void for_vectors(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) body(i, Whole{});
    if (i < n) body(i, First{static_cast<int>(n - i)});
}

// The same with body(i, part, number of neighbouring vectors as a constant): four at once as long as there are so many.
template <class Body>
SPARSE_MOON_INLINE void for_runs(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) body(i, Whole{}, std::integral_constant<int, 4>{});
    for_vectors(n - i, [&](int64_t j, auto part) { body(i + j, part, std::integral_constant<int, 1>{}); });
}

// A float64 sum for every lane: terms cancel, in the gradients above all, and memory is slower than the conversion.
typedef double HalfOfDoubles __attribute__((vector_size(4 * kLanes), may_alias));
typedef float HalfOfFloats __attribute__((vector_size(2 * kLanes), may_alias));
struct Sums {
    HalfOfDoubles low{}, high{};

    SPARSE_MOON_INLINE void add(Vec v) {
        low += half<0>(v);
        high += half<1>(v);
    }
    SPARSE_MOON_INLINE void add_product(Vec v, Vec w) {
        low += half<0>(v) * half<0>(w);
        high += half<1>(v) * half<1>(w);
    }
    SPARSE_MOON_INLINE double total() const {
        double sum = 0;
        for (int i = 0; i < kLanes / 2; ++i) sum += low[i] + high[i];
        return sum;
    }
    static SPARSE_MOON_INLINE Sums at(const double* p) {
        Sums sums;
        __builtin_memcpy(&sums.low, p, sizeof(HalfOfDoubles));
        __builtin_memcpy(&sums.high, p + kLanes / 2, sizeof(HalfOfDoubles));
        return sums;
    }
    SPARSE_MOON_INLINE void store(double* p) const {
        __builtin_memcpy(p, &low, sizeof(HalfOfDoubles));
        __builtin_memcpy(p + kLanes / 2, &high, sizeof(HalfOfDoubles));
    }
    template <int kHalf>
    static SPARSE_MOON_INLINE HalfOfDoubles half(Vec v) {
        HalfOfFloats floats;
        __builtin_memcpy(&floats, reinterpret_cast<const char*>(&v) + kHalf * sizeof(floats), sizeof(floats));
        return __builtin_convertvector(floats, HalfOfDoubles);
    }
};

SPARSE_MOON_INLINE Vec normalise(Vec x, Vec mean, Vec scale, Vec bias) { return (x - mean) * scale + bias; }

SPARSE_MOON_INLINE double rstd(const BatchNormReLU& job, int64_t c) {
    return 1.0 / __builtin_sqrt(static_cast<double>(job.var[c]) + job.eps);
}
SPARSE_MOON_INLINE float scale(const BatchNormReLU& job, int64_t c) {
    return static_cast<float>((job.weight ? job.weight[c] : 1.0) * rstd(job, c));
}
SPARSE_MOON_INLINE float bias(const BatchNormReLU& job, int64_t c) { return job.bias ? job.bias[c] : 0.0f; }

// From the sums over a channel of d and d^2, d the distance from `shift`. With any number of the channel as the shift,
// what is lost to rounding is small against the variance, wherever the mean lies.
SPARSE_MOON_INLINE void store_statistics(const BatchNormReLU& job, int64_t c, float shift, double sum, double squares) {
    const double count = static_cast<double>(job.images * job.plane), distance = sum / count;
    const double var = squares / count - distance * distance;
    job.mean[c] = static_cast<float>(shift + distance);
    job.var[c] = static_cast<float>(var < 0 ? 0.0 : var);
}

// What multiplies the terms of the input's gradient: scale g + offset + slope (x - mean).
struct GradTerms {
    float scale, offset, slope;
};

// Closes the sums of g and of g (x - mean) over a channel.
SPARSE_MOON_INLINE GradTerms close_sums(const BatchNormReLUBackward& job, int64_t c, double sum, double product) {
    const double r = rstd(job, c), s = (job.weight ? job.weight[c] : 1.0) * r;
    job.bias_grad[c] = static_cast<float>(sum);
    job.weight_grad[c] = static_cast<float>(product * r);
    if (!job.batch_statistics) return {static_cast<float>(s), 0, 0};
    const double count = static_cast<double>(job.images * job.plane);
    return {static_cast<float>(s), static_cast<float>(-s * (sum / count)),
            static_cast<float>(-s * (product / count) * r * r)};
}

// What the activation's derivative is computed from.
enum class From { kNothing, kInput, kOutput };

// Adds the distances from `shift` of some vectors, and their squares. Unlike in the gradients nothing cancels here, so
// that the first sums may be float32.
template <int kCount, class T, class Part>
SPARSE_MOON_INLINE void add_distances(const T* x, int64_t stride, Part part, Vec shift, Sums& sum, Sums& square) {
    Vec d{}, q{};
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
        const Vec distance = keep(get(x + i * stride, part) - shift, part);
        d += distance;
        q += distance * distance;
    }
    sum.add(d);
    square.add(q);
}

// The activations of a backward pass.
template <class T>
struct Gradients {
    const T *input, *grad, *output;
    T *input_grad, *residual_grad;

    explicit Gradients(const BatchNormReLUBackward& job)
        : input(static_cast<const T*>(job.input)), grad(static_cast<const T*>(job.grad)),
          output(static_cast<const T*>(job.output)), input_grad(static_cast<T*>(job.input_grad)),
          residual_grad(static_cast<T*>(job.residual_grad)) {}
};

// The sums of some vectors' g and of g (x - mean), added to those of a channel. Their terms cancel, so that float32 is
// enough for a few numbers of bfloat16 alone.
template <class T>
struct GradSums {
    Sums sum, product;
    Vec few{}, few_products{};

    SPARSE_MOON_INLINE void add(Vec g, Vec distance) {
        if constexpr (std::is_same_v<T, float>) {
            sum.add(g);
            product.add_product(g, distance);
        } else {
            few += g;
            few_products += g * distance;
        }
    }
    SPARSE_MOON_INLINE void close() {
        if constexpr (!std::is_same_v<T, float>) {
            sum.add(few);
            product.add(few_products);
        }
    }
};

}  // namespace batch_norm
}  // namespace SPARSE_MOON_ISA
}  // namespace sparse_moon
