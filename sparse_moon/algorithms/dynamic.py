"""The frame of methods that change the topology."""

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn, Required, Self, TypedDict

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import LBFGS, Optimizer

from sparse_moon import ops
from sparse_moon.algorithms.method import Method
from sparse_moon.algorithms.optimizers import (
    check_state,
    inner_optimizers,
    is_stepping,
    keeps_state,
    move_state,
    parameters_of,
    unscale_,
)
from sparse_moon.algorithms.run import TrainingRun
from sparse_moon.distributed import sum_over_processes
from sparse_moon.nn import SparseLayer, sparse_layers
from sparse_moon.ops.drop_and_grow import Regrown
from sparse_moon.sharding import gathered, part_of, reshard


class UpdateArguments(TypedDict, total=False):
    """What every dynamic method takes by keyword, for subclasses to pass on; see :class:`DynamicMethod`."""

    total_steps: Required[int]
    interval: int
    stop: float
    moved_state: Collection[str]


class DynamicMethod(Method):
    """Every ``interval`` batches each layer drops its worst blocks and grows others, until ``stop``.

    A method is what it answers to three questions: how many blocks go and come (:meth:`counts`), which go
    (:meth:`drop_score`, lowest first) and which come (:meth:`grow_score`, highest first). A new weight and its
    optimizer state start anew; one that is dropped and at once comes back keeps both. From ``stop`` on the topology is
    frozen. A layer that has no gradient, or nothing but zeros, in an update batch keeps its topology.

    Where the number of a layer's blocks changes, ``values`` stays the same parameter with fewer or more numbers, and a
    model in DistributedDataParallel is to be wrapped anew after a :meth:`step` that returns True: its buffers have the
    old size.

    Args:
        model: with sparse layers, possibly wrapped; all processes reach the same topology.
        optimizer: over the model's parameters. State that it keeps for each weight moves with the weight: tensors of
            as many rows as the layer has blocks.
        total_steps: length of the training, in batches (optimizer steps).
        interval: batches from update to update.
        stop: share of the training after which the topology is frozen, in [0, 1].
        moved_state: names of optimizer state that must be there and move.

    Raises:
        ValueError: no sparse layer to train, layers with factors of :func:`sparse_moon.lora`, a number out of range, or
            an optimizer with one state for all weights (LBFGS).
    """

    updates = True
    replaces_step = True
    """Whether an update takes the place of that batch's optimizer step, or comes after it."""
    exchanges = True
    """Whether an update needs the gradient of a layer: without one the layer keeps its topology, or is only pruned."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        total_steps: int,
        interval: int = 100,
        stop: float = 0.75,
        moved_state: Collection[str] = (),
    ) -> None:
        super().__init__(model, optimizer)
        if not sparse_layers(model):
            raise ValueError(f"method {self.name!r} needs a model with sparse layers; call sparsify(model, ...) first")
        adapted = [n for n, layer in {**self.layers, **self.untouched}.items() if layer.lora is not None]
        if adapted and (not self.layers or not self.layers.keys().isdisjoint(adapted)):
            raise ValueError(
                f"method {self.name!r} moves weights, with which the factors of sm.lora do not move, those of "
                f"{adapted}: sm.merge_lora(model) first, or take method 'static'"
            )
        if not self.layers:
            raise ValueError(
                f"method {self.name!r} needs sparse layers that train, all are frozen: {list(self.untouched)}"
            )
        if total_steps < 1 or interval < 1 or not 0.0 <= stop <= 1.0:
            raise ValueError(
                f"total_steps and interval must be positive and stop in [0, 1], got {total_steps}, {interval}, {stop}"
            )
        if any(isinstance(inner, LBFGS) for inner in inner_optimizers(optimizer)):
            raise ValueError(
                f"method {self.name!r} cannot train with LBFGS, whose history is of all weights at once and does not "
                "move with them: take SGD or Adam, or method 'static'"
            )
        self.moved_state = frozenset(moved_state)
        self.interval = interval
        self.total_steps = total_steps
        self.stop_step = round(stop * total_steps)
        self.first_blocks = {layer: layer.topology.num_blocks for layer in self.layers.values()}
        if stop > 0.0 and not self._ever_updates():
            warnings.warn(
                f"method {self.name!r} never updates the topology: with an update every {interval} batches the first "
                f"comes after the last one that may update, {self.stop_step} of {total_steps}",
                stacklevel=3,
            )
        self._stepped = False
        self._told: set[str] = set()  # what was said once
        self._prints = self._fingerprints()
        self._check_devices()
        self._watch()

    @classmethod
    def arguments(cls, options: Any, run: TrainingRun) -> dict[str, Any]:
        return {"total_steps": run.total_steps, "interval": run.interval, "stop": run.stop}

    def _ever_updates(self) -> bool:
        return self.last_update > 0

    def _watch(self) -> None:
        inner_optimizers(self.optimizer)[-1].register_step_post_hook(self._notice)

    def _notice(self, optimizer: Optimizer, *_: Any) -> None:
        """After each step of the optimizer."""
        if not self._stepped and not is_stepping(optimizer):
            self._stepped = True  # one warning is enough
            warnings.warn(
                f"optimizer.step() was called and not {type(self).__name__}.step(), so the topology never changes: "
                "call method.step() in its place, or method.attach() once",
                stacklevel=3,
            )

    def counts(self, layer: SparseLayer) -> tuple[int, int]:
        """How many blocks go, and how many come."""
        raise NotImplementedError

    def drop_score(self, layer: SparseLayer) -> Tensor:
        """One score an existing block (n,): the lowest go. Here the sum of ``|w|``."""
        return layer.topology.value_scores(layer.values.detach())

    def grow_score(self, layer: SparseLayer) -> Tensor | None:
        """One score a block of the grid (rows / bh, cols / bw): the highest come. None where nothing ever grows."""
        return None

    def final_blocks(self, layer: SparseLayer) -> int | None:
        """How many blocks the layer is to end with, where their number changes on the way."""
        return None

    def behind(self) -> list[str]:
        """The layers that have another number of blocks than they are to end with."""
        layers = self.layers.items()
        return [name for name, layer in layers if self.final_blocks(layer) not in (None, layer.topology.num_blocks)]

    @property
    def updates_now(self) -> bool:
        if not 0 < self.steps < self.stop_step:
            return False
        if self.steps % self.interval == 0:
            return True
        # the last update, where it was refused for gradients that were not finite
        late = self.resizes and self.replaces_step and self.steps > self.last_update
        return late and any(self.layers[name].values.requires_grad for name in self.behind())

    @property
    def last_update(self) -> int:
        """Number of the batch with the last update, 0 where there is none."""
        return max(self.stop_step - 1, 0) // self.interval * self.interval

    def step(self, scaler: GradScaler | None = None, closure: Callable[[], Any] | None = None) -> bool:
        if not self._steps_now(scaler):
            return False
        self._stepped = True
        self._check_loaded()
        updates = updated = self.updates_now
        if updates and self.replaces_step:
            if closure is not None:
                with torch.enable_grad():
                    closure()
            updated = self._check_gradients(scaler)
        else:
            self._step_optimizer(scaler, closure)
        if updated:
            self._update()
        if updates:
            self.optimizer.zero_grad()  # these gradients belong to the topology before the update
        self.next_batch()
        return updated

    @property
    def unfinished(self) -> str | None:
        if self.resizes and self.steps < self.stop_step:
            return (
                f"method {self.name!r} made {self.steps} of the {self.stop_step} steps to its final density. Where a "
                "gradient scaler skips a step, an attached method makes none either: take fewer total_steps, or "
                "bfloat16"
            )
        if behind := self.behind():
            return (
                f"method {self.name!r} did not bring {behind} to their final density: they were frozen before, or the "
                "gradients of its last updates were not finite"
            )
        return None

    def next_batch(self) -> None:
        super().next_batch()
        self._prepare()

    def state_dict(self) -> dict[str, Any]:
        first = list(self.first_blocks.values())
        return {**super().state_dict(), "first_blocks": first, "last_update": self.last_update}

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        if len(state["first_blocks"]) != len(self.layers):
            raise ValueError(
                f"the state of method {self.name!r} is of {len(state['first_blocks'])} layers, and here it trains "
                f"{len(self.layers)}, {list(self.layers)}, and not {list(self.untouched)}: make it with the layers "
                "frozen that were frozen then"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        then = state.get("last_update", 0)  # a state of before has none
        if self.last_update < self.steps <= then:
            warnings.warn(
                f"method {self.name!r} updates the topology no more: its state is of {self.steps} batches, after which "
                f"updates went on until batch {then}, and here the last one is at batch {self.last_update} of "
                f"{self.total_steps}",
                stacklevel=2,
            )
        self._prints = dict.fromkeys(self.layers)  # the model may be loaded after this
        self.first_blocks = dict(zip(self.layers.values(), state["first_blocks"], strict=True))
        self._prepare()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        other = super().__deepcopy__(memo)
        other._watch()  # copied optimizers have no hooks
        other._prepare()  # copied layers give no dense gradient until they are asked anew
        return other

    def __reduce__(self) -> NoReturn:  # files have no hooks of tensors and optimizers
        raise TypeError(
            f"method {self.name!r} cannot be pickled: keep its state_dict(), and those of the model and the optimizer"
        )

    def _prepare(self) -> None:
        """Called before each batch."""
        if self.updates_now:
            reshard(self.sharding_modules)

    def _check_gradients(self, scaler: GradScaler | None) -> bool:
        """Whether the update may use this batch's gradients; without a scaler others than finite ones are an error."""
        scaler = unscale_(scaler, self.optimizer)  # which also notes overflows
        finite = self._gradients_finite()
        if scaler is not None and not self.attached:
            scaler.update()
        elif not finite and self.attached:  # to an optimizer that perhaps a scaler calls, which looks at less
            self._tell_once(
                "not finite", f"the gradients at batch {self.steps} are not finite: no topology is updated there"
            )
        elif not finite:
            raise ValueError(f"the gradients at batch {self.steps} are not finite, the topology cannot be updated")
        return finite

    def _gradients_finite(self) -> bool:
        """Whether the gradients that the scores read are finite, on every process."""
        return True

    def takes_part(self, layer: SparseLayer) -> bool:
        """Whether the layer has a gradient in this batch, of anything but zeros, on any process."""
        grad = layer.values.grad
        there = torch.zeros((), device=layer.values.device) if grad is None else part_of(grad).any().float()
        return bool(sum_over_processes(there))

    def regrow(self, layer: SparseLayer) -> Regrown | None:
        """Choose the layer's next topology; None where it stays as it is."""
        drop, grow = self.counts(layer)
        if self.exchanges and not self.takes_part(layer):
            drop, grow = max(drop - grow, 0), 0
            if not drop:
                return None
        score = self.grow_score(layer) if grow else None
        return ops.drop_and_grow(self.drop_score(layer), score, layer.topology, drop, grow)

    @torch.no_grad()
    def _update(self) -> None:
        reshard(self.sharding_modules)
        self._check_layers()
        self._check_devices()
        training = [layer for layer in self.layers.values() if layer.values.requires_grad]
        for layer in training:  # before anything has moved
            check_state(self.optimizer, layer.values, self.moved_state)
        moved = 0
        for layer in training:
            with gathered(layer, "values", layer.values):
                regrown = self.regrow(layer)
            if regrown is not None:
                moved += 1
                move_state(self.optimizer, layer.values, regrown)
                layer.replace_(regrown.index, regrown.remap(layer.values))
        if not moved:
            self._tell_once(
                "no gradient",
                f"no layer had a gradient in the update of {type(self).__name__} at batch {self.steps}, or nothing but "
                "zeros, so no topology changed: it looks at what backward() leaves in the parameters' grad, not at "
                "gradients that are computed and assigned by other ways",
            )
        self._prints = self._fingerprints()
        self._check_processes(f"after the update at batch {self.steps}")

    def _fingerprints(self) -> dict[str, int | None]:
        """Of each layer's topology; None where any will do."""
        return {name: layer.topology.fingerprint for name, layer in self.layers.items()}

    def _check_loaded(self) -> None:
        """Whether the layers still have the topologies that the method has left them with."""
        now = self._fingerprints()
        if other := [name for name in now if self._prints[name] not in (None, now[name])]:
            self._meet_loaded(other)
        self._prints = now

    def _meet_loaded(self, names: list[str]) -> None:
        """Other code has given these layers another topology, as ``load_state_dict`` of the model does."""
        if stale := [name for name in names if keeps_state(self.optimizer, self.layers[name].values)]:
            self._tell_once(
                "loaded",
                f"the model was loaded: {stale} have other topologies than before batch {self.steps}, and what the "
                "optimizer keeps for each weight, as momentum, is still that of the weights before. Load the state of "
                f"the optimizer and of method {self.name!r} that go with the model's, too",
                stacklevel=5,
            )

    def _check_devices(self) -> None:
        """Whether values and index are on one device, as an update needs them."""
        for name, layer in self.layers.items():
            values, index = part_of(layer.values).device, layer.topology.col.device
            if values != index:
                raise ValueError(
                    f"method {self.name!r} cannot update layer {name!r}, whose values are on {values} and whose index "
                    f"is on {index}: they have to be on one device, which a CPUOffloadPolicy does not leave them on"
                )

    def _check_layers(self) -> None:
        """Whether the optimizer trains what it trained when the method was made."""
        held = {id(parameter) for parameter in parameters_of(self.optimizer)}
        gone = [name for name, layer in self.layers.items() if id(layer.values) not in held]
        if gone:
            raise ValueError(f"the optimizer of method {self.name!r} does not hold the values of {gone} any more")
        new = [n for n, layer in self.untouched.items() if layer.values.requires_grad and id(layer.values) in held]
        if new:
            self._tell_once(
                "trains later",
                f"{new} train now, but when method {self.name!r} was made they were frozen or not in the optimizer, so "
                f"they keep their topology; {'detach() it and ' if self.attached else ''}make the method anew",
            )

    def _tell_once(self, kind: str, message: str, stacklevel: int = 4) -> None:
        if kind not in self._told:
            self._told.add(kind)
            warnings.warn(message, stacklevel=stacklevel)
