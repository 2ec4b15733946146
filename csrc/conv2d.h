#pragma once
#include <cstdint>

namespace sparse_moon {

// A convolution as F.conv2d takes it; pairs are (vertical, horizontal), in elements. Int: that of addresses on the CPU,
// of 32 bits on the GPU, where wider ones cost registers.
template <class Int>
struct Conv2dOf {
    Int batch;
    Int in_channels, in_size[2];
    Int out_channels, out_size[2];
    Int kernel[2], stride[2], padding[2], dilation[2];
    Int groups;
};

}  // namespace sparse_moon
