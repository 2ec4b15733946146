"""What ``batch_norm_relu`` and its gradient ask of their operands."""

from typing import Any

from torch import Tensor

from sparse_moon.ops.activations import LAST_FLAT, NAMES


def check_operands(
    input: Tensor,
    alike: dict[str, Tensor | None],
    vectors: dict[str, Tensor | None],
    eps: float,
    training: bool,
    activation: int,
) -> None:
    """Raise ``ValueError`` for tensors that are not ``alike`` the input, or no vectors of its channels."""
    if input.dim() != 4 or not input.is_floating_point():
        raise ValueError(f"input must be floating point (N, C, H, W), got {input.dtype} {tuple(input.shape)}")
    for name, tensor in alike.items():
        if tensor is not None and tensor.shape != input.shape:
            raise ValueError(f"{name} must have the input's shape {tuple(input.shape)}, got {tuple(tensor.shape)}")
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (input.shape[1],):
            raise ValueError(f"{name} must have shape ({input.shape[1]},), got {tuple(vector.shape)}")
    if eps < 0.0 or (training and eps == 0.0):
        raise ValueError(f"eps must be {'positive in training' if training else 'at least 0'}, got {eps}")
    if not 0 <= activation < len(NAMES):
        raise ValueError(f"activation must be at least 0 and less than {len(NAMES)}, got {activation}")


def _check_flat(activation: int) -> None:
    if activation > LAST_FLAT:
        raise ValueError(f"a residual goes with one of {NAMES[: LAST_FLAT + 1]}, got {NAMES[activation]!r}")


def check_forward(
    input: Tensor, residual: Tensor | None, weight: Any, bias: Any, mean: Any, var: Any, eps: float, activation: int
) -> None:
    vectors = {"weight": weight, "bias": bias, "mean": mean, "var": var}
    check_operands(input, {"residual": residual}, vectors, eps, mean is None, activation)
    if residual is not None:
        _check_flat(activation)
    if (mean is None) != (var is None):
        raise ValueError("mean and var must be given together")


def check_backward(
    grad: Tensor, input: Tensor, output: Tensor | None, weight: Any, bias: Any, mean: Tensor, var: Tensor,
    eps: float, activation: int, batch_statistics: bool,
) -> None:  # fmt: skip
    vectors = {"weight": weight, "bias": bias, "mean": mean, "var": var}
    check_operands(input, {"grad": grad, "output": output}, vectors, eps, batch_statistics, activation)
    if output is not None:
        _check_flat(activation)
