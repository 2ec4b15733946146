"""CPU products of 16-bit activations by compiled kernels, bit for bit as of float32 that is rounded afterwards."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_moon import SparseConv2d, SparseLinear, what_runs
from sparse_moon.nn import tune as tuning
from sparse_moon.ops import Geometry, choice, cpu, use_backend
from sparse_moon.ops.cpu import matrix
from sparse_moon.ops.layout import memory_format
from sparse_moon.ops.native import native
from sparse_moon.ops.sparse_conv2d import cpu as conv2d
from sparse_moon.ops.sparse_linear import cpu as linear
from sparse_moon.topology import Topology

if native is None:
    pytest.skip("the compiled kernels were not built", allow_module_level=True)

ISAS = native.supported_isas()


@pytest.fixture(params=product(ISAS, ("possible", "never")), ids="-flat-".join)
def kernels(request):
    """Each instruction set in turn, with and without flat panels."""
    isa, flat = request.param
    native.set_isa(isa)
    native.set_flat_panels(flat)
    with use_backend("kernel"):
        yield
    native.set_isa(ISAS[0])
    native.set_flat_panels("faster")


def in_layout(tensor: Tensor, channels_last: bool) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def assert_bfloat16_is_float32_rounded(run, values: Tensor, *operands: Tensor) -> None:
    """Of operators from operands to results, of which some have the shape of the values."""
    halves = [t.bfloat16() for t in (values, *operands)]
    ours, exact = run(*halves), run(*(t.float() for t in halves))
    for result, expected in zip(ours, exact, strict=True):
        assert result.dtype == torch.bfloat16 and torch.equal(result, expected.bfloat16())
        assert result.is_contiguous(memory_format=memory_format(expected))


@pytest.mark.parametrize(
    "tokens, features, outputs, block, density",
    [(3, 40, 30, (1, 1), 0.5), (1, 40, 30, (2, 2), 0.5), (70, 64, 128, (1, 1), 0.5), (300, 300, 200, (4, 4), 0.3),
     (40, 2000, 64, (1, 1), 0.5), (0, 5, 6, (1, 1), 0.5), (300, 17, 33, (1, 1), 0.9)],
)  # fmt: skip
def test_linear_in_bfloat16(kernels, tokens, features, outputs, block, density):
    """Activations are converted as they are read and written, to the bits of a conversion before and after."""
    topology = Topology.random((outputs, features), density, block)
    plan = topology.plan()

    def run(values: Tensor, bias: Tensor, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return (
            linear.forward(x, values, bias, None, plan), linear.forward(x, values, None, None, plan),
            linear.input_grad(grad, values, plan), linear.values_grad(grad, x, plan),
            *linear.grads(grad, x, values, plan, True),
        )  # fmt: skip

    sizes = topology.values_shape, (outputs,), (tokens, features), (tokens, outputs)
    assert_bfloat16_is_float32_rounded(run, *(torch.randn(size) for size in sizes))


@pytest.mark.parametrize("layouts", [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize(
    "shape, size, batch, stride, padding, dilation, groups",
    [((32, 16, 3, 3), (9, 7), 20, 1, 1, 1, 1), ((6, 3, 3, 3), (8, 8), 3, 1, 1, 1, 1),
     ((16, 32, 1, 1), (7, 7), 33, 1, 0, 1, 1), ((8, 8, 3, 3), (11, 13), 5, 2, 1, 1, 1),
     ((16, 8, 5, 5), (14, 14), 1, 1, 2, 1, 2), ((64, 64, 1, 1), (8, 8), 17, 2, 0, 1, 1),
     ((16, 16, 3, 3), (4, 4), 16, 1, 2, 2, 1), ((16, 16, 3, 3), (33, 32), 18, 1, 1, 1, 1),
     ((40, 24, 3, 3), (4, 9), 1, 2, 1, 1, 1), ((40, 24, 1, 1), (2, 4), 1, 2, 0, 1, 1)],
)  # fmt: skip
def test_conv2d_in_bfloat16(kernels, shape, size, batch, stride, padding, dilation, groups, layouts):
    geometry = Geometry(shape, *((n, n) for n in (stride, padding, dilation)), groups)
    topology = Topology.random((shape[0], shape[1] * shape[2] * shape[3]), 0.3)
    plan, x_shape = topology.plan(geometry), (batch, shape[1] * groups, *size)
    values, bias, x = torch.randn(topology.values_shape), torch.randn(shape[0]), torch.randn(x_shape)
    grad = torch.randn(batch, shape[0], *geometry.output_size(x_shape))

    def run(values: Tensor, bias: Tensor, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        x, grad = in_layout(x, layouts[0]), in_layout(grad, layouts[1])
        return (
            conv2d.forward(x, values, bias, None, plan), conv2d.forward(x, values, None, None, plan),
            conv2d.input_grad(grad, values, x.shape, plan), conv2d.values_grad(grad, x, plan),
            *conv2d.grads(grad, x, values, plan, True),
        )  # fmt: skip

    assert_bfloat16_is_float32_rounded(run, values, bias, x, grad)


class Products(TorchDispatchMode):
    """Notes the dtypes of torch's products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, inputs=(), options=None):
        if function.overloadpacket._qualified_op_name.rpartition(":")[2] in PRODUCTS:
            self.dtypes.add(inputs[0].dtype)
        return function(*inputs, **(options or {}))


PRODUCTS = {"mm", "addmm", "linear", "convolution", "convolution_backward"}


@pytest.mark.parametrize("emulates", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dense_products_that_torch_only_emulates_are_computed_in_float32(monkeypatch, dtype, emulates):
    """In a convolution that none of Winograd's are, one that they are, and a linear layer."""
    for module in (linear, conv2d, cpu):
        monkeypatch.setattr(module, "emulated", lambda asked: emulates and asked is dtype)

    def results(run, *operands: Tensor) -> tuple[list[Tensor], set[torch.dtype]]:
        autocast = torch.autocast("cpu", dtype, enabled=emulates and operands[0].dtype is dtype)
        with use_backend("dense"), Products() as products, autocast:
            return list(run(*operands)), products.dtypes

    def compare(run, *operands: Tensor, own: set[torch.dtype]) -> None:
        halves = [t.to(dtype) for t in operands]
        ours, dtypes = results(run, *halves)
        exact, _ = results(run, *(t.float() for t in halves))
        assert dtypes == (own if emulates else {dtype})
        for result, expected in zip(ours, exact, strict=True):
            assert result.dtype == dtype
            if emulates:
                assert torch.equal(result, expected.to(dtype))

    topology = Topology.random((16, 48), 0.5)
    plan = topology.plan()

    def products(values: Tensor, bias: Tensor, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return (
            linear.forward(x, values, bias, None, plan), linear.forward(x, values, None, None, plan),
            linear.input_grad(grad, values, plan), linear.values_grad(grad, x, plan), linear.dense_grad(grad, x),
            *linear.grads(grad, x, values, plan, True),
        )  # fmt: skip

    sizes = topology.values_shape, (16,), (9, 48), (9, 16)
    compare(products, *(torch.randn(size) for size in sizes), own={torch.float32})
    for stride, own in ((2, {torch.float32}), (1, set())):
        geometry = Geometry((16, 16, 3, 3), (stride, stride), (1, 1), (1, 1), 1)
        topology = Topology.random((16, 144), 0.3)
        conv2d_plan = topology.plan(geometry)

        def convolutions(
            values: Tensor, bias: Tensor, x: Tensor, grad: Tensor, plan=conv2d_plan, geometry=geometry
        ) -> tuple[Tensor, ...]:
            return (
                conv2d.forward(x, values, bias, None, plan), conv2d.input_grad(grad, values, list(x.shape), plan),
                conv2d.values_grad(grad, x, plan), conv2d.dense_grad(grad, x, 1, *geometry),
                *conv2d.grads(grad, x, values, plan, True),
            )  # fmt: skip

        out = 8 // stride
        sizes = topology.values_shape, (16,), (8, 16, 8, 8), (8, 16, out, out)
        compare(convolutions, *(torch.randn(size) for size in sizes), own=own)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="needs products of bfloat16")
def test_products_that_torch_has_are_not_emulated():
    assert not cpu.emulated(torch.bfloat16) and not cpu.emulated(torch.float32)


@pytest.mark.usefixtures("nothing_measured")
@pytest.mark.parametrize(("gain", "backend"), [(2.0, "kernel"), (0.6, "dense")])
@pytest.mark.parametrize("speed", [0.6, 4.0])  # of torch's dense products, over float32's
@pytest.mark.parametrize("layer", [SparseLinear(40, 24, sparsity=0.9), SparseConv2d(40, 24, 3, sparsity=0.9)])
def test_what_tune_has_found_under_autocast_runs_there(layer, speed, gain, backend, monkeypatch):
    for module in (cpu, linear, conv2d):
        monkeypatch.setattr(module, "emulated", lambda dtype: False)
    monkeypatch.setattr(choice, "bfloat16_speed", lambda: speed)
    monkeypatch.setattr(tuning, "kernel_gain", lambda run, device: gain)
    ran, real = [], choice.kernel_pays
    monkeypatch.setattr(cpu, "kernel_pays", lambda *inputs: (ran.append(real(*inputs)), ran[-1])[1])
    x = torch.randn((5, 40) if isinstance(layer, SparseLinear) else (5, 40, 6, 7), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        tuning.tune_layer(layer, tuple(x.shape))
        ran.clear()
        layer(x).float().sum().backward()
        assert len(ran) >= 2 and set(ran) == {backend == "kernel"}
        assert set(tuning.chosen_backends(layer, tuple(x.shape)).values()) == {backend}
        assert set(what_runs(nn.Sequential(layer), x)["0"].values()) == {backend}
    assert {work.dtype for work in choice.remembered()} == {"bfloat16"}  # of float32 nothing was found


@pytest.mark.usefixtures("nothing_measured")
def test_kernels_pay_at_densities_that_are_lower_by_the_speed_of_dense_products(monkeypatch):
    monkeypatch.setattr(choice, "bfloat16_speed", lambda: 4.0)
    for work, slower in (
        (choice.Work("forward", 8, 40, 24, 1, 1, 1, 1), 4.0),
        (choice.Work("forward", 8, 40, 24, 64, 9, 1, 1), 2.0),  # those of float32 are Winograd's
    ):
        for pass_ in choice.PASSES:
            choice.remember(work._replace(pass_=pass_), 0.4)
        half = work._replace(dtype="bfloat16")
        assert choice.crossover(work) == pytest.approx(0.4) and choice.crossover(half) == pytest.approx(0.4 / slower)


def test_rounding_to_bfloat16(kernels):
    """Ties, what overflows, denormals, and what is not a number, of either sign: as torch rounds."""
    bits = [0x3F808000, 0x3F818000, 0x3F807FFF, 0x7F7FFFFF, 0x7F800000, 0x00012345, 0x00008000, 0x7FFFFFFF, 0x7F800001]
    numbers = torch.tensor([*bits, *(n - (1 << 31) for n in bits)], dtype=torch.int32).view(torch.float32)
    plan = Topology.from_mask(torch.zeros(len(numbers), 1, dtype=torch.bool)).plan()
    for tokens in (1, 40):
        x = torch.zeros(tokens, 1, dtype=torch.bfloat16)
        y = x.new_empty(tokens, len(numbers))
        weight = matrix(plan, torch.empty(0))
        native.sparse_linear(tokens, weight, x.data_ptr(), numbers.data_ptr(), y.data_ptr(), True, 1, 0)
        expected = numbers.bfloat16().expand_as(y)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
