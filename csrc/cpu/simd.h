// One vector of floats in the widest registers that the compiler may use for this file. The file that includes this
// header names a namespace of its own in SPARSE_MOON_ISA, so that code compiled for different instruction sets never
// shares a symbol (a shared inline function would be taken by the linker from any one of them).
//   avx512   16 lanes, 32 registers
//   avx2      8 lanes, 16 registers (with FMA)
//   generic   4 lanes, 16 registers (SSE2, NEON, or whatever the compiler makes of it)
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#include "bfloat16.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef SPARSE_MOON_ISA
#error "define SPARSE_MOON_ISA before including a kernel header"
#endif

namespace sparse_moon {
namespace SPARSE_MOON_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes), may_alias));
typedef float UnalignedVec __attribute__((vector_size(4 * kLanes), may_alias, aligned(4)));
constexpr int64_t kVecBytes = sizeof(Vec);
static_assert(sizeof(Vec) == 4 * kLanes, "a vector holds exactly its lanes");

#define SPARSE_MOON_INLINE inline __attribute__((always_inline))

SPARSE_MOON_INLINE Vec broadcast(float x) { return x - Vec{}; }

SPARSE_MOON_INLINE Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
SPARSE_MOON_INLINE Vec load_unaligned(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
SPARSE_MOON_INLINE void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
SPARSE_MOON_INLINE void store_unaligned(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }

// Lanes [begin, end) from p[begin..end), zero in the others; nothing outside that range is touched.
SPARSE_MOON_INLINE Vec load_range(const float* p, int begin, int end) {
#if defined(__AVX512F__)
    const __mmask16 mask = static_cast<__mmask16>(((1u << end) - 1u) & ~((1u << begin) - 1u));
    return reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(mask, p));
#elif defined(__AVX2__)
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(begin), lane),
                                             _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane));
    return reinterpret_cast<Vec>(_mm256_maskload_ps(p, mask));
#else
    Vec v{};
    for (int i = begin; i < end; ++i) v[i] = p[i];
    return v;
#endif
}

// The first n lanes of v to p[0..n).
SPARSE_MOON_INLINE void store_first(float* p, Vec v, int n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), reinterpret_cast<__m512>(v));
#elif defined(__AVX2__)
    // halves, because AMD's masked stores take tens of cycles
    if (n >= kLanes) return store_unaligned(p, v);
    __m128 rest = _mm256_castps256_ps128(reinterpret_cast<__m256>(v));
    if (n & 4) {
        _mm_storeu_ps(p, rest);
        rest = _mm256_extractf128_ps(reinterpret_cast<__m256>(v), 1);
        p += 4;
    }
    if (n & 2) {
        _mm_storel_pi(reinterpret_cast<__m64*>(p), rest);
        rest = _mm_movehl_ps(rest, rest);
        p += 2;
    }
    if (n & 1) _mm_store_ss(p, rest);
#else
    for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// The same of bfloat16: each lane is the upper half of a float32. Stores round to the nearest number, to the even one
// where two are equally near; what is not a number becomes the one that torch writes.
typedef uint32_t UnsignedVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));

SPARSE_MOON_INLINE Vec widen(HalfVec halves) {
    return reinterpret_cast<Vec>(__builtin_convertvector(halves, UnsignedVec) << 16);
}
SPARSE_MOON_INLINE HalfVec round_to_halves(Vec v) {
    const UnsignedVec bits = reinterpret_cast<UnsignedVec>(v), even = (bits >> 16) & 1u;
    const UnsignedVec rounded = (bits + (even + 0x7FFFu)) >> 16, nan = UnsignedVec{} + 0x7FC0u;
    return __builtin_convertvector(v == v ? rounded : nan, HalfVec);
}

SPARSE_MOON_INLINE Vec load_unaligned(const BFloat16* p) {
    HalfVec halves;
    std::memcpy(&halves, p, sizeof(halves));
    return widen(halves);
}
SPARSE_MOON_INLINE Vec load_range(const BFloat16* p, int begin, int end) {
    HalfVec halves{};
#if defined(__AVX512F__)
    const __mmask16 mask = static_cast<__mmask16>(((1u << end) - 1u) & ~((1u << begin) - 1u));
    halves = reinterpret_cast<HalfVec>(_mm256_maskz_loadu_epi16(mask, p));
#else
    for (int i = begin; i < end; ++i) halves[i] = p[i].bits;
#endif
    return widen(halves);
}
SPARSE_MOON_INLINE void store_unaligned(BFloat16* p, Vec v) {
    const HalfVec halves = round_to_halves(v);
    std::memcpy(p, &halves, sizeof(halves));
}
SPARSE_MOON_INLINE void store_first(BFloat16* p, Vec v, int n) {
    const HalfVec halves = round_to_halves(v);
#if defined(__AVX512F__)
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1u), reinterpret_cast<__m256i>(halves));
#else
    for (int i = 0; i < n; ++i) p[i].bits = halves[i];
#endif
}

// Stores that bypass the caches: of whole lines, or of neighbours one after the other, else they cost more than they
// save. To an address that is a multiple of the vector's bytes. Other threads may read it after stream_fence() and a
// barrier.
SPARSE_MOON_INLINE void store_streaming(float* p, Vec v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#elif defined(__AVX2__)
    _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
#else
    store(p, v);
#endif
}
SPARSE_MOON_INLINE void store_streaming(BFloat16* p, Vec v) {
    const HalfVec halves = round_to_halves(v);
#if defined(__AVX512F__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(halves));
#elif defined(__AVX2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(halves));
#else
    std::memcpy(p, &halves, sizeof(halves));
#endif
}

// Whether a vector of T is a whole line.
template <class T>
constexpr bool kStreams = sizeof(T) == 4 && kVecBytes == 64;

SPARSE_MOON_INLINE void stream_fence() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

namespace detail {

// Stage D of a butterfly transposition: swaps the off-diagonal D x D blocks of rows a and b = row of a + D.
template <int D, int... I>
SPARSE_MOON_INLINE void exchange(Vec& a, Vec& b, std::integer_sequence<int, I...>) {
    const Vec low = __builtin_shufflevector(a, b, ((I & D) ? kLanes + I - D : I)...);
    const Vec high = __builtin_shufflevector(a, b, ((I & D) ? kLanes + I : I + D)...);
    a = low;
    b = high;
}

template <int D>
SPARSE_MOON_INLINE void transpose_stages(Vec (&rows)[kLanes]) {
    if constexpr (D < kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
            if (!(i & D)) exchange<D>(rows[i], rows[i + D], std::make_integer_sequence<int, kLanes>{});
        }
        transpose_stages<2 * D>(rows);
    }
}

template <int D>
SPARSE_MOON_INLINE void sum_stages(Vec (&rows)[kLanes]) {
    if constexpr (D < kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i += 2 * D) {
            exchange<D>(rows[i], rows[i + D], std::make_integer_sequence<int, kLanes>{});
            rows[i] += rows[i + D];
        }
        sum_stages<2 * D>(rows);
    }
}

}  // namespace detail

// rows[i][j] <-> rows[j][i].
SPARSE_MOON_INLINE void transpose(Vec (&rows)[kLanes]) { detail::transpose_stages<1>(rows); }

// Lane i of the result is the sum over the lanes of rows[i]; rows are used up.
SPARSE_MOON_INLINE Vec sum_lanes(Vec (&rows)[kLanes]) {
    detail::sum_stages<1>(rows);
    return rows[0];
}

SPARSE_MOON_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
SPARSE_MOON_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
SPARSE_MOON_INLINE int64_t whole_cache_lines(int64_t floats) { return (floats + 15) / 16 * 16; }

}  // namespace SPARSE_MOON_ISA
}  // namespace sparse_moon
