"""Detectors on features: Mahalanobis, ViM, GradNorm and generalized ODIN, against loops."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from small_outputs import D, K, close, data, logsumexp, rows, run
from sparse_moon.ood import (
    CosineHead,
    Energy,
    GeneralizedODIN,
    GradNorm,
    Head,
    Mahalanobis,
    Outputs,
    ViM,
    classifier_head,
    collect,
)

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
