"""What a network says about a data set: logits, penultimate features and the head between them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Head:
    """The weights that turn features into logits.

    Attributes:
        weight: (C, D) float32, one row a logit.
        bias: (C,) float32, zero where the head has none.
        cosine: the weights are those of a `CosineHead`, so the logits are not linear in the features.
    """

    weight: Tensor
    bias: Tensor
    cosine: bool = False

    def logits(self, features: Tensor) -> Tensor:
        """(N, C) float64 logits of a linear head for features (N, D)."""
        return F.linear(features.double(), self.weight.double(), self.bias.double())

    def to(self, device: torch.device | str) -> "Head":
        """The same head on ``device``."""
        return Head(self.weight.to(device), self.bias.to(device), self.cosine)


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a network computed for N samples.

    Attributes:
        logits: (N, K) or (N, K + 1), float32 as the network computed them, float64 where a detector did.
        features: (N, D), likewise: penultimate features, the input of the classifier head; None where it is not known.
        labels: (N,) int64, or None where the data has none.
        head: from features to logits, or None where the logits are not what the head returned.

    Raises:
        ValueError: shapes that do not fit together.
    """

    logits: Tensor
    features: Tensor | None
    labels: Tensor | None = None
    head: Head | None = None

    def __post_init__(self) -> None:
        shapes = [tuple(tensor.shape) for tensor in (self.logits, self.features) if tensor is not None]
        if any(len(shape) != 2 or shape[0] != len(self.logits) for shape in shapes):
            raise ValueError(f"expected logits (N, K) and features (N, D), got {' and '.join(map(str, shapes))}")
        if self.labels is not None and self.labels.shape != self.logits.shape[:1]:
            raise ValueError(f"expected {len(self.logits)} labels, got shape {tuple(self.labels.shape)}")
        if self.head is not None:
            shape = (self.logits.shape[1], features_of(self).shape[1])
            if self.head.weight.shape != shape or self.head.bias.shape != shape[:1]:
                raise ValueError(
                    f"expected a head with weight {shape} and bias {shape[:1]}, "
                    f"got {tuple(self.head.weight.shape)} and {tuple(self.head.bias.shape)}"
                )

    def to(self, device: torch.device | str) -> "Outputs":
        """The same outputs on ``device``."""
        labels = None if self.labels is None else self.labels.to(device)
        head = None if self.head is None else self.head.to(device)
        features = None if self.features is None else self.features.to(device)
        return Outputs(self.logits.to(device), features, labels, head)


def joined(parts: Sequence[Outputs]) -> Outputs:
    """The outputs of several batches as one."""
    features = [part.features for part in parts if part.features is not None]
    labels = [part.labels for part in parts if part.labels is not None]
    return Outputs(
        torch.cat([part.logits for part in parts]),
        torch.cat(features) if features else None,
        torch.cat(labels) if labels else None,
        parts[0].head if all(part.head is not None for part in parts) else None,
    )


def features_of(outputs: Outputs) -> Tensor:
    """The (N, D) features of ``outputs``.

    Raises:
        ValueError: there are none.
    """
    if outputs.features is None:
        raise ValueError(
            "expected outputs with features, but no linear layer returned the model's logits: pass head, the layer "
            "whose input is the features or its name, to evaluate, fit_detectors or collect"
        )
    return outputs.features


def linear_head(outputs: Outputs) -> Head:
    """The head of ``outputs``.

    Raises:
        ValueError: the logits are not a linear function of the features, or not known to be one.
    """
    if outputs.head is None:
        raise ValueError("expected outputs with a head: those of a model whose logits are what its last layer returns")
    if outputs.head.cosine:
        raise ValueError("expected a linear head, got a cosine head, whose logits are not linear in the features")
    return outputs.head
