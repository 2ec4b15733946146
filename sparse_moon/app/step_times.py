"""Times of a training step of a run's network beside those of the same network made dense."""

import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_moon.algorithms import Method
from sparse_moon.app.build import autocast, fuse_network, load_network
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.run_data import RunData, channels_last
from sparse_moon.capture import CapturedStep
from sparse_moon.capture.step import REHEARSALS
from sparse_moon.nn import densify
from sparse_moon.step_clock import StepClock

_LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_LEAST, _MOST, _SECONDS = 5, 50, 2.0  # rounds of a comparison, and about how long it takes in all


def beside_dense(
    model: nn.Module, config: TrainConfig, data: RunData, batch: tuple[Tensor, Tensor], *, captured: bool = False
) -> dict[str, float | str]:
    """Times of a training step of a run's network, and of the same network made dense, on copies.

    A step is a forward pass, cross-entropy, a backward pass and SGD's step, without what the training method and the
    reliability method do besides. Sparse and dense steps take turns. The dense network is fused as the run's is, and
    trains in both layouts of PyTorch, of which the faster counts. Neither the model nor random numbers change.

    Args:
        model: sparse, of the run of this ``config`` and ``data``.
        batch: images and labels as training has them.
        captured: whether the run's steps are CUDA graphs; then those of all networks are.

    Returns:
        Medians in milliseconds, ``sparse_ms`` and ``dense_ms``, and the ``dense_layout``.
    """
    images, labels = batch
    with torch.random.fork_rng([images.device] if images.device.type == "cuda" else []):
        steps = {}
        for name, network in copies(model, config, data).items():
            layout = _LAYOUTS.get(name, _layout_of(config))
            step = _step(network, config, captured)
            steps[name] = partial(step, images.contiguous(memory_format=layout), labels)
        times = _interleaved(steps, images.device, skip=REHEARSALS + 1 if captured else 1)
    faster = min(_LAYOUTS, key=times.__getitem__)
    return {"sparse_ms": times["sparse"], "dense_ms": times[faster], "dense_layout": faster}


def copies(model: nn.Module, config: TrainConfig, data: RunData) -> dict[str, nn.Module]:
    """A copy of a run's network, ``"sparse"``, and one made dense in each layout; making them draws random numbers."""

    def copy() -> nn.Module:
        return load_network(config, data, model.state_dict()).to(config.device).train()

    networks = {"sparse": copy().to(memory_format=_layout_of(config))}
    for name, layout in _LAYOUTS.items():
        networks[name] = densify(copy()).to(memory_format=layout)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it was said of the run's network
            fuse_network(networks[name], config)
    return networks


def _layout_of(config: TrainConfig) -> torch.memory_format:
    """That in which the run trains."""
    return torch.channels_last if channels_last(config) else torch.contiguous_format


def _step(model: nn.Module, config: TrainConfig, captured: bool) -> Callable[[Tensor, Tensor], object]:
    lr = torch.tensor(config.lr, device=config.device) if captured else config.lr
    optimizer = torch.optim.SGD(
        model.parameters(), lr, config.momentum, nesterov=config.momentum > 0, fused=captured or None
    )

    def backward(images: Tensor, labels: Tensor) -> None:
        with autocast(config):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()

    if captured:
        method = Method(model, optimizer)

        def run(images: Tensor, labels: Tensor) -> None:
            backward(images, labels)
            method.step()

        return CapturedStep(run, method, model)

    def eager(images: Tensor, labels: Tensor) -> None:
        backward(images, labels)
        optimizer.step()
        optimizer.zero_grad()

    return eager


def _interleaved(steps: Mapping[str, Callable[[], object]], device: torch.device, skip: int) -> dict[str, float]:
    """The median time of each, without its first ``skip`` steps."""
    clocks = {name: StepClock(device, skip) for name in steps}
    begin, rounds = time.perf_counter(), 0
    while rounds < skip + _LEAST or (rounds < _MOST and time.perf_counter() - begin < _SECONDS):
        for name, run in steps.items():
            with clocks[name].step():
                run()
        rounds += 1
    return {name: clock.median_ms() or 0.0 for name, clock in clocks.items()}
