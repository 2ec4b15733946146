"""Operands whose memory does not hold their numbers: parts of conjugates, which await their sign, and lazy zeros."""

import pytest
import torch
import torch.nn.functional as F

import sparse_moon as sm
from sparse_moon.ops import batch_norm_relu, sparse_conv2d, sparse_linear
from sparse_moon.ops.choice import use_backend
from sparse_moon.ops.plan import Geometry
from sparse_moon.ops.sparse_mlp.api import sparse_mlp
from sparse_moon.topology import Topology

LAZY = {"negative": torch._neg_view, "zeros": lambda t: torch._efficientzerotensor(t.shape)}
WHOLE = {"negative": torch.neg, "zeros": torch.zeros_like}


def linear():
    topology = Topology.random((24, 16), 0.5)
    plan = topology.plan()
    operands = [torch.randn(shape) for shape in ((5, 16), topology.values_shape, (24,))]
    return lambda x, values, bias: sparse_linear(x, values, bias, plan), operands


def conv2d():
    geometry = Geometry((24, 16, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    topology = Topology.random((24, 16 * 9), 0.5)
    plan = topology.plan(geometry)
    operands = [torch.randn(shape) for shape in ((3, 16, 5, 5), topology.values_shape, (24,))]
    return lambda x, values, bias: sparse_conv2d(x, values, bias, plan), operands


def mlp():
    first, second = Topology.random((24, 16), 0.5), Topology.random((8, 24), 0.5)
    plans = first.plan(), second.plan()
    shapes = (5, 16), first.values_shape, (24,), second.values_shape, (8,)

    def run(x, values1, bias1, values2, bias2):
        return sparse_mlp(x, values1, bias1, plans[0], values2, bias2, plans[1], "gelu_tanh")

    return run, [torch.randn(shape) for shape in shapes]


def batch_norm():
    def run(x, weight, bias, residual):
        return batch_norm_relu(x, None, None, weight, bias, residual, training=True)

    return run, [torch.randn(shape) for shape in ((4, 8, 3, 3), (8,), (8,), (4, 8, 3, 3))]


def results(function, operands, grad):
    with use_backend("kernel"):
        known = [t.detach().requires_grad_() for t in operands]
        output = function(*known)
        return [output.detach(), *torch.autograd.grad(output, known, grad)]


@pytest.mark.parametrize("lazy", LAZY)
@pytest.mark.parametrize("make", [linear, conv2d, mlp, batch_norm])
def test_each_operand_and_the_gradient(make, lazy):
    function, operands = make()
    grad = torch.randn_like(function(*operands))
    for i in range(len(operands) + 1):
        given, expected = ([*operands, grad] for _ in range(2))
        given[i], expected[i] = LAZY[lazy](given[i]), WHOLE[lazy](given[i])
        for found, wanted in zip(
            results(function, given[:-1], given[-1]), results(function, expected[:-1], expected[-1]), strict=True
        ):
            torch.testing.assert_close(found.clone(), wanted)


def test_without_gradients():
    for make in (linear, conv2d, mlp, batch_norm):
        function, operands = make()
        with torch.no_grad(), use_backend("kernel"):
            for i in range(len(operands)):
                given, expected = list(operands), list(operands)
                given[i], expected[i] = torch._neg_view(given[i]), -given[i]
                torch.testing.assert_close(function(*given), function(*expected))


def test_imaginary_parts_of_conjugates():
    layer = sm.SparseLinear(16, 1, sparsity=0.5)
    x = torch.randn(3, 16, dtype=torch.complex64)
    torch.testing.assert_close(layer(x.conj().imag), layer(-x.imag.contiguous()))

    def gradients(y):
        conjugate = torch.complex(torch.zeros_like(y), y).conj()
        return torch.autograd.grad((conjugate * (2 + 3j)).sum().imag, [x, layer.bias])

    x = torch.randn(16, requires_grad=True)
    torch.testing.assert_close(gradients(layer(x)), gradients(F.linear(x, layer.dense_weight(), layer.bias)))
