"""Tensors that are divided among processes: the parameters of FSDP2 (``fully_shard``), their gradients and state.

FSDP2 divides a parameter along its first dimension, as a ``DTensor``, and gives its modules the whole one for the
forward and the backward pass. What asks for a whole tensor here is a collective: every process has to ask.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sparse_moon.distributed import world_size


def _loaded(name: str) -> Any:
    """A module of torch that whoever divides tensors has imported; importing it takes a second."""
    return sys.modules.get(name)


def is_sharded(tensor: object) -> bool:
    """Whether the tensor is divided among processes."""
    tensors = _loaded("torch.distributed.tensor")
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, detached, the same on every process; others as they are."""
    sharded: Any = tensor
    return sharded.detach().full_tensor() if is_sharded(tensor) else tensor


def part_of(tensor: Tensor) -> Tensor:
    """What this process has of a sharded tensor, sharing memory with it; others as they are."""
    sharded: Any = tensor
    return sharded.detach().to_local() if is_sharded(tensor) else tensor


def divided_alike(first: Tensor, second: Tensor) -> bool:
    """Whether both are whole, or divided in the same way."""
    one: Any = first
    other: Any = second
    if not is_sharded(first) or not is_sharded(second):
        return is_sharded(first) == is_sharded(second)
    return one.placements == other.placements and one.device_mesh == other.device_mesh


def divided_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor in the way in which ``like`` is divided, or whole like it; one that is whole is divided unsent."""
    if divided_alike(tensor, like):
        return tensor
    tensor = whole(tensor)
    if not is_sharded(like):
        return tensor
    sharded: Any = like
    distribute = _loaded("torch.distributed.tensor").distribute_tensor
    return distribute(tensor, sharded.device_mesh, sharded.placements, src_data_rank=None)


def refuse_sharded(what: str, tensors: Iterable[Tensor], instead: str) -> None:
    """Raise ``ValueError`` where one of the tensors is divided among processes, with what to do instead."""
    if any(is_sharded(tensor) for tensor in tensors):
        raise ValueError(f"{what} needs whole tensors, these are divided among processes (fully_shard): {instead}")


def division_problem(tensor: Tensor) -> str | None:
    """What is wrong with the way in which a parameter is divided, or None.

    Topologies are chosen from means over all processes, so all processes have to share in the parameter: along its
    first dimension, with copies of that on other dimensions of the mesh (HSDP) or without.
    """
    if not is_sharded(tensor):
        return None
    sharded: Any = tensor
    mesh, placements = sharded.device_mesh, sharded.placements
    shards = [placement for placement in placements if not placement.is_replicate()]
    if len(shards) > 1 or any(not placement.is_shard(0) for placement in shards):
        return f"they are divided as {placements}, not along their first dimension"
    if mesh.size() != world_size():
        return f"they are divided among {mesh.size()} of {world_size()} processes"
    return None


def sharding_modules(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` was called for."""
    fsdp = _loaded("torch.distributed.fsdp")
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def reshard(modules: Iterable[Any]) -> None:
    """Give modules of :func:`sharding_modules` their sharded parameters again, which an evaluation leaves whole."""
    for module in modules:
        module.reshard()


@contextmanager
def gathered(module: nn.Module, name: str, parameter: Tensor) -> Iterator[None]:
    """Inside the block the module's parameter is the whole of a sharded one, with its gradient; others stay.

    Args:
        module, name: where the parameter stands; FSDP2 may have put its own whole one there, in another dtype.
        parameter: the sharded one.
    """
    if not is_sharded(parameter):
        yield
        return
    before = module._parameters[name]
    there = nn.Parameter(whole(parameter), parameter.requires_grad)
    if parameter.grad is not None:
        there.grad = whole(parameter.grad)
    module._parameters[name] = there
    try:
        yield
    finally:
        module._parameters[name] = before
