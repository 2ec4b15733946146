"""The specification of ``sparse_conv2d``, in torch's own differentiable operators."""

import torch.nn.functional as F
from torch import Tensor

from sparse_moon.ops.index import blocks_to_matrix, entry_positions, matrix_to_weight
from sparse_moon.ops.plan import Plan


def sparse_conv2d_reference(
    input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, plan: Plan
) -> Tensor:
    """Scatter the values into a dense weight, then ``F.conv2d``."""
    assert plan.geometry is not None
    row_ptr, col, *_ = plan.index
    matrix = blocks_to_matrix(values, entry_positions(row_ptr, col, plan.grid[1]), plan.grid)
    weight_shape, stride, padding, dilation, groups = plan.geometry
    weight = matrix_to_weight(matrix if probe is None else matrix + probe, weight_shape, plan.block[1])
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
