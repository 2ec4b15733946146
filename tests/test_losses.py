import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparse_moon as sm


def run(loss, batches, epochs):
    """w of every epoch, while the loss sees the batches of each."""
    weights = []
    for _ in range(epochs):
        weights.append(loss.w.item())
        for logits, target in batches:
            loss(logits, target)
        loss.end_epoch()
    return weights


def make_batches(count=3):
    return [(torch.randn(6, 4), torch.randint(0, 3, (6,))) for _ in range(count)]


def test_weight_follows_algorithm_1():
    epochs, warmup, final = 10, 3, 2.0
    loss = sm.UnknownAwareLoss(3, epochs, final_weight=final, warmup_epochs=warmup, ratio=64.0, smoothing=0.05)
    batches = make_batches()
    average = None
    for _ in range(warmup):
        for logits, target in batches:
            p = logits.double().softmax(1)
            beta = ((1 - p[:, 3]) * F.cross_entropy(logits.double(), target, reduction="none")).mean().item()
            average = beta if average is None else 0.95 * average + 0.05 * beta
    initial = average / 64
    expected = [0.0] * warmup + [initial + (t - warmup) * (final - initial) / 7 for t in range(warmup + 1, epochs + 1)]
    assert run(loss, batches, epochs) == pytest.approx(expected)
    assert expected[-1] == pytest.approx(final)


def test_no_warm_up_starts_from_zero():
    loss = sm.UnknownAwareLoss(3, 4, final_weight=1.0, warmup_epochs=0)
    assert run(loss, make_batches(), 4) == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize("kind", [sm.UnknownAwareLoss, sm.AbstainingLoss])
def test_without_tuning_the_weight_is_the_last_from_the_first_epoch_on(kind):
    assert run(kind(3, 4, final_weight=2.0, warmup_epochs=2, auto_tune=False), make_batches(), 4) == [2.0] * 4


@pytest.mark.parametrize("kind", [sm.UnknownAwareLoss, sm.AbstainingLoss])
@pytest.mark.parametrize("epochs, warmup", [(1, 0), (2, 1), (4, 1), (5, 1), (10, 2), (20, 5), (200, 5)])
def test_the_default_warm_up_fits_every_length(kind, epochs, warmup):
    assert kind(3, epochs).warmup_epochs == warmup


def test_the_weight_stays_at_its_end_if_training_goes_on():
    loss = sm.UnknownAwareLoss(3, 4, final_weight=2.0, warmup_epochs=1)
    assert run(loss, make_batches(), 7)[3:] == [2.0] * 4


def test_the_loss_uses_the_present_weight():
    loss = sm.UnknownAwareLoss(3, 2, final_weight=3.0, warmup_epochs=1)
    logits, target = torch.randn(6, 4), torch.randint(0, 3, (6,))
    torch.testing.assert_close(loss(logits, target), F.cross_entropy(logits, target))
    loss.end_epoch()
    torch.testing.assert_close(loss(logits, target), sm.ops.unknown_aware_loss(logits, target, torch.tensor(3.0))[0])


def test_evaluation_mode_leaves_the_state_alone():
    loss = sm.UnknownAwareLoss(3, 8).eval()
    before = {k: v.clone() for k, v in loss.state_dict().items()}
    loss(torch.randn(6, 4), torch.randint(0, 3, (6,)))
    assert all(torch.equal(v, before[k]) for k, v in loss.state_dict().items()) and loss.totals[0] == 0


@pytest.mark.parametrize("kind", [sm.UnknownAwareLoss, sm.AbstainingLoss, sm.GamblersLoss, sm.VirtualOutlierLoss])
def test_a_validation_leaves_the_state_alone(kind):
    """The model in evaluation mode, the loss forgotten, as loops of training have it."""
    virtual = kind is sm.VirtualOutlierLoss
    loss = kind(3, 5, 10) if virtual else kind(3, 10, warmup_epochs=2)
    head = nn.Linear(5, 3)

    def batch():
        logits, target = torch.randn(6, 3 if virtual else 4), torch.randint(0, 3, (6,))
        return loss(logits, target, torch.randn(6, 5), head) if virtual else loss(logits, target)

    batch()
    before = {name: tensor.clone() for name, tensor in loss.state_dict().items()}
    with torch.no_grad():
        batch()
    assert all(torch.equal(tensor, before[name]) for name, tensor in loss.state_dict().items())
    batch()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in loss.state_dict().items())


def test_running_statistics_of_an_epoch():
    loss = sm.UnknownAwareLoss(3, 8)
    batches = [(torch.randn(n, 4), torch.randint(0, 3, (n,))) for n in (6, 2)]
    for batch in batches:
        loss(*batch)
    logits, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
    torch.testing.assert_close(loss.mean_u, logits.softmax(1)[:, 3].mean())
    torch.testing.assert_close(loss.errors, (logits.argmax(1) != target).float().mean())
    loss.end_epoch()
    assert loss.totals.tolist() == [0, 0, 0]


def test_a_resumed_run_has_the_same_weights():
    batches = make_batches()
    whole = sm.UnknownAwareLoss(3, 8, warmup_epochs=3)
    expected = run(whole, batches, 8)
    first = sm.UnknownAwareLoss(3, 8, warmup_epochs=3)
    head = run(first, batches, 2)
    second = sm.UnknownAwareLoss(3, 8, warmup_epochs=3)
    second.load_state_dict(first.state_dict())
    assert head + run(second, batches, 6) == expected


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("kind", [sm.UnknownAwareLoss, sm.AbstainingLoss, sm.GamblersLoss])
def test_a_batch_that_overflows_is_not_counted(kind, bad):
    """A gradient scaler skips its step, and training goes on."""
    losses = kind(3, 4, warmup_epochs=2), kind(3, 4, warmup_epochs=2)
    batches, overflow = make_batches(), (torch.randn(6, 4), torch.tensor([1, 0, 2, 0, 1, 2]))
    overflow[0][1, 0] = bad
    clean, dirty = losses
    for _ in range(4):  # two epochs of the warm-up, and two after it
        for batch in batches:
            assert not dirty(*overflow).isfinite()
            assert torch.equal(dirty(*batch), clean(*batch))
        assert torch.equal(dirty.mean_u, clean.mean_u) and torch.equal(dirty.errors, clean.errors)
        for loss in losses:
            loss.end_epoch()
        assert all(map(torch.equal, dirty.state_dict().values(), clean.state_dict().values()))


def test_errors():
    loss = sm.UnknownAwareLoss(3, 8)
    with pytest.raises(
        ValueError,
        match=r"Loss over 3 classes needs logits \(B, 4\), the last for 'unknown', got shape \(6, 3\)",
    ):
        loss(torch.randn(6, 3), torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match="warmup_epochs < epochs"):
        sm.UnknownAwareLoss(3, 5, warmup_epochs=5)
    with pytest.raises(ValueError, match="final_weight >= 0"):
        sm.UnknownAwareLoss(3, 8, final_weight=-1.0)


def test_abstaining_loss_by_hand():
    loss = sm.AbstainingLoss(2, 4, final_weight=0.5, warmup_epochs=1, smoothing=0.25)
    # probabilities (0.5, 0.25, 0.25): u = 0.25, over the two classes (2/3, 1/3)
    logits, target = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]).log().double(), torch.tensor([1, 0])
    ce = -torch.tensor([1 / 3, 0.5], dtype=torch.float64).log()
    known = torch.tensor([0.75, 0.4], dtype=torch.float64)
    torch.testing.assert_close(loss(logits, target), F.cross_entropy(logits, target))
    loss.end_epoch()
    b = (known * ce).mean().item()
    weight = b / 64 + (0.5 - b / 64) / 3
    assert loss.w.item() == pytest.approx(weight)
    expected = (known * ce - loss.w.double() * known.log()).mean()
    torch.testing.assert_close(loss(logits, target), expected)
    assert loss.mean_u.item() == pytest.approx(0.425) and loss.errors.item() == 1.0
    for _ in range(2):
        loss.end_epoch()
    assert loss.w.item() == pytest.approx(0.5)


@pytest.mark.parametrize("warmup", [0, 1])
def test_gradients_of_the_abstaining_loss(warmup):
    loss = sm.AbstainingLoss(3, 4, warmup_epochs=warmup).double()
    target = torch.randint(0, 3, (5,))
    assert torch.autograd.gradcheck(lambda z: loss(z, target), torch.randn(5, 4).double().requires_grad_())


def test_gamblers_loss_by_hand():
    loss = sm.GamblersLoss(2, 4, payoff=1.6, warmup_epochs=1)
    logits, target = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]).log().double(), torch.tensor([1, 0])
    torch.testing.assert_close(loss(logits, target), F.cross_entropy(logits, target))
    loss.end_epoch()
    bets = torch.tensor([0.25 + 0.25 / 1.6, 0.2 + 0.6 / 1.6], dtype=torch.float64)
    torch.testing.assert_close(loss(logits, target), -bets.log().mean())
    assert loss.mean_u.item() == pytest.approx(0.425) and loss.errors.item() == 1.0
    target = torch.randint(0, 2, (5,))
    assert torch.autograd.gradcheck(lambda z: loss(z, target), torch.randn(5, 3).double().requires_grad_())
    huge = torch.tensor([[-200.0, 200.0, -200.0]], requires_grad=True)  # p_y and u are 0 in float32
    loss(huge, torch.tensor([0])).backward()
    assert huge.grad.isfinite().all() and huge.grad[0, 0] < 0
    with pytest.raises(ValueError, match="payoff must be above 1"):
        sm.GamblersLoss(3, 5, payoff=1.0)


def test_gamblers_push_u_up_where_moon_cannot():
    logits, target = torch.tensor([[0.0, 4.0, -8.0]], requires_grad=True), torch.tensor([0])
    losses = sm.GamblersLoss(2, 4, warmup_epochs=0), sm.UnknownAwareLoss(2, 4, final_weight=0.01, warmup_epochs=0)
    gamblers, moon = (torch.autograd.grad(loss(logits, target), logits)[0][0, 2] for loss in losses)
    assert gamblers < 0 < moon


def test_logit_norm_by_hand():
    loss = sm.LogitNormLoss(0.5)
    z = torch.tensor([[3.0, 4.0]], dtype=torch.float64)  # of norm 5: (0.6, 0.8) / 0.5
    assert loss(z, torch.tensor([0])).item() == pytest.approx(F.softplus(torch.tensor(0.4)).item())
    torch.testing.assert_close(loss(7 * z, torch.tensor([0])), loss(z, torch.tensor([0])))
    z = torch.randn(5, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, torch.tensor([0, 1, 2, 3, 0])), z)
    with pytest.raises(ValueError, match="temperature must be positive"):
        sm.LogitNormLoss(0.0)


def test_mixup_by_hand():
    images, labels = torch.randn(6, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    torch.manual_seed(3)
    mixed, targets = sm.mixup(images, labels, 3, 0.4)
    torch.manual_seed(3)
    share = torch.distributions.Beta(torch.tensor(0.4), torch.tensor(0.4)).sample()
    partner = torch.randperm(6)
    torch.testing.assert_close(mixed, share * images + (1 - share) * images[partner])
    logits = torch.randn(6, 3)
    expected = share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, labels[partner])
    torch.testing.assert_close(F.cross_entropy(logits, targets), expected)
    with pytest.raises(ValueError, match="alpha must be positive"):
        sm.mixup(images, labels, 3, 0.0)


def test_mixup_draws_from_the_beta_distribution():
    ones = torch.stack([torch.zeros(1), torch.ones(1)])
    shares = []
    for _ in range(400):
        mixed, _ = sm.mixup(ones, torch.tensor([0, 1]), 2, 2.0)
        shares.append(mixed[0].item())
    assert 0.05 < torch.tensor(shares).var() < 0.2  # l, 0 where the partner is the sample itself


def outlier_loss(**changes):
    return sm.VirtualOutlierLoss(3, 4, 10, **{"start": 0.2, "momentum": 0.5, **changes}).double()


def test_virtual_outlier_estimates_by_hand():
    loss, g = outlier_loss(), torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 4, generator=g).double()
    y = torch.tensor([[0, 0, 1, 1, 1], [0, 2, 2, 2, 0]])
    head = torch.nn.Linear(4, 3).double()
    for features, target in zip(x, y, strict=True):
        loss(head(features), target, features, head)
    mean = {0: x[0, :2].mean(0), 1: x[0, 2:].mean(0), 2: x[1, 1:4].mean(0)}
    first = torch.stack([f - mean[int(c)] for f, c in zip(x[0], y[0], strict=True)])
    mean[0] = 0.5 * mean[0] + 0.5 * x[1, [0, 4]].mean(0)
    second = torch.stack([f - mean[int(c)] for f, c in zip(x[1], y[1], strict=True)])
    torch.testing.assert_close(loss.mean, torch.stack([mean[c] for c in range(3)]))
    torch.testing.assert_close(loss.covariance, 0.5 * first.T @ first / 5 + 0.5 * second.T @ second / 5)
    assert loss.seen.all()
    before = loss.mean.clone()
    loss.eval()(head(x[0]), y[0], x[0], head)
    assert torch.equal(loss.mean, before)


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e300])  # 1e300 squared is inf
def test_features_that_overflow_are_not_counted(bad):
    loss, head = outlier_loss(start=0.0), torch.nn.Linear(4, 3).double()
    features, target = torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    overflow = features.clone()
    overflow[1, 2] = bad
    for _ in range(2):  # before there is an estimate, and after
        before = [buffer.clone() for buffer in loss.buffers()]
        loss(head(overflow), target, overflow, head)
        assert all(map(torch.equal, loss.buffers(), before))
        assert loss(head(features), target, features, head).isfinite()


def test_virtual_outliers_are_the_least_likely_of_many():
    loss = outlier_loss(candidates=500)
    half = torch.randn(4, 4).double()
    loss.covariance.copy_(half @ half.T)
    loss.mean.copy_(torch.randn(3, 4).double())
    ridge = torch.eye(4).double() * (1e-4 * loss.covariance.diagonal().mean() + 1e-6)
    inverse = torch.linalg.inv(loss.covariance + ridge)
    ours = torch.stack([loss.outliers() - loss.mean for _ in range(200)]).flatten(0, 1)
    ours_length = ((ours @ inverse) * ours).sum(1)
    plain = torch.randn(200 * 3, 500, 4).square().sum(2).amax(1).double()  # of 500 draws each
    assert ours_length.mean() == pytest.approx(plain.mean().item(), rel=0.05)
    assert ours_length.std() == pytest.approx(plain.std().item(), rel=0.2)
    # all directions: whitened, their second moments are equal
    white = ours @ torch.linalg.cholesky(inverse)
    moments = white.T @ white / len(white)
    torch.testing.assert_close(moments / moments.diagonal().mean(), torch.eye(4).double(), rtol=0, atol=0.2)


def test_virtual_outlier_loss_by_hand(monkeypatch):
    loss, head = outlier_loss(weight=0.3), torch.nn.Linear(4, 3).double()
    features, target = torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    logits = head(features)
    torch.testing.assert_close(loss(logits, target, features, head), F.cross_entropy(logits, target))
    for _ in range(2):
        loss.end_epoch()
    outliers = torch.randn(3, 4).double()
    monkeypatch.setattr(loss, "outliers", lambda: outliers)
    with torch.no_grad():
        loss.slope.fill_(2.0), loss.bias.fill_(-0.5)
    known, unknown = 2 * logits.logsumexp(1) - 0.5, 2 * head(outliers).logsumexp(1) - 0.5
    logistic = torch.cat([F.softplus(-known), F.softplus(unknown)]).mean()
    expected = F.cross_entropy(logits, target) + 0.3 * logistic
    found = loss(logits, target, features, head)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # energies are float32
    found.backward()
    assert loss.slope.grad != 0 and loss.bias.grad != 0
    unseen = outlier_loss(start=0.0)
    few = unseen(logits[:1], target[:1], features[:1], head)  # two classes have no mean yet
    torch.testing.assert_close(few, F.cross_entropy(logits[:1], target[:1]))


def test_virtual_outlier_errors():
    loss, head = outlier_loss(), torch.nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"features \(2, 4\), got \(2, 3\) and \(2, 5\)"):
        loss(torch.randn(2, 3), torch.tensor([0, 1]), torch.randn(2, 5), head)
    with pytest.raises(ValueError, match="weight >= 0"):
        outlier_loss(weight=-1.0)
    with pytest.raises(ValueError, match="must be at least 1"):
        outlier_loss(candidates=0)
