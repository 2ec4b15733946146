"""Agreement with pytorch-ood, an independent implementation, on random outputs and on those of a trained network."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from sparse_moon.ood import (
    ASH,
    DICE,
    GEN,
    KLM,
    KNN,
    MSP,
    ODIN,
    SCALE,
    Energy,
    GradNorm,
    Head,
    Mahalanobis,
    MaxLogit,
    Outputs,
    ReAct,
    ViM,
    collect,
)
from sparse_moon.ood.metrics import ood_metrics, open_set_classification_rate

public = pytest.importorskip("pytorch_ood.detector", reason="needs pytorch-ood, of the test extra")
functional = pytest.importorskip("pytorch_ood.metrics.functional")

K = 7


def trained():
    """A network for digits 0 to 6: outputs on training data, and on other 0 to 6 together with 7 to 9."""
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    known, unknown = images[labels < K], images[labels >= K]
    targets = labels[labels < K]
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, K))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for step in range(150):
        batch = slice(step % 6 * 150, step % 6 * 150 + 150)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(known[:900][batch]), targets[:900][batch]).backward()
        optimizer.step()
    train = collect(net, [(known[:900], targets[:900])])
    assert (train.logits.argmax(1) == train.labels).double().mean() > 0.95
    return train, collect(net, [known[900:], unknown]), net[-1]


def random():
    torch.manual_seed(1)
    head = nn.Linear(12, K)
    centers = torch.randn(K, 12)

    def outputs(n):
        labels = torch.arange(n) % K
        features = (centers[labels] + 0.5 * torch.randn(n, 12)).relu()
        head_copy = Head(head.weight.detach(), head.bias.detach())
        return Outputs(head(features).detach(), features, labels, head_copy)

    return outputs(300), outputs(90), head


@pytest.fixture(scope="module", params=[trained, random], ids=["trained", "random"])
def case(request):
    return request.param()


def agree(detector, outlier_scores, outputs, scale=1.0, tolerance=1e-5):
    """pytorch-ood's scores are higher for OOD."""
    found = detector.score(outputs)
    torch.testing.assert_close(found, -scale * outlier_scores.detach().to(found), rtol=tolerance, atol=tolerance)


def test_scores_of_logits(case):
    train, test, _ = case
    agree(MSP(K), public.MaxSoftmax.score(test.logits), test)
    agree(MaxLogit(K), public.MaxLogit.score(test.logits), test)
    agree(Energy(K), public.EnergyBased.score(test.logits), test)
    agree(Energy(K, 3.0), public.EnergyBased.score(test.logits, t=3.0), test)
    agree(ODIN(K, 10.0, 0.0), public.MaxSoftmax.score(test.logits, t=10.0), test)
    # pytorch-ood takes the mean, clamps probabilities at 1e-7 and subtracts in the logits' precision.
    moderate = Outputs(3 * test.logits.double() / test.logits.abs().amax(), test.features)
    agree(GEN(K), public.GEN.score(moderate.logits), moderate, scale=K)
    agree(GEN(K, 0.4, top=3), public.GEN.score(moderate.logits, gamma=0.4, M=3), moderate, scale=3)
    klm = public.KLMatching(None).fit_logits(train.logits.double())
    agree(KLM(K).fit(train), klm.predict_logits(test.logits.double()), test)


@pytest.fixture
def in_float64(monkeypatch):
    """pytorch-ood solves linear systems in float32, whose rounding is above the tolerance here."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_knn(case):
    train, test, _ = case
    for k in (1, 5, 50):
        knn = public.KNN(None, k=k).fit_features(train.features, train.labels)
        agree(KNN(K, k).fit(train), knn.predict_features(test.features), test)


def test_mahalanobis(case, in_float64):
    train, test, _ = case
    live = train.features.std(0) > 0  # the public one inverts: without dead units, and without its ridge of 1e-6
    train, test = (Outputs(o.logits, o.features[:, live], o.labels) for o in (train, test))
    found = public.Mahalanobis(None).fit_features(train.features.double(), train.labels)
    found.precision = (found.cov - 1e-6 * torch.eye(len(found.cov))).inverse()
    # It has the scatter in place of the covariance, and half the distance.
    agree(Mahalanobis(K).fit(train), found.predict_features(test.features.double()), test, 2 * len(train.features))


@pytest.mark.parametrize("dim", [1, 6, 11])
def test_vim(case, dim, in_float64):
    train, test, head = case
    vim = public.ViM(None, dim, head.weight, head.bias).fit_features(train.features, train.labels)
    agree(ViM(K, dim).fit(train), vim.predict_features(test.features), test)


@pytest.mark.parametrize("inner", [(Energy, public.EnergyBased), (MSP, public.MaxSoftmax)])
def test_shaped_scores(case, inner):
    train, test, head = case
    ours, theirs = inner[0](K), inner[1].score
    maps = test.features[:, :, None, None]

    def forward(maps):
        return head(maps.flatten(1))

    for percentile in (0.5, 0.65, 0.8):
        ash = public.ASH(None, forward, "ash-s", percentile, theirs)
        agree(ASH(ours, percentile), ash.predict_feature_maps(maps), test)
        scale = public.SCALE(None, forward, percentile, theirs)
        agree(SCALE(ours, percentile), scale.predict_feature_maps(maps), test)
        react = public.ReAct(None, forward, percentile=percentile, detector=theirs)
        react.fit_feature_maps(train.features[:, :, None, None], train.labels)
        agree(ReAct(ours, percentile).fit(train), react.predict_feature_maps(maps), test)
    for p in (0.1, 0.5, 0.7, 0.9):
        dice = public.DICE(None, head.weight, head.bias, p, theirs).fit_features(train.features, train.labels)
        agree(DICE(ours, p).fit(train), dice.predict_features(test.features), test)


def test_gradnorm(case):
    _, test, head = case
    gradnorm = public.GradNorm(head, lambda name: name == "weight", temperature=2.0).to("cpu")
    agree(GradNorm(K, 2.0), gradnorm.predict(test.features), test)


def test_metrics():
    torch.manual_seed(0)
    for scale in (1, 30):  # many ties, few
        id_scores, ood_scores = (scale * torch.randn(n) for n in (61, 37))
        id_scores, ood_scores = id_scores.round() + 1, ood_scores.round()
        correct = torch.rand(61) < 0.7
        scores = torch.cat([-id_scores, -ood_scores])
        labels = torch.cat([torch.zeros(61), -torch.ones(37)]).long()
        predictions = torch.cat([(~correct).long(), torch.zeros(37).long()])
        found = open_set_classification_rate(id_scores, correct, ood_scores)
        assert found == pytest.approx(functional.oscr_score(scores, predictions, labels), abs=1e-9)
        metrics = ood_metrics(id_scores, ood_scores)
        assert metrics["auroc"] == pytest.approx(functional.auroc(scores, labels).item(), abs=1e-6)
        # Its true positives are OOD, ours ID.
        fpr95 = functional.fpr_at_tpr(-scores, -1 - labels, 0.95).item()
        assert metrics["fpr95"] == pytest.approx(fpr95, abs=1e-6)
