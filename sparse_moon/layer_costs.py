"""FLOPs of a forward pass, layer by layer."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_moon.nn import SparseConv1D, SparseConv2d, SparseLayer, SparseLinear, SparseMultiheadAttention
from sparse_moon.nn.conv1d import TransposedLinear
from sparse_moon.nn.inspect import Inputs, run_once, weights
from sparse_moon.nn.projections import as_linear_layers

_Layer = nn.Linear | nn.Conv2d | SparseLayer
_EXACT = (nn.Linear, nn.Conv2d, TransposedLinear, SparseLinear, SparseConv1D, SparseConv2d)


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer's forward pass.

    Attributes:
        name: of the module in the model.
        kind: ``"linear"`` or ``"conv2d"``, or the type of another module.
        weight_shape: of the dense weight, (out, in) or (out, in / groups, kh, kw); () for a module that has none or
            several.
        density: share of its weights that exist, in [0, 1].
        forward_dense, forward_sparse: FLOPs, all calls together, at density 1 and at ``density``.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    density: float
    forward_dense: int
    forward_sparse: float


def layer_costs(model: nn.Module, inputs: Inputs, densities: Mapping[str, float] | None = None) -> list[LayerCost]:
    """Cost of one forward pass: of every linear and 2-d convolution layer, dense or sparse, and of what else costs.

    A convolution costs ``2 kh kw (in / groups) out Ho Wo density``, a linear layer ``2 in out tokens density``, where
    tokens are all leading dimensions. A layer that is called several times costs each call, one that is not called
    costs 0.

    The projections of ``nn.MultiheadAttention``, dense or sparse, are linear layers called ``q_proj``, ``k_proj``,
    ``v_proj`` and ``out_proj`` in it, and so is the ``Conv1D`` of transformers.

    All other products are counted by ``torch.utils.flop_counter`` and belong to the innermost module in whose forward
    pass they run: both products of an attention, recurrent layers, other convolutions, and matrix products in the
    model's own code, with or without weights. Such modules follow with the layers in the model's order.

    The pass is in evaluation mode and without gradients; the model is left as it was. A model on the ``meta`` device
    costs neither time nor memory.

    Args:
        inputs: the shape of one example without the batch dimension, for a batch of one in the dtype and on the device
            of the first parameter (of int64 for the table of an ``nn.Embedding``); or example inputs, a tensor, a tuple
            of positional or a mapping of keyword arguments, for the cost of that whole batch.
        densities: density by layer name, for layers that are not sparse modules; those not named have the density of
            one that shares their weight, or 1. A sparse module has the density of its topology.

    Raises:
        ValueError: nothing that costs, a density outside [0, 1], or one for a name that is no dense layer.
    """
    with as_linear_layers(model):
        costs = list(_costs(model, inputs, {} if densities is None else densities))
    if not costs:
        raise ValueError("the model has no linear or 2-d convolution layer, and computes no other products")
    return costs


def _costs(model: nn.Module, inputs: Inputs, densities: Mapping[str, float]) -> Iterator[LayerCost]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _Layer)}
    for name, density in densities.items():
        if name not in layers or isinstance(layers[name], SparseLayer):
            raise ValueError(f"densities name {name!r}, which is not a dense linear or convolution layer of the model")
        if not 0.0 <= density <= 1.0:
            raise ValueError(f"the density of {name!r} must be in [0, 1], got {density}")
    shared = {layers[name]._parameters.get("weight"): density for name, density in densities.items()}
    shared.pop(None, None)  # of computed weights

    outputs, products = _count(model, inputs)
    for name, module in model.named_modules():
        if isinstance(module, _Layer):
            shape = module.weight_shape if isinstance(module, SparseLayer) else tuple(module.weight.shape)
            density = densities.get(name, shared.get(module._parameters.get("weight"), 1.0))
            if isinstance(module, SparseLayer):
                density = module.topology.nnz / module.topology.numel
            # Each output number takes one multiplication and one addition for every weight of its row.
            forward = 2 * math.prod(shape[1:]) * outputs.get(module, 0)
            if type(module) not in _EXACT:  # whose code may compute something else
                forward = products.get(module, 0) or forward
            kind = "linear" if isinstance(module, nn.Linear | SparseLinear) else "conv2d"
            yield LayerCost(name, kind, shape, density, forward, forward * density)
        elif products.get(module, 0):
            own = [weight.shape for weight in weights(module) if weight.module is module]
            shape = own[0] if len(own) == 1 else ()
            forward = products[module]
            kind = "MultiheadAttention" if isinstance(module, SparseMultiheadAttention) else type(module).__name__
            yield LayerCost(name, kind, shape, 1.0, forward, float(forward))


def _count(model: nn.Module, inputs: Inputs) -> tuple[dict[nn.Module, int], dict[nn.Module, int]]:
    """How many numbers each linear and convolution layer puts out, and the FLOPs of each module without inner ones."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    outputs: dict[nn.Module, int] = {}
    products: dict[nn.Module, int] = {}
    running: list[list[int]] = []  # FLOPs when a call began, and those of the calls inside
    aten = torch.ops.aten
    missing = {
        aten.mv: _matrix_vector, aten.addmv: _sum_matrix_vector, aten._trilinear: _trilinear,
        aten.mkldnn_rnn_layer: _rnn_layer, aten._cudnn_rnn: _rnn_layers,
    }  # fmt: skip
    counter = FlopCounterMode(display=False, custom_mapping=missing)

    def enter(module: nn.Module, _: Any) -> None:
        running.append([counter.get_total_flops(), 0])

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        before, inside = running.pop()
        whole = counter.get_total_flops() - before
        products[module] = products.get(module, 0) + whole - inside
        if running:
            running[-1][1] += whole
        if isinstance(module, _Layer) and isinstance(output, Tensor):
            outputs[module] = outputs.get(module, 0) + output.numel()

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        stack.enter_context(_attention_by_products())
        stack.enter_context(counter)
        run_once(model, inputs)
    return outputs, products


def _matrix_vector(matrix: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)


def _sum_matrix_vector(sum_: Sequence[int], matrix: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)


def _trilinear(input: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Of ``nn.Bilinear``: each weight once for each of the rows."""
    return 2 * input[0] * math.prod(weight)


def _rnn_layer(input: Sequence[int], *weights: Any, **_: Any) -> int:
    """Of one layer in one direction: each weight, of the input and of the hidden state, once for each place."""
    return 2 * math.prod(input[:-1]) * (math.prod(weights[0]) + math.prod(weights[1]))


def _rnn_layers(input: Sequence[int], weights: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
    return 2 * math.prod(input[:-1]) * sum(math.prod(weight) for weight in weights if len(weight) > 1)


@contextmanager
def _attention_by_products() -> Iterator[None]:
    """Have torch compute attention by products that its counter knows, not by one operator."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
