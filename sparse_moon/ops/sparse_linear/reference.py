"""The specification of ``sparse_linear``, in torch's own differentiable operators."""

import torch.nn.functional as F
from torch import Tensor

from sparse_moon.ops.index import blocks_to_matrix, entry_positions
from sparse_moon.ops.plan import Plan


def sparse_linear_reference(
    input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, plan: Plan
) -> Tensor:
    """Scatter the values into a dense weight, then ``F.linear``."""
    row_ptr, col, *_ = plan.index
    weight = blocks_to_matrix(values, entry_positions(row_ptr, col, plan.grid[1]), plan.grid)
    return F.linear(input, weight if probe is None else weight + probe, bias)
