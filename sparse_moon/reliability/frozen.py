"""Weights that a random mask hides stay as they are in a step of the optimizer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_moon.algorithms.optimizers import inner_optimizers, start_of
from sparse_moon.random_mask import RandomMask
from sparse_moon.sharding import divided_like, part_of


def freeze_hidden(mask: RandomMask, optimizer: Optimizer) -> None:
    """Keep the weights that ``mask`` hides from moving: CigL's Algorithm 1 (ICLR 2023), ``W <- W - lr M Z grad``.

    Their gradients are 0 anyway. With momentum, weight decay or the running means of Adam a weight moves without a
    gradient, too, a little each step. From now on, in a step of the optimizer while a mask is drawn, hidden weights
    keep their value and what the optimizer keeps for each of them (momentum), as though they had no part in that step;
    what it keeps for all of a parameter, such as Adam's count of steps, goes on. For the time of a step that takes a
    copy of the sparse weights and their state.

    Where gradients of several draws are accumulated for a step, or of passes with and without a mask, a hidden weight
    with a gradient, from a pass that showed it, moves.

    Args:
        mask: see :class:`sparse_moon.RandomMask`.
        optimizer: trains the mask's layers; of one that wraps another (accelerate) the inner steps count.
    """
    inner = inner_optimizers(optimizer)[-1]
    before: list[tuple[nn.Parameter, Tensor, Tensor, dict[str, Tensor]]] = []
    draws = mask.draws

    @torch.no_grad()
    def remember(*_: Any) -> None:
        nonlocal draws
        before.clear()
        # with one draw a gradient of a hidden weight is none of the network's, but that of a penalty
        several, draws = mask.draws - draws > 1, mask.draws
        for stream, layer in enumerate(mask.layers if mask.drawn else ()):
            hidden = ~part_of(divided_like(mask.mask(stream, layer), layer.values))
            if several and layer.values.grad is not None:
                hidden &= part_of(layer.values.grad) == 0
            states = {key: part_of(state).clone() for key, state in _per_weight(inner, layer.values).items()}
            before.append((layer.values, hidden, part_of(layer.values).clone(), states))

    @torch.no_grad()
    def put_back(*_: Any) -> None:
        for values, hidden, old, states in before:
            _put_back(part_of(values), hidden, old)
            for key, state in _per_weight(inner, values).items():
                part = part_of(state)
                _put_back(part, hidden, states.get(key, part.new_full((), start_of(inner, key, values))))
        before.clear()

    inner.register_step_pre_hook(remember)
    inner.register_step_post_hook(put_back)


def _put_back(tensor: Tensor, hidden: Tensor, old: Tensor) -> None:
    tensor.copy_(torch.where(hidden, old, tensor))


def _per_weight(optimizer: Optimizer, values: nn.Parameter) -> dict[str, Tensor]:
    """What the optimizer keeps for each weight, by name."""
    states = optimizer.state.get(values, {})
    return {key: state for key, state in states.items() if isinstance(state, Tensor) and state.shape == values.shape}
