#pragma once
#include <cstdint>

#include "host_device.h"

// Plain functions for host and device; no standard containers.

namespace sparse_moon {

// Four random 32-bit words: elements 4 b to 4 b + 3 for block number b.
struct PhiloxBlock {
    uint32_t word[4];
};

// Which draw the words belong to. Element i of the tensor is word i % 4 of block i / 4.
struct PhiloxStream {
    uint64_t seed;    // key: (seed mod 2^32, seed >> 32)
    uint32_t stream;  // number of the tensor
    uint64_t step;    // number of the draw
};

// High and low half of the 64-bit product.
SPARSE_MOON_HOST_DEVICE constexpr uint32_t product_high(uint32_t a, uint32_t b) {
    return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxA = 0xD2511F53u, kPhiloxB = 0xCD9E8D57u;
constexpr uint32_t kPhiloxStep0 = 0x9E3779B9u, kPhiloxStep1 = 0xBB67AE85u;

// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): ten rounds of
//   (c0, c1, c2, c3) <- (high(B c2) ^ c1 ^ k0, low(B c2), high(A c0) ^ c3 ^ k1, low(A c0)),
//   (k0, k1) <- (k0 + Step0, k1 + Step1).
SPARSE_MOON_HOST_DEVICE constexpr PhiloxBlock philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0,
                                                     uint32_t k1) {
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint32_t high_a = product_high(kPhiloxA, c0), low_a = kPhiloxA * c0;
        const uint32_t high_b = product_high(kPhiloxB, c2), low_b = kPhiloxB * c2;
        c0 = high_b ^ c1 ^ k0;
        c1 = low_b;
        c2 = high_a ^ c3 ^ k1;
        c3 = low_a;
        k0 += kPhiloxStep0;
        k1 += kPhiloxStep1;
    }
    return {{c0, c1, c2, c3}};
}

// Block number `block` of a stream: counter (block, stream, step mod 2^32, step >> 32).
SPARSE_MOON_HOST_DEVICE constexpr PhiloxBlock philox(const PhiloxStream& s, uint32_t block) {
    return philox(block, s.stream, static_cast<uint32_t>(s.step), static_cast<uint32_t>(s.step >> 32),
                  static_cast<uint32_t>(s.seed), static_cast<uint32_t>(s.seed >> 32));
}

}  // namespace sparse_moon
