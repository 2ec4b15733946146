"""FLOPs of this package's operators, for ``torch.utils.flop_counter.FlopCounterMode``.

A product with a sparse weight costs a multiplication and an addition for each existing weight and output position.
Operators without a product cost nothing, as torch counts its own.
"""

import math
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

_FLOP_COUNTER = "torch.utils.flop_counter"
_Shape = Sequence[int]


def _linear(input: _Shape, values: _Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(values) * math.prod(input[:-1])


def _linear_values_grad(
    grad: _Shape, input: _Shape, block: _Shape, row_ptr: _Shape, col: _Shape, *_: Any, **__: Any
) -> int:
    return 2 * math.prod(col) * math.prod(block) * math.prod(grad[:-1])


def _linear_grads(grad: _Shape, input: _Shape, values: _Shape, *_: Any, **__: Any) -> int:
    return 4 * math.prod(values) * math.prod(grad[:-1])


def _linear_dense_grad(grad: _Shape, input: _Shape, **_: Any) -> int:
    return 2 * math.prod(grad) * input[-1]


def _mlp(input: _Shape, values1: _Shape, bias1: _Shape, values2: _Shape, *_: Any, **__: Any) -> int:
    return 2 * (math.prod(values1) + math.prod(values2)) * math.prod(input[:-1])


def _mlp_grads(
    grad: _Shape, input: _Shape, before: _Shape, hidden: _Shape, values1: _Shape, values2: _Shape, *_: Any, **__: Any
) -> int:
    return 4 * (math.prod(values1) + math.prod(values2)) * math.prod(input[:-1])


def _positions(output: _Shape) -> int:
    """Number of places of a convolution's output (N, O, Ho, Wo), over the batch."""
    return output[0] * math.prod(output[2:])


def _conv2d(input: _Shape, values: _Shape, *_: Any, out_shape: _Shape, **__: Any) -> int:
    return 2 * math.prod(values) * _positions(out_shape)


def _conv2d_input_grad(grad: _Shape, values: _Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(values) * _positions(grad)


def _conv2d_values_grad(grad: _Shape, input: _Shape, block: _Shape, *spec: Any, **_: Any) -> int:
    col = spec[6]  # after the geometry's five and row_ptr
    return 2 * math.prod(col) * math.prod(block) * _positions(grad)


def _conv2d_dense_grad(grad: _Shape, input: _Shape, block_width: int, weight_shape: _Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(weight_shape) * _positions(grad)


def _conv2d_grads(grad: _Shape, input: _Shape, values: _Shape, *_: Any, **__: Any) -> int:
    return 4 * math.prod(values) * _positions(grad)


_FORMULAS: dict[str, Callable[..., int]] = {
    "sparse_linear": _linear,
    "sparse_linear_input_grad": _linear,
    "sparse_linear_values_grad": _linear_values_grad,
    "sparse_linear_dense_grad": _linear_dense_grad,
    "sparse_linear_grads": _linear_grads,
    "sparse_mlp": _mlp,
    "sparse_mlp_grads": _mlp_grads,
    "sparse_conv2d": _conv2d,
    "sparse_conv2d_input_grad": _conv2d_input_grad,
    "sparse_conv2d_values_grad": _conv2d_values_grad,
    "sparse_conv2d_dense_grad": _conv2d_dense_grad,
    "sparse_conv2d_grads": _conv2d_grads,
}


def _register(flop_counter: ModuleType) -> None:
    for name, formula in _FORMULAS.items():
        flop_counter.register_flop_formula(getattr(torch.ops.sparse_moon, name))(formula)


class _WhenImported:
    """A finder of modules that registers the formulas when torch's counter is imported, which itself imports triton."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _FLOP_COUNTER:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                sys.meta_path.remove(self)
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Tell torch's counter of the formulas, once it is there; the operators have to be defined."""
    if _FLOP_COUNTER in sys.modules:
        _register(sys.modules[_FLOP_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())
