"""Direct calls of kernels, and who still sees the operators."""

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
    monkeypatch.setattr(registry, "_kernels", {})
    dispatched = gradients(layer, image)
    monkeypatch.undo()
    for direct, other, third in zip(gradients(layer, image), dispatched, seen, strict=True):
        assert torch.equal(direct, other) and torch.equal(direct, third)


@pytest.mark.skipif(("sparse_conv2d", "cpu") not in registry._kernels, reason="needs the compiled kernels")
def test_eager_execution_calls_the_kernel(layer, image, monkeypatch):
    calls = []
    for operator in ("sparse_conv2d", "sparse_conv2d_grads"):
        kernel = registry._kernels[operator, "cpu"]
        monkeypatch.setitem(
            registry._kernels,
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
