#!/usr/bin/env python3
"""Compile the Triton kernels that training steps launch, in parallel and without a GPU, into Triton's cache.

    python benchmarks/compile_kernels.py --case vit_base gpt2_1.3b resnet50 --pattern block32 block64

A launch compiles what it does not find in the cache, and that in turn: minutes for a few networks. The cache holds for
one version of Triton and for one architecture of GPUs; TRITON_CACHE_DIR says where it is.
"""

import argparse
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from gpu_networks import NETWORKS, GpuNetwork, has_blocks
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from tune import DENSITIES

from sparse_moon.kernels import batch_norm_relu as norm
from sparse_moon.kernels.launch import Launch
from sparse_moon.ops.plan import Geometry, Plan
from sparse_moon.ops.sparse_conv2d import triton as conv2d
from sparse_moon.ops.sparse_linear import triton as linear
from sparse_moon.topology import block_grid, block_shape, blocks_of, matrix_shape

_launches: list[Launch] = []


class _Target:
    """A GPU as Triton sees it before it launches anything."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """What is launched in the block, which is not run."""
    found: list[Launch] = []
    call, Launch.__call__ = Launch.__call__, lambda launch: found.append(launch)  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Launch.__call__ = call  # type: ignore[method-assign]


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """An operand without memory."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def plan_of(layer: nn.Module, density: float, pattern: str) -> Plan:
    """Of a dense layer that is made sparse, without its index: which kernel runs depends on sizes alone."""
    block = block_shape(pattern)
    grid = block_grid(matrix_shape(tuple(layer.weight.shape)), block)
    entries, rows, columns = blocks_of(density, grid), grid[0] + 1, grid[1] + 1
    geometry = None
    if isinstance(layer, nn.Conv2d):
        sizes = (layer.stride, layer.padding, layer.dilation, layer.groups)
        geometry = Geometry.of(layer.weight.shape, *sizes)
    sizes = rows, entries, columns, entries, entries
    return Plan(tuple(empty(size, dtype=torch.int32) for size in sizes), block, geometry)


def launches(layer: nn.Module, shape: torch.Size, plan: Plan, gelu: str | None = None) -> list[Launch]:
    """Of the forward pass and both gradients in bfloat16; behind or in front of GELU, where that is its name."""
    x, values = empty(*shape), empty(*plan.values_shape)
    bias = None if layer.bias is None else empty(*layer.bias.shape)
    with recorded() as found:
        if isinstance(layer, nn.Conv2d):
            y = conv2d.forward(x, values, bias, plan)
            if conv2d.takes("input_grad", plan, torch.bfloat16):
                conv2d.input_grad(y, values, shape, plan)
            conv2d.values_grad(y, x, plan)
        else:
            y = linear.forward(x, values, bias, None, plan)
            linear.input_grad(y, values, plan)
            linear.values_grad(y, x, plan)
            if bias is not None:
                linear.values_and_bias_grad(y, x, plan)
                if gelu is not None:
                    linear.forward_gelu(x, values, bias, gelu, plan)
                    if plan.block[1] > 1:
                        linear.input_grad_gelu(y, values, x, gelu, plan)
    return found


def norm_launches(shape: torch.Size) -> list[Launch]:
    """Of a fused batch norm in training, both passes, with a rectifier, without and with a sum before it."""
    x, vector, relu = empty(*shape), empty(shape[1], dtype=torch.float32), 1
    with recorded() as found:
        for other in (None, x):
            norm.batch_norm_relu(x, other, vector, vector, vector, vector, x, 1e-5, relu, True)
            norm.batch_norm_relu_backward(
                x, x, other, vector, vector, vector, vector, x, other, vector, vector, 1e-5, relu, True
            )
    return found


def launches_of(network: GpuNetwork, pattern: str, sparsities: list[float]) -> Iterator[Launch]:
    """Of a network's sparse layers at these sparsities and where tune.py looks for crossovers, and of batch norms."""
    for shape in dict.fromkeys(network.norms()):
        yield from norm_launches(shape)
    gelu = "gelu_tanh" if len(network.shape) == 2 else "gelu"
    for name, layer, shape in network.layers():
        for density in (*(1 - sparsity for sparsity in sparsities), *DENSITIES):
            if has_blocks(layer, 1 - density, pattern):
                plan = plan_of(layer, density, pattern)
                yield from launches(layer, shape, plan, gelu if name.endswith(("fc1", "fc2")) else None)


def key(launch: Launch) -> tuple[Any, ...]:
    """The same for launches of the same compiled kernel."""

    def kind(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype
        return value if not isinstance(value, int) or value == 1 else (value % 16 == 0, value.bit_length() > 31)

    described = {
        name: value if launch.kernel.params[i].is_constexpr else kind(value)
        for i, name in enumerate(launch.kernel.arg_names)
        for value in [launch.arguments[name]]
    }
    return launch.kernel, launch.num_warps, launch.num_stages, *described.items()


def compile_one(number: int) -> str | None:
    """Compile as the launch itself would; what went wrong, or None."""
    launch = _launches[number]
    try:
        launch.kernel.warmup(
            **launch.arguments, grid=launch.grid, num_warps=launch.num_warps, num_stages=launch.num_stages
        )
    except Exception as error:  # whatever the compiler raises is the finding
        return f"{launch.kernel.fn.__name__}: {type(error).__name__}: {str(error)[:500]}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=[""], help="only networks whose name contains one of these")
    parser.add_argument("--pattern", nargs="+", default=["block32", "block64", "block128", "vector16"])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    problems: list[str] = []
    known: set[tuple[Any, ...]] = set()
    driver.set_active(_Target(arguments.capability))
    for network in NETWORKS:  # whose kernels are there before those of the next one are begun
        found: dict[tuple[Any, ...], Launch] = {}
        named = any(part in network.name for part in arguments.case)
        for pattern in arguments.pattern if named else ():
            try:
                found |= {key(launch): launch for launch in launches_of(network, pattern, arguments.sparsity)}
            except Exception as error:  # a network that cannot be built leaves the others to be compiled
                problems.append(f"{network.name} {pattern}: {type(error).__name__}: {error}")
        _launches[:] = [launch for described, launch in found.items() if described not in known]
        known |= found.keys()
        if _launches:  # forked, because a launch's kernel cannot be sent to another process
            with multiprocessing.get_context("fork").Pool(arguments.processes) as pool:
                compiled = pool.map(compile_one, range(len(_launches)), chunksize=1)
            problems += [problem for problem in compiled if problem]
            print(f"{network.name}: {len(_launches)} kernels more", flush=True)
    print(f"{len(known)} kernels, {len(problems)} problems, triton {triton.__version__}", *problems, sep="\n")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
