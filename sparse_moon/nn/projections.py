"""Linear layers in other forms: while a model is converted or counted, they are linear layers as all others."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn

from sparse_moon.nn.attention import SparseMultiheadAttention, can_unpack, pack, unpack
from sparse_moon.nn.conv1d import is_conv1d, turn, turn_back, turned


@contextmanager
def as_linear_layers(model: nn.Module, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[None]:
    """Inside the block the projections of ``nn.MultiheadAttention`` are ``nn.Linear``, and so is a ``Conv1D``.

    Those of an attention are called ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``; their weights are views of the
    packed one. Afterwards all is as before, the parameters the same objects, but where a layer was replaced by a sparse
    one: an attention that has such a projection stays a :class:`SparseMultiheadAttention`.

    Subclasses are left alone, as their code may read the weights, and so are weights that other modules have, too.

    Args:
        wanted: asked with each name of such a module.
    """
    users: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(parameter, []).append(module)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    asked = [module for module, called in names.items() if any(map(wanted, called))]
    attentions = [
        module for module in asked
        if can_unpack(module) and all(users[p] == [module] for p in module.parameters(recurse=False))
    ]  # fmt: skip
    conv1ds = [module for module in asked if is_conv1d(module) and all(map(is_conv1d, users[_weight(module)]))]

    packed = {module: dict(module._parameters) for module in attentions}
    weights = {module: _weight(module) for module in conv1ds}
    views = {weight: turned(weight) for weight in weights.values()}  # layers that share a weight still do
    for module in attentions:
        unpack(module)
    for module in conv1ds:
        turn(module, views[weights[module]])
    try:
        yield
    finally:
        for module, parameters in packed.items():
            _leave(module, parameters)
        for module, weight in weights.items():
            turn_back(module, weight)


def _weight(module: nn.Module) -> nn.Parameter:
    return cast(nn.Parameter, module.weight)


def _leave(attention: nn.Module, parameters: dict[str, nn.Parameter | None]) -> None:
    """What becomes of an attention at the end of the block."""
    assert isinstance(attention, SparseMultiheadAttention)
    layers = attention.inputs().values()
    if attention.is_sparse():
        for layer in layers:
            for parameter in layer.parameters():  # may be a view of what else nobody has any more
                parameter.data = parameter.data.clone()
        return
    because = next((layer.dense_because for layer in layers if "dense_because" in layer.__dict__), None)
    pack(attention, parameters)
    if because is not None:
        attention.dense_because = because
