"""Memory layouts of activations and weights."""

import torch
from torch import Tensor


def memory_format(tensor: Tensor) -> torch.memory_format:
    """channels_last for a tensor that is only that, contiguous otherwise: the layout that results follow."""
    channels_last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def without_gaps(tensor: Tensor | None, layout: torch.memory_format = torch.contiguous_format) -> Tensor | None:
    """An operand that may be missing, in this layout."""
    return None if tensor is None else tensor.contiguous(memory_format=layout)
