"""``sparse_conv2d``: a 2-d convolution with a block-sparse weight (O, C/groups, kh, kw) held as compact values."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_moon.ops.index import block_of, check_entries, check_values
from sparse_moon.ops.layout import memory_format
from sparse_moon.ops.plan import Geometry, Plan, geometry_of
from sparse_moon.ops.product import (
    GEOMETRY_SCHEMA,
    INDEX_SCHEMA,
    Passes,
    Product,
    differentiable,
    expect_shape,
    flat,
    flat_values_grad,
    plan_of,
    whole_grads,
    whole_values_grad,
)
from sparse_moon.ops.registry import call
from sparse_moon.ops.sparse_conv2d import dense
from sparse_moon.ops.sparse_conv2d.checks import check_channels, check_geometry, check_grad, check_weight_shape
from sparse_moon.ops.sparse_conv2d.reference import sparse_conv2d_reference


def fake_forward(input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, plan: Plan) -> Tensor:
    """An empty output."""
    geometry = geometry_of(plan)
    shape = (input.shape[0], geometry.weight_shape[0], *geometry.output_size(input.shape))
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input))


def fake_input_grad(grad: Tensor, values: Tensor, input_shape: Sequence[int], plan: Plan) -> Tensor:
    """An empty gradient of the input."""
    return torch.empty(input_shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format(grad))


def fake_values_grad(grad: Tensor, input: Tensor, plan: Plan) -> Tensor:
    """An empty gradient of the values."""
    return input.new_empty(plan.values_shape)


def separate_grads(grad: Tensor, input: Tensor, values: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Both gradients, one after the other."""
    return INPUT_GRAD(grad, values, input.shape, plan), VALUES_GRAD(grad, input, plan)


def _fake_grads(grad: Tensor, input: Tensor, values: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    return fake_input_grad(grad, values, list(input.shape), plan), fake_values_grad(grad, input, plan)


def _check(plan: Plan, input_shape: Sequence[int], grad: Tensor | None) -> Geometry:
    geometry = geometry_of(plan)
    check_geometry(input_shape, geometry)
    check_channels(geometry, plan.block)
    check_weight_shape(plan)
    if grad is not None:
        check_grad(grad, input_shape, geometry)
    return geometry


def _check_forward(input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, plan: Plan) -> None:
    check_entries(values, plan.index[1])
    geometry = _check(plan, input.shape, None)
    if bias is not None:
        expect_shape("bias", bias, geometry.weight_shape[:1])


def _check_input_grad(grad: Tensor, values: Tensor, input_shape: Sequence[int], plan: Plan) -> None:
    check_entries(values, plan.index[1])
    _check(plan, input_shape, grad)


def _check_values_grad(grad: Tensor, input: Tensor, plan: Plan) -> None:
    _check(plan, input.shape, grad)


def _check_grads(grad: Tensor, input: Tensor, values: Tensor, plan: Plan) -> None:
    _check_input_grad(grad, values, input.shape, plan)


def _whole(input: Tensor, values: Tensor, *rest: Any) -> tuple[Any, ...]:
    check_values(values)
    return input, values, *rest[:-10], plan_of(rest[-10:], block_of(values))


_SPEC = f"{GEOMETRY_SCHEMA}, {INDEX_SCHEMA}"
FORWARD = Product(
    f"sparse_conv2d(Tensor input, Tensor values, Tensor? bias, Tensor? probe, {_SPEC}) -> Tensor",
    dense.forward, fake_forward, _check_forward, parts=flat, whole=_whole,
)  # fmt: skip
INPUT_GRAD = Product(
    f"sparse_conv2d_input_grad(Tensor grad, Tensor values, int[] input_shape, {_SPEC}) -> Tensor",
    dense.input_grad, fake_input_grad, _check_input_grad, parts=flat, whole=_whole,
)  # fmt: skip
VALUES_GRAD = Product(
    f"sparse_conv2d_values_grad(Tensor grad, Tensor input, int[] block, {_SPEC}) -> Tensor",
    dense.values_grad, fake_values_grad, _check_values_grad, parts=flat_values_grad,
    whole=whole_values_grad,
)  # fmt: skip
GRADS = Product(
    f"sparse_conv2d_grads(Tensor grad, Tensor input, Tensor values, {_SPEC}) -> (Tensor, Tensor)",
    separate_grads, _fake_grads, _check_grads, parts=flat, whole=whole_grads,
)  # fmt: skip


def bias_grad(grad: Tensor) -> Tensor:
    """The gradient of the bias."""
    return grad.sum((0, 2, 3))


def _check_input(shape: Sequence[int], plan: Plan) -> None:
    check_weight_shape(plan)
    check_geometry(shape, geometry_of(plan))


def _dense_grad(grad: Tensor, input: Tensor, plan: Plan) -> Tensor:
    return call("sparse_conv2d_dense_grad", grad, input, plan.block[1], *geometry_of(plan))


_sparse_conv2d = differentiable(
    Passes(
        FORWARD,
        GRADS,
        lambda grad, shape, values, plan: INPUT_GRAD(grad, values, shape, plan),
        VALUES_GRAD,
        _dense_grad,
        bias_grad,
        _check_input,
        sparse_conv2d_reference,
    ),
    recomputes=True,
)


def sparse_conv2d(
    input: Tensor, values: Tensor, bias: Tensor | None, plan: Plan, *, probe: Tensor | None = None
) -> Tensor:
    """2-d cross-correlation as ``F.conv2d``, with the sparse weight given by ``values`` and ``plan``.

    Args:
        input: (N, C, H, W), contiguous or channels_last (the result follows), floating point.
        values: compact weight values of shape ``plan.values_shape``, dtype of ``input`` (cast under autocast).
        bias: (O,) or None.
        plan: the convolution, and which blocks of the (O, C/groups * kh * kw) matrix exist, columns in topology order;
            as :meth:`sparse_moon.topology.Topology.plan` makes it with a :class:`~sparse_moon.ops.plan.Geometry`.
        probe: a tensor of shape ``plan.shape`` that requires grad and receives the dense weight gradient; its own
            numbers are never read.

    Returns:
        (N, O, Ho, Wo) in the dtype of ``input``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    return _sparse_conv2d(input, values, bias, probe, plan)
