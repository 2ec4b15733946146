"""Detectors that learn, read features or shape activations, against slow loops from the papers' formulas."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from sparse_moon.nn import SparseLinear
from sparse_moon.ood import (
    ASH,
    DETECTORS,
    DICE,
    GEN,
    KLM,
    KNN,
    MSP,
    ODIN,
    SCALE,
    CosineHead,
    Energy,
    GeneralizedODIN,
    GradNorm,
    Head,
    Mahalanobis,
    MaxLogit,
    Outputs,
    ReAct,
    Unknown,
    ViM,
    choose_p,
    classifier_head,
    collect,
    evaluate,
    fit_detectors,
)
from sparse_moon.ood.detector import Sample

K, D = 4, 7


def close(found, expected, tolerance=1e-10):
    expected = torch.as_tensor(np.asarray(expected, dtype=np.float64))
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def network(extra=0, size=D, classes=K):
    return Head(torch.randn(classes + extra, size), torch.randn(classes + extra))


def run(head, features, labels=None):
    """Outputs of a network whose last layer is ``head``."""
    return Outputs(head.logits(features).float(), features, labels, head)


def data(extra=0, train=83, test=31, size=D, classes=K):
    """Non-negative features, as after a ReLU, with dead units for some samples."""
    head = network(extra, size, classes)
    labels = torch.arange(train) % classes
    features = (torch.randn(train, size) + 0.5 * torch.randn(classes, size)[labels]).relu()
    return run(head, features, labels), run(head, (1.5 * torch.randn(test, size)).relu())


def logsumexp(z):
    return math.log(sum(math.exp(v) for v in z))


def softmax(z):
    return [math.exp(v - logsumexp(z)) for v in z]


def linear(weight, bias, h):
    return [sum(w * x for w, x in zip(row, h, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def rows(outputs):
    """(logits, features) of every sample as lists of floats."""
    return zip(outputs.logits.tolist(), outputs.features.tolist(), strict=True)


# A detector's parts


def test_head_and_outputs():
    head = network()
    features = torch.randn(5, D)
    expected = [linear(head.weight.tolist(), head.bias.tolist(), h) for h in features.tolist()]
    close(head.logits(features), expected, 1e-12)
    with pytest.raises(ValueError, match=r"weight \(4, 7\) and bias \(4,\), got \(5, 7\) and \(5,\)"):
        Outputs(torch.zeros(2, K), torch.zeros(2, D), head=network(1))
    moved = Outputs(torch.zeros(2, K), torch.zeros(2, D), head=head).to("meta").head
    assert moved.weight.device.type == moved.bias.device.type == "meta"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, lambda i, o, bias: SparseLinear(i, o, bias, sparsity=0.5)])
def test_collect_brings_the_head(kind, bias):
    net = nn.Sequential(nn.Linear(3, D), nn.ReLU(), kind(D, K, bias=bias))
    found = collect(net, [torch.randn(5, 3), torch.randn(2, 3)])
    torch.testing.assert_close(found.head.logits(found.features).float(), found.logits)
    assert not found.head.cosine
    before = found.head.weight.clone()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    assert found.head.weight.equal(before)  # a copy


def test_no_head_where_logits_are_not_its_output():
    net = nn.Sequential(nn.Linear(D, K), nn.LogSoftmax(1))
    found = collect(net, [torch.randn(5, D)])
    assert found.head is None
    for name in ("react", "ash", "scale", "gradnorm"):
        with pytest.raises(ValueError, match="outputs with a head"):
            DETECTORS[name](K).fit(found).score(found)
    for name in ("dice", "vim"):
        with pytest.raises(ValueError, match="outputs with a head"):
            DETECTORS[name](K).fit(found)


@pytest.mark.parametrize("limit", [1, 4, 10, 100])
@pytest.mark.parametrize("sizes", [(37,), (1,) * 37, (10, 3, 24), (36, 1)])
def test_sample_is_every_sth_row(limit, sizes):
    sample = Sample(limit)
    for part in torch.arange(37).split(sizes):
        sample.add(part[:, None])
    kept = sample.rows()[:, 0].tolist()
    assert kept == list(range(0, 37, sample.stride))
    assert limit / 2 < len(kept) <= limit or sample.stride == 1
    assert sample.seen == 37


FITTING = [name for name, make in DETECTORS.items() if make(K).fits]


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("name", FITTING)
@pytest.mark.parametrize("sizes", [(1,) * 83, (7, 13, 62, 1)])
def test_streaming_equals_one_batch(name, sizes, extra):
    train, test = data(extra)
    detector = DETECTORS[name](K)
    whole = detector.fit(train).score(test)
    detector.start()
    parts = [tensor.split(sizes) for tensor in (train.logits, train.features, train.labels)]
    for logits, features, labels in zip(*parts, strict=True):
        detector.update(Outputs(logits, features, labels, train.head))
    detector.finish()
    torch.testing.assert_close(detector.score(test), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FITTING)
def test_a_second_fit_forgets_the_first(name):
    (train, test), (other, _) = data(), data(train=91)
    expected = DETECTORS[name](K).fit(train).score(test)
    detector = DETECTORS[name](K).fit(other)
    assert not detector.score(test).equal(expected)
    detector.start()
    detector.update(other)  # a fit that never finishes
    assert detector.fit(train).score(test).equal(expected)


@pytest.mark.parametrize("name", FITTING)
def test_fit_and_score_errors(name):
    train, test = data()
    with pytest.raises(ValueError, match="not fitted"):
        DETECTORS[name](K).score(test)
    detector = DETECTORS[name](K).fit(train)
    with pytest.raises(ValueError, match=r"size 7, got 6|\(N, 4\) or \(N, 5\)"):
        detector.score(run(network(size=6, classes=6), torch.rand(6, 6)))
    train.features[3, 2] = math.nan
    train.logits[3, 2] = math.nan
    with pytest.raises(ValueError, match="finite"):
        DETECTORS[name](K).fit(train)
    empty = DETECTORS[name](K)
    empty.start()
    with pytest.raises(ValueError, match=r"not fitted|got 0"):
        empty.finish()


def test_one_pass_fits_all_and_matches_single_fits():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, D), nn.ReLU(), nn.Linear(D, K + 1))
    seen = []
    net.register_forward_hook(lambda module, args, result: seen.append(len(result)))
    batches = [(torch.randn(n, 1, 4, 4), torch.arange(n) % K) for n in (40, 30, 11)]
    detectors = [make(K) for make in DETECTORS.values()]
    fit_detectors(net, detectors, batches)
    assert seen == [40, 30, 11]
    train, test = collect(net, batches), collect(net, [batches[0][0] + 1])
    for detector in detectors:
        expected = DETECTORS[detector.name](K)
        if expected.fits:
            expected.fit(train)
        torch.testing.assert_close(detector.score(test), expected.score(test), rtol=1e-9, atol=1e-9)
    seen.clear()
    fit_detectors(net, [MSP(K), ASH(Energy(K))], batches)
    assert not seen


def test_an_aborted_pass_leaves_no_trace():
    net = nn.Linear(5, K)
    batches = [torch.randn(60, 5), torch.randn(20, 5)]

    def broken():
        yield 3 + batches[0]
        raise RuntimeError("disk")

    detectors = [KLM(K), KNN(K), DICE(ReAct(Energy(K))), ViM(K)]
    with pytest.raises(RuntimeError, match="disk"):
        fit_detectors(net, detectors, broken())
    fit_detectors(net, detectors, batches)
    train = collect(net, batches)
    for detector, new in zip(detectors, [KLM(K), KNN(K), DICE(ReAct(Energy(K))), ViM(K)], strict=True):
        torch.testing.assert_close(detector.score(train), new.fit(train).score(train))


def test_evaluate_with_all_detectors():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, D), nn.ReLU(), nn.Linear(D, K + 1))
    batches = [(torch.randn(n, 1, 4, 4), torch.arange(n) % K) for n in (40, 30)]
    detectors = [make(K) for make in DETECTORS.values()]
    detectors += [ReAct(DICE(Energy(K))), DICE(MSP(K))]
    result = evaluate(net, detectors, train_batches=batches, id_batches=batches, ood_batches={"far": batches[:1]})
    assert list(result.metrics["far"]) == [*DETECTORS, "react+dice", "dice+msp"]
    assert all(scores.shape == (70,) and scores.isfinite().all() for scores in result.scores["id"].values())


# GEN


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("top", [None, 1, 2, K])
def test_gen_against_a_loop(extra, top):
    _, test = data(extra)
    expected = []
    for z, _ in rows(test):
        p = sorted(softmax(z[:K]), reverse=True)[:top]
        expected.append(-sum((v * (1 - v)) ** 0.1 for v in p))
    close(GEN(K, top=top).score(test), expected)


def test_gen_orders_the_most_confident():
    z = torch.tensor([[50.0, 0, 0, 0], [60.0, 0, 0, 0], [70.0, 0, 0, 0]])
    for top in (None, 1):  # in float64 all three largest probabilities are 1
        low, middle, high = GEN(K, top=top).score(Outputs(z, torch.zeros(3, 1))).tolist()
        assert low < middle < high < 0
    assert GEN(1).score(Outputs(torch.randn(3, 1), torch.zeros(3, 1))).tolist() == [0, 0, 0]


# KL matching


@pytest.mark.parametrize("extra", [0, 1])
def test_klm_against_a_loop(extra):
    train, test = data(extra)
    groups = {}
    for z, _ in rows(train):
        groups.setdefault(max(range(K), key=z.__getitem__), []).append(softmax(z))
    templates = [[sum(column) / len(group) for column in zip(*group, strict=True)] for group in groups.values()]
    expected = []
    for z, _ in rows(test):
        p = softmax(z)
        expected.append(-min(sum(a * math.log(a / b) for a, b in zip(p, d, strict=True)) for d in templates))
    close(KLM(K).fit(train).score(test), expected)


def test_klm_without_some_classes():
    z = torch.tensor([[5.0, 0, 0, 0], [4.0, 0, 0, 0], [0, 3.0, 0, 0]])
    train = Outputs(z, torch.zeros(3, 1))
    klm = KLM(K).fit(train)
    assert klm.templates.shape == (2, K)
    score = klm.score(Outputs(torch.tensor([[0, 3.0, 0, 0], [0, 0, 0, 9.0]]), torch.zeros(2, 1)))
    assert score[0].item() == pytest.approx(0, abs=1e-12)  # the template itself
    assert score[1] < -2
    # Far beyond what float64 probabilities resolve: finite, and worst.
    far = klm.fit(Outputs(1000 * z, torch.zeros(3, 1))).score(Outputs(1000 * torch.eye(4), torch.zeros(4, 1)))
    assert far.isfinite().all() and far[2] < far[0] and far[3] < far[1]


def test_klm_takes_unknown_mass_as_a_difference():
    known = torch.tensor([[6.0, 0, 0, 0, -2.0], [0, 6.0, 0, 0, -2.0]])
    klm = KLM(K).fit(Outputs(known, torch.zeros(2, 1)))
    unsure = known.clone()
    unsure[:, -1] = 8.0
    assert (klm.score(Outputs(unsure, torch.zeros(2, 1))) < klm.score(Outputs(known, torch.zeros(2, 1))) - 1).all()
    with pytest.raises(ValueError, match="fitted to 5 outputs"):
        klm.score(Outputs(torch.zeros(2, K), torch.zeros(2, 1)))


# Mahalanobis


def mahalanobis_loop(train, test, shrinkage=0.0):
    x, y = train.features.double().numpy(), train.labels.numpy()
    means = {c: x[y == c].mean(0) for c in np.unique(y)}
    covariance = sum(np.outer(h - means[c], h - means[c]) for h, c in zip(x, y, strict=True)) / len(x)
    covariance = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / len(covariance) * np.eye(x.shape[1])
    inverse = np.linalg.pinv(covariance, rcond=1e-9, hermitian=True)
    return [-min((h - m) @ inverse @ (h - m) for m in means.values()) for h in test.features.double().numpy()]


@pytest.mark.parametrize("shrinkage", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_mahalanobis_against_a_loop(shrinkage, offset):
    train, test = data()
    for outputs in (train, test):
        outputs.features.add_(offset)
    close(Mahalanobis(K, shrinkage).fit(train).score(test), mahalanobis_loop(train, test, shrinkage), 1e-6)


def test_mahalanobis_with_a_singular_covariance():
    train, test = data()
    for outputs in (train, test):
        outputs.features[:, 1] = outputs.features[:, 0] / 3  # float32 rounding breaks the tie a little
        outputs.features[:, 2] = 5.0
    detector = Mahalanobis(K).fit(train)
    assert detector.whitening.shape == (D, D - 2)
    close(detector.score(test), mahalanobis_loop(train, test), 1e-6)
    # One sample a class: nothing varies within classes, and nothing is far from anything.
    alone = Outputs(train.logits[:K], train.features[:K], train.labels[:K])
    assert Mahalanobis(K).fit(alone).score(test).tolist() == [0.0] * len(test.features)


def test_mahalanobis_without_some_classes_and_labels():
    train, test = data()
    train.labels[train.labels == 2] = 0
    detector = Mahalanobis(K).fit(train)
    assert len(detector.means) == K - 1
    close(detector.score(test), mahalanobis_loop(train, test), 1e-8)
    with pytest.raises(ValueError, match="labels of the training data"):
        Mahalanobis(K).fit(test)
    train.labels[5] = K
    with pytest.raises(ValueError, match=r"\[0, 4\), got \[0, 1, 3, 4\]"):
        Mahalanobis(K).fit(train)


def test_mahalanobis_by_hand():
    # Two classes around (+-5, 0) with variance 1 along the first axis and 4 along the second.
    offsets = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [1.0, -2.0], [-1.0, -2.0]])
    features = torch.cat([offsets + torch.tensor([5.0, 0.0]), offsets - torch.tensor([5.0, 0.0])])
    train = Outputs(torch.zeros(8, 2), features, torch.tensor([0] * 4 + [1] * 4))
    test = Outputs(torch.zeros(3, 2), torch.tensor([[5.0, 0.0], [-3.0, 0.0], [-5.0, 6.0]]))
    close(Mahalanobis(2).fit(train).score(test), [0, -4, -9])


# ViM


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("dim", [None, 0, 2, 6])
def test_vim_against_a_loop(extra, dim):
    train, test = data(extra)
    w, b = train.head.weight[:K].double().numpy(), train.head.bias[:K].double().numpy()
    origin = -np.linalg.pinv(w) @ b
    x = train.features.double().numpy() - origin
    residual = np.linalg.svd(x)[2][D // 2 if dim is None else dim :]
    largest = [max(z[:K]) for z, _ in rows(train)]
    alpha = np.sum(largest) / sum(np.linalg.norm(residual @ h) for h in x)
    expected = [logsumexp(z[:K]) - alpha * np.linalg.norm(residual @ (np.array(h) - origin)) for z, h in rows(test)]
    close(ViM(K, dim).fit(train).score(test), expected, 1e-9)


def test_vim_default_dimension():
    from sparse_moon.ood.features import principal_dim

    assert [principal_dim(n) for n in (1, 7, 512, 767, 768, 2047, 2048)] == [0, 3, 256, 383, 512, 512, 1000]


def test_vim_without_a_residual_is_the_energy():
    train, test = data()
    for outputs in (train, test):
        outputs.features[:, 1:] = 0
    head = Head(train.head.weight, torch.zeros(K))
    train, test = run(head, train.features), run(head, test.features)
    assert ViM(K, dim=3).fit(train).score(test).equal(Energy(K).score(test))


def test_vim_arguments():
    with pytest.raises(ValueError, match="dim must not be negative, got -1"):
        ViM(K, -1)
    with pytest.raises(ValueError, match="below the number of features, 7, got 7"):
        ViM(K, D).fit(data()[0])


# GradNorm


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradnorm_against_autograd(temperature):
    _, test = data()
    expected = []
    for h in test.features.double():
        weight = test.head.weight.double().requires_grad_()
        z = (weight @ h + test.head.bias.double()) / temperature
        loss = nn.functional.kl_div(z.log_softmax(0), torch.full((K,), 1 / K).double(), reduction="sum")
        expected.append(torch.autograd.grad(loss, weight)[0].abs().sum().item())
    close(GradNorm(K, temperature).score(test), expected, 1e-5)


def test_gradnorm_of_the_known_logits():
    _, test = data(extra=1)
    known = Outputs(test.logits[:, :K], test.features, head=Head(test.head.weight[:K], test.head.bias[:K]))
    assert GradNorm(K).score(test).equal(GradNorm(K).score(known))


# ReAct, ASH, SCALE

INNER = [Energy(K), Energy(K, 2.0, "all"), MSP(K), MaxLogit(K), GEN(K), ODIN(K, eps=0.0)]


def shaped(test, shape):
    """Outputs computed one activation at a time."""
    features = [shape(h) for h in test.features.double().tolist()]
    weight, bias = test.head.weight.double().tolist(), test.head.bias.double().tolist()
    logits = [linear(weight, bias, h) for h in features]
    return Outputs(torch.tensor(logits, dtype=torch.float64), torch.tensor(features, dtype=torch.float64))


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("inner", INNER, ids=lambda d: d.name)
def test_react_against_a_loop(inner, extra):
    train, test = data(extra)
    clip = np.percentile(train.features.numpy().astype(np.float64), 80)
    expected = inner.score(shaped(test, lambda h: [min(v, clip) for v in h]))
    close(ReAct(inner, 0.8).fit(train).score(test), expected, 1e-6)


def test_react_extremes():
    train, test = data(extra=1)
    high = ReAct(Unknown(K), 1.0).fit(train)
    assert high.clip == train.features.max()
    everything_clipped = ReAct(Energy(K), 0.0).fit(train).score(test)
    close(everything_clipped, [logsumexp(train.head.bias[:K].tolist())] * len(test.features), 1e-6)  # the minimum is 0
    with pytest.raises(ValueError, match=r"percentile must be in \[0, 1\], got 90"):
        ReAct(Energy(K), 90)


def ash(h, percentile, prune=True):
    order = sorted(range(len(h)), key=lambda i: -h[i])
    kept = set(order[: max(1, len(h) - round(len(h) * percentile))])
    scale = math.exp(sum(h) / sum(h[i] for i in kept))
    return [scale * v if i in kept or not prune else 0.0 for i, v in enumerate(h)]


@pytest.mark.parametrize("percentile", [0.0, 0.3, 0.65, 0.9])
@pytest.mark.parametrize("kind", [ASH, SCALE])
@pytest.mark.parametrize("inner", INNER, ids=lambda d: d.name)
def test_ash_and_scale_against_a_loop(kind, inner, percentile):
    _, test = data(extra=1)
    test.features[:, 0] += 0.01  # so that something is positive
    expected = inner.score(shaped(test, lambda h: ash(h, percentile, kind is ASH)))
    close(kind(inner, percentile).score(test), expected, 1e-10)


def test_ash_ties_and_dead_samples():
    head = Head(torch.eye(4)[:2], torch.zeros(2))
    # The first two of four equal activations are kept; s1 / s2 = 2.
    test = run(head, torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]))
    shaped = ASH(MaxLogit(2), 0.5).shape(test)
    close(shaped.features, [[math.e**2, math.e**2, 0, 0], [0, 0, 0, 0]])
    close(SCALE(MaxLogit(2), 0.5).shape(test).features, [[math.e**2] * 4, [0] * 4])


@pytest.mark.parametrize("percentile", [-0.1, 1.0, 65])
@pytest.mark.parametrize("kind", [ASH, SCALE])
def test_shaping_arguments(kind, percentile):
    with pytest.raises(ValueError, match=r"percentile must be in \[0, 1\)"):
        kind(Energy(K), percentile)


@pytest.mark.parametrize("kind", [ReAct, ASH, SCALE, DICE])
@pytest.mark.parametrize("inner", [KNN(K), KLM(K), ODIN(K), Mahalanobis(K), ViM(K)], ids=lambda d: d.name)
def test_shaping_refuses_what_it_cannot_shape(kind, inner):
    with pytest.raises(ValueError, match=f"{kind.__name__} goes before .* got {inner.name}"):
        kind(inner)


def test_shaping_needs_a_linear_head():
    cosine = Outputs(torch.zeros(2, K), torch.ones(2, D), head=Head(torch.ones(K, D), torch.zeros(K), cosine=True))
    for name in ("ash", "scale", "gradnorm"):
        with pytest.raises(ValueError, match="cosine head"):
            DETECTORS[name](K).score(cosine)


# DICE


def dice_mask(weight, mean, p):
    """Entries above NumPy's percentile; no two contributions are equal here."""
    contribution = weight * mean
    return contribution > np.percentile(contribution, 100 * p)


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("inner", [Energy, MSP])
def test_dice_against_a_loop(p, extra, inner):
    train, test = data(extra)
    weight, bias = train.head.weight[:K].double(), train.head.bias[:K].double()
    mean = [sum(column) / len(column) for column in zip(*train.features.tolist(), strict=True)]
    mask = dice_mask(weight.numpy(), np.array(mean), p)
    masked = np.where(mask, weight.numpy(), 0).tolist()
    logits = [linear(masked, bias.tolist(), h) for h in test.features.double().tolist()]
    dice = DICE(inner(K), p).fit(train)
    assert dice.mask.numpy().tolist() == mask.tolist()
    close(dice.score(test), inner(K).score(Outputs(torch.tensor(logits, dtype=torch.float64), test.features)))
    dice.name = "mine"
    again = dice.with_p(0.4).with_p(p)
    assert again.score(test).equal(dice.score(test)) and again.name == "mine"


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("select", ["top", "random", "unit pruning"])
def test_dice_that_keeps_all_is_the_energy_bit_for_bit(extra, select):
    train, test = data(extra)
    test.logits.add_(0.125)  # logits of another kernel are used as they are
    assert DICE(Energy(K), 0.0, select).fit(train).score(test).equal(Energy(K).score(test))


def test_dice_is_the_percentile_on_every_size():
    for size in range(2, 40):
        train = run(network(0, size, 1), torch.rand(3, size))
        for p in (0.01, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 0.99):
            dice = DICE(Energy(1), p).fit(train)
            contribution = (train.head.weight.double() * train.features.double().mean(0)).numpy()
            assert dice.mask.sum() == (contribution > np.percentile(contribution, 100 * p)).sum(), (size, p)


def test_dice_ties_go_to_the_lowest_index():
    head = Head(torch.tensor([[1.0, 2.0, 1.0], [1.0, 1.0, -1.0]]), torch.zeros(2))
    train = run(head, torch.ones(4, 3))
    # n = 6, p = 0.5: floor(2.5) + 1 = 3 go.
    assert DICE(Energy(2), 0.5).fit(train).mask.tolist() == [[True, True, True], [False, False, False]]
    # Dead units: all contributions are zero.
    dead = run(head, torch.zeros(4, 3))
    assert DICE(Energy(2), 0.7).fit(dead).mask.tolist() == [[True, True, False], [False, False, False]]


def test_dice_leaves_the_unknown_row_out_before_the_percentile():
    train, test = data(extra=1)
    huge = Head(train.head.weight.clone(), train.head.bias)
    huge.weight[-1] = 1e6
    expected = DICE(Energy(K)).fit(train)
    found = DICE(Energy(K)).fit(run(huge, train.features))
    assert found.mask.equal(expected.mask)
    assert found.score(run(huge, test.features)).equal(expected.score(test))


def test_dice_selections():
    train, _ = data()
    weight, mean = train.head.weight.double(), train.features.double().mean(0)
    contribution = weight * mean
    keep = 4 * 7 - int(0.6 * 27) - 1

    def mask(select, seed=0):
        return DICE(Energy(K), 0.6, select, seed).fit(train).mask

    masks = {s: mask(s) for s in ("top", "bottom", "top+bottom", "random", "weight dropout", "weight pruning")}
    assert all(m.sum() == keep for m in masks.values())
    assert contribution[masks["top"]].min() > contribution[~masks["top"]].max()
    assert contribution[masks["bottom"]].max() < contribution[~masks["bottom"]].min()
    assert weight[masks["weight pruning"]].abs().min() > weight[~masks["weight pruning"]].abs().max()
    half = contribution.flatten().sort().values
    kept_ends = contribution[masks["top+bottom"]].sort().values
    assert kept_ends.equal(torch.cat([half[: keep // 2], half[-((keep + 1) // 2) :]]))
    assert masks["random"].equal(masks["weight dropout"]) and masks["random"].equal(mask("random"))
    assert not masks["random"].equal(mask("random", seed=1))

    units = 7 - int(0.6 * 6) - 1
    for select in ("unit dropout", "unit pruning"):
        found = mask(select)
        assert found.equal(found[:1].expand_as(found)) and found[0].sum() == units
    norms = weight.norm(dim=0)
    kept = mask("unit pruning")[0]
    assert norms[kept].min() > norms[~kept].max()
    assert not mask("unit dropout").equal(mask("unit dropout", seed=3))


def test_dice_composes_with_react_in_both_orders():
    train, test = data(extra=1)
    clip = np.percentile(train.features.numpy().astype(np.float64), 80)
    weight, bias = train.head.weight[:K].double().numpy(), train.head.bias[:K].double().numpy()
    weight = weight * dice_mask(weight, train.features.double().numpy().mean(0), 0.7)
    logits = np.minimum(test.features.double().numpy(), clip) @ weight.T + bias
    expected = [logsumexp(z) for z in logits]
    outside, inside = ReAct(DICE(Energy(K), 0.7), 0.8), DICE(ReAct(Energy(K), 0.8), 0.7)
    assert (outside.name, inside.name) == ("react+dice", "dice+react")
    close(outside.fit(train).score(test), expected, 1e-6)
    close(inside.fit(train).score(test), expected, 1e-6)


def test_dice_arguments():
    for p in (-0.1, 1.0, 90):
        with pytest.raises(ValueError, match=r"p must be in \[0, 1\)"):
            DICE(Energy(K), p)
    with pytest.raises(ValueError, match="select must be one of top, bottom"):
        DICE(Energy(K), select="best")
    with pytest.raises(ValueError, match="4 or 5 outputs, got 6"):
        DICE(Energy(K)).update(run(network(2), torch.rand(3, D)))
    with pytest.raises(AttributeError):
        DICE(Energy(K)).p = 0.5


def test_choose_p():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 30), nn.ReLU(), nn.Linear(30, K)).eval()
    train = [2 + 0.3 * torch.randn(20, 1, 4, 4) for _ in range(3)]
    validation = [(2 + 0.3 * torch.randn(n, 1, 4, 4), torch.zeros(n, dtype=torch.int64)) for n in (20, 9)]
    dice = DICE(Energy(K))
    fit_detectors(net, [dice], train)
    generator = torch.Generator().manual_seed(5)
    noise = torch.cat([torch.randn(n, 1, 4, 4, generator=generator) for n in (20, 9)])
    known, unknown = collect(net, validation), collect(net, [noise])

    def fpr_and_auroc(p):
        i, o = (dice.with_p(p).score(outputs) for outputs in (known, unknown))
        accepted = i.sort().values[29 - math.ceil(0.95 * 29)]
        return (o >= accepted).double().mean().item(), (i[:, None] > o).double().mean().item()

    figures = {p: fpr_and_auroc(p) for p in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)}
    expected = min(figures, key=lambda p: (figures[p][0], -figures[p][1], p))
    before = dice.mask.clone()
    assert choose_p(net, dice, validation, seed=5) == expected
    assert choose_p(net, dice, validation, candidates=[0.5]) == 0.5
    assert dice.mask.equal(before) and dice.p == 0.9
    with pytest.raises(ValueError, match="at least one"):
        choose_p(net, dice, validation, candidates=[])


# Generalized ODIN


def test_cosine_head_by_hand():
    head = CosineHead(2, 3).eval()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 0.5], [-1.0, -1.0]]))
        head.scale_weight.copy_(torch.tensor([[1.0, -1.0]]))
        head.norm.running_mean.fill_(0.5)
        head.norm.running_var.fill_(4.0)
        head.norm.weight.fill_(2.0)
        head.norm.bias.fill_(0.25)
    h = [3 / 5, 4 / 5, -7 / 5 / math.sqrt(2)]
    g = 1 / (1 + math.exp(-(2 * (-1 - 0.5) / math.sqrt(4 + 1e-5) + 0.25)))
    features = torch.tensor([[3.0, 4.0]])
    assert head.similarities(features)[0].tolist() == pytest.approx(h)
    assert head(features)[0].tolist() == pytest.approx([v / g for v in h], rel=1e-5)


@pytest.mark.parametrize("extra", [0, 1])
def test_generalized_odin(extra):
    net = nn.Sequential(nn.Linear(5, D), nn.ReLU(), CosineHead(D, K + extra))
    assert classifier_head(net) is net[2]
    images = torch.randn(9, 5)
    net(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net[2].parameters())
    found = collect(net, [images])
    assert found.head.cosine
    features = net[:2](images).detach()
    torch.testing.assert_close(found.features, features)
    expected = [
        max(nn.functional.cosine_similarity(w, f, dim=0).item() for w in net[2].weight[:K].detach()) for f in features
    ]
    close(GeneralizedODIN(K).score(found), expected, 1e-6)
    with pytest.raises(ValueError, match="cosine head"):
        GeneralizedODIN(K).score(data(extra)[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", DETECTORS)
def test_cuda_agrees(name):
    train, test = data(extra=1)
    expected, found = DETECTORS[name](K), DETECTORS[name](K)
    if expected.fits:
        expected.fit(train)
        found.fit(train.to("cuda"))
    there = found.score(test.to("cuda"))
    torch.testing.assert_close(there.cpu(), expected.score(test), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.to("cpu").score(test), expected.score(test), rtol=1e-5, atol=1e-5)
