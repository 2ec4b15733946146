"""Operators that take a :class:`~sparse_moon.ops.plan.Plan`, which the dispatcher knows by its parts only."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sparse_moon.ops import registry
from sparse_moon.ops.check_index import guarded
from sparse_moon.ops.index import block_of, check_block, check_values
from sparse_moon.ops.plan import Geometry, Plan, index_state, is_plain

GEOMETRY_SCHEMA = "int[] weight_shape, int[] stride, int[] padding, int[] dilation, int groups"
INDEX_SCHEMA = "Tensor row_ptr, Tensor col, Tensor t_ptr, Tensor t_row, Tensor t_perm"


def parts_of(plan: Plan) -> tuple[Any, ...]:
    """The plan as operators have it at the end of their arguments: its geometry, flat, then its index."""
    return (*plan.geometry, *plan.index) if plan.geometry else plan.index


def plan_of(parts: tuple[Any, ...], block: tuple[int, ...]) -> Plan:
    """Inverse of :func:`parts_of`."""
    row_ptr, col, t_ptr, t_row, t_perm = parts[-5:]
    index = row_ptr, col, t_ptr, t_row, t_perm
    geometry = Geometry.of(*parts[:5]) if len(parts) > 5 else None
    return Plan(index, (block[0], block[1]), geometry, index_state(index) if is_plain(col) else None)


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


def checked(
    input: Tensor, values: Tensor, bias: Tensor | None, plan: Plan, probe: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, values and bias in the dtype that autocast asks for.

    Raises:
        ValueError: shapes, dtypes or devices that no sparse product takes.
    """
    if torch._C._is_any_autocast_enabled():
        input, values, bias = registry.to_autocast_dtype(input.device.type, input, values, bias)
    dtype, device = input.dtype, plan.device
    fits = (
        values.shape == plan.values_shape
        and (bias is None or (bias.shape == plan.bias_shape and bias.dtype is dtype))
        and (probe is None or probe.shape == plan.shape)
        and values.dtype is dtype
        and dtype.is_floating_point
        and input.device == device
        and values.device == device
    )
    if not fits:
        _refuse(input, values, bias, plan, probe)
    return input, values, bias


def _refuse(input: Tensor, values: Tensor, bias: Tensor | None, plan: Plan, probe: Tensor | None) -> None:
    expect_shape("values", values, plan.values_shape)
    if bias is not None:
        expect_shape("bias", bias, plan.bias_shape)
    if probe is not None:
        expect_shape("probe", probe, plan.shape)
    if not input.device == values.device == plan.device:
        devices = f"{input.device}, {values.device}, {plan.device}"
        raise ValueError(f"input, values and topology must be on one device, got {devices}")
    dtypes = {t.dtype for t in (input, values, bias) if t is not None}
    raise ValueError(f"input, values and bias must share one floating point dtype, got {dtypes}")
