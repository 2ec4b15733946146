// Activations may be stored in bfloat16: they become float32 where they are read, and are rounded where they are
// written, so that memory moves half of the bytes; everything between is as with float32.
#pragma once
#include <cstdint>
#include <cstring>

namespace sparse_moon {

// The upper half of a float32.
struct BFloat16 {
    uint16_t bits;
};

static inline float as_float(float x) { return x; }
static inline float as_float(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

// To the nearest number, of two to the even one.
static inline void store_float(float* p, float x) { *p = x; }
static inline void store_float(BFloat16* p, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    p->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Bytes of a number as it is stored.
static inline int64_t number_bytes(bool bfloat16) { return bfloat16 ? sizeof(BFloat16) : sizeof(float); }

// Calls run(a number of the type that activations have).
template <class Run>
static inline void with_number_type(bool bfloat16, Run run) {
    bfloat16 ? run(BFloat16{}) : run(float{});
}

}  // namespace sparse_moon
