"""The parts of detectors, what holds for all, and those that learn from logits, against loops from the papers."""

import math

import pytest
import torch
from torch import nn

from small_outputs import D, K, close, data, linear, network, rows, run, softmax
from sparse_moon.nn import SparseLinear
from sparse_moon.ood import (
    ASH,
    DETECTORS,
    DICE,
    GEN,
    KLM,
    KNN,
    MSP,
    Energy,
    Outputs,
    ReAct,
    ViM,
    collect,
    evaluate,
    fit_detectors,
)
from sparse_moon.ood.detector import Sample

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
