"""Averages of models whose topology moves, made by other code: refused, and nothing else is."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparse_moon as sm
from small_mlp import mlp, train

# --- averages by others


def averages(model):
    yield AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    yield AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    yield AveragedModel(model)


@pytest.mark.parametrize("number", range(3))
def test_averages_of_a_moving_topology_are_refused(number):
    model = mlp()
    average = list(averages(model))[number]
    for _ in range(3):
        train(model)
        average.update_parameters(model)
    with pytest.raises(RuntimeError, match=r"sm\.EMA"):
        average(torch.randn(3, 64))


def lerp(average, model):
    with torch.no_grad():
        for old, new in zip(average.parameters(), model.parameters(), strict=True):
            old.lerp_(new, 0.1)


def by_data(average, model):
    for old, new in zip(average.parameters(), model.parameters(), strict=True):
        old.data.mul_(0.9).add_(new.data, alpha=0.1)


def foreach(average, model):
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 0.1)


def fresh(average, model):
    for old, new in zip(average.parameters(), model.parameters(), strict=True):
        old.data = 0.9 * old.data + 0.1 * new.data


def attacked(average, model):
    """Also one that a backward pass has reached."""
    average(torch.randn(3, 64, requires_grad=True)).sum().backward()
    lerp(average, model)


def built_apart(model):
    average = mlp()
    average.load_state_dict(model.state_dict())
    return average


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("decay", [lerp, by_data, foreach, fresh, attacked])
@pytest.mark.parametrize("make", [copy.deepcopy, built_apart, pickled])
@pytest.mark.parametrize("swapped", [False, True])
def test_averages_by_hand_are_refused(decay, make, swapped):
    model = mlp()
    average = make(model)
    if swapped and make is copy.deepcopy:
        model, average = average, model
    for _ in range(3):
        train(model)
        decay(average, model)
        average.zero_grad()
        with pytest.raises(RuntimeError, match=r"sm\.EMA"):
            average(torch.randn(3, 64))
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"sm\.EMA"):
            average.eval()(torch.randn(3, 64))
        if decay is attacked:
            break


def snapshot(steps=9):
    model = mlp()
    copied = copy.deepcopy(model)
    train(model, steps)
    return copied, model


def quantized():
    copied, _ = snapshot()
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.copy_((parameter * 64).round() / 64)
    return copied


def scaled():
    copied, _ = snapshot()
    for parameter in copied.parameters():
        parameter.data.mul_(0.5)
    return copied


def initialised():
    copied, _ = snapshot()
    for parameter in copied.parameters():
        parameter.data.normal_(0, 0.1)
    return copied


def tuned(by_hand=False):
    """Trained on what the model is trained on."""
    copied, _ = snapshot()
    optimizer = torch.optim.SGD(copied.parameters(), 0.05)
    for _ in range(30):
        loss = copied(torch.randn(16, 64)).square().mean()
        if by_hand:
            for parameter, grad in zip(
                copied.parameters(), torch.autograd.grad(loss, list(copied.parameters())), strict=True
            ):
                parameter.data -= 0.05 * grad
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return copied


def averaged():
    """sm.EMA and sm.WeightAverage."""
    copied, model = snapshot()
    ema = sm.EMA(model)
    for _ in range(3):
        train(model, 3)
        ema.update(model)
    ema.copy_to(copied)
    return copied


def siblings():
    base = mlp()
    one, other = copy.deepcopy(base), copy.deepcopy(base)
    average = AveragedModel(one, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(3):
        train(one, method=sm.SET, stop=0.0)
        average.update_parameters(one)
    train(other)
    return average


@pytest.mark.parametrize("make", [
    lambda: snapshot()[0], lambda: snapshot()[0].bfloat16().float(), quantized, scaled, initialised, tuned,
    lambda: tuned(by_hand=True), averaged, siblings,
])  # fmt: skip
def test_other_changes_of_copies_are_no_averages(make):
    for seed in range(5):
        torch.manual_seed(seed)
        make()(torch.randn(3, 64))


def test_copies_of_images_networks_that_are_trained_apart_are_no_averages():
    """Neighbouring taps of two networks that learn the same are alike; slots of different places are not."""
    images, labels = torch.randn(256, 3, 12, 12), torch.arange(256) % 4
    images += torch.nn.functional.interpolate(torch.randn(4, 3, 4, 4), size=12, mode="bilinear")[labels] * 2
    base = sm.sparsify(
        nn.Sequential(nn.Conv2d(3, 32, 5), nn.ReLU(), nn.Conv2d(32, 32, 5), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)),
        0.5, "uniform", first_dense=False,
    )  # fmt: skip
    one, other = copy.deepcopy(base), copy.deepcopy(base)
    for model, kind in ((one, sm.SET), (other, sm.Static)):
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        method = kind(model, optimizer, **({"total_steps": 100, "interval": 8} if kind is sm.SET else {}))
        for step in range(40):
            part = slice(32 * (step % 8), 32 * (step % 8) + 32)
            nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
            method.step()
            optimizer.zero_grad()
        if kind is sm.SET:
            other(images[:2])  # what has moved is known
    other(images[:2])


def test_frozen_models_can_be_copied():
    model = mlp()
    model[0].requires_grad_(False)
    again = copy.deepcopy(copy.deepcopy(model).requires_grad_(False))
    x = torch.randn(3, 64)
    assert torch.equal(again(x), model(x)) and torch.equal(AveragedModel(model)(x), model(x))


def test_averages_of_a_topology_that_stays_are_right():
    model = mlp()
    for average in list(averages(model))[1:]:  # the first one averages integers, and finds other ones
        train(model, method=sm.RigL, stop=0.0)
        average.update_parameters(model)
        average.update_parameters(model)
        x = torch.randn(3, 64)
        torch.testing.assert_close(average(x), model(x))


def test_copies_go_their_own_ways():
    """A snapshot of a model that moves on, and a copy that is trained by itself, are no foreign averages."""
    model, x = mlp(), torch.randn(3, 64)
    snapshot, before = copy.deepcopy(model), model(x)
    student = copy.deepcopy(model)
    for _ in range(3):
        train(model, steps=9)
        assert torch.equal(snapshot(x), before)
        train(student, method=sm.SET, stop=0.0)
        student(x)
    finetuned = copy.deepcopy(snapshot)
    optimizer = torch.optim.SGD(finetuned.parameters(), 0.1)
    for _ in range(3):
        finetuned(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(finetuned(x), before)
    snapshot.load_state_dict(model.state_dict())
    assert torch.equal(snapshot(x), model(x))
    again = copy.deepcopy(copy.deepcopy(snapshot))
    assert torch.equal(again(x), model(x))
