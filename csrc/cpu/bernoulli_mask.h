#pragma once
#include <cstdint>

#include "philox.h"

namespace sparse_moon {

// Random words are produced this many at a time, in a buffer that stays in L1 (8 KB).
constexpr int64_t kWordsAtOnce = 2048;
static_assert(kWordsAtOnce % 4 == 0, "a chunk of words is whole Philox blocks");

// Words 4 first_block, ..., 4 (first_block + blocks) - 1 of a stream.
//   words  [4 blocks]  out
void philox_words(const PhiloxStream& stream, int64_t first_block, int64_t blocks, uint32_t* words);

// mask_i = 1 where word_i < threshold, else 0. Writes `size` bytes and reads nothing.
//   threshold  round(keep * 2^32), in [0, 2^32]
//   mask       [size]  out
void bernoulli_mask(const PhiloxStream& stream, uint64_t threshold, int64_t size, uint8_t* mask);

// scores_i = word_i rounded to fp32, in [0, 2^32]. Writes 4 `size` bytes and reads nothing.
//   scores  [size]  out
void random_scores(const PhiloxStream& stream, int64_t size, float* scores);

}  // namespace sparse_moon
