"""Layer densities: how many weights each layer keeps at a given overall sparsity."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Literal, get_args

Allocation = Literal["uniform", "er", "erk"]


def check_sparsity(sparsity: float) -> None:
    """Raise ``ValueError`` unless ``0 <= sparsity < 1``, ``TypeError`` for what is no number."""
    if isinstance(sparsity, str) or sparsity is None:
        raise TypeError(f"sparsity must be a number, got {sparsity!r}")
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")


def exact(share: float) -> Fraction:
    """A share as it is written: of 90 things 0.7 are 63, but the product of floating point is 62.99999999999999."""
    return Fraction(str(float(share)))


def allocate(
    shapes: Mapping[str, tuple[int, ...]], sparsity: float, method: Allocation = "erk", *, first_dense: bool = True
) -> dict[str, float]:
    """Density of every layer so that the network as a whole reaches ``sparsity``.

    Args:
        shapes: weight shapes by layer name, ``(out, in)`` or ``(out, in / groups, kh, kw)``, in network order.
        sparsity: share of weights to leave out, in [0, 1).
        method: ``"uniform"`` gives every layer the same density; ``"er"`` and ``"erk"`` (Evci et al. 2020, section 3)
            scale a layer's density with ``sum(shape) / prod(shape)`` over in and out channels (ER) or over all
            dimensions (ERK). Layers whose density would pass 1 stay dense, as those without weights do, and the others
            share the rest.
        first_dense: with ``"uniform"``, keep the first layer dense (RigL's convention); the others stay at
            ``1 - sparsity``, so the overall sparsity is a little lower than asked.

    Returns:
        Density in (0, 1] by layer name.

    Raises:
        ValueError: sparsity outside [0, 1), an unknown method, no layers, or a sparsity that cannot be reached.
    """
    check_sparsity(sparsity)
    if method not in get_args(Allocation):
        raise ValueError(f"unknown allocation {method!r}, expected one of {get_args(Allocation)}")
    if not shapes:
        raise ValueError("no layers to allocate a sparsity to")
    if method == "uniform":
        densities = dict.fromkeys(shapes, 1.0 - sparsity)
        if first_dense:
            densities[next(iter(shapes))] = 1.0
        return densities
    return _erdos_renyi(shapes, sparsity, kernel=method == "erk")


def _erdos_renyi(shapes: Mapping[str, tuple[int, ...]], sparsity: float, *, kernel: bool) -> dict[str, float]:
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    removed = {name: math.floor(exact(sparsity) * n) for name, n in size.items()}
    dense = {name for name, n in size.items() if not n}
    score = {}
    for name, shape in shapes.items():
        if name not in dense:
            dims = shape if kernel else shape[:2]
            score[name] = sum(dims) / math.prod(dims)

    while True:
        free = [name for name in shapes if name not in dense]
        budget = sum(size[name] - removed[name] for name in free) - sum(removed[name] for name in dense)
        if not free:
            return dict.fromkeys(shapes, 1.0)  # sparsity 0, or no weights
        if budget <= 0:
            raise ValueError(f"sparsity {sparsity} cannot be reached: the layers kept dense already exceed the budget")
        eps = budget / sum(score[name] * size[name] for name in free)
        top = max(score[name] for name in free)
        if eps * top <= 1.0:
            return {name: 1.0 if name in dense else eps * score[name] for name in shapes}
        dense.update(name for name in free if score[name] == top)
