"""``sparse_linear``: ``y = x W^T + b`` with a block-sparse ``W`` (O, I) held as compact values."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from sparse_moon.ops.check_index import guarded
from sparse_moon.ops.index import blocks_to_matrix, entry_positions
from sparse_moon.ops.library import call, define, differentiable_gradients, register_autograd, to_autocast_dtype
from sparse_moon.ops.masked_dense import block_of, check_block, check_entries, check_values, values_shape

if TYPE_CHECKING:
    from sparse_moon.topology import Topology

INDEX_SCHEMA = "Tensor row_ptr, Tensor col, Tensor t_ptr, Tensor t_row, Tensor t_perm"


def _dense_weight(values: Tensor, index: tuple[Tensor, ...]) -> Tensor:
    row_ptr, col, t_ptr, _, _ = index
    bh, bw = block_of(values)
    shape = ((row_ptr.numel() - 1) * bh, (t_ptr.numel() - 1) * bw)
    return call("scatter_values", values, shape, False, row_ptr, col)


def sparse_linear_reference(
    input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, *index: Tensor
) -> Tensor:
    """The specification, differentiable: scatter the values into a dense weight, then ``F.linear``."""
    row_ptr, col, t_ptr, _, _ = index
    grid = (row_ptr.numel() - 1, t_ptr.numel() - 1)
    weight = blocks_to_matrix(values, entry_positions(row_ptr, col, grid[1]), grid)
    return F.linear(input, weight if probe is None else weight + probe, bias)


def _forward(input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, *index: Tensor) -> Tensor:
    return F.linear(input, _dense_weight(values, index), bias)


def _input_grad(grad: Tensor, values: Tensor, *index: Tensor) -> Tensor:
    return grad @ _dense_weight(values, index)


def _dense_grad(grad: Tensor, input: Tensor) -> Tensor:
    return _rows(grad).t() @ _rows(input)


def _rows(tensor: Tensor) -> Tensor:
    """(..., I) as (N, I); of no features -1 rows could be any number."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _values_grad(grad: Tensor, input: Tensor, block: Sequence[int], *index: Tensor) -> Tensor:
    return call("gather_values", _dense_grad(grad, input), block, *index[:2])


def _fake_forward(input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, *index: Tensor) -> Tensor:
    rows = (index[0].numel() - 1) * block_of(values)[0]
    return input.new_empty((*input.shape[:-1], rows))


def _fake_input_grad(grad: Tensor, values: Tensor, *index: Tensor) -> Tensor:
    cols = (index[2].numel() - 1) * block_of(values)[1]
    return grad.new_empty((*grad.shape[:-1], cols))


def _fake_dense_grad(grad: Tensor, input: Tensor) -> Tensor:
    return input.new_empty((grad.shape[-1], input.shape[-1]))


def _fake_values_grad(grad: Tensor, input: Tensor, block: Sequence[int], *index: Tensor) -> Tensor:
    return input.new_empty(values_shape(index[1], block))


def expect_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raise ``ValueError`` for another shape."""
    if tensor.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def weight_of(values: Tensor, index: tuple[Tensor, ...]) -> tuple[int, int]:
    """Shape of the matrix of these values; ``ValueError`` where they do not belong to the index."""
    check_values(values)
    check_entries(values, index[1])
    return _matrix_of(block_of(values), index)


def _matrix_of(block: Sequence[int], index: tuple[Tensor, ...]) -> tuple[int, int]:
    check_block(block)
    return (index[0].numel() - 1) * block[0], (index[2].numel() - 1) * block[1]


def _check_forward(input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, *index: Tensor) -> None:
    rows, cols = weight_of(values, index)
    expect_shape("input", input, (*input.shape[:-1], cols))
    if bias is not None:
        expect_shape("bias", bias, (rows,))


def _check_input_grad(grad: Tensor, values: Tensor, *index: Tensor) -> None:
    expect_shape("grad", grad, (*grad.shape[:-1], weight_of(values, index)[0]))


def _check_values_grad(grad: Tensor, input: Tensor, block: Sequence[int], *index: Tensor) -> None:
    rows, cols = _matrix_of(block, index)
    expect_shape("input", input, (*input.shape[:-1], cols))
    expect_shape("grad", grad, (*input.shape[:-1], rows))


CHECKS: dict[str, Callable[..., None]] = {
    "sparse_linear": _check_forward,
    "sparse_linear_input_grad": _check_input_grad,
    "sparse_linear_values_grad": _check_values_grad,
}
"""What the operators ask of the shapes of their arguments where others than this package call them."""

_OP = define(f"sparse_linear(Tensor input, Tensor values, Tensor? bias, Tensor? probe, {INDEX_SCHEMA}) -> Tensor",
             guarded(_forward, _check_forward), _fake_forward)  # fmt: skip
define(f"sparse_linear_input_grad(Tensor grad, Tensor values, {INDEX_SCHEMA}) -> Tensor",
       guarded(_input_grad, _check_input_grad), _fake_input_grad)  # fmt: skip
define("sparse_linear_dense_grad(Tensor grad, Tensor input) -> Tensor", _dense_grad, _fake_dense_grad)
define(f"sparse_linear_values_grad(Tensor grad, Tensor input, int[] block, {INDEX_SCHEMA}) -> Tensor",
       guarded(_values_grad, _check_values_grad), _fake_values_grad)  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, values, _, probe, *index = inputs
    ctx.save_for_backward(input, values, probe, *index)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, values, _, *index = ctx.saved_tensors
    needs_input, needs_values, needs_bias, needs_probe = ctx.needs_input_grad[:4]
    d_input = call("sparse_linear_input_grad", grad, values, *index) if needs_input else None
    d_values = d_probe = None
    if needs_probe:  # a growth step: the dense gradient exists anyway, so the values' gradient is read from it
        d_probe = call("sparse_linear_dense_grad", grad, input)
        d_values = call("gather_values", d_probe, block_of(values), *index[:2]) if needs_values else None
    elif needs_values:
        d_values = call("sparse_linear_values_grad", grad, input, block_of(values), *index)
    d_bias = _rows(grad).sum(0) if needs_bias else None
    return d_input, d_values, d_bias, d_probe, None, None, None, None, None


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, values, probe, *index = ctx.saved_tensors
    needed = ctx.needs_input_grad[:4]
    bias = input.new_zeros(grad.shape[-1]) if needed[2] else None  # no gradient depends on it
    gradients = differentiable_gradients(
        lambda *operands: sparse_linear_reference(*operands, *index), (input, values, bias, probe), needed, grad
    )
    return *gradients, *[None] * 5


_sparse_linear = register_autograd(
    _OP, _backward, setup_context=_setup_context, reference=sparse_linear_reference,
    differentiable_backward=_differentiable_backward,
)  # fmt: skip


def sparse_linear(
    input: Tensor, values: Tensor, topology: "Topology", bias: Tensor | None = None, *, probe: Tensor | None = None
) -> Tensor:
    """``input W^T + bias`` with the sparse weight ``W`` (O, I) given by ``values`` and ``topology``.

    Args:
        input: (..., I), floating point.
        values: compact weight values of shape ``topology.values_shape``, dtype of ``input`` (cast under autocast).
        topology: which blocks of the (O, I) matrix exist.
        bias: (O,) or None.
        probe: a tensor of shape (O, I) that requires grad and receives the dense weight gradient; its own numbers
            are never read, so an expanded scalar does (see :mod:`sparse_moon.algorithms`).

    Returns:
        (..., O) in the dtype of ``input``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    check_operands(input, values, topology, bias, probe)
    if input.dim() == 0 or input.shape[-1] != topology.shape[1]:
        raise ValueError(f"input must have {topology.shape[1]} features last, got shape {tuple(input.shape)}")
    input, values, bias = to_autocast_dtype(input.device.type, input, values, bias)  # type: ignore[assignment]
    check_dtypes(input, values, bias)
    return _sparse_linear(input, values, bias, probe, *topology.index)


def check_operands(
    input: Tensor, values: Tensor, topology: "Topology", bias: Tensor | None, probe: Tensor | None
) -> None:
    """Raise ``ValueError`` for shapes or devices that no sparse product takes."""
    if values.shape != topology.values_shape:
        raise ValueError(f"values must have shape {topology.values_shape}, got {tuple(values.shape)}")
    if bias is not None and bias.shape != (topology.shape[0],):
        raise ValueError(f"bias must have shape ({topology.shape[0]},), got {tuple(bias.shape)}")
    if probe is not None and probe.shape != topology.shape:
        raise ValueError(f"probe must have shape {topology.shape}, got {tuple(probe.shape)}")
    if not input.device == values.device == topology.col.device:
        devices = f"{input.device}, {values.device}, {topology.col.device}"
        raise ValueError(f"input, values and topology must be on one device, got {devices}")


def check_dtypes(input: Tensor, values: Tensor, bias: Tensor | None) -> None:
    """Raise ``ValueError`` unless all have one floating point dtype."""
    dtypes = {t.dtype for t in (input, values, bias) if t is not None}
    if len(dtypes) > 1 or not input.is_floating_point():
        raise ValueError(f"input, values and bias must share one floating point dtype, got {dtypes}")
