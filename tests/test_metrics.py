"""Metrics against hand-computed values, plain loops, scikit-learn and torchmetrics."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from sparse_moon.ood.calibration import adaptive_calibration_error, classwise_calibration_error, fit_temperature
from sparse_moon.ood.metrics import (
    accuracy,
    area_under_risk_coverage,
    brier_score,
    calibration_bins,
    class_probabilities,
    classification_metrics,
    expected_calibration_error,
    negative_log_likelihood,
    ood_metrics,
    open_set_classification_rate,
    predictions,
)


def test_calibration_bins_by_hand():
    # Five bins of width 0.2; 0.2 and 0.4 lie on edges and belong below, 0 and 1 to the outermost bins.
    confidence = torch.tensor([0.0, 0.2, 0.4, 0.41, 1.0], dtype=torch.float64)
    correct = torch.tensor([False, True, True, False, True])
    bins = calibration_bins(confidence, correct, bins=5)
    assert bins.edges.tolist() == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert bins.count.tolist() == [2, 1, 1, 0, 1]
    assert bins.confidence[[0, 1, 2, 4]].tolist() == [0.1, 0.4, 0.41, 1.0]
    assert bins.accuracy[[0, 1, 2, 4]].tolist() == [0.5, 1.0, 0.0, 1.0]
    assert bins.confidence[3].isnan() and bins.accuracy[3].isnan()
    expected = (2 * 0.4 + 1 * 0.6 + 1 * 0.41 + 1 * 0.0) / 5
    assert bins.expected_calibration_error == pytest.approx(expected, abs=1e-15)
    assert expected_calibration_error(confidence, correct, bins=5) == bins.expected_calibration_error


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_edge_belongs_to_the_bin_below_in_every_dtype(dtype):
    edges = (torch.arange(1, 16, dtype=torch.float64) / 15).to(dtype)
    bins = calibration_bins(edges, torch.ones(15, dtype=torch.bool))
    assert bins.count.tolist() == [1] * 15


@pytest.mark.parametrize(("correct", "ece"), [(True, 0.0), (False, 1.0)])
def test_certain_predictions_are_counted(correct, ece):
    assert expected_calibration_error(torch.ones(3), torch.full((3,), correct)) == ece


def test_one_bin_is_the_difference_of_means():
    confidence, correct = torch.tensor([0.9, 0.7, 0.5, 0.1]).double(), torch.tensor([True, False, False, False])
    assert expected_calibration_error(confidence, correct, bins=1) == pytest.approx(0.55 - 0.25)


def test_confidence_above_one_by_rounding():
    above = torch.nextafter(torch.tensor([1.0]), torch.tensor([2.0]))
    assert calibration_bins(above, torch.tensor([True])).count[-1] == 1


@settings(max_examples=60, deadline=None)
@given(
    # Multiples of 1/60 hit the edges of 15 (and 1, 4, 10) bins.
    st.lists(st.tuples(st.integers(0, 60), st.booleans()), min_size=1, max_size=40),
    st.sampled_from([1, 4, 10, 15]),
)
def test_ece_against_a_loop(samples, bins):
    confidence = torch.tensor([c / 60 for c, _ in samples], dtype=torch.float64)
    correct = torch.tensor([right for _, right in samples])
    expected = 0.0
    for i in range(bins):
        # Integers: i / bins < c / 60 <= (i + 1) / bins.
        inside = [
            (c / 60, right)
            for c, right in samples
            if (60 * i < c * bins or (i == 0 and c == 0)) and c * bins <= 60 * (i + 1)
        ]
        expected += abs(sum(c for c, _ in inside) - sum(right for _, right in inside)) / len(samples)
    assert expected_calibration_error(confidence, correct, bins) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("confidence", "correct", "bins", "match"),
    [
        (torch.rand(3), torch.ones(4, dtype=torch.bool), 15, r"\(3,\) and \(4,\)"),
        (torch.rand(3, 2), torch.ones(3, 2, dtype=torch.bool), 15, r"\(3, 2\)"),
        (torch.rand(0), torch.ones(0, dtype=torch.bool), 15, "N > 0"),
        (torch.rand(3), torch.ones(3), 15, "bool"),
        (torch.tensor([0.5, math.nan]), torch.ones(2, dtype=torch.bool), 15, "nan"),
        (torch.tensor([0.5, 1.1]), torch.ones(2, dtype=torch.bool), 15, "1.1"),
        (torch.tensor([0.5, -0.1]), torch.ones(2, dtype=torch.bool), 15, "-0.1"),
        (torch.rand(3), torch.ones(3, dtype=torch.bool), 0, "bins"),
    ],
)
def test_calibration_errors(confidence, correct, bins, match):
    with pytest.raises(ValueError, match=match):
        calibration_bins(confidence, correct, bins)


def test_classification_scores_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.125, 0.125, 0.75], [0.5, 0.25, 0.25]])
    labels = torch.tensor([0, 0, 2, 0])
    assert accuracy(p, labels) == 0.75
    nll = (math.log(2) + math.log(4) + math.log(4 / 3) + math.log(2)) / 4
    assert negative_log_likelihood(p.log(), labels) == pytest.approx(nll, rel=1e-6)
    brier = (0.375 + (0.5625 + 0.25 + 0.0625) + (0.015625 * 2 + 0.0625) + 0.375) / 4
    assert brier_score(p, labels) == brier
    assert brier_score(torch.eye(2), torch.tensor([1, 0])) == 2.0
    metrics = classification_metrics(p.log(), labels, 3)
    ece = (abs(2 - 1.5) + abs(1 - 0.75)) / 4  # three predictions of confidence 0.5, two right, and one of 0.75
    assert metrics == pytest.approx({"accuracy": 0.75, "ece": ece, "nll": nll, "brier": brier}, rel=1e-6)


def test_unknown_output_by_hand():
    # Sample 0 puts most of its mass on "unknown": the prediction is still class 0, right, with confidence 1/4.
    p = torch.tensor([[0.25, 0.125, 0.625], [0.5, 0.25, 0.25]], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    assert class_probabilities(p.log(), 2).allclose(p[:, :2], rtol=1e-14)
    assert classification_metrics(p.log(), labels, 2) == pytest.approx(
        {
            "accuracy": 0.5,
            "ece": (0.75 + 0.5) / 2,
            "nll": math.log(4),
            "brier": ((0.5625 + 0.015625 + 0.390625) + (0.25 + 0.5625 + 0.0625)) / 2,
        }
    )
    # Read as three plain classes the same logits say something else.
    assert classification_metrics(p.log(), labels, 3)["accuracy"] == 0.0


def test_predictions_over_all_outputs_by_hand():
    # The first prediction is "unknown" with confidence 5/8, which is never right; the second class 0, wrong either way;
    # the third class 1, right either way.
    p = torch.tensor([[0.25, 0.125, 0.625], [0.5, 0.25, 0.25], [0.125, 0.75, 0.125]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 1])
    confidence, correct = predictions(p.log(), labels, 2, extra="all")
    assert confidence.tolist() == pytest.approx([0.625, 0.5, 0.75]) and correct.tolist() == [False, False, True]
    metrics = classification_metrics(p.log(), labels, 2, extra="all")
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert metrics["ece"] == pytest.approx((0.625 + 0.5 + 0.25) / 3)
    known = classification_metrics(p.log(), labels, 2)
    assert known["ece"] == pytest.approx((0.75 + 0.5 + 0.25) / 3)
    assert (known["nll"], known["brier"]) == (metrics["nll"], metrics["brier"])
    # without an unknown output both are the same
    assert classification_metrics(p.log(), labels, 3, extra="all") == classification_metrics(p.log(), labels, 3)
    with pytest.raises(ValueError, match='extra must be "known" or "all", got \'some\''):
        predictions(p.log(), labels, 2, extra="some")


def test_ten_bins_by_hand():
    # Confidences 0.62 and 0.68: one bin of ten, (0.6, 0.7], where a right and a wrong one cancel but for 0.15 in the
    # mean; two bins of fifteen, (0.6, 0.667] and (0.667, 0.733], where they do not.
    p = torch.tensor([[0.62, 0.38], [0.68, 0.32]], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    assert classification_metrics(p.log(), labels, 2, bins=10)["ece"] == pytest.approx(0.65 - 0.5)
    assert classification_metrics(p.log(), labels, 2)["ece"] == pytest.approx((0.38 + 0.68) / 2)


@pytest.mark.parametrize("extra", [0, 1])
def test_classification_metrics_against_a_loop(extra):
    generator = torch.Generator().manual_seed(extra)
    logits = 3 * torch.randn(57, 4 + extra, generator=generator)
    labels = torch.randint(4, (57,), generator=generator)
    right = nll = brier = 0.0
    bins: dict[int, float] = {}
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        p = [math.exp(v) / sum(math.exp(w) for w in z) for v in z]
        prediction = max(range(4), key=p.__getitem__)
        right += prediction == y
        nll -= math.log(p[y])
        brier += sum((v - (c == y)) ** 2 for c, v in enumerate(p))
        i = max(math.ceil(p[prediction] * 15) - 1, 0)
        bins[i] = bins.get(i, 0.0) + (prediction == y) - p[prediction]
    expected = {
        "accuracy": right / 57,
        "ece": sum(map(abs, bins.values())) / 57,
        "nll": nll / 57,
        "brier": brier / 57,
    }
    assert classification_metrics(logits, labels, 4) == pytest.approx(expected, rel=1e-12)
    assert all(type(value) is float for value in classification_metrics(logits, labels, 4).values())


def test_a_single_class_is_always_right():
    metrics = classification_metrics(torch.randn(5, 1), torch.zeros(5, dtype=torch.int64), 1)
    assert metrics == {"accuracy": 1.0, "ece": 0.0, "nll": 0.0, "brier": 0.0}


def test_inputs_that_need_gradients_and_small_label_dtypes():
    logits = torch.randn(5, 3, requires_grad=True)
    assert classification_metrics(logits, torch.zeros(5, dtype=torch.uint8), 3)["nll"] > 0
    assert negative_log_likelihood(logits, torch.zeros(5, dtype=torch.int32)) > 0
    assert brier_score(logits.softmax(1), torch.zeros(5, dtype=torch.int64)) > 0
    assert logits.grad is None


@pytest.mark.parametrize(
    ("logits", "labels", "match"),
    [
        (torch.randn(4, 5), torch.zeros(4, dtype=torch.int64), r"\(N, 3\) or \(N, 4\)"),
        (torch.randn(4, 2), torch.zeros(4, dtype=torch.int64), r"\(N, 3\) or \(N, 4\)"),
        (torch.randn(4), torch.zeros(4, dtype=torch.int64), r"\(4,\)"),
        (torch.randn(0, 3), torch.zeros(0, dtype=torch.int64), "N > 0"),
        (torch.randn(4, 3), torch.zeros(5, dtype=torch.int64), r"\(5,\)"),
        (torch.randn(4, 3), torch.zeros(4, 1, dtype=torch.int64), r"\(4, 1\)"),
        (torch.randn(4, 3), torch.zeros(4), "integers"),
        (torch.randn(4, 4), torch.tensor([0, 1, 2, 3]), r"\[0, 3\).* from 0 to 3"),  # "unknown" is never a label
        (torch.randn(4, 3), torch.tensor([0, 1, -1, 2]), "from -1 to 2"),
        (torch.full((4, 3), math.nan), torch.zeros(4, dtype=torch.int64), "nan"),
    ],
)
def test_classification_errors(logits, labels, match):
    with pytest.raises(ValueError, match=match):
        classification_metrics(logits, labels, 3)


@pytest.mark.parametrize("metric", [accuracy, brier_score, negative_log_likelihood])
def test_label_errors(metric):
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        metric(torch.full((2, 3), 1 / 3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"got shapes \(\) and \(1,\)"):
        metric(torch.tensor(0.5), torch.tensor([0]))


@pytest.mark.parametrize("metric", [accuracy, brier_score, negative_log_likelihood])
def test_nan_is_no_prediction(metric):
    values = torch.full((3, 2), 0.5)
    values[1, 1] = math.nan
    with pytest.raises(ValueError, match="got nan in 1 of 3 rows"):
        metric(values, torch.tensor([0, 1, 1]))


@pytest.mark.parametrize("values", [[[3.0, -2.0]], [[0.4, 0.4]], [[1.0, 1.0]], [[math.inf, 0.0]]])
def test_brier_score_wants_probabilities(values):
    with pytest.raises(ValueError, match="expected probabilities, rows that sum to 1, got sums from"):
        brier_score(torch.tensor(values), torch.tensor([0]))
    half = torch.randn(50, 1000).softmax(1)
    for dtype in (torch.float16, torch.bfloat16):
        assert brier_score(half.to(dtype), torch.zeros(50).long()) == pytest.approx(1, abs=0.01)


def test_ood_metrics_by_hand():
    # In order: ID 4, ID 3, ID 2 tied with OOD 2, OOD 1. Of the six pairs ID wins 2 + 2 + 1 and ties one.
    metrics = ood_metrics(torch.tensor([4.0, 3.0, 2.0]), torch.tensor([2.0, 1.0]))
    assert metrics == pytest.approx(
        {
            "auroc": 5.5 / 6,
            "fpr95": 0.5,  # all three ID are needed, the tied OOD comes with them
            "aupr_in": 2 / 3 * 1 + 1 / 3 * 3 / 4,
            "aupr_out": 1 / 2 * 1 + 1 / 2 * 2 / 3,
        }
    )
    assert all(type(value) is float for value in metrics.values())


def test_ood_metrics_at_the_extremes():
    low, high = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0, 4.0])
    assert ood_metrics(high, low) == {"auroc": 1.0, "fpr95": 0.0, "aupr_in": 1.0, "aupr_out": 1.0}
    assert ood_metrics(low, high)["auroc"] == 0.0
    assert ood_metrics(low, high)["fpr95"] == 1.0
    constant = ood_metrics(torch.ones(3), torch.ones(1))
    assert constant == {"auroc": 0.5, "fpr95": 1.0, "aupr_in": 0.75, "aupr_out": 0.25}


@pytest.mark.parametrize(
    ("n", "fpr"),
    # ID scores 1 ... n, OOD scores 0.5 + (0 ... 9). Accepting ceil(0.95 n) ID leaves those below 1, 2, 3 ... out.
    [(1, 0.9), (19, 0.9), (20, 0.8), (39, 0.8), (40, 0.7), (100, 0.4)],
)
def test_fpr95_accepts_exactly_as_many_as_needed(n, fpr):
    metrics = ood_metrics(torch.arange(1.0, n + 1), torch.arange(10) + 0.5)
    assert metrics["fpr95"] == pytest.approx(fpr)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(-4, 4), min_size=1, max_size=50),
    st.lists(st.integers(-4, 4), min_size=1, max_size=30),
)
def test_ood_metrics_against_loops_and_sklearn(ids, oods):
    metrics = ood_metrics(torch.tensor(ids) / 3, torch.tensor(oods) / 3)
    won = sum((i > o) + (i == o) / 2 for i in ids for o in oods)
    assert metrics["auroc"] == pytest.approx(won / (len(ids) * len(oods)))

    rates = [(sum(i >= t for i in ids) / len(ids), sum(o >= t for o in oods) / len(oods)) for t in ids + oods]
    assert metrics["fpr95"] == min(fpr for tpr, fpr in rates if tpr >= 0.95)

    scores, is_id = np.array(ids + oods), np.array([1] * len(ids) + [0] * len(oods))
    fprs, tprs, _ = roc_curve(is_id, scores, drop_intermediate=False)
    assert metrics["fpr95"] == pytest.approx(fprs[tprs >= 0.95].min())
    assert metrics["auroc"] == pytest.approx(roc_auc_score(is_id, scores))
    assert metrics["aupr_in"] == pytest.approx(average_precision_score(is_id, scores))
    assert metrics["aupr_out"] == pytest.approx(average_precision_score(1 - is_id, -scores))


@pytest.mark.parametrize("levels", [1, 3, 1000, 2**40])
def test_ood_metrics_of_large_sets_against_torchmetrics(levels):
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification", reason="needs torchmetrics")
    generator = torch.Generator().manual_seed(0)
    ids, oods = (torch.randint(levels, (n,), generator=generator) for n in (50_000, 20_000))
    # In [0, 1], where torchmetrics leaves scores alone, and exact.
    ids, oods = (scores.double() / 2**42 for scores in (ids + levels // 8, oods))
    metrics = ood_metrics(ids, oods)
    scores, is_id = torch.cat([ids, oods]), torch.arange(70_000) < 50_000
    # whose own sums are float32
    assert metrics["auroc"] == pytest.approx(torchmetrics.binary_auroc(scores, is_id.int()).item(), abs=1e-5)
    found = torchmetrics.binary_average_precision(scores, is_id.int()).item()
    assert metrics["aupr_in"] == pytest.approx(found, abs=1e-5)
    found = torchmetrics.binary_average_precision(1 - scores, 1 - is_id.int()).item()
    assert metrics["aupr_out"] == pytest.approx(found, abs=1e-5)
    fpr, tpr, _ = torchmetrics.binary_roc(scores, is_id.int())
    assert metrics["fpr95"] == pytest.approx(fpr[tpr >= 0.95 - 1e-9].min().item(), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32])
def test_ood_metrics_of_other_dtypes(dtype):
    ids, oods = torch.arange(3, 9).to(dtype), torch.arange(6).to(dtype)
    assert ood_metrics(ids, oods) == ood_metrics(ids.double(), oods.double())


def test_ood_metrics_depend_on_order_only():
    generator = torch.Generator().manual_seed(0)
    ids, oods = torch.randn(41, generator=generator), torch.randn(23, generator=generator) - 1
    assert ood_metrics(ids, oods) == ood_metrics(ids.double().exp(), oods.double().exp())
    ids[ids.argmax()], oods[oods.argmin()] = math.inf, -math.inf
    assert ood_metrics(ids, oods) == ood_metrics(ids.clamp(-100, 100), oods.clamp(-100, 100))


@pytest.mark.parametrize(
    ("ids", "oods", "match"),
    [
        (torch.tensor([1.0, math.nan]), torch.ones(3), "1 of 2 id_scores are NaN"),
        (torch.ones(3), torch.full((2,), math.nan), "2 of 2 ood_scores are NaN"),
        (torch.ones(0), torch.ones(3), r"id_scores of shape \(N,\), N > 0, got \(0,\)"),
        (torch.ones(3), torch.ones(3, 1), r"ood_scores .* got \(3, 1\)"),
        (torch.ones(3), torch.ones(0), r"ood_scores of shape \(N,\), N > 0, got \(0,\)"),
        (torch.ones(()), torch.ones(3), r"id_scores of shape \(N,\), N > 0, got \(\)"),
        (torch.ones(3, dtype=torch.complex64), torch.ones(3), "expected real id_scores, got torch.complex64"),
    ],
)
def test_ood_errors(ids, oods, match):
    with pytest.raises(ValueError, match=match):
        ood_metrics(ids, oods)


# Selective and open-set classification


def test_risk_coverage_by_hand():
    # Risks at coverage 1 ... 4: 0/1, 1/2, 1/3, 2/4.
    confidence = torch.tensor([0.2, 0.9, 0.7, 0.5])
    correct = torch.tensor([False, True, False, True])
    assert area_under_risk_coverage(confidence, correct) == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert area_under_risk_coverage(confidence, torch.ones(4, dtype=torch.bool)) == 0
    assert area_under_risk_coverage(confidence, torch.zeros(4, dtype=torch.bool)) == 1
    assert area_under_risk_coverage(torch.ones(3), torch.tensor([True, False, True])) == pytest.approx(1 / 3)
    infinite = torch.tensor([-math.inf, math.inf, 0.7, 0.5])
    assert area_under_risk_coverage(infinite, correct) == area_under_risk_coverage(confidence, correct)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6))
def test_risk_coverage_is_the_mean_over_orders_of_ties(samples):
    areas = []
    for order in itertools.permutations(samples):
        if all(a[0] >= b[0] for a, b in itertools.pairwise(order)):
            wrong = np.cumsum([not right for _, right in order])
            areas.append(np.mean(wrong / np.arange(1, len(order) + 1)))
    confidence = torch.tensor([float(c) for c, _ in samples])
    correct = torch.tensor([right for _, right in samples])
    assert area_under_risk_coverage(confidence, correct) == pytest.approx(np.mean(areas), abs=1e-12)


def test_open_set_classification_by_hand():
    # ID 4 right, 3 wrong, 2 right; OOD 2.5, 1. Of six pairs the right ones win 2 + 1.
    correct = torch.tensor([True, False, True])
    found = open_set_classification_rate(torch.tensor([4.0, 3.0, 2.0]), correct, torch.tensor([2.5, 1.0]))
    assert found == pytest.approx(3 / 6)
    # A tie counts half.
    found = open_set_classification_rate(torch.tensor([4.0, 3.0, 2.0]), correct, torch.tensor([2.0, 1.0]))
    assert found == pytest.approx(3.5 / 6)
    assert open_set_classification_rate(torch.ones(3), correct, torch.zeros(2)) == pytest.approx(2 / 3)
    assert open_set_classification_rate(torch.ones(3), torch.zeros(3, dtype=torch.bool), torch.zeros(2)) == 0


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30),
    st.lists(st.integers(-3, 3), min_size=1, max_size=20),
)
def test_open_set_classification_is_the_area_of_the_curve(ids, oods):
    thresholds = sorted({s for s, _ in ids} | set(oods), reverse=True)
    ccr = [0.0, *(sum(right and s >= t for s, right in ids) / len(ids) for t in thresholds)]
    fpr = [0.0, *(sum(o >= t for o in oods) / len(oods) for t in thresholds)]
    scores = torch.tensor([float(s) for s, _ in ids])
    correct = torch.tensor([right for _, right in ids])
    found = open_set_classification_rate(scores, correct, torch.tensor([float(o) for o in oods]))
    assert found == pytest.approx(np.trapezoid(ccr, fpr), abs=1e-12)


def test_selective_errors():
    right = torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="1 of 2 confidences are NaN"):
        area_under_risk_coverage(torch.tensor([0.5, math.nan]), right)
    with pytest.raises(ValueError, match="bool"):
        area_under_risk_coverage(torch.rand(2), torch.ones(2))
    with pytest.raises(ValueError, match="1 of 1 ood_scores are NaN"):
        open_set_classification_rate(torch.rand(2), ~right, torch.tensor([math.nan]))
    with pytest.raises(ValueError, match=r"\(2,\) and \(1,\)"):
        open_set_classification_rate(torch.rand(2), right[:1], torch.rand(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_agrees():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 5, generator=generator), torch.randint(4, (50,), generator=generator)
    expected = classification_metrics(logits, labels, 4)
    assert classification_metrics(logits.cuda(), labels.cuda(), 4) == pytest.approx(expected, rel=1e-9)
    assert classification_metrics(logits.cuda(), labels, 4) == pytest.approx(expected, rel=1e-9)
    assert ood_metrics(logits[:, 0].cuda(), logits[:, 1].cuda()) == ood_metrics(logits[:, 0], logits[:, 1])
    correct = logits[:, :4].argmax(1) == labels
    for metric in (area_under_risk_coverage, adaptive_calibration_error):
        assert metric(logits[:, 0].sigmoid().cuda(), correct.cuda()) == metric(logits[:, 0].sigmoid(), correct)
    rate = open_set_classification_rate(logits[:, 0], correct, logits[:, 1])
    assert open_set_classification_rate(logits[:, 0].cuda(), correct, logits[:, 1].cuda()) == rate
    assert fit_temperature(logits.cuda(), labels) == pytest.approx(fit_temperature(logits, labels), rel=1e-9)
    error = classwise_calibration_error(logits, labels, 4)
    assert classwise_calibration_error(logits.cuda(), labels, 4) == pytest.approx(error, rel=1e-9)
