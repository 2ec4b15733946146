"""A model's layers as a table: what is sparse, what is dense and why, and which batch norms are fused."""

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sparse_moon.nn.attention import can_unpack
from sparse_moon.nn.conv1d import is_conv1d
from sparse_moon.nn.fusion import fusions
from sparse_moon.nn.inspect import weights
from sparse_moon.nn.layers import SparseLayer
from sparse_moon.text_table import text_table
from sparse_moon.topology import pattern_name


@dataclass(frozen=True)
class SummaryRow:
    """One layer, or another module with weights, or a 2-d batch norm.

    Attributes:
        name: of the first module that has the weight.
        type: of the module.
        shape: of the weight as a dense tensor; () for a batch norm.
        weights: how many numbers the dense weight has; 0 for a batch norm.
        present: how many of them exist.
        pattern: of a sparse layer, else None.
        dense_because: why a weight is dense, else None.
        fused: of a 2-d batch norm, whether it is fused with the activation that follows, and if not why; else None.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    weights: int
    present: int
    pattern: str | None = None
    dense_because: str | None = None
    fused: str | None = None

    @property
    def sparsity(self) -> float:
        """Share of the weights that do not exist."""
        return 1.0 - self.present / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Summary:
    """What :func:`summary` returns; ``str()`` of it is a table.

    Attributes:
        rows: in the model's order.
    """

    rows: tuple[SummaryRow, ...]

    @property
    def weights(self) -> int:
        """Weights of the whole model as dense tensors; not biases and norms."""
        return sum(row.weights for row in self.rows)

    @property
    def present(self) -> int:
        """How many of them exist."""
        return sum(row.present for row in self.rows)

    @property
    def sparsity(self) -> float:
        """Share of all weights that do not exist, as :func:`sparse_moon.overall_sparsity`."""
        return 1.0 - self.present / self.weights if self.weights else 0.0

    @property
    def dense_share(self) -> dict[str, float]:
        """Share of all weights that each type of module holds as dense ones, the largest first."""
        shares: dict[str, float] = {}
        for row in self.rows:
            if row.weights and row.pattern is None:
                shares[row.type] = shares.get(row.type, 0.0) + row.weights / self.weights
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    def __str__(self) -> str:
        lines = [("layer", "type", "weight", "weights", "sparsity", "pattern", "remarks")]
        for row in self.rows:
            counts = (f"{row.weights:,}", f"{row.sparsity:.4f}") if row.weights else ("", "")
            shape = "x".join(map(str, row.shape))
            remark = f"dense: {row.dense_because}" if row.dense_because else row.fused or ""
            lines.append((row.name or "(model)", row.type, shape, *counts, row.pattern or "", remark))
        lines.append(("total", "", "", f"{self.weights:,}", f"{self.sparsity:.4f}", "", f"{self.present:,} exist"))
        return text_table(lines, "lllrrll", total=True)

    __repr__ = __str__


def summary(model: nn.Module) -> Summary:
    """What is sparse in a model and what is not, layer by layer.

    Every weight is listed once (see :func:`sparse_moon.nn.inspect.weights`), with why it is dense where it is: its type
    is none that is converted, or :func:`sparse_moon.sparsify` left it so. So is every 2-d batch norm, with whether
    :func:`sparse_moon.fuse` has put it together with the activation behind it. To see what follows a batch norm, the
    model is traced by ``torch.fx``; it is not changed.

    Raises:
        ValueError: lazy modules whose parameters have no shape yet.
    """
    names = {name: i for i, (name, _) in enumerate(model.named_modules())}
    rows = []
    for weight in weights(model):
        pattern = because = None
        if isinstance(weight.module, SparseLayer):
            pattern = pattern_name(weight.module.topology.block)
        else:
            because = _why_dense(weight.module)
        rows.append(SummaryRow(weight.name, weight.kind, weight.shape, weight.numel, weight.present, pattern, because))
    for name, fused in fusions(model).items():
        kind = type(model.get_submodule(name))
        rows.append(SummaryRow(name, kind.__name__, (), 0, 0, fused=fused))
    return Summary(tuple(sorted(rows, key=lambda row: names[row.name])))


def _why_dense(module: nn.Module) -> str:
    reason: str | None = getattr(module, "dense_because", None)
    if reason is not None:
        return reason
    if can_unpack(module) or is_conv1d(module) or type(module) is NonDynamicallyQuantizableLinear:
        return "not made sparse"
    if type(module) in (nn.Linear, nn.Conv2d):
        return "not made sparse" if "weight" in module._parameters else "its weight is computed from parameters"
    if isinstance(module, nn.Linear | nn.Conv2d):
        base = "Linear" if isinstance(module, nn.Linear) else "Conv2d"
        return f"a kind of {base}, whose code may read the weight"
    return "neither Linear nor Conv2d"
