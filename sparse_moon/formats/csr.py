"""A layer's weight as a sparse matrix of torch or of SciPy."""

import torch
from scipy import sparse
from torch import Tensor

from sparse_moon.nn.sparse_layer import SparseLayer


def to_torch_sparse(layer: SparseLayer) -> Tensor:
    """The weight as a sparse tensor of torch: compressed rows (CSR), or blocks of them (BSR) where the layer has any.

    Returns:
        (rows, cols), with copies of the values that a product sees (:meth:`SparseLayer.effective_values`) and of the
        int32 indices, on the layer's device. For a linear layer that is its weight; for a convolution the weight
        flattened after its first dimension, with (b, b) blocks in the order of :mod:`sparse_moon.ops.index`.
    """
    topology = layer.topology
    values = layer.effective_values().detach().clone()
    row_ptr, col = topology.row_ptr.clone(), topology.col.clone()
    make = torch.sparse_csr_tensor if topology.block == (1, 1) else torch.sparse_bsr_tensor
    return make(row_ptr, col, values, topology.shape)


def to_scipy(layer: SparseLayer) -> sparse.csr_array | sparse.bsr_array:
    """The weight as ``scipy.sparse.csr_array``, or ``bsr_array`` where the layer has blocks; otherwise as
    :func:`to_torch_sparse`, on the CPU.

    Raises:
        ValueError: a dtype that NumPy has not, as bfloat16.
    """
    topology = layer.topology
    values = layer.effective_values().detach().cpu()
    if values.dtype == torch.bfloat16:
        raise ValueError("NumPy has no bfloat16: convert the model first, as with model.float()")
    arrays = tuple(t.cpu().numpy().copy() for t in (values, topology.col, topology.row_ptr))
    make = sparse.csr_array if topology.block == (1, 1) else sparse.bsr_array
    return make(arrays, shape=topology.shape)
