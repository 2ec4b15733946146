"""The compiled CPU kernels of ``sparse_linear``.

They compute in float32, and run where :mod:`sparse_moon.ops.choice` finds that they pay; bfloat16 operands are
converted to float32 and back. Everything else is a dense product.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from sparse_moon.ops.choice import Pass, Work, or_dense
from sparse_moon.ops.cpu import address, empty, extension, kernel_takes, matrix, packed
from sparse_moon.ops.native import native
from sparse_moon.ops.plan import Plan
from sparse_moon.ops.sparse_linear import dense
from sparse_moon.ops.sparse_linear.api import FORWARD, INPUT_GRAD, VALUES_GRAD


@lru_cache(maxsize=4096)
def _work(pass_: Pass, tokens: int, outputs: int, inputs: int) -> Work:
    return Work(pass_, tokens, inputs, outputs, positions=1, taps=1, stride=1, groups=1)


def _pays(pass_: Pass, tokens: int, plan: Plan, *operands: Tensor | None) -> bool:
    return kernel_takes(_work(pass_, tokens, *plan.shape), plan, *operands)


def _tokens(tensor: Tensor) -> int:
    return math.prod(tensor.shape[:-1])


def forward(input: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None, plan: Plan) -> Tensor:
    tokens = _tokens(input)
    if not _pays("forward", tokens, plan, input, values, bias):
        return dense.forward(input, values, bias, probe, plan)
    dtype, input, values = input.dtype, packed(input), packed(values)
    bias = None if bias is None else packed(bias)
    output = empty((*input.shape[:-1], plan.shape[0]))
    extension().sparse_linear(
        tokens, matrix(plan, values), input.data_ptr(), address(bias), output.data_ptr(), torch.get_num_threads()
    )
    return output.to(dtype)


def input_grad(grad: Tensor, values: Tensor, plan: Plan) -> Tensor:
    tokens = _tokens(grad)
    if not _pays("input_grad", tokens, plan, grad, values):
        return dense.input_grad(grad, values, plan)
    dtype, grad, values = grad.dtype, packed(grad), packed(values)
    result = empty((*grad.shape[:-1], plan.shape[1]))
    extension().sparse_linear_input_grad(
        tokens, matrix(plan, values), grad.data_ptr(), result.data_ptr(), torch.get_num_threads()
    )
    return result.to(dtype)


def values_grad(grad: Tensor, input: Tensor, plan: Plan) -> Tensor:
    tokens = _tokens(grad)
    if not _pays("values_grad", tokens, plan, grad, input):
        return dense.values_grad(grad, input, plan)
    dtype, grad, input = grad.dtype, packed(grad), packed(input)
    result = empty(plan.values_shape)
    extension().sparse_linear_values_grad(
        tokens, matrix(plan, None), grad.data_ptr(), input.data_ptr(), result.data_ptr(), torch.get_num_threads()
    )
    return result.to(dtype)


if native is not None:
    FORWARD.implement("cpu", or_dense(native, forward, dense.forward))
    INPUT_GRAD.implement("cpu", or_dense(native, input_grad, dense.input_grad))
    VALUES_GRAD.implement("cpu", or_dense(native, values_grad, dense.values_grad))
