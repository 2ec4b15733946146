"""ReAct, ASH and SCALE against loops from the papers' formulas."""

import math

import numpy as np
import pytest
import torch

from small_outputs import D, K, close, data, linear, logsumexp, run
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
    Energy,
    Head,
    Mahalanobis,
    MaxLogit,
    Outputs,
    ReAct,
    Unknown,
    ViM,
)

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
