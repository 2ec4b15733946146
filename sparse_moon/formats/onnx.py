"""Models as ONNX files: of their dense equivalent, or with sparse products. Needs ``onnx`` and ``onnxscript``."""

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

try:
    import onnxscript  # noqa: F401 - what torch.onnx exports with
    from onnx_ir import serde
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"sparse_moon.formats.onnx needs onnx and onnxscript ({error}): pip install 'sparse_moon[integrations]'"
    ) from error

from sparse_moon import files
from sparse_moon.formats.onnx_functions import DOMAIN, VERSION, DenseWeight, SparseConv2d, SparseLinear
from sparse_moon.nn import densify
from sparse_moon.nn.inspect import evaluation_mode
from sparse_moon.nn.lora import merge_lora
from sparse_moon.ops.plan import geometry_of
from sparse_moon.ops.sparse_conv2d.api import FORWARD as CONV2D
from sparse_moon.ops.sparse_linear.api import FORWARD as LINEAR

OPSET = 18


def to_onnx(
    model: nn.Module,
    args: tuple[Any, ...],
    path: Path | str,
    *,
    sparse: bool = False,
    dynamic_shapes: Any = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model, in evaluation mode, as an ONNX file that replaces another one as a whole.

    Args:
        model: any module; not changed.
        args: example inputs.
        path: the file, of at most 2 GB.
        sparse: False for the dense equivalent, in ONNX's own operators. True for compact values and indices as the
            file's tensors, and products that are functions of the domain ``sparse_moon``: every runtime can run their
            body, the reference, a dense product with a weight that is scattered first.
        dynamic_shapes: as ``torch.export.export`` takes it: ``({0: torch.export.Dim("batch")},)`` for any number of
            examples.
        metadata: texts to keep in the file.

    Raises:
        ValueError: ``torch.export`` or ONNX cannot express the model.
        OSError: the file cannot be written.
    """
    model = copy.deepcopy(model)
    model = merge_lora(model) if sparse else densify(model)
    with evaluation_mode(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, about torch's insides
        try:
            exported = torch.export.export(model, args, dynamic_shapes=dynamic_shapes, strict=False)
            if sparse:
                exported = exported.run_decompositions(_CALLS)
            program = torch.onnx.export(exported, dynamo=True, opset_version=OPSET, verbose=False)
        except Exception as error:  # torch has many kinds
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{type(model).__name__} cannot be exported: {reason}") from error
    assert program is not None
    if sparse:  # only now, as the exporter puts bodies in the place of calls
        for function in (DenseWeight, SparseLinear, SparseConv2d):
            body = serde.deserialize_function(function.to_function_proto())
            program.model.functions[body.identifier()] = body
    program.model.metadata_props.update(metadata or {})
    with files.replacing(Path(path)) as temporary:
        program.save(temporary, external_data=False)


def _call(name: str, inputs: tuple[Tensor, ...], shape: tuple[Any, ...], **attributes: Any) -> Tensor:
    """A call of one of our functions, in a traced program."""
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", inputs, attributes, dtype=inputs[0].dtype, shape=shape, version=VERSION
    )


def _linear(*flat: Any) -> Tensor:
    input, values, bias, _, plan = LINEAR.whole(*flat)
    row_ptr, col, *_ = plan.index
    output = _call(
        "SparseLinear", (input, values, row_ptr, col), (*input.shape[:-1], plan.shape[0]),
        block=[*plan.block], weight_shape=[*plan.shape],
    )  # fmt: skip
    return output if bias is None else output + bias


def _conv2d(*flat: Any) -> Tensor:
    input, values, bias, _, plan = CONV2D.whole(*flat)
    row_ptr, col, *_ = plan.index
    geometry = geometry_of(plan)
    output = _call(
        "SparseConv2d", (input, values, row_ptr, col),
        (input.shape[0], geometry.weight_shape[0], *geometry.output_size(input.shape)),
        block=[*plan.block], weight_shape=[*geometry.weight_shape], strides=[*geometry.stride],
        pads=[*geometry.padding, *geometry.padding], dilations=[*geometry.dilation], group=geometry.groups,
    )  # fmt: skip
    return output if bias is None else output + bias[:, None, None]


_CALLS = {
    getattr(torch.ops.sparse_moon, product.name).default: call
    for product, call in ((LINEAR, _linear), (CONV2D, _conv2d))
}
