// Everything that is compiled once for each instruction set, behind one table.
#pragma once
#include "batch_norm_relu_kernels.h"
#include "conv2d_winograd_kernels.h"
#include "sparse_conv2d_flat_panels_kernels.h"
#include "sparse_conv2d_panels_kernels.h"
#include "sparse_linear_kernels.h"
#include "sparse_linear_runs_kernels.h"

#define SPARSE_MOON_STRING(name) #name
#define SPARSE_MOON_NAME(name) SPARSE_MOON_STRING(name)

namespace sparse_moon {
namespace SPARSE_MOON_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {
    SPARSE_MOON_NAME(SPARSE_MOON_ISA),
    kLanes,
    correlate_chunks,
    correlate_scratch,
    correlate,
    correlate_dots_chunks,
    correlate_dots_scratch,
    correlate_dots,
    flat_correlate_scratch,
    flat_correlate,
    flat_dots_scratch,
    flat_dots,
    winograd_weight,
    winograd_conv2d_scratch,
    winograd_conv2d,
    winograd_weight_grad_scratch,
    winograd_weight_grad,
    linear_scratch,
    linear,
    linear_runs_scratch,
    linear_runs,
    linear_dots_scratch,
    linear_dots,
    batch_norm_relu_scratch,
    batch_norm_relu,
    batch_norm_relu_backward,
};

}  // namespace SPARSE_MOON_ISA
}  // namespace sparse_moon
