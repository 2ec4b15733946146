"""The CUDA convolution of unstructured weights: its kernels' bodies on the host, and the kernels against float64."""

import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_moon.ops import Geometry
from sparse_moon.ops.native import native_cuda
from sparse_moon.ops.sparse_conv2d import cuda
from sparse_moon.topology import Topology, matrix_to_weight, weight_to_matrix

ROOT = Path(__file__).parents[1]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def test_kernel_bodies_on_the_host_under_address_and_undefined_behaviour_sanitizers(tmp_path, sanitizing_compiler):
    compile_ = sanitizing_compiler("-O1", "-g1")
    driver, program = str(ROOT / "tests" / "cuda_sparse_conv2d.cpp"), str(tmp_path / "driver")
    include = ["-I", str(ROOT / "csrc")]
    subprocess.run([*compile_, "-Wno-unknown-pragmas", *include, driver, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "passed\n", result.stdout + result.stderr


def built(test):
    """For the GPU: with the extension built."""
    return pytest.mark.gpu(pytest.mark.skipif(native_cuda is None, reason="the CUDA kernels are not built")(test))


class Problem:
    """Random operands on the GPU; every fifth output channel is without entries."""

    def __init__(
        self, shape, weight_shape, stride=1, padding=0, dilation=1, groups=1, density=0.2, dtype=torch.float32
    ):
        options = [(p, p) if isinstance(p, int) else p for p in (stride, padding, dilation)]
        self.geometry = Geometry(weight_shape, *options, groups)
        mask = torch.rand(weight_shape[0], torch.Size(weight_shape[1:]).numel()) < density
        mask[::5] = False
        self.topology = Topology.from_mask(mask).cuda()
        self.values = torch.randn(self.topology.values_shape, device="cuda", dtype=dtype)
        self.x = torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
        self.bias = torch.randn(weight_shape[0], device="cuda", dtype=dtype)
        out_shape = (shape[0], weight_shape[0], *self.geometry.output_size(self.x.shape))
        self.grad = torch.randn(out_shape, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)

    def ours(self) -> tuple[Tensor, Tensor, Tensor]:
        plan = self.topology.plan(self.geometry)
        return (
            cuda.forward(self.x, self.values, self.bias, plan),
            cuda.input_grad(self.grad, self.values, self.x.shape, plan),
            cuda.values_grad(self.grad, self.x, plan),
        )

    def dense(self, absolute: bool = False, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The same through a dense weight by PyTorch; of absolute values if wanted."""
        x, grad, values, bias = (
            (t.abs() if absolute else t).to(dtype or t.dtype) for t in (self.x, self.grad, self.values, self.bias)
        )
        weight_shape, *options, groups = self.geometry
        weight = matrix_to_weight(self.topology.to_dense(values), tuple(weight_shape), 1)
        y = F.conv2d(x, weight, bias, *options, groups)
        dx, dw, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *options, False, [0, 0], groups, [True, True, False]
        )
        return y, dx, self.topology.gather(weight_to_matrix(dw, 1))


@pytest.fixture
def _no_tf32():
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


def check(problem: Problem) -> None:
    """Our error against float64 is at most twice that of PyTorch in the same dtype, or a few units in the last place of
    float32 of the same product of absolute values, rounded to the dtype: where PyTorch is right by chance, so."""
    exact, sizes = problem.dense(dtype=torch.float64), problem.dense(absolute=True, dtype=torch.float64)
    for ours, dense, best, size in zip(problem.ours(), problem.dense(), exact, sizes, strict=True):
        assert ours.shape == best.shape and ours.dtype == problem.x.dtype
        if ours.dim() == 4:
            assert ours.is_contiguous(memory_format=torch.channels_last)
        if best.numel() == 0:
            continue
        error, allowed = (ours.double() - best).abs().max(), (dense.double() - best).abs().max()
        floor = 2**-22 * size.max() + torch.finfo(ours.dtype).eps / 2 * best.abs().max()
        assert error <= 2 * allowed + floor  # NaN fails


GEOMETRIES = [
    # input, weight, stride, padding, dilation, groups
    ((32, 32, 8, 8), (32, 32, 3, 3), 1, 1, 1, 1),
    ((64, 40, 8, 8), (24, 40, 3, 3), 2, 1, 1, 1),
    ((33, 17, 7, 9), (19, 17, 3, 3), 1, 1, 1, 1),
    ((65, 16, 9, 7), (9, 16, 3, 3), 2, 1, 1, 1),
    ((5, 16, 14, 14), (16, 16, 5, 5), 1, 2, 1, 1),
    ((3, 3, 32, 32), (16, 3, 7, 7), 2, 3, 1, 1),
    ((16, 64, 7, 7), (48, 64, 1, 1), 1, 0, 1, 1),
    ((16, 64, 7, 7), (48, 64, 1, 1), 2, 0, 1, 1),
    ((4, 8, 11, 13), (8, 8, 2, 3), (3, 2), (0, 2), (2, 1), 1),
    ((4, 8, 11, 13), (8, 8, 3, 3), 2, 4, 2, 1),
    ((6, 24, 9, 9), (12, 8, 3, 3), 2, 1, 1, 3),
    ((9, 12, 6, 6), (24, 1, 3, 3), 1, 1, 1, 12),
    ((2, 3, 32, 32), (11, 3, 16, 16), 16, 0, 1, 1),
    ((1, 5, 1, 1), (7, 5, 1, 1), 1, 0, 1, 1),
    ((1, 1, 5, 300), (1, 1, 3, 3), 1, 1, 1, 1),
    ((2, 4, 3, 3), (4, 4, 3, 3), 3, 2, 1, 1),
]


@built
@pytest.mark.usefixtures("_no_tf32")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_agrees_with_a_dense_convolution(geometry, dtype):
    check(Problem(*geometry, dtype=dtype))


@built
@pytest.mark.usefixtures("_no_tf32")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.02, 0.1])
@pytest.mark.parametrize("stride", [1, 2])
def test_layers_of_a_network(stride, density, dtype):
    """Sizes at which large tiles and several slices of several tiles are chosen."""
    check(Problem((128, 64, 32, 32), (128, 64, 3, 3), stride, 1, density=density, dtype=dtype))
    check(Problem((128, 256, 8, 8), (256, 256, 3, 3), stride, 1, density=density, dtype=dtype))


@built
@pytest.mark.usefixtures("_no_tf32")
@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("batch", [0, 1, 3, 8, 31, 63, 129])
def test_batches_and_extreme_densities(batch, density):
    problem = Problem((max(batch, 1), 6, 5, 5), (10, 6, 3, 3), 1, 1, density=density)
    if batch:
        check(problem)
        return
    problem.x, problem.grad = problem.x[:0], problem.grad[:0]
    y, dx, dv = problem.ours()
    assert y.shape == (0, 10, 5, 5) and dx.shape == (0, 6, 5, 5)
    assert torch.equal(dv, torch.zeros_like(dv))


@built
def test_without_entries_the_output_is_the_bias():
    problem = Problem((2, 4, 6, 6), (5, 4, 3, 3), density=0.0)
    y, dx, dv = problem.ours()
    assert torch.equal(y, problem.bias[:, None, None].expand_as(y)) and not dx.any() and dv.shape == (0,)
    y = cuda.forward(problem.x, problem.values, None, problem.topology.plan(problem.geometry))
    assert not y.any()


@built
@pytest.mark.usefixtures("_no_tf32")
def test_other_layouts_come_out_channels_last():
    problem = Problem((3, 8, 6, 6), (16, 8, 3, 3), 1, 1)
    expected = problem.ours()
    problem.x, problem.grad = problem.x.contiguous(), problem.grad.contiguous()
    check(problem)
    assert all(torch.equal(a, b) for a, b in zip(problem.ours(), expected, strict=True))
    problem.x = torch.randn(4, 9, 6, 7, device="cuda")[1:, 1:, :, 1:]
    check(problem)


@built
@pytest.mark.usefixtures("_no_tf32")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_that_are_not_aligned_to_vectors(dtype):
    problem = Problem((4, 3, 5, 5), (5, 3, 3, 3), dtype=dtype)
    problem.x, problem.grad, problem.bias = problem.x[1:], problem.grad[1:], torch.randn(6, device="cuda").to(dtype)[1:]
    assert problem.x.data_ptr() % 16 and problem.x.is_contiguous(memory_format=torch.channels_last)
    check(problem)


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_bits_every_time_and_in_a_graph(dtype):
    problem = Problem((64, 64, 16, 16), (64, 64, 3, 3), 2, 1, dtype=dtype)
    first = problem.ours()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(problem.ours(), first, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.ours()
    for _ in range(2):
        for tensor in (problem.x, problem.grad, problem.values):
            tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, problem.ours(), strict=True))


@built
@pytest.mark.usefixtures("_no_tf32")
def test_offsets_beyond_32_bits():
    """More than 2^31 elements of input and output; the last image, against a batch of its own."""
    free, _ = torch.cuda.mem_get_info()
    if free < 60 * 2**30:
        pytest.skip("needs 60 GiB of free GPU memory")
    problem = Problem((2050, 64, 128, 128), (64, 64, 1, 1), density=0.02, dtype=torch.bfloat16)
    y, dx, _ = problem.ours()
    problem.x, problem.grad = problem.x[-3:].clone(), problem.grad[-3:].clone()
    for whole, part in zip((y, dx), problem.ours()[:2], strict=True):
        assert torch.equal(whole[-3:], part)
