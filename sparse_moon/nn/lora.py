"""Fine-tuning by low-rank factors that keep a model as sparse as it is."""

import math
import warnings
from collections.abc import Iterable

import torch
from torch import nn

from sparse_moon.nn.inspect import tied_layers
from sparse_moon.nn.layers import Exclude
from sparse_moon.nn.low_rank import LowRank
from sparse_moon.nn.plan import matching, some, wrapped


def lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float | None = None,
    *,
    exclude: Iterable[Exclude] | Exclude = (),
    train: Iterable[Exclude] | Exclude = (),
) -> nn.Module:
    """Give the sparse layers of a model low-rank factors to train in place of their weights, in place.

    A layer's weight W becomes ``W + alpha / rank * (B A)`` at the entries of its topology, as LoRA (Hu et al. 2021)
    adds the product to a dense weight. Elsewhere there is none of it, so the network stays as sparse as it is, and
    :func:`merge_lora` takes the product into the values without any loss. B is 0 at the start: the model computes what
    it did before. That a mask is kept so, where plain LoRA would fill the zeros, is what SQFT (Munoz et al. 2024) calls
    SparsePEFT.

    All parameters but the factors are frozen: values, biases, norms, and dense layers, which get no factors. What is to
    train besides, such as a new head, is named in ``train``. Layers that share their weight share the factors.

    For n entries of a weight with O outputs and I inputs (of a convolution, those times the taps) a training step
    takes ``6 rank n`` more FLOPs than one of the network itself, whatever the batch, and n numbers more memory until
    the backward pass; no dense matrix is made where kernels pay (see :mod:`sparse_moon.ops.sampled_product`). In place
    of n values, ``rank (O + I)`` numbers have gradients and optimizer state that stay. In evaluation, too, the product
    is made in every pass, until it is merged.

    Args:
        model: with sparse layers; changed in place. Build the optimizer afterwards, and compile or wrap the model
            afterwards.
        rank: r of the factors.
        alpha: scales the product, by ``alpha / rank``; by default rank.
        exclude: sparse layers to give no factors, as in :func:`sparse_moon.sparsify`. They are frozen.
        train: modules whose parameters stay as they are, trained where they were, named in the same way; those that
            are sparse layers get no factors.

    Returns:
        The model itself.

    Raises:
        ValueError: a rank or alpha out of range, no sparse layers left, factors already there, a name that matches no
            module, or a model that is compiled or wrapped for several processes. The model is then as it was.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    alpha = float(rank) if alpha is None else alpha
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    if wrapped(model) is not None:
        raise ValueError(f"give the model factors before {type(model).__name__} wraps it: its parameters become others")
    if any(isinstance(module, LowRank) for module in model.modules()):
        raise ValueError("the model has factors already: merge_lora(model) first")
    trained = {module for outer in matching(model, train, "train") for module in outer.modules()}
    left_out = trained | {module for outer in matching(model, exclude, "exclude") for module in outer.modules()}
    tied = {
        first: layers for first, layers in tied_layers(model).items() if left_out.isdisjoint(layers)
    }  # fmt: skip
    if not tied:
        raise ValueError("no sparse layer is to have factors: call sparsify(model, ...) first, or exclude fewer")
    kept = {parameter for module in trained for parameter in module.parameters(recurse=False)}
    for module in model.modules():
        frozen = [n for n, p in module.named_parameters(recurse=False) if p.requires_grad and p not in kept]
        for name in frozen:
            module.get_parameter(name).requires_grad_(False)
        if frozen:
            module.frozen_by_lora = frozen  # type: ignore[assignment]  # for merge_lora
    names = {module: name for name, module in model.named_modules()}
    larger = []
    for layer, sharing in tied.items():
        low_rank = LowRank(layer.topology, rank, alpha, layer.values.device, layer.values.dtype)
        low_rank.train(layer.training)
        for one in sharing:
            one.set_lora(low_rank)
        if rank * sum(layer.topology.shape) >= layer.topology.nnz:
            larger.append(names[layer])
    if larger:
        warnings.warn(
            f"factors of rank {rank} have no fewer numbers than the values of {some(larger)}: take a smaller rank, or "
            "train these layers themselves, with train=...",
            stacklevel=2,
        )
    return model


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Take the product of the factors of :func:`lora` into the values, in place; nothing where there are none.

    The values are then, to the bit, those that the products of the layers were computed with. Topology, names and
    ``state_dict`` are those before :func:`lora`, and what that froze trains again. Build the optimizer afterwards.

    Returns:
        The model itself.
    """
    for layer, sharing in tied_layers(model).items():
        if layer.lora is not None:
            layer.values.copy_(layer.lora(layer.values, layer.topology))
            for one in sharing:
                one.set_lora(None)
                one.note_written()
    for module in model.modules():
        for name in module.__dict__.pop("frozen_by_lora", ()):
            module.get_parameter(name).requires_grad_(True)
    return model
