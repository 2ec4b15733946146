"""The benchmark of whole steps on a GPU, of tiny networks on the host, which plays graphs (host_graph.py)."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from host_graph import HostGraph

from sparse_moon.capture import step as capture_step

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
    code, found = benchmark_(
        "--case", case, "--sparsity", "0.9", "--pattern", "block32", "vector16", "--compile-sparse", "--dense", *ways
    )
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


@pytest.mark.filterwarnings("ignore")  # of outputs without weights
def test_the_kernels_that_a_network_launches_are_known_beforehand(module):
    compile_kernels = module("compile_kernels")
    (network,) = [n for n in compile_kernels.NETWORKS if n.name == "resnet18_32"]
    found = list(compile_kernels.launches_of(network, "block64", 0.9))
    names = {launch.kernel.fn.__name__ for launch in found}
    assert names >= {"forward_kernel", "input_grad_kernel", "_moments", "_forward", "_gradient_sums", "_input_grad"}
    dtypes = {launch.arguments["p_values"].dtype for launch in found if "p_values" in launch.arguments}
    assert dtypes == {torch.bfloat16}
