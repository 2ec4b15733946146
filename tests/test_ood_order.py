"""Every score orders samples as its formula in float64 does, also where float32 or differences of sums would not."""

import numpy as np
import pytest
import torch

from sparse_moon.ood import DETECTORS, KNN, GeneralizedODIN, Head, Mahalanobis, Outputs, TemperatureScaling
from sparse_moon.ood.calibration import fit_temperature

K, D, TRAIN, TEST = 4, 12, 300, 64


def make(offset: float, spread: float, gap: float, extra: int) -> tuple[Outputs, Outputs]:
    """Training and test outputs: features ``spread`` wide around ``offset``, logits with differences of ``gap``.

    Every second test sample is its neighbour with some features and one logit moved by one float32 step.
    """
    rng = np.random.default_rng(0)
    labels = np.arange(TRAIN) % K
    means = spread * rng.normal(size=(K, D))
    head = Head(torch.randn(K + extra, D), torch.randn(K + extra))

    def outputs(size: int, classes: np.ndarray) -> Outputs:
        features = (offset + means[classes] + spread * rng.normal(size=(size, D))).astype(np.float32)
        z = (offset + gap * rng.normal(size=(size, K + extra))).astype(np.float32)
        for i in range(1, size, 2):
            features[i], z[i] = features[i - 1], z[i - 1]
            features[i, i % D :] = np.nextafter(features[i, i % D :], np.float32(np.inf))
            z[i, i % K] = np.nextafter(z[i, i % K], np.float32(np.inf))
        return Outputs(torch.from_numpy(z), torch.from_numpy(features), torch.from_numpy(classes), head)

    return outputs(TRAIN, labels), outputs(TEST, rng.integers(K, size=TEST))


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def logsumexp(z):
    top = z.max(1, keepdims=True)
    return top[:, 0] + np.log(np.exp(z - top).sum(1))


def unit(h):
    return h / np.sqrt((h * h).sum(1, keepdims=True))


def shaped(h, percentile):
    """``h`` times ``exp(s1 / s2)``, and with all but the largest set to zero."""
    keep = max(1, D - round(D * percentile))
    kept = np.zeros_like(h)
    index = np.argsort(-h, axis=1, kind="stable")[:, :keep]
    np.put_along_axis(kept, index, np.take_along_axis(h, index, 1), 1)
    return h * np.exp(h.sum(1) / kept.sum(1))[:, None], kept * np.exp(h.sum(1) / kept.sum(1))[:, None]


def expected(name: str, train: Outputs, test: Outputs, number: type[np.floating]) -> np.ndarray:
    """The formulas of the papers, straight, in arithmetic of type ``number``."""
    (z, h), (zt, ht) = ((o.logits.numpy().astype(number), o.features.numpy().astype(number)) for o in (test, train))
    weight, bias = (p.numpy().astype(number) for p in (test.head.weight, test.head.bias))
    known, p = z[:, :K], softmax(z)

    def energy(features, weight=weight):
        return logsumexp((features @ weight.T + bias)[:, :K])

    match name:
        case "msp":
            return p[:, :K].max(1)
        case "maxlogit":
            return known.max(1)
        case "energy":
            return logsumexp(known)
        case "odin":
            return softmax(z / 1000)[:, :K].max(1)
        case "temperature":
            return softmax(z / number(fit_temperature(train.logits, train.labels)))[:, :K].max(1)
        case "unknown":
            return p[:, :K].sum(1)
        case "gen":
            q = softmax(known)
            others = np.stack([np.delete(q, j, 1).sum(1) for j in range(K)], 1)
            return -((q * others) ** 0.1).sum(1)
        case "klm":
            predicted = zt[:, :K].argmax(1)
            templates = np.stack([softmax(zt)[predicted == c].mean(0) for c in range(K) if (predicted == c).any()])
            return -np.stack([(p * np.log(p / t)).sum(1) for t in templates], 1).min(1)
        case "knn":
            distances = np.sqrt(((unit(h)[:, None] - unit(ht)[None]) ** 2).sum(2))
            return -np.sort(distances, 1)[:, 49]
        case "mahalanobis":
            labels = train.labels.numpy()
            means = np.stack([ht[labels == c].mean(0) for c in range(K)])
            inside = (ht - means[labels]).astype(float)
            inverse = np.linalg.inv(inside.T @ inside / TRAIN).astype(number)
            away = h[:, None] - means[None]
            return -np.einsum("nci,ij,ncj->nc", away, inverse, away).min(1)
        case "vim":
            origin = -np.linalg.pinv(weight[:K].astype(float)) @ bias[:K].astype(float)
            centered = (ht - origin).astype(float)
            if number is np.float64:  # as the paper does
                directions = np.linalg.eigh(centered.T @ centered)[1][:, : D - D // 2].T
            else:
                directions = np.linalg.svd(centered, full_matrices=False)[2][D // 2 :].astype(number)
            norm, norm_train = (np.sqrt((((x - origin) @ directions.T) ** 2).sum(1)) for x in (h, ht))
            return logsumexp(known) - zt[:, :K].max(1).mean() / norm_train.mean() * norm
        case "gradnorm":
            return np.abs(softmax(known) - 1 / number(K)).sum(1) * np.abs(h).sum(1)
        case "react":
            return energy(np.minimum(h, np.quantile(ht.astype(float), 0.9)))
        case "ash":
            return energy(shaped(h, 0.9)[1])
        case "scale":
            return energy(shaped(h, 0.85)[0])
        case "dice":
            share = weight[:K] * ht.mean(0)
            masked = np.where(share > np.quantile(share.astype(float), 0.9), weight[:K], 0)
            return logsumexp(h @ masked.T + bias[:K])
        case "godin":
            return (unit(h) @ unit(weight[:K]).T).max(1)
    raise AssertionError(name)


SCORES = {**DETECTORS, "godin": GeneralizedODIN, "temperature": TemperatureScaling}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize(
    ("offset", "spread", "gap"),
    [(0.0, 1.0, 1.0), (1e3, 1.0, 1.0), (1e4, 10.0, 5.0), (1.0, 1e-4, 1e-4), (5.0, 1.0, 10.0)],
    ids=["plain", "offset 1e3", "offset 1e4", "close together", "confident"],
)
def test_scores_are_ordered_as_in_float64(name, offset, spread, gap):
    torch.manual_seed(0)
    train, test = make(offset, spread, gap, extra=name == "unknown")
    if name in ("ash", "scale") and not offset:
        train, test = (Outputs(o.logits, o.features.relu(), o.labels, o.head) for o in (train, test))
    if name == "godin":
        head = Head(test.head.weight, test.head.bias, cosine=True)
        train, test = (Outputs(o.logits, o.features, o.labels, head) for o in (train, test))
    found = SCORES[name](K).fit(train).score(test).double().numpy()
    reference, straight = (expected(name, train, test, number) for number in (np.longdouble, np.float64))
    if not np.isfinite(reference.astype(float)).all():
        pytest.skip("the formula itself overflows")
    # At most a few times as far from the truth as the straight formula in float64.
    error = 16 * np.abs(straight - reference).max() + 4 * np.finfo(float).eps * np.abs(reference).max()
    np.testing.assert_allclose(found, reference.astype(float), rtol=0, atol=float(error))
    larger = reference[:, None] - reference[None] > 2 * error
    assert larger.sum() > 0.6 * TEST * (TEST - 1) / 2  # or nothing would be tested
    assert (found[:, None] > found[None])[larger].all()


def test_knn_among_clusters():
    """Trained features lie in clusters far narrower than their distances: the squared distance is below float32's."""
    torch.manual_seed(0)
    centers = torch.eye(K, D)
    train, test = (centers.repeat(50, 1) + 1e-4 * torch.randn(50 * K, D) for _ in range(2))
    found = KNN(K, 10).fit(Outputs(torch.zeros(200, K), train)).score(Outputs(torch.zeros(200, K), test))
    a, b = (torch.nn.functional.normalize(x.double()) for x in (test, train))
    reference = -torch.linalg.vector_norm(a[:, None] - b[None], dim=2).sort(1).values[:, 9]
    torch.testing.assert_close(found, reference, rtol=1e-12, atol=0)


def test_mahalanobis_among_clusters():
    torch.manual_seed(0)
    labels = torch.arange(200) % K
    train, test = (1e3 * torch.eye(K, D)[labels] + 1e-3 * torch.randn(200, D) for _ in range(2))
    found = Mahalanobis(K).fit(Outputs(torch.zeros(200, K), train, labels)).score(Outputs(torch.zeros(200, K), test))
    x, y = train.double(), test.double()
    means = torch.stack([x[labels == c].mean(0) for c in range(K)])
    inside = x - means[labels]
    inverse = torch.linalg.inv(inside.T @ inside / 200)
    away = y - means[labels]
    torch.testing.assert_close(found, -torch.einsum("ni,ij,nj->n", away, inverse, away), rtol=1e-9, atol=0)


def test_the_unknown_mass_near_one():
    z = torch.tensor([[0.0, 0, 0, 0, 40], [0, 0, 0, 0, 41], [0, 0, 0, 0, 42]])
    found = DETECTORS["unknown"](K).score(Outputs(z, None))
    reference = 4 * torch.exp(-z[:, -1].double())
    torch.testing.assert_close(found, reference, rtol=1e-12, atol=0)
    assert found[0] > found[1] > found[2] > 0


def test_gradient_norm_of_the_uncertain():
    """The difference from the uniform distribution is small, but not below what float64 resolves."""
    z = torch.tensor([[1e-6, 0, 0, 0], [2e-6, 0, 0, 0], [3e-6, 0, 0, 0]])
    head = Head(torch.zeros(K, 1), torch.zeros(K))
    found = DETECTORS["gradnorm"](K).score(Outputs(z, torch.ones(3, 1), None, head))
    torch.testing.assert_close(found, z[:, 0].double() * 3 / 8, rtol=1e-5, atol=0)
