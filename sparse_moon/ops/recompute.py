"""Results that an operator's backward pass computes again instead of keeping them.

What makes such a result hangs a recipe on the tensor. An operator that would keep the tensor for its backward pass
keeps the recipe's operands in its place, which another operator keeps anyway, so that the tensor itself can go.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

_ATTRIBUTE = "_sparse_moon_recipe"


class Recipe(NamedTuple):
    """How to compute a tensor again, to the same bits."""

    function: Callable[..., Tensor]
    operands: tuple[Tensor | None, ...]
    version: int  # of the tensor, which counts what was done to it in place since


def hang_recipe(tensor: Tensor, function: Callable[..., Tensor], *operands: Tensor | None) -> None:
    """Say that the tensor, as it is now, is ``function(*operands)``; views and copies of it do not inherit that."""
    setattr(tensor, _ATTRIBUTE, Recipe(function, operands, tensor._version))


def keep(tensor: Tensor) -> tuple[tuple[Tensor | None, ...], Callable[..., Tensor]]:
    """What to save for the backward pass in place of a tensor, and the function that makes it from that."""
    recipe: Recipe | None = getattr(tensor, _ATTRIBUTE, None)
    if recipe is None or recipe.version != tensor._version:
        return (tensor,), itself
    return recipe.operands, recipe.function


def itself(tensor: Any) -> Tensor:
    """The function of a tensor that was kept."""
    return tensor
