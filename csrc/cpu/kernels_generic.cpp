// The kernels for whatever the target's baseline offers.
#define SPARSE_MOON_ISA generic
#include "kernel_table.h"
