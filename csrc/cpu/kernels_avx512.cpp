// The kernels for AVX-512: compiled with -mavx512f -mavx512bw -mavx512vl -mfma.
#if defined(__x86_64__)
#define SPARSE_MOON_ISA avx512
#include "kernel_table.h"
#endif
