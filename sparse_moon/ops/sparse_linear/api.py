"""``sparse_linear``: ``y = x W^T + b`` with a block-sparse ``W`` (O, I) held as compact values."""

from functools import partial
from typing import Any

from torch import Tensor

from sparse_moon.ops.dense_weight import give_back, saved_weight
from sparse_moon.ops.index import block_of, check_entries, check_values
from sparse_moon.ops.masked_dense import gather_values
from sparse_moon.ops.plan import Plan
from sparse_moon.ops.product import (
    INDEX_SCHEMA,
    Product,
    checked,
    expect_shape,
    flat,
    flat_values_grad,
    plan_of,
    whole_grads,
    whole_values_grad,
)
from sparse_moon.ops.registry import call, define, differentiable_gradients, register_autograd
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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, values, _, probe, ctx.plan = inputs
    ctx.save_for_backward(input, values, probe, saved_weight(values, ctx.plan))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, values, _, weight = ctx.saved_tensors
    plan = ctx.plan
    plan.check_unchanged()
    give_back(weight, plan)
    needs_input, needs_values, needs_bias, needs_probe, *_ = ctx.needs_input_grad
    d_input = d_values = d_probe = None
    if needs_input and needs_values and not needs_probe:
        d_input, d_values = GRADS(grad, input, values, plan)
    else:
        if needs_input:
            d_input = INPUT_GRAD(grad, values, plan)
        if needs_probe:  # a growth step: the dense gradient exists anyway, so the values' gradient is read from it
            d_probe = call("sparse_linear_dense_grad", grad, input)
            d_values = gather_values(d_probe, plan.block, *plan.index[:2]) if needs_values else None
        elif needs_values:
            d_values = VALUES_GRAD(grad, input, plan)
    d_bias = (grad if grad.dim() == 2 else rows_of(grad)).sum(0) if needs_bias else None
    return d_input, d_values, d_bias, d_probe, None


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, values, probe, _ = ctx.saved_tensors
    ctx.plan.check_unchanged()
    needed = ctx.needs_input_grad[:4]
    bias = input.new_zeros(grad.shape[-1]) if needed[2] else None  # no gradient depends on it
    gradients = differentiable_gradients(
        partial(sparse_linear_reference, plan=ctx.plan), (input, values, bias, probe), needed, grad
    )
    return *gradients, None


_sparse_linear = register_autograd(
    FORWARD.qualified, _backward, setup_context=_setup_context, reference=sparse_linear_reference,
    differentiable_backward=_differentiable_backward, whole=_whole,
)  # fmt: skip


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
    input, values, bias = checked(input, values, bias, plan, probe)
    if input.shape[-1:] != plan.shape[1:]:
        raise ValueError(f"input must have {plan.shape[1]} features last, got shape {tuple(input.shape)}")
    return _sparse_linear(input, values, bias, probe, plan)
