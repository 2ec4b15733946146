"""Classification, calibration and out-of-distribution (OOD) detection metrics.

Every function takes tensors on any device, computes in float64 and returns Python floats. ``K`` is the number of
classes; a network trained for unknown-awareness (MOON) has ``K + 1`` outputs, the extra "unknown" one last.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class CalibrationBins:
    """A reliability diagram: samples grouped by confidence into equal-width bins ``(edges[i], edges[i + 1]]``.

    Attributes:
        edges: (bins + 1,) float64, from 0 to 1.
        count: (bins,) int64, samples in each bin.
        confidence: (bins,) float64, mean confidence; NaN where the bin is empty.
        accuracy: (bins,) float64, share of correct predictions; NaN where the bin is empty.
    """

    edges: Tensor
    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def expected_calibration_error(self) -> float:
        """``sum_i count_i / N |accuracy_i - confidence_i|`` over the bins that hold samples."""
        filled = self.count > 0
        gap = (self.accuracy - self.confidence)[filled].abs()
        return (self.count[filled] * gap).sum().item() / self.count.sum().item()


def calibration_bins(confidence: Tensor, correct: Tensor, bins: int = 15) -> CalibrationBins:
    """Group samples by confidence (Naeini et al. 2015; Guo et al. 2017, equation 2).

    Bins are ``(a, b]``: confidence 1 belongs to the last one. Confidence 0 goes to the first.

    Args:
        confidence: (N,) floating, in [0, 1].
        correct: (N,) bool, whether the prediction was right.
        bins: number of bins.

    Returns:
        The bins, on the CPU.

    Raises:
        ValueError: no samples, shapes that differ, ``correct`` not bool, a confidence that is NaN or outside [0, 1],
            or ``bins`` below 1.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    check_predictions(confidence, correct, bounded=True)
    confidence, correct = confidence.detach().cpu().contiguous(), correct.cpu()
    edges = torch.arange(bins + 1, dtype=torch.float64) / bins
    # Edges in the dtype of the confidences: a float32 0.2 lies on the edge 3/15, not just above it.
    index = torch.bucketize(confidence, edges[1:-1].to(confidence.dtype))
    count = index.bincount(minlength=bins)
    return CalibrationBins(
        edges=edges,
        count=count,
        confidence=index.bincount(confidence.double(), minlength=bins) / count,
        accuracy=index.bincount(correct.double(), minlength=bins) / count,
    )


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, equation 3) in [0, 1]; arguments as `calibration_bins`."""
    return calibration_bins(confidence, correct, bins).expected_calibration_error


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Share of samples whose largest probability is at the label.

    Args:
        probabilities: (N, K) floating; logits do as well.
        labels: (N,) integer in [0, K).

    Raises:
        ValueError: shapes, dtype or label range other than these, or NaN.
    """
    labels = check_labels(probabilities, labels)
    return (probabilities.argmax(1) == labels).double().mean().item()


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """Mean of ``-log softmax(logits)[label]`` in nats.

    Args:
        logits: (N, C) floating. Log-probabilities are logits too: pass ``p.log()`` for averaged predictions.
        labels: (N,) integer in [0, C).

    Raises:
        ValueError: shapes, dtype or label range other than these, or NaN.
    """
    labels = check_labels(logits, labels)
    return F.cross_entropy(logits.detach().double(), labels).item()


def brier_score(probabilities: Tensor, labels: Tensor) -> float:
    """Mean over samples of ``sum_c (p_c - 1[c = label])^2``, the sum over all classes (Brier 1950): in [0, 2].

    Args:
        probabilities: (N, C) floating, rows sum to 1.
        labels: (N,) integer in [0, C).

    Raises:
        ValueError: shapes, dtype or label range other than these, or rows that are no probabilities.
    """
    labels = check_labels(probabilities, labels)
    total = probabilities.detach().double().sum(1)
    if (probabilities < 0).any() or (total - 1).abs().max() > 0.01:  # half precision rounds by less
        raise ValueError(
            f"expected probabilities, rows that sum to 1, got sums from {total.min().item():.3g} to "
            f"{total.max().item():.3g} and a least value of {probabilities.min().item():.3g}"
        )
    error = probabilities.detach().double() - F.one_hot(labels, probabilities.shape[1])
    return error.square().sum(1).mean().item()


def check_logits(logits: Tensor, num_classes: int) -> None:
    """Raise ``ValueError`` unless ``logits`` is (N, K) or (N, K + 1) with N > 0 and K = ``num_classes`` >= 1."""
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if logits.ndim != 2 or not len(logits) or logits.shape[1] not in (num_classes, num_classes + 1):
        raise ValueError(
            f"expected logits of shape (N, {num_classes}) or (N, {num_classes + 1}), N > 0, got {_shape(logits)}"
        )


def class_probabilities(logits: Tensor, num_classes: int) -> Tensor:
    """Softmax over all outputs, restricted to the first K: with an unknown output, rows sum to ``1 - u``.

    In float64, because a float32 softmax rounds everything above ``1 - 6e-8`` to one and the most confident samples,
    which decide OOD detection, would tie.

    Args:
        logits: (N, K) or (N, K + 1) floating.
        num_classes: K.

    Returns:
        (N, K) float64.

    Raises:
        ValueError: a shape other than these.
    """
    check_logits(logits, num_classes)
    return logits.double().softmax(1)[:, :num_classes]


def predictions(
    logits: Tensor, labels: Tensor, num_classes: int, extra: Literal["known", "all"] = "known"
) -> tuple[Tensor, Tensor]:
    """Confidence in the prediction, and whether it is right.

    Args:
        logits: (N, K) or (N, K + 1) floating.
        labels: (N,) integer in [0, K).
        num_classes: K.
        extra: the prediction is the largest of the first K (``"known"``), or of all outputs (``"all"``), among which
            the unknown one, where there is one, is never right. The softmax is over all outputs either way.

    Returns:
        (N,) float64 in [0, 1], and (N,) bool.

    Raises:
        ValueError: shapes, dtype or label range other than these, or logits that are NaN.
    """
    if extra not in ("known", "all"):
        raise ValueError(f'extra must be "known" or "all", got {extra!r}')
    logits = logits.detach()
    known = class_probabilities(logits, num_classes)
    labels = check_labels(known, labels)
    confidence, prediction = (known if extra == "known" else logits.double().softmax(1)).max(1)
    return confidence, prediction == labels


def classification_metrics(
    logits: Tensor, labels: Tensor, num_classes: int, bins: int = 15, extra: Literal["known", "all"] = "known"
) -> dict[str, float]:
    """Accuracy, calibration and proper scores of a classifier with or without the unknown output.

    Predictions and confidences are those of `predictions`. NLL is ``-log p_label`` and the
    Brier score counts the unknown output as a class that is never true, both with the softmax over all outputs: mass
    on "unknown" is paid for.

    Args:
        logits: (N, K) or (N, K + 1) floating.
        labels: (N,) integer in [0, K).
        num_classes: K.
        bins: of the ECE, see `calibration_bins`.
        extra: see `predictions`.

    Returns:
        ``accuracy``, ``ece``, ``nll`` (nats) and ``brier`` (in [0, 2]).

    Raises:
        ValueError: shapes, dtype or label range other than these, or logits that are NaN.
    """
    logits = logits.detach()
    confidence, correct = predictions(logits, labels, num_classes, extra)
    return {
        "accuracy": correct.double().mean().item(),
        "ece": expected_calibration_error(confidence, correct, bins),
        "nll": negative_log_likelihood(logits, labels),
        "brier": brier_score(logits.double().softmax(1), labels),
    }


def area_under_risk_coverage(confidence: Tensor, correct: Tensor) -> float:
    """Area under the risk-coverage curve (AURC; Geifman & El-Yaniv 2017): in [0, 1], lower is better.

    The mean over n = 1 ... N of the risk, the share of **wrong** predictions among the n most confident. Among samples
    of equal confidence it is the expectation over their orders.

    Args:
        confidence: (N,) floating, any score by which predictions are accepted; infinities are allowed.
        correct: (N,) bool, whether the prediction was right.

    Raises:
        ValueError: no samples, shapes that differ, ``correct`` not bool, or a confidence that is NaN.
    """
    check_predictions(confidence, correct, bounded=False)
    confidence, order = confidence.detach().cpu().double().sort(descending=True)
    wrong = mean_over_ties(confidence, (~correct.cpu()[order]).double())
    return (wrong.cumsum(0) / torch.arange(1, len(wrong) + 1)).mean().item()


def open_set_classification_rate(id_scores: Tensor, correct: Tensor, ood_scores: Tensor) -> float:
    """Area under the open-set classification rate curve (OSCR; Dhamija et al. 2018): in [0, accuracy].

    For every threshold, the share of **ID** samples that are accepted and classified correctly, over the share of OOD
    samples that are accepted. It equals the accuracy times the AUROC between correctly classified ID samples, positive,
    and OOD samples; ties count half. (The paper has the threshold itself accept OOD but not ID, so that ties count
    nothing.)

    Args:
        id_scores: (N,) floating, higher means ID; infinities are allowed.
        correct: (N,) bool, whether the ID sample's predicted class was right.
        ood_scores: (M,) floating.

    Raises:
        ValueError: no samples, shapes that differ, ``correct`` not bool, or scores that are NaN.
    """
    from sklearn.metrics import roc_auc_score  # here, because importing it takes a second

    check_predictions(id_scores, correct, bounded=False)
    check_scores("ood_scores", ood_scores)
    right = id_scores[correct.to(id_scores.device)]
    if not len(right):
        return 0.0
    return len(right) / len(id_scores) * float(roc_auc_score(*_ranks(right, ood_scores)))


def ood_metrics(id_scores: Tensor, ood_scores: Tensor) -> dict[str, float]:
    """How well a score separates in-distribution (ID) from OOD samples. A higher score means ID.

    All four depend on the order of the scores only, and tied scores are never split.

    Args:
        id_scores: (N,) floating; infinities are allowed.
        ood_scores: (M,) floating.

    Returns:
        - ``auroc``: area under the ROC curve, **ID** positive (the same with OOD positive); ties count half.
        - ``fpr95``: false positive rate, the share of OOD accepted as ID, at a true positive rate of at least 95 % on
          **ID**: the smallest that any threshold reaches.
        - ``aupr_in``: average precision, **ID** positive.
        - ``aupr_out``: average precision, **OOD** positive, scores negated.

    Raises:
        ValueError: scores that are empty, not 1-d, or NaN.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score  # here, because importing it takes a second

    check_scores("id_scores", id_scores)
    check_scores("ood_scores", ood_scores)
    is_id, rank = _ranks(id_scores, ood_scores)
    accepted = -(-95 * len(id_scores) // 100)  # ceil(0.95 N), in integers
    threshold = np.sort(rank[is_id])[-accepted]
    return {
        "auroc": float(roc_auc_score(is_id, rank)),
        "fpr95": float(np.mean(rank[~is_id] >= threshold)),
        "aupr_in": float(average_precision_score(is_id, rank)),
        "aupr_out": float(average_precision_score(~is_id, -rank)),
    }


def _ranks(id_scores: Tensor, ood_scores: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Which of all scores are of ID, and ranks in place of scores: scikit-learn refuses infinities."""
    is_id = np.repeat([True, False], [len(id_scores), len(ood_scores)])
    scores = torch.cat([id_scores.detach().cpu().double(), ood_scores.detach().cpu().double()])
    return is_id, scores.unique(return_inverse=True)[1].numpy()


def check_scores(name: str, scores: Tensor) -> None:
    """Raise ``ValueError`` unless ``scores`` is (N,), N > 0, without NaN; ``name`` is for the message."""
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"expected {name} of shape (N,), N > 0, got {_shape(scores)}")
    if scores.is_complex():
        raise ValueError(f"expected real {name}, got {scores.dtype}")
    if missing := int(scores.isnan().sum()):
        raise ValueError(f"{missing} of {len(scores)} {name} are NaN")


def check_predictions(confidence: Tensor, correct: Tensor, *, bounded: bool) -> None:
    """Raise ``ValueError`` unless ``confidence`` (N,), not NaN, and in [0, 1] if ``bounded``, fits bool ``correct``."""
    if confidence.ndim != 1 or confidence.shape != correct.shape or not len(confidence):
        raise ValueError(
            f"expected confidence and correct of shape (N,), N > 0, got {_shape(confidence)} and {_shape(correct)}"
        )
    if correct.dtype != torch.bool:
        raise ValueError(f"correct must be bool, got {correct.dtype}")
    # Averaged float32 probabilities can pass 1 by rounding.
    if bounded and not ((confidence >= 0) & (confidence <= 1 + 1e-6)).all():
        raise ValueError(
            f"confidence must be in [0, 1], got values from {confidence.min().item()} to {confidence.max().item()}"
        )
    check_scores("confidences", confidence)


def mean_over_ties(keys: Tensor, values: Tensor) -> Tensor:
    """``values`` (N,) float64, each replaced by the mean over all that have its key; keys (N,), equal ones adjacent."""
    _, group, count = keys.unique_consecutive(return_inverse=True, return_counts=True)
    return (group.bincount(values) / count)[group]


def check_labels(values: Tensor, labels: Tensor) -> Tensor:
    """Labels as int64 on the device of ``values``, after checking both."""
    if values.ndim != 2 or not len(values) or labels.shape != values.shape[:1]:
        raise ValueError(
            f"expected (N, K) values and (N,) labels with N > 0, got shapes {_shape(values)} and {_shape(labels)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= values.shape[1]:
        raise ValueError(f"labels must be in [0, {values.shape[1]}), got values from {low} to {high}")
    if wrong := int(values.isnan().any(1).sum()):  # which argmax would take as the largest
        raise ValueError(f"expected logits or probabilities, got nan in {wrong} of {len(values)} rows")
    return labels.to(values.device, torch.int64)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
