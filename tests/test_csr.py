"""Weights as sparse matrices of torch and SciPy."""

import numpy as np
import pytest
import torch
from torch import nn

import sparse_moon as sm
from sparse_moon.topology import weight_to_matrix

LAYERS = [
    lambda pattern: sm.SparseLinear(24, 16, sparsity=0.7, pattern=pattern),
    lambda pattern: sm.SparseConv2d(8, 16, 3, sparsity=0.7, pattern=pattern),
]


def matrix_of(layer):
    return weight_to_matrix(layer.dense_weight().detach(), layer.topology.block[1])


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("pattern", ["unstructured", "vector4", "block4"])
@pytest.mark.filterwarnings("ignore:Sparse (CSR|BSR|compressed|invariant):UserWarning")
def test_torch(make, pattern):
    layer = make(pattern)
    matrix = sm.to_torch_sparse(layer)
    assert matrix.layout == (torch.sparse_csr if pattern == "unstructured" else torch.sparse_bsr)
    assert torch.equal(matrix.to_dense(), matrix_of(layer))
    matrix.values().zero_()
    assert layer.values.abs().sum() > 0
    if isinstance(layer, nn.Module) and pattern == "unstructured":
        x = torch.randn(matrix.shape[1], 5)
        torch.testing.assert_close(sm.to_torch_sparse(layer) @ x, matrix_of(layer) @ x)


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("pattern", ["unstructured", "vector4", "block4"])
def test_scipy(make, pattern):
    layer = make(pattern)
    matrix = sm.to_scipy(layer)
    assert matrix.format == ("csr" if pattern == "unstructured" else "bsr")
    assert np.array_equal(matrix.toarray(), matrix_of(layer).numpy())
    assert matrix.nnz == layer.topology.nnz and matrix.dtype == np.float32
    x = np.random.default_rng(0).standard_normal((matrix.shape[1], 5)).astype(np.float32)
    np.testing.assert_allclose(matrix @ x, matrix_of(layer).numpy() @ x, rtol=1e-4, atol=1e-5)
    matrix.data[:] = 0.0
    assert layer.values.abs().sum() > 0


def test_dtypes():
    layer = sm.SparseLinear(24, 16, sparsity=0.7)
    assert sm.to_scipy(layer.double()).dtype == np.float64
    with pytest.raises(ValueError, match="NumPy has no bfloat16"):
        sm.to_scipy(layer.bfloat16())


def test_a_matrix_makes_the_layer_again():
    """The way back: the places of a SciPy matrix are a mask."""
    layer = sm.SparseLinear(24, 16, sparsity=0.7)
    matrix = sm.to_scipy(layer)
    dense = nn.Linear(24, 16)
    dense.weight.data = torch.from_numpy(matrix.toarray())
    again = sm.from_masks(dense)
    assert again.topology.same_as(layer.topology) and torch.equal(again.values, layer.values)
