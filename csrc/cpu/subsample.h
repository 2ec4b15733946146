// The pixels that a convolution of one tap with a stride sees, as planes of their own.
#pragma once
#include "sparse_conv2d.h"

namespace sparse_moon {

// Whether each position of the output sees one of the input, and none that is padding.
bool has_one_tap(const Conv2d& conv);

// The same of a convolution with a stride.
bool is_subsampling(const Conv2d& conv);

// The same convolution of those pixels alone, without a stride.
Conv2d without_stride(Conv2d conv);

// Contiguous planes of the input's size into those pixels.
void subsample(const Conv2d& conv, const void* planes, void* pixels, int threads);

// Inverse: into planes of the input's size, with zeros between the pixels.
void spread(const Conv2d& conv, const void* pixels, void* planes, int threads);

}  // namespace sparse_moon
