import pytest
import torch
import torch.nn.functional as F

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


def test_errors():
    loss = sm.UnknownAwareLoss(3, 8)
    with pytest.raises(
        ValueError, match=r"over 3 classes needs logits \(B, 4\), the last for 'unknown', got shape \(6, 3\)"
    ):
        loss(torch.randn(6, 3), torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match="warmup_epochs < epochs"):
        sm.UnknownAwareLoss(3, 5, warmup_epochs=5)
    with pytest.raises(ValueError, match="final_weight >= 0"):
        sm.UnknownAwareLoss(3, 8, final_weight=-1.0)
