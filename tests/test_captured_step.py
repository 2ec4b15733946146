"""A training step as a graph: the host plays what a GPU does, see host_graph.py."""

import gc
import random
import shutil
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from host_graph import Dispatched, HostGraph, looks
from torch import nn
from torch._dynamo.utils import counters

import sparse_moon as sm
from small_mlp import mlp
from sparse_moon.capture import CapturedStep
from sparse_moon.capture import step as capture_step
from sparse_moon.capture.graph import StepGraph
from sparse_moon.capture.step import REHEARSALS

CLASSES = 7


@pytest.fixture
def on_host(monkeypatch):
    monkeypatch.setattr(capture_step, "StepGraph", HostGraph)


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def resnet(fuse=False):
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Block(8), Block(8),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, CLASSES + 1))  # fmt: skip
    return sm.sparsify(net, 0.7, "uniform", fuse=fuse)


def sgd(parameters, device="cpu"):
    lr = torch.tensor(0.05, device=device)
    return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=1e-3, nesterov=True, fused=True)


def adam(parameters, device="cpu"):
    return torch.optim.AdamW(parameters, torch.tensor(0.01, device=device), capturable=True, fused=True)


class Training:
    """RigL, MOON's loss and CigL's mask, with a schedule of the learning rate."""

    def __init__(self, model, captured, *, optimizer=sgd, method=sm.RigL, frozen=True, interval=6, device="cpu"):
        self.model, self.loss = model.to(device), sm.UnknownAwareLoss(CLASSES, 4, warmup_epochs=1).to(device)
        self.optimizer = optimizer(model.parameters(), device)
        self.mask = sm.RandomMask(model, 0.8)
        if frozen:
            sm.freeze_hidden(self.mask, self.optimizer)
        self.method = method(model, self.optimizer, total_steps=60, interval=interval, stop=0.9)
        self.calls = 0
        self.step = CapturedStep(self.train, self.method, self.model, self.loss) if captured else self.dispatched

    def dispatched(self, *batch):
        with Dispatched():
            return self.train(*batch)

    def train(self, images, labels):
        self.calls += 1
        self.mask.clear() if self.method.updates_now else self.mask.draw()
        loss, logits = self.forward(images, labels)
        loss.backward()
        self.method.step()
        self.optimizer.zero_grad()
        return loss.detach(), (logits[:, :CLASSES].argmax(1) == labels).sum()

    def forward(self, images, labels):
        logits = self.model(images)
        return self.loss(logits, labels), logits

    def run(self, batches):
        found = []
        for number, batch in enumerate(batches):
            self.optimizer.param_groups[0]["lr"].fill_(0.05 / (1 + number))
            found.append([float(t) for t in self.step(*batch)])
            if number % 20 == 19:
                self.loss.end_epoch()
        return found

    def state(self):
        optimizer = self.optimizer.state_dict()
        return {**self.model.state_dict(), **{f"loss.{k}": v for k, v in self.loss.state_dict().items()},
                **{f"{p}.{k}": v for p, s in optimizer["state"].items() for k, v in s.items()},
                "mask": self.mask.step, "steps": torch.tensor(self.method.steps)}  # fmt: skip


def batches(count, shape, size=8, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, *shape, generator=generator).to(device),
         torch.randint(CLASSES, (size,), generator=generator).to(device)) for _ in range(count)
    ]  # fmt: skip


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


MODELS = {"mlp": (lambda: mlp(), (64,)), "resnet": (resnet, (3, 6, 6)),
          "fused resnet": (lambda: resnet(True), (3, 6, 6)),
          "blocks": (lambda: mlp(0.5, pattern="block4"), (64,))}  # fmt: skip


def trained(kind, count, captured, **options):
    """A training of so many batches, its state in the end, and what its steps returned."""
    make, shape = MODELS[kind]
    torch.manual_seed(2)
    training = Training(make(), captured, **options)
    outputs = training.run(batches(count, shape, device=options.get("device", "cpu")))
    return training, {name: tensor.clone() for name, tensor in training.state().items()}, outputs


def both(kind, count, **options):
    """The captured training, after it was compared with an eager one."""
    _, expected, outputs = trained(kind, count, False, **options)
    gc.collect()  # else its layers are watched as models that the others might be averaged with
    training, state, found = trained(kind, count, True, **options)
    assert found == outputs
    same(state, expected)
    return training


@pytest.mark.parametrize("kind", MODELS)
def test_rigl_moon_and_cigl_train_to_the_same_bits(kind, on_host):
    training = both(kind, 45)
    assert training.step.captures == 1
    assert training.step.reason is None
    assert training.calls == REHEARSALS + 1 + 7  # and the updates
    assert all(layer.topology.past for layer in sm.sparse_layers(training.model).values())


@pytest.mark.parametrize("method", [sm.SET, sm.MEST, sm.RigL, sm.Static])
def test_methods_and_adam(method, on_host):
    def make(model, optimizer, **arguments):
        return method(model, optimizer, **({} if method is sm.Static else arguments))

    training = both("mlp", 20, optimizer=adam, method=make, frozen=False)
    assert training.step.captures == 1


def test_other_shapes_run_eagerly(on_host):
    training = Training(mlp(), True)
    data = batches(8, (64,)) + batches(1, (64,), size=5) + batches(4, (64,))
    training.run(data)
    assert training.step.captures == 1
    assert training.calls == REHEARSALS + 1 + 3  # updates at 6 and 12, and the smaller one
    assert training.method.steps == len(data)


def test_neither_a_step_nor_a_rehearsal_waits_for_the_device_past_the_dispatcher():
    for kind in MODELS:
        make, shape = MODELS[kind]
        training = Training(make(), False)
        for batch in batches(4, shape):
            with looks() as waits:
                training.train(*batch)
            assert not waits


def test_outputs_stay_as_they_were(on_host):
    training = Training(mlp(), True, interval=50)
    kept = [training.step(*batch)[0] for batch in batches(8, (64,))]
    values = [float(t) for t in kept]
    training.step(*batches(1, (64,))[0])
    assert [float(t) for t in kept] == values
    assert len(set(values)) == len(values)


def test_gradients_are_those_of_the_last_step(on_host):
    def train(x, y):
        F.cross_entropy(model(x), y).backward()
        method.step()

    model = mlp()
    method = sm.RigL(model, sgd(model.parameters()), total_steps=100, interval=5)
    step = CapturedStep(train, method, model)
    for x, y in batches(12, (64,)):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        updates = method.updates_now
        step(x, y)
        after = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        if updates:
            continue
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(before[name])
        with Dispatched():
            expected = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(after[name])
        torch.testing.assert_close(list(found.values()), list(expected))  # before an update they are computed apart
    assert step.captures == 1


def test_a_graph_made_before_a_replay_is_refused(on_host):
    training = Training(mlp(), True, interval=50)
    data = batches(7, (64,))
    training.run(data[:6])
    loss = training.loss(training.model(data[6][0]), data[6][1])
    training.step(*data[6])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def replaced_values(training):
    training.model[0].values.data = training.model[0].values.data.clone()


def replaced_layer(training):
    layer = training.model[0]
    training.model[0] = type(layer)(64, 48, sparsity=0.8)
    training.model[0].load_state_dict(layer.state_dict())
    training.model[0].values = layer.values
    training.model[0].bias = layer.bias


def loaded_optimizer(training):
    training.optimizer.load_state_dict(training.optimizer.state_dict())


def other_decay(training):
    training.optimizer.param_groups[0]["weight_decay"] = 0.5


def frozen_bias(training):
    training.model[2].bias.requires_grad_(False)


def evaluation(training):
    training.loss.eval()


@pytest.mark.parametrize("change", [
    replaced_values, replaced_layer, loaded_optimizer, other_decay, frozen_bias, evaluation,
])  # fmt: skip
def test_a_stale_graph_is_captured_anew(change, on_host):
    states = []
    for captured in (False, True):
        torch.manual_seed(2)
        training = Training(mlp(), captured, interval=50, frozen=False)
        data = batches(14, (64,))
        training.run(data[:6])
        change(training)
        training.run(data[6:])
        states.append({name: tensor.clone() for name, tensor in training.state().items()})
    same(*states)
    assert training.step.captures == 2
    assert training.step.reason is None


def test_a_checkpoint_that_is_loaded_is_trained_on(on_host):
    gc.collect()
    states = []
    for captured in (False, True):
        torch.manual_seed(2)
        training = Training(mlp(), captured, interval=50)
        training.run(batches(6, (64,)))
        state = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
        training.run(batches(2, (64,)))
        training.model.load_state_dict(state)
        training.run(batches(4, (64,)))
        states.append({name: tensor.clone() for name, tensor in training.state().items()})
    same(*states)
    assert training.step.captures == 2  # the transpose of an index is made anew


def test_a_damaged_index_is_found_before_a_replay(on_host):
    training = Training(mlp(), True, interval=50)
    training.run(batches(6, (64,)))
    training.model[0].topology.col.add_(1)
    with pytest.raises(RuntimeError, match="was changed by other code"):
        training.step(*batches(1, (64,))[0])


def test_masks_drawn_outside_are_not_replayed(on_host):
    def train(x, y):
        F.cross_entropy(model(x), y).backward()
        method.step()

    model = mlp()
    method = sm.Static(model, sgd(model.parameters()))
    mask, step = sm.RandomMask(model, 0.8), CapturedStep(train, method, model)
    with pytest.warns(UserWarning, match="random mask is drawn or cleared outside of the step in every step"):
        for batch in batches(20, (64,)):
            mask.draw()
            step(*batch)
    assert step.captures == 3


def test_buffers_that_a_step_binds_anew_end_captures(on_host):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen = self.seen + 1
            return x

    def train(x, y):
        F.cross_entropy(model(x), y).backward()
        method.step()

    model = nn.Sequential(Counts(), mlp())
    method = sm.Static(model, sgd(model.parameters()))
    step = CapturedStep(train, method, model)
    with pytest.warns(UserWarning, match=r"0\.seen is another"):
        for batch in batches(9, (64,)):
            step(*batch)
    assert model[0].seen == 9


@pytest.mark.parametrize("look", [
    lambda loss: loss.item(), lambda loss: bool(loss > 0), lambda loss: loss[None].nonzero(), lambda loss: loss.cpu(),
])  # fmt: skip
def test_steps_that_wait_for_the_device_run_eagerly(look, on_host):
    def train(x, y):
        loss = F.cross_entropy(model(x), y)
        look(loss)
        loss.backward()
        method.step()
        return loss

    model = mlp()
    method = sm.Static(model, sgd(model.parameters()))
    step = CapturedStep(train, method, model)
    with pytest.warns(UserWarning, match="not captured in a CUDA graph: .* waits for the device"):
        losses = [step(*batch) for batch in batches(6, (64,))]
    assert step.captures == 0
    assert not losses[-1].requires_grad
    assert method.steps == 6


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_steps_that_draw_on_the_host_run_eagerly(draw, on_host):
    def train(x, y):
        (draw() * F.cross_entropy(model(x), y)).backward()
        method.step()

    model = mlp()
    method = sm.Static(model, sgd(model.parameters()))
    step = CapturedStep(train, method, model)
    with pytest.warns(UserWarning, match="it draws random numbers on the host"):
        for batch in batches(6, (64,)):
            step(*batch)
    assert step.captures == 0


def test_what_only_a_capture_finds_is_an_error(on_host):
    def train(x, y):
        if len(calls) == REHEARSALS:
            x = x[x[:, 0] > 0]
            y = y[: len(x)]
        calls.append(1)
        F.cross_entropy(model(x), y).backward()
        method.step()

    calls, model = [], mlp()
    method = sm.Static(model, sgd(model.parameters()))
    step = CapturedStep(train, method, model)
    with pytest.raises(RuntimeError, match=r"cannot be captured in a CUDA graph.*CapturedStep.*numbers on the device"):
        for batch in batches(6, (64,)):
            step(*batch)


def test_rehearsals_tell_waits_from_other_warnings(monkeypatch):
    said = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
    modes = []

    def set_mode(mode):
        modes.append(mode)
        warnings.warn(said, stacklevel=1)

    def step():
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    graph = StepGraph.__new__(StepGraph)
    graph.run = lambda step: step()
    with pytest.warns(UserWarning, match="something else") as caught:
        _, waits = graph.rehearse(step)
    assert len(caught) == 1
    assert waits.startswith(f"it waits for the device ({__file__}, line ")
    assert modes == ["warn", 0]


def test_without_a_gpu_steps_run_as_they_are():
    model = mlp()
    method = sm.Static(model, torch.optim.SGD(model.parameters(), 0.1))

    def train(x, y):
        F.cross_entropy(model(x), y).backward()
        method.step()

    with pytest.warns(UserWarning, match="not captured in a CUDA graph: the model is on cpu") as caught:
        step = CapturedStep(train, method, model)
    assert caught[0].filename == __file__
    assert step(*batches(1, (64,))[0]) is None
    assert method.steps == 1


def test_methods_that_change_sizes_run_eagerly(on_host):
    model = mlp(0.5)
    method = sm.GMP(model, sgd(model.parameters()), densities=0.2, total_steps=40, interval=5)
    with pytest.warns(UserWarning, match="method 'gmp' changes the number of a layer's weights"):
        step = CapturedStep(lambda: None, method, model)
    assert step.reason is not None


@pytest.mark.parametrize(("make", "match"), [
    (lambda p: torch.optim.SGD(p, 0.1, fused=True), r"lr=torch.tensor\(0.1, device='cpu'\).*got a float"),
    (lambda p: torch.optim.SGD(p, torch.tensor(0.1, dtype=torch.float64), fused=True), "got torch.float64 on cpu"),
    (lambda p: torch.optim.SGD(p, torch.tensor(0.1)), r"SGD\(\.\.\., fused=True\).*got None"),
    (lambda p: torch.optim.Adam(p, torch.tensor(0.1), fused=True), r"Adam\(\.\.\., capturable=True\).*got False"),
])  # fmt: skip
def test_optimizers_that_cannot_be_captured(make, match, on_host):
    model = mlp()
    with pytest.raises(ValueError, match=match):
        CapturedStep(lambda: None, sm.Static(model, make(model.parameters())), model)


def test_wrong_use(on_host):
    model = mlp()
    method = sm.Static(model, sgd(model.parameters()))
    with pytest.raises(ValueError, match="needs the modules"):
        CapturedStep(lambda: None, method)
    batch = batches(1, (64,))[0]
    with pytest.raises(ValueError, match="must be tensors, got \\['Tensor', 'int'\\]"):
        CapturedStep(lambda *_: None, method, model)(batch[0], 3)
    with pytest.raises(ValueError, match=r"one method\.step\(\), got 0"):
        CapturedStep(lambda *_: None, method, model)(*batch)
    with torch.autocast("cpu"), pytest.raises(ValueError, match="inside the step"):
        CapturedStep(lambda *_: None, method, model)(*batch)

    def returns_a_number(*_):
        method.step()
        return 1.0

    with pytest.raises(ValueError, match="a tuple of tensors or None, got float"):
        CapturedStep(returns_a_number, method, model)(*batch)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mlp", "resnet", "blocks"])
def test_a_gpu_trains_as_it_does_eagerly(kind):
    _, expected, outputs = trained(kind, 30, False, device="cuda")
    gc.collect()
    training, state, found = trained(kind, 30, True, device="cuda")
    assert training.step.captures == 1
    assert training.step.reason is None
    assert all(a[0] == pytest.approx(b[0], rel=1e-3) for a, b in zip(found, outputs, strict=True))
    torch.testing.assert_close(state, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("backend", [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")),
])  # fmt: skip
def test_compiled_steps_have_no_breaks_and_train_alike(backend):
    counters.clear()
    trained = []
    for compiled in (False, True):
        torch.manual_seed(2)
        training = Training(mlp(), False, interval=5)
        forward = training.forward
        if compiled:
            training.forward = torch.compile(forward, fullgraph=True, backend=backend)
        for batch in batches(18, (64,)):
            training.train(*batch)
        trained.append({name: tensor.clone() for name, tensor in training.state().items()})
        del training, forward
        gc.collect()
    for name, expected in trained[0].items():
        torch.testing.assert_close(trained[1][name], expected, rtol=1e-4, atol=1e-6, msg=name)
    assert counters["stats"]["unique_graphs"] == 2  # of update batches and of others
    assert not counters["graph_break"]
