"""Calibration beyond the confidence of the prediction: class by class, in bins of equal mass, and by temperature.

As in `sparse_moon.ood.metrics`, functions take tensors on any device, compute in float64 and return Python floats, and
a network with ``K + 1`` outputs has the unknown one last.
"""

import math

from torch import Tensor

from sparse_moon.ood.metrics import (
    calibration_bins,
    check_labels,
    check_predictions,
    class_probabilities,
    mean_over_ties,
)

_LARGEST_TEMPERATURE = 100.0


def classwise_calibration_error(logits: Tensor, labels: Tensor, num_classes: int, bins: int = 15) -> float:
    """Classwise expected calibration error (Kull et al. 2019): the mean over classes of each class' own, in [0, 1].

    For class c the confidence of every sample is its probability of c and the positive event ``label == c``, in
    ``bins`` bins of equal width. With an unknown output the softmax is over all K + 1 and the mean over the first K.

    Args:
        logits: (N, K) or (N, K + 1) floating.
        labels: (N,) integer in [0, K).
        num_classes: K.
        bins: see `calibration_bins`.

    Raises:
        ValueError: shapes, dtype or label range other than these, or logits that are NaN.
    """
    probabilities = class_probabilities(logits.detach(), num_classes)
    labels = check_labels(probabilities, labels)
    errors = [
        calibration_bins(probabilities[:, c], labels == c, bins).expected_calibration_error for c in range(num_classes)
    ]
    return sum(errors) / num_classes


def adaptive_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Expected calibration error in bins of equal mass (Nguyen & O'Connor 2015; Nixon et al. 2019), in [0, 1].

    Samples in order of confidence are cut into ``bins`` parts whose sizes differ by at most one, the larger ones
    first. Samples of equal confidence count with their mean accuracy, so their order does not matter when a cut falls
    among them.

    Args:
        confidence: (N,) floating, in [0, 1], of the prediction.
        correct: (N,) bool, whether the prediction was right.
        bins: number of bins; N bins of one sample where N is smaller.

    Raises:
        ValueError: as `calibration_bins`.
    """
    check_predictions(confidence, correct, bounded=True)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    confidence, order = confidence.detach().cpu().double().sort()
    gap = confidence - mean_over_ties(confidence, correct.cpu()[order].double())
    return sum(part.sum().abs().item() for part in gap.tensor_split(bins)) / len(gap)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T > 0 that minimises the mean of ``-log softmax(z / T)[label]`` (Guo et al. 2017, section 4.2).

    Fit it on held-out in-distribution data, never on test data, and divide logits by it; predictions stay. The loss is
    convex in 1 / T; its derivative is bisected to a relative width of 1e-12, between T = 0.01 and 100. Those bounds
    are returned where the loss still falls there: 0.01 if all predictions are right, 100 if logits are worse than
    none.

    Args:
        logits: (N, C) floating and finite; with an unknown output the softmax is over all K + 1, as in training.
        labels: (N,) integer in [0, C).

    Raises:
        ValueError: shapes, dtype or label range other than these, or logits that are not finite.
    """
    labels = check_labels(logits, labels)
    if not logits.isfinite().all():
        raise ValueError("logits must be finite")
    logits = logits.detach().double()
    true = logits.gather(1, labels[:, None]).mean()

    def slope(inverse: float) -> float:
        """d loss / d (1 / T), which grows with 1 / T."""
        expected = ((logits * inverse).softmax(1) * logits).sum(1).mean()
        return (expected - true).item()

    low, high = -math.log(_LARGEST_TEMPERATURE), math.log(_LARGEST_TEMPERATURE)
    if slope(math.exp(low)) >= 0:
        return _LARGEST_TEMPERATURE
    if slope(math.exp(high)) <= 0:
        return 1 / _LARGEST_TEMPERATURE
    while high - low > 1e-12:
        middle = (low + high) / 2
        if slope(math.exp(middle)) < 0:
            low = middle
        else:
            high = middle
    return math.exp(-(low + high) / 2)
