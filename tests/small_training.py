"""A small sparse network and every method on it, for tests of training."""

import torch
import torch.nn.functional as F
from torch import nn

import sparse_moon as sm

METHODS = {
    "set": sm.SET,
    "rigl": sm.RigL,
    "srigl": sm.SRigL,
    "mest": sm.MEST,
    "mest-soft": lambda *args, **options: sm.MEST(*args, soft_memory_bound=True, **options),
    "granet": lambda *args, **options: sm.GraNet(*args, densities=0.1, **options),
    "gmp": lambda *args, **options: sm.GMP(*args, densities=0.1, **options),
    "top-kast": sm.TopKAST,
}
EXCHANGES = ["set", "rigl", "srigl", "mest", "top-kast"]


class Lookahead(torch.optim.Optimizer):
    """Slow weights in a state of its own, around another optimizer."""

    def __init__(self, base):
        self.base = base
        super().__init__(base.param_groups, {})
        self.slow = 0

    def step(self, closure=None):
        loss = self.base.step(closure)
        self.slow += 1
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.state[p].setdefault("slow", p.detach().clone())
                if self.slow % 3 == 0:
                    with torch.no_grad():
                        slow.lerp_(p, 0.5)
                        p.copy_(slow)
        return loss


def net(sparsity=0.6):
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 6))
    return sm.sparsify(model, sparsity, "uniform", first_dense=False, selection="constant_fan_in")


def sgd(model, lr=0.1):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr, momentum=0.9)


def make(kind, model, optimizer=None, **options):
    return METHODS[kind](model, optimizer or sgd(model), **{"total_steps": 60, "interval": 5, **options})


def batch():
    return torch.randn(16, 32), torch.randint(0, 6, (16,))


def backward(model, batch):
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return loss


def train(model, method, steps):
    for _ in range(steps):
        backward(model, batch())
        method.step()
        method.optimizer.zero_grad()


def masks(model):
    return {name: layer.mask() for name, layer in sm.sparse_layers(model).items()}


def changed(before, model):
    return [name for name, mask in masks(model).items() if not torch.equal(mask, before[name])]
