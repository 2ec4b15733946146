"""What kernels need: the compiled extensions ``native`` (CPU) and ``native_cuda``, each None where it was not built,
and Triton."""

import importlib
import warnings
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch

from sparse_moon.source_tree import PACKAGE, is_source_tree


def _how_to_build(tool: str) -> str:
    if is_source_tree():
        return f"It is imported from its source tree: run `pip install -e .` in {PACKAGE.parent}, with {tool} at hand."
    return f"Get {tool} and reinstall to build them."


def load() -> ModuleType | None:
    """The CPU extension; a warning that says how to build it, and None, where it was not built."""
    try:
        return importlib.import_module("sparse_moon._C")
    except ImportError as error:
        warnings.warn(
            f"sparse_moon runs without its compiled CPU kernels ({error}); everything works on the slower reference "
            f"path. {_how_to_build('a C++17 compiler')}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _load_cuda() -> ModuleType | None:
    """Most machines have no GPU, so its absence is no news; what needs it calls :func:`require_cuda`."""
    try:
        return importlib.import_module("sparse_moon._C_cuda")
    except ImportError:
        return None


_LEAST_CAPABILITY = (8, 0)  # the oldest architecture that setup.py compiles for

native = load()
native_cuda = _load_cuda()


def require_cuda() -> ModuleType:
    """The CUDA extension.

    Raises:
        RuntimeError: it was not built.
    """
    if native_cuda is None:
        raise RuntimeError(
            f"sparse_moon runs without its CUDA kernels. {_how_to_build('nvcc (on the path, or in CUDA_HOME)')}"
        )
    return native_cuda


@cache
def has_cuda() -> bool:
    """Whether the CUDA kernels are there and run on every GPU; one warning where there is a GPU too old for them."""
    if native_cuda is None:
        return False
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        if (major, minor) < _LEAST_CAPABILITY:
            warnings.warn(
                f"sparse_moon runs without its CUDA kernels: they need GPUs of capability 8.0 or newer, and GPU {i} "
                f"({torch.cuda.get_device_name(i)}) has {major}.{minor}. Where others are newer, CUDA_VISIBLE_DEVICES "
                "can hide it.",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
    return True


@cache
def has_triton() -> bool:
    """Whether Triton and its kernels are there: it is not on every platform, they are not in a bare source tree.

    Triton is slow to import before it is used.
    """
    return find_spec("triton") is not None and find_spec("sparse_moon.kernels") is not None


def current_stream() -> int:
    """Address of the current device's stream, as the CUDA extension takes it."""
    return torch.cuda.current_stream().cuda_stream
