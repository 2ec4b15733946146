"""Weights of a trained network from a local file."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Where a training keeps them beside its own state.
_KEYS = ("state_dict", "model")
_PREFIX = "module."  # of DataParallel


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict, as ``torch.save`` writes it, into a dense model, in place.

    Nothing in the file is executed. The state dict may be below ``state_dict`` or ``model``, and of a ``DataParallel``.
    Its head, the last linear layer, may have another number of outputs: then the model's starts at random, with a
    warning.

    Raises:
        ValueError: there is no such file, it is damaged or holds other things, or it is of another network.
    """
    state, own = _read(path), model.state_dict()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    head = {name for name in own.keys() & state.keys() if linear and name.rpartition(".")[0] == linear[-1]}
    if any(own[name].shape != state[name].shape and own[name].shape[1:] == state[name].shape[1:] for name in head):
        outputs, wanted = (len(next(tensors[name] for name in head)) for tensors in (state, own))
        message = f"{path}: its head has {outputs} outputs, not {wanted}: that of the network starts at random"
        warnings.warn(message, stacklevel=2)
        state = {name: tensor for name, tensor in state.items() if name not in head}
    else:
        head = set()
    for name in sorted(own.keys() & state.keys()):
        if own[name].shape != state[name].shape:
            was, wants = tuple(state[name].shape), tuple(own[name].shape)
            raise ValueError(f"{path} is of another network: {name} is {was}, not {wants}")
    result = model.load_state_dict(state, strict=False)
    missing = [name for name in result.missing_keys if name not in head]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"{path} is of another network: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(result.unexpected_keys)} are unknown {result.unexpected_keys[:3]}"
        )


def _read(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected the file of weights")
    if not path.is_file():
        raise ValueError(f"{path}, the file of weights, does not exist")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises nearly anything
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path}: damaged, or not a file of tensors alone: {reason}") from None
    if isinstance(content, Mapping):
        content = next((content[key] for key in _KEYS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path}: expected a state dict, got {type(content).__name__} of other things than tensors")
    if not content:
        raise ValueError(f"{path}: a state dict without tensors")
    whole = all(name.startswith(_PREFIX) for name in content)
    return {name.removeprefix(_PREFIX) if whole else name: tensor for name, tensor in content.items()}
