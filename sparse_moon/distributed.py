"""What several processes need to agree on. Without an initialised process group there is one process."""

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
