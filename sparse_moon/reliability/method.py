"""What every reliability method is, and the one that does nothing."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_moon.algorithms import Method
from sparse_moon.averaging import TicketAverage, WeightAverage
from sparse_moon.ood import Detector, classifier_head
from sparse_moon.random_mask import RandomMask
from sparse_moon.registry import Registry
from sparse_moon.reliability.costs import RunCost
from sparse_moon.schedules import Cosine, Step
from sparse_moon.settings import NoOptions

RELIABILITY: "Registry[Reliability]" = Registry("reliability method", "sparse_moon.reliability", "Reliability")
"""Every reliability method, by name."""


@dataclass(frozen=True)
class ReliabilityRun:
    """What a reliability method is told of its run, before there is a model.

    Attributes:
        dataset: name or path.
        epochs: length of the training.
        stop: share of the training after which the topology is to be frozen.
        seed: of what is random.
        method: the training method; ``method_options``: an instance of its ``Options``.
    """

    dataset: str
    epochs: int
    stop: float
    seed: int
    method: type[Method]
    method_options: Any


class Reliability:
    """What a run does for reliability, asked at each of its stages. The base class does nothing.

    A run makes one of its settings, which it may refuse (:meth:`check`), builds the network that it asks for
    (:attr:`unknown_output`, :attr:`keeps_dense`, :meth:`change`), and lets it :meth:`attach` to it, and
    :meth:`attach_optimizer` to what trains it. Each batch then goes through :meth:`learning_rate`,
    :meth:`before_batch`, :meth:`batch` and :meth:`loss_of`, each epoch ends with :meth:`metrics` and
    :meth:`end_epoch`, the training with :meth:`finish`. What predicts is :meth:`predictor`.

    A subclass that sets ``name``, at the top level of a module, is in `RELIABILITY` as soon as it is defined, and the
    command line trains with it: ``--reliability my_package.my_module.MyMethod``. Of its options, a frozen dataclass as
    ``Options``, the command line makes ``--option``. Most methods change a few answers only: another loss is
    :meth:`make_loss`, a mask :meth:`make_mask`.

    Args:
        run: the run that it is part of.
        options: an instance of ``Options``; by default its defaults.
        without: which of ``parts`` to leave out.

    Attributes:
        loss: module of logits and targets; its parameters train with the model's, without weight decay.
        mask: random mask on the sparse layers' values, or None.
        average: average of weights over epochs, or None.
        members: states of the networks whose predictions are averaged.
        num_classes: K, and ``device`` the model's, once it is attached.

    Raises:
        ValueError: settings that do not fit each other.
    """

    name: ClassVar[str]
    Options: ClassVar[type] = NoOptions
    """Frozen dataclass of the options, with defaults; bounds and help as in :mod:`sparse_moon.settings`."""
    parts: ClassVar[tuple[str, ...]] = ()
    """What may be left out, for ablations."""
    options_of_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Options that are not read where a part is left out, by part."""
    keeps_dense: ClassVar[tuple[str, ...]] = ()
    """Names of layers, with ``*`` and ``?``, that are never made sparse."""
    cosine_head: ClassVar[bool] = False
    """Whether the network ends in a :class:`sparse_moon.ood.CosineHead`."""
    num_classes: int
    device: torch.device

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        RELIABILITY.add(cls)

    def __init__(self, run: ReliabilityRun, options: Any = None, without: Collection[str] = ()) -> None:
        if not set(without) <= set(self.parts):
            raise ValueError(f"{self.name!r} has the parts {self.parts} to leave out, got {without}")
        self.run, self.options, self.without = run, self.Options() if options is None else options, set(without)
        self.loss: nn.Module = nn.CrossEntropyLoss()
        self.mask: RandomMask | None = None
        self.average: WeightAverage | TicketAverage | None = None
        self.members: list[dict[str, Tensor]] = []
        self.check()

    def check(self) -> None:
        """Raise ``ValueError`` where it does not fit its run."""
        if self.masks and not self.run.method.sparse:
            unfit = self.run.method.name
            raise ValueError(f"{self.name!r} masks sparse layers, it needs another method than {unfit!r}")

    @property
    def unknown_output(self) -> bool:
        """Whether the network has an output for "unknown" after those of the classes."""
        return False

    @property
    def masks(self) -> bool:
        """Whether random masks hide weights during training."""
        return False

    @property
    def topology_stop(self) -> float:
        """Share of the training after which the topology is frozen."""
        return self.run.stop

    def check_model(self, model: nn.Module, name: str) -> None:
        """Raise ``ValueError`` where :meth:`change` cannot change the dense model, which is called ``name``."""
        return

    def change(self, model: nn.Module) -> nn.Module:
        """Change the sparse model before anything knows it; returns it."""
        return model

    def attach(self, model: nn.Module, num_classes: int) -> None:
        """Make what takes part in the training of ``model``, which is on its device."""
        self.num_classes, self.device = num_classes, next(model.parameters()).device
        self.loss = self.make_loss(model).to(self.device)
        self.mask = self.make_mask(model)
        self.average = self.make_average(model)

    def attach_optimizer(self, optimizer: Optimizer) -> None:
        """Before the first step of the optimizer, which trains the model and the loss; nothing by default."""
        return

    def make_loss(self, model: nn.Module) -> nn.Module:
        """The loss, with state that a resumed run needs in its ``state_dict``; by default cross-entropy."""
        return nn.CrossEntropyLoss()

    def make_mask(self, model: nn.Module) -> RandomMask | None:
        """The random mask, where it :attr:`masks`."""
        return RandomMask(model, self.options.keep, self.run.seed) if self.masks else None

    def make_average(self, model: nn.Module) -> WeightAverage | TicketAverage | None:
        """The average of weights that the model becomes in the end; by default none."""
        return None

    def learning_rate(self, schedule: Cosine | Step, step: int, steps_per_epoch: int) -> float:
        """That of batch number ``step``; ``schedule`` is the run's."""
        return schedule(step)

    def before_batch(self, updates_now: bool) -> None:
        """Before a batch, which ends with a topology update or not: here the mask is drawn."""
        if self.mask is not None:
            # growth is chosen by the gradient of the whole sparse network
            self.mask.clear() if updates_now else self.mask.draw()

    def batch(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and targets to train on; by default the same images, and int64 labels (B,)."""
        return images, labels

    def loss_of(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss (0-d) of the model's outputs (B, outputs) and the targets of :meth:`batch`."""
        loss: Tensor = self.loss(logits, targets)
        return loss

    def progress(self) -> dict[str, str]:
        """What a progress bar shows besides loss and accuracy."""
        return {}

    def metrics(self) -> dict[str, float]:
        """What the epoch's row of metrics has besides, before :meth:`end_epoch`."""
        return {}

    def end_epoch(self, model: nn.Module, epoch: int) -> None:
        """After epoch number ``epoch``, from 1."""
        if self.mask is not None:
            self.mask.clear()

    def finish(self, model: nn.Module) -> bool:
        """After the training: make of the model what the run ends with; whether its batch norm is to be refreshed."""
        if self.average is None:
            return False
        self.average.copy_to(model)
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; tensors, numbers, texts and containers only.

        It stands in the run's state beside ``epoch``, ``history``, ``model``, ``optimizer``, ``method``, ``scaler``,
        ``random_state`` and ``diagnostics``.
        """
        return {
            "loss": self.loss.state_dict(),
            "mask": None if self.mask is None else self.mask.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "members": self.members,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`, attached to the same model."""
        self.loss.load_state_dict(state["loss"])
        if self.mask is not None:
            self.mask.load_state_dict(state["mask"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.members = [{k: v.to(self.device) for k, v in member.items()} for member in state.get("members", [])]

    @property
    def several(self) -> bool:
        """Whether predictions are the mean of several networks or passes: logarithms of probabilities, of no head."""
        return False

    @property
    def passes(self) -> int:
        """Forward passes for a prediction."""
        return 1

    @property
    def ends_with(self) -> str:
        """What a run ends with where that is more than one plain network; else empty."""
        return ""

    def predictor(self, model: nn.Module, load: Callable[[Mapping[str, Tensor]], nn.Module]) -> nn.Module:
        """What predicts: the trained model, or several of them.

        Args:
            model: the run's last network, on the device to use.
            load: makes the network of one of :attr:`members`, on the CPU.
        """
        return model

    def head(self, predictor: nn.Module) -> nn.Module | None:
        """Where the features are of a predictor whose logits no layer returned: those of its last network or pass."""
        return classifier_head(predictor) if self.several else None

    def fits(self, detector: type[Detector]) -> bool:
        """Whether a detector can score the predictions."""
        return (
            (self.unknown_output or not detector.unknown_output)
            and (self.cosine_head or not detector.cosine_head)
            and not (detector.linear_head and (self.cosine_head or self.several))
            and not (detector.logit_scale and self.several)
        )

    @classmethod
    def overhead(cls, cost: RunCost) -> dict[str, float] | None:
        """FLOPs that it adds to a training, by part, with ``total`` and ``ratio``; None where nobody counted them."""
        return None


class Plain(Reliability):
    """Sparse training with cross-entropy, and nothing else."""

    name = "none"
