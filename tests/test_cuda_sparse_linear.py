"""The CUDA kernels of sparse_linear: on the host under the sanitizers, and on a GPU against double precision."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sparse_moon.ops import native as extensions
from sparse_moon.ops.sparse_linear import cuda
from sparse_moon.topology import Topology

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc")


def toolkit_headers() -> Path | None:
    """The CUDA headers that the kernels' host build includes."""
    homes = [Path(NVCC).resolve().parent.parent] if NVCC else []
    candidates = [home / "include" for home in (*homes, Path("/usr/local/cuda"))]
    return next((path for path in candidates if (path / "cuda_fp16.h").exists()), None)


@pytest.mark.skipif(shutil.which("g++") is None or toolkit_headers() is None, reason="needs g++ and the CUDA headers")
def test_kernels_on_the_host(tmp_path):
    program = tmp_path / "driver"
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    includes = ["-isystem", str(toolkit_headers()), f"-I{ROOT / 'csrc'}"]
    source = str(ROOT / "tests/cuda_sparse_linear.cpp")
    built = subprocess.run(
        ["g++", *flags, *warnings, *includes, source, "-o", str(program)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr[-3000:]
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.strip() == "all good"


def test_the_extension_loads_without_a_gpu():
    if extensions.native_cuda is None:
        with pytest.raises(RuntimeError, match="without its CUDA kernels"):
            extensions.require_cuda()
    else:
        assert extensions.require_cuda() is extensions.native_cuda
        with pytest.raises(ValueError, match=r"expected float32, float16 or bfloat16, got torch\.int8"):
            extensions.native_cuda.sparse_linear_workspace("torch.int8", 1, 1, 1, 0)


gpu = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Case:
    """Random operands on the GPU, and all three products in double precision and by torch in the same dtype."""

    def __init__(self, tokens: tuple[int, ...], out: int, cols: int, density: float, dtype: torch.dtype) -> None:
        self.topology = Topology.random((out, cols), density).cuda()
        self.x, self.dy = (torch.randn(*tokens, size, device="cuda", dtype=dtype) for size in (cols, out))
        self.values = torch.randn(self.topology.num_blocks, device="cuda", dtype=dtype)
        self.bias = torch.randn(out, device="cuda", dtype=dtype)

    def dense(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        x, dy, values, bias = (t.to(dtype) for t in (self.x, self.dy, self.values, self.bias))
        weight = self.topology.to_dense(values)
        weight_grad = dy.flatten(0, -2).t() @ x.flatten(0, -2)
        return F.linear(x, weight, bias), dy @ weight, self.topology.gather(weight_grad)

    def ours(self) -> tuple[torch.Tensor, ...]:
        plan = self.topology.plan()
        return (
            cuda.forward(self.x, self.values, self.bias, plan),
            cuda.input_grad(self.dy, self.values, plan),
            cuda.values_grad(self.dy, self.x, plan),
        )

    def check(self) -> None:
        """Our largest error is at most twice that of torch's dense product in the same dtype."""
        exact = self.dense(torch.float64)
        torchs = self.dense(self.x.dtype)
        for name, ours, dense, truth in zip(("y", "dx", "dv"), self.ours(), torchs, exact, strict=True):
            assert ours.dtype == self.x.dtype and ours.shape == truth.shape, name
            if truth.numel():
                error, allowed = ((t.double() - truth).abs().max().item() for t in (ours, dense))
                assert error <= 2 * allowed + 1e-6 * truth.abs().max().item(), (name, error, allowed)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "out", "cols", "density"),
    [
        ((1,), 1, 1, 1.0),
        ((5,), 7, 3, 0.5),
        ((31,), 63, 257, 0.1),
        ((2, 33), 257, 63, 0.9),
        ((100,), 65, 1795, 0.02),  # several chunks of columns
        ((129,), 2051, 100, 0.3),  # several chunks of rows in the gradients
        ((64,), 128, 96, 1.0),
        ((64,), 96, 128, 0.0),
        ((0,), 8, 8, 0.5),
        ((4096,), 1024, 1024, 0.05),  # blocks of many rows
    ],
    ids=str,
)
def test_products(tokens, out, cols, density, dtype):
    Case(tokens, out, cols, density, dtype).check()


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_uneven_rows(dtype):
    """Full rows among nearly empty ones: slices and items of very different lengths, and more than one round."""
    case = Case((70,), 1500, 300, 0.5, dtype)
    mask = torch.rand(1500, 300) < 0.002
    mask[100:160] = True
    case.topology = Topology.from_mask(mask).cuda()
    case.values = torch.randn(case.topology.num_blocks, device="cuda", dtype=dtype)
    case.check()


@gpu
def test_values_in_other_memory_layouts():
    case = Case((40,), 50, 60, 0.2, torch.float32)
    expected = case.ours()
    case.x, case.dy = (t.t().contiguous().t() for t in (case.x, case.dy))
    for ours, truth in zip(case.ours(), expected, strict=True):
        assert torch.equal(ours, truth)


@gpu
def test_missing_entries_ignore_what_is_not_finite():
    """A missing weight is not a zero: an infinite input that no weight reads leaves no trace."""
    mask = torch.tensor([[True, False], [False, False], [True, False]])
    topology = Topology.from_mask(mask).cuda()
    x = torch.tensor([[2.0, float("inf")], [3.0, float("nan")]], device="cuda")
    values = torch.tensor([10.0, 100.0], device="cuda")
    y = cuda.forward(x, values, None, topology.plan())
    assert y.tolist() == [[20.0, 0.0, 200.0], [30.0, 0.0, 300.0]]


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_bits(dtype):
    case = Case((3000,), 300, 500, 0.05, dtype)
    first = case.ours()
    for _ in range(3):
        for a, b in zip(first, case.ours(), strict=True):
            assert torch.equal(a, b)


@gpu
def test_in_a_cuda_graph():
    case = Case((200,), 100, 150, 0.1, torch.float32)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        case.ours()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.ours()
    case.x.copy_(torch.randn_like(case.x))
    case.values.copy_(torch.randn_like(case.values))
    graph.replay()
    for got, expected in zip(captured, case.ours(), strict=True):
        assert torch.equal(got, expected)


@gpu
@pytest.mark.parametrize("sparsity", [0.9, 0.99])
def test_large(sparsity):
    Case((4096,), 4096, 4096, 1 - sparsity, torch.float32).check()
