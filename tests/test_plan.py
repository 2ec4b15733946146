"""What a layer keeps for its products, and when it is made anew."""

import copy
import io
from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_moon as sm
from sparse_moon.ops import Geometry, choice, use_backend
from sparse_moon.ops.native import native


class Plans:
    """The plans that a layer's products get."""

    def __init__(self, monkeypatch):
        import sparse_moon.nn.layers as layers

        self.seen = []
        real = layers.sparse_linear

        def watched(input, values, bias, plan, *, probe=None):
            self.seen.append(plan)
            return real(input, values, bias, plan, probe=probe)

        monkeypatch.setattr(layers, "sparse_linear", watched)

    def of(self, layer):
        layer(torch.randn(2, 8))
        return self.seen[-1]


@pytest.fixture
def plans(monkeypatch):
    return Plans(monkeypatch)


@pytest.fixture
def layer():
    return sm.SparseLinear(8, 6, sparsity=0.5)


def moved(layer):
    regrown = sm.ops.drop_and_grow(
        layer.topology.value_scores(layer.values.detach()), torch.rand(layer.topology.grid), layer.topology, 3
    )
    layer.replace_(regrown.index, regrown.remap(layer.values.detach()))


def test_a_plan_stays_as_long_as_its_index(layer, plans):
    first = plans.of(layer)
    layer.values.data.mul_(2.0)
    layer.train(False)
    assert plans.of(layer) is first
    moved(layer)
    second = plans.of(layer)
    assert second is not first and plans.of(layer) is second
    layer.load_state_dict(sm.SparseLinear(8, 6, sparsity=0.5).state_dict())
    assert plans.of(layer) is not second


@pytest.mark.parametrize("change", [
    lambda layer: layer.share_memory(),  # moves the tensors in place, without a write
    lambda layer: layer.to(torch.float64).to(torch.float32),
    lambda layer: layer.topology.__setattr__("col", layer.topology.col.clone()),
], ids=["share_memory", "to", "another tensor"])  # fmt: skip
def test_an_index_that_lies_elsewhere_gets_another_plan(layer, plans, change):
    plans.of(layer)
    x, addresses = torch.randn(2, 8), [t.data_ptr() for t in layer.topology.index]
    change(layer)
    expected = nn.functional.linear(x, layer.dense_weight(), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    if [t.data_ptr() for t in layer.topology.index] != addresses:
        plan = plans.seen[-1]
        assert plan.state[:5] == tuple(t.data_ptr() for t in layer.topology.index)


def test_copies_and_files_have_plans_of_their_own(layer, plans):
    first, x = plans.of(layer), torch.randn(2, 8)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert plans.of(other) is not first
        assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("how", ["update", "load", "another number of weights"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_an_index_that_changes_between_forward_and_backward_is_an_error(kind, how):
    make = {
        "linear": lambda sparsity=0.5: sm.SparseLinear(8, 6, sparsity=sparsity),
        "conv2d": lambda sparsity=0.5: sm.SparseConv2d(8, 6, 1, sparsity=sparsity),
    }[kind]
    layer, x = make(), torch.randn((2, 8) if kind == "linear" else (2, 8, 3, 3), requires_grad=True)
    # without values that count their changes, only the index tells
    output = layer.topology.to_dense(layer.values).sum() * 0 + layer(x).sum()
    if how == "update":
        moved(layer)
    else:
        layer.load_state_dict(make(0.5 if how == "load" else 0.25).state_dict())
    with pytest.raises(RuntimeError, match=r"in.?place"):
        output.backward()


@pytest.mark.parametrize("backend", ["auto", "dense", "reference"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_a_write_to_the_index_alone_is_an_error_in_the_backward_pass(kind, backend):
    layer = sm.SparseLinear(8, 6, sparsity=0.5) if kind == "linear" else sm.SparseConv2d(8, 6, 1, sparsity=0.5)
    values = layer.values.detach().requires_grad_()
    x = torch.randn((2, 8) if kind == "linear" else (2, 8, 3, 3))
    with use_backend(backend):
        output = torch.func.functional_call(layer, {"values": values}, x).sum()
        output.backward(retain_graph=True)
        layer.topology.col.add_(0)
        with pytest.raises(RuntimeError, match="index of a sparse layer has been modified"):
            output.backward()


@pytest.mark.parametrize("backend", ["auto", "dense", "reference"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_a_graph_from_before_an_update_gives_the_first_layer_no_gradient(kind, backend):
    make = {
        "linear": lambda: sm.SparseLinear(8, 6, sparsity=0.5),
        "conv2d": lambda: sm.SparseConv2d(8, 6, 1, sparsity=0.5),
    }
    layer, x = make[kind](), torch.randn((2, 8) if kind == "linear" else (2, 8, 3, 3))
    with use_backend(backend):
        output = layer(x).sum()
        moved(layer)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward()
    assert layer.values.grad is None


OPTIONS = [("stride", (2, 1)), ("padding", (2, 0)), ("padding", "same"), ("dilation", (2, 2)),
           ("padding_mode", "circular"), ("groups", 1)]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), OPTIONS)
@pytest.mark.parametrize("used", [False, True])
def test_options_of_a_convolution_may_be_set_later(name, value, used):
    """As code does that dilates the last stages of a network for segmentation."""
    dense = nn.Conv2d(4, 6, 3, padding=1)
    layer, x = sm.SparseConv2d.from_dense(dense, sparsity=0.5), torch.randn(2, 4, 9, 8)
    if used:
        layer(x)
    dense = layer.to_dense()
    for conv in (dense, layer):
        setattr(conv, name, value)
        # what torch's constructor makes of both, and its layer reads
        conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
    torch.testing.assert_close(layer(x), dense(x))


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.namespace)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_the_reference_is_torch_alone(kind):
    layer = sm.SparseLinear(8, 6, sparsity=0.5) if kind == "linear" else sm.SparseConv2d(8, 6, 3, sparsity=0.5)
    x = torch.randn((2, 8) if kind == "linear" else (2, 8, 5, 5), requires_grad=True)
    results = []
    for backend in ("reference", "dense"):
        with use_backend(backend), Operators() as operators:
            y = layer(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.values, layer.bias))))
        assert ("sparse_moon" in operators.seen) == (backend == "dense")
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference)


def test_a_geometry_may_be_of_lists():
    topology = sm.Topology.random((6, 4 * 9), 0.5)
    x, values = torch.randn(1, 4, 5, 5), torch.randn(topology.values_shape)
    results = [
        sm.ops.sparse_conv2d(x, values, None, topology.plan(Geometry(kind((6, 4, 3, 3)), *[kind((1, 1))] * 3, 1)))
        for kind in (list, tuple)
    ]
    assert torch.equal(*results)


def test_a_choice_is_kept_until_another_is_measured(monkeypatch):
    """And never inside the blocks that ask for one or look on."""
    if native is None:
        pytest.skip("needs the compiled kernels")
    layer, x, calls = sm.SparseLinear(24, 16, sparsity=0.5), torch.randn(4, 24, requires_grad=True), []
    real = native.sparse_linear
    monkeypatch.setattr(native, "sparse_linear", lambda *inputs: (calls.append(1), real(*inputs))[1])
    work = choice.Work("forward", 4, 24, 16, 1, 1, 1, 1)
    before = choice.remembered()
    try:
        for crossover, backend, ran in [
            (1.0, "auto", True), (1.0, "auto", True), (1.0, "dense", False), (1.0, "auto", True), (0.0, "auto", False),
            (0.0, "kernel", True), (0.0, "auto", False), (1.0, "auto", True),
        ]:  # fmt: skip
            if crossover != choice.remembered().get(work):
                for pass_ in ("forward", "input_grad", "values_grad"):
                    choice.remember(work._replace(pass_=pass_), crossover)
            calls.clear()
            with use_backend(backend) if backend != "auto" else nullcontext():
                output = layer(x)
            assert bool(calls) == ran
            torch.testing.assert_close(output, nn.functional.linear(x, layer.dense_weight(), layer.bias))
        for _ in range(2):
            with choice.asked_for() as works:
                layer(x)
            assert works == [work]
    finally:
        choice.forget()
        for other, crossover in before.items():
            choice.remember(other, crossover)


@pytest.mark.parametrize("crossover", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_a_choice_under_autocast_is_kept(monkeypatch, kind, crossover):
    if native is None:
        pytest.skip("needs the compiled kernels")
    layer = sm.SparseLinear(12, 16, sparsity=0.9) if kind == "linear" else sm.SparseConv2d(12, 16, 3, sparsity=0.9)
    x = torch.randn((5, 12) if kind == "linear" else (5, 12, 6, 7), requires_grad=True)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, *layer.parameters()))]

    monkeypatch.setattr(choice, "crossover", lambda work: crossover)
    first = step()
    module = import_module(f"sparse_moon.ops.sparse_{kind}.cpu")
    monkeypatch.setattr(module, "kernel_takes", lambda *inputs: pytest.fail("asked again"))
    for a, b in zip(step(), first, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_calls_after_the_first_give_its_bits(kind):
    """The first call of a shape decides, later ones do as it did: with operands of other layouts and dtypes between."""
    layer = sm.SparseLinear(12, 16, sparsity=0.5) if kind == "linear" else sm.SparseConv2d(12, 16, 3, sparsity=0.5)
    x = torch.randn((5, 12) if kind == "linear" else (5, 12, 6, 7))

    def results(x, layer=layer):
        x = x.detach().requires_grad_()
        y = layer(x)
        return [t.detach().clone() for t in (y, *torch.autograd.grad((y * y).sum(), (x, *layer.parameters())))]

    first = results(x)
    apart = x.new_empty((*x.shape[:-1], 2 * x.shape[-1]))[..., ::2].copy_(x)
    for got, expected in zip(results(apart), first, strict=True):
        torch.testing.assert_close(got, expected)
    results(x.bfloat16(), copy.deepcopy(layer).bfloat16())
    layer.to(torch.float64)
    results(x.double())
    layer.to(torch.float32)
    if kind == "conv2d":
        for got, expected in zip(results(x.contiguous(memory_format=torch.channels_last)), first, strict=True):
            torch.testing.assert_close(got, expected)
    for _ in range(2):
        assert all(torch.equal(got, expected) for got, expected in zip(results(x), first, strict=True))


def test_a_plan_keeps_few_shapes():
    topology = sm.Topology.random((6, 8), 0.5)
    plan, values = topology.plan(), torch.randn(topology.values_shape)
    for batch in range(1, 300):
        sm.ops.sparse_linear(torch.randn(batch, 8), values, None, plan)
    assert len(plan.inputs) <= 64 and len(plan.decisions) <= 256


@pytest.mark.skipif(native is None, reason="needs the compiled kernels")
@pytest.mark.parametrize("sparsity", [0.1, 0.95], ids=["dense", "kernel"])
def test_what_runs_a_convolution_is_decided_once_for_each_layout(monkeypatch, sparsity):
    import sparse_moon.ops.cpu as cpu

    asked = []
    real = cpu.kernel_pays
    monkeypatch.setattr(cpu, "kernel_pays", lambda work, density: asked.append(work) or real(work, density))
    layer = sm.SparseConv2d(64, 64, 1, sparsity=sparsity)
    x = torch.randn(8, 64, 16, 16)
    results = {}
    for layout in 2 * (torch.contiguous_format, torch.channels_last):
        images = x.clone(memory_format=layout).requires_grad_()
        y = layer(images)
        assert y.is_contiguous(memory_format=layout)
        y.square().sum().backward()
        results.setdefault(layout, []).append((y.detach(), images.grad))
    assert len(asked) == len(set(asked)) == 4  # forward and both gradients, in either layout
    for once, again in results.values():
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    for a, b in zip(*(first for first, _ in results.values()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_values_that_are_cut_between_the_passes_are_an_error(kind):
    layer = sm.SparseLinear(12, 16, sparsity=0.5) if kind == "linear" else sm.SparseConv2d(12, 16, 1, sparsity=0.5)
    x = torch.randn((5, 12) if kind == "linear" else (5, 12, 3, 3), requires_grad=True)
    for _ in range(2):
        output = layer(x).sum()
        whole = layer.values.data
        layer.values.data = whole[:-3]
        with pytest.raises(ValueError, match="values"):
            output.backward()
        layer.values.data = whole
