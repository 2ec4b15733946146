"""Which implementation runs a product on the GPU, and that each gives the same numbers through the whole operator.

Without a GPU the functions that are registered for CUDA are called directly, on CPU tensors: Triton then interprets.
"""

import copy

import pytest
import torch
from torch import nn
from torch.library import opcheck

import sparse_moon as sm
from sparse_moon.nn import tune as tuning
from sparse_moon.ops import Geometry, Plan, choice
from sparse_moon.ops.layout import memory_format
from sparse_moon.ops.native import has_cuda
from sparse_moon.ops.sparse_conv2d import dense as dense_conv2d
from sparse_moon.ops.sparse_conv2d import gpu as conv2d
from sparse_moon.ops.sparse_linear import dense as dense_linear
from sparse_moon.ops.sparse_linear import gpu as linear
from sparse_moon.topology import Topology

Launch = pytest.importorskip("sparse_moon.kernels.launch").Launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS = [(8, 1), (16, 16), (2, 2)]  # Triton twice, and the reference, for which it has no kernel


@pytest.fixture
def no_tf32():
    """In convolutions, where it is allowed by default, and cuDNN may use it or not."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def close(got, expected):
    assert got.shape == expected.shape and got.dtype == expected.dtype and got.stride() == expected.stride()
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_linear_products(block):
    topology = Topology.random((32, 48), 0.4, block).to(DEVICE)
    values = torch.randn(topology.values_shape, device=DEVICE)
    x, grad = torch.randn(3, 5, 48, device=DEVICE), torch.randn(3, 5, 32, device=DEVICE)
    bias, plan = torch.randn(32, device=DEVICE), topology.plan()
    with choice.use_backend("triton"):
        close(linear.forward(x, values, bias, None, plan), dense_linear.forward(x, values, bias, None, plan))
        close(linear.input_grad(grad, values, plan), dense_linear.input_grad(grad, values, plan))
        close(linear.values_grad(grad, x, plan), dense_linear.values_grad(grad, x, plan))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.usefixtures("no_tf32")
def test_conv2d_products(block, layout):
    geometry = Geometry((16, 16, 3, 3), (2, 1), (1, 0), (1, 1), 1)
    topology = Topology.random((16, 144), 0.4, block).to(DEVICE)
    values = torch.randn(topology.values_shape, device=DEVICE)
    x = torch.randn(2, 16, 5, 6, device=DEVICE).contiguous(memory_format=layout)
    grad = torch.randn(2, 16, *geometry.output_size(x.shape), device=DEVICE).contiguous(memory_format=layout)
    plan = topology.plan(geometry)
    with choice.use_backend("triton"):
        close(conv2d.forward(x, values, None, None, plan), dense_conv2d.forward(x, values, None, None, plan))
        got = conv2d.input_grad(grad, values, x.shape, plan)
        close(got, dense_conv2d.input_grad(grad, values, x.shape, plan))
        assert memory_format(got) == layout
        close(conv2d.values_grad(grad, x, plan), dense_conv2d.values_grad(grad, x, plan))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("block", [(1, 1), *BLOCKS])
@pytest.mark.usefixtures("no_tf32")
def test_a_dense_gradient_is_gathered_from_as_it_comes(block, layout, monkeypatch):
    geometry = Geometry((16, 16, 3, 3), (2, 1), (1, 0), (1, 1), 1)
    topology = Topology.random((16, 144), 0.4, block).to(DEVICE)
    x = torch.randn(2, 16, 5, 6, device=DEVICE).contiguous(memory_format=layout)
    grad = torch.randn(2, 16, *geometry.output_size(x.shape), device=DEVICE).contiguous(memory_format=layout)
    plan = topology.plan(geometry)
    with choice.use_backend("dense"):
        expected = dense_conv2d.values_grad(grad, x, plan)
        monkeypatch.setattr(dense_conv2d, "weight_to_matrix", None)  # copies what is channels_last
        close(conv2d.values_grad(grad, x, plan), expected)


@pytest.mark.parametrize("bias", ["strided", "expanded"])
@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.usefixtures("no_tf32")
def test_a_bias_with_gaps(bias, taps):
    bias = torch.randn(64, device=DEVICE)[::2] if bias == "strided" else torch.ones(1, device=DEVICE).expand(32)
    topology = Topology.random((32, 48), 0.4, (16, 16)).to(DEVICE)
    values, x = torch.randn(topology.values_shape, device=DEVICE), torch.randn(5, 48, device=DEVICE)
    plan = topology.plan()
    with choice.use_backend("triton"):
        close(linear.forward(x, values, bias, None, plan), dense_linear.forward(x, values, bias, None, plan))
    geometry = Geometry((32, 16, taps, taps), (1, 1), (0, 0), (1, 1), 1)
    topology = Topology.random((32, 16 * taps**2), 0.4, (16, 16)).to(DEVICE)
    values, x = torch.randn(topology.values_shape, device=DEVICE), torch.randn(2, 16, 5, 6, device=DEVICE)
    plan = topology.plan(geometry)
    with choice.use_backend("triton"):
        close(conv2d.forward(x, values, bias, None, plan), dense_conv2d.forward(x, values, bias, None, plan))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("block", "stride", "padding", "groups", "linear_"), [
    ((16, 16), 1, 0, 1, True), ((16, 16), 2, 0, 1, False), ((16, 16), 1, 1, 1, False), ((16, 16), 1, 0, 2, False),
    ((8, 1), 1, 0, 1, False),
])  # fmt: skip
@pytest.mark.usefixtures("no_tf32")
def test_pointwise_convolutions_of_blocks_run_as_linear_layers(
    block, stride, padding, groups, linear_, layout, monkeypatch
):
    geometry = Geometry((32, 64 // groups, 1, 1), (stride,) * 2, (padding,) * 2, (1, 1), groups)
    topology = Topology.random((32, 64 // groups), 0.5, block).to(DEVICE)
    values, bias = torch.randn(topology.values_shape, device=DEVICE), torch.randn(32, device=DEVICE)
    x = torch.randn(3, 64, 5, 6, device=DEVICE).contiguous(memory_format=layout)
    grad = torch.randn(3, 32, *geometry.output_size(x.shape), device=DEVICE).contiguous(memory_format=layout)
    plan, launched, call = topology.plan(geometry), [], Launch.__call__

    def note(launch):
        launched.append(launch.kernel.fn.__module__)
        call(launch)

    monkeypatch.setattr(Launch, "__call__", note)
    with choice.use_backend("triton"):
        close(conv2d.forward(x, values, bias, None, plan), dense_conv2d.forward(x, values, bias, None, plan))
        got = conv2d.input_grad(grad, values, x.shape, plan)
        close(got, dense_conv2d.input_grad(grad, values, x.shape, plan))
        close(conv2d.values_grad(grad, x, plan), dense_conv2d.values_grad(grad, x, plan))
        empty = conv2d.forward(x[:0], values, bias, None, plan)
        assert empty.shape == (0, *grad.shape[1:])
    kind = "sparse_linear" if linear_ else "sparse_conv2d"
    assert {module.split(".")[-1] for module in launched if "sum" not in module} == {f"{kind}_kernels"}


@pytest.mark.parametrize(("block", "backend", "expected"), [
    ((16, 16), "auto", "dense"), ((16, 16), "dense", "dense"), ((16, 16), "cuda", "dense"),
    ((16, 16), "triton", "triton"), ((16, 16), "kernel", "triton"),
    ((2, 2), "triton", "dense"), ((2, 2), "auto", "dense"), ((1, 1), "triton", "dense"),
    ((1, 1), "cuda", "cuda"), ((1, 1), "kernel", "cuda"), ((1, 1), "auto", "dense"),
])  # fmt: skip
@pytest.mark.usefixtures("nothing_measured")
def test_what_runs(block, backend, expected):
    if expected == "cuda" and not has_cuda():
        expected = "dense"
    topology = Topology.random((32, 32), 0.5, block)
    x, values = torch.randn(4, 32), torch.randn(topology.values_shape)
    plan = Plan(tuple(t.to("meta") for t in topology.index), block)
    with choice.use_backend(backend), choice.asked_for() as works:
        # of a kind of device that nothing was measured on
        got = linear.choice("forward", x.shape, plan, x.to("meta"), values)
        assert got == expected
        assert linear.choice("forward", x.shape, plan, x.to("meta", torch.float64), values) == "dense"
    for work in works:
        assert work == choice.Work("forward", 4, 32, 32, 1, 1, 1, 1, "meta", block, "float32")
        choice.remember(work, 0.6)
    with choice.use_backend("auto"):  # what this process has measured is used
        got = linear.choice("forward", x.shape, plan, x.to("meta"), values)
        assert got == ({(1, 1): "cuda", (16, 16): "triton"}[block] if works else "dense")


@pytest.mark.usefixtures("nothing_measured", "no_tf32")
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_a_choice_is_made_once(kind, monkeypatch):
    asked, real = [], choice.kernel_pays
    monkeypatch.setattr(
        "sparse_moon.ops.gpu.kernel_pays", lambda work, *rest: (asked.append(work), real(work, *rest))[1]
    )
    topology = Topology.random((32, 32), 0.5, (16, 16))
    values, x = torch.randn(topology.values_shape), torch.randn(4, 32)
    plan = topology.plan() if kind == "linear" else topology.plan(Geometry((32, 32, 1, 1), (1, 1), (0, 0), (1, 1), 1))

    def choose(x=x, values=values, pass_="forward"):
        if kind == "linear":
            return linear.choice(pass_, x.shape, plan, x, values)
        images = x.view(4, 32, 1, 1)
        return conv2d.choice(pass_, images.shape, images, plan, images, values)

    assert [choose(), choose()] == ["dense"] * 2 and len(asked) == 1
    with choice.use_backend("kernel"):
        assert choose() == "triton"
    with choice.asked_for() as works:
        choose()
    assert len(works) == 1
    for pass_ in choice.PASSES:
        choice.remember(works[0]._replace(pass_=pass_), 0.6)
    assert [choose(), choose()] == ["triton"] * 2
    assert choose(values=values.double()) == "dense" and choose(pass_="input_grad") == "triton"
    assert len(asked) == 5
    setting = torch.backends.cuda.matmul if kind == "linear" else torch.backends.cudnn.conv
    before = setting.fp32_precision
    try:
        setting.fp32_precision = "tf32"
        assert choose() == "dense"
        setting.fp32_precision = "ieee"
        assert choose() == "triton"
    finally:
        setting.fp32_precision = before
    assert len(asked) == 6


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "kernel", "triton", "cuda", "dense"])
@pytest.mark.parametrize("pattern", ["unstructured", "vector16", "block32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("no_tf32")
def test_layers_on_the_gpu(pattern, dtype, backend):
    for dense, shape in (
        (nn.Linear(96, 64), (7, 5, 96)),
        (nn.Conv2d(32, 64, 3, 2, 1), (3, 32, 9, 10)),
        (nn.Conv2d(64, 64, 1, groups=2), (3, 64, 9, 10)),
    ):
        kind = sm.SparseConv2d if isinstance(dense, nn.Conv2d) else sm.SparseLinear
        exact = kind.from_dense(dense.double(), sparsity=0.7, pattern=pattern)
        layer = kind.from_dense(dense.to("cuda", dtype), mask=exact.mask().cuda(), pattern=pattern)
        x = torch.randn(shape, dtype=torch.float64)
        results = []
        for module, device in ((exact, "cpu"), (layer, "cuda"), (layer.to_dense(), "cuda")):
            weight = module.values if isinstance(module, sm.nn.SparseLayer) else module.weight
            inputs = x.to(device, weight.dtype).requires_grad_()
            with choice.use_backend(backend):
                y = module(inputs)
                grads = torch.autograd.grad(y.square().sum(), (inputs, weight, module.bias))
            results.append([t.detach().double().cpu() for t in (y, *grads)])
        exact_results, ours, theirs = results
        theirs[2] = layer.topology.cpu().gather(sm.topology.weight_to_matrix(theirs[2], layer.topology.block[1]))
        for e, a, b in zip(exact_results, ours, theirs, strict=True):
            scale = e.norm()
            assert (a - e).norm() <= 2 * (b - e).norm() + 1e-6 * scale


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["unstructured", "block64"])
@pytest.mark.usefixtures("nothing_measured")
def test_tune_takes_the_kernel_of_a_very_sparse_layer_on_the_gpu(pattern):
    layer = sm.SparseLinear(4096, 4096, sparsity=0.99, pattern=pattern, device="cuda")
    chosen = tuning.tune_layer(layer, (4096, 4096))
    assert set(chosen.values()) == {"kernel"}  # many times as fast
    assert tuning.chosen_backends(layer, (4096, 4096)) == chosen


@pytest.mark.gpu
def test_an_update_on_the_gpu_chooses_as_on_the_cpu():
    """SET's choice depends on weights and counters alone, so not on how a device rounds."""
    torch.manual_seed(0)
    start = sm.sparsify(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10)), 0.8, "uniform")
    chosen = []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(start).to(device)
        method = sm.SET(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=100, interval=1)
        method.load_state_dict({**method.state_dict(), "steps": 1})
        with choice.use_backend("kernel"):
            model(torch.ones(4, 64, device=device)).sum().backward()
            assert method.step()
        chosen.append([layer.topology.cpu() for layer in sm.sparse_layers(model).values()])
    for cpu, cuda in zip(*chosen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(cpu.index, cuda.index, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "kernel"])
def test_operators_on_the_gpu_under_opcheck_and_compile(backend):
    topology = Topology.random((32, 32), 0.5, (16, 16)).cuda()
    x = torch.randn(4, 32, device="cuda", requires_grad=True)
    values = torch.randn(topology.values_shape, device="cuda", requires_grad=True)
    with choice.use_backend(backend):
        opcheck(torch.ops.sparse_moon.sparse_linear.default, (x, values, None, None, *topology.index))
        model = sm.sparsify(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), 0.5, pattern="block16")
        model = model.cuda()
        data = torch.randn(8, 64, device="cuda")
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(data), model(data), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "kernel"])
@pytest.mark.parametrize("pattern", ["unstructured", "block32"])
def test_a_training_step_with_moon_in_a_cuda_graph(pattern, backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, 2, 1),
                          nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU(), nn.Linear(64, 11))  # fmt: skip
    with pytest.warns(UserWarning) if pattern != "unstructured" else torch.no_grad():
        model = sm.sparsify(model, 0.8, "uniform", pattern=pattern)
    model = model.to("cuda", memory_format=torch.channels_last).train()
    x = torch.randn(16, 3, 8, 8, device="cuda").contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (16,), device="cuda")

    def training(model):
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        loss = sm.UnknownAwareLoss(10, 10, warmup_epochs=1).cuda()

        def step():
            optimizer.zero_grad(set_to_none=False)
            value = loss(model(x), y)
            value.backward()
            optimizer.step()
            return value

        return step

    with choice.use_backend(backend):
        eager = training(copy.deepcopy(model))
        expected = [eager().item() for _ in range(33)]
        step = training(model)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        found = []
        for _ in range(30):
            graph.replay()
            found.append(captured.item())
    torch.testing.assert_close(found, expected[3:], rtol=1e-3, atol=1e-3)
    assert found[-1] < found[0]
