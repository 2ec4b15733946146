"""A small network in float64 with a loop, for tests of methods."""

import torch
import torch.nn.functional as F
from torch import nn

import sparse_moon as sm
from sparse_moon.topology import Topology

BATCHES = 50


def net(sparsity=0.7, pattern="unstructured", constant_fan_in=False):
    """A convolution (8, 18) and a linear layer (12, 128); sparsity 0 has sparse layers that are full."""
    conv, linear = nn.Conv2d(2, 8, 3, padding=1), nn.Linear(8 * 16, 12)
    masks = [None, None]
    if constant_fan_in:
        topologies = [Topology.random(s, 1 - sparsity, constant_fan_in=True) for s in ((8, 18), (12, 128))]
        masks = [topologies[0].mask().view(8, 2, 3, 3), topologies[1].mask()]
    chosen = {"sparsity": None if constant_fan_in else sparsity, "pattern": pattern}
    first = sm.SparseConv2d.from_dense(conv, masks[0], **chosen)
    return nn.Sequential(
        first, nn.ReLU(), nn.Flatten(), sm.SparseLinear.from_dense(linear, masks[1], **chosen)
    ).double()  # fmt: skip


def batch(generator=None):
    x = torch.randn(6, 2, 4, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 12, (6,), generator=generator)


def batches(count=BATCHES):
    generator = torch.Generator().manual_seed(3)
    return [batch(generator) for _ in range(count)]


def train(model, method, data):
    updates = []
    for x, y in data:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        updates.append(method.step())
        method.optimizer.zero_grad()
    return updates


def sgd(model, momentum=0.9, **options):
    return torch.optim.SGD(model.parameters(), 0.3, momentum=momentum, **options)
