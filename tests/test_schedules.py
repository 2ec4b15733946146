import dataclasses

import pytest
import torch

import sparse_moon as sm
from sparse_moon.app.build import learning_rate
from sparse_moon.app.config import TrainConfig
from sparse_moon.schedules import Constant, Cosine, Cubic, Linear, Step


def test_values():
    assert Constant(0.3)(7) == 0.3
    assert [Linear(1.0, 3.0, 4)(t) for t in (-1, 0, 1, 4, 9)] == [1.0, 1.0, 1.5, 3.0, 3.0]
    # RigL: a/2 (1 + cos(pi t / T))
    assert [Cosine(0.3, 0.0, 100)(t) for t in (0, 50, 100, 150)] == pytest.approx([0.3, 0.15, 0.0, 0.0])
    assert Cosine(0.12, 0.008, 10)(5) == pytest.approx(0.064)
    # Zhu & Gupta: s_f + (s_i - s_f)(1 - t / n)^3
    assert [Cubic(1.0, 0.2, 4)(t) for t in (-1, 0, 1, 2, 4, 9)] == pytest.approx([1.0, 1.0, 0.5375, 0.3, 0.2, 0.2])
    assert Cubic(1.0, 0.2, 4)(4) == 0.2


def test_frozen_and_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Linear(0.0, 1.0, 2).steps = 3
    with pytest.raises(ValueError, match="steps must be at least 1"):
        Cosine(0.3, 0.0, 0)


def test_steps_are_those_of_torch():
    schedule = Step(0.4, (3, 5, 9), gamma=0.5)
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=0.4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5, 9], 0.5)
    expected = []
    for _ in range(12):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert [schedule(t) for t in range(12)] == pytest.approx(expected)
    assert schedule(-3) == 0.4 and Step(0.4, ())(10**9) == 0.4


def test_warm_up_reaches_the_start_and_is_never_zero():
    schedule = Step(0.4, [4, 6], warmup=4)
    assert [schedule(t) for t in range(-1, 8)] == pytest.approx([0.1, 0.1, 0.2, 0.3, 0.4, 0.04, 0.04, 0.004, 0.004])
    assert schedule == Step(0.4, (4, 6), warmup=4) and hash(schedule) == hash(Step(0.4, (4, 6), warmup=4))
    assert Step(0.4, (), warmup=2)(0) == 0.2


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Constant(NAN), "Constant: value must be finite, got nan"),
        (lambda: Linear(0.0, INF, 3), "Linear: end must be finite, got inf"),
        (lambda: Linear(0.0, 1.0, -2), "Linear: steps must be at least 1, got -2"),
        (lambda: Cubic(NAN, 1.0, 3), "Cubic: start must be finite"),
        (lambda: Cosine(0.3, 0.0, NAN), "Cosine: steps must be finite"),
        (lambda: Step(0.1, (5, 5)), r"milestones must ascend from at least 1, got \(5, 5\)"),
        (lambda: Step(0.1, (5, 3)), "milestones must ascend"),
        (lambda: Step(0.1, (0, 3)), "milestones must ascend"),
        (lambda: Step(0.1, (NAN,)), "milestones must ascend"),
        (lambda: Step(0.1, (3,), gamma=0.0), "gamma must be positive, got 0.0"),
        (lambda: Step(NAN, (3,)), "start must be finite"),
        (lambda: Step(0.1, (3,), warmup=4), r"warmup must be in \[0, 3\], up to the first milestone, got 4"),
        (lambda: Step(0.1, (3,), warmup=-1), "warmup must be in"),
    ],
)
def test_impossible_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_public_names_are_not_those_of_layers_functions_and_optimizers():
    """Who writes ``sm.Linear`` beside ``sm.SparseLinear`` means a layer."""
    F = torch.nn.functional
    taken = {name for module in (torch.nn, F, torch.optim, torch.optim.lr_scheduler) for name in dir(module)}
    assert not taken & set(sm.__all__)
    assert not hasattr(sm, "Linear") and not hasattr(sm, "Step")
    assert sm.Cosine is sm.schedules.Cosine and sm.schedules.Linear is Linear


def test_end_of_steps():
    assert Step(0.4, (3, 5), gamma=0.5).end == 0.1
    assert Step(0.4, (), warmup=3).end == Step(0.4, ()).end == 0.4


@pytest.mark.parametrize("milestones", [(0.5, 0.75, 0.9), [0.5, 0.75, 0.9]])
def test_steps_of_a_run(milestones):
    config = TrainConfig(lr=0.1, lr_milestones=milestones, lr_warmup=0.05)
    assert learning_rate(config, 1000) == Step(0.1, (500, 750, 900), 0.1, 50)
    # steps of a training that is shorter than they are many come one after another, some after its end
    assert learning_rate(config, 2) == Step(0.1, (1, 2, 3))
    assert learning_rate(config, 3) == Step(0.1, (2, 3, 4))
    assert learning_rate(TrainConfig(lr=0.3), 1000) == Cosine(0.3, 0.02, 800)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_milestones": (0.5, 0.5)}, r"lr_milestones must ascend in \(0, 1\), got \[0.5, 0.5\]"),
        ({"lr_milestones": (0.0, 0.5)}, "lr_milestones must ascend"),
        ({"lr_milestones": (0.5, 1.0)}, "lr_milestones must ascend"),
        ({"lr_milestones": (NAN,)}, "lr_milestones must ascend"),
        ({"lr_milestones": ("x",)}, "lr_milestones must be a list of numbers, got"),
        ({"lr_milestones": (0.5,), "lr_warmup": 0.6}, "lr_warmup must be at most 0.5, the first milestone, got 0.6"),
        ({"lr_milestones": (0.5,), "lr_end": 0.1}, "lr_end is for the cosine: with lr_milestones lr_gamma says it"),
        ({"lr_warmup": 0.1}, "lr_warmup is for lr_milestones, the cosine has none, got 0.1"),
        ({"lr_gamma": 0.5}, "lr_gamma is for lr_milestones, the cosine has no steps, got 0.5"),
        ({"lr_milestones": (0.5,), "lr_until": 0.3}, "lr_until is for the cosine: lr_milestones say when steps end"),
        ({"lr_milestones": (0.5,), "lr_gamma": 0.0}, "lr_gamma must be positive, got 0.0"),
    ],
)
def test_impossible_steps_of_a_run_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)
