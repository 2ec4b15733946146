#include "bernoulli_mask.h"

#include <algorithm>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace sparse_moon {
namespace {

void fill_generic(const PhiloxStream& stream, int64_t first_block, int64_t blocks, uint32_t* words) {
    for (int64_t i = 0; i < blocks; ++i) {
        const PhiloxBlock block = philox(stream, static_cast<uint32_t>(first_block + i));
        std::copy(block.word, block.word + 4, words + 4 * i);
    }
}

#ifdef __x86_64__

// GCC 12 takes the undefined operands inside its own AVX-512 intrinsics for ours (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

struct Keys {
    uint64_t k0[kPhiloxRounds], k1[kPhiloxRounds];

    explicit Keys(uint64_t seed) {
        uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
        for (int round = 0; round < kPhiloxRounds; ++round) {
            k0[round] = low;
            k1[round] = high;
            low += kPhiloxStep0;
            high += kPhiloxStep1;
        }
    }
};

// A block a 64-bit lane, its four words in four registers. vpmuludq multiplies the low halves, so what the rounds leave
// in the high halves does no harm. Lanes are numbered so that unpacking puts the blocks in order. (The compiler's own
// vectorisation of the loop above widens and narrows in every round and takes three times as long.)

__attribute__((target("avx512f"))) void fill_avx512(const PhiloxStream& stream, int64_t first_block, int64_t blocks,
                                                    uint32_t* words) {
    using Lanes = uint64_t __attribute__((vector_size(64)));
    const Keys keys(stream.seed);
    const Lanes lane = {0, 4, 1, 5, 2, 6, 3, 7};
    int64_t i = 0;
    for (; i + 8 <= blocks; i += 8) {
        Lanes c0 = lane + static_cast<uint64_t>(first_block + i), c1 = Lanes{} + stream.stream;
        Lanes c2 = Lanes{} + stream.step, c3 = Lanes{} + (stream.step >> 32);
        for (int round = 0; round < kPhiloxRounds; ++round) {
            const Lanes a = (Lanes)_mm512_mul_epu32((__m512i)c0, _mm512_set1_epi64(kPhiloxA));
            const Lanes b = (Lanes)_mm512_mul_epu32((__m512i)c2, _mm512_set1_epi64(kPhiloxB));
            c0 = b >> 32 ^ c1 ^ keys.k0[round];
            c1 = b;
            c2 = a >> 32 ^ c3 ^ keys.k1[round];
            c3 = a;
        }
        const Lanes c01 = (c0 & 0xFFFFFFFF) | c1 << 32, c23 = (c2 & 0xFFFFFFFF) | c3 << 32;
        const auto first = _mm512_unpacklo_epi64((__m512i)c01, (__m512i)c23);
        const auto second = _mm512_unpackhi_epi64((__m512i)c01, (__m512i)c23);
        _mm512_storeu_si512(reinterpret_cast<__m512i*>(words + 4 * i), first);
        _mm512_storeu_si512(reinterpret_cast<__m512i*>(words + 4 * i + 16), second);
    }
    fill_generic(stream, first_block + i, blocks - i, words + 4 * i);
}

__attribute__((target("avx2"))) void fill_avx2(const PhiloxStream& stream, int64_t first_block, int64_t blocks,
                                               uint32_t* words) {
    using Lanes = uint64_t __attribute__((vector_size(32)));
    const Keys keys(stream.seed);
    const Lanes lane = {0, 2, 1, 3};
    int64_t i = 0;
    for (; i + 4 <= blocks; i += 4) {
        Lanes c0 = lane + static_cast<uint64_t>(first_block + i), c1 = Lanes{} + stream.stream;
        Lanes c2 = Lanes{} + stream.step, c3 = Lanes{} + (stream.step >> 32);
        for (int round = 0; round < kPhiloxRounds; ++round) {
            const Lanes a = (Lanes)_mm256_mul_epu32((__m256i)c0, _mm256_set1_epi64x(kPhiloxA));
            const Lanes b = (Lanes)_mm256_mul_epu32((__m256i)c2, _mm256_set1_epi64x(kPhiloxB));
            c0 = b >> 32 ^ c1 ^ keys.k0[round];
            c1 = b;
            c2 = a >> 32 ^ c3 ^ keys.k1[round];
            c3 = a;
        }
        const Lanes c01 = (c0 & 0xFFFFFFFF) | c1 << 32, c23 = (c2 & 0xFFFFFFFF) | c3 << 32;
        const auto first = _mm256_unpacklo_epi64((__m256i)c01, (__m256i)c23);
        const auto second = _mm256_unpackhi_epi64((__m256i)c01, (__m256i)c23);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + 4 * i), first);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + 4 * i + 8), second);
    }
    fill_generic(stream, first_block + i, blocks - i, words + 4 * i);
}

#pragma GCC diagnostic pop
#endif

// Calls consume(first element, number of elements, their words) chunk by chunk.
template <class Consume>
void for_each_chunk(const PhiloxStream& stream, int64_t size, Consume consume) {
    uint32_t words[kWordsAtOnce];
    for (int64_t first = 0; first < size; first += kWordsAtOnce) {
        const int64_t length = std::min(kWordsAtOnce, size - first);
        philox_words(stream, first / 4, (length + 3) / 4, words);
        consume(first, length, words);
    }
}

}  // namespace

void philox_words(const PhiloxStream& stream, int64_t first_block, int64_t blocks, uint32_t* words) {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f")) return fill_avx512(stream, first_block, blocks, words);
    if (__builtin_cpu_supports("avx2")) return fill_avx2(stream, first_block, blocks, words);
#endif
    fill_generic(stream, first_block, blocks, words);
}

void bernoulli_mask(const PhiloxStream& stream, uint64_t threshold, int64_t size, uint8_t* mask) {
    if (threshold >> 32) {  // keep = 1; below it the comparison fits 32 bits
        std::fill(mask, mask + size, uint8_t{1});
        return;
    }
    const uint32_t limit = static_cast<uint32_t>(threshold);
    for_each_chunk(stream, size, [=](int64_t first, int64_t length, const uint32_t* words) {
        for (int64_t i = 0; i < length; ++i) mask[first + i] = words[i] < limit;
    });
}

void random_scores(const PhiloxStream& stream, int64_t size, float* scores) {
    for_each_chunk(stream, size, [=](int64_t first, int64_t length, const uint32_t* words) {
        for (int64_t i = 0; i < length; ++i) scores[first + i] = static_cast<float>(words[i]);
    });
}

}  // namespace sparse_moon
