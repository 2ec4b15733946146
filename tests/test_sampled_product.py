"""A product of thin matrices at the entries of a sparse one."""

import pytest
import torch

from sparse_moon.ops import use_backend
from sparse_moon.ops.native import native
from sparse_moon.ops.sampled_product import sampled_product, sampled_product_reference
from sparse_moon.topology import Topology

SHAPES = [((64, 257), (1, 1)), ((64, 48), (8, 1)), ((96, 64), (32, 32)), ((1, 63), (1, 1))]


def operands(shape, rank, dtype=torch.float32):
    left, right = torch.randn(shape[0], rank, dtype=dtype), torch.randn(rank, shape[1], dtype=dtype)
    return left.requires_grad_(), right.requires_grad_()


@pytest.mark.parametrize("shape, block", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("backend", ["kernel", "dense", "auto"])
def test_values_and_gradients(shape, block, density, rank, backend):
    topology = Topology.random(shape, density, block)
    left, right = operands(shape, rank)
    with use_backend(backend):
        values = sampled_product(left, right, topology.plan())
    g = torch.randn_like(values)
    found = torch.autograd.grad(values, (left, right), g)
    wide = [t.detach().double().requires_grad_() for t in (left, right)]
    expected = sampled_product_reference(*wide, topology.plan())
    torch.testing.assert_close(values, expected.float())
    torch.testing.assert_close(found, tuple(t.float() for t in torch.autograd.grad(expected, wide, g.double())))


@pytest.mark.parametrize("shape, block", [((9, 7), (1, 1)), ((8, 5), (4, 1)), ((8, 4), (2, 2))])
def test_derivatives(shape, block):
    """Against finite differences, and the second ones, too."""
    plan = Topology.random(shape, 0.4, block).plan()
    inputs = operands(shape, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: sampled_product(a, b, plan), inputs)
    assert torch.autograd.gradgradcheck(lambda a, b: sampled_product(a, b, plan), inputs)
    for one in range(2):  # where only one of both is wanted
        mixed = [t if i == one else t.detach() for i, t in enumerate(inputs)]
        assert torch.autograd.gradcheck(lambda a, b: sampled_product(a, b, plan), mixed)


def test_torch_func():
    plan = Topology.random((9, 7), 0.4).plan()
    left, right = (t.detach() for t in operands((9, 7), 3))
    found = torch.func.grad(lambda a: sampled_product(a, right, plan).square().sum())(left)
    expected = torch.func.grad(lambda a: sampled_product_reference(a, right, plan).square().sum())(left)
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(native is None, reason="the compiled CPU kernels were not built")
def test_no_dense_matrix_is_made():
    """Where kernels run, what a step allocates stays far below the matrix."""
    topology = Topology.random((2048, 2048), 0.01)
    left, right = operands((2048, 2048), 4)
    with use_backend("kernel"), torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        values = sampled_product(left, right, topology.plan())
        values.backward(torch.ones_like(values))
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 4 * 2048 * 2048 / 8


def test_errors():
    plan = Topology.random((6, 4), 0.5).plan()
    with pytest.raises(ValueError, match=r"left must have shape \(6, 3\), got \(5, 3\)"):
        sampled_product(torch.zeros(5, 3), torch.zeros(3, 4), plan)
    with pytest.raises(ValueError, match=r"right must have shape \(3, 4\), got \(3, 5\)"):
        sampled_product(torch.zeros(6, 3), torch.zeros(3, 5), plan)
    with pytest.raises(ValueError, match=r"one floating point dtype, got torch.float32 and torch.float64"):
        sampled_product(torch.zeros(6, 3), torch.zeros(3, 4, dtype=torch.float64), plan)


@pytest.mark.parametrize("backend", ["auto", "dense", "reference"])
def test_an_index_that_was_written_to_is_an_error(backend):
    topology = Topology.random((6, 4), 0.5)
    with use_backend(backend):
        values = sampled_product(*operands((6, 4), 2), topology.plan())
    with torch.no_grad():
        topology.col.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        values.sum().backward()
