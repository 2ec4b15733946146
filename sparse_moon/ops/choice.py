"""Which implementation of a product runs: the sparse kernel, or a dense product on the scattered weight.

The dense one (on the CPU perhaps by Winograd's) wins where little is sparse. Each pass of each shape has a crossover,
the density up to which the kernel is faster. Crossovers of many shapes were measured (``crossover_cpu_avx2_amd.json``
and its like, which ``benchmarks/tune.py`` writes); a shape that is not among them takes that of its nearest neighbour,
or the one that :func:`sparse_moon.nn.tune.tune` has measured for it. On a kind of device that no table was measured on,
kernels run only where the user's process has measured them, or asked for them.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache
from importlib.resources import files
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from sparse_moon.ops.native import has_cuda, native

Backend = Literal["auto", "kernel", "triton", "cuda", "dense", "reference"]
Pass = Literal["forward", "input_grad", "values_grad", "grads"]
"""The last is both gradients of a convolution at once, which share work on either side; on the CPU only."""
PASSES: tuple[Pass, ...] = get_args(Pass)


class Work(NamedTuple):
    """A product, as far as its speed depends on it."""

    pass_: Pass
    batch: int
    """Images, or tokens of a linear layer."""
    inputs: int
    """Input channels a group, or input features."""
    outputs: int
    """Output channels or features."""
    positions: int
    """Of the output plane; 1 for a linear layer."""
    taps: int
    """Of the convolution kernel; 1 for a linear layer."""
    stride: int
    groups: int
    device: str = "cpu"
    block: tuple[int, int] = (1, 1)
    """Always (1, 1) on the CPU, where all patterns have one speed."""
    dtype: str = "float32"
    """On the CPU bfloat16 where torch has dense products in it, else float32. On a GPU tf32 where torch allows it for
    such a product of float32, and bfloat16 for either 16-bit type."""
    channels_last: bool = False
    """Layout of a convolution's activations; always False on a GPU, where kernels take one only."""

    @property
    def blocks(self) -> int:
        """How many of them the weight would have if it were dense; on the CPU its entries."""
        return self.outputs * self.inputs * self.taps // (self.block[0] * self.block[1])


# Where dense convolutions by Winograd's products are faster than torch's: 1.1 to 3 times on Zen 4, but 0.7 to 1.2 times
# with half as many channels, or tiles of 2 x 2 outputs in the batch.
_WINOGRAD_CHANNELS = 16
WINOGRAD_TILES = 32
# By how much torch's convolutions in float32 are slower than Winograd's, which are not there in bfloat16.
_WINOGRAD_SPEED = 2.0

# The products of a training pass, and what each takes as dense products.
_LINEAR: dict[Pass, int] = {"forward": 1, "input_grad": 1, "values_grad": 1}
_CONVOLUTION: dict[Pass, int] = {"forward": 1, "grads": 2}

# Measured by the user's own process; precedes the stored table.
_measured: dict[Work, float] = {}
# Blocks of use_backend that are open in this thread or task, the newest last.
_blocks: ContextVar[tuple["_Block", ...]] = ContextVar("blocks", default=())
_asked: list[Work] | None = None

generation = 0
"""Grows whenever a choice that was made before may no longer hold."""
open_blocks = _blocks.get
"""These blocks; without any a choice holds as long as :data:`generation` stays."""


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Use one implementation everywhere inside the block, in this thread or task: for tests and measurements.

    A backward pass outside of any block uses the backend of its forward pass: on a GPU torch computes gradients in a
    thread of its own.

    ``"kernel"`` where there is one for pattern, dtype and device, ``"triton"`` or ``"cuda"`` where there is one of that
    kind, ``"dense"`` for dense products on the scattered weight, ``"reference"`` for the specification in torch's own
    operators (under ``torch.compile`` as ``"dense"``), ``"auto"`` whichever is faster as far as that was measured.

    Raises:
        ValueError: another name.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
    block = _Block(backend)
    _blocks.set((*_blocks.get(), block))
    try:
        yield
    finally:
        # blocks need not end in the reverse order of their starts: those of generators do not
        _blocks.set(tuple(other for other in _blocks.get() if other is not block))


class _Block:
    """An open block of :func:`use_backend`."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend


def current_backend() -> Backend:
    """The backend of the innermost block of this thread or task; ``"auto"`` outside."""
    blocks = _blocks.get()
    return blocks[-1].backend if blocks else "auto"


def is_settled() -> bool:
    """Whether a choice made now may be kept."""
    return _asked is None and not open_blocks()


def kernel_pays(work: Work, density: float, kind: Literal["cpu", "triton", "cuda"] = "cpu") -> bool:
    """Whether to run the sparse kernel, which is of this kind, for this product at this density."""
    if _asked is not None:
        _asked.append(work)
    backend = current_backend()
    if backend == "auto":
        return pays(work, density)
    return backend in ("kernel", kind)


def pays(work: Work, density: float) -> bool:
    """Whether the sparse kernel is known to be faster at this density.

    A crossover is a density that was asked for, and a layer has the nearest whole number of blocks: of the 36 blocks of
    128 x 128 of a 3 x 3 convolution of 256 channels, 4 stand for 0.1. So as many blocks as the crossover rounds to
    still count as measured, and one more does not.
    """
    limit = crossover(work)
    return density <= limit or 0 < round(density * work.blocks) <= limit * work.blocks + 0.5


def cuda_or(reference: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The CUDA kernel of an operator that is no product, where it is there and nothing else is asked for."""

    def run(*inputs: Any) -> Any:
        return (kernel if has_cuda() and kernel_runs("cuda") else reference)(*inputs)

    return run


def or_dense(extension: ModuleType | None, kernel: Callable[..., Any], dense: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, or the dense product where the kernel cannot take the shapes and was not asked for by name."""
    if extension is None:
        return kernel
    too_large = extension.TooLarge

    def run(*inputs: Any) -> Any:
        try:
            return kernel(*inputs)
        except too_large as error:
            return dense_instead(error, dense, *inputs)

    return run


def dense_instead(error: Exception, dense: Callable[..., Any], *inputs: Any) -> Any:
    """The dense product in place of a kernel that has raised ``TooLarge``; the error where it was asked for by name."""
    if current_backend() != "auto":
        raise error
    return dense(*inputs)


def winograd_pays(work: Work) -> bool:
    """Whether the dense product of a plain 3 x 3 convolution of this size is computed by Winograd's on the CPU."""
    return (
        (work.taps, work.stride, work.groups) == (9, 1, 1)
        and min(work.inputs, work.outputs) >= _WINOGRAD_CHANNELS
        and work.batch * work.positions >= 4 * WINOGRAD_TILES
    )


def kernel_runs(kind: Literal["triton", "cuda"]) -> bool:
    """Whether to run a kernel of this kind that is not a product and is faster at every size."""
    return current_backend() in ("auto", "kernel", kind)


@contextmanager
def asked_for() -> Iterator[list[Work]]:
    """The products for which the block asks for a choice."""
    global _asked, generation
    works: list[Work] = []
    _asked = works
    generation += 1  # what was chosen before is asked for again
    try:
        yield works
    finally:
        _asked = None


def crossover(work: Work) -> float:
    """Largest density at which the sparse kernel is to run.

    On the CPU that of a whole training pass of the layer: one kernel beside dense products would not spare the weight
    that they need scattered. On a GPU that of the product.
    """
    if work.device != "cpu":
        return pass_crossover(work)
    # Times of kernels grow with the density, so the mean is harmonic; both gradients take twice a forward pass.
    products = _LINEAR if work.positions == work.taps == 1 else _CONVOLUTION
    inverse = sum(share / max(pass_crossover(work._replace(pass_=p)), 1e-9) for p, share in products.items())
    return sum(products.values()) / inverse


def pass_crossover(work: Work) -> float:
    """Largest density at which the sparse kernel of one product is faster than the dense product, as far as known."""
    if work in _measured:
        return _measured[work]
    key = work.device, work.pass_, work.block, work.dtype
    if (work.device, work.dtype) == ("cpu", "bfloat16") and _measured_of(*key) is None:
        # the kernel has the same speed as in float32
        dense_speed = bfloat16_speed() / (_WINOGRAD_SPEED if winograd_pays(work) else 1.0)
        return pass_crossover(work._replace(dtype="float32")) / dense_speed
    return nearest(work)


@cache
def bfloat16_speed() -> float:
    """How many times as fast torch's dense products are in bfloat16 as in float32 on this processor.

    Convolutions and linear layers were 1.8 to 2.2 times as fast on Zen 4, and 0.5 to 0.7 times on Emerald Rapids
    without its matrix unit, which is said to make them several times as fast.
    """
    has = torch.cpu.get_capabilities()
    if has.get("amx_bf16"):
        return 4.0
    return 2.0 if has.get("avx512_bf16") and native is not None and native.vendor() == "amd" else 0.6


def remember(work: Work, crossover_density: float) -> None:
    """Take a measured crossover from now on, in this process."""
    global generation
    _measured[work] = crossover_density
    generation += 1


def remembered() -> dict[Work, float]:
    """The crossovers that this process has measured itself."""
    return dict(_measured)


def forget() -> None:
    """Drop the crossovers that this process has measured itself, and what it has read from tables."""
    global generation
    _measured.clear()
    generation += 1
    nearest.cache_clear()
    _measured_of.cache_clear()


def table_name(device: str) -> str:
    """File of the crossovers of a kind of device.

    CPUs differ by the instruction set that the kernels use and by their maker (torch's dense products of small batches
    are two to four times as fast on Intel's), GPUs by their architecture: of Hopper's, ``sm90``.
    """
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return f"crossover_cuda_sm{major}{minor}.json"
    if device != "cpu" or native is None:
        return f"crossover_{device}.json"
    # without vectors of their own, the compiler's, which are those of AVX2 or shorter
    return f"crossover_cpu_{'avx512' if native.isa() == 'avx512' else 'avx2'}_{native.vendor()}.json"


def stored_table(device: str) -> str | None:
    """File of the crossovers that hold on this kind of device; None where nothing was measured.

    For a CPU whose maker none was measured of, that of another one with the same vectors.
    """
    name = table_name(device)
    stored = sorted(path.name for path in files("sparse_moon.ops").joinpath("tables").iterdir())
    if name not in stored and device == "cpu":
        isa = name.rpartition("_")[0]
        name = next((other for other in stored if other.startswith(f"{isa}_")), name)
    return name if name in stored else None


@cache
def table(device: str) -> list[tuple[Work, float]]:
    """The products that were measured on this kind of device and their crossovers; empty where nothing was."""
    name = stored_table(device)
    if name is None:
        return []
    rows = json.loads(files("sparse_moon.ops").joinpath("tables", name).read_text())["rows"]
    return [(as_work(row["work"]), row["crossover"]) for row in rows]


def as_work(stored: Mapping[str, Any]) -> Work:
    """A product as tables store it, whose fields at their defaults may be left out."""
    work = Work(**stored)
    return work._replace(block=(work.block[0], work.block[1]))


class _Measured(NamedTuple):
    """Measured products of one kind as arrays, a row each: looking through them is a step of every new shape."""

    loops: np.ndarray  # logarithms of taps, stride and groups, then whether it has a plane and whether it is Winograd's
    sizes: np.ndarray  # logarithms of batch, inputs, outputs and positions
    channels_last: np.ndarray
    crossovers: np.ndarray

    @classmethod
    def of(cls, works: Sequence[Work], crossovers: Sequence[float]) -> "_Measured":
        loops = [(*map(math.log2, w[5:8]), w.positions == 1, w.device == "cpu" and winograd_pays(w)) for w in works]
        sizes = [[math.log2(max(n, 1)) for n in w[1:5]] for w in works]
        layouts = np.array([w.channels_last for w in works], dtype=float)
        return cls(np.array(loops, dtype=float), np.array(sizes), layouts, np.array(crossovers))

    def no_larger(self, other: "_Measured") -> "_Measured":
        """Those with the loops of the one product in ``other``, and no more rows, inputs or outputs."""

        def extents(sizes: np.ndarray) -> np.ndarray:
            return np.stack([sizes[:, 0] + sizes[:, 3], sizes[:, 1], sizes[:, 2]], 1)

        alike = (self.loops == other.loops).all(1) & (extents(self.sizes) <= extents(other.sizes) + 1e-9).all(1)
        return _Measured(*(column[alike] for column in self))


@cache
def _measured_of(device: str, pass_: Pass, block: tuple[int, int], dtype: str) -> _Measured | None:
    rows = [row for row in table(device) if (row[0].pass_, row[0].block, row[0].dtype) == (pass_, block, dtype)]
    return _Measured.of([w for w, _ in rows], [value for _, value in rows]) if rows else None


@lru_cache(maxsize=4096)
def nearest(work: Work) -> float:
    """Mean crossover of the measured products most alike, nearest in the logarithms of their numbers; 0 without any.

    On a GPU only of products that are no larger, with the same loops: a smaller one may leave most of it idle, and
    takes the host longer than the GPU.
    """
    candidates = _measured_of(work.device, work.pass_, work.block, work.dtype)
    if candidates is None:
        return 0.0
    this = _Measured.of([work], [0.0])
    if work.device != "cpu":
        candidates = candidates.no_larger(this)
        if not candidates.crossovers.size:
            return 0.0
    # what changes the loops of either side (a plane or none, taps, stride, groups) counts more than sizes
    distances = 4 * np.abs(candidates.loops - this.loops).sum(1) + np.abs(candidates.sizes - this.sizes).sum(1)
    distances += np.abs(candidates.channels_last - this.channels_last)
    near = distances <= distances.min() + 1e-6
    return float(candidates.crossovers[near].mean())
