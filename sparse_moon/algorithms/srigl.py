"""SRigL: RigL with the same number of weights in every row."""

import math
from collections.abc import Collection
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_moon import ops
from sparse_moon.algorithms.regrowth import ExchangeArguments, RigL
from sparse_moon.algorithms.run import TrainingRun
from sparse_moon.allocation import exact
from sparse_moon.nn import SparseLayer
from sparse_moon.ops.drop_and_grow import Regrown
from sparse_moon.options import SRigLOptions


class SRigL(RigL):
    """Structured RigL (Lasby et al. 2024): :class:`RigL` with a constant fan-in, which removes whole neurons.

    A neuron is a block row: an output, or the outputs of a block. An update of a layer with a budget of N blocks:

    1. Salient are the blocks that :class:`RigL` would have after its exchange: those that outlive the drop of the
       ``floor(f(t) n)`` smallest, and as many with the largest dense gradient.
    2. Neurons with less than ``gamma_sal`` times the fan-in of salient blocks lose all their weights. As many stay as
       are needed to hold N blocks; one that was removed before comes back where it is salient enough.
    3. The new fan-in is ``k = floor(N / remaining neurons)``. Every remaining neuron keeps its (at most ``k`` largest)
       survivors of the drop and grows to ``k`` blocks in the order of the dense gradient.

    Args:
        model: as :class:`RigL`, its sparse layers with one fan-in in all rows that are not empty
            (``sparsify(..., selection="constant_fan_in")``).
        optimizer ... moved_state: as :class:`SET`.
        gamma_sal: share of the fan-in that must be salient, in [0, 1]; 0 never removes a neuron.
        no_ablation: names of sparse layers that keep all neurons; by default the last one, whose neurons are classes.

    Raises:
        ValueError: rows of different lengths, a number out of range, or names that are no sparse layers.
    """

    name = "srigl"
    Options = SRigLOptions
    selection = "constant_fan_in"

    @classmethod
    def exchanges_evenly(cls, options: Any) -> bool:
        return False

    @classmethod
    def arguments(cls, options: SRigLOptions, run: TrainingRun) -> dict[str, Any]:
        return {**super().arguments(options, run), "gamma_sal": options.ablation_threshold}

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        gamma_sal: float = 0.3,
        no_ablation: Collection[str] | None = None,
        **arguments: Unpack[ExchangeArguments],
    ) -> None:
        self.resizes = gamma_sal > 0.0
        super().__init__(model, optimizer, **arguments)
        if not 0.0 <= gamma_sal <= 1.0:
            raise ValueError(f"gamma_sal must be in [0, 1], got {gamma_sal}")
        names = list(self.layers)
        whole = {names[-1]} if no_ablation is None else set(no_ablation)
        if whole - set(names):
            raise ValueError(f"no_ablation names no sparse layers {sorted(whole - set(names))}, there are {names}")
        fan_ins = {name: _fan_ins(layer) for name, layer in self.layers.items()}
        uneven = [name for name, fan_in in fan_ins.items() if fan_in[fan_in > 0].unique().numel() > 1]
        if uneven:
            raise ValueError(
                f"rows of different lengths in {uneven}: give the model a constant fan-in, "
                "sparsify(..., selection='constant_fan_in')"
            )
        self.gamma_sal = {layer: 0.0 if name in whole else gamma_sal for name, layer in self.layers.items()}

    def choose(self, layer: SparseLayer) -> Regrown:
        topology, weight, gradient = layer.topology, self.drop_score(layer), self.grow_score(layer)
        drop, _ = self.counts(layer)
        rigl = ops.drop_and_grow(weight, gradient, topology, drop)
        survivors = ops.drop_and_grow(weight, None, topology, drop, 0).source
        active = self._active_rows(layer, rigl.index[0].diff())
        fan_in = self.first_blocks[layer] // max(int(active.sum()), 1)

        # each row's best: survivors by magnitude, then all others by gradient
        places = topology.positions()[survivors.long()]
        survives = torch.zeros_like(gradient, dtype=torch.bool).view(-1).index_fill(0, places, True)
        score = gradient.reshape(-1).index_copy(0, places, weight[survivors.long()]).view(topology.grid)
        order = score.sort(stable=True, dim=1, descending=True).indices
        first = survives.view(topology.grid).gather(1, order).sort(stable=True, dim=1, descending=True).indices
        chosen = torch.zeros_like(score).scatter(1, order.gather(1, first)[:, :fan_in], 1.0) * active[:, None]

        stays = chosen.view(-1)[topology.positions()]
        drop = topology.num_blocks - int(stays.count_nonzero())
        grow = int(chosen.count_nonzero()) - topology.num_blocks + drop
        return ops.drop_and_grow(stays, chosen, topology, drop, grow)

    def _active_rows(self, layer: SparseLayer, salient: Tensor) -> Tensor:
        """Bool (block rows,): the neurons that remain, of ``salient`` blocks each."""
        fan_ins, gamma_sal = _fan_ins(layer), self.gamma_sal[layer]
        if gamma_sal == 0.0:
            return fan_ins > 0
        needed = -(-self.first_blocks[layer] // layer.topology.grid[1])  # rows that hold the budget when they are full
        active = salient >= math.ceil(exact(gamma_sal) * int(fan_ins.max()))
        active[salient.sort(stable=True, descending=True).indices[:needed]] = True
        return active


def _fan_ins(layer: SparseLayer) -> Tensor:
    """Number of blocks in each block row."""
    return layer.topology.row_ptr.diff()
