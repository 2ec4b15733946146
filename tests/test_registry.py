"""Direct calls of kernels, and who still sees the operators."""

import importlib
from typing import ClassVar

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_moon as sm
from sparse_moon.ops import registry

OPERATORS = torch.ops.sparse_moon


@pytest.fixture
def layer():
    return sm.SparseConv2d(6, 8, 3, padding=1, sparsity=0.5)


@pytest.fixture
def image():
    return torch.randn(4, 6, 10, 10, requires_grad=True)


class Watch(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def gradients(layer, image):
    output = layer(image)
    return output, *torch.autograd.grad(output.square().sum(), [image, layer.values])


def test_direct_calls_give_the_operators_bits(layer, image, monkeypatch):
    with Watch() as watch:
        seen = gradients(layer, image)
    assert {OPERATORS.sparse_conv2d.default, OPERATORS.sparse_conv2d_grads.default} <= set(watch.seen)
    monkeypatch.setattr(registry, "KERNELS", {})
    dispatched = gradients(layer, image)
    monkeypatch.undo()
    for direct, other, third in zip(gradients(layer, image), dispatched, seen, strict=True):
        assert torch.equal(direct, other) and torch.equal(direct, third)


@pytest.mark.skipif(("sparse_conv2d", "cpu") not in registry.KERNELS, reason="needs the compiled kernels")
def test_eager_execution_calls_the_kernel(layer, image, monkeypatch):
    calls = []
    for operator in ("sparse_conv2d", "sparse_conv2d_grads"):
        kernel = registry.KERNELS[operator, "cpu"]
        monkeypatch.setitem(
            registry.KERNELS,
            (operator, "cpu"),
            lambda *inputs, kernel=kernel: (calls.append(kernel), kernel(*inputs))[1],
        )
    gradients(layer, image)
    with torch.no_grad():
        layer(image)
    assert len(calls) == 3
    with Watch():  # and not where something watches
        gradients(layer, image)
    make_fx(layer)(image.detach())
    torch.compile(layer, backend="eager", fullgraph=True)(image)
    assert len(calls) == 3


class Marked(torch.Tensor):
    seen: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_of_tensors_see_the_operator(layer, image):
    Marked.seen.clear()
    with torch.no_grad():
        output = layer(image.detach().as_subclass(Marked))
        assert torch.equal(output.as_subclass(torch.Tensor), layer(image.detach()))
    assert OPERATORS.sparse_conv2d.default in Marked.seen


def test_a_traced_graph_holds_the_operator(layer, image):
    with torch.no_grad():
        graph = make_fx(layer, tracing_mode="real")(image.detach())
    assert OPERATORS.sparse_conv2d.default in {node.target for node in graph.graph.nodes}


OWN_OPERATOR = '''
"""``scaled_square``: what a file of sparse_moon/ops holds, with a kernel for the CPU."""

import torch
from torch import Tensor

from sparse_moon.ops import registry


def scaled_square_reference(input: Tensor, factor: float) -> Tensor:
    return input.square() * factor


def _forward(input: Tensor, factor: float) -> Tensor:
    return scaled_square_reference(input, factor).contiguous()


def _fake(input: Tensor, factor: float) -> Tensor:
    return torch.empty(input.shape, dtype=input.dtype, device=input.device)


_OP = registry.define("scaled_square(Tensor input, float factor) -> Tensor", _forward, _fake)
calls = []


def _cpu(input: Tensor, factor: float) -> Tensor:
    calls.append(factor)
    return (input * factor * input).contiguous()


registry.implement("scaled_square", "cpu", _cpu)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.factor = inputs[1]


def _backward(ctx, grad):
    (input,) = ctx.saved_tensors
    return 2 * ctx.factor * input * grad, None


scaled_square = registry.register_autograd(
    _OP, _backward, setup_context=_setup_context, reference=scaled_square_reference, differentiable_backward=_backward,
)
'''


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
def test_an_operator_is_one_file_of_python(tmp_path, monkeypatch):
    """With its kernel (two files), its binding and its test these are five."""
    (tmp_path / "own_operator.py").write_text(OWN_OPERATOR)
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own_operator")
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(own.scaled_square(x, 3.0), 3 * x**2)
    assert own.calls == [3.0]
    assert torch.autograd.gradcheck(own.scaled_square, (x, 2.0))
    assert torch.autograd.gradgradcheck(own.scaled_square, (x, 2.0))
    torch.library.opcheck(OPERATORS.scaled_square.default, (x, 2.0))
    torch.testing.assert_close(torch.func.grad(lambda t: own.scaled_square(t, 2.0).sum())(x), 4 * x)
    compiled = torch.compile(lambda t: own.scaled_square(t, 2.0).sum(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], 4 * x)
