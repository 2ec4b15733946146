"""Compact values to a dense weight and back: exact, so results are compared bit for bit."""

import pytest
import torch
from torch.library import opcheck

from sparse_moon.topology import Topology, matrix_shape, matrix_to_weight, weight_to_matrix

OPS = torch.ops.sparse_moon
BLOCKS = [(1, 1), (2, 2), (4, 1), (3, 3), (16, 16)]
KERNELS = [(), (1, 1), (3, 3), (1, 5)]


def check(topology, shape, dtype, channels_last):
    width = topology.block[1]
    values = torch.randn(topology.values_shape).to(dtype)
    weight = OPS.scatter_values(values, list(shape), channels_last, topology.row_ptr, topology.col)
    assert torch.equal(weight, matrix_to_weight(topology.to_dense(values), shape, width))
    assert weight.dtype == dtype
    assert weight.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    weight = torch.randn(shape).to(dtype)
    if channels_last:
        weight = weight.to(memory_format=torch.channels_last)
    taken = OPS.gather_values(weight, list(topology.block), topology.row_ptr, topology.col)
    assert torch.equal(taken, topology.gather(weight_to_matrix(weight, width)))
    assert taken.dtype == dtype and taken.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("block", BLOCKS)
def test_on_the_cpu(block, kernel, dtype):
    shape = (3 * block[0], 5 * block[1], *kernel)
    for density in (0.0, 0.3, 1.0):
        topology = Topology.random(matrix_shape(shape), density, block)
        for channels_last in (False, True)[: 1 + bool(kernel)]:
            check(topology, shape, dtype, channels_last)


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_operands_with_gaps(block):
    shape = (8, 12, 3, 3)
    topology = Topology.random(matrix_shape(shape), 0.5, block)
    apart = torch.randn(*topology.values_shape, 2)
    values = apart[..., 0]
    weight = OPS.scatter_values(values, list(shape), False, topology.row_ptr, topology.col)
    assert torch.equal(weight, matrix_to_weight(topology.to_dense(values), shape, block[1]))
    weight = torch.randn(12, 8, 3, 3).transpose(0, 1)
    taken = OPS.gather_values(weight, list(block), topology.row_ptr, topology.col)
    assert torch.equal(taken, topology.gather(weight_to_matrix(weight, block[1])))


def test_registration():
    topology = Topology.random((8, 36), 0.5, (2, 2))
    values, rows = torch.randn(topology.values_shape), (topology.row_ptr, topology.col)
    tests = ("test_schema", "test_faketensor")
    for channels_last in (False, True):
        opcheck(OPS.scatter_values.default, (values, [8, 4, 3, 3], channels_last, *rows), test_utils=tests)
    for weight in (torch.randn(8, 36), torch.randn(8, 4, 3, 3)):
        opcheck(OPS.gather_values.default, (weight, [2, 2], *rows), test_utils=tests)
