"""Two sparse linear layers with GELU between them as one operator, against torch's own in float64."""

import pytest
import torch
import torch.nn.functional as F
from host_graph import HostGraph
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from sparse_moon.ops.choice import use_backend
from sparse_moon.ops.registry import KERNELS
from sparse_moon.ops.sparse_mlp.api import sparse_mlp
from sparse_moon.topology import Topology

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INPUTS, HIDDEN, OUTPUTS = 32, 64, 48


def make(block, dtype=torch.float32, lead=(3, 5), density=0.4):
    first = Topology.random((HIDDEN, INPUTS), density, block).to(DEVICE)
    second = Topology.random((OUTPUTS, HIDDEN), density, block).to(DEVICE)
    shapes = ((*lead, INPUTS), first.values_shape, (HIDDEN,), second.values_shape, (OUTPUTS,))
    return first, second, [torch.randn(shape).to(DEVICE, dtype).requires_grad_() for shape in shapes]


def ours(first, second, operands, activation):
    x, values1, bias1, values2, bias2 = operands
    return sparse_mlp(x, values1, bias1, first.plan(), values2, bias2, second.plan(), activation)


def theirs(first, second, operands, activation):
    x, values1, bias1, values2, bias2 = operands
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    hidden = F.gelu(F.linear(x, first.to_dense(values1), bias1), approximate=approximate)
    return F.linear(hidden, second.to_dense(values2), bias2)


def results(function, first, second, operands, activation, grad):
    y = function(first, second, operands, activation)
    return [y, *torch.autograd.grad(y, operands, grad.to(y.dtype))]


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("block", [(1, 1), (8, 1), (16, 16)])
def test_output_and_gradients(block, activation):
    first, second, operands = make(block)
    grad = torch.randn(3, 5, OUTPUTS, device=DEVICE)
    doubles = [t.detach().double().requires_grad_() for t in operands]
    exact = results(theirs, first, second, doubles, activation, grad)
    torchs = results(theirs, first, second, operands, activation, grad)
    for a, b, c in zip(results(ours, first, second, operands, activation, grad), torchs, exact, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - c).norm() <= 2 * (b - c).norm() + torch.finfo(a.dtype).eps * c.norm()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
def test_operators_under_opcheck():
    first, second, operands = make((16, 16))
    x, values1, bias1, values2, bias2 = operands
    indices = (*first.index, *second.index)
    inputs = (x, values1, bias1, values2, bias2, 1, *indices)
    opcheck(torch.ops.sparse_moon.sparse_mlp.default, inputs)
    with torch.no_grad():
        y, before, hidden = torch.ops.sparse_moon.sparse_mlp(*inputs)
        opcheck(torch.ops.sparse_moon.sparse_mlp_grads.default, (y, x, before, hidden, values1, values2, 1, *indices))


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_of_gradients(create_graph):
    first, second, operands = make((16, 16), torch.float64, lead=(2,))
    if not create_graph:
        assert torch.autograd.gradcheck(lambda *t: ours(first, second, t, "gelu_tanh"), operands)
        return
    assert torch.autograd.gradgradcheck(lambda *t: ours(first, second, t, "gelu"), operands, atol=1e-4)


def test_transforms_and_the_reference():
    first, second, operands = make((8, 1))
    operands = [t.detach() for t in operands]
    expected = theirs(first, second, operands, "gelu")
    with use_backend("reference"):
        torch.testing.assert_close(ours(first, second, operands, "gelu"), expected)
    x, *rest = operands
    batched = torch.func.vmap(lambda row: ours(first, second, [row, *rest], "gelu"))(x)
    torch.testing.assert_close(batched, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    first, second, operands = make((16, 16))
    with torch.autocast(DEVICE, dtype):
        y = ours(first, second, operands, "gelu")
    y.float().square().mean().backward()
    assert y.dtype is dtype and all(t.grad.dtype is torch.float32 for t in operands)
    torch.testing.assert_close(y.float(), theirs(first, second, operands, "gelu"), rtol=0.1, atol=0.1)


def test_an_index_that_has_changed_since():
    first, second, operands = make((16, 16))
    y = ours(first, second, operands, "gelu")
    with torch.no_grad():
        second.col.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("wrong", ["input", "bias", "values", "second", "dtype", "index"])
def test_misfits(wrong):
    first, second, (x, values1, bias1, values2, bias2) = make((16, 16))
    if wrong == "input":
        x = x[..., 1:]
    elif wrong == "bias":
        bias1 = bias1[1:]
    elif wrong == "values":
        values2 = values2[1:]
    elif wrong == "second":
        first, values1, bias1 = second, values2, bias2
        x = torch.randn(3, HIDDEN, device=DEVICE)
    elif wrong == "dtype":
        values2 = values2.double()
    else:
        second.t_perm.data.fill_(99)
    message = "must have|share one floating|values of .* entries|damaged: the transpose"
    with pytest.raises(ValueError, match=message):
        indices = (*first.index, *second.index)
        torch.ops.sparse_moon.sparse_mlp(x, values1, bias1, values2, bias2, 0, *indices)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_breaks(backend):
    first, second, operands = make((16, 16))
    grad = torch.randn(3, 5, OUTPUTS, device=DEVICE)
    expected = results(ours, first, second, operands, "gelu", grad)
    run = torch.compile(lambda *t: ours(first, second, t, "gelu").cos(), fullgraph=True, backend=backend)
    y = run(*operands)
    torch.testing.assert_close(y, expected[0].cos())
    got = torch.autograd.grad(y, operands, grad)
    wanted = torch.autograd.grad(ours(first, second, operands, "gelu").cos(), operands, grad)
    torch.testing.assert_close(got, wanted)


def test_flops():
    first, second, operands = make((16, 16))
    with FlopCounterMode(display=False) as counter:
        ours(first, second, operands, "gelu").sum().backward()
    weights = operands[1].numel() + operands[3].numel()
    assert counter.get_total_flops() == 3 * 2 * 15 * weights


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


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("blocks", [((8, 1), (16, 16)), ((16, 16), (16, 16)), ((16, 16), (16, 1)), ((1, 1), (16, 16))])
def test_what_a_gpu_runs(blocks, dtype, launched):
    """GELU at the end of the first product, its derivative in an input gradient of blocks, biases with the values."""
    first, second, operands = make(blocks[0], dtype)
    _, second, rest = make(blocks[1], dtype)
    operands = [t.detach() for t in (*operands[:3], *rest[3:])]
    grad, indices = torch.randn(3, 5, OUTPUTS).to(DEVICE, dtype), (*first.index, *second.index)
    with torch.no_grad(), use_backend("triton"):
        y, before, hidden = KERNELS["sparse_mlp", "cuda"](*operands, 1, *indices)
        x, values1, _, values2, _ = operands
        got = KERNELS["sparse_mlp_grads", "cuda"](grad, x, before, hidden, values1, values2, 1, *indices)
    products = [(activation, backward) for name, activation, backward in launched if name == "product_kernel"]
    assert (("gelu_tanh", False) in products) == (blocks[0] != (1, 1))
    assert (("gelu_tanh", True) in products) == (blocks[1][1] > 1)
    leaves = [t.requires_grad_() for t in operands]
    doubles = [t.detach().double().requires_grad_() for t in operands]
    exact = results(theirs, first, second, doubles, "gelu_tanh", grad)
    torchs = results(theirs, first, second, leaves, "gelu_tanh", grad)
    for a, b, c in zip((y, *got), torchs, exact, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - c).norm() <= 2 * (b - c).norm() + torch.finfo(a.dtype).eps * c.norm()


def test_a_capture_finds_nothing_forbidden(monkeypatch):
    """Forward and backward pass on the host: no look at a number, no size that depends on one."""
    launches = []
    launch = pytest.importorskip("sparse_moon.kernels.launch").Launch
    monkeypatch.setattr(launch, "__call__", lambda self: launches.append(self.kernel.fn.__name__))
    first, second, operands = make((16, 16))
    x, values1, bias1, values2, bias2 = (t.detach().cpu() for t in operands)
    indices = [t.cpu() for t in (*first.index, *second.index)]

    def step():
        y, before, hidden = KERNELS["sparse_mlp", "cuda"](x, values1, bias1, values2, bias2, 0, *indices)
        return KERNELS["sparse_mlp_grads", "cuda"](y, x, before, hidden, values1, values2, 0, *indices)

    with torch.no_grad(), use_backend("triton"):
        HostGraph(torch.device("cpu")).capture(step)
    assert launches.count("product_kernel") == 2 and launches.count("values_grad_kernel") == 2
