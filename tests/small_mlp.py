"""A small sparse network that is moved by SET, for tests of what other code does to it."""

import torch
from torch import nn

import sparse_moon as sm


def mlp(sparsity=0.8, **options):
    return sm.sparsify(nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8)), sparsity, "uniform",
                       first_dense=False, **options)  # fmt: skip


def train(model, steps=7, method=sm.SET, **options):
    """Some steps with topology updates."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    method = method(model, optimizer, total_steps=100, interval=2, **options)
    for _ in range(steps):
        model(torch.randn(16, 64)).square().mean().backward()
        method.step()
        optimizer.zero_grad()


def gradients(model, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
