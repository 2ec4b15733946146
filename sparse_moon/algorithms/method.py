"""What every training method does each batch, and the frame of those that change the topology."""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sparse_moon.algorithms.optimizers import (
    attach,
    inner_optimizers,
    parameters_of,
    stepping,
    synchronizes,
)
from sparse_moon.algorithms.run import TrainingFlops, TrainingRun
from sparse_moon.distributed import check_same, launched_alone, world_size
from sparse_moon.nn import Selection, SparseLayer, sparse_layers
from sparse_moon.nn.inspect import tied_layers
from sparse_moon.registry import Registry
from sparse_moon.settings import NoOptions
from sparse_moon.sharding import division_problem, is_sharded, reshard, sharding_modules
from sparse_moon.weight_decay import check_weight_decay

ALGORITHMS: "Registry[Method]" = Registry("method", "sparse_moon.algorithms", "Method")
"""Every training method, by name."""

_TRAINED_BY: "WeakKeyDictionary[SparseLayer, ref[Method]]" = WeakKeyDictionary()
"""The method that began last to step with a layer."""


class Method:
    """A training method: :meth:`step` once a batch, in place of ``optimizer.step()``.

    The base class never changes a topology: as :class:`Static` it trains a fixed sparse network, as :class:`Dense` the
    baseline. ``steps`` counts finished batches, topology updates included.

    ``layers`` are the sparse layers that the optimizer trains: frozen ones are no part of the method.

    A subclass that sets ``name``, at the top level of a module, is in `ALGORITHMS` as soon as it is defined, and the
    command line trains with it: ``--method my_package.my_module.MyMethod``. For that it may answer, in class
    attributes and class methods, what a run has to know before there is a model: its options (a frozen dataclass as
    ``Options``, of which the command line makes ``--option``), where the topology starts, and what training costs.

    Args:
        model: possibly wrapped (DistributedDataParallel, ``torch.compile``).
        optimizer: over the model's parameters, built after ``sparsify``.

    Raises:
        ValueError: the optimizer holds none of the model's trainable parameters, or none of the sparse layers' values;
            several processes with different topologies; values that are divided among processes (``fully_shard``) in
            another way than along their first dimension, or where the method changes their number.
    """

    name = "method"
    Options: ClassVar[type] = NoOptions
    """Frozen dataclass of the options, with defaults; bounds and help as in :mod:`sparse_moon.settings`."""
    sparse: ClassVar[bool] = True
    """Whether it trains a model with sparse layers."""
    selection: ClassVar[Selection] = "random"
    """How the topology at the start is drawn; see :func:`sparse_moon.sparsify`."""
    updates: ClassVar[bool] = False
    """Whether the topology changes during training."""
    resizes = False
    """Whether the number of a layer's blocks changes during training."""
    weight_decay_matters = True
    """Whether sparse weights are to have the weight decay that dense ones have; else the run gives them none."""
    unread: ClassVar[tuple[str, ...]] = ()
    """Settings of a run, such as ``interval``, that make no difference to it: ``compare`` trains once for all."""
    attached = False
    """Whether the optimizer's step is the method's."""
    own_step: Callable[..., Any] | None = None
    """Of an attached method that its optimizer calls: the optimizer's own step, which takes a closure or nothing."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"a method takes a model and then its optimizer, got {type(model).__name__} first")
        self.optimizer = optimizer
        self.sharding_modules = sharding_modules(model)
        """The modules that FSDP2's ``fully_shard`` was called for."""
        reshard(self.sharding_modules)
        self._in_parallel = any(isinstance(module, DistributedDataParallel) for module in model.modules())
        if self._in_parallel:
            for layer in sparse_layers(model).values():
                layer.topology.check(broadcast=True)
        found = sparse_layers(model)
        every = dict(zip(plain_names(found), found.values(), strict=True))
        self.tied = tied_layers(model)
        """For each layer all that share its weight, itself first."""
        held = {id(parameter) for parameter in parameters_of(optimizer)}
        trainable = {name: layer for name, layer in every.items() if layer.values.requires_grad}
        self.layers = {name: layer for name, layer in trainable.items() if id(layer.values) in held}
        self.untouched = {name: layer for name, layer in every.items() if name not in self.layers}
        """The sparse layers that are no part of the method."""
        others = [name for name in trainable if name not in self.layers]
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if (trainable and not self.layers) or (parameters and held.isdisjoint(map(id, parameters))):
            raise ValueError(
                f"the optimizer given to method {self.name!r} holds no weights of this model's "
                f"{'sparse ' if trainable else ''}layers, so they would never train: build it after sparsify, from "
                "this model's parameters()"
            )
        if others:
            warnings.warn(
                f"the optimizer does not hold the values of {others}: they do not train and keep their topology",
                stacklevel=3,
            )
        self._check_division()
        if not self.resizes and any(layer.pruned_later for layer in self.layers.values()):
            warnings.warn(
                f"the model was made sparse with start_sparsity, which method {self.name!r} keeps: it prunes nothing. "
                "Leave start_sparsity out, or train with a method that prunes, as GMP",
                stacklevel=3,
            )
        for layer in self.layers.values():
            layer.pruned_later = False
        if launched_alone():
            warnings.warn(
                "several processes were started, but torch.distributed is not initialised: each trains a network of "
                "its own",
                stacklevel=3,
            )
        if self.weight_decay_matters:
            for inner in inner_optimizers(optimizer)[:1]:
                check_weight_decay(model, inner)
        self.steps = 0
        self._begun = False
        self._successor: str | None = None
        self._check_processes("at the start")
        for name, layer in every.items():
            for tied in self.tied[layer] if name not in others else ():  # which may be another method's
                tied.probe = None  # of a method that was left in an update batch

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        ALGORITHMS.add(cls)

    @classmethod
    def check_options(cls, options: Any, sparsity: float) -> None:
        """Raise ``ValueError`` where options and the sparsity in the end do not fit each other; nothing by default."""
        return

    @classmethod
    def exchanges_evenly(cls, options: Any) -> bool:
        """Whether updates exchange weights, and keep each layer's number of them."""
        return False

    @classmethod
    def start_sparsity(
        cls, options: Any, sparsity: float, model: nn.Module, densities: Mapping[str, float]
    ) -> float | None:
        """Sparsity that the topology starts with; None where it is that in the end.

        Args:
            options: an instance of ``Options``.
            sparsity: in the end, of all weights.
            model: dense, perhaps on the meta device.
            densities: in the end, by layer, as :func:`sparse_moon.layer_densities` gives them.
        """
        return None

    @classmethod
    def arguments(cls, options: Any, run: TrainingRun) -> dict[str, Any]:
        """Arguments of the constructor in a run, besides model and optimizer."""
        return {}

    @classmethod
    def training_flops(cls, flops: TrainingFlops) -> float:
        """Mean training FLOPs an example, relative to dense training, ``3 f_D``. Here those of a fixed topology."""
        return flops.step / (3 * flops.dense)

    @classmethod
    def growth(cls, options: Any, drop_fraction: float, stop: float) -> float:
        """Mean share of weights, over the whole training, that exist besides those in the end; 0 by default."""
        return 0.0

    def _check_division(self) -> None:
        """Whether the values are whole, or divided among processes in a way that the method can follow."""
        for name, layer in self.layers.items():
            problem = division_problem(layer.values)
            if problem is None and self.resizes and is_sharded(layer.values):
                problem = "the method changes their number, which a sharded parameter cannot follow"
            if problem:
                raise ValueError(
                    f"method {self.name!r} cannot train the values of layer {name!r} where they are divided among "
                    f"processes: {problem}. Use one mesh of all processes, and a method that keeps the number of "
                    "weights (rigl, set), or DistributedDataParallel"
                )

    def _check_processes(self, when: str) -> None:
        if world_size() > 1 and self.layers:
            layers = self.layers.values()
            prints = torch.tensor(
                [layer.topology.fingerprint for layer in layers], device=next(iter(layers)).values.device
            )
            check_same(prints, f"{when} of method {self.name!r} the processes have different topologies")

    @property
    def updates_now(self) -> bool:
        """Whether the batch in progress ends with a topology update."""
        return False

    @property
    def unfinished(self) -> str | None:
        """At the end of a training, why the topology is not what was to come out; None where it is."""
        return None

    def step(self, scaler: GradScaler | None = None, closure: Callable[[], Any] | None = None) -> bool:
        """Finish a batch whose gradients are ready.

        Args:
            scaler: under automatic mixed precision the scaler of the loss; it unscales, steps and updates here. Not of
                accelerate's optimizers, which have it; several methods with one scaler are to be attached.
            closure: computes the gradients anew and returns the loss, for optimizers that need that.

        Returns:
            True where the topology was updated. While accelerate accumulates gradients nothing happens: False.

        Raises:
            RuntimeError: it is attached; another method has begun to step with one of its layers since, where either
                changes topologies; or the model was made dense.
        """
        if not self._steps_now(scaler):
            return False
        self._step_optimizer(scaler, closure)
        self.next_batch()
        return False

    def next_batch(self) -> None:
        """Go on to the next batch, after one whose optimizer step is made; :meth:`step` does so by itself.

        For what makes that step in another way: :class:`sparse_moon.CapturedStep`, whose graph runs no Python.
        """
        self.steps += 1

    def _steps_now(self, scaler: GradScaler | None) -> bool:
        """Whether this batch ends with a step: not while accelerate accumulates gradients."""
        if scaler is not None and not hasattr(scaler, "unscale_"):
            raise TypeError(f"step() takes a gradient scaler first, got {scaler!r}; a closure is step(closure=...)")
        if self.attached and self.own_step is None:
            raise RuntimeError(
                f"method {self.name!r} is attached to its optimizer: call optimizer.step(), not step() besides"
            )
        if self._successor is not None:
            raise RuntimeError(
                f"method {self.name!r} cannot go on: method {self._successor!r} has begun to train layers of it since, "
                f"and a topology has one method at a time{'; detach() this one' if self.attached else ''}"
            )
        if any(layer.made_dense for layer in self.layers.values()):
            raise RuntimeError(
                f"densify() has put dense layers in the places of those that method {self.name!r} trains, in the model "
                "itself, and the optimizer has the weights of the sparse ones: densify copy.deepcopy(model) in its "
                "place, or train on with a new optimizer and method"
            )
        if not self._begun:
            self._begin()
        return synchronizes(self.optimizer)

    def _begin(self) -> None:
        """Take the layers from methods that trained them before."""
        self._begun = True
        for layer in self.layers.values():
            before = _TRAINED_BY[layer]() if layer in _TRAINED_BY else None
            if before is not None and (self.updates or before.updates):
                before._successor = self.name
            _TRAINED_BY[layer] = ref(self)

    def attach(self) -> Self:
        """Make ``optimizer.step()`` do what :meth:`step` does, for loops of others (Lightning, Hugging Face).

        It takes and returns what the optimizer's own step does, or the closure's loss in a batch whose step an update
        takes. A gradient scaler then calls it as ever; where it skips a step because of an overflow, the method makes
        none either: a topology update waits for the next batch, and what is due at the end comes as many batches later,
        see :attr:`unfinished`.

        Of an optimizer around another that keeps nothing itself, as accelerate's, the inner one's step is the method's;
        of one with state of its own, or around several, its own, as where :meth:`step` is called.

        Returns:
            The method itself. Until :meth:`detach` do not call :meth:`step` besides.

        Raises:
            ValueError: the optimizer is attached already, to this method or another; a method that changes the number
                of weights, of a model in DistributedDataParallel.
        """
        if self.resizes and self._in_parallel:
            raise ValueError(
                f"method {self.name!r} changes the number of weights, and a model in DistributedDataParallel is to be "
                "wrapped anew after each step that does, which optimizer.step() does not say: call method.step() in "
                "its place, and wrap the model where that returns True"
            )
        given = self.optimizer
        self.optimizer, self._given, self.attached = attach(given, self), given, True
        return self

    def detach(self) -> None:
        """Undo :meth:`attach`, where it was called: ``optimizer.step()`` is the optimizer's own again.

        Before another method of the same optimizer is attached, such as one that is made anew for layers that train
        later.
        """
        if self.attached:
            self.optimizer, self.attached = self._given, False

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self)] = other = type(self).__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        if other.attached:  # a copied optimizer's step is its own, or still the first method's
            vars(other.optimizer).pop("step", None)
            attach(other._given, other)
        return other

    def _step_optimizer(self, scaler: GradScaler | None, closure: Callable[[], Any] | None = None) -> None:
        arguments = () if closure is None else (closure,)
        with stepping(self.optimizer):
            if self.own_step is not None:
                self.own_step(*arguments)
            elif scaler is None:
                self.optimizer.step(*arguments)
            else:
                scaler.step(self.optimizer, *arguments)
                scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the model's and the optimizer's own state."""
        return {"name": self.name, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`, taken between two batches.

        Raises:
            ValueError: the state of another method, or of other layers; nothing is changed.
        """
        self._check_state(state)
        self.steps = state["steps"]

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` for a state that does not fit, before anything is changed."""
        if state["name"] != self.name:
            raise ValueError(f"the state is of method {state['name']!r}, this is {self.name!r}")


class Dense(Method):
    """The dense baseline.

    Raises:
        ValueError: the model has sparse layers.
    """

    name = "dense"
    sparse = False
    unread = ("interval", "drop_fraction")

    @classmethod
    def training_flops(cls, flops: TrainingFlops) -> float:
        return 1.0

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        super().__init__(model, optimizer)
        if self.layers or self.untouched:
            raise ValueError(f"method 'dense' got a model with sparse layers: {[*self.layers, *self.untouched]}")


class Static(Method):
    """A random sparse network that keeps its topology."""

    name = "static"
    unread = ("interval", "drop_fraction")


def plain_names(names: Iterable[str]) -> list[str]:
    """Names of modules without what wrappers put before them: DistributedDataParallel and ``torch.compile``."""
    plain = [name.replace("_orig_mod.", "") for name in names]
    wrapped = bool(plain) and all(name.startswith("module.") for name in plain)
    return [name.removeprefix("module.") for name in plain] if wrapped else plain
