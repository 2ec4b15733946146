"""Methods that keep the number of weights and exchange the worst for others: SET, MEST and RigL."""

from functools import partial
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_moon.algorithms.dense_gradient import DenseGradient
from sparse_moon.algorithms.dynamic import DynamicMethod, UpdateArguments
from sparse_moon.algorithms.run import TrainingFlops, TrainingRun
from sparse_moon.distributed import mean_over_processes_, sum_over_processes, world_size
from sparse_moon.nn import SparseLayer
from sparse_moon.ops.bernoulli_mask import random_scores
from sparse_moon.ops.drop_and_grow import Regrown
from sparse_moon.options import MESTOptions
from sparse_moon.schedules import Cosine, Schedule
from sparse_moon.sharding import gathered, is_sharded, part_of

# Random growth draws from streams of its own, apart from those that number masks.
_GROWTH_STREAM = 1 << 31


class ExchangeArguments(UpdateArguments, total=False):
    """What :class:`SET` takes by keyword, for subclasses to pass on."""

    drop_fraction: Schedule | None
    seed: int
    backwards_per_step: int


class SET(DynamicMethod):
    """Sparse evolutionary training (Mocanu et al. 2018): drop the smallest weights, grow at random.

    Per layer ``n = floor(f(t) * blocks)``: the ``n`` blocks with the smallest sum of ``|w|`` go and ``n`` others come,
    chosen uniformly among those inactive after the drop. The update takes the place of that batch's optimizer step.

    Args:
        model ... moved_state: as :class:`DynamicMethod`.
        drop_fraction: schedule f of the batch number; default half a cosine from 0.3 to 0 over ``stop * total_steps``.
        seed: of the random growth.
        backwards_per_step: backward passes that are accumulated before each :meth:`step`.
    """

    name = "set"
    default_drop_fraction = 0.3

    @classmethod
    def exchanges_evenly(cls, options: Any) -> bool:
        return not cls.resizes

    @classmethod
    def arguments(cls, options: Any, run: TrainingRun) -> dict[str, Any]:
        own = {"drop_fraction": run.drop_schedule, "seed": run.seed, "backwards_per_step": run.backwards_per_step}
        return {**super().arguments(options, run), **own}

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        drop_fraction: Schedule | None = None,
        seed: int = 0,
        backwards_per_step: int = 1,
        **arguments: Unpack[UpdateArguments],
    ) -> None:
        super().__init__(model, optimizer, **arguments)
        if backwards_per_step < 1:
            raise ValueError(f"backwards_per_step must be positive, got {backwards_per_step}")
        if drop_fraction is None:
            drop_fraction = Cosine(self.default_drop_fraction, 0.0, max(self.stop_step, 1))
        elif not callable(drop_fraction):
            raise ValueError(
                "drop_fraction must be a schedule, such as Constant(0.3) or Cosine(0.3, 0.0, steps), "
                f"got {drop_fraction!r}"
            )
        self.drop_fraction = drop_fraction
        for batch in (self.interval, self.last_update):
            if not 0.0 <= drop_fraction(batch) <= 1.0:
                raise ValueError(f"drop_fraction must be in [0, 1], got {drop_fraction(batch)} at batch {batch}")
        self.seed = seed
        self.backwards_per_step = backwards_per_step
        self._streams = {layer: _GROWTH_STREAM + number for number, layer in enumerate(self.layers.values())}
        self._prepare()

    def counts(self, layer: SparseLayer) -> tuple[int, int]:
        count = int(self.drop_fraction(self.steps) * layer.topology.num_blocks)
        return count, count

    def grow_score(self, layer: SparseLayer) -> Tensor:
        rows, cols = layer.topology.grid
        step = torch.tensor(self.steps, device=layer.values.device)
        return random_scores(rows * cols, seed=self.seed, stream=self._streams[layer], step=step).view(rows, cols)


class MEST(SET):
    """Memory-economic sparse training (Yuan et al. 2021): as :class:`SET`, but drop by ``|w| + lambda |dL/dw|``.

    The gradient is that of the existing weights, summed over accumulated backward passes and averaged over processes
    by DistributedDataParallel; none is ever dense. The default is MEST+EM. With ``soft_memory_bound`` it is MEST+EM&S:
    the first update grows without dropping, each later one drops back to the layer's first number of blocks and grows
    anew, and the last one only drops, so that between updates a layer holds ``floor(f(t) * blocks)`` more than in the
    end and new weights are trained before they have to compare.

    Args:
        model ... moved_state: as :class:`SET`.
        gradient_weight: lambda, at least 0.
        soft_memory_bound: grow before the drop (EM&S).
    """

    name = "mest"
    Options = MESTOptions

    @classmethod
    def exchanges_evenly(cls, options: MESTOptions) -> bool:
        return not options.soft_memory_bound

    @classmethod
    def arguments(cls, options: MESTOptions, run: TrainingRun) -> dict[str, Any]:
        own = {"gradient_weight": options.gradient_weight, "soft_memory_bound": options.soft_memory_bound}
        return {**super().arguments(options, run), **own}

    @classmethod
    def growth(cls, options: MESTOptions, drop_fraction: float, stop: float) -> float:
        """The mean of the cosine: the share of a layer's weights, which is that of its FLOPs."""
        return drop_fraction / 2 * stop if options.soft_memory_bound else 0.0

    @classmethod
    def training_flops(cls, flops: TrainingFlops) -> float:
        """``3 f_S``, and ``3 f_S (1 + growth)`` with the soft memory bound."""
        return (1.0 + flops.growth) * flops.step / (3 * flops.dense)

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        gradient_weight: float = 0.01,
        soft_memory_bound: bool = False,
        **arguments: Unpack[ExchangeArguments],
    ) -> None:
        self.resizes = soft_memory_bound
        super().__init__(model, optimizer, **arguments)
        if gradient_weight < 0.0:
            raise ValueError(f"gradient_weight must be at least 0, got {gradient_weight}")
        self.gradient_weight = gradient_weight

    def final_blocks(self, layer: SparseLayer) -> int | None:
        return self.first_blocks[layer] if self.resizes else None

    def counts(self, layer: SparseLayer) -> tuple[int, int]:
        if not self.resizes:
            return super().counts(layer)
        first, present = self.first_blocks[layer], layer.topology.num_blocks
        grow = 0 if self.steps >= self.last_update else int(self.drop_fraction(self.steps) * first)
        room = layer.topology.grid[0] * layer.topology.grid[1] - first
        return present - first, min(grow, room)

    def drop_score(self, layer: SparseLayer) -> Tensor:
        score = super().drop_score(layer)
        if layer.values.grad is None:  # took no part in this batch
            return score
        return score + self.gradient_weight * layer.topology.value_scores(layer.values.grad)

    def _gradients_finite(self) -> bool:
        grads = [part_of(layer.values.grad) for layer in self.layers.values() if layer.values.grad is not None]
        if not grads:
            return True
        infinite = torch.stack([grad.isfinite().all().logical_not() for grad in grads]).any()
        return not sum_over_processes(infinite.float())


class RigL(SET):
    """RigL (Evci et al. 2020): as :class:`SET`, but grow where the dense gradient is largest.

    The growth score of a block is the sum of ``|dL/dw|`` over it, of the masked network's dense gradient, summed over
    accumulated backward passes and averaged over processes. The dense gradient exists only on update batches, one layer
    at a time: a layer's choice is made as soon as its gradient is there. With several backward passes a step or
    several processes it is kept until :meth:`step`, for all layers.
    """

    name = "rigl"

    @classmethod
    def training_flops(cls, flops: TrainingFlops) -> float:
        """An update needs the dense weight gradient, ``2 f_S + f_D``, in place of a step or as an extra pass."""
        update = 2 * flops.sparse + flops.dense
        steps = flops.interval - 1 if flops.updates_replace_step else flops.interval
        return flops.ratio((flops.step * steps + update) / (steps + 1))

    def grow_score(self, layer: SparseLayer) -> Tensor:
        return layer.topology.block_scores(self._present[layer], overwrite=True)

    def _prepare(self) -> None:
        for gradient in getattr(self, "_gradients", {}).values():
            gradient.close()
        self._gradients: dict[SparseLayer, DenseGradient] = {}
        self._present: dict[SparseLayer, Tensor] = {}  # dense gradients while they are there
        self._choices: dict[SparseLayer, _Choice] = {}
        if not self.updates_now:
            return
        for layer in self.layers.values():
            if not layer.values.requires_grad:  # frozen by now
                continue
            # the processes that share a sharded layer go through its backward pass together, in any case
            at_once = self.backwards_per_step == 1 and (world_size() == 1 or is_sharded(layer.values))
            reduce = partial(self._choose, layer) if at_once else None
            self._gradients[layer] = DenseGradient(self.tied[layer], reduce)

    @torch.no_grad()
    def _choose(self, layer: SparseLayer, grad: Tensor) -> "_Choice":
        mean_over_processes_(grad)
        self._present[layer] = grad
        finite, nonzero = grad.isfinite().all(), grad.any()
        try:
            with gathered(layer, "values", self._gradients[layer].values):
                return _Choice(self.choose(layer), finite, nonzero)
        finally:
            del self._present[layer]

    def choose(self, layer: SparseLayer) -> Regrown:
        """Choose the layer's next topology while its dense gradient is there."""
        regrown = super().regrow(layer)
        assert regrown is not None
        return regrown

    def takes_part(self, layer: SparseLayer) -> bool:
        return layer in self._present or (layer in self._choices and bool(self._choices[layer].nonzero))

    def regrow(self, layer: SparseLayer) -> Regrown | None:
        return self._choices[layer].regrown if self.takes_part(layer) else super().regrow(layer)

    def _gradients_finite(self) -> bool:
        gradients = self._gradients
        self._choices = {}  # a try that was refused may have left some
        if not gradients:
            return True
        there = torch.tensor([float(gradient.there) for gradient in gradients.values()], dtype=torch.float32)
        device = next(iter(gradients)).values.device
        anywhere = sum_over_processes(there.to(device)).tolist()  # the same layers take part on every process
        for (layer, gradient), count in zip(gradients.items(), anywhere, strict=True):
            if not count:
                continue
            if isinstance(gradient.reduced, _Choice):
                self._choices[layer] = gradient.reduced
                continue
            total = gradient.total if gradient.there else None
            if total is None:
                total = layer.values.new_zeros(layer.topology.shape)
            self._choices[layer] = self._choose(layer, total)
        return all(bool(choice.finite) for choice in self._choices.values())


class _Choice(NamedTuple):
    regrown: Regrown
    finite: Tensor
    nonzero: Tensor
    """Whether the gradient was finite, and whether it was anything but zeros, 0-d bool."""
