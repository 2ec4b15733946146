"""What a GPU runs of ``sparse_mlp``: Triton's kernels of blocks and vectors, where they pay."""

from torch import Tensor

from sparse_moon.ops.plan import Plan
from sparse_moon.ops.registry import to_autocast_dtype
from sparse_moon.ops.sparse_linear import gpu, triton
from sparse_moon.ops.sparse_mlp import parts
from sparse_moon.ops.sparse_mlp.parts import NAMES, Parts


def may_pay(block1: tuple[int, int], block2: tuple[int, int]) -> bool:
    """Whether there are kernels that begin and end with GELU, for weights of these blocks."""
    return block1 != (1, 1) and block2[1] > 1


def pays(input: Tensor, plan1: Plan, plan2: Plan) -> bool:
    """Whether kernels compute GELU, either one, and its derivative, in the dtype that autocast makes of the input's."""
    (like,) = to_autocast_dtype(input.device.type, input.new_empty(0))
    output_shape = (*input.shape[:-1], plan2.shape[0])
    return (
        may_pay(plan1.block, plan2.block)
        and gpu.choice("forward", input.shape, plan1, like, like, like) == "triton"
        and gpu.choice("input_grad", output_shape, plan2, like, like) == "triton"
    )


def forward(input: Tensor, values: Tensor, bias: Tensor, activation: int, plan: Plan) -> tuple[Tensor, Tensor]:
    if gpu.choice("forward", input.shape, plan, input, values, bias) == "triton":
        return triton.forward_gelu(input, values, bias, NAMES[activation], plan)
    return parts.forward(input, values, bias, activation, plan)


def backward(grad: Tensor, values: Tensor, before: Tensor, activation: int, plan: Plan) -> Tensor:
    if plan.block[1] > 1 and gpu.choice("input_grad", grad.shape, plan, grad, values) == "triton":
        return triton.input_grad_gelu(grad, values, before, NAMES[activation], plan)
    return parts.backward(grad, values, before, activation, plan)


FUSED = Parts(forward, backward, gpu.values_and_bias_grad)
