"""Which implementation of a product runs: the sparse kernel, or a dense product on the scattered weight.

The dense one (the operator's reference) wins where little is sparse. Each pass of each shape has a crossover, the
density up to which the kernel is faster. Crossovers of many shapes were measured (``crossover_cpu.json``, which
``benchmarks/tune.py`` writes); a shape that is not among them takes that of its nearest neighbour, or the one that
:func:`sparse_moon.tuning.tune` has measured for it.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from typing import Literal, NamedTuple, get_args

Backend = Literal["auto", "kernel", "reference"]
Pass = Literal["forward", "input_grad", "values_grad"]
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


# Measured by the user's own process; precedes the stored table.
_measured: dict[Work, float] = {}
_backend: Backend = "auto"
_asked: list[Work] | None = None


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Use one implementation everywhere inside the block: for tests and measurements.

    ``"kernel"`` where there is one for dtype and device, ``"reference"`` always, ``"auto"`` whichever is faster.

    Raises:
        ValueError: another name.
    """
    global _backend
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
    before, _backend = _backend, backend
    try:
        yield
    finally:
        _backend = before


def kernel_pays(work: Work, density: float) -> bool:
    """Whether to run the sparse kernel for this product at this density."""
    if _asked is not None:
        _asked.append(work)
    return _backend == "kernel" or (_backend == "auto" and density <= crossover(work))


@contextmanager
def asked_for() -> Iterator[list[Work]]:
    """The products for which the block asks for a choice."""
    global _asked
    works: list[Work] = []
    _asked = works
    try:
        yield works
    finally:
        _asked = None


def crossover(work: Work) -> float:
    """Largest density at which the sparse kernel is the faster one."""
    return _measured[work] if work in _measured else _nearest(work)


def remember(work: Work, crossover_density: float) -> None:
    """Take a measured crossover from now on, in this process."""
    _measured[work] = crossover_density


@cache
def _table() -> list[tuple[Work, float]]:
    rows = json.loads(files("sparse_moon.ops").joinpath("crossover_cpu.json").read_text())["rows"]
    return [(Work(**row["work"]), row["crossover"]) for row in rows]


@cache
def _nearest(work: Work) -> float:
    """Crossover of the measured product that is most alike: nearest in the logarithms of its numbers."""
    candidates = [(other, value) for other, value in _table() if other.pass_ == work.pass_]

    def distance(other: Work) -> float:
        # what changes the kernel's loops (a plane or none, taps, stride, groups) counts more than sizes
        kind = abs((other.positions == 1) - (work.positions == 1)) + sum(
            abs(math.log2(a / b)) for a, b in zip(work[5:], other[5:], strict=True)
        )
        return 4 * kind + sum(abs(math.log2(max(a, 1) / b)) for a, b in zip(work[1:5], other[1:5], strict=True))

    return min(candidates, key=lambda candidate: distance(candidate[0]))[1]
