"""Confidence and accuracy where it is hard: regions of the feature space by how near they are to another class."""

import torch
from torch import Tensor

from sparse_moon.ood.metrics import check_labels, predictions
from sparse_moon.ood.outputs import Outputs, features_of

REGIONS = 10


def class_margins(outputs: Outputs, num_classes: int) -> Tensor:
    """How much farther each sample is from the second nearest class mean than from the nearest, (N,) float64.

    The means are those of the samples' own features by label; classes without samples have none. A margin of 0 is a
    place where two components of a Gaussian mixture with equal widths meet.

    Raises:
        ValueError: no features or labels, or samples of fewer than two classes.
    """
    features = features_of(outputs).double()
    if outputs.labels is None:
        raise ValueError("expected outputs with labels")
    labels = check_labels(outputs.logits[:, :num_classes], outputs.labels)
    present = labels.unique()
    if len(present) < 2:
        raise ValueError(f"expected samples of two classes or more, got {len(present)}")
    means = torch.stack([features[labels == c].mean(0) for c in present])
    nearest = torch.cdist(features, means).topk(2, dim=1, largest=False).values
    return nearest[:, 1] - nearest[:, 0]


def local_gaps(outputs: Outputs, num_classes: int, regions: int = REGIONS) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence minus accuracy in regions of the feature space: the quantity of MOON's Definition 4.2.

    Its regions are those of a Gaussian mixture in feature space. Here the samples in order of `class_margins` are cut
    into parts whose sizes differ by at most one, the first of which is the hardest: nearest to where two classes meet.

    Args:
        outputs: with features and labels, N >= ``regions``.
        num_classes: K.
        regions: how many.

    Returns:
        (regions,) float64 mean confidence, accuracy, and the first minus the second.

    Raises:
        ValueError: as `class_margins`, or fewer samples than regions.
    """
    order = class_margins(outputs, num_classes).argsort(stable=True)
    if len(order) < regions:
        raise ValueError(f"expected as many samples as regions, {regions}, got {len(order)}")
    assert outputs.labels is not None  # or there would be no margins
    confidence, correct = predictions(outputs.logits, outputs.labels, num_classes)
    sure, right = (
        torch.stack([part.mean() for part in values[order].double().tensor_split(regions)])
        for values in (confidence, correct)
    )
    return sure, right, sure - right
