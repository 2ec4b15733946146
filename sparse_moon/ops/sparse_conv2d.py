"""``sparse_conv2d``: a 2-d convolution with a block-sparse weight (O, C/groups, kh, kw) held as compact values."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_moon.ops.check_index import guarded
from sparse_moon.ops.index import blocks_to_matrix, entry_positions, matrix_shape, matrix_to_weight, weight_to_matrix
from sparse_moon.ops.library import behind, call, define, differentiable_gradients, register_autograd, to_autocast_dtype
from sparse_moon.ops.masked_dense import block_of, check_block, values_shape
from sparse_moon.ops.recompute import itself, keep
from sparse_moon.ops.sparse_linear import INDEX_SCHEMA, check_dtypes, check_operands, expect_shape, weight_of

if TYPE_CHECKING:
    from sparse_moon.topology import Topology

GEOMETRY_SCHEMA = "int[] weight_shape, int[] stride, int[] padding, int[] dilation, int groups"

# Activations that the dense gradient is computed from at a time on the CPU.
_PART_BYTES = 2**25


class Geometry(NamedTuple):
    """What a convolution needs to know besides its operands; flat in the operators' signatures."""

    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def output_size(self, input_shape: Sequence[int]) -> tuple[int, int]:
        """Height and width of the output plane."""
        h, w = (
            (size + 2 * self.padding[i] - self.dilation[i] * (self.weight_shape[2 + i] - 1) - 1) // self.stride[i] + 1
            for i, size in enumerate(input_shape[2:])
        )
        return h, w


def _split(spec: tuple[Any, ...]) -> tuple[Geometry, tuple[Tensor, ...]]:
    weight_shape, stride, padding, dilation, groups = spec[:5]
    return Geometry(tuple(weight_shape), tuple(stride), tuple(padding), tuple(dilation), groups), spec[5:]


def memory_format(tensor: Tensor) -> torch.memory_format:
    """channels_last for a tensor that is only that, contiguous otherwise: the layout that results follow."""
    channels_last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _dense_weight(values: Tensor, geometry: Geometry, index: tuple[Tensor, ...], activation: Tensor) -> Tensor:
    channels_last = memory_format(activation) == torch.channels_last
    return call("scatter_values", values, geometry.weight_shape, channels_last, *index[:2])


def sparse_conv2d_reference(
    input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, *spec: Any
) -> Tensor:
    """The specification, differentiable: scatter the values into a dense weight, then ``F.conv2d``.

    ``spec`` is a :class:`Geometry`, flat, then the index tensors.
    """
    geometry, (row_ptr, col, t_ptr, _, _) = _split(spec)
    grid = (row_ptr.numel() - 1, t_ptr.numel() - 1)
    matrix = blocks_to_matrix(values, entry_positions(row_ptr, col, grid[1]), grid)
    matrix = matrix if probe is None else matrix + probe
    weight = matrix_to_weight(matrix, tuple(geometry.weight_shape), block_of(values)[1])
    return F.conv2d(input, weight, bias, *geometry[1:])


def _forward(input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, *spec: Any) -> Tensor:
    geometry, index = _split(spec)
    output = F.conv2d(input, _dense_weight(values, geometry, index, input), bias, *geometry[1:])
    return output.contiguous(memory_format=memory_format(input))


def _convolution_backward(
    grad: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, input_grad: bool, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """Those of the two gradients that are asked for.

    ``torch.nn.grad`` would stand an expanded number in for the operand that is not needed, whose layout then costs
    transpositions: 35 ms in place of 15 for both gradients of a 1 x 1 convolution in channels_last (64 to 256 channels,
    16 images of 32 x 32, one Zen 3 core).
    """
    _, stride, padding, dilation, groups = geometry
    mask = [input_grad, weight_grad, False]
    d_input, d_weight, _ = torch.ops.aten.convolution_backward(
        grad, input, weight, None, stride, padding, dilation, False, (0, 0), groups, mask
    )
    return d_input, d_weight


def _stand_in(shape: Sequence[int], grad: Tensor) -> Tensor:
    """For an operand whose numbers are not needed: memory that nothing touches, in the gradient's layout."""
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format(grad))


def _input_grad(grad: Tensor, values: Tensor, input_shape: Sequence[int], *spec: Any) -> Tensor:
    geometry, index = _split(spec)
    weight = _dense_weight(values, geometry, index, grad)
    result, _ = _convolution_backward(grad, _stand_in(input_shape, grad), weight, geometry, True, False)
    return result.contiguous(memory_format=memory_format(grad))


def _weight_grad(grad: Tensor, input: Tensor, geometry: Geometry) -> Tensor:
    return _convolution_backward(grad, input, _stand_in(geometry.weight_shape, grad), geometry, False, True)[1]


def _dense_grad(grad: Tensor, input: Tensor, block_width: int, *spec: Any) -> Tensor:
    # The CPU library copies what it is given into its own layout, at training's peak of memory: parts of the batch.
    parts = max(math.ceil((grad.nbytes + input.nbytes) / _PART_BYTES), 1) if grad.device.type == "cpu" else 1
    geometry, _ = _split(spec)
    pairs = zip(grad.chunk(parts), input.chunk(parts), strict=True)
    summands = (_weight_grad(part_grad, part, geometry) for part_grad, part in pairs)
    total = next(summands)
    for more in summands:
        total += more
    return weight_to_matrix(total, block_width).contiguous()


def _values_grad(grad: Tensor, input: Tensor, block: Sequence[int], *spec: Any) -> Tensor:
    geometry, index = _split(spec)
    return call("gather_values", call("sparse_conv2d_dense_grad", grad, input, block[1], *geometry), block, *index[:2])


def _fake_forward(input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, *spec: Any) -> Tensor:
    geometry, _ = _split(spec)
    shape = (input.shape[0], geometry.weight_shape[0], *geometry.output_size(input.shape))
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input))


def _fake_input_grad(grad: Tensor, values: Tensor, input_shape: Sequence[int], *spec: Any) -> Tensor:
    return torch.empty(input_shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format(grad))


def _fake_dense_grad(grad: Tensor, input: Tensor, block_width: int, *geometry: Any) -> Tensor:
    return input.new_empty(matrix_shape(tuple(geometry[0])))


def _grads(grad: Tensor, input: Tensor, values: Tensor, *spec: Any) -> tuple[Tensor, Tensor]:
    input_grad = call("sparse_conv2d_input_grad", grad, values, input.shape, *spec)
    return input_grad, call("sparse_conv2d_values_grad", grad, input, block_of(values), *spec)


def _dense_grads(grad: Tensor, input: Tensor, values: Tensor, *spec: Any) -> tuple[Tensor, Tensor]:
    """Both gradients by one dense product."""
    geometry, index = _split(spec)
    weight = _dense_weight(values, geometry, index, grad)
    input_grad, weight_grad = _convolution_backward(grad, input, weight, geometry, True, True)
    values_grad = call("gather_values", weight_grad, block_of(values), *index[:2])
    return input_grad.contiguous(memory_format=memory_format(grad)), values_grad


def _fake_values_grad(grad: Tensor, input: Tensor, block: Sequence[int], *spec: Any) -> Tensor:
    return input.new_empty(values_shape(spec[6], block))


def _fake_grads(grad: Tensor, input: Tensor, values: Tensor, *spec: Any) -> tuple[Tensor, Tensor]:
    input_grad = _fake_input_grad(grad, values, list(input.shape), *spec)
    return input_grad, _fake_values_grad(grad, input, list(block_of(values)), *spec)


def check_geometry(input_shape: Sequence[int], geometry: Geometry) -> None:
    """Raise ``ValueError`` for a convolution that torch would not compute either."""
    weight_shape, stride, padding, dilation, groups = geometry
    if len(weight_shape) != 4 or min(weight_shape[2:]) < 1 or min(weight_shape[:2]) < 0:
        raise ValueError(f"weight shape must be (O, C/groups, kh, kw), got {weight_shape}")
    if groups < 1 or weight_shape[0] % groups:
        raise ValueError(f"groups must divide {weight_shape[0]} output channels, got {groups}")
    if len(input_shape) != 4 or input_shape[1] != weight_shape[1] * groups or min(input_shape) < 0:
        raise ValueError(f"input must be (N, {weight_shape[1] * groups}, H, W), got shape {tuple(input_shape)}")
    if {len(stride), len(padding), len(dilation)} != {2} or min(*stride, *dilation) < 1 or min(padding) < 0:
        raise ValueError(f"invalid stride {stride}, padding {padding} or dilation {dilation}")
    if min(geometry.output_size(input_shape)) < 1:
        raise ValueError(f"a {weight_shape[2]} x {weight_shape[3]} kernel does not fit input {tuple(input_shape)}")


def _check(spec: tuple[Any, ...], block: Sequence[int], input_shape: Sequence[int], grad: Tensor | None) -> Geometry:
    geometry, index = _split(spec)
    check_geometry(input_shape, geometry)
    check_block(block)
    channels = geometry.weight_shape[:2]
    if channels[0] % block[0] or channels[1] % block[1]:
        raise ValueError(f"block {tuple(block)} does not divide the channels of a weight {geometry.weight_shape}")
    if index:
        shape = ((index[0].numel() - 1) * block[0], (index[2].numel() - 1) * block[1])
        if shape != matrix_shape(geometry.weight_shape):
            raise ValueError(f"weight shape {geometry.weight_shape} does not fit an index of a {shape} matrix")
    if grad is not None:
        expect_shape("grad", grad, (input_shape[0], channels[0], *geometry.output_size(input_shape)))
    return geometry


def _check_forward(input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, *spec: Any) -> None:
    weight_of(values, spec[5:])
    geometry = _check(spec, block_of(values), input.shape, None)
    if bias is not None:
        expect_shape("bias", bias, geometry.weight_shape[:1])


def _check_input_grad(grad: Tensor, values: Tensor, input_shape: Sequence[int], *spec: Any) -> None:
    weight_of(values, spec[5:])
    _check(spec, block_of(values), input_shape, grad)


def _check_values_grad(grad: Tensor, input: Tensor, block: Sequence[int], *spec: Any) -> None:
    _check(spec, block, input.shape, grad)


def _check_grads(grad: Tensor, input: Tensor, values: Tensor, *spec: Any) -> None:
    _check_input_grad(grad, values, input.shape, *spec)


def check_dense_grad(grad: Tensor, input: Tensor, block_width: int, *geometry: Any) -> None:
    """As :data:`CHECKS`, for the operator without an index."""
    _check(geometry, (1, block_width), input.shape, grad)


CHECKS: dict[str, Callable[..., None]] = {
    "sparse_conv2d": _check_forward,
    "sparse_conv2d_input_grad": _check_input_grad,
    "sparse_conv2d_values_grad": _check_values_grad,
    "sparse_conv2d_grads": _check_grads,
}
"""What the operators ask of the shapes of their arguments where others than this package call them."""

_SPEC = f"{GEOMETRY_SCHEMA}, {INDEX_SCHEMA}"
_OP = define(f"sparse_conv2d(Tensor input, Tensor values, Tensor? bias, Tensor? probe, {_SPEC}) -> Tensor",
             guarded(_forward, _check_forward), _fake_forward)  # fmt: skip
define(f"sparse_conv2d_input_grad(Tensor grad, Tensor values, int[] input_shape, {_SPEC}) -> Tensor",
       guarded(_input_grad, _check_input_grad), _fake_input_grad)  # fmt: skip
define(f"sparse_conv2d_dense_grad(Tensor grad, Tensor input, int block_width, {GEOMETRY_SCHEMA}) -> Tensor",
       behind(check_dense_grad, _dense_grad), _fake_dense_grad)  # fmt: skip
define(f"sparse_conv2d_values_grad(Tensor grad, Tensor input, int[] block, {_SPEC}) -> Tensor",
       guarded(_values_grad, _check_values_grad), _fake_values_grad)  # fmt: skip
define(f"sparse_conv2d_grads(Tensor grad, Tensor input, Tensor values, {_SPEC}) -> (Tensor, Tensor)",
       guarded(_grads, _check_grads), _fake_grads)  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, values, _, probe, *spec = inputs
    ctx.geometry, index = _split(tuple(spec))
    kept, ctx.make_input = keep(input)
    ctx.save_for_backward(values, probe, *index, *kept)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, _, *rest = ctx.saved_tensors
    index, geometry = rest[:5], ctx.geometry
    input = ctx.make_input(*rest[5:])
    needs_input, needs_values, needs_bias, needs_probe = ctx.needs_input_grad[:4]
    block = block_of(values)
    d_input = d_values = d_probe = None
    if needs_input and needs_values and not needs_probe:
        d_input, d_values = call("sparse_conv2d_grads", grad, input, values, *geometry, *index)
    else:
        if needs_input:
            d_input = call("sparse_conv2d_input_grad", grad, values, input.shape, *geometry, *index)
        if needs_probe:  # a growth step: the dense gradient exists anyway, so the values' gradient is read from it
            d_probe = call("sparse_conv2d_dense_grad", grad, input, block[1], *geometry)
            d_values = call("gather_values", d_probe, block, *index[:2]) if needs_values else None
        elif needs_values:
            d_values = call("sparse_conv2d_values_grad", grad, input, block, *geometry, *index)
    d_bias = grad.sum((0, 2, 3)) if needs_bias else None
    return d_input, d_values, d_bias, d_probe, *[None] * 10


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, probe, *rest = ctx.saved_tensors
    if ctx.make_input is not itself:
        raise RuntimeError("second derivatives need the input of a convolution, which recompute=True does not keep")
    index, geometry, (input,), needed = rest[:5], ctx.geometry, rest[5:], ctx.needs_input_grad[:4]
    bias = input.new_zeros(grad.shape[1]) if needed[2] else None  # no gradient depends on it
    gradients = differentiable_gradients(
        lambda *operands: sparse_conv2d_reference(*operands, *geometry, *index),
        (input, values, bias, probe), needed, grad,
    )  # fmt: skip
    return *gradients, *[None] * 10


_sparse_conv2d = register_autograd(
    _OP, _backward, setup_context=_setup_context, reference=sparse_conv2d_reference,
    differentiable_backward=_differentiable_backward,
)  # fmt: skip


def sparse_conv2d(
    input: Tensor,
    values: Tensor,
    topology: "Topology",
    bias: Tensor | None = None,
    *,
    weight_shape: tuple[int, int, int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    probe: Tensor | None = None,
) -> Tensor:
    """2-d cross-correlation as ``F.conv2d``, with the sparse weight given by ``values`` and ``topology``.

    Args:
        input: (N, C, H, W), contiguous or channels_last (the result follows), floating point.
        values: compact weight values of shape ``topology.values_shape``, dtype of ``input`` (cast under autocast).
        topology: which blocks of the (O, C/groups * kh * kw) matrix exist, columns in topology order.
        bias: (O,) or None.
        weight_shape: (O, C/groups, kh, kw).
        stride, padding, dilation: (vertical, horizontal), elements; ``groups`` as in ``F.conv2d``.
        probe: a tensor of shape ``topology.shape`` that requires grad and receives the dense weight gradient; its own
            numbers are never read.

    Returns:
        (N, O, Ho, Wo) in the dtype of ``input``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    check_operands(input, values, topology, bias, probe)
    if matrix_shape(weight_shape) != topology.shape:
        raise ValueError(f"weight shape {weight_shape} does not fit a topology of shape {topology.shape}")
    geometry = Geometry(tuple(weight_shape), tuple(stride), tuple(padding), tuple(dilation), groups)
    check_geometry(input.shape, geometry)
    input, values, bias = to_autocast_dtype(input.device.type, input, values, bias)  # type: ignore[assignment]
    check_dtypes(input, values, bias)
    return _sparse_conv2d(input, values, bias, probe, *geometry, *topology.index)
