"""Sparse layers, the conversion of whole models, and what a model is made of."""

from sparse_moon.nn.attention import SparseMultiheadAttention
from sparse_moon.nn.batch_norm import refresh_batch_norm
from sparse_moon.nn.conv1d import SparseConv1D
from sparse_moon.nn.convert import densify, layer_densities, sparsify
from sparse_moon.nn.inspect import (
    evaluation_mode,
    layer_sparsities,
    linear_conv2d_sparsity,
    live_outputs,
    overall_sparsity,
    sparse_layers,
    weight_layers,
)
from sparse_moon.nn.layers import Exclude, Pattern, Selection, SparseConv2d, SparseLayer, SparseLinear

__all__ = [
    "Exclude",
    "Pattern",
    "Selection",
    "SparseConv1D",
    "SparseConv2d",
    "SparseLayer",
    "SparseLinear",
    "SparseMultiheadAttention",
    "densify",
    "evaluation_mode",
    "layer_densities",
    "layer_sparsities",
    "linear_conv2d_sparsity",
    "live_outputs",
    "overall_sparsity",
    "refresh_batch_norm",
    "sparse_layers",
    "sparsify",
    "weight_layers",
]
