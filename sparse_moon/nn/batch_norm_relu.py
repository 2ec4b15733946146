"""Batch norm, residual sum and activation in one operation, as a module and for a batch norm of torch."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_moon.ops.activations import FUNCTIONS, NAMES, Activation
from sparse_moon.ops.batch_norm_relu.api import batch_norm_relu

FEWEST = 1 << 16
"""On a CPU, inputs with fewer numbers a thread run torch's operators, whose calls cost the host less: 60 to 130 us less
forward and backward, where the kernel saves 2 to 5 ns a number (Sapphire Rapids, one thread, planes and
channels_last)."""
FEWEST_ON_A_GPU = 1 << 24
"""On a GPU, the same: forward and backward are 9 launches of 20 us of the host, where torch's operators take about as
much time of an H200 from so many numbers on (expected, not measured)."""


def normalise(
    norm: nn.BatchNorm2d,
    input: Tensor,
    residual: Tensor | float | None,
    activation: Activation,
    *,
    recompute: bool,
    add_in_place: bool = False,
) -> Tensor:
    """``activation(norm(input) + residual)``, with all that calling the batch norm does, hooks excepted.

    Args:
        norm: its parameters, running statistics and mode are read, and the statistics updated in training.
        input: (N, C, H, W), contiguous or channels_last; the output follows.
        residual: of the same shape; one that has to be broadcast, has another dtype, or is a number, is added by torch.
        activation, recompute: as in :class:`BatchNormReLU2d`.
        add_in_place: the sum has the dtype of the batch norm's output, whatever that of the residual.
    """
    norm._check_input_dim(input)
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    training = norm.training or (norm.running_mean is None and norm.running_var is None)
    use_running = not norm.training or norm.track_running_stats
    mean, var = (norm.running_mean, norm.running_var) if use_running else (None, None)
    few = not torch.compiler.is_compiling() and input.numel() < (
        FEWEST * torch.get_num_threads() if input.is_cpu else FEWEST_ON_A_GPU
    )
    if not few and (
        residual is None
        or (isinstance(residual, Tensor) and residual.shape == input.shape and residual.dtype == input.dtype)
    ):
        return batch_norm_relu(
            input, mean, var, norm.weight, norm.bias, residual, training=training, momentum=momentum, eps=norm.eps,
            activation=activation, recompute=recompute,
        )  # fmt: skip
    output = F.batch_norm(input, mean, var, norm.weight, norm.bias, training, momentum, norm.eps)
    if residual is not None:
        output = output.add_(residual) if add_in_place else output + residual
    return FUNCTIONS[NAMES.index(activation)](output)


class BatchNormReLU2d(nn.BatchNorm2d):
    """``activation(BatchNorm2d(input) + residual)``, exact in training and in evaluation mode.

    Parameters, buffers and their names are those of ``nn.BatchNorm2d``. Convert to ``nn.SyncBatchNorm`` before this
    module comes in: that conversion knows nothing of the activation.

    Args:
        num_features ... dtype: as ``nn.BatchNorm2d``.
        activation: ``"none"``, ``"relu"``, ``"relu6"``, ``"silu"`` or ``"hardswish"``.
        recompute: whether sparse convolutions of the output compute it again in the backward pass, in place of keeping
            it (where a kernel runs, without a residual, from :data:`FEWEST` or :data:`FEWEST_ON_A_GPU` numbers on): a
            layer's activations take half the memory, for another pass over them.

    Shapes:
        input and residual (N, C, H, W), contiguous or channels_last; the output follows the input. A residual that has
        to be broadcast is added by torch.

    Raises:
        ValueError: another activation.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation = "relu",
        recompute: bool = False,
    ) -> None:
        if activation not in NAMES:
            raise ValueError(f"activation must be one of {NAMES}, got {activation!r}")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.activation, self.recompute = activation, recompute

    @classmethod
    def from_batch_norm(
        cls, batch_norm: nn.BatchNorm2d, activation: Activation = "relu", recompute: bool = False
    ) -> Self:
        """The same batch norm, with the activation: it shares parameters and running statistics with the given one."""
        bn = batch_norm
        self = cls(
            bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats, "meta", activation=activation,
            recompute=recompute,
        )  # fmt: skip
        self._parameters, self._buffers = bn._parameters.copy(), bn._buffers.copy()
        return self.train(bn.training)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return normalise(self, input, residual, self.activation, recompute=self.recompute)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}, recompute={self.recompute}"
