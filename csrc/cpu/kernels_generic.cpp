// The kernels for Whatever the target's baseline offers.
#define SPARSE_MOON_ISA generic
#include "kernel_table.h"
