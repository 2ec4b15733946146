#pragma once
// Marks functions for host and device; nvcc alone tells them apart.
#ifdef __CUDACC__
#define SPARSE_MOON_HOST_DEVICE __host__ __device__
#else
#define SPARSE_MOON_HOST_DEVICE
#endif
