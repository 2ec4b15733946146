"""Methods that start with more weights than they end with: GMP and GraNet."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

from torch import nn
from torch.optim import Optimizer

from sparse_moon.algorithms.dynamic import DynamicMethod, UpdateArguments
from sparse_moon.algorithms.method import plain_names
from sparse_moon.algorithms.regrowth import ExchangeArguments, RigL
from sparse_moon.algorithms.run import TrainingFlops, TrainingRun
from sparse_moon.nn import SparseLayer
from sparse_moon.options import PruningOptions
from sparse_moon.schedules import Cubic
from sparse_moon.topology import blocks_of

Densities = Mapping[str, float] | float


@dataclass(frozen=True)
class _Plan:
    """Numbers of blocks on the way from each layer's first to its last."""

    remaining: Cubic
    """Share of the blocks to be pruned that is still there, by batches since ``first_step``."""
    first_step: int
    last: Mapping[SparseLayer, int]

    def blocks(self, layer: SparseLayer, first: int, step: int) -> int:
        last = self.last[layer]
        planned = last + round((first - last) * self.remaining(step - self.first_step))
        return min(planned, layer.topology.num_blocks)  # a run that was to be shorter is ahead of the plan


def _plan(method: DynamicMethod, densities: Densities, start: float, total_steps: int) -> _Plan:
    first_step = round(start * total_steps)
    if not 0.0 <= start <= 1.0 or method.last_update <= first_step:
        raise ValueError(
            f"method {method.name!r} needs an update after start and before stop, got start {start}, "
            f"stop at batch {method.stop_step} of {total_steps} and an update every {method.interval}"
        )
    if isinstance(densities, Mapping):
        by_name = dict(zip(plain_names(densities), densities.values(), strict=True))
    else:
        by_name = dict.fromkeys(method.layers, float(densities))
    # layers that the final allocation keeps dense need not be sparse layers
    known = {*method.layers, *method.untouched}
    unknown = [name for name, density in by_name.items() if name not in known and density < 1.0]
    missing = [name for name in method.layers if name not in by_name]
    if unknown or missing:
        raise ValueError(f"densities do not fit the model: no sparse layers {unknown}, without a density {missing}")
    last = {}
    for name, layer in method.layers.items():
        last[layer] = blocks_of(by_name[name], layer.topology.grid)
        if not 0 <= last[layer] <= layer.topology.num_blocks:
            raise ValueError(
                f"layer {name!r} cannot be pruned from density {1.0 - layer.sparsity:.4f} to {by_name[name]}"
            )
    return _Plan(Cubic(1.0, 0.0, method.last_update - first_step), first_step, last)


class _Pruning(DynamicMethod):
    """What both methods have in common: their runs start with more weights than they end with."""

    Options = PruningOptions
    resizes = True
    default_start_sparsity = 0.0
    plan: _Plan

    @classmethod
    def _first(cls, options: PruningOptions) -> float:
        return cls.default_start_sparsity if options.start_sparsity is None else options.start_sparsity

    @classmethod
    def check_options(cls, options: PruningOptions, sparsity: float) -> None:
        if not 0.0 <= cls._first(options) <= sparsity:
            raise ValueError(
                f"{cls.name!r} goes from start_sparsity to sparsity, need 0 <= {cls._first(options)} <= {sparsity}"
            )

    @classmethod
    def start_sparsity(cls, options: PruningOptions, *_: Any) -> float:
        return cls._first(options)

    @classmethod
    def arguments(cls, options: PruningOptions, run: TrainingRun) -> dict[str, Any]:
        return {**super().arguments(options, run), "densities": run.densities()}

    @classmethod
    def training_flops(cls, flops: TrainingFlops) -> float:
        """``3 f`` with f the mean along the cubic, ``a f_start + (e - a) (f_S + (f_start - f_S) / 4) + (1 - e) f_S``.

        a is the share of the training before the first update, e that until ``stop``.
        """
        updating = cls._while_pruning(flops)
        return (3 * updating + (1 - flops.update_fraction) * flops.step) / (3 * flops.dense)

    @staticmethod
    def _while_pruning(flops: TrainingFlops) -> float:
        """Forward FLOPs an example while it updates, summed over that share of the training."""
        start, last = flops.dense if flops.start is None else flops.start, flops.sparse
        before = flops.start_fraction
        return before * start + (flops.update_fraction - before) * (last + (start - last) / 4)

    def _ever_updates(self) -> bool:
        return True  # or there is no plan

    def final_blocks(self, layer: SparseLayer) -> int:
        return self.plan.last[layer]


class GMP(_Pruning):
    """Gradual magnitude pruning (Zhu & Gupta 2018): drop the smallest weights along a cubic, grow nothing.

    Each layer goes from its present number of blocks (all of them for a dense start) to its final density, as in
    ``s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3``, which the last update before ``stop`` reaches exactly. An
    update comes after that batch's optimizer step.

    Args:
        model ... moved_state: as :class:`DynamicMethod`; the layers' present topologies are the start.
        densities: final density of each sparse layer by name, as
            :func:`sparse_moon.nn.layer_densities` gives it, or one for all.
        start: share of the training before which nothing is pruned, in [0, 1].

    Raises:
        ValueError: densities that do not fit the model or are above the present ones, or no update between start and
            stop.
    """

    name = "gmp"
    unread = ("drop_fraction",)
    replaces_step = False
    exchanges = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        densities: Densities,
        start: float = 0.0,
        **arguments: Unpack[UpdateArguments],
    ) -> None:
        super().__init__(model, optimizer, **arguments)
        self.plan = _plan(self, densities, start, self.total_steps)

    @property
    def updates_now(self) -> bool:
        return super().updates_now and self.steps > self.plan.first_step

    def counts(self, layer: SparseLayer) -> tuple[int, int]:
        kept = self.plan.blocks(layer, self.first_blocks[layer], self.steps)
        return layer.topology.num_blocks - kept, 0


class GraNet(_Pruning, RigL):
    """Gradual pruning with zero-cost neuroregeneration (Liu et al. 2021): :class:`GMP`'s prune, then RigL's exchange.

    An update prunes each layer to the cubic's number of blocks, then drops the share ``f(t)`` of those left with the
    smallest sum of ``|w|`` and grows as many where the dense gradient is largest. It takes the place of that batch's
    optimizer step. Before ``start`` the exchange goes on without pruning.

    Args:
        model ... moved_state: as :class:`SET`, but ``drop_fraction`` is by default half a cosine from 0.5 to 0.
        densities, start: as :class:`GMP`.
    """

    name = "granet"
    default_start_sparsity = 0.5
    default_drop_fraction = 0.5

    @classmethod
    def training_flops(cls, flops: TrainingFlops) -> float:
        """As :class:`GMP`, and the dense weight gradient, ``(f_D - f) / dT``, until the last update."""
        updating = cls._while_pruning(flops)
        gradients = (flops.update_fraction * flops.dense - updating) / flops.interval
        return (3 * updating + gradients + (1 - flops.update_fraction) * flops.step) / (3 * flops.dense)

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        densities: Densities,
        start: float = 0.0,
        **arguments: Unpack[ExchangeArguments],
    ) -> None:
        super().__init__(model, optimizer, **arguments)
        self.plan = _plan(self, densities, start, self.total_steps)

    def counts(self, layer: SparseLayer) -> tuple[int, int]:
        kept = self.plan.blocks(layer, self.first_blocks[layer], self.steps)
        exchanged = int(self.drop_fraction(self.steps) * kept)
        return layer.topology.num_blocks - kept + exchanged, exchanged
