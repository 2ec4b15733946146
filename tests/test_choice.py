import importlib
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.resources import files
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sparse_moon as sm
from sparse_moon.nn import tune as tuning
from sparse_moon.ops import choice
from sparse_moon.ops.choice import PASSES, Work
from sparse_moon.ops.native import native

ROOT = Path(__file__).parents[1]
LINEAR_PASSES = PASSES[:3]
pytestmark = [
    pytest.mark.skipif(native is None, reason="needs the compiled CPU kernels"),
    pytest.mark.usefixtures("nothing_measured"),
]


def conv():
    return sm.SparseConv2d(8, 16, 3, padding=1, stride=2, groups=2, sparsity=0.9), (4, 8, 9, 10)


def asked(layer, shape, layout=torch.contiguous_format):
    with sm.ops.use_backend("kernel"), choice.asked_for() as works:  # whatever table this machine has
        x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
        layer(x).sum().backward()
    return works


def test_every_pass_asks_with_its_own_numbers():
    convolution = [Work(p, 4, 4, 16, 5 * 5, 9, 2, 2) for p in ("forward", "grads")]
    assert asked(*conv()) == convolution
    assert asked(*conv(), torch.channels_last) == [work._replace(channels_last=True) for work in convolution]
    assert asked(sm.SparseLinear(6, 8, sparsity=0.5, pattern="vector4"), (2, 3, 6)) == [
        Work(p, 6, 6, 8, 1, 1, 1, 1) for p in LINEAR_PASSES
    ]


def test_backends_agree_and_are_really_different(monkeypatch):
    layer, shape = conv()
    x = torch.randn(shape)
    calls = []
    real = native.sparse_conv2d
    monkeypatch.setattr(native, "sparse_conv2d", lambda *a: (calls.append(1), real(*a))[1], raising=True)
    with sm.ops.use_backend("dense"):
        expected = layer(x)
    assert not calls
    with sm.ops.use_backend("kernel"):
        torch.testing.assert_close(layer(x), expected)
    assert calls


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pays", [False, True])
@pytest.mark.parametrize("pass_", PASSES[1:])
def test_gradients_have_a_choice_alone_and_together(pass_, pays, layout, monkeypatch):
    layer, shape = conv()
    x = torch.randn(shape).contiguous(memory_format=layout)
    x.requires_grad_(pass_ != "values_grad")
    layer.values.requires_grad_(pass_ != "input_grad")
    calls = []
    for other in PASSES:
        work = Work(other, 4, 4, 16, 25, 9, 2, 2, channels_last=layout == torch.channels_last)
        choice.remember(work, float(pays))
    for name in ("grads", "input_grad", "values_grad"):
        real = getattr(native, f"sparse_conv2d_{name}")
        run = lambda *a, name=name, real=real: (calls.append(name), real(*a))[1]  # noqa: E731
        monkeypatch.setattr(native, f"sparse_conv2d_{name}", run)
    leaves = [leaf for leaf in (x, layer.values) if leaf.requires_grad]
    gradients = torch.autograd.grad(layer(x).square().sum(), leaves)
    assert calls == ([pass_] if pays else [])
    exact, y = layer.double(), x.detach().double().requires_grad_(x.requires_grad)
    expected = torch.autograd.grad(exact(y).square().sum(), [leaf for leaf in (y, exact.values) if leaf.requires_grad])
    for got, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)
    if x.requires_grad:
        assert gradients[0].is_contiguous(memory_format=layout)


def test_the_crossovers_of_a_training_pass_decide_together():
    layer, shape = conv()  # a tenth of whose weights exist

    def chosen(forward, grads):
        for pass_ in PASSES:
            choice.remember(Work(pass_, 4, 4, 16, 25, 9, 2, 2), grads if pass_ == "grads" else forward)
        return set(tuning.chosen_backends(layer, shape).values())

    assert chosen(0.05, 0.05) == chosen(0.04, 0.3) == chosen(0.0, 1.0) == chosen(1.0, 0.06) == {"dense"}
    assert chosen(0.2, 0.2) == chosen(0.05, 0.3) == chosen(1.0, 0.07) == {"kernel"}

    linear = sm.SparseLinear(10, 20, sparsity=0.9)
    for pass_, crossover in zip(LINEAR_PASSES, (0.05, 0.2, 0.2), strict=True):
        choice.remember(Work(pass_, 3, 10, 20, 1, 1, 1, 1), crossover)
    assert set(tuning.chosen_backends(linear, (3, 10)).values()) == {"kernel"}
    choice.remember(Work("values_grad", 3, 10, 20, 1, 1, 1, 1), 0.1)
    assert set(tuning.chosen_backends(linear, (3, 10)).values()) == {"dense"}


def test_each_product_runs_alone():
    layer, shape = conv()
    layer.values.requires_grad_(False)
    runs = tuning.products(layer, shape)
    assert tuple(runs) == PASSES
    for pass_, run in runs.items():
        with choice.asked_for() as works:
            run()
        assert [work.pass_ for work in works] == [pass_]


def test_nearest_neighbour(monkeypatch):
    base = Work("forward", 128, 64, 64, 256, 9, 1, 1)
    table = [
        (base, 0.1),
        (base._replace(batch=1), 0.2),
        (base._replace(taps=1), 0.3),
        (base._replace(stride=2), 0.4),
        (base._replace(positions=1, taps=1), 0.5),
        (base._replace(pass_="values_grad"), 0.6),
    ]
    monkeypatch.setattr(choice, "table", lambda device: table)

    def measure(work, crossover):
        table.append((work, crossover))
        choice.forget()

    for work, value in table:
        assert choice.pass_crossover(work) == value
    assert choice.pass_crossover(base._replace(batch=2, inputs=48)) == 0.2
    assert choice.pass_crossover(base._replace(positions=4)) == pytest.approx(0.1)
    measure(base._replace(positions=64), 0.3)  # as far from 128 positions as those of 256
    assert choice.pass_crossover(base._replace(positions=128)) == pytest.approx(0.2)
    measure(base._replace(channels_last=True), 0.7)
    assert choice.pass_crossover(base._replace(channels_last=True)) == 0.7
    assert choice.pass_crossover(base._replace(channels_last=True, taps=1)) == 0.3  # a layout counts less than a kind
    assert (
        choice.pass_crossover(base._replace(block=(16, 16)))
        == choice.pass_crossover(base._replace(dtype="tf32"))
        == 0.0
    )
    assert choice.pass_crossover(base._replace(batch=1, taps=1)) == 0.3
    assert choice.pass_crossover(base._replace(positions=1, taps=1, inputs=4096, batch=1)) == 0.5
    assert choice.pass_crossover(base._replace(pass_="grads")) == 0.0
    measure(base._replace(inputs=1), 0.9)  # whose dense product is not Winograd's
    assert (
        choice.pass_crossover(base._replace(inputs=12)) == 0.9
        and choice.pass_crossover(base._replace(inputs=17)) == 0.1
    )
    measure(base._replace(pass_="grads"), 0.3)
    assert choice.pass_crossover(base._replace(pass_="grads")) == 0.3


def cpu(isa, vendor):
    return SimpleNamespace(isa=lambda: isa, vendor=lambda: vendor)


@pytest.mark.parametrize("vendor", ["intel", "amd", "other"])
@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_stored_table_covers_every_pass(isa, vendor, monkeypatch):
    monkeypatch.setattr(choice, "native", cpu(isa, vendor))
    stored = choice.table.__wrapped__("cpu")
    assert {work.pass_ for work, _ in stored} == set(PASSES)
    monkeypatch.setattr(choice, "table", lambda device: stored)
    for pass_ in PASSES:
        for work in (Work(pass_, 1, 3, 64, 1024, 49, 2, 1), Work(pass_, 2048, 768, 3072, 1, 1, 1, 1)):
            assert 0.0 <= choice.crossover(work) <= 1.0


def test_every_table_is_of_some_cpu(monkeypatch):
    folder = files("sparse_moon.ops").joinpath("tables")
    stored = {path.name for path in folder.iterdir() if path.name.startswith("crossover_cpu")}
    names = set()
    for isa, vendor in product(("avx512", "avx2"), ("intel", "amd")):
        monkeypatch.setattr(choice, "native", cpu(isa, vendor))
        names.add(choice.table_name("cpu"))
    assert stored <= names and {name.split("_")[2] for name in stored} == {"avx512", "avx2"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert choice.table_name("cuda") == "crossover_cuda_sm90.json"


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    choice.table.cache_clear()
    choice.forget()
    yield
    choice.table.cache_clear()
    choice.forget()


def linear(pass_="forward", size=4096, block=64, dtype="bfloat16", **changes):
    work = Work(pass_, size, size, size, 1, 1, 1, 1, "cuda", (block, block), dtype)
    return work._replace(**changes)


def conv2d(pass_="forward", channels=256, block=64, dtype="bfloat16", **changes):
    work = Work(pass_, 256, channels, channels, 256, 9, 1, 1, "cuda", (block, block), dtype)
    return work._replace(**changes)


# Percent of sparsity from which on the kernels took at least 5 % less time, forward and gradients, of the linear layer
# and of both convolutions; docs/speed.md has the table. None where they never did.
PAID_FROM = {
    ("block32", "bfloat16"): ((90, 90), (90, 90)),
    ("block64", "bfloat16"): ((90, 90), (90, 90)),
    ("block128", "bfloat16"): ((90, 90), (90, 90)),
    ("vector16", "bfloat16"): ((90, None), (None, 95)),
    ("unstructured", "float32"): ((90, 90), (None, 99)),
}
DENSE = {
    "linear 4096": lambda: nn.Linear(4096, 4096, bias=False),
    "3x3 256": lambda: nn.Conv2d(256, 256, 3, padding=1, bias=False),
    "3x3 512": lambda: nn.Conv2d(512, 512, 3, padding=1, bias=False),
}


def on_hopper(dense, percent, pattern, dtype):
    """A layer as sparsify makes it, which asks as on a GPU, where its products are no matter of minutes.

    And what ran for each pass.
    """
    model = sm.sparsify(nn.Sequential(DENSE[dense]()), percent / 100, "uniform", first_dense=False, pattern=pattern)
    layer, ran = model[0], {}
    work = linear if dense == "linear 4096" else conv2d
    dtype = "tf32" if (work, dtype) == (conv2d, "float32") else dtype
    size, block = layer.topology.shape[0], layer.topology.block
    works = [work(pass_, size, dtype=dtype)._replace(block=block) for pass_ in LINEAR_PASSES]
    kind = "cuda" if block == (1, 1) else "triton"
    plan = layer.topology.plan()
    assert {work.blocks for work in works} == {plan.grid[0] * plan.grid[1]}

    def forward(x):
        ran.update({w.pass_: "kernel" if choice.kernel_pays(w, plan.density, kind) else "dense" for w in works})
        return x * layer.values.sum()

    layer.forward = forward
    return model, ran


@pytest.mark.usefixtures("hopper")
@pytest.mark.filterwarnings("ignore:.*outputs have no weight", "ignore:a sparsity of .* was asked for")
@pytest.mark.parametrize(("pattern", "dtype"), PAID_FROM)
@pytest.mark.parametrize("dense", DENSE)
def test_kernels_that_paid_on_a_hopper_gpu_run_there_by_default(dense, pattern, dtype, monkeypatch):
    forward, gradients = PAID_FROM[pattern, dtype][dense != "linear 4096"]
    rows, x = choice.table("cuda"), torch.zeros(1, requires_grad=True)
    for percent in (80, 90, 95, 99):
        model, ran = on_hopper(dense, percent, pattern, dtype)
        model(x)
        expected = {
            pass_: "kernel" if least is not None and percent >= least else "dense"
            for pass_, least in zip(LINEAR_PASSES, (forward, gradients, gradients), strict=True)
        }
        assert ran == expected, f"{percent} %"
        with monkeypatch.context() as patch:
            patch.setattr(choice, "table", lambda device: rows)  # of the CPU, too, where the layer lies
            assert sm.what_runs(model, x) == {"0": expected}
            said = sm.what_would_pay(model, x)
        if "kernel" in expected.values():
            assert said is None
        else:
            assert said.startswith(f"no sparse kernel is known to pay on this device for {pattern} weights")
            assert ("block64 in 16 bits pays in 1 of them" in said or "block64 pays in 1 of them" in said) == (
                percent >= 90
            )


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("pass_", LINEAR_PASSES)
def test_as_many_blocks_as_were_measured_count_as_measured_and_one_more_does_not(pass_):
    for work, most in (
        (linear(pass_), 410), (linear(pass_, size=8192), 1638), (linear(pass_, block=1, dtype="float32"), 1677722),
        (conv2d(pass_, block=32), 58), (conv2d(pass_, block=128), 4), (conv2d(pass_, 512), 58),
        (conv2d(pass_, 512, block=128), 14), (conv2d(pass_, 1024, block=128), 58),
        (conv2d(pass_, inputs=640, block=128), 9),
    ):  # fmt: skip
        kind = "cuda" if work.block == (1, 1) else "triton"
        assert choice.kernel_pays(work, most / work.blocks, kind)
        assert not choice.kernel_pays(work, (most + 1) / work.blocks, kind)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("pass_", LINEAR_PASSES)
def test_nothing_is_taken_for_granted_beyond_what_was_measured_there(pass_):
    assert not choice.kernel_pays(linear(pass_), 0.11, "triton")  # more weights
    assert not choice.kernel_pays(linear(pass_, outputs=2048), 0.05, "triton")  # smaller
    assert not choice.kernel_pays(linear(pass_, batch=1024), 0.05, "triton")
    assert not choice.kernel_pays(conv2d(pass_, batch=16), 0.05, "triton")
    assert not choice.kernel_pays(conv2d(pass_, stride=2), 0.05, "triton")  # other loops
    assert not choice.kernel_pays(conv2d(pass_, taps=1), 0.05, "triton")
    assert not choice.kernel_pays(linear(pass_, block=16), 0.05, "triton")  # other blocks and dtypes
    assert not choice.kernel_pays(linear(pass_, block=1), 0.05, "cuda")
    assert not choice.kernel_pays(conv2d(pass_, block=1, dtype="tf32"), 0.05, "cuda")  # slower than TF32 there
    assert choice.kernel_pays(linear(pass_, size=8192), 0.1, "triton")  # larger
    assert choice.kernel_pays(conv2d(pass_, batch=1024, positions=64), 0.1, "triton")  # as many places in all


@pytest.mark.usefixtures("hopper")
def test_the_table_of_the_gpu_is_what_was_measured_layer_by_layer(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    cuda_table = importlib.import_module("cuda_table")
    monkeypatch.setattr(cuda_table, "TABLE", tmp_path / "table.json")
    monkeypatch.setattr(sys, "argv", ["cuda_table.py"])
    cuda_table.main()
    stored = files("sparse_moon.ops").joinpath("tables", "crossover_cuda_sm90.json")
    assert json.loads((tmp_path / "table.json").read_text()) == json.loads(stored.read_text())


def test_kernels_run_on_an_unmeasured_device_only_when_asked_for():
    work = Work("forward", 128, 64, 64, 256, 9, 1, 1, device="xpu", block=(32, 32), dtype="bfloat16")
    assert not choice.kernel_pays(work, 0.001, "triton")
    with choice.use_backend("triton"):
        assert choice.kernel_pays(work, 0.9, "triton") and not choice.kernel_pays(work, 0.001, "cuda")
    with choice.use_backend("kernel"):
        assert choice.kernel_pays(work, 0.9, "triton") and choice.kernel_pays(work, 0.9, "cuda")


def test_tune_takes_what_is_faster(monkeypatch):
    model = sm.sparsify(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 32)), 0.8).train()
    monkeypatch.setattr(tuning, "kernel_gain", lambda run, device: 2.0)
    expected = dict.fromkeys("03", dict.fromkeys(PASSES, "kernel"))
    assert sm.tune(model, (3, 8, 8), 5) == expected
    assert model.training and not model[0]._forward_pre_hooks
    monkeypatch.setattr(tuning, "kernel_gain", lambda run, device: 0.6)
    sm.tune(model, (3, 8, 8), 5)
    assert tuning.chosen_backends(model[3], (5, 8 * 36)) == dict.fromkeys(PASSES, "dense")
    assert choice.remembered().keys() == {
        *[Work(p, 5, 3, 8, 36, 9, 1, 1) for p in PASSES],
        *[Work(p, 5, 8 * 36, 32, 1, 1, 1, 1) for p in LINEAR_PASSES],
    }


@pytest.mark.parametrize(("gain", "backend"), [(2.0, "kernel"), (0.6, "dense")])
def test_what_tune_has_found_runs_at_every_density(gain, backend, monkeypatch):
    monkeypatch.setattr(tuning, "kernel_gain", lambda run, device: gain)
    for kept in range(1, 200, 3):
        layer = sm.SparseLinear(10, 20, sparsity=1 - kept / 200)
        tuning.tune_layer(layer, (3, 10))
        plan = layer.topology.plan()
        assert plan.index[1].numel() == kept
        for work in choice.remembered():
            assert choice.kernel_pays(work, plan.density) == (backend == "kernel"), kept
            assert not choice.kernel_pays(work, (kept + 1) / 200)  # which was not measured
        assert set(tuning.chosen_backends(layer, (3, 10)).values()) == {backend}
        model = nn.Sequential(layer)
        assert set(sm.what_runs(model, torch.zeros(3, 10))["0"].values()) == {backend}


def test_tune_really_measures():
    layer, shape = conv()
    chosen = tuning.tune_layer(layer, shape)
    assert chosen.keys() == set(PASSES) and set(chosen.values()) <= {"kernel", "dense"}
    assert tuning.chosen_backends(layer, shape) == chosen


def test_tune_draws_no_random_numbers_and_calls_hooks_in_its_pass_alone():
    model = nn.Sequential(sm.SparseLinear(8, 16, sparsity=0.5), nn.Sigmoid(), sm.SparseLinear(16, 8, sparsity=0.5))
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    model[2].values.register_hook(lambda _: calls.append("gradient"))
    state = torch.get_rng_state()
    assert sm.tune(model, (8,), 4).keys() == {"0", "2"}
    assert calls == ["hook"] and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("make", [conv, lambda: (sm.SparseLinear(10, 20, sparsity=0.9), (5, 10))])
def test_tune_measures_in_the_dtype_that_autocast_asks_for(make):
    layer, shape = make()
    dtypes = []
    forward = layer.forward
    layer.forward = lambda x: (dtypes.append(x.dtype), forward(x))[1]
    with torch.autocast("cpu", torch.bfloat16):
        tuning.tune_layer(layer, shape)
    assert set(dtypes) == {torch.bfloat16} and layer.values.dtype == torch.float32
    dtypes.clear()
    tuning.tune_layer(layer, shape)
    assert set(dtypes) == {torch.float32}


def test_a_gpu_s_time_is_that_of_the_model_s_gpu(monkeypatch):
    current, wrong = ["cuda:0"], []

    @contextmanager
    def device(new):
        before, current[0] = current[0], str(new)
        yield
        current[0] = before

    def on_device(*_, **__):
        if current[0] != "cuda:1":
            wrong.append(current[0])

    event = SimpleNamespace(record=on_device, synchronize=on_device, elapsed_time=lambda end: 5.0)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: (on_device(), event)[1])
    for name in ("synchronize", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, on_device)
    assert tuning.kernel_gain(lambda: None, torch.device("cuda:1"), seconds=0.0) == 1.0
    assert not wrong and current == ["cuda:0"]


def test_use_backend_restores_and_refuses():
    with pytest.raises(RuntimeError), sm.ops.use_backend("dense"):
        raise RuntimeError
    assert choice.current_backend() == "auto"
    with pytest.raises(ValueError, match="backend must be one of"), sm.ops.use_backend("fast"):
        pass


def test_blocks_of_use_backend_may_overlap():
    seen = []

    def block(backend):
        with sm.ops.use_backend(backend):
            yield

    first, second = block("kernel"), block("dense")
    next(first), next(second)
    assert choice.current_backend() == "dense"
    first.close()
    assert choice.current_backend() == "dense"
    with ThreadPoolExecutor(1) as pool:  # another thread is not in the block
        seen.append(pool.submit(choice.current_backend).result())
    second.close()
    assert seen == ["auto"] and choice.current_backend() == "auto"


def test_a_backward_pass_uses_the_backend_of_its_forward_pass():
    layer, x = sm.SparseLinear(40, 24, sparsity=0.5), torch.randn(5, 40, requires_grad=True)
    with sm.ops.use_backend("kernel"):
        output = layer(x)
    asked = []
    x.register_hook(lambda _: asked.append(choice.current_backend()))
    layer.values.register_hook(lambda _: asked.append(choice.current_backend()))
    with ThreadPoolExecutor(1) as pool, choice.asked_for() as works:
        pool.submit(output.sum().backward).result()
    assert [work.pass_ for work in works] == ["input_grad", "values_grad"] and asked == ["auto", "auto"]
    with sm.ops.use_backend("kernel"):
        expected = torch.autograd.grad(layer(x).sum(), [x, layer.values])
    assert torch.equal(x.grad, expected[0]) and torch.equal(layer.values.grad, expected[1])


def test_a_new_shape_costs_little():
    shapes = [Work("forward", 32 + i, 64, 64, 256, 9, 1, 1) for i in range(200)]
    choice.crossover(shapes[0])
    start = time.process_time()  # whatever else the machine does
    for work in shapes[1:]:
        choice.crossover(work)
    assert (time.process_time() - start) / 199 < 5e-4  # 1 ms before, 40 us now
    assert choice.nearest.cache_info().maxsize == 4096


@pytest.mark.parametrize("make", [conv, lambda: (sm.SparseLinear(40, 24, sparsity=0.9), (5, 40))])
def test_bfloat16_runs_on_the_kernel_with_float32_sums(make):
    layer, shape = make()
    layer.bfloat16()
    x = torch.randn(shape).bfloat16().requires_grad_()
    upstream = None
    found = []
    for backend in ("kernel", "dense"):
        x.grad = layer.values.grad = None
        with sm.ops.use_backend(backend):
            y = layer(x)
            upstream = torch.randn_like(y) if upstream is None else upstream
            y.backward(upstream)
        assert y.dtype == x.grad.dtype == layer.values.grad.dtype == torch.bfloat16
        found.append((y.detach(), x.grad, layer.values.grad))
    exact_layer = layer.double()
    z = x.detach().double().requires_grad_()
    exact_layer.zero_grad()
    y = exact_layer(z)
    y.backward(upstream.double())
    for ours, dense, exact in zip(*found, (y.detach(), z.grad, exact_layer.values.grad), strict=True):
        allowed = 2 * (dense - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
        assert (ours - exact).abs().max() <= allowed
