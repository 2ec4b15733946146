"""A small network on images, for tests of detectors."""

import math

import torch
from torch import nn

from sparse_moon.ood import Outputs

K = 3


class Net(nn.Module):
    """Images (B, 1, 4, 4) to K or K + 1 logits; counts the images it sees."""

    def __init__(self, outputs: int = K) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 6), nn.Tanh()
        )
        self.head = nn.Linear(6, outputs)
        self.images_seen = 0

    def forward(self, images):
        self.images_seen += len(images)
        return self.head(self.body(images))


def batches(sizes=(4, 4, 3), shift=0.0):
    return [(torch.randn(n, 1, 4, 4) + shift, torch.arange(n) % K) for n in sizes]


def outputs(logits, features=None):
    logits = torch.as_tensor(logits)
    return Outputs(logits, torch.zeros(len(logits), 1) if features is None else features)


def softmax(z):
    return [math.exp(v) / sum(math.exp(w) for w in z) for v in z]
