"""Dynamic sparse training: when and how the topology changes, and what happens to the optimizer state then.

method = RigL(model, optimizer, total_steps=len(loader) * epochs)
for images, labels in loader:
    criterion(model(images), labels).backward()
    method.step()  # the optimizer's step, or on an update batch the topology update in its place
    optimizer.zero_grad()
"""

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adam, AdamW, Optimizer

from sparse_moon import ops
from sparse_moon.distributed import mean_over_processes_, world_size
from sparse_moon.nn import SparseLayer, sparse_layers
from sparse_moon.ops.bernoulli_mask import random_scores
from sparse_moon.ops.drop_and_grow import Regrown
from sparse_moon.schedules import Cosine, Schedule

# Per-weight state that moves with its weight, and state that does not belong to single weights.
_MOVED_STATE = {SGD: {"momentum_buffer"}, Adam: {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}}
_MOVED_STATE[AdamW] = _MOVED_STATE[Adam]
_OTHER_STATE = {"step"}

# Random growth draws from streams of its own, apart from those that number masks.
_GROWTH_STREAM = 1 << 31


class Method:
    """A training method: :meth:`step` once a batch, in place of ``optimizer.step()``.

    The base class never changes a topology: as :class:`Static` it trains a fixed sparse network, as :class:`Dense` the
    baseline. ``steps`` counts finished batches, topology updates included.
    """

    name = "method"

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.layers = sparse_layers(model)
        self.steps = 0

    def step(self, scaler: GradScaler | None = None) -> bool:
        """Finish a batch whose gradients are ready.

        Args:
            scaler: under automatic mixed precision the scaler of the loss; it unscales, steps and updates here.

        Returns:
            True where the topology was updated instead of the weights.
        """
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
        self.steps += 1
        return False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the model's and the optimizer's own state."""
        return {"name": self.name, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`, taken between two batches."""
        if state["name"] != self.name:
            raise ValueError(f"the state is of method {state['name']!r}, this is {self.name!r}")
        self.steps = state["steps"]


class Dense(Method):
    """The dense baseline.

    Raises:
        ValueError: the model has sparse layers.
    """

    name = "dense"

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        super().__init__(model, optimizer)
        if self.layers:
            raise ValueError(f"method 'dense' got a model with sparse layers: {list(self.layers)}")


class Static(Method):
    """A random sparse network that keeps its topology."""

    name = "static"


class SET(Method):
    """Sparse evolutionary training (Mocanu et al. 2018): drop the smallest weights, grow at random.

    Every ``interval`` batches, per layer: ``n = floor(f(t) * blocks)``, the ``n`` blocks with the smallest sum of
    ``|w|`` go and ``n`` others come, chosen uniformly among those inactive after the drop. A new weight and its
    optimizer state are 0; one that is dropped and at once comes back keeps both. The update takes the place of that
    batch's optimizer step. From ``stop`` on the topology is frozen.

    Args:
        model: with sparse layers, possibly wrapped in DistributedDataParallel; all processes reach the same topology.
        optimizer: SGD, Adam or AdamW over the model's parameters; for another class name its per-weight state in
            ``moved_state``.
        total_steps: length of the training, in batches (optimizer steps).
        interval: batches from update to update.
        stop: share of the training after which the topology is frozen, in [0, 1].
        drop_fraction: schedule of the batch number; default half a cosine from 0.3 to 0 over ``stop * total_steps``.
        seed: of the random growth.
        backwards_per_step: backward passes that are accumulated before each :meth:`step`.
        moved_state: names of further per-weight optimizer state that moves with its weight.

    Raises:
        ValueError: no sparse layer, a number out of range, or an optimizer whose state is not known.
    """

    name = "set"

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        total_steps: int,
        interval: int = 100,
        stop: float = 0.75,
        drop_fraction: Schedule | None = None,
        seed: int = 0,
        backwards_per_step: int = 1,
        moved_state: Collection[str] = (),
    ) -> None:
        super().__init__(model, optimizer)
        if not self.layers:
            raise ValueError(f"method {self.name!r} needs a model with sparse layers; call sparsify(model, ...) first")
        if total_steps < 1 or interval < 1 or backwards_per_step < 1 or not 0.0 <= stop <= 1.0:
            raise ValueError(
                "total_steps, interval and backwards_per_step must be positive and stop in [0, 1], "
                f"got {total_steps}, {interval}, {backwards_per_step}, {stop}"
            )
        if type(optimizer) not in _MOVED_STATE and not moved_state:
            known = ", ".join(kind.__name__ for kind in _MOVED_STATE)
            raise ValueError(
                f"the state of {type(optimizer).__name__} is not known (known: {known}); "
                "name its per-weight state in moved_state"
            )
        self.moved_state = _MOVED_STATE.get(type(optimizer), set()) | set(moved_state)
        self.interval = interval
        self.stop_step = round(stop * total_steps)
        self.drop_fraction = drop_fraction or Cosine(0.3, 0.0, max(self.stop_step, 1))
        self.seed = seed
        self.backwards_per_step = backwards_per_step
        self._prepare()

    @property
    def updates_now(self) -> bool:
        """Whether the batch in progress ends with a topology update."""
        return 0 < self.steps < self.stop_step and self.steps % self.interval == 0

    def step(self, scaler: GradScaler | None = None) -> bool:
        if not self.updates_now:
            super().step(scaler)
            self._prepare()
            return False
        updated = True
        if scaler is not None:
            # only so that the scaler notes overflows: scores are compared, and their scale cancels
            with suppress(RuntimeError):  # "already been called", where the caller clips gradients
                scaler.unscale_(self.optimizer)
        if self._gradients_finite():
            self._update()
        elif scaler is None:
            raise ValueError(f"the gradients at batch {self.steps} are not finite, the topology cannot be updated")
        else:
            updated = False
        if scaler is not None:
            scaler.update()
        self.optimizer.zero_grad()  # these gradients belong to the topology before the update
        self.steps += 1
        self._prepare()
        return updated

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._prepare()

    def _prepare(self) -> None:
        """Called before each batch."""

    def _gradients_finite(self) -> bool:
        """Whether the gradients that growth reads are finite, on every process."""
        return True

    def _regrow(self, layer: SparseLayer, stream: int, count: int) -> Regrown:
        """Choose the layer's next topology; ``stream`` is the layer's number."""
        grid = layer.topology.grid
        step = torch.tensor(self.steps, device=layer.values.device)
        score = random_scores(grid[0] * grid[1], seed=self.seed, stream=_GROWTH_STREAM + stream, step=step)
        return self._drop_and_grow(layer, score.view(grid), count)

    def _drop_and_grow(self, layer: SparseLayer, grow_score: Tensor, count: int) -> Regrown:
        drop_score = layer.topology.value_scores(layer.values.detach())
        return ops.drop_and_grow(drop_score, grow_score, layer.topology, count)

    def _count(self, layer: SparseLayer) -> int:
        return int(self.drop_fraction(self.steps) * layer.topology.num_blocks)

    @torch.no_grad()
    def _update(self) -> None:
        for stream, layer in enumerate(self.layers.values()):
            regrown = self._regrow(layer, stream, self._count(layer))
            self._move_state(layer.values, regrown)
            layer.values.copy_(regrown.remap(layer.values))
            layer.topology.replace_(regrown.index)

    def _move_state(self, values: nn.Parameter, regrown: Regrown) -> None:
        for key, state in self.optimizer.state.get(values, {}).items():
            if key in self.moved_state:
                if state is not None:
                    state.copy_(regrown.remap(state))
            elif key not in _OTHER_STATE:
                raise ValueError(
                    f"{type(self.optimizer).__name__} keeps {key!r} for each weight, and whether it moves with the "
                    "weight is not known: name it in moved_state"
                )


class RigL(SET):
    """RigL (Evci et al. 2020): as :class:`SET`, but grow where the dense gradient is largest.

    The growth score of a block is the sum of ``|dL/dw|`` over it, of the masked network's dense gradient, summed over
    accumulated backward passes and averaged over processes. The dense gradient exists only on update batches, one layer
    at a time: a layer's choice is made as soon as its gradient is there. With several backward passes a step or
    several processes it is kept until :meth:`step`, for all layers.
    """

    name = "rigl"

    def _prepare(self) -> None:
        self._choices: dict[SparseLayer, Regrown] = {}
        self._finite: list[Tensor] = []
        for stream, layer in enumerate(self.layers.values()):
            layer.topology.probe = self._probe(layer, stream) if self.updates_now else None

    @property
    def _at_once(self) -> bool:
        return self.backwards_per_step == 1 and world_size() == 1

    def _probe(self, layer: SparseLayer, stream: int) -> Tensor:
        """A leaf without memory of its own whose gradient is the dense gradient."""
        probe = layer.values.detach().new_zeros(()).expand(layer.topology.shape).detach().requires_grad_()
        if self._at_once:
            probe.register_post_accumulate_grad_hook(lambda p: self._choose(layer, p, stream))
        return probe

    @torch.no_grad()
    def _choose(self, layer: SparseLayer, probe: Tensor, stream: int) -> None:
        if layer in self._choices:
            raise RuntimeError(
                "a second backward pass on an update batch: pass backwards_per_step to the training method "
                "where gradients are accumulated"
            )
        self._choices[layer] = self._regrow(layer, stream, self._count(layer))
        probe.grad = None

    def _regrow(self, layer: SparseLayer, stream: int, count: int) -> Regrown:
        if layer in self._choices:
            return self._choices[layer]
        grad = _dense_grad(layer)
        self._finite.append(grad.isfinite().all())
        return self._drop_and_grow(layer, layer.topology.block_scores(grad), count)

    def _gradients_finite(self) -> bool:
        for stream, layer in enumerate(self.layers.values()):
            if layer not in self._choices:
                mean_over_processes_(_dense_grad(layer))
                self._choose(layer, _probe_of(layer), stream)
        return all(bool(finite) for finite in self._finite)


def _probe_of(layer: SparseLayer) -> Tensor:
    assert layer.topology.probe is not None
    return layer.topology.probe


def _dense_grad(layer: SparseLayer) -> Tensor:
    grad = _probe_of(layer).grad
    # a layer that took no part in this batch has no gradient anywhere
    return grad if grad is not None else torch.zeros_like(_probe_of(layer), memory_format=torch.contiguous_format)
