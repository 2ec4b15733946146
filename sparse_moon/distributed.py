"""What several processes need to agree on. Without an initialised process group there is one process."""

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def mean_over_processes_(tensor: Tensor) -> None:
    """Average a floating point tensor over all processes, in place; every process gets rank 0's bits."""
    if world_size() > 1:
        dist.reduce(tensor, dst=0)
        tensor /= world_size()
        dist.broadcast(tensor, src=0)


def average_gradients_(parameters: Iterable[Tensor]) -> None:
    """Average the gradients of parameters over all processes; where only some have one, the others' is 0."""
    known = list(parameters) if world_size() > 1 else []
    if not known:
        return
    there = torch.tensor([float(parameter.grad is not None) for parameter in known], device=known[0].device)
    for parameter, somewhere in zip(known, sum_over_processes(there).tolist(), strict=True):
        if somewhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            mean_over_processes_(parameter.grad)


def launched_alone() -> bool:
    """Whether the environment says that this is one of several processes, but they have no process group."""
    sizes = [os.environ.get(name, "1") for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")]
    return world_size() == 1 and any(size.isdigit() and int(size) > 1 for size in sizes)


def check_same(tensor: Tensor, problem: str) -> None:
    """Raise ``ValueError`` with the problem, on every process, unless all processes hold the same numbers."""
    everywhere = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(everywhere, tensor)
    different = [number for number, other in enumerate(everywhere) if not torch.equal(other, everywhere[0])]
    if different:
        raise ValueError(
            f"{problem}: {different} differ from process 0. Seed them alike before sparsify, or wrap the model in "
            "DistributedDataParallel first"
        )


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum over all processes, on each of them."""
    total = tensor.clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def from_every_process(value: Any) -> list[Any]:
    """What each process says, by their numbers, on each of them; anything that can be pickled."""
    said = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(said, value)
    return said


def raise_together(problem: str | None) -> None:
    """Raise ``ValueError`` on every process with the first problem that one of them has; none waits for another."""
    problems = [said for said in from_every_process(problem) if said is not None]
    if problems:
        raise ValueError(problems[0])
