"""Two sparse linear layers with GELU between them as one operator, against torch's own in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import sparse_moon as sm
from sparse_moon.ops.choice import use_backend
from sparse_moon.ops.native import native
from sparse_moon.ops.sparse_linear import cpu as cpu_linear
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


def assert_as_precise_as_torch(found, first, second, operands, activation, grad):
    """Each result at most twice as far from float64's as torch's own, and one rounding."""
    doubles = [t.detach().double().requires_grad_() for t in operands]
    exact = results(theirs, first, second, doubles, activation, grad)
    torchs = results(theirs, first, second, operands, activation, grad)
    for a, b, c in zip(found, torchs, exact, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - c).norm() <= 2 * (b - c).norm() + torch.finfo(a.dtype).eps * c.norm()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("block", [(1, 1), (8, 1), (16, 16)])
def test_output_and_gradients(block, activation):
    first, second, operands = make(block)
    grad = torch.randn(3, 5, OUTPUTS, device=DEVICE)
    found = results(ours, first, second, operands, activation, grad)
    assert_as_precise_as_torch(found, first, second, operands, activation, grad)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
def test_operators_under_opcheck():
    first, second, operands = make((16, 16))
    x, values1, bias1, values2, bias2 = operands
    indices = (*first.index, *second.index)
    inputs = (x, values1, bias1, values2, bias2, 1, None, None, *indices)
    opcheck(torch.ops.sparse_moon.sparse_mlp.default, inputs)
    probes = torch.zeros(first.shape, requires_grad=True), torch.zeros(second.shape, requires_grad=True)
    opcheck(
        torch.ops.sparse_moon.sparse_mlp.default,
        (*inputs[:6], *(probe.detach().to(DEVICE).requires_grad_() for probe in probes), *indices),
    )
    with torch.no_grad():
        y, before, hidden = torch.ops.sparse_moon.sparse_mlp(*inputs)
        opcheck(torch.ops.sparse_moon.sparse_mlp_grads.default, (y, x, before, hidden, values1, values2, 1, *indices))


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("create_graph", [False, True])
def test_dense_gradients_of_the_weights(wanted, create_graph):
    """Those that topology updates want, and all others beside them."""
    first, second, operands = make((16, 16), torch.float64)
    probes = [torch.zeros(t.shape, dtype=torch.float64, device=DEVICE, requires_grad=True) for t in (first, second)]
    x, values1, bias1, values2, bias2 = operands
    given = {f"probe{i + 1}": probe for i, probe in enumerate(probes) if wanted[i]}
    y = sparse_mlp(x, values1, bias1, first.plan(), values2, bias2, second.plan(), "gelu", **given)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, [*operands, *given.values()], grad, create_graph=create_graph)
    hidden = F.gelu(F.linear(x, first.to_dense(values1) + probes[0], bias1))
    exact = F.linear(hidden, second.to_dense(values2) + probes[1], bias2)
    torch.testing.assert_close(got, torch.autograd.grad(exact, [*operands, *given.values()], grad))


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_of_gradients(create_graph):
    first, second, operands = make((16, 16), torch.float64, lead=(2,))
    if not create_graph:
        assert torch.autograd.gradcheck(lambda *t: ours(first, second, t, "gelu_tanh"), operands)
        return
    assert torch.autograd.gradgradcheck(lambda *t: ours(first, second, t, "gelu"), operands, atol=1e-4)


class Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_that_are_not_there_are_not_filled_with_zeros(create_graph):
    first, second, operands = make((16, 16))
    y = ours(first, second, operands, "gelu_tanh")
    assert (
        torch.autograd.grad(Dropped.apply(y).sum(), operands, create_graph=create_graph, allow_unused=True)
        == (None,) * 5
    )


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
        torch.ops.sparse_moon.sparse_mlp(x, values1, bias1, values2, bias2, 0, None, None, *indices)


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


ISAS = native.supported_isas() if native is not None else []
needs_kernels = pytest.mark.skipif(native is None, reason="needs the compiled CPU kernels")


@pytest.fixture(params=ISAS)
def kernels(request):
    """Each instruction set in turn."""
    native.set_isa(request.param)
    with use_backend("kernel"):
        yield
    native.set_isa(ISAS[0])


@pytest.fixture
def activated(monkeypatch):
    """The passes of the CPU's kernels, and whether with GELU."""
    seen = []

    class Noted:
        def __getattr__(self, name):
            return getattr(native, name)

        def sparse_linear(self, *inputs):
            seen.append(("forward", inputs[-1] != 0))
            native.sparse_linear(*inputs)

        def sparse_linear_input_grad(self, *inputs):
            seen.append(("backward", inputs[-1] != 0))
            native.sparse_linear_input_grad(*inputs)

    monkeypatch.setattr(cpu_linear, "kernels", Noted())
    return seen


@needs_kernels
@pytest.mark.parametrize(("tokens", "sizes", "block"), [
    (1, (37, 51, 23), (1, 1)), (5, (37, 51, 23), (1, 1)), (67, (37, 51, 23), (1, 1)), (700, (64, 90, 33), (1, 1)),
    (0, (37, 51, 23), (1, 1)), (130, (48, 96, 32), (8, 1)), (700, (48, 96, 32), (16, 16)),
    (4200, (24, 128, 16), (1, 1)),  # written past the caches
])  # fmt: skip
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_cpu_kernels(tokens, sizes, block, activation, kernels, activated):
    inputs, hidden, outputs = sizes
    first = Topology.random((hidden, inputs), 0.3, block)
    second = Topology.random((outputs, hidden), 0.3, block)
    shapes = ((tokens, inputs), first.values_shape, (hidden,), second.values_shape, (outputs,))
    operands = [torch.randn(shape).requires_grad_() for shape in shapes]
    grad = torch.randn(tokens, outputs)
    found = results(ours, first, second, operands, activation, grad)
    assert_as_precise_as_torch(found, first, second, operands, activation, grad)
    fused = activation == "gelu_tanh" and tokens > 0
    assert activated == [("forward", fused), ("forward", False), ("backward", fused), ("backward", False)]


@needs_kernels
def test_cpu_kernels_in_bfloat16(kernels, activated):
    """Of what was rounded, as torch's own operators have it."""
    first = Topology.random((96, 40), 0.3)
    second = Topology.random((33, 96), 0.3)
    shapes = ((300, 40), first.values_shape, (96,), second.values_shape, (33,))
    operands = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    grad = torch.randn(300, 33).bfloat16()
    found = results(ours, first, second, operands, "gelu_tanh", grad)
    assert all(t.dtype == torch.bfloat16 for t in found)
    assert_as_precise_as_torch(found, first, second, operands, "gelu_tanh", grad)
    assert activated[0] == ("forward", True)


@needs_kernels
@pytest.mark.parametrize(("approximate", "backend", "fused"), [
    ("tanh", "kernel", True), ("none", "kernel", False), ("tanh", "dense", False),
])  # fmt: skip
def test_models_on_a_cpu(approximate, backend, fused, activated):
    """GELU by tanh where the kernels run; the same numbers as unfused."""
    found = []
    for fuse in (False, "auto"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 96), nn.GELU(approximate), nn.Linear(96, 24))
        sm.sparsify(model, 0.8, "uniform", first_dense=False, fuse=fuse)
        x = torch.randn(70, 24)
        with use_backend(backend):
            y = model(x)
            y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in model.parameters())])
        assert any(gelu for _, gelu in activated) == (fused and fuse == "auto")
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_gelu_of_all_numbers_on_a_cpu(kernels):
    """From the smallest to those at which a square overflows, through a weight of one identity."""
    magnitude = torch.cat([torch.logspace(-7, 15, 3000), torch.linspace(0, 9, 5000)])
    x = torch.cat([magnitude, -magnitude]).view(-1, 1)
    one = Topology(torch.tensor([0]), (1, 1)).plan()
    values, bias, approximate = torch.ones(1), torch.zeros(1), "tanh"
    before, y = cpu_linear.forward_gelu(x, values, bias, one)
    assert torch.equal(before, x)
    dx = cpu_linear.input_grad_gelu(torch.ones_like(x), values, x, one)
    theirs, exact = (F.gelu(t, approximate=approximate) for t in (x, x.double()))
    slopes = [torch.ops.aten.gelu_backward(torch.ones_like(t), t, approximate=approximate) for t in (x, x.double())]
    for bound in (1.0, 5.0, 100.0, torch.inf):
        near = x.abs() <= bound
        for a, b, c in ((y, theirs, exact), (dx, *slopes)):
            a, b, c = a[near], b[near], c[near]
            floor = torch.finfo(a.dtype).eps * c.abs().max()
            assert (a - c).abs().max() <= 2 * (b - c).abs().max() + floor
    edges = torch.tensor([torch.nan, torch.inf, -torch.inf]).view(-1, 1)
    before, y = cpu_linear.forward_gelu(edges, values, bias, one)
    assert torch.equal(y.isnan(), F.gelu(edges, approximate=approximate).isnan()) and y[1] == torch.inf
    assert cpu_linear.input_grad_gelu(torch.ones_like(edges), values, edges, one)[0].isnan()


@pytest.mark.skipif(native is None, reason="needs the compiled extension")
def test_more_features_than_kernels_take_go_to_dense_products():
    hidden = 2**20 + 16
    first, second = Topology.random((hidden, 8), 0.01), Topology.random((8, hidden), 0.01)
    shapes = (2, 8), first.values_shape, (hidden,), second.values_shape, (8,)
    operands = [torch.randn(shape).requires_grad_() for shape in shapes]
    grad = torch.ones(2, 8)
    assert_as_precise_as_torch(
        results(ours, first, second, operands, "gelu_tanh", grad), first, second, operands, "gelu_tanh", grad
    )
    with use_backend("kernel"), pytest.raises(native.TooLarge):
        ours(first, second, operands, "gelu_tanh")
