// The kernels for AVX2: compiled with -mavx2 -mfma.
#if defined(__x86_64__)
#define SPARSE_MOON_ISA avx2
#include "kernel_table.h"
#endif
