"""``sampled_product``: a product of two thin matrices, at the entries of a sparse one only.

``(left right)[i, j]`` for the entries (i, j), with ``left`` (O, r) and ``right`` (r, I): what is elsewhere called
sampled dense-dense matrix multiplication (SDDMM). It is the gradient of the values of a sparse linear layer, with r
examples of which ``right`` is the input and the transpose of ``left`` the gradient of the output. So it and its own
gradients, ``g right^T`` and ``left^T g`` for the gradient g of the result, are the three products of that layer, on its
kernels: ``2 r n`` FLOPs each for n entries, and no memory beyond operands and results. Where the kernel does not pay,
a product is a dense one, with an (O, I) matrix for as long as it runs.
"""

from typing import Any

import torch
from torch import Tensor

from sparse_moon.ops import choice, registry
from sparse_moon.ops.dense_weight import forget_weight, give_back, saved_weight
from sparse_moon.ops.index import entry_positions, matrix_to_blocks
from sparse_moon.ops.plan import Plan
from sparse_moon.ops.product import INDEX_SCHEMA, Product, expect_shape, flat_values_grad, whole_values_grad
from sparse_moon.ops.sparse_linear.api import FORWARD, INPUT_GRAD, VALUES_GRAD, fake_values_grad


def _reference(left_t: Tensor, right: Tensor, plan: Plan) -> Tensor:
    row_ptr, col, *_ = plan.index
    return matrix_to_blocks(left_t.t() @ right, entry_positions(row_ptr, col, plan.grid[1]), plan.block)


def sampled_product_reference(left: Tensor, right: Tensor, plan: Plan) -> Tensor:
    """The specification: the whole product, then the entries."""
    return _reference(left.t(), right, plan)


def _check(left_t: Tensor, right: Tensor, plan: Plan) -> None:
    rank = right.shape[0] if right.dim() == 2 else -1
    if left_t.dim() != 2 or left_t.shape != (rank, plan.shape[0]):
        raise ValueError(f"left must have shape {(plan.shape[0], rank)}, got {tuple(left_t.shape)[::-1]}")
    expect_shape("right", right, (rank, plan.shape[1]))
    if left_t.dtype is not right.dtype or not right.dtype.is_floating_point:
        raise ValueError(f"left and right must share one floating point dtype, got {left_t.dtype} and {right.dtype}")


_PRODUCT = Product(
    f"sampled_product(Tensor left_t, Tensor right, int[] block, {INDEX_SCHEMA}) -> Tensor",
    lambda left_t, right, plan: VALUES_GRAD(left_t.contiguous(), right.contiguous(), plan), fake_values_grad, _check,
    parts=flat_values_grad, whole=whole_values_grad,
)  # fmt: skip


def _forward(ctx: Any, left_t: Tensor, right: Tensor, plan: Plan, run: Any) -> Tensor:
    ctx.save_for_backward(left_t, right)
    ctx.plan, ctx.backend = plan, choice.current_backend()
    values: Tensor = run(left_t.contiguous(), right.contiguous(), plan)
    return values


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.backend != "auto" and choice.current_backend() == "auto":
        with choice.use_backend(ctx.backend):
            return _backward(ctx, grad)
    (left_t, right), plan, (needs_left, needs_right) = ctx.saved_tensors, ctx.plan, ctx.needs_input_grad[:2]
    plan.check_unchanged()
    # gradients are recorded in a backward pass only if it is to be differentiated
    if torch.is_grad_enabled() or registry.transformed() or registry.is_batch(grad):
        gradients = registry.differentiable_gradients(
            lambda a, b: _reference(a, b, plan), (left_t, right), (needs_left, needs_right), grad
        )
        return *gradients, None, None
    grad, left_t, right = grad.contiguous(), left_t.contiguous(), right.contiguous()
    d_left = d_right = weight = None
    if needs_left:
        forget_weight(plan)
        d_left = FORWARD(right, grad, None, None, plan)
        weight = saved_weight(grad, plan)  # one scatter is enough, where products are dense
    if needs_right:
        give_back(weight, plan)
        d_right = INPUT_GRAD(left_t, grad, plan)
        give_back(None, plan)
    return d_left, d_right, None, None


_function, _dispatched = registry.register_function(
    _PRODUCT.qualified, _forward, _backward, reference=_reference, whole=_PRODUCT.whole
)


def sampled_product(left: Tensor, right: Tensor, plan: Plan) -> Tensor:
    """The entries of ``left @ right`` that exist.

    Args:
        left: (O, r), floating point.
        right: (r, I), of the same dtype and device.
        plan: which blocks of the (O, I) matrix exist, without a geometry.

    Returns:
        ``plan.values_shape``, in the dtype of both; differentiable, twice at the cost of dense products.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    left_t = left.t() if left.dim() == 2 else left
    _check(left_t, right, plan)
    values: Tensor
    if registry.unwatched() and choice.current_backend() != "reference":
        values = _function.apply(left_t, right, plan, VALUES_GRAD)
    else:
        values = _dispatched(left_t, right, plan)
    return values
