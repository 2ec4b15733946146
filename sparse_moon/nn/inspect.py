"""What a model is made of: its layers, its weights, and which of them exist."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import UnionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.nn.utils.weight_norm import WeightNorm

from sparse_moon.nn.conv1d import TransposedLinear
from sparse_moon.nn.layers import SparseLayer
from sparse_moon.nn.low_rank import LowRank

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""What a model is called with: the shape of one example, a tensor, positional arguments, or keyword arguments."""

_NO_WEIGHTS = (
    nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, LowRank,
)  # fmt: skip


@dataclass(frozen=True)
class Weight:
    """A weight of a model, of whatever module.

    Attributes:
        name: of the first module that has it.
        module: that module.
        shape: of the weight as a dense tensor.
        present: how many of its numbers exist.
        key: the identities of the parameters that it is made of, which live as long as the model.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    present: int
    key: frozenset[int]

    @property
    def numel(self) -> int:
        """How many numbers it has as a dense tensor."""
        return math.prod(self.shape)

    @property
    def kind(self) -> str:
        """Type of the module, as users know it."""
        kind = kind_of(self.module)
        if kind in (nn.Linear, nn.Conv2d):
            return kind.__name__ if "weight" in self.module._parameters else f"{kind.__name__} with a computed weight"
        if kind.__name__ in ("Linear", "Conv2d"):  # a subclass of the same name
            return f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
        return "MultiheadAttention" if kind is NonDynamicallyQuantizableLinear else kind.__name__


def kind_of(module: nn.Module) -> type[nn.Module]:
    """Its type, which a ``Conv1D`` has another one of while a model is converted."""
    return module.conv1d if isinstance(module, TransposedLinear) else type(module)


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The model's sparse layers by name; layers that share their weight are listed once, under the first name."""
    return {name: layer for name, layer in weight_layers(model).items() if isinstance(layer, SparseLayer)}


def transform_name(layer: nn.Module | None) -> str | None:
    """Name of the function or module that a sparse layer's values go through; a state dict has its parameters alone."""
    transform = layer.transform if isinstance(layer, SparseLayer) else None
    return None if transform is None else getattr(transform, "__name__", type(transform).__name__)


def tied_layers(model: nn.Module) -> dict[SparseLayer, list[SparseLayer]]:
    """For each layer of :func:`sparse_layers` all that have its weight: itself first, then those that share it."""
    groups: dict[frozenset[int], list[SparseLayer]] = {}
    for module in model.modules():
        if isinstance(module, SparseLayer):
            groups.setdefault(_layer_key(module), []).append(module)
    return {layers[0]: layers for layers in groups.values()}


def weight_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d | SparseLayer]:
    """Every linear and convolution layer, sparse or dense, by name; layers that share their weight are listed once."""
    seen: set[frozenset[int]] = set()
    layers: dict[str, nn.Linear | nn.Conv2d | SparseLayer] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | SparseLayer):
            key = _layer_key(module)
            if key not in seen:
                seen.add(key)
                layers[name] = module
    return layers


def _layer_key(layer: nn.Linear | nn.Conv2d | SparseLayer) -> frozenset[int]:
    """What tells a layer's weight from others: the parameters that it is made of, or the layer where there are none.

    The weight itself will not do: where it is computed from parameters (``torch.nn.utils.parametrize``, ``prune``,
    ``weight_norm``), it is another tensor each time, and the next may have the address of the last.
    """
    name = "values" if isinstance(layer, SparseLayer) else "weight"
    made_of = [p for key, p in layer._parameters.items() if p is not None and key.partition("_")[0] == name]
    if is_parametrized(layer, name):
        made_of += _parametrization(layer, name).parameters()
    return frozenset(map(id, made_of)) or frozenset([id(layer)])


def _parametrization(module: nn.Module, name: str) -> ParametrizationList:
    return module.parametrizations[name]  # type: ignore[index, return-value]


def weights(model: nn.Module, kinds: type[nn.Module] | UnionType = nn.Module) -> list[Weight]:
    """All weights of a model, or those of these kinds of modules, each once.

    Those are the parameters with two or more dimensions, embeddings and position tables included, but not the
    parameters of norms, nor those with "bias" in their name, nor the factors of :func:`sparse_moon.lora`. A sparse
    layer's weight has its dense shape, and so has a weight that is computed from parameters
    (``torch.nn.utils.parametrize``, ``prune``, ``weight_norm``).

    Raises:
        ValueError: lazy modules whose parameters have no shape yet.
    """
    found: dict[frozenset[int], Weight] = {}
    module: nn.Module
    for name, module in model.named_modules():
        if not isinstance(module, kinds) or isinstance(module, _NO_WEIGHTS) or ".parametrizations." in f".{name}.":
            continue
        if isinstance(module, SparseLayer):
            key = _layer_key(module)
            found.setdefault(key, Weight(name, module, module.weight_shape, module.topology.nnz, key))
            continue
        for key, shape in _dense_weights(name, module):
            found.setdefault(key, Weight(name, module, shape, math.prod(shape), key))
    return list(found.values())


def _dense_weights(name: str, module: nn.Module) -> Iterator[tuple[frozenset[int], tuple[int, ...]]]:
    hooks = module._forward_pre_hooks.values()
    magnitudes = {f"{hook.name}_g" for hook in hooks if isinstance(hook, WeightNorm)}
    for key, parameter in module._parameters.items():
        if parameter is None or "bias" in key or key in magnitudes:
            continue
        if is_lazy(parameter):
            raise ValueError(f"the {type(module).__name__} {name!r} has no shape yet: call the model once first")
        if parameter.dim() >= 2:
            yield frozenset([id(parameter)]), tuple(parameter.shape)
    if is_parametrized(module):
        for key in module.parametrizations:  # type: ignore[union-attr]
            parametrization = _parametrization(module, key)
            # spectral norm takes a step of its iteration whenever it is asked in training mode
            with evaluation_mode(parametrization), torch.no_grad():
                shape = tuple(getattr(module, key).shape)
            if "bias" not in key and len(shape) >= 2:
                yield frozenset(map(id, parametrization.parameters())), shape


def layer_sparsities(model: nn.Module) -> dict[str, float]:
    """Sparsity of every linear and convolution layer, 0 for dense ones."""
    return {n: m.sparsity if isinstance(m, SparseLayer) else 0.0 for n, m in weight_layers(model).items()}


def live_outputs(model: nn.Module) -> dict[str, float]:
    """Share of the outputs (channels or features) of every linear and convolution layer that have a weight at all.

    An output without weights is a constant: at high sparsity some methods leave a layer few channels (see
    docs/topology-methods.md, RigL). 1 for dense layers.
    """
    return {
        name: (module.topology.row_ptr.diff() > 0).float().mean().item() if isinstance(module, SparseLayer) else 1.0
        for name, module in weight_layers(model).items()
    }


def fan_ins(model: nn.Module) -> dict[str, Tensor]:
    """How many weights the outputs of every sparse layer have: (rows / bh,) int64, a number a row of blocks."""
    return {
        n: layer.topology.row_ptr.diff().long() * layer.topology.block[1] for n, layer in sparse_layers(model).items()
    }


def overall_sparsity(model: nn.Module) -> float:
    """Share of all weights of a model that do not exist.

    All weights are the parameters with two or more dimensions of any module, an LSTM's or an embedding's too, and the
    dense size of sparse layers; not biases and norms (see :func:`weights`). Where only linear and convolution layers
    are to count, see :func:`linear_conv2d_sparsity`.

    Raises:
        ValueError: lazy modules whose parameters have no shape yet.
    """
    return _absent(weights(model))


def linear_conv2d_sparsity(model: nn.Module) -> float:
    """Share of the weights of all linear and 2-d convolution layers that do not exist; other modules do not count."""
    return _absent(weights(model, nn.Linear | nn.Conv2d | SparseLayer))


def _absent(weights: Sequence[Weight]) -> float:
    total = sum(weight.numel for weight in weights)
    return 1.0 - sum(weight.present for weight in weights) / total if total else 0.0


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; then every module has its own former mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def run_once(model: nn.Module, inputs: Inputs) -> None:
    """One forward pass in evaluation mode and without gradients; the model is left as it was.

    Args:
        inputs: example inputs, a tensor, or a tuple of positional or a mapping of keyword arguments; or the shape of
            one example without the batch dimension, a sequence of integers. That stands for one example of zeros in
            the dtype and on the device of the first parameter, or of int64 where that is the table of an
            ``nn.Embedding``.
    """
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    elif not isinstance(inputs, Mapping) and all(isinstance(size, int) for size in inputs):
        inputs = (_zeros(model, inputs),)
    with evaluation_mode(model), torch.no_grad():
        if isinstance(inputs, Mapping):
            model(**inputs)
        else:
            model(*inputs)


def _zeros(model: nn.Module, size: Sequence[int]) -> Tensor:
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                dtype = torch.int64 if isinstance(module, nn.Embedding | nn.EmbeddingBag) else parameter.dtype
                return torch.zeros(1, *size, dtype=dtype, device=parameter.device)
    return torch.zeros(1, *size)
