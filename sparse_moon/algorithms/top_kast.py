"""Top-KAST: a network that is sparser in the forward pass than in what it trains."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from sparse_moon.algorithms.optimizers import unscale_
from sparse_moon.algorithms.regrowth import SET, ExchangeArguments
from sparse_moon.algorithms.run import TrainingFlops, TrainingRun
from sparse_moon.nn import SparseLayer, weight_layers
from sparse_moon.nn.projections import as_linear_layers
from sparse_moon.options import TopKASTOptions


class TopKAST(SET):
    """Top-KAST (Jayakumar et al. 2020): the network uses each layer's largest weights, A, and trains more of them, B.

    A layer's existing blocks are B, of density D + M. A, of density D, are the ``round(forward_share * blocks)`` of
    them with the largest sum of ``|w|``, chosen anew every ``interval`` batches. Between two :meth:`step` calls
    ``values`` are 0 outside A: the model *is* the network of A, in training and in evaluation, and the gradients of all
    of B are those at that point (straight through the mask). Inside :meth:`step` the weights of B outside A are there
    again, for the optimizer and the regulariser ``penalty / 2 (sum_A w^2 + sum_{B - A} w^2 / D)``, whose gradient is
    added.

    The original's third set, weights outside B with a remembered value, does not exist in compact storage. In its
    place a selection drops the share ``f(t)`` of B outside A with the smallest sum of ``|w|`` and grows as many at
    random, from 0; ``drop_fraction=Constant(0.0)`` keeps B. The last batch before ``stop`` drops all of B outside A,
    so that a model of density D is left.

    Args:
        model: as :class:`SET`; its sparsity is that of B.
        optimizer ... moved_state: as :class:`SET`; the regulariser takes the place of weight decay.
        forward_share: D / (D + M), in (0, 1].
        penalty: factor of the regulariser, at least 0.
        stop: share of the training after which only A is left, in (0, 1].

    Raises:
        ValueError: a number out of range.
    """

    name = "top-kast"
    Options = TopKASTOptions
    weight_decay_matters = False
    replaces_step = False
    resizes = True

    @classmethod
    def check_options(cls, options: TopKASTOptions, sparsity: float) -> None:
        if (1.0 - sparsity) / options.forward_share >= 1.0:
            raise ValueError(
                f"'top-kast' trains a share {(1 - sparsity) / options.forward_share:g} of the weights, "
                f"it needs a sparsity above {1 - options.forward_share:g}, got {sparsity}"
            )

    @classmethod
    def start_sparsity(
        cls, options: TopKASTOptions, sparsity: float, model: nn.Module, densities: Mapping[str, float]
    ) -> float:
        """That of B."""
        with as_linear_layers(model):
            weights = weight_layers(model)
            sizes = {name: math.prod(weights[name].weight.shape) for name in densities}
        total = sum(sizes.values())
        # layers that end dense have no idle weights, so the others' share of all weights is what counts
        dense = sum(sizes[name] for name in densities if densities[name] >= 1.0)
        active = sum(density * sizes[name] for name, density in densities.items() if density < 1.0)
        kept, counted = (1.0 - sparsity) * total, (1.0 - sparsity) * (total - dense)
        if abs(active - counted) <= abs(active - (kept - dense)):  # an allocation that does not count dense layers
            trained = kept / options.forward_share
        else:
            trained = dense + (kept - dense) / options.forward_share
        return min(1.0 - trained / total, sparsity)  # which a tiny network whose layers end dense would pass

    @classmethod
    def arguments(cls, options: TopKASTOptions, run: TrainingRun) -> dict[str, Any]:
        own = {"forward_share": options.forward_share, "penalty": run.weight_decay}
        return {**super().arguments(options, run), **own}

    @classmethod
    def training_flops(cls, flops: TrainingFlops) -> float:
        """``3 f_start`` until the end of the updates: the kernels here compute with the idle weights as well."""
        start = flops.sparse if flops.start is None else flops.start
        return flops.ratio(3 * start)

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        forward_share: float = 0.5,
        penalty: float = 1e-4,
        **arguments: Unpack[ExchangeArguments],
    ) -> None:
        stop = arguments.setdefault("stop", 1.0)
        if not 0.0 < forward_share <= 1.0 or penalty < 0.0 or stop <= 0.0:
            raise ValueError(
                "forward_share must be in (0, 1], penalty at least 0 and stop in (0, 1], "
                f"got {forward_share}, {penalty}, {stop}"
            )
        self.forward_share, self.penalty = forward_share, penalty
        self._active: dict[SparseLayer, Tensor] = {}  # bool (n,): A among B
        self._hidden: dict[SparseLayer, Tensor] = {}  # the values of B outside A, while they are 0 in the model
        super().__init__(model, optimizer, **arguments)
        if self.stop_step < 1:
            raise ValueError(
                f"the batch after which only A is left is number stop * total_steps, at least 1, got {stop} * "
                f"{self.total_steps}"
            )

    @property
    def updates_now(self) -> bool:
        return super().updates_now or self.steps + 1 == self.stop_step

    def _ever_updates(self) -> bool:
        return True  # what is left is chosen in any case

    def active_blocks(self, layer: SparseLayer) -> int:
        """Number of blocks in A."""
        return round(self.forward_share * self.first_blocks[layer])

    def final_blocks(self, layer: SparseLayer) -> int:
        return self.active_blocks(layer)

    def counts(self, layer: SparseLayer) -> tuple[int, int]:
        idle = layer.topology.num_blocks - self.active_blocks(layer)
        if self.steps + 1 == self.stop_step:
            return idle, 0
        count = int(self.drop_fraction(self.steps) * idle)
        return count, count

    @torch.no_grad()
    def _prepare(self) -> None:
        super()._prepare()
        for layer in self.layers.values():
            if layer not in self._active:
                best = self.drop_score(layer).sort(stable=True, descending=True).indices
                active = torch.zeros_like(best, dtype=torch.bool)
                self._active[layer] = active.index_fill(0, best[: self.active_blocks(layer)], True)
            if layer not in self._hidden:
                self._hidden[layer] = layer.values[~self._active[layer]]
                layer.values[~self._active[layer]] = 0.0
                layer.note_written()

    @torch.no_grad()
    def _step_optimizer(self, scaler: GradScaler | None, closure: Callable[[], Any] | None = None) -> None:
        if closure is not None:  # gradients are those of A, where they are computed
            with torch.enable_grad():
                closure()
        unscale_(scaler, self.optimizer)
        for layer in self.layers.values():
            if not layer.values.requires_grad:  # frozen by now, as it is
                continue
            idle = ~self._active[layer]
            if layer in self._hidden:  # not after a step that failed
                layer.values[idle] = self._hidden.pop(layer)
            if layer.values.grad is not None and self.penalty:
                density = max(self.active_blocks(layer), 1) / (layer.topology.grid[0] * layer.topology.grid[1])
                scale = self.penalty * (1.0 + idle.to(layer.values.dtype) * (1.0 / density - 1.0))
                layer.values.grad += scale.view(-1, *[1] * (layer.values.dim() - 1)) * layer.values
        super()._step_optimizer(scaler)

    def _update(self) -> None:
        super()._update()
        self._active = {layer: a for layer, a in self._active.items() if not layer.values.requires_grad}

    def _meet_loaded(self, names: list[str]) -> None:
        raise RuntimeError(
            f"the model was loaded: {names} have other topologies than before batch {self.steps}, and the values that "
            f"method {self.name!r} keeps outside of the model have no place there. Load the state of the method and of "
            "the optimizer that go with the model's, too, or make both anew"
        )

    def state_dict(self) -> dict[str, Any]:
        active, values = [self._active[layer] for layer in self.layers.values()], []
        for layer in self.layers.values():
            values.append(layer.values.detach().clone())
            values[-1][~self._active[layer]] = self._hidden[layer]
        return {**super().state_dict(), "active": active, "values": values}

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        values = zip(self.layers.items(), state["values"], strict=True)
        if other := [name for (name, layer), kept in values if kept.shape != layer.values.shape]:
            raise ValueError(
                f"the state of method {self.name!r} has other numbers of weights in {other} than the model: load the "
                "model's state first"
            )

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._check_state(state)
        layers = self.layers.values()
        for layer, active, values in zip(layers, state["active"], state["values"], strict=True):
            # all of B: where this object was built around the loaded model it has hidden a part of it
            layer.values.copy_(values)
            self._active[layer] = active.to(layer.values.device)
            self._hidden.pop(layer, None)
        super().load_state_dict(state)
