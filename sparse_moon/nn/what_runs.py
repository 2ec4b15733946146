"""Which of a model's sparse products run on sparse kernels, and which pattern would where none does."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_moon.nn.inspect import evaluation_mode, sparse_layers
from sparse_moon.nn.layers import SparseLayer
from sparse_moon.ops import choice
from sparse_moon.ops.choice import Backend, Pass, Work
from sparse_moon.ops.index import pattern_name
from sparse_moon.ops.layout import memory_format

Batch = Tensor | Sequence[Any] | Mapping[str, Any]
"""What a model is called with: a tensor, positional arguments, or keyword arguments."""

_DTYPES = {"float32": "float32", "tf32": "float32 by TF32", "bfloat16": "16 bits"}


def what_runs(model: nn.Module, batch: Batch) -> dict[str, dict[Pass, Backend]]:
    """Which implementation each sparse layer takes for a batch, forward and backward.

    One forward pass finds the layers' inputs; then each layer does a forward and a backward pass by itself, on zeros,
    so that all takes about as long as a training step. No weight, gradient or statistic changes. It is asked outside of
    :func:`sparse_moon.ops.use_backend` blocks.

    Args:
        model: with sparse layers, which may be compiled or wrapped.
        batch: of the size, dtype, layout and device of training; a tensor, or a tuple of positional or a mapping of
            keyword arguments. For training under autocast call this under autocast.

    Returns:
        For each layer by name ``"kernel"`` or ``"dense"`` for each pass: ``forward``, and ``grads`` or those gradients
        that are needed of ``input_grad`` and ``values_grad``. Layers that the model does not call are not in it.
    """
    return {name: _backends(layer) for name, layer in _asked(model, batch)}


def what_would_pay(model: nn.Module, batch: Batch, densities: Mapping[str, float] | None = None) -> str | None:
    """Where no product of a model runs on a sparse kernel, a sentence that says so, and which pattern would change it.

    Patterns are those that were measured on this kind of device, at sizes and densities at which they were measured to
    pay, of the same dtype, or of 16 bits. Where all patterns have one speed, as on the CPU, nothing is said.

    Args:
        model, batch: as for :func:`what_runs`.
        densities: by layer, where training ends with others than the model has now.

    Returns:
        None where some product runs on a kernel, or there is no sparse layer.
    """
    device = next((layer.values.device for layer in sparse_layers(model).values()), None)
    if device is None or (device.type == "cpu" and all(work.block == (1, 1) for work, _ in choice.table(device.type))):
        return None
    layers = [
        layer._replace(density=(densities or {}).get(name, layer.density)) for name, layer in _asked(model, batch)
    ]
    if not layers or any("kernel" in _backends(layer).values() for layer in layers):
        return None
    works = [work for layer in layers for work in layer.works]
    patterns = {pattern_name(layer.block) for layer in layers}
    dtypes = {_DTYPES.get(work.dtype, work.dtype) for work in works}
    what = f"{' and '.join(sorted(patterns))} weights" + (f" in {' and '.join(sorted(dtypes))}" if dtypes else "")
    sparsities = [1.0 - layer.density for layer in layers]
    low, high = min(sparsities), max(sparsities)
    at = f"{low:.0%}" if high - low < 0.005 else f"{low:.0%} to {high:.0%}"
    return (
        f"no sparse kernel is known to pay on this device for {what} at {at} sparsity: all {len(layers)} sparse layers "
        f"run dense products, no faster than a dense network; {_advice(layers, works, device.type)}"
    )


class _Layer(NamedTuple):
    """A sparse layer, and the products that it asked about."""

    density: float
    block: tuple[int, int]
    shape: tuple[int, ...]
    passes: tuple[Pass, ...]
    works: tuple[Work, ...]


def _asked(model: nn.Module, batch: Batch) -> Iterator[tuple[str, _Layer]]:
    layers = sparse_layers(model)
    found: dict[nn.Module, tuple[torch.Size, torch.dtype, torch.memory_format, bool]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        found.setdefault(module, (x.shape, x.dtype, memory_format(x), x.requires_grad))

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers.values()]
    try:
        with evaluation_mode(model), torch.enable_grad():
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(*((batch,) if isinstance(batch, Tensor) else batch))
    finally:
        for handle in handles:
            handle.remove()
    for name, layer in layers.items():
        if layer in found:
            yield name, _ask(layer, *found[layer])


def _ask(
    layer: SparseLayer, shape: torch.Size, dtype: torch.dtype, layout: torch.memory_format, requires_grad: bool
) -> _Layer:
    x = torch.zeros(shape, dtype=dtype, device=layer.values.device).contiguous(memory_format=layout)
    x.requires_grad_(requires_grad)
    with torch.enable_grad(), choice.asked_for() as works:
        output = layer.forward(x)
        needed: dict[Pass, Tensor] = {"input_grad": x, "values_grad": layer.values}
        needed = {pass_: tensor for pass_, tensor in needed.items() if tensor.requires_grad}
        if needed:
            torch.autograd.grad(output, list(needed.values()), torch.zeros_like(output))
    return _Layer(
        1.0 - layer.sparsity,
        layer.topology.block,
        layer.weight_shape,
        ("forward", *needed),
        tuple(dict.fromkeys(works)),
    )


def _backends(layer: _Layer) -> dict[Pass, Backend]:
    chosen: dict[Pass, Backend] = {
        work.pass_: "kernel" if choice.pays(work, layer.density) else "dense" for work in layer.works
    }
    if "input_grad" in chosen:  # it was asked for both gradients at once, and then for each
        chosen.pop("grads", None)
    # what no kernel takes is not asked about
    needed: list[Pass] = [pass_ for pass_ in layer.passes if pass_ == "forward" or "grads" not in chosen]
    return {pass_: chosen.get(pass_, "dense") for pass_ in needed} | chosen


def _advice(layers: Sequence[_Layer], works: Sequence[Work], device: str) -> str:
    measured = list(dict.fromkeys((work.block, work.dtype) for work, _ in choice.table(device)))
    if not measured or not works:
        why = "there is none for them" if measured else "none was measured there"
        return f"{why}, sparse_moon.tune(model, ...) measures what there is"
    pays: Counter[str] = Counter()
    for block, dtype in measured:
        for layer in layers:
            if layer.shape[0] % block[0] or layer.shape[1] % block[1] or not layer.works:
                continue
            own = {work.dtype for work in layer.works}
            others = [work._replace(block=block, dtype=dtype) for work in layer.works]
            if dtype in {*own, "bfloat16"} and all(choice.pays(work, layer.density) for work in others):
                pays[pattern_name(block) + (f" in {_DTYPES.get(dtype, dtype)}" if dtype not in own else "")] += 1
    if not pays:
        return "no pattern was measured to pay at these sizes and densities"
    named = [f"{pattern} pays in {count} of them" for pattern, count in pays.most_common(3)]
    return f"the pattern {', '.join(named)}"
