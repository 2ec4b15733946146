"""Low-rank factors whose product is added to the values of a sparse layer, at its topology only."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from sparse_moon.ops.plan import Plan
from sparse_moon.ops.sampled_product import sampled_product
from sparse_moon.topology import Topology


class LowRank(nn.Module):
    """``scale * (B A)`` at the entries of a topology: LoRA's update (Hu et al. 2021, equation 3), masked.

    Args:
        topology: whose matrix (rows, cols) the factors multiply to.
        rank: r, of the factors.
        alpha: ``scale`` times r.
        device, dtype: of the values.

    Attributes:
        A: (r, cols) parameter, uniform in ``+-1/sqrt(cols)``. For a convolution cols are those of its matrix.
        B: (rows, r) parameter, 0 at the start, so that the layer computes what it did.
        scale: 0-d buffer, alpha / r; in ``state_dict``, so that what is loaded is what was trained.
    """

    scale: Tensor
    _plan: Plan | None = None

    def __init__(self, topology: Topology, rank: int, alpha: float, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        rows, cols = topology.shape
        self.A = nn.Parameter(torch.empty(rank, cols, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(rows, rank, device=device, dtype=dtype))
        self.register_buffer("scale", torch.tensor(alpha / rank, device=device, dtype=dtype))
        bound = 1.0 / math.sqrt(max(cols, 1))
        nn.init.uniform_(self.A, -bound, bound)

    @property
    def rank(self) -> int:
        """r."""
        return self.A.shape[0]

    def forward(self, values: Tensor, topology: Topology) -> Tensor:
        """The values with the product added; it is computed anew each time."""
        plan = self._plan
        if torch.compiler.is_compiling():
            plan = topology.plan()
        elif plan is None or not plan.is_of(topology._buffers):
            plan = self._plan = topology.plan()
        return values + sampled_product(self.B * self.scale, self.A, plan)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale.item():g}"
