"""What the compiled CPU kernels do of ``sparse_mlp``, where they pay: GELU by tanh.

Torch's takes 36 ms forward and backward for ten million numbers, an eighth to a quarter of both layers, and by erf 13,
which kernels of ours did not beat (Zen 4 with AVX2 alone, two threads).
"""

from torch import Tensor

from sparse_moon.ops.choice import or_dense
from sparse_moon.ops.native import native
from sparse_moon.ops.plan import Plan
from sparse_moon.ops.registry import to_autocast_dtype
from sparse_moon.ops.sparse_linear import cpu
from sparse_moon.ops.sparse_mlp import parts
from sparse_moon.ops.sparse_mlp.parts import NAMES, Gelu, Parts

_TANH = NAMES.index("gelu_tanh")


def pays(input: Tensor, plan1: Plan, plan2: Plan, activation: Gelu) -> bool:
    """Whether all passes of both layers run on the kernels, in the dtype that autocast makes of the input's."""
    if activation != "gelu_tanh":
        return False
    (like,) = to_autocast_dtype("cpu", input.new_empty(0))
    key = "mlp", input.shape, like.dtype, plan2.shape, plan2.density
    found: bool | None = plan1.decided(key)
    if found is not None:
        return found
    output_shape = (*input.shape[:-1], plan2.shape[0])
    hidden_shape = (*input.shape[:-1], plan1.shape[0])
    shapes = ((plan1, input.shape, hidden_shape), (plan2, hidden_shape, output_shape))
    answer = all(
        cpu.takes("forward", before, plan, like)
        and cpu.takes("input_grad", after, plan, like)
        and cpu.takes("values_grad", after, plan, like)
        for plan, before, after in shapes
    )
    plan1.note_decision(key, answer)
    return answer


def forward(input: Tensor, values: Tensor, bias: Tensor, activation: int, plan: Plan) -> tuple[Tensor, Tensor]:
    if activation == _TANH and cpu.takes("forward", input.shape, plan, input, values, bias):
        return cpu.forward_gelu(input, values, bias, plan)
    return parts.forward(input, values, bias, activation, plan)


def backward(grad: Tensor, values: Tensor, before: Tensor, activation: int, plan: Plan) -> Tensor:
    if activation == _TANH and cpu.takes("input_grad", grad.shape, plan, grad, values, before):
        return cpu.input_grad_gelu(grad, values, before, plan)
    return parts.backward(grad, values, before, activation, plan)


def values_grad(grad: Tensor, input: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    if cpu.takes("values_grad", grad.shape, plan, grad, input):
        return cpu.values_and_bias_grad(grad, input, plan)
    return parts.values_grad(grad, input, plan)


FUSED = Parts(
    or_dense(native, forward, parts.forward),
    or_dense(native, backward, parts.backward),
    or_dense(native, values_grad, parts.values_grad),
)
