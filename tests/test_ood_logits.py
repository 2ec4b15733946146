"""Detectors on logits, and ODIN's step on the images, against plain loops."""

import math

import pytest
import torch
from torch import nn

from small_net import K, Net, batches, outputs, softmax
from sparse_moon.ood import (
    DETECTORS,
    KNN,
    MSP,
    ODIN,
    SCORES,
    Energy,
    MaxLogit,
    Outputs,
    TemperatureScaling,
    Unknown,
    collect,
    evaluate,
    fit_detectors,
)
from sparse_moon.ood.calibration import fit_temperature


@pytest.mark.parametrize("extra", [0, 1])
def test_logit_detectors_against_loops(extra):
    z = 3 * torch.randn(20, K + extra)
    z[:5, -1] += 8  # with an unknown output, some samples are mostly unknown
    found = outputs(z)
    rows = z.double().tolist()
    close = {"rtol": 1e-12, "atol": 0.0}

    def expect(values):
        return torch.tensor(list(values), dtype=torch.float64)

    torch.testing.assert_close(MSP(K).score(found), expect(max(softmax(r)[:K]) for r in rows), **close)
    assert MaxLogit(K).score(found).double().equal(expect(max(r[:K]) for r in rows))
    for t in (1.0, 2.5):
        known = expect(t * math.log(sum(math.exp(v / t) for v in r[:K])) for r in rows)
        every = expect(t * math.log(sum(math.exp(v / t) for v in r)) for r in rows)
        torch.testing.assert_close(Energy(K, t).score(found), known, **close)
        torch.testing.assert_close(Energy(K, t, extra="all").score(found), every, **close)
        assert known.equal(every) == (extra == 0)
    scaled = expect(max(softmax([v / 1000 for v in r])[:K]) for r in rows)
    torch.testing.assert_close(ODIN(K).score(found), scaled, **close)


def test_unknown_mass():
    z = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 9.0]])
    expected = torch.tensor([0.75, 1 - softmax([1, 2, 3, 9])[-1]], dtype=torch.float64)
    torch.testing.assert_close(Unknown(K).score(outputs(z)), expected)
    # MSP over K + 1 is (1 - u) times MSP over K.
    torch.testing.assert_close(MSP(K).score(outputs(z)), expected * MSP(K).score(outputs(z[:, :K])))
    with pytest.raises(ValueError, match=r"3 \+ 1 outputs, got logits \(2, 3\)"):
        Unknown(K).score(outputs(z[:, :K]))


@pytest.mark.parametrize("detector", [MSP(K), Unknown(K)])
def test_the_most_confident_do_not_tie(detector):
    # In float32 all of these round to 1.
    z = torch.tensor([[20.0, 0, 0, 0], [21.0, 0, 0, 0], [22.0, 0, 0, 0]])
    low, middle, high = detector.score(outputs(z)).tolist()
    assert low < middle < high < 1


@pytest.mark.parametrize("detector", [MSP(K), MaxLogit(K), Energy(K), ODIN(K), Unknown(K)], ids=lambda d: d.name)
@pytest.mark.parametrize("columns", [K - 1, K + 2])
def test_wrong_number_of_outputs(detector, columns):
    with pytest.raises(ValueError, match=rf"got (logits )?(of shape )?\(2, {columns}\)"):
        detector.score(outputs(torch.zeros(2, columns)))


def test_registry():
    logits = ["msp", "maxlogit", "energy", "odin", "unknown", "klm", "gen"]
    head = ["dice", "react", "vim", "ash", "scale", "gradnorm"]
    assert sorted(DETECTORS) == sorted([*logits, "knn", "mahalanobis", *head])
    for name, detector in DETECTORS.items():
        assert detector(K).name == name
        assert detector(K).num_classes == K
        assert detector(K).threshold is None
    assert {name for name, d in DETECTORS.items() if d(K).fits} == {"knn", "klm", "mahalanobis", "dice", "react", "vim"}
    assert set(SCORES) - set(DETECTORS) == {"godin", "temperature"}
    assert [name for name, d in SCORES.items() if d.held_out] == ["temperature"]
    assert {name for name, d in DETECTORS.items() if d(K).linear_head} == set(head)
    assert [name for name, d in DETECTORS.items() if d(K).perturbs] == ["odin"]
    assert not ODIN(K, eps=0).perturbs
    assert MSP(K).fit(outputs(torch.zeros(1, K))).perturb(nn.Identity(), torch.ones(1)) == 1


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MSP(0), "num_classes"),
        (lambda: Energy(K, 0.0), "temperature must be positive, got 0.0"),
        (lambda: Energy(K, extra="some"), "'some'"),
        (lambda: ODIN(K, -1.0), "temperature"),
        (lambda: ODIN(K, eps=-0.1), "eps"),
        (lambda: ODIN(K, std=[0.2, 0.0]), "std must be positive, got 0.0"),
        (lambda: KNN(K, 0), "k must be at least 1"),
    ],
)
def test_detector_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# ODIN


def test_odin_by_hand():
    # z = (x, -x): log S rises with |x|, so inputs move away from zero by exactly eps.
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    images = torch.tensor([[0.5], [-0.25]])
    assert ODIN(2, eps=0.125).perturb(model, images).equal(torch.tensor([[0.625], [-0.375]]))
    assert images.equal(torch.tensor([[0.5], [-0.25]]))


def test_odin_steps_by_eps_in_pixels():
    # Two channels, normalised by 0.25 and 0.5: a step of 1/64 in pixels is one of 1/16 and of 1/32 in the input.
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
    pixels, std = torch.tensor([0.75, 0.25]).view(1, 2, 1, 1), torch.tensor([0.25, 0.5]).view(1, 2, 1, 1)
    images = (pixels - 0.5) / std  # logits (2, 0): class 0, which grows with channel 0 and falls with channel 1
    moved = ODIN(2, eps=1 / 64, std=[0.25, 0.5]).perturb(model, images)
    assert moved.flatten().tolist() == [1.0 + 1 / 16, -0.5 - 1 / 32]
    assert (moved * std + 0.5).flatten().tolist() == [0.75 + 1 / 64, 0.25 - 1 / 64]
    with pytest.raises(ValueError, match=r"expected images \(B, 3, ...\) as std has it, got \(1, 2, 1, 1\)"):
        ODIN(2, std=[1.0, 1.0, 1.0]).perturb(model, images)


def test_odin_predicts_among_the_known_classes():
    # z = (x, 0, 2x): at x > 0 the unknown output is largest; class 0 is the prediction, and as x grows it loses
    # mass to the unknown one faster than it gains from class 1 (softmax over all outputs): d log S_0 / dx < 0.
    model = nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [0.0], [2.0]]))
    assert ODIN(2, temperature=1.0, eps=0.5).perturb(model, torch.tensor([[2.0]])).tolist() == [[1.5]]
    # As three classes the prediction is the third, which grows.
    assert ODIN(3, temperature=1.0, eps=0.5).perturb(model, torch.tensor([[2.0]])).tolist() == [[2.5]]


@pytest.mark.parametrize("extra", [0, 1])
def test_odin_against_finite_differences(extra):
    net = Net(K + extra).double().eval()
    images = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    temperature, eps, h = 2.0, 0.01, 1e-6

    def log_confidence(x, y):
        z = (net(x[None])[0] / temperature).tolist()
        return math.log(softmax(z)[y])

    expected = images.clone()
    with torch.no_grad():
        for i, image in enumerate(images):
            y = int(net(image[None])[0, :K].argmax())
            for position in range(16):
                step = torch.zeros(16, dtype=torch.float64)
                step[position] = h
                step = step.view(1, 4, 4)
                slope = log_confidence(image + step, y) - log_confidence(image - step, y)
                expected[i].view(-1)[position] += eps * math.copysign(1, slope)
    torch.testing.assert_close(ODIN(K, temperature, eps).perturb(net, images), expected)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_odin_needs_no_gradients_from_outside(guard):
    net = Net().eval()
    images = torch.randn(2, 1, 4, 4)
    expected = ODIN(K).perturb(net, images)
    with guard():
        moved = ODIN(K).perturb(net, images.clone())
        found = collect(net, [images.clone()], perturb=ODIN(K).perturb)
    assert moved.equal(expected) and not moved.requires_grad
    torch.testing.assert_close(found.logits, net(expected).detach())
    assert all(p.grad is None for p in net.parameters())


def test_odin_keeps_gradients_that_are_there():
    net = Net().eval()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    ODIN(K).perturb(net, torch.randn(2, 1, 4, 4))
    assert all(p.grad.eq(1).all() for p in net.parameters())


def test_odin_raises_confidence():
    net, data = Net(), batches()
    odin = ODIN(K, temperature=1.0, eps=1e-3)
    moved = odin.score(collect(net, data, perturb=odin.perturb))
    assert (moved > odin.score(collect(net, data))).all()


def test_odin_without_a_step_is_temperature_scaled_msp():
    net, data = Net(), batches()
    found = collect(net, data)
    odin = ODIN(K, temperature=10.0, eps=0.0)
    assert odin.perturb(net.eval(), data[0][0]).equal(data[0][0])
    scaled = Outputs(found.logits.double() / 10, found.features)
    assert odin.score(found).equal(MSP(K).score(scaled))


# Temperature scaling


def test_temperature_scaling_by_hand():
    # Four held-out samples of confidence 0.9, of which three are right: z / 2 has the confidence 0.75 that fits.
    gap = math.log(9)
    held = Outputs(torch.tensor([[gap, 0.0]] * 4), None, torch.tensor([0, 0, 0, 1]))
    detector = TemperatureScaling(2).fit(held)
    torch.testing.assert_close(detector.temperature, torch.tensor(2.0, dtype=torch.float64), rtol=1e-6, atol=0)
    found = detector.score(Outputs(torch.tensor([[gap, 0.0], [0.0, 4 * gap], [0.0, 0.0]]), None))
    expected = torch.tensor([0.75, 81 / 82, 0.5], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_temperature_scaling_with_an_unknown_output():
    # p = (0.6, 0.2, 0.2), the last of them "unknown", at T = 2 as sqrt(p), over its sum.
    detector = TemperatureScaling(2)
    detector.temperature = torch.tensor(2.0, dtype=torch.float64)
    found = detector.score(Outputs(torch.tensor([[0.6, 0.2, 0.2]]).log(), None))
    assert found.item() == pytest.approx(math.sqrt(0.6) / (math.sqrt(0.6) + 2 * math.sqrt(0.2)))


def test_temperature_scaling_learns_from_held_out_data():
    net, data = Net(), batches()
    labelled = [(images, torch.arange(len(images)) % K) for images, *_ in data]
    sets = {"id_batches": data, "ood_batches": {"ood": data}}
    with pytest.raises(ValueError, match=r"held_out_batches is needed to fit \['temperature'\]"):
        evaluate(net, [TemperatureScaling(K)], train_batches=labelled, **sets)
    with pytest.raises(ValueError, match=r"\['temperature'\] learn from held-out data and the others"):
        fit_detectors(net, [TemperatureScaling(K), KNN(K, 3)], labelled)
    with pytest.raises(ValueError, match="the temperature is fitted to labels, got batches without"):
        TemperatureScaling(K).fit(outputs(torch.zeros(2, K)))
    with pytest.raises(ValueError, match="held-out logits must be finite"):
        TemperatureScaling(K).fit(Outputs(torch.full((1, K), math.nan), None, torch.zeros(1, dtype=torch.long)))
    with pytest.raises(ValueError, match="not fitted"):
        TemperatureScaling(K).score(outputs(torch.zeros(2, K)))
    detector = TemperatureScaling(K)
    found = evaluate(net, [detector, KNN(K, 3)], train_batches=data, held_out_batches=labelled, **sets)
    known = collect(net, labelled)
    assert detector.temperature.item() == fit_temperature(known.logits, known.labels)
    assert found.scores["id"]["temperature"].equal(detector.score(known))
