import pytest
import torch

from sparse_moon.kernels.masked_dense import gather, scatter
from sparse_moon.ops import masked_dense as ops
from sparse_moon.topology import Topology, matrix_shape, matrix_to_weight, weight_to_matrix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [torch.contiguous_format, torch.channels_last]
BLOCKS = [(1, 1), (2, 2), (3, 3), (5, 1), (8, 1), (12, 1), (16, 16)]


def check(topology, shape, value_dtype, dense):
    """Scatter to and gather from ``dense``, a weight of this shape; exact, as values are only rounded."""
    values = torch.randn(topology.values_shape, device=DEVICE).to(value_dtype)
    width = topology.block[1]
    scatter(values, topology.row_ptr, topology.col, dense)
    assert torch.equal(dense, matrix_to_weight(topology.to_dense(values), shape, width).to(dense.dtype))

    dense.copy_(torch.randn(shape))
    taken = torch.full_like(values, float("nan"))
    gather(dense, topology.row_ptr, topology.col, taken)
    assert torch.equal(taken, topology.gather(weight_to_matrix(dense, width)).to(value_dtype))


def empty(shape, dtype=torch.float32, memory_format=torch.contiguous_format):
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE).to(memory_format=memory_format)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("block", [*BLOCKS, (32, 32)])
def test_matrix(block, density):
    shape = (2 * block[0], 7 * block[1])
    check(Topology.random(shape, density, block).to(DEVICE), shape, torch.float32, empty(shape))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (3, 1), (5, 5)])
@pytest.mark.parametrize("block", BLOCKS)
def test_convolution(block, kernel, memory_format):
    shape = (2 * block[0], 3 * block[1], *kernel)
    topology = Topology.random(matrix_shape(shape), 0.4, block).to(DEVICE)
    check(topology, shape, torch.float32, empty(shape, memory_format=memory_format))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_one_channel_and_one_output(memory_format):
    for shape in ((4, 1, 3, 3), (1, 6, 3, 3), (1, 1, 1, 1)):
        topology = Topology.random(matrix_shape(shape), 0.5).to(DEVICE)
        check(topology, shape, torch.float32, empty(shape, memory_format=memory_format))


@pytest.mark.parametrize("block", [(1, 1), (4, 1), (4, 4)])
def test_empty_rows_at_both_ends(block):
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[1, [0, 5]], mask[3] = True, True
    mask = mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    topology = Topology.from_mask(mask, block).to(DEVICE)
    check(topology, topology.shape, torch.float32, empty(topology.shape))


@pytest.mark.parametrize("shape", [(2, 4500), (2, 500, 3, 3)])
def test_rows_of_several_tiles(shape):
    """More entries and more columns than a program moves at once."""
    topology = Topology.random(matrix_shape(shape), 0.6).to(DEVICE)
    assert topology.row_ptr.diff().min() > 1024
    for memory_format in FORMATS[: len(shape) - 2 or 1]:
        check(topology, shape, torch.float32, empty(shape, memory_format=memory_format))


@pytest.mark.parametrize(
    ("value_dtype", "dense_dtype"),
    [
        (torch.float32, torch.float16),
        (torch.float16, torch.float32),
        (torch.float64, torch.float32),
        (torch.float64, torch.float64),
        pytest.param(torch.float32, torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param(torch.bfloat16, torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param(torch.bfloat16, torch.float32, marks=pytest.mark.gpu),
    ],
)
def test_values_are_rounded_to_the_dtype_of_the_weight(value_dtype, dense_dtype):
    for block in ((1, 1), (8, 8)):
        shape = (16, 40)
        check(Topology.random(shape, 0.5, block).to(DEVICE), shape, value_dtype, empty(shape, dense_dtype))


def test_rows_of_a_larger_tensor():
    topology = Topology.random((6, 18), 0.5, (2, 2)).to(DEVICE)
    larger = empty((6, 40))
    check(topology, topology.shape, torch.float32, larger[:, 7:25])
    assert larger[:, :7].isnan().all() and larger[:, 25:].isnan().all()


def test_nothing_at_all():
    """No rows, no columns."""
    for shape in ((0, 4), (4, 0), (4, 0, 3, 3)):
        row_ptr = torch.zeros(shape[0] + 1, dtype=torch.int32, device=DEVICE)
        nothing = torch.empty(0, device=DEVICE)
        scatter(nothing, row_ptr, nothing.int(), empty(shape))
        gather(empty(shape), row_ptr, nothing.int(), nothing)


def test_misfits_are_refused():
    topology = Topology.random((4, 36), 0.5, (2, 2)).to(DEVICE)
    values = torch.zeros(topology.values_shape, device=DEVICE)
    for shape in ((6, 36), (4, 9, 2, 2)):
        with pytest.raises(ValueError, match=r"rows of blocks \(2, 2\) do not make a weight"):
            scatter(values, topology.row_ptr, topology.col, empty(shape))
    with pytest.raises(ValueError, match="contiguous or channels_last, got strides"):
        gather(empty((36, 4)).t(), topology.row_ptr, topology.col, values)
    with pytest.raises(ValueError, match="contiguous or channels_last, got strides"):
        scatter(values, topology.row_ptr, topology.col, empty((4, 4, 3, 3)).transpose(2, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("block", [(1, 1), (8, 1), (32, 1), (16, 16), (32, 32), (64, 64), (128, 128)])
def test_large_on_the_gpu(block, density):
    """Many programs a multiprocessor; twenty times, as a race of zeros and values would not show every time."""
    for shape, memory_format in (
        ((4096, 4096), FORMATS[0]),
        ((512, 512, 3, 3), FORMATS[0]),
        ((512, 512, 3, 3), FORMATS[1]),
    ):
        topology = Topology.random(matrix_shape(shape), density, block).cuda()
        dense = empty(shape, torch.bfloat16, memory_format)
        values = torch.randn(topology.values_shape, device="cuda")
        expected = matrix_to_weight(topology.to_dense(values), shape, block[1]).bfloat16()
        for _ in range(20):
            dense.fill_(float("nan"))
            scatter(values, topology.row_ptr, topology.col, dense)
            assert torch.equal(dense, expected)
        check(topology, shape, torch.float32, dense)


@pytest.mark.gpu
def test_graph_replays_with_other_values_and_places():
    topology, other = (Topology.random((64, 96), 0.1).cuda() for _ in range(2))
    values, dense = torch.randn(topology.values_shape, device="cuda"), empty((64, 96))
    scatter(values, topology.row_ptr, topology.col, dense)  # compiled outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scatter(values, topology.row_ptr, topology.col, dense)
    values.normal_()
    topology.replace_(other.index)
    graph.replay()
    assert torch.equal(dense, other.to_dense(values))


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("block", [(1, 1), (4, 1), (2, 2)])
def test_operators(block, memory_format, dtype, triton, monkeypatch):
    """What is registered for CUDA; where Triton is not there or has no such dtype, the reference runs."""
    monkeypatch.setattr(ops, "has_triton", lambda: triton)
    shape, channels_last = [8, 4, 3, 3], memory_format == torch.channels_last
    topology = Topology.random((8, 36), 0.4, block).to(DEVICE)
    values, rows = torch.randn(topology.values_shape, dtype=dtype, device=DEVICE), (topology.row_ptr, topology.col)
    weight = ops.scatter_values_cuda(values, shape, channels_last, *rows)
    assert torch.equal(weight, ops.scatter_values_reference(values, shape, channels_last, *rows))
    assert weight.is_contiguous(memory_format=memory_format) and weight.dtype == dtype
    weight.copy_(torch.randn(shape))
    taken = ops.gather_values_cuda(weight, list(block), *rows)
    assert torch.equal(taken, ops.gather_values_reference(weight, list(block), *rows)) and taken.dtype == dtype
