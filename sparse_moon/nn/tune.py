"""Measure, once and on this machine, which implementation of a model's sparse products is faster."""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from sparse_moon.nn.inspect import evaluation_mode, sparse_layers
from sparse_moon.nn.layers import SparseLayer
from sparse_moon.ops import choice
from sparse_moon.ops.choice import Backend, Pass
from sparse_moon.ops.layout import memory_format as layout_of
from sparse_moon.ops.registry import to_autocast_dtype


def tune(
    model: nn.Module,
    input_size: tuple[int, ...],
    batch_size: int,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> dict[str, dict[Pass, Backend]]:
    """Let each sparse layer of a model use, from now on in this process, what is faster at its shape and density.

    Not needed in general where a stored table knows good choices. One forward pass finds the shapes of the layers'
    inputs; then each layer's products are timed, without its hooks. The model is left as it was, and so are torch's
    random numbers.

    For training under autocast call this under autocast: on a GPU what was measured in float32 says nothing of products
    in 16 bits.

    Args:
        model: with sparse layers.
        input_size: shape of one example; ``batch_size``: how many make the batch that training uses.
        memory_format: ``torch.channels_last`` where training gives images in that.

    Returns:
        For each layer by name, ``"kernel"`` or ``"dense"`` for each pass.
    """
    layers = sparse_layers(model)
    found: dict[nn.Module, tuple[tuple[int, ...], torch.memory_format]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        found[module] = tuple(x.shape), layout_of(x)

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers.values()]
    try:
        with evaluation_mode(model), torch.no_grad(), _random_numbers_kept(layers.values()):
            example = next(model.parameters())
            batch = torch.zeros(batch_size, *input_size, dtype=example.dtype, device=example.device)
            model(batch.contiguous(memory_format=memory_format))
    finally:
        for handle in handles:
            handle.remove()
    return {name: tune_layer(layer, *found[layer]) for name, layer in layers.items() if layer in found}


def tune_layer(
    layer: SparseLayer, input_shape: tuple[int, ...], memory_format: torch.memory_format = torch.contiguous_format
) -> dict[Pass, Backend]:
    """As :func:`tune`, for one layer on inputs of this shape and layout.

    On the CPU all products together, on a GPU each by itself.
    """
    chosen: dict[Pass, Backend] = {}
    density = 1.0 - layer.sparsity
    with _random_numbers_kept([layer]):
        runs = products(layer, input_shape, memory_format)
        device, together = layer.values.device, None
        if device.type != "cuda":
            together = kernel_gain(_training_pass(layer, input_shape, memory_format), device)
        for pass_, run in runs.items():
            gain = kernel_gain(run, device) if together is None else together
            chosen[pass_] = "kernel" if gain >= 1.0 else "dense"
            with choice.use_backend("kernel"), choice.asked_for() as works:
                run()
            for work in works:
                less = max(0.01 * density, 1.0 / max(work.blocks, 1))  # less than a block would not count
                choice.remember(work, density if chosen[pass_] == "kernel" else density - less)
    return chosen


def _random_numbers_kept(layers: Iterable[SparseLayer]) -> AbstractContextManager[None]:
    """Inside the block random numbers are drawn that nobody else misses."""
    return torch.random.fork_rng({layer.values.device for layer in layers if layer.values.is_cuda})


class _Bare(nn.Module):
    """A layer that is called without its hooks."""

    def __init__(self, layer: SparseLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer.forward(x)


def _training_pass(
    layer: SparseLayer, input_shape: tuple[int, ...], memory_format: torch.memory_format
) -> Callable[[], Any]:
    """All products of a layer, which on the CPU are decided about together."""
    x, values = _input(layer, input_shape, memory_format).requires_grad_(), layer.values.detach().requires_grad_()
    bare, upstream = _Bare(layer), list[torch.Tensor]()

    def run() -> Any:
        with torch.enable_grad():
            output = torch.func.functional_call(bare, {"layer.values": values}, (x,))
        upstream[:] = upstream or [torch.randn_like(output)]
        return torch.autograd.grad(output, (x, values), upstream)

    return run


def chosen_backends(
    layer: SparseLayer, input_shape: tuple[int, ...], memory_format: torch.memory_format = torch.contiguous_format
) -> dict[Pass, Backend]:
    """What the layer would use for inputs of this shape and layout: ``"kernel"`` or ``"dense"`` for each pass."""
    density = 1.0 - layer.sparsity
    chosen: dict[Pass, Backend] = {}
    for pass_, run in products(layer, input_shape, memory_format).items():
        with choice.use_backend("kernel"), choice.asked_for() as works:
            run()
        kernel = works and all(choice.pays(work, density) for work in works)
        chosen[pass_] = "kernel" if kernel else "dense"
    return chosen


def products(
    layer: SparseLayer, input_shape: tuple[int, ...], memory_format: torch.memory_format = torch.contiguous_format
) -> dict[Pass, Callable[[], Any]]:
    """A layer's products on random inputs of this shape, each as a function; planes on a GPU channels_last.

    Forward and either gradient, and on the CPU both gradients, which are one operation there.
    """
    values = layer.values.detach()
    bare, x = _Bare(layer), _input(layer, input_shape, memory_format)

    def forward() -> None:
        with torch.enable_grad():  # as in training, where every pass scatters a weight for a dense product
            bare(x)

    def gradients(input: torch.Tensor, values: torch.Tensor) -> Callable[[], Any]:
        """Of those that require one."""
        of = [tensor for tensor in (input, values) if tensor.requires_grad]

        # a graph for each backend: on a GPU a backward pass takes that of its forward pass
        graphs: dict[Backend, torch.Tensor] = {}
        backends: tuple[Backend, ...] = ("auto", "kernel", "dense")
        for backend in backends:
            with choice.use_backend(backend), torch.enable_grad():
                graphs[backend] = torch.func.functional_call(bare, {"layer.values": values}, (input,))
        upstream = torch.randn_like(graphs["auto"])

        def run() -> Any:
            return torch.autograd.grad(graphs[choice.current_backend()], of, upstream, retain_graph=True)

        return run

    x_leaf, values_leaf = x.clone().requires_grad_(), values.clone().requires_grad_()
    runs: dict[Pass, Callable[[], Any]] = {
        "forward": forward,
        "input_grad": gradients(x_leaf, values),
        "values_grad": gradients(x, values_leaf),
    }
    if x.device.type == "cpu":
        runs["grads"] = gradients(x_leaf, values_leaf)
    return runs


def _input(layer: SparseLayer, shape: tuple[int, ...], memory_format: torch.memory_format) -> torch.Tensor:
    """Random numbers of this shape, in autocast's dtype under autocast; planes on a GPU channels_last."""
    device = layer.values.device
    (x,) = to_autocast_dtype(device.type, torch.randn(shape, dtype=layer.values.dtype, device=device))
    return x.contiguous(memory_format=torch.channels_last if x.is_cuda and x.dim() == 4 else memory_format)


def kernel_gain(run: Callable[[], Any], device: torch.device, *, seconds: float = 0.05, least: int = 3) -> float:
    """How many times as fast a product is by its kernel as by the dense product.

    The ratio of the shortest times over ``least`` runs or more, up to about ``seconds`` of each, after a first one.
    They take turns, so that what else the machine does for a moment disturbs both.

    On a GPU its own time, without the host's, behind which a small product's would hide: in training the host runs
    ahead, and in a CUDA graph it has nothing to do.
    """
    best: dict[Backend, float] = {"kernel": math.inf, "dense": math.inf}
    for backend in best:
        with choice.use_backend(backend):
            run()
    spent, rounds = 0.0, 0
    while rounds < least or spent < 2 * seconds:
        for backend in best:
            with choice.use_backend(backend):
                taken = _gpu_ms(run, device) if device.type == "cuda" else _host_ms(run)
            best[backend], spent = min(best[backend], taken), spent + 1e-3 * taken
        rounds += 1
    return best["dense"] / best["kernel"]


def _host_ms(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


def _gpu_ms(run: Callable[[], Any], device: torch.device, together: int = 5) -> float:
    """Of one of several runs on this GPU, which the host has launched before it begins with the first."""
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        launching = 1e-3 * _host_ms(run)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(2 * together * launching * 2e9))  # clocks, of some 2 GHz
        start.record()
        for _ in range(together):
            run()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / together
