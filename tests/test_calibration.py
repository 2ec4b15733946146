"""Calibration by class and by equal shares, and the temperature that mends it, against loops and SciPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from sparse_moon.ood.calibration import adaptive_calibration_error, classwise_calibration_error, fit_temperature
from sparse_moon.ood.metrics import classification_metrics, expected_calibration_error, negative_log_likelihood

# Classwise and adaptive calibration


def test_classwise_calibration_by_hand():
    # Class 0: one sample in (0.5, 1] of 0.75, right; one in (0, 0.5] of 0.25, wrong. Class 1: the mirror image, where
    # 0.25 belongs to a sample of class 0 and 0.75 to one of class 1. The third class never has mass nor samples.
    p = torch.tensor([[0.75, 0.25, 0.0], [0.25, 0.75, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    assert classwise_calibration_error(p.log(), labels, 3, bins=2) == pytest.approx((0.25 + 0.25 + 0) / 3)
    assert classwise_calibration_error(p.log(), labels.flip(0), 3, bins=2) == pytest.approx((0.75 + 0.75 + 0) / 3)
    # In one bin only the mean counts.
    assert classwise_calibration_error(p.log(), labels, 3, bins=1) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("bins", [1, 4, 15])
def test_classwise_calibration_against_a_loop(extra, bins):
    logits, labels = 3 * torch.randn(57, 4 + extra), torch.randint(4, (57,))
    total = 0.0
    for c in range(4):
        gaps: dict[int, float] = {}
        for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
            p = math.exp(z[c]) / sum(math.exp(v) for v in z)
            i = max(math.ceil(p * bins) - 1, 0)
            gaps[i] = gaps.get(i, 0.0) + p - (y == c)
        total += sum(map(abs, gaps.values())) / 57 / 4
    assert classwise_calibration_error(logits, labels, 4, bins) == pytest.approx(total, rel=1e-12)


def test_calibration_against_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification", reason="needs torchmetrics")
    logits, labels = 3 * torch.randn(400, 5), torch.randint(5, (400,))
    p = logits.double().softmax(1)
    for bins in (5, 15):
        expected = [
            torchmetrics.binary_calibration_error(
                p[:, c].contiguous(), (labels == c).long(), n_bins=bins, norm="l1"
            ).item()
            for c in range(5)
        ]
        assert classwise_calibration_error(logits, labels, 5, bins) == pytest.approx(sum(expected) / 5, abs=1e-6)
        top = torchmetrics.multiclass_calibration_error(p, labels, 5, n_bins=bins, norm="l1").item()
        assert expected_calibration_error(p.amax(1), p.argmax(1) == labels, bins) == pytest.approx(top, abs=1e-6)


def test_adaptive_calibration_by_hand():
    # Five samples in two bins: the three least confident, then two.
    confidence = torch.tensor([1.0, 0.5, 0.9, 0.3, 0.4], dtype=torch.float64)
    correct = torch.tensor([True, True, False, False, False])
    expected = (abs(0.3 + 0.4 + 0.5 - 1) + abs(0.9 + 1.0 - 1)) / 5
    assert adaptive_calibration_error(confidence, correct, bins=2) == pytest.approx(expected)
    # More bins than samples: a bin each.
    expected = (0.3 + 0.4 + 0.5 + 0.9 + 0.0) / 5
    assert adaptive_calibration_error(confidence, correct, bins=9) == pytest.approx(expected)
    # Ties at a cut: both halves have the mean accuracy 1/2, whichever samples they get.
    tied = torch.full((4,), 0.75)
    for right in ([True, True, False, False], [True, False, False, True]):
        assert adaptive_calibration_error(tied, torch.tensor(right), bins=2) == pytest.approx(0.25)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=40), st.integers(1, 50))
def test_adaptive_calibration_against_a_loop(samples, bins):
    means = {c: np.mean([r for d, r in samples if d == c]) for c, _ in samples}
    parts = np.array_split(sorted(c for c, _ in samples), bins)
    expected = sum(abs(sum(c / 20 - means[c] for c in part)) for part in parts) / len(samples)
    confidence = torch.tensor([c / 20 for c, _ in samples], dtype=torch.float64)
    correct = torch.tensor([right for _, right in samples])
    assert adaptive_calibration_error(confidence, correct, bins) == pytest.approx(expected, abs=1e-12)


def test_new_calibration_errors():
    right = torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        adaptive_calibration_error(torch.rand(2), right, bins=0)
    with pytest.raises(ValueError, match=r"\[0, 1\], got values from"):
        adaptive_calibration_error(torch.tensor([0.5, 1.5]), right)
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        adaptive_calibration_error(torch.rand(2), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        classwise_calibration_error(torch.randn(2, 4), torch.tensor([0, 3]), 3)
    with pytest.raises(ValueError, match="nan"):
        classwise_calibration_error(torch.full((2, 3), math.nan), torch.tensor([0, 1]), 3)


# Temperature


@pytest.mark.parametrize("extra", [0, 1])
def test_temperature_against_scipy(extra):
    logits = torch.randn(300, 4 + extra, dtype=torch.float64)
    labels = torch.distributions.Categorical(logits=logits[:, :4]).sample()
    for scale in (0.2, 1.0, 7.0):

        def loss(log_t, z=scale * logits):
            return negative_log_likelihood(z / math.exp(log_t), labels)

        best = minimize_scalar(loss, bounds=(-4, 4), method="bounded", options={"xatol": 1e-9})
        found = fit_temperature(scale * logits, labels)
        assert found == pytest.approx(math.exp(best.x), rel=1e-4)  # scipy sees a flat minimum
        assert loss(math.log(found)) <= best.fun + 1e-12
    # Scaling the logits scales the temperature, and nothing else.
    assert fit_temperature(7 * logits, labels) == pytest.approx(7 * fit_temperature(logits, labels), rel=1e-9)


def test_temperature_by_hand():
    # Three of four right with equal margins m: p = 3/4 where m / T = log 3.
    logits = torch.tensor([[2.0, 0.0]] * 4)
    assert fit_temperature(logits, torch.tensor([0, 0, 0, 1])) == pytest.approx(2 / math.log(3), rel=1e-9)
    # All right: the sharper the better. Half right: uniform is best. Always wrong: likewise.
    assert fit_temperature(logits, torch.tensor([0, 0, 0, 0])) == pytest.approx(0.01)
    assert fit_temperature(logits, torch.tensor([0, 0, 1, 1])) == 100
    assert fit_temperature(logits, torch.tensor([1, 1, 1, 1])) == 100


def test_temperature_keeps_predictions_and_mends_calibration():
    logits = torch.randn(2000, 5)
    labels = torch.distributions.Categorical(logits=logits).sample()
    overconfident = 4 * logits
    t = fit_temperature(overconfident.requires_grad_(), labels)
    before, after = (classification_metrics(z, labels, 5) for z in (overconfident, overconfident / t))
    assert after["accuracy"] == before["accuracy"] and after["ece"] < before["ece"] / 5 and after["nll"] < before["nll"]


def test_temperature_errors():
    with pytest.raises(ValueError, match="finite"):
        fit_temperature(torch.tensor([[0.0, math.inf]]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"\[0, 2\)"):
        fit_temperature(torch.zeros(1, 2), torch.tensor([2]))
