"""Outputs of a random last layer, and loops over their rows, for tests of detectors."""

import math

import numpy as np
import torch

from sparse_moon.ood import Head, Outputs

K, D = 4, 7


def close(found, expected, tolerance=1e-10):
    expected = torch.as_tensor(np.asarray(expected, dtype=np.float64))
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def network(extra=0, size=D, classes=K):
    return Head(torch.randn(classes + extra, size), torch.randn(classes + extra))


def run(head, features, labels=None):
    """Outputs of a network whose last layer is ``head``."""
    return Outputs(head.logits(features).float(), features, labels, head)


def data(extra=0, train=83, test=31, size=D, classes=K):
    """Non-negative features, as after a ReLU, with dead units for some samples."""
    head = network(extra, size, classes)
    labels = torch.arange(train) % classes
    features = (torch.randn(train, size) + 0.5 * torch.randn(classes, size)[labels]).relu()
    return run(head, features, labels), run(head, (1.5 * torch.randn(test, size)).relu())


def logsumexp(z):
    return math.log(sum(math.exp(v) for v in z))


def softmax(z):
    return [math.exp(v - logsumexp(z)) for v in z]


def linear(weight, bias, h):
    return [sum(w * x for w, x in zip(row, h, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def rows(outputs):
    """(logits, features) of every sample as lists of floats."""
    return zip(outputs.logits.tolist(), outputs.features.tolist(), strict=True)
