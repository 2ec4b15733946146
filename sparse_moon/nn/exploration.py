"""How much of its weight space a sparse training has seen."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_moon.nn.inspect import tied_layers


class Exploration:
    """Share of all weights that have existed at any time: ITOP's exploration rate R_s (Liu et al. 2021, "In-Time
    Over-Parameterization").

    ``R_s`` is the size of the union of all masks over that of the dense weights, both of the sparse layers; layers that
    share their weight count once. It takes a bool for each block of the dense weights.

    Args:
        model: with sparse layers, whose present topology is the first; call :meth:`update` after each that follows.

    Raises:
        ValueError: no sparse layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = list(tied_layers(model))
        if not self.layers:
            raise ValueError("expected a model with sparse layers; call sparsify(model, ...) first")
        self._seen: list[Tensor] = []
        for layer in self.layers:
            rows, cols = layer.topology.grid
            self._seen.append(torch.zeros(rows * cols, dtype=torch.bool, device=layer.values.device))
        self.update()

    def update(self) -> None:
        """Take in the present topology."""
        for layer, seen in zip(self.layers, self._seen, strict=True):
            seen[layer.topology.positions()] = True

    @property
    def rate(self) -> float:
        """R_s, from the density at the start to 1."""
        sizes = [layer.topology.block[0] * layer.topology.block[1] for layer in self.layers]
        seen = sum(size * int(one.sum()) for size, one in zip(sizes, self._seen, strict=True))
        return seen / sum(size * one.numel() for size, one in zip(sizes, self._seen, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`, of the same model."""
        for mine, saved in zip(self._seen, state["seen"], strict=True):
            mine.copy_(saved)
