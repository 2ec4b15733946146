"""``sparse_linear``: ``y = x W^T + b`` with a block-sparse ``W`` (O, I) held as compact values."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sparse_moon.ops.index import block_of, check_entries, check_values
from sparse_moon.ops.plan import Plan
from sparse_moon.ops.product import (
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
from sparse_moon.ops.registry import call, define
from sparse_moon.ops.sparse_linear import dense
from sparse_moon.ops.sparse_linear.dense import rows_of
from sparse_moon.ops.sparse_linear.reference import sparse_linear_reference


def fake_forward(input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, plan: Plan) -> Tensor:
    """An empty output."""
    return input.new_empty((*input.shape[:-1], plan.shape[0]))


def fake_input_grad(grad: Tensor, values: Tensor, plan: Plan) -> Tensor:
    """An empty gradient of the input."""
    return grad.new_empty((*grad.shape[:-1], plan.shape[1]))


def fake_values_grad(grad: Tensor, input: Tensor, plan: Plan) -> Tensor:
    """An empty gradient of the values."""
    return input.new_empty(plan.values_shape)


def _fake_grads(grad: Tensor, input: Tensor, values: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    return fake_input_grad(grad, values, plan), fake_values_grad(grad, input, plan)


def _separate_grads(grad: Tensor, input: Tensor, values: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    return INPUT_GRAD(grad, values, plan), VALUES_GRAD(grad, input, plan)


def _fake_dense_grad(grad: Tensor, input: Tensor) -> Tensor:
    return input.new_empty((grad.shape[-1], input.shape[-1]))


def _check_forward(input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, plan: Plan) -> None:
    check_entries(values, plan.index[1])
    expect_shape("input", input, (*input.shape[:-1], plan.shape[1]))
    if bias is not None:
        expect_shape("bias", bias, (plan.shape[0],))


def _check_input_grad(grad: Tensor, values: Tensor, plan: Plan) -> None:
    check_entries(values, plan.index[1])
    expect_shape("grad", grad, (*grad.shape[:-1], plan.shape[0]))


def _check_values_grad(grad: Tensor, input: Tensor, plan: Plan) -> None:
    expect_shape("input", input, (*input.shape[:-1], plan.shape[1]))
    expect_shape("grad", grad, (*input.shape[:-1], plan.shape[0]))


def _check_grads(grad: Tensor, input: Tensor, values: Tensor, plan: Plan) -> None:
    check_entries(values, plan.index[1])
    _check_values_grad(grad, input, plan)


def _whole(input: Tensor, values: Tensor, *rest: Any) -> tuple[Any, ...]:
    check_values(values)
    return input, values, *rest[:-5], plan_of(rest[-5:], block_of(values))


FORWARD = Product(
    f"sparse_linear(Tensor input, Tensor values, Tensor? bias, Tensor? probe, {INDEX_SCHEMA}) -> Tensor",
    dense.forward, fake_forward, _check_forward, parts=flat, whole=_whole,
)  # fmt: skip
INPUT_GRAD = Product(
    f"sparse_linear_input_grad(Tensor grad, Tensor values, {INDEX_SCHEMA}) -> Tensor",
    dense.input_grad, fake_input_grad, _check_input_grad, parts=flat, whole=_whole,
)  # fmt: skip
VALUES_GRAD = Product(
    f"sparse_linear_values_grad(Tensor grad, Tensor input, int[] block, {INDEX_SCHEMA}) -> Tensor",
    dense.values_grad, fake_values_grad, _check_values_grad, parts=flat_values_grad,
    whole=whole_values_grad,
)  # fmt: skip
GRADS = Product(
    f"sparse_linear_grads(Tensor grad, Tensor input, Tensor values, {INDEX_SCHEMA}) -> (Tensor, Tensor)",
    _separate_grads, _fake_grads, _check_grads, parts=flat, whole=whole_grads,
)  # fmt: skip
define("sparse_linear_dense_grad(Tensor grad, Tensor input) -> Tensor", dense.dense_grad, _fake_dense_grad)


def bias_grad(grad: Tensor) -> Tensor:
    """The gradient of the bias."""
    return (grad if grad.dim() == 2 else rows_of(grad)).sum(0)


def _check_input(shape: Sequence[int], plan: Plan) -> None:
    if shape[-1:] != plan.shape[1:]:
        raise ValueError(f"input must have {plan.shape[1]} features last, got shape {tuple(shape)}")


_sparse_linear = differentiable(
    Passes(
        FORWARD,
        GRADS,
        lambda grad, shape, values, plan: INPUT_GRAD(grad, values, plan),
        VALUES_GRAD,
        lambda grad, input, plan: call("sparse_linear_dense_grad", grad, input),
        bias_grad,
        _check_input,
        sparse_linear_reference,
    )
)


def sparse_linear(
    input: Tensor, values: Tensor, bias: Tensor | None, plan: Plan, *, probe: Tensor | None = None
) -> Tensor:
    """``input W^T + bias`` with the sparse weight ``W`` (O, I) given by ``values`` and ``plan``.

    Args:
        input: (..., I), floating point.
        values: compact weight values of shape ``plan.values_shape``, dtype of ``input`` (cast under autocast).
        bias: (O,) or None.
        plan: which blocks of the (O, I) matrix exist, as :meth:`sparse_moon.topology.Topology.plan` makes it.
        probe: a tensor of shape (O, I) that requires grad and receives the dense weight gradient; its own numbers
            are never read, so an expanded scalar does (see :mod:`sparse_moon.algorithms`).

    Returns:
        (..., O) in the dtype of ``input``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    return _sparse_linear(input, values, bias, probe, plan)
