"""What a GPU runs of two linear layers with GELU between them; without one, Triton interprets."""

import pytest
import torch
from host_graph import HostGraph
from test_sparse_mlp import DEVICE, OUTPUTS, assert_as_precise_as_torch, make

from sparse_moon.ops.choice import use_backend
from sparse_moon.ops.registry import KERNELS


@pytest.fixture
def launched(monkeypatch):
    """The kernels that ran, and the activations in them; interpreted without a GPU."""
    launch, names = pytest.importorskip("sparse_moon.kernels.launch").Launch, []
    call = launch.__call__

    def noted(self):
        names.append((self.kernel.fn.__name__, self.arguments.get("ACTIVATION"), self.arguments.get("BACKWARD")))
        call(self)

    monkeypatch.setattr(launch, "__call__", noted)
    return names


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("blocks", [((8, 1), (16, 16)), ((16, 16), (16, 16)), ((16, 16), (16, 1)), ((1, 1), (16, 16))])
def test_what_a_gpu_runs(blocks, dtype, launched):
    """GELU at the end of the first product, its derivative in an input gradient of blocks, biases with the values."""
    first, second, operands = make(blocks[0], dtype)
    _, second, rest = make(blocks[1], dtype)
    operands = [t.detach() for t in (*operands[:3], *rest[3:])]
    grad, plans = torch.randn(3, 5, OUTPUTS).to(DEVICE, dtype), (first.plan(), second.plan())
    with torch.no_grad(), use_backend("triton"):
        y, before, hidden = KERNELS["sparse_mlp", "cuda"](*operands, 1, None, None, *plans)
        x, values1, _, values2, _ = operands
        got = KERNELS["sparse_mlp_grads", "cuda"](grad, x, before, hidden, values1, values2, 1, *plans)
    products = [(activation, backward) for name, activation, backward in launched if name == "product_kernel"]
    assert (("gelu_tanh", False) in products) == (blocks[0] != (1, 1))
    assert (("gelu_tanh", True) in products) == (blocks[1][1] > 1)
    leaves = [t.requires_grad_() for t in operands]
    assert_as_precise_as_torch((y, *got), first, second, leaves, "gelu_tanh", grad)


def test_a_capture_finds_nothing_forbidden(monkeypatch):
    """Forward and backward pass on the host: no look at a number, no size that depends on one."""
    launches = []
    launch = pytest.importorskip("sparse_moon.kernels.launch").Launch
    monkeypatch.setattr(launch, "__call__", lambda self: launches.append(self.kernel.fn.__name__))
    first, second, operands = make((16, 16))
    x, values1, bias1, values2, bias2 = (t.detach().cpu() for t in operands)
    plans = first.to("cpu").plan(), second.to("cpu").plan()

    def step():
        y, before, hidden = KERNELS["sparse_mlp", "cuda"](x, values1, bias1, values2, bias2, 0, None, None, *plans)
        return KERNELS["sparse_mlp_grads", "cuda"](y, x, before, hidden, values1, values2, 0, *plans)

    with torch.no_grad(), use_backend("triton"):
        HostGraph(torch.device("cpu")).capture(step)
    assert launches.count("product_kernel") == 2 and launches.count("values_grad_kernel") == 2
