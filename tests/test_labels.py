"""Labels outside [0, K), and labels of another dtype or shape, are errors in every loss."""

import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sparse_moon as sm
from sparse_moon import ops
from sparse_moon.ood import calibration, metrics
from sparse_moon.ops.labels import known_labels, known_probabilities
from sparse_moon.ops.unknown_aware_loss import loss_and_gradient_reference

K, B = 4, 3
HEAD = nn.Linear(5, K)
LOSSES = {
    "unknown_aware": lambda y: sm.UnknownAwareLoss(K, 10)(torch.randn(B, K + 1, requires_grad=True), y),
    "unknown_aware_op": lambda y: ops.unknown_aware_loss(torch.randn(B, K + 1), y, torch.tensor(1.0))[0],
    "unknown_aware_op_float64": lambda y: ops.unknown_aware_loss(torch.randn(B, K + 1).double(), y, torch.tensor(1.0)),
    "abstaining": lambda y: sm.AbstainingLoss(K, 10)(torch.randn(B, K + 1), y),
    "logit_norm": lambda y: sm.LogitNormLoss()(torch.randn(B, K), y),
    "virtual_outlier": lambda y: sm.VirtualOutlierLoss(K, 5, 10)(torch.randn(B, K), y, torch.randn(B, 5), HEAD),
    "mixup": lambda y: sm.mixup(torch.randn(B, 2), y, K, 1.0),
}


@pytest.mark.parametrize("bad", [-100, -1, K, K + 1, 2**40])
@pytest.mark.parametrize("loss", LOSSES)
def test_labels_outside_the_classes_are_refused(loss, bad):
    LOSSES[loss](torch.tensor([0, 1, K - 1]))
    with pytest.raises(ValueError, match=rf"target must be in \[0, {K}\), got {bad} in row 1"):
        LOSSES[loss](torch.tensor([0, bad, K]))


@pytest.mark.parametrize(
    "labels", [torch.zeros(B), torch.zeros(B, 1, dtype=torch.int64), torch.zeros(B - 1, dtype=torch.int64),
               torch.zeros(B, dtype=torch.int32), torch.zeros(B, dtype=torch.bool), torch.tensor(0),
               torch.zeros(B, K + 1, dtype=torch.int64)],
    ids=lambda y: f"{y.dtype} {tuple(y.shape)}",
)  # fmt: skip
@pytest.mark.parametrize("loss", LOSSES)
def test_labels_of_other_dtypes_and_shapes_are_refused(loss, labels):
    with pytest.raises(ValueError, match=r"target must be int64 \(3,\), got torch\."):
        LOSSES[loss](labels)


@pytest.mark.parametrize("loss", LOSSES)
def test_labels_elsewhere_are_refused(loss):
    with pytest.raises(ValueError, match="target must be on cpu, got one on meta"):
        LOSSES[loss](torch.zeros(B, dtype=torch.int64, device="meta"))


def test_logits_elsewhere_than_the_loss_are_refused():
    for loss in (sm.UnknownAwareLoss(K, 10), sm.AbstainingLoss(K, 10)):
        with pytest.raises(ValueError, match=r"is on cpu, logits on meta"):
            loss(torch.randn(B, K + 1, device="meta"), torch.zeros(B, dtype=torch.int64, device="meta"))
    z, y = torch.randn(B, K + 1), torch.zeros(B, dtype=torch.int64)
    with pytest.raises(ValueError, match="w must be on cpu, got one on meta"):
        ops.unknown_aware_loss(z, y, torch.ones((), device="meta"))
    with pytest.raises(ValueError, match="requires_grad=True"):  # there would be none
        ops.unknown_aware_loss(z, y, torch.ones((), requires_grad=True))


def test_metrics_refuse_unknown_as_a_label():
    logits, labels = torch.randn(B, K + 1), torch.tensor([0, 1, K])
    for metric in (metrics.classification_metrics, calibration.classwise_calibration_error):
        with pytest.raises(ValueError, match=r"labels must be in \[0, 4\)"):
            metric(logits, labels, K)


def test_soft_targets_of_mixup_still_go_into_logit_norm():
    logits, labels = torch.randn(B, K), torch.tensor([0, 1, 2])
    hard = torch.nn.functional.one_hot(labels, K).float()
    loss = sm.LogitNormLoss(0.5)
    torch.testing.assert_close(loss(logits, hard), loss(logits, labels))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([-1.0] * K, "a lowest of -1 and a sum of -4"),
        ([5.0] * K, "a lowest of 5 and a sum of 20"),
        ([1.5, -0.5, 0, 0], "a lowest of -0.5 and a sum of 1"),
        ([0.5, 0.25, 0, 0], "a lowest of 0 and a sum of 0.75"),
        ([float("nan"), 1, 0, 0], "a lowest of nan and a sum of nan"),
    ],
)
def test_soft_targets_that_are_no_probabilities_are_refused(row, said):
    target = torch.tensor([[0.5, 0.5, 0, 0], row, [0, 0, 0, 2]])
    match = rf"target must be probabilities, at least 0 and of sum 1, got {said} in row 1"
    loss = sm.LogitNormLoss()
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        with pytest.raises(ValueError, match=match):
            call(torch.randn(3, K), target)
        call(torch.randn(1, K), target[:1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_may_be_rounded(dtype):
    for size in (2, 10, 1000, 20_000):
        assert known_probabilities((3 * torch.randn(50, size)).softmax(1).to(dtype)).all()
    _, mixed = sm.mixup(torch.randn(6, 2, dtype=dtype), torch.randint(0, K, (6,)), K, 1.0)
    assert known_probabilities(mixed).all()


class OnDevice(torch.autograd.Function):
    """The operator's reference path, which is what a GPU without Triton takes."""

    @staticmethod
    def forward(ctx, logits, target, w):
        loss, ctx.grad, statistics = loss_and_gradient_reference(logits, target, w)
        ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    def backward(ctx, grad_loss, _):
        return ctx.grad * grad_loss, None, None


@pytest.fixture
def device_that_cannot_raise(monkeypatch):
    """As on a GPU, where raising would wait for the device."""

    def known(target, num_classes):
        return (target >= 0) & (target < num_classes)

    def loss(logits, target, w):
        value, statistics = OnDevice.apply(logits, target, w)
        return value, ops.LossStatistics(*statistics.unbind())

    monkeypatch.setattr(sys.modules["sparse_moon.losses.logit_norm"], "known_probabilities", lambda p: (p >= 0).all(1))
    for name in ("abstention", "logit_norm", "mixing"):
        monkeypatch.setattr(sys.modules[f"sparse_moon.losses.{name}"], "known_labels", known)
    monkeypatch.setattr(sys.modules["sparse_moon.ops.unknown_aware_loss"], "known_labels_reference", known)
    monkeypatch.setattr(ops, "unknown_aware_loss", loss)


@pytest.mark.parametrize("bad", [-1, K, 2**40])
@pytest.mark.parametrize("kind", [sm.UnknownAwareLoss, sm.AbstainingLoss])
def test_a_device_that_cannot_raise_says_so_at_the_next_look(kind, bad, device_that_cannot_raise):
    loss = kind(K, 10)
    good = {name: tensor.clone() for name, tensor in loss.state_dict().items()}
    logits = torch.randn(B, K + 1, requires_grad=True)
    value = loss(logits, torch.tensor([0, bad, 1]))
    value.backward()
    assert value.isnan() and logits.grad[1].isnan().all() and logits.grad[[0, 2]].isfinite().all()
    loss(logits, torch.tensor([0, 1, 1]))  # a good batch does not hide it
    for look in (lambda: loss.mean_u, lambda: loss.errors, loss.state_dict, loss.end_epoch):
        with pytest.raises(ValueError, match=r"a batch of this epoch has a label outside \[0, 4\)"):
            look()
    loss.load_state_dict(good)
    loss(logits, torch.tensor([0, 1, 1]))
    loss.end_epoch()
    assert loss.epoch == 1


def test_stateless_losses_on_a_device_that_cannot_raise_are_nan(device_that_cannot_raise):
    logits, bad = torch.randn(B, K, requires_grad=True), torch.tensor([0, K, 1])
    value = sm.LogitNormLoss()(logits, bad)
    value.backward()
    assert value.isnan() and logits.grad[1].isnan().all() and logits.grad[[0, 2]].isfinite().all()
    _, mixed = sm.mixup(torch.randn(B, 2), bad, K, 1.0)
    assert mixed.isnan().any(1).any() and sm.LogitNormLoss()(logits, mixed).isnan()
    assert sm.LogitNormLoss()(logits, -torch.ones(B, K)).isnan()
    with pytest.raises(ValueError, match=r"target must be in \[0, 4\)"):  # it waits for the device anyway
        sm.VirtualOutlierLoss(K, 5, 10)(logits, bad, torch.randn(B, 5), HEAD)


@pytest.mark.parametrize("kind", [sm.UnknownAwareLoss, sm.AbstainingLoss, sm.LogitNormLoss])
def test_compiled_losses_have_one_graph_and_refuse_labels(kind):
    outputs = K if kind is sm.LogitNormLoss else K + 1
    make = kind if kind is sm.LogitNormLoss else lambda: kind(K, 10, warmup_epochs=1)
    plain, compiled = make(), torch.compile(make(), fullgraph=True, backend="aot_eager")
    logits, labels = torch.randn(B, outputs, requires_grad=True), torch.tensor([0, 1, 2])
    torch.testing.assert_close(compiled(logits, labels), plain(logits, labels))
    with pytest.raises(ValueError, match=r"target must be in \[0, 4\), got 4 in row 2"):
        compiled(logits, torch.tensor([0, 1, K]))


def test_fake_tensors():
    with FakeTensorMode():
        labels = torch.zeros(B, dtype=torch.int64)
        assert sm.UnknownAwareLoss(K, 10)(torch.randn(B, K + 1), labels).shape == ()
        assert sm.AbstainingLoss(K, 10)(torch.randn(B, K + 1), labels).shape == ()
        assert sm.LogitNormLoss()(torch.randn(B, K), labels).shape == ()
        assert sm.LogitNormLoss()(torch.randn(B, K), torch.rand(B, K)).shape == ()
        assert sm.mixup(torch.randn(B, 2), labels, K, 1.0)[1].shape == (B, K)


def test_opcheck():
    torch.library.opcheck(torch.ops.sparse_moon.known_labels.default, (torch.tensor([0, 3]), K))
    assert known_labels(torch.tensor([0, 3]), K).tolist() == [True, True]
    torch.library.opcheck(torch.ops.sparse_moon.known_probabilities.default, (torch.tensor([[0.5, 0.5], [1, 0]]),))


def test_mixup_refuses_images_that_cannot_be_mixed():
    with pytest.raises(ValueError, match="images must be floating point"):
        sm.mixup(torch.zeros(B, 2, dtype=torch.uint8), torch.zeros(B, dtype=torch.int64), K, 1.0)


@pytest.mark.parametrize("kind", [sm.UnknownAwareLoss, sm.AbstainingLoss])
def test_empty_batches_are_refused(kind):
    with pytest.raises(ValueError, match=r"got shape \(0, 5\)"):
        kind(K, 10)(torch.randn(0, K + 1), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0])
def test_numbers_that_would_make_every_loss_nan_are_refused(number):
    for make in (
        lambda: sm.UnknownAwareLoss(K, 10, final_weight=number),
        lambda: sm.AbstainingLoss(K, 10, ratio=number),
        lambda: sm.LogitNormLoss(number),
        lambda: sm.VirtualOutlierLoss(K, 5, 10, weight=number),
        lambda: sm.mixup(torch.zeros(B, 2), torch.zeros(B, dtype=torch.int64), K, number),
    ):
        with pytest.raises(ValueError, match=str(number)):
            make()
