"""What moves in a topology, look by look."""

import torch
from torch import Tensor, nn

from sparse_moon.nn.inspect import sparse_layers
from sparse_moon.nn.layers import SparseLayer


class Movement:
    """Which weights came and went since the last look, and how many are there since the start.

    It keeps a number for each existing weight or block of both moments, on the CPU.

    Args:
        model: with sparse layers, whose present topology is that of the start.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = sparse_layers(model)
        self._first = {name: _places(layer) for name, layer in self.layers.items()}
        self._last, self._prints = dict(self._first), self._fingerprints()

    def _fingerprints(self) -> dict[str, int | None]:
        return {name: layer.topology.fingerprint for name, layer in self.layers.items()}

    def look(self) -> dict[str, list[int]]:
        """By layer how many weights went, how many came, how many are of the start, and how many there are."""
        found, prints = {}, self._fingerprints()
        for name, layer in self.layers.items():
            last = self._last[name]
            if prints[name] is None or prints[name] != self._prints[name]:
                self._last[name] = _places(layer)
            now = self._last[name]
            stayed = len(now) if now is last else _common(last, now)
            size = layer.topology.block[0] * layer.topology.block[1]
            counts = len(last) - stayed, len(now) - stayed, _common(self._first[name], now), len(now)
            found[name] = [size * count for count in counts]
        self._prints = prints
        return found


def _places(layer: SparseLayer) -> Tensor:
    rows, cols = layer.topology.grid
    return layer.topology.positions().to("cpu", torch.int32 if rows * cols < 2**31 else torch.int64)


def _common(a: Tensor, b: Tensor) -> int:
    """How many numbers are in both, which ascend."""
    if not len(a):
        return 0
    return int((a[torch.searchsorted(a, b).clamp_(max=len(a) - 1)] == b).sum())
