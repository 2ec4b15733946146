"""From a run's settings to its parts: network, optimizer, training method, reliability method and data."""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_moon.algorithms import Method, TrainingRun
from sparse_moon.app import datasets, models
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.pretrained import load_weights
from sparse_moon.app.run_data import RunData, channels_last
from sparse_moon.distributed import rank, world_size
from sparse_moon.nn import layer_densities, sparse_layers, sparsify
from sparse_moon.nn.fusion import fuse, install
from sparse_moon.ood import CosineHead, classifier_head
from sparse_moon.ops.cpu import emulated
from sparse_moon.ops.native import has_triton, native
from sparse_moon.reliability import Reliability
from sparse_moon.schedules import Cosine, Step

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Run:
    """The parts of a run, which know each other.

    Attributes:
        config, data: its settings and data, with ``batches`` of the training images.
        model: the network at its start, on the run's device.
        optimizer, method: train it.
        reliability: attached to it.
    """

    config: TrainConfig
    data: RunData
    batches: datasets.Batches
    model: nn.Module
    optimizer: torch.optim.Optimizer
    method: Method
    reliability: Reliability

    @property
    def total_steps(self) -> int:
        """Length of the training, in batches."""
        return len(self.batches) * self.config.epochs


def build_run(config: TrainConfig, data: RunData) -> Run:
    """All parts of a run at its start, made by its seed.

    Raises:
        ValueError: settings that do not fit the data or the model.
    """
    torch.manual_seed(config.seed)
    batches = datasets.Batches(
        data.train, data.mean, data.std, config.batch_size, shuffle_seed=config.seed,
        augment=data.augment, resized_crops=config.crops == "resized",
        device=config.device, channels_last=channels_last(config), rank=rank(), world_size=world_size(),
        drop_last=len(data.train) >= config.batch_size,  # batch norm cannot train on a rest of one image
    )  # fmt: skip
    weights = None if config.weights is None else Path(config.weights)
    model = build_model(config, data, weights).to(config.device)
    if channels_last(config):
        model = model.to(memory_format=torch.channels_last)
    if config.recompute and config.device != "cpu" and not (channels_last(config) and has_triton()):
        reason = "there batch norms are fused in channels_last, by Triton"
        warnings.warn(f"recompute does nothing on {config.device}: {reason}", stacklevel=2)
    reliability = config.make_reliability()
    reliability.attach(model, data.num_classes)
    captures = captures_steps(config)  # then the learning rate is read from the device
    optimizer = torch.optim.SGD(
        _parameter_groups(config, model, reliability),
        torch.tensor(config.lr, device=config.device) if captures else config.lr, config.momentum,
        weight_decay=config.weight_decay, nesterov=config.momentum > 0, fused=True if captures else None,
    )  # fmt: skip
    reliability.attach_optimizer(optimizer)
    training = TrainingRun(
        total_steps=len(batches) * config.epochs,
        interval=config.interval,
        stop=reliability.topology_stop,
        drop_fraction=config.drop_fraction,
        weight_decay=config.weight_decay,
        seed=config.seed,
        densities=lambda: final_densities(config, data),
    )
    kind = config.method_class
    method = kind(model, optimizer, **kind.arguments(config.method_options, training))
    return Run(config, data, batches, model, optimizer, method, reliability)


def learning_rate(config: TrainConfig, total_steps: int) -> Cosine | Step:
    """The run's schedule; where the training is short, its steps come one batch after another."""
    if not config.lr_milestones:
        end = config.lr / 15 if config.lr_end is None else config.lr_end
        return Cosine(config.lr, end, max(round(config.lr_until * total_steps), 1))
    milestones: list[int] = []
    for share in config.lr_milestones:
        milestones.append(max(round(share * total_steps), milestones[-1] + 1 if milestones else 1))
    warmup = min(round(config.lr_warmup * total_steps), milestones[0])
    return Step(config.lr, milestones, config.lr_gamma, warmup)


def _parameter_groups(config: TrainConfig, model: nn.Module, reliability: Reliability) -> Any:
    """What the optimizer trains, apart what has no weight decay."""
    without: list[nn.Parameter] = list(reliability.loss.parameters())
    if not config.method_class.weight_decay_matters:
        without += [layer.values for layer in sparse_layers(model).values()]
    head = classifier_head(model)
    if isinstance(head, CosineHead):
        without.append(head.weight)
    if not without:
        return model.parameters()
    named = {id(parameter) for parameter in without}
    others = [parameter for parameter in model.parameters() if id(parameter) not in named]
    return [{"params": others}, {"params": without, "weight_decay": 0.0}]


def build_model(config: TrainConfig, data: datasets.DataSet, weights: Path | None = None) -> nn.Module:
    """The run's network at its start, with a random topology unless the method trains a dense one.

    Args:
        weights: file of a dense network's weights to start from, see `sparse_moon.app.pretrained`.
    """
    reliability, method = config.make_reliability(), config.method_class
    model = _dense_model(config, data)
    if weights is not None:
        load_weights(model, weights)
    if method.sparse:
        densities = _densities(config, model)
        sparsify(
            model, config.sparsity, config.allocation, pattern=config.pattern, exclude=_exclude(config),
            start_sparsity=method.start_sparsity(config.method_options, config.sparsity, model, densities),
            selection=config.selection or method.selection, fuse=False,
        )  # fmt: skip
    fuse_network(model, config)
    return reliability.change(model)


def fuse_network(model: nn.Module, config: TrainConfig) -> None:
    """Fuse a network as the settings say, in place; dense ones too, which sparse ones' times are compared with."""
    if config.recompute:
        fuse(model, recompute=True)  # says what it cannot do, as it was asked for
    elif config.fuse and (native is not None or has_triton()):
        install(model, recompute=False)


def captures_steps(config: TrainConfig) -> bool:
    """Whether training steps are to be CUDA graphs: on a GPU, unless the settings say no."""
    return config.capture is not False and torch.device(config.device).type == "cuda"


def amp(config: TrainConfig) -> str:
    """The run's mixed precision: what was asked for, or what dense networks train in on its device."""
    if config.amp != "auto":
        return config.amp
    if torch.device(config.device).type != "cuda":
        return "none"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "none"


def autocast(config: TrainConfig) -> AbstractContextManager[Any]:
    """What a run's forward passes are in."""
    dtype = _DTYPES.get(amp(config))
    return nullcontext() if dtype is None else torch.autocast(torch.device(config.device).type, dtype)


def emulates_amp(config: TrainConfig) -> bool:
    """Whether torch only emulates products in the run's mixed precision on its device."""
    dtype = _DTYPES.get(amp(config))
    return dtype is not None and torch.device(config.device).type == "cpu" and emulated(dtype)


def final_densities(config: TrainConfig, data: datasets.DataSet) -> dict[str, float]:
    """Density by layer that a method which prunes is to end with."""
    with torch.device("meta"):
        return _densities(config, _dense_model(config, data))


def _densities(config: TrainConfig, model: nn.Module) -> dict[str, float]:
    exclude = _exclude(config)
    return layer_densities(model, config.sparsity, config.allocation, pattern=config.pattern, exclude=exclude)


def _dense_model(config: TrainConfig, data: datasets.DataSet) -> nn.Module:
    channels, size, _ = data.train.shape
    reliability = config.make_reliability()
    outputs = data.num_classes + reliability.unknown_output
    model = models.build(config.model, outputs, in_channels=channels, image_size=size, width=config.width)
    reliability.check_model(model, config.model)
    return model


def _exclude(config: TrainConfig) -> tuple[str, ...]:
    return (*config.exclude, *config.make_reliability().keeps_dense)


def load_network(config: TrainConfig, data: datasets.DataSet, state: Mapping[str, Tensor]) -> nn.Module:
    """The run's network in this state.

    Raises:
        ValueError: tensors of other types; RuntimeError: of other names or shapes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is said of a random topology, which the state's replaces
        network = build_model(config, data)
    check_dtypes(network, state)
    network.load_state_dict(state)
    return network


def check_dtypes(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for tensors of other types than the model's, which loading would convert without a word."""
    for name, tensor in model.state_dict().items():
        if name in state and state[name].dtype != tensor.dtype:
            raise ValueError(f"expected {name} to be {tensor.dtype}, got {state[name].dtype}")
