"""``sparse_mlp``: ``y = gelu(x W1^T + b1) W2^T + b2``, what a transformer does between two norms, in one operator.

What stands between the products is memory: GELU reads and writes the hidden features once in the forward pass, its
gradient three times, and the gradient of a bias reads them again. Here kernels do that while a tile is in registers:
GELU where the first product ends, its derivative where the input gradient of the second one ends, and the biases'
gradients where the values' gradients read that of the output. Kept for the backward pass is what torch keeps.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_moon.ops.check_index import guarded
from sparse_moon.ops.index import block_of, check_entries, check_values
from sparse_moon.ops.masked_dense import gather_values
from sparse_moon.ops.native import native
from sparse_moon.ops.plan import Plan
from sparse_moon.ops.product import expect_shape, plan_of
from sparse_moon.ops.registry import (
    call,
    define,
    differentiable_gradients,
    implement,
    register_autograd,
    to_autocast_dtype,
)
from sparse_moon.ops.sparse_linear.api import FORWARD, INPUT_GRAD, bias_grad, fake_forward
from sparse_moon.ops.sparse_linear.reference import sparse_linear_reference
from sparse_moon.ops.sparse_mlp import cpu, gpu
from sparse_moon.ops.sparse_mlp.parts import APPROXIMATE, NAMES, SEPARATE, Gelu, Parts

_INDICES = ", ".join(f"Tensor {name}{i}" for i in (1, 2) for name in ("row_ptr", "col", "t_ptr", "t_row", "t_perm"))


def _flat(*inputs: Any) -> tuple[Any, ...]:
    """Operands and two plans as the schema has them."""
    return *inputs[:-2], *inputs[-2].index, *inputs[-1].index


def _with_plans(values1: int, values2: int, flat: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inverse of :func:`_flat`, for values at these places."""
    for i in (values1, values2):
        check_values(flat[i])
    plan1, plan2 = plan_of(flat[-10:-5], block_of(flat[values1])), plan_of(flat[-5:], block_of(flat[values2]))
    return *flat[:-10], plan1, plan2


def _whole(*flat: Any) -> tuple[Any, ...]:
    return _with_plans(1, 3, flat)


def _whole_grads(*flat: Any) -> tuple[Any, ...]:
    return _with_plans(4, 5, flat)


def _check(input: Tensor, values1: Tensor, bias1: Tensor, values2: Tensor, bias2: Tensor, *plans: Plan) -> None:
    plan1, plan2 = plans
    expect_shape("input", input, (*input.shape[:-1], plan1.shape[1]))
    for i, values, bias, plan in ((1, values1, bias1, plan1), (2, values2, bias2, plan2)):
        check_entries(values, plan.index[1])
        expect_shape(f"bias{i}", bias, plan.bias_shape)
    if plan2.shape[1] != plan1.shape[0]:
        raise ValueError(f"the second weight must have {plan1.shape[0]} inputs, got {plan2.shape[1]}")
    operands = (input, values1, bias1, values2, bias2)
    devices = {str(t.device) for t in (*operands, plan1.index[1], plan2.index[1])}
    if len(devices) > 1:
        raise ValueError(
            f"input, values, topologies and biases must be on one device, got {', '.join(sorted(devices))}"
        )
    dtypes = {t.dtype for t in operands}
    if len(dtypes) > 1 or not input.is_floating_point():
        raise ValueError(f"input, values and biases must share one floating point dtype, got {dtypes}")


def _forward(
    parts: Parts, input: Tensor, values1: Tensor, bias1: Tensor, values2: Tensor, bias2: Tensor, activation: int,
    probe1: Tensor | None, probe2: Tensor | None, plan1: Plan, plan2: Plan,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, what is activated, and its activation."""
    _check(input, values1, bias1, values2, bias2, plan1, plan2)
    for name, probe, plan in (("probe1", probe1, plan1), ("probe2", probe2, plan2)):
        if probe is not None:
            expect_shape(name, probe, plan.shape)
    before, hidden = parts.forward(input, values1, bias1, activation, plan1)
    return FORWARD(hidden, values2, bias2, None, plan2), before, hidden


def _fake(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    input, values1, bias1, values2, bias2, *_, plan1, plan2 = _whole(*flat)
    before, hidden = (fake_forward(input, values1, bias1, None, plan1) for _ in range(2))
    return fake_forward(hidden, values2, bias2, None, plan2), before, hidden


def _grads(
    parts: Parts, grad: Tensor, input: Tensor, before: Tensor, hidden: Tensor, values1: Tensor, values2: Tensor,
    activation: int, plan1: Plan, plan2: Plan,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Of input, first values and bias, second values and bias."""
    _check(input, values1, grad.new_empty(plan1.bias_shape), values2, grad.new_empty(plan2.bias_shape), plan1, plan2)
    for name, tensor, plan in (("grad", grad, plan2), ("before", before, plan1), ("hidden", hidden, plan1)):
        expect_shape(name, tensor, (*input.shape[:-1], plan.shape[0]))
    d_before = parts.backward(grad, values2, before, activation, plan2)
    return (
        INPUT_GRAD(d_before, values1, plan1),
        *parts.values_grad(d_before, input, plan1),
        *parts.values_grad(grad, hidden, plan2),
    )


def _fake_grads(*flat: Any) -> tuple[Tensor, ...]:
    grad, input, _, _, values1, values2, _, plan1, plan2 = _whole_grads(*flat)
    d_input, d_values1, d_values2 = (t.new_empty(t.shape) for t in (input, values1, values2))
    d_bias1, d_bias2 = (grad.new_empty(plan.bias_shape) for plan in (plan1, plan2))
    return d_input, d_values1, d_bias1, d_values2, d_bias2


def _guarded(kernel: Callable[..., Any], whole: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    """The kernel behind checks of the two indices at the end of what the dispatcher brings."""
    swapped = guarded(lambda *flat: kernel(*whole(*flat[:-10], *flat[-5:], *flat[-10:-5])))
    return guarded(lambda *flat: swapped(*flat[:-10], *flat[-5:], *flat[-10:-5]))


define(
    "sparse_mlp(Tensor input, Tensor values1, Tensor bias1, Tensor values2, Tensor bias2, int activation, "
    f"Tensor? probe1, Tensor? probe2, {_INDICES}) -> (Tensor, Tensor, Tensor)",
    _guarded(partial(_forward, SEPARATE), _whole),
    _fake,
    parts=_flat,
)
define(
    "sparse_mlp_grads(Tensor grad, Tensor input, Tensor before, Tensor hidden, Tensor values1, Tensor values2, "
    f"int activation, {_INDICES}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _guarded(partial(_grads, SEPARATE), _whole_grads),
    _fake_grads,
    parts=_flat,
)


def _implement(device_type: Literal["cpu", "cuda"], parts: Parts) -> None:
    forward, grads = partial(_forward, parts), partial(_grads, parts)
    implement("sparse_mlp", device_type, forward, dispatched=_guarded(forward, _whole))
    implement("sparse_mlp_grads", device_type, grads, dispatched=_guarded(grads, _whole_grads))


_implement("cuda", gpu.FUSED)
if native is not None:
    _implement("cpu", cpu.FUSED)


def pays(input: Tensor, plan1: Plan, plan2: Plan, activation: Gelu) -> bool:
    """Whether kernels gain by doing both products at once, of an input in this dtype or the one of autocast.

    A compiler asks for no choices: on a CPU it does GELU itself, on a GPU the operator chooses when it runs.
    """
    if torch.compiler.is_compiling():
        return input.is_cuda and gpu.may_pay(plan1.block, plan2.block)
    if input.is_cuda:
        return gpu.pays(input, plan1, plan2)
    return native is not None and input.is_cpu and cpu.pays(input, plan1, plan2, activation)


def sparse_mlp_reference(
    input: Tensor, values1: Tensor, bias1: Tensor, values2: Tensor, bias2: Tensor, activation: int,
    probe1: Tensor | None, probe2: Tensor | None, plan1: Plan, plan2: Plan,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The specification, in torch's own differentiable operators; results as those of the operator."""
    before = sparse_linear_reference(input, values1, bias1, probe1, plan1)
    hidden = F.gelu(before, approximate=APPROXIMATE[activation])
    return sparse_linear_reference(hidden, values2, bias2, probe2, plan2), before, hidden


_NO_GRADIENTS = (None,) * 10  # one for each argument of the operator


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, values1, bias1, values2, bias2, ctx.activation, probe1, probe2, *ctx.plans = inputs
    ctx.save_for_backward(input, *output[1:], values1, values2, bias1, bias2, probe1, probe2)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # which would be zeros as large as the hidden features for these


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return _NO_GRADIENTS
    for plan in ctx.plans:
        plan.check_unchanged()
    if any(ctx.needs_input_grad[6:8]):
        return _dense_backward(ctx, grad)
    found = call("sparse_mlp_grads", grad, *ctx.saved_tensors[:5], ctx.activation, *ctx.plans)
    return *found, *(None,) * 5


def _dense_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """With the dense gradients that a topology update wants, of which those of the values are a part."""
    input, before, hidden, values1, values2, *_ = ctx.saved_tensors
    plan1, plan2 = ctx.plans
    d_before = SEPARATE.backward(grad, values2, before, ctx.activation, plan2)
    d_probes = call("sparse_linear_dense_grad", d_before, input), call("sparse_linear_dense_grad", grad, hidden)
    d_values1, d_values2 = (
        gather_values(d_probe, plan.block, *plan.index[:2]) for d_probe, plan in zip(d_probes, ctx.plans, strict=True)
    )
    needed = (d_probe if needs else None for d_probe, needs in zip(d_probes, ctx.needs_input_grad[6:8], strict=True))
    d_input = INPUT_GRAD(d_before, values1, plan1)
    return d_input, d_values1, bias_grad(d_before), d_values2, bias_grad(grad), None, *needed, None, None


def _differentiable_backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return _NO_GRADIENTS
    input, _, _, values1, values2, bias1, bias2, probe1, probe2 = ctx.saved_tensors

    def product(*given: Any) -> Tensor:
        inputs = (*given[:5], ctx.activation, *given[5:], *ctx.plans)
        return sparse_mlp_reference(*inputs)[0]

    operands = (input, values1, bias1, values2, bias2, probe1, probe2)
    needed = (*ctx.needs_input_grad[:5], *ctx.needs_input_grad[6:8])
    found = differentiable_gradients(product, operands, needed, grad)
    return *found[:5], None, *found[5:], None, None


_sparse_mlp = register_autograd(
    "sparse_moon::sparse_mlp",
    _backward,
    setup_context=_setup_context,
    reference=sparse_mlp_reference,
    differentiable_backward=_differentiable_backward,
    whole=_whole,
)


def sparse_mlp(
    input: Tensor,
    values1: Tensor,
    bias1: Tensor,
    plan1: Plan,
    values2: Tensor,
    bias2: Tensor,
    plan2: Plan,
    activation: Gelu,
    *,
    probe1: Tensor | None = None,
    probe2: Tensor | None = None,
) -> Tensor:
    """``gelu(input W1^T + bias1) W2^T + bias2`` with sparse weights; fused where kernels run, on a CPU or a GPU.

    Args:
        input: (..., I), floating point.
        values1, bias1, plan1: of the first product, (H, I), as :func:`sparse_moon.ops.sparse_linear` takes them.
        values2, bias2, plan2: of the second one, (O, H).
        activation: ``"gelu"``, or ``"gelu_tanh"``, what torch calls ``approximate="tanh"``.
        probe1, probe2: as the ``probe`` of :func:`sparse_moon.ops.sparse_linear`, for dense gradients of the weights.

    Returns:
        (..., O) in the dtype of ``input`` (cast under autocast). All gradients are computed, wanted or not.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    operands = to_autocast_dtype(input.device.type, input, values1, bias1, values2, bias2)
    output: Tensor = _sparse_mlp(*operands, NAMES.index(activation), probe1, probe2, plan1, plan2)[0]
    return output
