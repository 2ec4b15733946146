"""Operators that take a :class:`~sparse_moon.ops.plan.Plan`, which the dispatcher knows by its parts only."""

from collections.abc import Callable, Sequence
from functools import partial
from types import CodeType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sparse_moon.ops import choice, registry
from sparse_moon.ops.check_index import guarded
from sparse_moon.ops.dense_weight import forget_weight, give_back, saved_weight
from sparse_moon.ops.index import block_of, check_block, check_values
from sparse_moon.ops.masked_dense import gather_values
from sparse_moon.ops.plan import Geometry, Plan, index_state, is_plain
from sparse_moon.ops.recompute import itself, keep

_PLANS, _MOST_PLANS = "_sparse_moon_plans", 4

GEOMETRY_SCHEMA = "int[] weight_shape, int[] stride, int[] padding, int[] dilation, int groups"
INDEX_SCHEMA = "Tensor row_ptr, Tensor col, Tensor t_ptr, Tensor t_row, Tensor t_perm"


def parts_of(plan: Plan) -> tuple[Any, ...]:
    """The plan as operators have it at the end of their arguments: its geometry, flat, then its index."""
    return (*plan.geometry, *plan.index) if plan.geometry else plan.index


class _Plans(dict[Any, Plan]):
    """What a tensor does not take along into copies and files, which are read without other types than torch's."""

    def __deepcopy__(self, memo: object) -> "_Plans":
        return _Plans()

    def __reduce__(self) -> tuple[object, ...]:
        return set, ()


def plan_of(parts: tuple[Any, ...], block: tuple[int, ...]) -> Plan:
    """Inverse of :func:`parts_of`. An index that stays as it is keeps its plans, and what they have made ready."""
    row_ptr, col, t_ptr, t_row, t_perm = parts[-5:]
    index = row_ptr, col, t_ptr, t_row, t_perm
    key = (block[0], block[1]), Geometry.of(*parts[:5]) if len(parts) > 5 else None
    if not is_plain(col):
        return Plan(index, *key)
    state = index_state(index)
    plans = getattr(col, _PLANS, None)
    if not isinstance(plans, _Plans):
        plans = _Plans()
        setattr(col, _PLANS, plans)
    plan = plans.get(key)
    if plan is None or plan.state != state or any(a is not b for a, b in zip(plan.index, index, strict=True)):
        if len(plans) >= _MOST_PLANS:
            plans.clear()
        plan = plans[key] = Plan(index, *key, state)
    return plan


def flat(*inputs: Any) -> tuple[Any, ...]:
    """Operands and a plan as arguments of a schema that ends with the plan's parts."""
    return *inputs[:-1], *parts_of(inputs[-1])


def flat_values_grad(grad: Tensor, input: Tensor, plan: Plan) -> tuple[Any, ...]:
    """The same for the gradient of the values, where nothing else tells the block."""
    return grad, input, plan.block, *parts_of(plan)


def whole_values_grad(grad: Tensor, input: Tensor, block: list[int], *parts: Any) -> tuple[Any, ...]:
    """Inverse of :func:`flat_values_grad`."""
    check_block(block)
    return grad, input, plan_of(parts, tuple(block))


def whole_grads(grad: Tensor, input: Tensor, values: Tensor, *parts: Any) -> tuple[Any, ...]:
    """Inverse of :func:`flat` for both gradients."""
    check_values(values)
    return grad, input, values, plan_of(parts, block_of(values))


class Product:
    """One pass of a product with a sparse weight: an operator, by its name, of operands and a plan.

    Calling it runs the kernel of the device, past the dispatcher where nobody else may want to see the operator.

    Args:
        schema: of the operator, with the plan's parts.
        dense: from operands and plan to results, on any device: a dense product.
        fake: the same for shapes, dtypes and layouts alone.
        check: raises ``ValueError`` for operands that do not fit the plan, where others than this package bring them.
        parts, whole: from operands and plan to the schema's arguments, and back.
    """

    def __init__(
        self,
        schema: str,
        dense: Callable[..., Any],
        fake: Callable[..., Any],
        check: Callable[..., None],
        *,
        parts: Callable[..., tuple[Any, ...]],
        whole: Callable[..., tuple[Any, ...]],
    ) -> None:
        self.check, self.parts, self.whole = check, parts, whole
        self.qualified = registry.define(schema, self._guarded(dense), lambda *flat: fake(*whole(*flat)), parts=parts)
        self.name = self.qualified.removeprefix("sparse_moon::")
        self._operator = getattr(torch.ops.sparse_moon, self.name)

    def __call__(self, *inputs: Any) -> Any:
        kernel = None if torch.is_grad_enabled() else registry.direct_kernel(self.name, inputs)
        return kernel(*inputs) if kernel else self._operator(*self.parts(*inputs))

    def implement(self, device_type: Literal["cpu", "cuda"], kernel: Callable[..., Any]) -> None:
        """Use this kernel, of operands and plan, on this type of device."""
        registry.implement(self.name, device_type, kernel, dispatched=self._guarded(kernel))

    def _guarded(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*flat: Any) -> Any:
            inputs = self.whole(*flat)
            self.check(*inputs)
            return kernel(*inputs)

        return guarded(run)


def expect_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raise ``ValueError`` for another shape."""
    if tensor.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


class Passes(NamedTuple):
    """What a product is made of; operands are those of the whole product, gradients first."""

    forward: Product
    grads: Product
    """Kernels take one argument more, True, where the gradient of the bias is to be a third result."""
    input_grad: Callable[[Tensor, Sequence[int], Tensor, Plan], Tensor]
    """From the gradient of the output, shape of the input, values and plan."""
    values_grad: Product
    dense_grad: Callable[[Tensor, Tensor, Plan], Tensor]
    """From the gradient of the output, input and plan to the gradient of the dense weight."""
    bias_grad: Callable[[Tensor], Tensor]
    check_input: Callable[[Sequence[int], Plan], None]
    """Raises ``ValueError`` for a shape of the input that does not fit the plan."""
    reference: Callable[..., Tensor]
    """The product by differentiable operators of torch."""


def differentiable(passes: Passes, *, recomputes: bool = False) -> Callable[..., Tensor]:
    """A product that can be differentiated, as a function of input, values, bias, probe and plan.

    A tiny layer takes as long as the Python around its kernels, each line of which is met once in a pass and waits for
    memory. So either pass is one function, which asks everything once, and takes no lists apart: three calls and
    assignments with a star took 4 us.

    Args:
        recomputes: keep what the input is made of, where that says how (:mod:`sparse_moon.ops.recompute`).
    """
    forward, grads, input_grad, values_grad, dense_grad, bias_grad, check_input, reference = passes
    name, grads_name = forward.name, grads.name

    def run_forward(
        ctx: Any, input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, plan: Plan,
        run: Callable[..., Tensor], grads_kernel: Callable[..., Any] | None = None,  # the dispatcher's call has none
    ) -> Tensor:  # fmt: skip
        forget_weight(plan)
        output = run(input, values, bias, probe, plan)
        kept, make_input = keep(input) if recomputes else ((input,), itself)
        weight, needs = saved_weight(values, plan), ctx.needs_input_grad
        if needs[0] and needs[1] and make_input is itself:
            ctx.save_for_backward(values, probe, weight, input)
        else:  # of a frozen layer, or of one whose input has no gradient, not all; others may write to the rest
            if not (needs[1] or needs[3]):
                kept, make_input = (None,), itself
            ctx.input_shape = input.shape
            ctx.save_for_backward(values if needs[0] else None, probe, weight if needs[0] else None, *kept)
        ctx.made = plan, make_input, grads_kernel, choice.current_backend() if choice.open_blocks() else "auto"
        return output

    def run_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan, make_input, kernel, backend = ctx.made
        if backend != "auto" and not choice.open_blocks():
            with choice.use_backend(backend):
                return run_backward(ctx, grad)
        saved = ctx.saved_tensors
        values, weight = saved[0], saved[2]
        plan.check_unchanged()
        unwatched = registry.unwatched()
        # gradients are recorded in a backward pass only if it is to be differentiated
        if torch.is_grad_enabled() or registry.is_batch(grad) or not (unwatched or not registry.transformed()):
            return differentiable_backward(ctx, grad)
        input = saved[3] if make_input is itself else make_input(*saved[3:])
        needs_input, needs_values, needs_bias, needs_probe = ctx.needs_input_grad[:4]
        give_back(weight if needs_input else None, plan)
        d_input = d_values = d_bias = d_probe = None
        if needs_input and needs_values and not needs_probe:
            plain = unwatched and type(grad) is Tensor and registry.in_memory(grad)
            if kernel is None or not plain or values.shape != plan.values_shape:
                d_input, d_values = grads(grad, input, values, plan)
            elif needs_bias:
                d_input, d_values, d_bias = kernel(grad, input, values, plan, True)
            else:
                d_input, d_values = kernel(grad, input, values, plan)
        else:
            if needs_input:
                d_input = input_grad(grad, ctx.input_shape if input is None else input.shape, values, plan)
            if needs_probe:  # a growth step: the dense gradient exists anyway, so the values' gradient is read from it
                d_probe = dense_grad(grad, input, plan)
                d_values = gather_values(d_probe, plan.block, *plan.index[:2]) if needs_values else None
            elif needs_values:
                d_values = values_grad(grad, input, plan)
        if weight is not None:
            give_back(None, plan)  # where no dense product has taken it
        if needs_bias and d_bias is None:
            d_bias = bias_grad(grad)
        return d_input, d_values, d_bias, d_probe, None, None, None

    def differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan, make_input, *_ = ctx.made
        values, probe, _, *kept = ctx.saved_tensors
        if make_input is not itself:
            raise RuntimeError("second derivatives need the input of a convolution, which recompute=True does not keep")
        (input,), needed = kept, ctx.needs_input_grad[:4]
        # the gradient of an operand does not depend on its own numbers, and the others are kept
        if input is None:
            input = torch.zeros(ctx.input_shape, dtype=grad.dtype, device=grad.device)
        if values is None:
            values = torch.zeros(plan.values_shape, dtype=grad.dtype, device=grad.device)
        bias = input.new_zeros(plan.bias_shape) if needed[2] else None  # no gradient depends on it
        gradients = registry.differentiable_gradients(
            partial(reference, plan=plan), (input, values, bias, probe), needed, grad
        )
        return *gradients, None, None, None

    _give_own_code(f"{name}_forward", run_forward)
    _give_own_code(f"{name}_backward", run_backward)
    function, dispatched = registry.register_function(
        forward.qualified, run_forward, run_backward, reference=reference, whole=forward.whole
    )

    def product(input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, plan: Plan) -> Tensor:
        if torch._C._is_any_autocast_enabled():
            input, values, bias = registry.to_autocast_dtype(input.device.type, input, values, bias)
        if plan.state is None or input.shape not in plan.inputs:  # traced shapes may be symbols
            check_input(input.shape, plan)
            plan.note_input(input.shape)
        dtype, device = input.dtype, plan.device
        fits = (
            values.shape == plan.values_shape
            and (bias is None or (bias.shape == plan.bias_shape and bias.dtype is dtype and bias.device == device))
            and (probe is None or probe.shape == plan.shape)
            and values.dtype is dtype
            and dtype.is_floating_point
            and input.device == device
            and values.device == device
        )
        if not fits:
            _refuse(input, values, bias, plan, probe)
        if (
            registry.unwatched()
            and registry.PLAIN.issuperset((type(input), type(values), type(bias), type(probe)))
            and registry.in_memory(input) and registry.in_memory(values) and registry.in_memory(bias)
        ):  # fmt: skip
            device_type = "cpu" if input.is_cpu else input.device.type
            kernel = registry.KERNELS.get((name, device_type))
            if kernel is not None and not (choice.open_blocks() and choice.current_backend() == "reference"):
                if torch.is_grad_enabled():
                    grads_kernel = registry.KERNELS.get((grads_name, device_type))
                    return function.apply(input, values, bias, probe, plan, kernel, grads_kernel)
                return kernel(input, values, bias, probe, plan)
        return dispatched(input, values, bias, probe, plan)

    _give_own_code(name, product)
    return product


def _give_own_code(name: str, function: Callable[..., Any]) -> None:
    """A name for profilers, and code that no other product has.

    The interpreter fits code to the types that it meets, which two products that take turns would undo for each other.
    """
    code: CodeType = function.__code__
    function.__code__ = code.replace(co_name=name)


def _refuse(input: Tensor, values: Tensor, bias: Tensor | None, plan: Plan, probe: Tensor | None) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor, got {type(input).__name__}")
    expect_shape("values", values, plan.values_shape)
    if bias is not None:
        expect_shape("bias", bias, plan.bias_shape)
    if probe is not None:
        expect_shape("probe", probe, plan.shape)
    on = [input.device, values.device, plan.device, *([] if bias is None else [bias.device])]
    if len(set(on)) > 1:
        raise ValueError(f"input, values, topology and bias must be on one device, got {', '.join(map(str, on))}")
    dtypes = {t.dtype for t in (input, values, bias) if t is not None}
    raise ValueError(f"input, values and bias must share one floating point dtype, got {dtypes}")
