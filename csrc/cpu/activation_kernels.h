// Activations of a vector, and their derivatives.
#pragma once
#include "batch_norm_relu.h"
#include "simd.h"

namespace sparse_moon {
namespace SPARSE_MOON_ISA {

// e^x to 2 ulp from -87 on, infinite from 88.4 on; smaller x count as -87.3, not a number stays so. With n the nearest
// integer to x / ln 2 it is 2^n e^(x - n ln 2); ln 2 in two parts and the polynomial are those of Cephes' expf.
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
SPARSE_MOON_INLINE Vec exponential(Vec x) {
    const Vec low = broadcast(-87.3f), high = broadcast(89.0f), magic = broadcast(12582912.0f);  // 1.5 2^23
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Vec shifted = x * 1.44269504f + magic;  // n in its last bits
    const Vec n = shifted - magic;
    const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.0f;
    const Bits power = (reinterpret_cast<Bits>(shifted) << 23) + 0x3F800000u;
    return p * reinterpret_cast<Vec>(power);
}

SPARSE_MOON_INLINE Vec sigmoid(Vec v) { return broadcast(1.0f) / (exponential(-v) + 1.0f); }

// As torch's: what is not a number passes.
template <Activation kActivation>
SPARSE_MOON_INLINE Vec activate(Vec v) {
    const Vec zero{}, six = broadcast(6.0f);
    if constexpr (kActivation == Activation::kReLU) return v <= zero ? zero : v;
    if constexpr (kActivation == Activation::kReLU6) return v <= zero ? zero : v >= six ? six : v;
    if constexpr (kActivation == Activation::kSiLU) return v * sigmoid(v);
    if constexpr (kActivation == Activation::kHardswish) return v * activate<Activation::kReLU6>(v + 3.0f) * (1.0f / 6);
    return v;
}

// grad times the derivative at v. For ReLU and ReLU6 their result does in place of v.
template <Activation kActivation>
SPARSE_MOON_INLINE Vec activate_grad(Vec grad, Vec v) {
    const Vec zero{}, three = broadcast(3.0f);
    if constexpr (kActivation == Activation::kReLU) return v <= zero ? zero : grad;
    if constexpr (kActivation == Activation::kReLU6) return v <= zero ? zero : v >= broadcast(6.0f) ? zero : grad;
    if constexpr (kActivation == Activation::kSiLU) {
        const Vec s = sigmoid(v);
        return grad * s * (v * (1.0f - s) + 1.0f);
    }
    if constexpr (kActivation == Activation::kHardswish) {
        return v <= -three ? zero : v < three ? grad * (v * (1.0f / 3) + 0.5f) : grad;
    }
    return grad;
}

constexpr float kGeluSlope = 1.5957691216057308f;  // 2 u = kGeluSlope x + kGeluCubic x^3
constexpr float kGeluCubic = 1.5957691216057308f * 0.044715f;

// e^(-2 u) of GELU by tanh u.
SPARSE_MOON_INLINE Vec gelu_power(Vec x) {
    const Vec exponent = x * (x * x * -kGeluCubic - kGeluSlope);
    return exponent < broadcast(-80.0f) ? Vec{} : exponential(exponent);
}

// GELU as x (1 + tanh u) / 2, and its derivative.
SPARSE_MOON_INLINE Vec gelu_tanh(Vec x) { return x / (gelu_power(x) + 1.0f); }

SPARSE_MOON_INLINE Vec gelu_tanh_derivative(Vec x) {
    const Vec power = gelu_power(x), share = broadcast(1.0f) / (power + 1.0f);
    const Vec rest = x * (share * share * power) * (x * x * (3.0f * kGeluCubic) + kGeluSlope);
    return power < broadcast(1e30f) ? share + rest : share;
}

}  // namespace SPARSE_MOON_ISA
}  // namespace sparse_moon
