# The public names: sparse_moon/__init__.py imports each of them when it is first used.
from . import (
    algorithms,
    averaging,
    flops,
    losses,
    memory,
    nn,
    ood,
    ops,
    reliability,
    schedules,
    topology,
)
from .algorithms import GMP, MEST, SET, Dense, DynamicMethod, GraNet, Method, RigL, SRigL, Static, TopKAST
from .allocation import allocate
from .app.start import train
from .averaging import EMA, PredictionAverage, StochasticPasses, TicketAverage, WeightAverage
from .capture import CapturedStep
from .formats.csr import to_scipy, to_torch_sparse
from .formats.masks import from_masks
from .formats.saving import load, save
from .losses import AbstainingLoss, GamblersLoss, LogitNormLoss, UnknownAwareLoss, VirtualOutlierLoss, mixup
from .nn import (
    SparseConv1D,
    SparseConv2d,
    SparseLinear,
    SparseMultiheadAttention,
    densify,
    layer_densities,
    layer_sparsities,
    linear_conv2d_sparsity,
    live_outputs,
    overall_sparsity,
    refresh_batch_norm,
    sparse_layers,
    sparsify,
)
from .nn.batch_norm_relu import BatchNormReLU2d
from .nn.fusion import fuse
from .nn.lora import lora, merge_lora
from .nn.summary import summary
from .nn.tune import tune
from .nn.what_runs import what_runs, what_would_pay
from .random_mask import RandomMask
from .reliability import freeze_hidden
from .schedules import Constant, Cosine, Cubic
from .topology import Topology
from .weight_decay import param_groups

__version__: str

__all__ = [
    "EMA",
    "GMP",
    "MEST",
    "SET",
    "AbstainingLoss",
    "BatchNormReLU2d",
    "CapturedStep",
    "Constant",
    "Cosine",
    "Cubic",
    "Dense",
    "DynamicMethod",
    "GamblersLoss",
    "GraNet",
    "LogitNormLoss",
    "Method",
    "PredictionAverage",
    "RandomMask",
    "RigL",
    "SRigL",
    "SparseConv1D",
    "SparseConv2d",
    "SparseLinear",
    "SparseMultiheadAttention",
    "Static",
    "StochasticPasses",
    "TicketAverage",
    "TopKAST",
    "Topology",
    "UnknownAwareLoss",
    "VirtualOutlierLoss",
    "WeightAverage",
    "algorithms",
    "allocate",
    "averaging",
    "densify",
    "flops",
    "freeze_hidden",
    "from_masks",
    "fuse",
    "layer_densities",
    "layer_sparsities",
    "linear_conv2d_sparsity",
    "live_outputs",
    "load",
    "lora",
    "losses",
    "memory",
    "merge_lora",
    "mixup",
    "nn",
    "ood",
    "ops",
    "overall_sparsity",
    "param_groups",
    "refresh_batch_norm",
    "reliability",
    "save",
    "schedules",
    "sparse_layers",
    "sparsify",
    "summary",
    "to_scipy",
    "to_torch_sparse",
    "topology",
    "train",
    "tune",
    "what_runs",
    "what_would_pay",
]
