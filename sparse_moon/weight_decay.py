"""Weight decay for models with sparse layers.

A sparse layer's ``values`` are weights, but have one dimension, so rules that go by dimensions (``p.dim() >= 2``) take
their weight decay away. The same holds for other splits by dimensions: Muon is for matrices, and ``values`` are none,
whatever their shape, (n,) or blocks (n, bh, bw): give them to the optimizer of the rest. They are
``[layer.values for layer in sparse_moon.sparse_layers(model).values()]``.
"""

import math
import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from sparse_moon.nn import sparse_layers
from sparse_moon.nn.plan import unwrapped

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def param_groups(model: nn.Module, weight_decay: float, no_decay: Iterable[str] | str = ()) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: weight decay on weights, none on biases, norms and others.

    ``torch.optim.AdamW(sm.param_groups(model, 0.05), lr=1e-3)``. Weights are the ``values`` of sparse layers, and
    parameters of two dimensions or more that are neither a bias nor of a norm. Frozen parameters are left out; a tied
    one comes once.

    Args:
        model: with or without sparse layers, also in ``DistributedDataParallel``.
        weight_decay: at least 0.
        no_decay: names of more parameters without decay, as ``model.named_parameters()`` has them, with ``*`` and
            ``?``; a tied parameter has several.

    Returns:
        One or two groups ``{"params": [...], "weight_decay": ...}``, in the model's order, without empty ones.

    Raises:
        ValueError: a weight decay below 0 or not finite, a name that no parameter has.
    """
    if isinstance(weight_decay, str) or weight_decay is None:
        raise TypeError(f"weight_decay must be a number, got {weight_decay!r}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be finite and at least 0, got {weight_decay}")
    model, patterns = unwrapped(model), (no_decay,) if isinstance(no_decay, str) else tuple(no_decay)
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for several in names.values() for name in several):
            raise ValueError(f"no_decay {pattern!r} matches no parameter of the model")
    weights = _weights(model)
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter, several in names.items():
        if parameter.requires_grad:
            excepted = any(fnmatchcase(name, pattern) for name in several for pattern in patterns)
            (decayed if parameter in weights and not excepted else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def check_weight_decay(model: nn.Module, optimizer: Optimizer) -> None:
    """Warn, once for the model, where sparse weights have lost the weight decay that the dense ones have.

    That is where they have less than any dense weight, or none while some dense weight has; and where the group with
    the decay is empty, because a rule found no weight at all.
    """
    model = unwrapped(model)
    decay = {p: group.get("weight_decay", 0.0) for group in optimizer.param_groups for p in group["params"]}
    sparse = {layer.values: name for name, layer in sparse_layers(model).items()}
    dense = [decay[p] for p in _weights(model) if p in decay and p not in sparse]
    dense += [group.get("weight_decay", 0.0) for group in optimizer.param_groups if not group["params"]]
    if not dense:
        return
    lost = [
        name for values, name in sparse.items()
        if values in decay and (decay[values] < min(dense) or decay[values] == 0 < max(dense))
    ]  # fmt: skip
    if lost:
        shown = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
        warnings.warn(
            f"the weights of {len(lost)} sparse layers ({shown}) have less weight decay than dense weights "
            f"(up to {max(dense)}): unstructured ones are 1-d, as biases are. "
            "Build the optimizer with sm.param_groups(model, weight_decay)",
            stacklevel=3,
        )


def _weights(model: nn.Module) -> dict[nn.Parameter, None]:
    """Parameters that weight decay is meant for, in the model's order."""
    values = {layer.values for layer in sparse_layers(model).values()}
    other: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            bias = name == "bias" or name.startswith("bias_") or name.endswith("_bias")
            if bias or isinstance(module, _NORMS) or parameter.dim() < 2:
                other.add(parameter)
    return dict.fromkeys(parameter for parameter in model.parameters() if parameter in values or parameter not in other)
