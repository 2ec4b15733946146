"""The sparse products as ONNX functions: operators of the domain ``sparse_moon``, with the reference as their body.

A runtime that knows the operators may run kernels of its own; every other one runs the body, which scatters the values
into a dense weight. ``onnxscript`` makes functions of this code, which is never run as Python.
"""

from collections.abc import Sequence

from onnxscript import FLOAT, INT32, script
from onnxscript import opset18 as op
from onnxscript.values import Opset

DOMAIN, VERSION = "sparse_moon", 1
_domain = Opset(DOMAIN, VERSION)

Numbers = FLOAT[...]
Indices = INT32[...]
Ints = Sequence[int]


@script(_domain, default_opset=op)
def DenseWeight(values: Numbers, row_ptr: Indices, col: Indices, block: Ints, weight_shape: Ints) -> Numbers:
    """The weight whose ``values`` lie where block-compressed rows say: :func:`sparse_moon.ops.index.matrix_to_weight`.

    Attributes are ``block``, the height and width of a block, and ``weight_shape``, (O, I) or (O, C, kh, kw).
    """
    one = op.Constant(value_ints=[1])
    height = op.Constant(value_ints=block)[0:1]
    width = op.Constant(value_ints=block)[1:2]
    shape = op.Constant(value_ints=weight_shape)
    rows = shape[0:1] / height
    across = shape[1:2] / width
    taps = op.ReduceProd(shape[2:])
    # the row of an entry: how many rows start at it or before, less one
    starts = op.Expand(one, op.Shape(row_ptr))
    none = op.CastLike(op.ConstantOfShape(op.Shape(col) + one), one)
    marks = op.ScatterElements(none, op.CastLike(row_ptr, one), starts, reduction="add")
    row = op.CumSum(marks, op.Constant(value_int=0))[:-1] - one
    places = op.Unsqueeze(row * across * taps + op.CastLike(col, one), one)
    blocks = op.Reshape(values, op.Concat(op.Constant(value_ints=[-1]), height, width, axis=0))
    empty = op.ConstantOfShape(op.Concat(rows * across * taps, height, width, axis=0))
    matrix = op.ScatterND(op.CastLike(empty, values), places, blocks)
    split = op.Reshape(matrix, op.Concat(rows, across, taps, height, width, axis=0))
    return op.Reshape(op.Transpose(split, perm=[0, 3, 1, 4, 2]), shape)


@script(_domain, default_opset=op)
def SparseLinear(
    input: Numbers, values: Numbers, row_ptr: Indices, col: Indices, block: Ints, weight_shape: Ints
) -> Numbers:
    """``input W^T`` with ``W`` (O, I)."""
    weight = DenseWeight(values, row_ptr, col, block=block, weight_shape=weight_shape)
    return op.MatMul(input, op.Transpose(weight, perm=[1, 0]))


@script(_domain, default_opset=op)
def SparseConv2d(
    input: Numbers, values: Numbers, row_ptr: Indices, col: Indices, block: Ints, weight_shape: Ints, strides: Ints,
    pads: Ints, dilations: Ints, group: int,
) -> Numbers:  # fmt: skip
    """Convolution of ``input`` (N, C, H, W) with ``W`` (O, C / group, kh, kw); the last attributes are ``Conv``'s."""
    weight = DenseWeight(values, row_ptr, col, block=block, weight_shape=weight_shape)
    return op.Conv(input, weight, strides=strides, pads=pads, dilations=dilations, group=group)
