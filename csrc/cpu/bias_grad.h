#pragma once
#include <cstdint>

namespace sparse_moon {

// bias_grad [channels] = the sum of grad (images, channels, plane), or (images, plane, channels) where channels_last,
// over images and plane, in double precision. Tokens of a linear layer are images with a plane of 1. The result does not
// depend on `threads`.
void bias_grad(const float* grad, int64_t images, int64_t channels, int64_t plane, bool channels_last, float* bias_grad,
               int threads);

}  // namespace sparse_moon
