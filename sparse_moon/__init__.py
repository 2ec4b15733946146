"""Sparse training that is really faster, for models that know what they do not know."""

import sparse_moon.source_tree  # noqa: F401  # first: decides where all other modules come from
from sparse_moon import memory, ops, schedules
from sparse_moon.algorithms import GMP, MEST, SET, Dense, DynamicMethod, GraNet, Method, RigL, SRigL, Static, TopKAST
from sparse_moon.allocation import allocate
from sparse_moon.averaging import (
    EMA,
    PredictionAverage,
    StochasticPasses,
    TicketAverage,
    WeightAverage,
    refresh_batch_norm,
)
from sparse_moon.fusion import BatchNormReLU2d, fuse
from sparse_moon.losses import AbstainingLoss, LogitNormLoss, UnknownAwareLoss, VirtualOutlierLoss, mixup
from sparse_moon.model_summary import summary
from sparse_moon.nn import (
    SparseConv2d,
    SparseLinear,
    densify,
    layer_densities,
    layer_sparsities,
    linear_conv2d_sparsity,
    live_outputs,
    overall_sparsity,
    sparse_layers,
    sparsify,
)
from sparse_moon.param_groups import param_groups
from sparse_moon.random_mask import RandomMask
from sparse_moon.schedules import Constant, Cosine, Cubic
from sparse_moon.topology import Topology
from sparse_moon.tuning import tune

__all__ = [
    "EMA",
    "GMP",
    "MEST",
    "SET",
    "AbstainingLoss",
    "BatchNormReLU2d",
    "Constant",
    "Cosine",
    "Cubic",
    "Dense",
    "DynamicMethod",
    "GraNet",
    "LogitNormLoss",
    "Method",
    "PredictionAverage",
    "RandomMask",
    "RigL",
    "SRigL",
    "SparseConv2d",
    "SparseLinear",
    "Static",
    "StochasticPasses",
    "TicketAverage",
    "TopKAST",
    "Topology",
    "UnknownAwareLoss",
    "VirtualOutlierLoss",
    "WeightAverage",
    "allocate",
    "densify",
    "fuse",
    "layer_densities",
    "layer_sparsities",
    "linear_conv2d_sparsity",
    "live_outputs",
    "memory",
    "mixup",
    "ops",
    "overall_sparsity",
    "param_groups",
    "refresh_batch_norm",
    "schedules",
    "sparse_layers",
    "sparsify",
    "summary",
    "tune",
]
