"""The benchmark of whole steps on a GPU, of tiny networks on the host, which plays graphs (host_graph.py)."""

import importlib
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from host_graph import HostGraph

from sparse_moon.capture import step as capture_step
from sparse_moon.nn import sparse_layers

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
WAYS = ("eager", "compiled", "reduce-overhead", "max-autotune")


@pytest.fixture
def benchmark_(monkeypatch, tmp_path):
    """The benchmark's ``main`` with these arguments: its exit code and what it wrote."""
    pytest.importorskip("timm")
    if not (BENCHMARKS / "flops_and_time.py").exists():
        pytest.skip("the benchmarks are not here")
    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench
    import flops_and_time

    monkeypatch.setattr(bench, "ceilings", lambda device, seconds: {})  # takes seconds
    monkeypatch.setattr(capture_step, "StepGraph", HostGraph)
    monkeypatch.setattr(torch, "compile", lambda model, mode: model)  # takes a minute a network

    def run(*arguments, section="step"):
        out = tmp_path / "steps.json"
        command = ["flops_and_time.py", section, "--tiny", "--quick", "--json", str(out), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as exit_:
            flops_and_time.main()
        return exit_.value.code, json.loads(out.read_text()) if out.exists() else None

    yield run
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]


@pytest.mark.filterwarnings("ignore")  # of outputs without weights
@pytest.mark.parametrize(("case", "ways"), [
    ("vit_base", WAYS), ("gpt2_350m", WAYS), ("resnet18", ("eager",)),
    pytest.param("resnet18", WAYS, marks=pytest.mark.slow),  # minutes, where torch emulates bfloat16
])  # fmt: skip
def test_every_case_has_its_figures(case, ways, benchmark_):
    arguments = (
        "--case",
        case,
        "--sparsity",
        "0.9",
        "--pattern",
        "block32",
        "vector16",
        "--compile-sparse",
        "compiled",
    )
    code, found = benchmark_(*arguments, "--dense", *ways)
    assert code == 0, found
    assert found["commit"] and found["torch"] == torch.__version__
    rows = {(row["pattern"], row["pass"], row["baseline"]): row for row in found["rows"]}
    for pattern in ("block32", "vector16"):
        for dense in ways:
            row = rows[pattern, "sparse, rigl, moon", f"dense {dense}"]
            assert row["speedup"] == pytest.approx(row["baseline_ms"] / row["ms"], rel=1e-3)
    assert {p for p, pass_, _ in rows if pass_ == "sparse compiled, rigl, moon"} == {"block32"}
    assert any("24 blocks from 2" in row["pass"] for row in found["rows"]) == (case == "gpt2_350m")
    notes = [note for note in found["notes"] if "pattern" in note]
    assert len(notes) == 2
    assert all(note["kernels_run"] == ("kernel" in note["products"]) for note in notes)
    assert all(0.3 < note["sparsity_of_all"] <= 0.9 for note in notes)
    assert all(note["products"] and note["update_share"] == note["update_share"] for note in notes)


@pytest.mark.filterwarnings("ignore")
def test_a_case_that_fails_is_put_down_and_the_next_one_runs(benchmark_, monkeypatch):
    import gpu_steps

    sparse = gpu_steps._Steps._sparse

    def fails(self, pattern, sparsity):
        if sparsity == 0.9:
            raise RuntimeError("out of memory")
        sparse(self, pattern, sparsity)

    monkeypatch.setattr(gpu_steps._Steps, "_sparse", fails)
    arguments = ("--case", "vit_small", "--dense", "eager", "--sparsity", "0.9", "0.8", "--pattern", "block32")
    code, found = benchmark_(*arguments)
    assert code == 1
    assert found["failures"] == {"vit_small block32 0.9": "RuntimeError: out of memory"}
    assert [row["sparsity"] for row in found["rows"]] == [0.0, 0.8]


@pytest.mark.filterwarnings("ignore")
def test_dense_steps_are_put_down_one_by_one_and_compiled_with_their_loss(benchmark_, monkeypatch):
    import gpu_steps

    compiled = []

    def compile_(function, mode):
        if mode.startswith("max-autotune"):
            raise RuntimeError("took too long")
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    arguments = ("--case", "vit_small", "--sparsity", "0.9", "--pattern", "block32", "--compile-sparse", "compiled")
    code, found = benchmark_(*arguments, "--dense", "compiled", "max-autotune")
    assert code == 1 and found["failures"].keys() == {"vit_small max-autotune"}
    assert [row["pass"] for row in found["rows"]] == [
        "dense compiled", "sparse, rigl, moon", "sparse compiled, rigl, moon",
    ]  # fmt: skip
    dense, sparse = compiled
    (network,) = [n for n in gpu_steps.gpu_networks.tiny() if n.name == "vit_small"]
    images, labels = network.batch(torch.device("cpu"))
    assert dense(images, labels).dim() == 0
    assert sparse(images).shape == (len(images), network.classes + 1)


@pytest.mark.filterwarnings("ignore")
def test_compiling_alone_times_nothing(benchmark_, monkeypatch):
    import bench
    import gpu_steps

    def never(*_, **__):
        raise AssertionError

    for where, name in ((bench, "ceilings"), (gpu_steps, "median_ms")):
        monkeypatch.setattr(where, name, never)
    modes = []
    monkeypatch.setattr(torch, "compile", lambda function, mode: modes.append(mode) or function)
    arguments = ("--case", "vit_small", "--sparsity", "0.9", "--pattern", "block32", "--compile-sparse")
    more = ("compiled", "reduce-overhead", "--dense", "compiled", "max-autotune")
    code, found = benchmark_(*arguments, *more, "--compile-only")
    assert code == 0 and not found["rows"]
    assert modes == ["default", "max-autotune-no-cudagraphs", "default", "reduce-overhead"]


def test_a_wrong_result_is_put_down_and_the_next_case_runs(benchmark_, monkeypatch):
    import flops_and_time

    exact = flops_and_time.drop_and_grow_reference

    def wrong(drop, grow, *rest):
        return exact(drop, grow.flip(0) if len(grow) == 512 else grow, *rest)

    monkeypatch.setattr(flops_and_time, "drop_and_grow_reference", wrong)
    monkeypatch.setattr(flops_and_time.Bench, "floor_ms", lambda *_: 0.0)
    code, found = benchmark_("--sparsity", "0.9", section="update")
    assert code == 1
    assert found["failures"] == {"drop_and_grow_512_4608 0.9": "WrongResult: drop_and_grow: differs from the reference"}
    assert [row["case"] for row in found["rows"]] == ["drop_and_grow_4096_4096"]


@pytest.mark.filterwarnings("ignore")
def test_what_there_is_no_time_for_is_left_out(benchmark_):
    code, found = benchmark_("--case", "vit_small", "--seconds", "0")
    assert code == 1
    assert found["rows"] == []
    assert all(error.startswith("TimeLimit") for error in found["failures"].values())


@pytest.fixture
def module(monkeypatch):
    """A file of the benchmarks by name."""
    if not (BENCHMARKS / "tune.py").exists():
        pytest.skip("the benchmarks are not here")
    monkeypatch.syspath_prepend(BENCHMARKS)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]


def test_crossovers_of_networks_take_the_place_of_those_in_the_table(module, monkeypatch, tmp_path):
    tune = module("tune")
    linear = {"pass_": "forward", "batch": 8192, "inputs": 1024, "positions": 1, "taps": 1, "stride": 1, "groups": 1,
              "device": "cuda", "block": [64, 64], "dtype": "bfloat16"}  # fmt: skip
    path = tmp_path / tune.choice.table_name("cpu")
    rows = [{"work": {**linear, "outputs": n}, "crossover": 0.1} for n in (1024, 5)]
    path.write_text(json.dumps({"gpu": "another", "rows": rows}))
    monkeypatch.setattr(tune, "TABLES", tmp_path)

    def measure(layer, shape, pattern, layout, known):
        work = tune.choice.Work(**{**linear, "outputs": layer.out_features, "block": (64, 64)})
        return [{"work": work._asdict(), "crossover": 0.2}]

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["tune.py", "--case", "gpt2_350m", "--pattern", "block64"])
    tune.main()
    table = json.loads(path.read_text())
    assert table["kept"] == {"gpu": "another"}
    found = {(row["work"]["outputs"], row["crossover"]) for row in table["rows"]}
    assert found == {(5, 0.1), (1024, 0.2), (3072, 0.2), (4096, 0.2)}


PATTERNS = ("block32", "block64", "block128", "vector16")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_comes_out_of_resnet50_depends_on_the_image(pattern, module):
    """Rounded to whole blocks, layers of 64 channels kept none, and nothing came through."""
    networks = module("gpu_networks")
    (network,) = [n for n in networks.NETWORKS if n.name == "resnet50_224"]
    network = replace(network, shape=(2, 3, 64, 64))
    images = network.batch(torch.device("cpu"))[0]
    for sparsity in (0.8, 0.9, 0.95):
        model = network.build(network.classes + 1, torch.device("cpu"))
        network.sparsify(model, sparsity, pattern)
        assert all(layer.topology.num_blocks for layer in sparse_layers(model).values())
        with torch.no_grad():
            one, other = model(images)
        assert (one - other).abs().max() > 0.1, sparsity


@pytest.mark.filterwarnings("ignore")
def test_a_dead_network_is_refused(module, monkeypatch):
    networks = module("gpu_networks")
    monkeypatch.setattr(networks, "has_blocks", lambda layer, sparsity, pattern: True)
    (network,) = [n for n in networks.NETWORKS if n.name == "resnet50_224"]
    network = replace(network, shape=(2, 3, 64, 64))
    model = network.build(network.classes + 1, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"resnet50_224 with block64 at 0\.9 all outputs are the same"):
        network.sparsify(model, 0.9, "block64")


def described(layer, shape):
    return f"{layer} {tuple(shape)}"


@pytest.mark.parametrize("name", ["resnet50", "resnet18", "vit_base", "vit_small", "gpt2_350m", "gpt2_1.3b"])
def test_crossovers_are_measured_pattern_by_pattern_for_every_layer(name, module, monkeypatch):
    pytest.importorskip("timm")
    tune = module("tune")
    (network,) = [n for n in tune.NETWORKS if name in n.name]
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda layer: layer.weight.data.zero_())
    cases = list(tune.network_cases([name], list(PATTERNS)))
    order = [pattern for _, _, pattern, _ in cases]
    assert order == sorted(order, key=PATTERNS.index)
    for pattern in PATTERNS:
        wanted = {described(layer, shape) for _, layer, shape in network.layers()
                  if tune.has_blocks(layer, 0.8, pattern)}  # fmt: skip
        assert {described(dense, shape) for dense, shape, of, _ in cases if of == pattern} == wanted
    for dense, _, pattern, _ in cases:
        if dense.weight.numel() <= 2**21:  # larger ones take seconds
            assert tune.sparse(dense, 0.2, pattern).topology.num_blocks >= 2


def test_a_layer_that_cannot_be_measured_leaves_the_others(module, monkeypatch, tmp_path, capsys):
    tune = module("tune")
    path = tmp_path / tune.choice.table_name("cpu")
    monkeypatch.setattr(tune, "TABLES", tmp_path)

    def measure(layer, shape, pattern, layout, known):
        if layer.out_features == 1024:
            raise RuntimeError("no kernel")
        work = tune.choice.Work("forward", 1, 1, layer.out_features, 1, 1, 1, 1)
        return [{"work": work._asdict(), "crossover": 0.2}]

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["tune.py", "--case", "gpt2_350m", "--pattern", "block64"])
    with pytest.raises(SystemExit):
        tune.main()
    assert {row["work"]["outputs"] for row in json.loads(path.read_text())["rows"]} == {3072, 4096}
    assert "failed: RuntimeError: no kernel" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["resnet50", "vit_base"])
def test_a_table_of_a_network_lets_its_products_run_kernels(name, module, monkeypatch):
    pytest.importorskip("timm")
    tune = module("tune")
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda layer: None)
    pattern, block = ("block32", (32, 32)) if name == "resnet50" else ("block64", (64, 64))

    def work(layer, shape):
        if isinstance(layer, torch.nn.Linear):
            return tune.choice.Work("forward", shape[0] * shape[1], layer.in_features, layer.out_features, 1, 1, 1, 1,
                                    "cuda", block, "bfloat16")  # fmt: skip
        positions = ((shape[2] - 1) // layer.stride[0] + 1) ** 2
        return tune.choice.Work("forward", shape[0], layer.in_channels, layer.out_channels, positions,
                                layer.kernel_size[0] ** 2, layer.stride[0], 1, "cuda", block, "bfloat16")  # fmt: skip

    cases = tune.network_cases([name], [pattern, "block128"])
    first = list(itertools.takewhile(lambda case: case[2] == pattern, cases))  # where the time ended then
    table = [(work(layer, shape), 0.3) for layer, shape, _, _ in first]
    monkeypatch.setattr(tune.choice, "table", lambda device: table)
    tune.choice.forget()
    (network,) = [n for n in tune.NETWORKS if name in n.name]
    for layer_name, layer, shape in network.layers():
        expected = 0.3 if tune.has_blocks(layer, 0.8, pattern) else 0.0
        assert tune.choice.crossover(work(layer, shape)) == expected, layer_name
    tune.choice.forget()


def test_the_kernels_that_a_network_launches_are_known_beforehand(module):
    compile_kernels = module("compile_kernels")
    (network,) = [n for n in compile_kernels.NETWORKS if n.name == "resnet18_32"]
    found = list(compile_kernels.launches_of(network, "block64", [0.9]))
    names = {launch.kernel.fn.__name__ for launch in found}
    assert names >= {"forward_kernel", "input_grad_kernel", "_moments", "_forward", "_gradient_sums", "_input_grad"}
    dtypes = {launch.arguments["p_values"].dtype for launch in found if "p_values" in launch.arguments}
    assert dtypes == {torch.bfloat16}
