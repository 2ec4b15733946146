"""A GPU without its launches: the host's whole way through our operators, on CPU tensors.

Layers take what they take on a GPU, and Triton looks up its compiled kernels and binds their arguments, for an H200.
Only the call into CUDA's driver is left out, and what the CUDA extension does in C++. Tensors are the CPU's, so memory
comes from its allocator.
"""

from collections import Counter
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sparse_moon.ops import choice
from sparse_moon.ops.registry import KERNELS

launches: Counter[str] = Counter()
"""How often kernels would have been launched, by kind."""


class _Utils:
    """What a driver says of a device, and what it makes of a compiled kernel."""

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132}

    @staticmethod
    def load_binary(*_: Any) -> tuple[int, ...]:
        return 1, 1, 32, 0, 1024


class _Driver:
    """In the place of Triton's for CUDA."""

    utils = _Utils()

    @staticmethod
    def get_current_target() -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    @staticmethod
    def get_current_device() -> int:
        return 0

    @staticmethod
    def get_current_stream(device: int) -> int:
        return 0

    @staticmethod
    def launcher_cls(*_: Any) -> Any:
        return _launched


class _Extension:
    """In the place of the CUDA extension."""

    def __getattr__(self, name: str) -> Any:
        return (lambda *_: 4096) if name.endswith("workspace") else _launched_in_cuda


def _launched(*_: Any) -> None:
    launches["triton"] += 1


def _launched_in_cuda(*_: Any) -> None:
    launches["cuda"] += 1


def install() -> None:
    """For the rest of the process; Triton must not have launched anything yet."""
    driver.set_active(_Driver())
    KERNELS.update({(operator, "cpu"): kernel for (operator, kind), kernel in KERNELS.items() if kind == "cuda"})
    extension = _Extension()
    for module in ("sparse_linear.cuda", "sparse_conv2d.cuda"):
        place: Any = import_module(f"sparse_moon.ops.{module}")
        place.require_cuda, place.current_stream = lambda: extension, lambda: 0
    place = import_module("sparse_moon.ops.gpu")
    place.has_cuda = lambda: True
    torch.cuda.device = lambda device: nullcontext()
    choice.crossover = lambda work: 1.0  # every kernel pays
