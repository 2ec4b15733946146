"""The ``Conv1D`` of transformers, GPT-2's linear layer: its weight is (in, out), a linear layer's is (out, in)."""

import sys
from typing import Any, cast

from torch import nn

from sparse_moon.nn.layers import SparseLinear


class TransposedLinear(nn.Linear):
    """What a ``Conv1D`` is while a model is converted: a linear layer whose weight is a view of its own."""

    conv1d: type[nn.Module]


class SparseConv1D(SparseLinear):
    """:class:`SparseLinear` in the place of a ``Conv1D`` of transformers, with a weight of (out, in).

    :func:`sparse_moon.sparsify` makes it; :meth:`to_dense` gives a ``Conv1D``.
    """

    conv1d: type[nn.Module]

    def _take_over(self, dense: nn.Linear | nn.Conv2d) -> None:
        super()._take_over(dense)
        self.conv1d = cast(TransposedLinear, dense).conv1d

    def to_dense(self) -> Any:
        """Dense copy, a ``Conv1D`` with zeros where nothing exists."""
        linear = super().to_dense()
        dense: Any = self.conv1d(self.out_features, self.in_features)
        dense.weight = nn.Parameter(linear.weight.detach().t().contiguous(), linear.weight.requires_grad)
        dense.bias = linear.bias
        return dense.train(self.training)


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is a ``Conv1D``, not a subclass; transformers is not imported for that."""
    kind = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return type(module) is kind and "weight" in module._parameters


def turned(weight: nn.Parameter) -> nn.Parameter:
    """The weight with its dimensions the other way round, in the same memory."""
    return nn.Parameter(weight.detach().t(), weight.requires_grad)


def turn(conv1d: nn.Module, weight: nn.Parameter) -> None:
    """Make it a :class:`TransposedLinear`, in place, with this weight (out, in)."""
    module: Any = conv1d
    module.conv1d = type(module)
    module.out_features, module.in_features = weight.shape
    module._parameters["weight"] = weight
    module.__class__ = TransposedLinear


def turn_back(linear: nn.Module, weight: nn.Parameter) -> None:
    """Undo :func:`turn`; ``weight`` is (in, out)."""
    module: Any = linear
    module.__class__ = module.conv1d
    module._parameters["weight"] = weight
    for name in ("conv1d", "in_features", "out_features"):
        del module.__dict__[name]
