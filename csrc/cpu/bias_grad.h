#pragma once
#include "jobs.h"

namespace sparse_moon {

// bias_grad [channels] = the sum of grad over images and plane, in double precision. The result does not depend on
// `threads`.
void bias_grad(const Planes& grad, int64_t images, float* bias_grad, int threads);

}  // namespace sparse_moon
