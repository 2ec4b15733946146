"""Operators: a file each, a folder for the larger ones: reference, registration, kernels, public function."""

# imported for what they register
import sparse_moon.ops.sparse_conv2d.cpu
import sparse_moon.ops.sparse_conv2d.gpu
import sparse_moon.ops.sparse_linear.cpu
import sparse_moon.ops.sparse_linear.gpu  # noqa: F401
from sparse_moon.ops.average_ import average_
from sparse_moon.ops.batch_norm_relu.api import batch_norm_relu
from sparse_moon.ops.bernoulli_mask import bernoulli_mask
from sparse_moon.ops.choice import Backend, use_backend
from sparse_moon.ops.drop_and_grow import drop_and_grow
from sparse_moon.ops.flop_formulas import register as register_flop_formulas
from sparse_moon.ops.plan import Geometry, Plan
from sparse_moon.ops.sparse_conv2d.api import sparse_conv2d
from sparse_moon.ops.sparse_linear.api import sparse_linear
from sparse_moon.ops.sparse_mlp.api import sparse_mlp
from sparse_moon.ops.unknown_aware_loss import LossStatistics, unknown_aware_loss

__all__ = [
    "Backend",
    "Geometry",
    "LossStatistics",
    "Plan",
    "average_",
    "batch_norm_relu",
    "bernoulli_mask",
    "drop_and_grow",
    "sparse_conv2d",
    "sparse_linear",
    "sparse_mlp",
    "unknown_aware_loss",
    "use_backend",
]

register_flop_formulas()
