"""Whole training loops: README's against dense simulations of each Algorithm 1, the command line's against README's."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import sparse_moon as sm
from sparse_moon.app.build import build_run
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.run_data import load_dataset
from sparse_moon.app.trainer import Trainer
from sparse_moon.ops.bernoulli_mask import philox

CLASSES, EPOCHS, BATCHES = 4, 10, 5
INTERVAL, STOP, DROP, LR, MOMENTUM = 4, 0.6, 0.5, 0.2, 0.9
FIRST_VOTE, WARMUP, FINAL_WEIGHT, KEEP, SEED = 8, 2, 1.5, 0.8, 7
SMOOTHING = 1 / 16  # with (EPOCHS - WARMUP) a power of two, so that the float32 in which w is kept is exact


def make_data(seed=3):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCHES, 8, 2, 4, 4, dtype=torch.float64, generator=g)
    return list(zip(x, torch.randint(0, CLASSES, (BATCHES, 8), generator=g), strict=True))


def make_model(outputs):
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, outputs)
    )
    return sm.sparsify(model, 0.7, "uniform", first_dense=False).double()


class Simulation:
    """Dense weights, bool masks M, and random masks Z; SGD with momentum; RigL."""

    def __init__(self, model):
        self.layers = {"0": model[0], "4": model[4]}
        self.masks = {n: layer.mask() for n, layer in self.layers.items()}
        self.parameters = {f"w{n}": layer.dense_weight().detach().clone() for n, layer in self.layers.items()}
        self.parameters |= {f"b{n}": layer.bias.detach().clone() for n, layer in self.layers.items()}
        self.parameters |= {"gain": model[1].weight.detach().clone(), "shift": model[1].bias.detach().clone()}
        self.velocity = dict.fromkeys(self.parameters)
        self.average = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.votes = self.t = self.draws = 0
        self.w = self.initial = 0.0
        self.b = None  # moving average of beta
        self.z = {n: torch.ones_like(m) for n, m in self.masks.items()}

    def draw_z(self):
        self.draws += 1
        for stream, (name, mask) in enumerate(self.masks.items()):
            words = philox(int(mask.sum()), SEED, stream, torch.tensor(self.draws))
            z = torch.zeros_like(mask)
            z[mask] = words < KEEP * 2**32
            self.z[name] = z

    def logits(self, p, x):
        h = F.conv2d(x, p["w0"], p["b0"], padding=1)
        mean, var = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), correction=0, keepdim=True)
        h = (h - mean) / (var + 1e-5).sqrt() * p["gain"].view(-1, 1, 1) + p["shift"].view(-1, 1, 1)
        return h.relu().flatten(1) @ p["w4"].T + p["b4"]

    def moon_loss(self, z, y):
        p = z.exp() / z.exp().sum(1, keepdim=True)
        u, ce = p[:, -1], -p[range(len(y)), y].log()
        wrong = (z.argmax(1) != y).double()
        if self.epoch < WARMUP:
            beta = ((1 - u) * ce).mean().item()
            self.b = beta if self.b is None else (1 - SMOOTHING) * self.b + SMOOTHING * beta
        return (ce + wrong * ce * self.w / (1 + self.w * u)).mean()

    def step(self, x, y, loss, random_masks):
        update = 0 < self.t < STOP * EPOCHS * BATCHES and self.t % INTERVAL == 0
        if random_masks and not update:
            self.draw_z()
        else:
            self.z = {n: torch.ones_like(m) for n, m in self.masks.items()}
        p = dict(self.parameters)
        for n in self.masks:
            p[f"w{n}"] = p[f"w{n}"] * self.masks[n] * self.z[n]
        p = {name: tensor.clone().requires_grad_() for name, tensor in p.items()}
        loss(self.logits(p, x), y).backward()
        if update:
            for n in self.masks:
                self.rigl(n, p[f"w{n}"].grad)
        else:
            for name, parameter in self.parameters.items():
                grad = p[name].grad
                if name[0] == "w":
                    grad = grad * self.masks[name[1:]] * self.z[name[1:]]
                old = self.velocity[name]
                self.velocity[name] = grad if old is None else MOMENTUM * old + grad
                parameter -= LR * self.velocity[name]
        self.t += 1

    def rigl(self, n, grad):
        weight, mask = self.parameters[f"w{n}"].flatten(), self.masks[n].flatten()
        fraction = DROP / 2 * (1 + math.cos(math.pi * self.t / (STOP * EPOCHS * BATCHES)))
        count = int(fraction * mask.sum().item())
        active = mask.nonzero().flatten().tolist()
        new = mask.clone()
        new[sorted(active, key=lambda i: (weight[i].abs().item(), i))[:count]] = False
        score = grad.abs().flatten()
        new[sorted((~new).nonzero().flatten().tolist(), key=lambda i: (-score[i].item(), i))[:count]] = True
        for tensor in (self.parameters[f"w{n}"], self.velocity[f"w{n}"]):
            tensor.view(-1)[~(new & mask)] = 0
        self.masks[n] = new.view_as(self.masks[n])

    def vote(self):
        for name, p in self.parameters.items():
            z = self.z[name[1:]] * self.masks[name[1:]] if name[0] == "w" else 1
            self.average[name] = (self.votes * self.average[name] + z * p) / (self.votes + 1)
        self.votes += 1

    def run(self, data, reliability):
        for self.epoch in range(EPOCHS):
            if reliability == "moon" and self.epoch >= WARMUP:
                self.initial = self.b / 64
                number = self.epoch + 1
                self.w = self.initial + (number - WARMUP) * (FINAL_WEIGHT - self.initial) / (EPOCHS - WARMUP)
            loss = self.moon_loss if reliability == "moon" else F.cross_entropy
            for x, y in data:
                self.step(x, y, loss, reliability == "cigl")
            if self.epoch + 1 >= FIRST_VOTE:
                self.vote()
        h = F.conv2d(torch.cat([x for x, _ in data]), self.average["w0"], self.average["b0"], padding=1)
        return h.mean((0, 2, 3)), h.var((0, 2, 3))


@pytest.mark.parametrize("reliability", ["moon", "cigl"])
def test_the_whole_loop_equals_a_dense_simulation(reliability):
    torch.manual_seed(5)
    model, data = make_model(CLASSES + (reliability == "moon")), make_data()
    simulation = Simulation(model)
    start = {n: m.clone() for n, m in simulation.masks.items()}

    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM)
    method = sm.RigL(
        model, optimizer, total_steps=EPOCHS * BATCHES, interval=INTERVAL, stop=STOP,
        drop_fraction=sm.Cosine(DROP, 0.0, round(STOP * EPOCHS * BATCHES)),
    )  # fmt: skip
    loss = sm.UnknownAwareLoss(
        CLASSES, EPOCHS, final_weight=FINAL_WEIGHT, warmup_epochs=WARMUP, smoothing=SMOOTHING
    ).double()
    mask = sm.RandomMask(model, KEEP, SEED) if reliability == "cigl" else None
    average = sm.WeightAverage(model, mask)
    criterion = loss if reliability == "moon" else F.cross_entropy
    for epoch in range(EPOCHS):
        for x, y in data:
            if mask is not None:
                mask.clear() if method.updates_now else mask.draw()
            criterion(model(x), y).backward()
            method.step()
            optimizer.zero_grad()
        w = loss.w.item()
        loss.end_epoch()
        if epoch + 1 >= FIRST_VOTE:
            average.update(model)
    if mask is not None:
        mask.clear()
    last = {n: layer.dense_weight().detach().clone() for n, layer in simulation.layers.items()}
    average.copy_to(model)
    sm.refresh_batch_norm(model, data)

    mean, var = simulation.run(data, reliability)
    close = {"rtol": 1e-6, "atol": 1e-9}
    assert simulation.votes == 3 and (reliability == "cigl" or simulation.w > 1)
    if reliability == "moon":
        assert w == pytest.approx(simulation.w, abs=1e-9)
    for n, layer in simulation.layers.items():
        assert torch.equal(layer.mask(), simulation.masks[n]) and not torch.equal(layer.mask(), start[n])
        torch.testing.assert_close(last[n], simulation.parameters[f"w{n}"] * simulation.masks[n], **close)
        torch.testing.assert_close(layer.dense_weight(), simulation.average[f"w{n}"], **close)
        torch.testing.assert_close(layer.bias, simulation.average[f"b{n}"], **close, check_dtype=True)
    torch.testing.assert_close(model[1].weight.detach(), simulation.average["gain"], **close)
    torch.testing.assert_close(model[1].running_mean, mean, **close)
    torch.testing.assert_close(model[1].running_var, var, **close)


@pytest.mark.parametrize("change", [{"reliability": "moon"}, {"reliability": "cigl"},
                                    {"reliability": "cigl", "rescale": True}], ids=str)  # fmt: skip
def test_the_trainer_does_what_the_readme_does(change):
    config = TrainConfig(
        model="small-resnet", width=4, epochs=4, batch_size=256, interval=2, sparsity=0.8, ood=[], lr=0.2,
        vote_from=0.5, stop=0.5, seed=3, **change, **({"keep": 0.8} if change["reliability"] == "cigl" else {}),
    )  # fmt: skip
    data = load_dataset(config)
    trainer = Trainer(config, data)
    for _ in range(4):
        trainer.run_epoch(tqdm(disable=True))
    trainer.finish()

    run = build_run(config, data)
    model, optimizer, method = run.model, run.optimizer, run.method
    moon = config.reliability == "moon"
    mask = None if moon else sm.RandomMask(model, 0.8, 3)
    criterion = sm.UnknownAwareLoss(8, 4) if moon else nn.CrossEntropyLoss()
    if mask is not None:
        sm.freeze_hidden(mask, optimizer)
    average = sm.WeightAverage(model, mask, rescale=change.get("rescale", False))
    rate = sm.Cosine(0.2, 0.2 / 15, round(config.lr_until * run.total_steps))
    updates = 0
    for epoch in range(4):
        model.train()
        for images, labels in run.batches.epoch(epoch):
            for group in optimizer.param_groups:
                group["lr"] = rate(method.steps)
            if mask is not None:
                mask.clear() if method.updates_now else mask.draw()
            criterion(model(images), labels).backward()
            updates += method.step()
            optimizer.zero_grad()
        if moon:
            criterion.end_epoch()
        if epoch >= 2:
            average.update(model)
    if mask is not None:
        mask.clear()
    average.copy_to(model)
    sm.refresh_batch_norm(model, run.batches.epoch(4))
    found, expected = trainer.model.state_dict(), model.state_dict()
    assert updates > 1 and [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_batch_norm_is_refreshed_on_images_as_training_sees_them(tmp_path):
    """White images, which crops surround with black; once the pass took whole images, 4 to 6 points of accuracy."""
    labels = np.arange(64) % 4
    images = np.full((64, 8, 8, 3), 255, np.uint8)
    np.savez(tmp_path / "white.npz", x_train=images, y_train=labels, x_test=images[:8], y_test=labels[:8])
    config = TrainConfig(
        dataset=str(tmp_path / "white.npz"), model="small-resnet", width=4, epochs=2, batch_size=16, sparsity=0.5,
        reliability="moon", interval=2, ood=[], seed=3,
    )  # fmt: skip
    data = load_dataset(config)
    trainer = Trainer(config, data)
    for _ in range(2):
        trainer.run_epoch(tqdm(disable=True))
    trainer.finish()
    conv, norm = trainer.model.conv1, trainer.model.bn1
    with torch.no_grad():
        seen = torch.cat([conv(images) for images, _ in trainer.batches.epoch(2)])
        whole = conv((torch.ones(1, 3, 8, 8) - data.mean.view(-1, 1, 1)) / data.std.view(-1, 1, 1))
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, seen.transpose(0, 1).flatten(1).var(1))
    assert (norm.running_mean - whole.mean((0, 2, 3))).abs().max() > 0.05
