"""What the callbacks of all frameworks have in common."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from torch import nn

from sparse_moon.algorithms import ALGORITHMS, DynamicMethod, Method, TrainingRun
from sparse_moon.algorithms.optimizers import parameters_of
from sparse_moon.allocation import Allocation, check_sparsity
from sparse_moon.distributed import world_size
from sparse_moon.nn import Exclude, Pattern, layer_densities, overall_sparsity, sparse_layers, sparsify
from sparse_moon.settings import check_settings
from sparse_moon.step_clock import StepClock


class SparseCallback:
    """Makes a model sparse, trains it with a method that is attached to its optimizer, and keeps the method's state.

    Args:
        method: name of a training method, or its class.
        sparsity: share of weights to leave out in the end, in [0, 1); None for a model with sparse layers, to keep
            them as they are.
        allocation, pattern, exclude: as in :func:`sparse_moon.sparsify`.
        interval: optimizer steps from topology update to topology update.
        drop_fraction: share of a layer's weights that the first update exchanges; falls to 0 along half a cosine.
        stop: share of the training after which the topology is frozen, in [0, 1].
        total_steps: length of the training in optimizer steps, where the framework does not know it.
        penalty: of top-kast, which has its own in place of weight decay.
        seed: of random growth.
        options: of the method, by name, as ``{"start_sparsity": 0.5}`` of granet.

    Raises:
        ValueError: an unknown method or option, a number out of range.
    """

    method: Method | None = None
    """The training method, once the training has begun."""

    def __init__(
        self,
        method: str | type[Method] = "rigl",
        sparsity: float | None = 0.9,
        *,
        allocation: Allocation = "erk",
        pattern: Pattern = "unstructured",
        exclude: Iterable[Exclude] | Exclude = (),
        interval: int = 100,
        drop_fraction: float = 0.3,
        stop: float = 0.75,
        total_steps: int | None = None,
        penalty: float = 1e-4,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.kind = ALGORITHMS.find(method) if isinstance(method, str) else method
        known = [option.name for option in fields(self.kind.Options)]
        if unknown := [name for name in options or {} if name not in known]:
            raise ValueError(f"method {self.kind.name!r} has the options {known}, got {unknown}")
        self.options = self.kind.Options(**(options or {}))
        check_settings(self.options)
        if sparsity is not None:
            check_sparsity(sparsity)
            self.kind.check_options(self.options, sparsity)
        if interval < 1 or not 0 <= stop <= 1 or not 0 <= drop_fraction <= 1:
            raise ValueError(
                f"interval must be positive, stop and drop_fraction in [0, 1], got {interval}, {stop}, {drop_fraction}"
            )
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps must be positive, got {total_steps}")
        self.sparsity, self.allocation, self.pattern, self.exclude = sparsity, allocation, pattern, exclude
        self.interval, self.drop_fraction, self.stop, self.total_steps = interval, drop_fraction, stop, total_steps
        self.penalty, self.seed = penalty, seed
        self.clock: StepClock | None = None
        self._model: nn.Module | None = None
        self._densities: Mapping[str, float] | None = None  # that the sparse layers are to end with
        self._start = 0.0  # sparsity of the converted model
        self._steps = 0  # of the whole training
        self._saved: Mapping[str, Any] | None = None  # of a checkpoint, until there is a method

    def convert(self, model: nn.Module) -> None:
        """Make a model sparse in place; one that this callback has made sparse stays as it is.

        Raises:
            ValueError: a model that is compiled or wrapped, or cannot have this sparsity.
        """
        if self._model is model:
            return
        if self.sparsity is None:
            if not sparse_layers(model):
                raise ValueError("sparsity=None is for a model with sparse layers, this one has none: give a sparsity")
        elif self.kind.sparse:
            shape: dict[str, Any] = {"pattern": self.pattern, "exclude": self.exclude}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # sparsify says the same
                self._densities = layer_densities(model, self.sparsity, self.allocation, **shape)
            sparsify(
                model, self.sparsity, self.allocation, **shape, selection=self.kind.selection,
                start_sparsity=self.kind.start_sparsity(self.options, self.sparsity, model, self._densities),
            )  # fmt: skip
        self._model, self._start = model, overall_sparsity(model)

    def has_converted(self, model: nn.Module) -> bool:
        """Whether :meth:`convert` was called for this model, and not for another since."""
        return self._model is model

    def begin(
        self, model: nn.Module, optimizers: Sequence[Any], total_steps: float, backwards_per_step: int = 1
    ) -> None:
        """Attach the method to the optimizer with the sparse weights, in the state of a checkpoint if one was loaded.

        Args:
            model: what :meth:`convert` made sparse, possibly wrapped since.
            optimizers: of the training.
            total_steps: its length in optimizer steps; infinite or below 1 where the framework does not know it.
            backwards_per_step: backward passes whose gradients are accumulated for a step.

        Raises:
            ValueError: no optimizer, or several, with the sparse weights; an unknown length; a checkpoint of another
                method or of other settings; a method that changes the number of weights in several processes.
        """
        steps = total_steps if self.total_steps is None else self.total_steps
        if not 1 <= steps < math.inf:
            raise ValueError(f"SparseTraining needs the length of the training, got {steps}: give it total_steps")
        self._steps = int(steps)
        run = TrainingRun(
            total_steps=self._steps, interval=self.interval, stop=self.stop, drop_fraction=self.drop_fraction,
            weight_decay=self.penalty, seed=self.seed, densities=self._final_densities,
            backwards_per_step=backwards_per_step,
        )  # fmt: skip
        optimizer = self._optimizer_of(model, optimizers)
        if self.method is not None:  # of an earlier training
            self.method.detach()
        self._check_start()
        method = self.kind(model, optimizer, **self.kind.arguments(self.options, run))
        if method.resizes and world_size() > 1:  # which may depend on options
            raise ValueError(
                f"method {method.name!r} changes the number of weights, whose gradients {world_size()} processes "
                "exchange in buffers of a fixed size: take one process, or a method that keeps it, as rigl"
            )
        self.method = method.attach()
        self._check_weight_decay(self.method)
        self.clock = StepClock(next(model.parameters()).device)
        self.go_on()

    def go_on(self) -> None:
        """Take the state of a checkpoint that came after :meth:`begin`, if one did.

        Raises:
            ValueError: a checkpoint of another method or of other settings.
        """
        if self._saved is not None and self.method is not None:
            self._continue(self.method, self._saved)
            self._saved = None

    def _optimizer_of(self, model: nn.Module, optimizers: Sequence[Any]) -> Any:
        values = {id(layer.values) for layer in sparse_layers(model).values() if layer.values.requires_grad}
        holding = [one for one in optimizers if not values.isdisjoint(map(id, parameters_of(one)))]
        if len(optimizers) == 1 or len(holding) == 1:
            return (holding or optimizers)[0]  # the method says what it lacks
        raise ValueError(
            f"method {self.kind.name!r} needs one optimizer that holds the weights of the sparse layers, "
            f"{len(holding)} of {len(optimizers)} do"
        )

    def _check_start(self) -> None:
        assert self._model is not None
        sparsity = overall_sparsity(self._model)
        if self.kind.resizes and self._saved is None and sparsity > self._start:
            warnings.warn(
                f"method {self.kind.name!r} was to start from a sparsity of {self._start:.4f}, and an earlier training "
                f"has left {sparsity:.4f}: it starts from there, and may end sparser than asked",
                stacklevel=3,
            )

    def _check_weight_decay(self, method: Method) -> None:
        values = {id(layer.values) for layer in method.layers.values()}
        groups = [group for group in method.optimizer.param_groups if group.get("weight_decay")]
        if not method.weight_decay_matters and any(id(p) in values for group in groups for p in group["params"]):
            warnings.warn(
                f"method {method.name!r} has a penalty in place of weight decay, and the optimizer has weight decay on "
                "the sparse weights besides: put them into a group without",
                stacklevel=3,
            )

    def _final_densities(self) -> Mapping[str, float]:
        if self._densities is None:
            raise ValueError(f"method {self.kind.name!r} needs the sparsity that it is to reach, got None")
        return self._densities

    def _continue(self, method: Method, saved: Mapping[str, Any]) -> None:
        settings = self._settings()
        for name, kept in saved["settings"].items():
            if settings.get(name) != kept:
                raise ValueError(f"the checkpoint was trained with {name} {kept!r}, not {settings.get(name)!r}")
        if saved["total_steps"] != self._steps:
            warnings.warn(
                f"the training was to take {saved['total_steps']} steps and now takes {self._steps}: updates are from "
                "here on as they would be in one of the new length",
                stacklevel=2,
            )
        method.load_state_dict(saved["method"])

    def _settings(self) -> dict[str, Any]:
        """What a training that goes on must have in common with its beginning."""
        names = ("sparsity", "allocation", "interval", "drop_fraction", "stop", "penalty", "seed")
        chosen = {name: getattr(self, name) for name in names} | {"pattern": str(self.pattern)}
        return {"method": self.kind.name, **chosen, **asdict(self.options)}

    def check_finished(self, steps: int) -> None:
        """Say where the training has ended, after so many steps, and the method has not."""
        method = self.method
        if method is None or (reason := method.unfinished) is None:
            return
        if steps > method.steps or (isinstance(method, DynamicMethod) and method.steps >= method.stop_step):
            warnings.warn(reason, stacklevel=3)
        elif isinstance(method, DynamicMethod) and steps < self._steps and method.behind():
            assert self._model is not None
            warnings.warn(
                f"the training ended after {steps} of {self._steps} steps, and method {method.name!r} is at its final "
                f"density from step {method.stop_step} on: the model has a sparsity of "
                f"{overall_sparsity(self._model):.4f}",
                stacklevel=3,
            )

    def check_resumed(self, steps: int) -> None:
        """Raise ``ValueError`` where the training has done some steps already, but the method none."""
        if steps and self.method is not None and not self.method.steps:
            raise ValueError(
                f"the training goes on at step {steps}, but its checkpoint has no state of SparseTraining: it was "
                "written without the callback"
            )

    def saved(self) -> dict[str, Any]:
        """State for a checkpoint; empty before the training."""
        if self.method is None:
            return {}
        return {"settings": self._settings(), "total_steps": self._steps, "method": self.method.state_dict()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take the state of a checkpoint, for :meth:`begin`."""
        self._saved = saved or None

    def figures(self) -> dict[str, float]:
        """For logs: the share of weights that exist, and the median time of a step since it was last asked, in ms."""
        if self._model is None or self.clock is None:
            return {}
        figures = {"density": 1.0 - overall_sparsity(self._model)}
        step_ms = self.clock.median_ms()
        return figures if step_ms is None else {**figures, "step_ms": step_ms}
