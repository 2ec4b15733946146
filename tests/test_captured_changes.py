"""What is added or taken away between the replays of a captured step, which the host plays, see host_graph.py."""

import pytest
import torch
import torch.nn.functional as F
from host_graph import Dispatched, HostGraph
from torch import nn

import sparse_moon as sm
from small_mlp import mlp
from sparse_moon.capture import CapturedStep
from sparse_moon.capture import step as capture_step
from sparse_moon.nn.low_rank import LowRank

BATCHES, CHANGED = 14, 8


class Training:
    """All of an MLP but its last layer trains, with a hook of each kind that can be taken away."""

    def __init__(self, captured):
        torch.manual_seed(2)
        self.model = nn.Sequential(*mlp(), nn.Linear(8, 7))
        lr = torch.tensor(0.05)
        self.optimizer = torch.optim.SGD(self.model[:-1].parameters(), lr, momentum=0.9, fused=True)
        self.method = sm.Static(self.model, self.optimizer)
        self.hook = self.model[2].register_forward_hook(halved)
        self.step = CapturedStep(self.train, self.method, self.model) if captured else self.train

    def train(self, x, y):
        with Dispatched():
            loss = F.cross_entropy(self.model(x), y)
            loss.backward()
            self.method.step()
            self.model.zero_grad()
            return loss.detach()

    def run(self, change):
        generator = torch.Generator().manual_seed(1)
        found = []
        for number in range(BATCHES):
            if number == CHANGED:
                change(self)
            batch = torch.randn(8, 64, generator=generator), torch.randint(7, (8,), generator=generator)
            found.append(self.step(*batch).clone())
        return torch.stack(found)


class Half(nn.Module):
    def forward(self, values):
        return values * 0.5


def halved(module, inputs, output):
    return output * 0.5


def other_group(training):
    training.optimizer.add_param_group({"params": list(training.model[-1].parameters())})


def group_in_the_place_of_another(training):
    group = training.optimizer.param_groups.pop()
    training.optimizer.param_groups.append({**group, "weight_decay": 0.5})


def key_of_a_group(training):
    training.optimizer.param_groups[0]["name"] = "all"


def module_as_transform(training):
    training.model[0].transform = Half()


def factors(training):
    low_rank = LowRank(training.model[2].topology, 2, 2.0)
    nn.init.constant_(low_rank.B, 0.1)
    training.model[2].set_lora(low_rank)


def appended(training):
    training.model.append(nn.Tanh())


def hook(training):
    training.model[0].register_forward_hook(halved)


def no_hook(training):
    training.hook.remove()


def hook_in_the_place_of_another(training):
    training.hook.remove()
    training.model[2].register_forward_hook(lambda module, inputs, output: output * 0.25)


def no_hooks_at_once(training):
    training.model[2]._forward_hooks = type(training.model[2]._forward_hooks)()


def hook_before(training):
    training.model[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5,))


def hook_of_every_module(training):
    training.everywhere = nn.modules.module.register_module_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.9,))


def hook_of_a_parameter(training):
    training.model[0].values.register_hook(lambda grad: grad * 0.5)


def hook_of_the_optimizer(training):
    def shrink(optimizer, *_):
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].mul_(0.9)

    training.optimizer.register_step_post_hook(shrink)


def buffer(training):
    training.model[0].register_buffer("noted", None)


CHANGES = [
    other_group, group_in_the_place_of_another, key_of_a_group, module_as_transform, factors, appended, hook,
    no_hook, hook_in_the_place_of_another, no_hooks_at_once, hook_before, hook_of_every_module, hook_of_a_parameter,
    hook_of_the_optimizer, buffer,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_added_or_taken_away_is_captured_anew(change, monkeypatch):
    monkeypatch.setattr(capture_step, "StepGraph", HostGraph)
    losses = []
    for captured in (False, True):
        training = Training(captured)
        losses.append(training.run(change))
        if "everywhere" in vars(training):
            training.everywhere.remove()
    assert torch.equal(*losses)
    assert training.step.captures == 2
    assert training.step.reason is None


def test_parameters_on_several_devices_are_not_captured(monkeypatch):
    monkeypatch.setattr(capture_step, "StepGraph", HostGraph)
    model = mlp()
    method = sm.Static(model, torch.optim.SGD(model.parameters(), torch.tensor(0.05), fused=True))
    with pytest.warns(UserWarning, match=r"not captured in a CUDA graph: .* several devices \(cpu, meta\)"):
        CapturedStep(lambda: None, method, model, nn.Linear(2, 2, device="meta"))  # meta stands for another GPU


class Scaled(nn.Module):
    """A loss with a number of Python's."""

    def __init__(self, each_batch):
        super().__init__()
        self.scale, self.each_batch = 1.0, each_batch

    def forward(self, z, y):
        self.scale *= self.each_batch
        return self.scale * F.cross_entropy(z, y)


class WithLoss(Training):
    """Its loss is a module, too."""

    def __init__(self, each_batch):
        super().__init__(captured=False)
        self.loss = Scaled(each_batch)
        self.step = CapturedStep(self.train, self.method, self.model, self.loss)

    def train(self, x, y):
        loss = self.loss(self.model(x), y)
        loss.backward()
        self.method.step()
        return loss


def test_a_number_of_a_module_that_changes_between_epochs_is_captured_anew(monkeypatch):
    monkeypatch.setattr(capture_step, "StepGraph", HostGraph)
    training = WithLoss(1.0)
    losses = training.run(lambda one: setattr(one.loss, "scale", 0.0))
    assert losses[:CHANGED].all() and not losses[CHANGED:].any()
    assert training.step.captures == 2 and training.step.reason is None and training.method.steps == BATCHES


def test_a_number_of_a_module_that_changes_in_a_step_ends_captures(monkeypatch):
    monkeypatch.setattr(capture_step, "StepGraph", HostGraph)
    forgotten = []
    monkeypatch.setattr(HostGraph, "forget", lambda self: forgotten.append(self))  # of the memory of a whole step
    training = WithLoss(0.5)
    with pytest.warns(UserWarning, match=r"not captured in a CUDA graph: Scaled\.scale is another"):
        training.run(lambda one: None)
    assert training.loss.scale == 0.5**BATCHES and len(forgotten) == 1
