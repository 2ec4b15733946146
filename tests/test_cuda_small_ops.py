"""The CUDA kernels of the small operators: on the host under the sanitizers, and on a GPU against the references."""

import itertools
import subprocess
from pathlib import Path

import pytest
import torch

from sparse_moon import ops
from sparse_moon.ops.average_ import average_reference_
from sparse_moon.ops.bernoulli_mask import bernoulli_mask_reference, random_scores_reference
from sparse_moon.ops.drop_and_grow import drop_and_grow_layers_cuda, drop_and_grow_reference
from sparse_moon.ops.native import native
from sparse_moon.ops.transpose_index import transpose_index_reference
from sparse_moon.topology import Topology

ROOT = Path(__file__).parents[1]
INF, NAN = float("inf"), float("nan")


def test_kernels_on_the_host_under_address_and_undefined_behaviour_sanitizers(tmp_path, sanitizing_compiler):
    compile_ = sanitizing_compiler("-O1", "-g1")
    driver, program = str(ROOT / "tests" / "cuda_small_ops.cpp"), str(tmp_path / "driver")
    options = ["-ffp-contract=off", "-Wno-unknown-pragmas", "-I", str(ROOT / "csrc")]
    subprocess.run([*compile_, *options, driver, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "passed\n", result.stdout + result.stderr


def on_gpu(arguments):
    return [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]


def assert_same(got, expected, what):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a.cpu(), b), what


# drop_and_grow: the same bits as the reference, which sorts on the CPU


def layer(topology, drop, grow, drops, grows=None):
    return drop, grow, topology.row_ptr, topology.col, drops, drops if grows is None else grows


def assert_same_updates(layers):
    expected = [drop_and_grow_reference(*one) for one in layers]
    got = drop_and_grow_layers_cuda([tuple(on_gpu(one)) for one in layers])
    for one, a, b in zip(layers, got, expected, strict=True):
        assert_same(a, b, one)


SCORE_SETS = [
    [1.0],
    [0.0, -0.0],
    [0.0, -0.0, 1e-45, -1e-45],
    [1e-45, 2e-45, 1.1754944e-38, 1.1754942e-38],
    [INF, 3.4028235e38, 1.0],
    [-1.0, 1.0, -2.0, 2.0],
    [1.0, 1.0000001, 0.99999994],
    [NAN, INF, 0.0, -3.0],
]


@pytest.mark.gpu
@pytest.mark.parametrize("scores", SCORE_SETS, ids=str)
@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (5, 1), (2, 3)], ids=str)
def test_every_mask_and_count_of_small_grids(grid, scores):
    """Hundreds of layers in one call."""
    table, layers = torch.tensor(scores), []
    for bits in itertools.product([False, True], repeat=grid[0] * grid[1]):
        topology = Topology.from_mask(torch.tensor(bits).view(grid))
        n = topology.num_blocks
        drop = table[torch.randint(len(scores), (n,))]
        grow = table[torch.randint(len(scores), grid)]
        for drops in range(n + 1):
            for grows in range(grid[0] * grid[1] - n + drops + 1):
                layers.append(layer(topology, drop, grow, drops, grows))
    assert_same_updates(layers)


GRIDS = [(3, 64), (129, 300), (1, 50_000), (50_000, 1), (128, 512), (257, 1031), (2048, 9)]


@pytest.mark.gpu
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_random_grids(grid, density):
    topology, layers = Topology.random(grid, density), []
    n, room = topology.num_blocks, grid[0] * grid[1] - topology.num_blocks
    for share in (0.0, 0.01, 0.3, 1.0):
        drops = int(share * n)
        layers += [
            layer(topology, torch.randn(n).abs(), torch.randn(grid).abs(), drops),
            layer(topology, torch.randint(3, (n,)).float(), torch.randint(3, grid).float(), drops),
            layer(topology, torch.randn(n).abs(), torch.full(grid, NAN), drops, 0),
            layer(topology, torch.randn(n).abs(), torch.randn(grid).abs(), drops, int(share * room)),
            layer(topology, torch.ones(n), torch.ones(grid), drops),
        ]
    assert_same_updates(layers)


@pytest.mark.gpu
def test_a_large_layer():
    topology = Topology.random((4096, 4096), 0.1)
    n = topology.num_blocks
    normal = layer(topology, torch.randn(n).abs(), torch.randn(4096, 4096).abs(), int(0.3 * n))
    coarse = layer(topology, torch.randn(n).abs().half().float(), torch.randn(4096, 4096).bfloat16().float(), n // 2)
    assert_same_updates([normal, coarse])


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["survivors", "rows", "infinite", "uneven"])
def test_scores_and_masks_that_are_hard(case):
    grid, mask = (150, 400), torch.rand(150, 400) < 0.3
    grow = torch.rand(grid)
    if case == "survivors":
        grow[mask] = INF
    elif case == "rows":
        grow *= 10.0 ** torch.linspace(-30, 30, 150)[:, None]
    elif case == "infinite":
        grow = torch.where(grow < 0.5, INF, 1.0)
    else:
        mask[::3], mask[1::7], mask[:, 5], mask[:, 64] = True, False, True, False
    topology = Topology.from_mask(mask)
    assert_same_updates([layer(topology, torch.rand(topology.num_blocks), grow, topology.num_blocks // 4)])


@pytest.mark.gpu
def test_nan_drops_last_grows_first_and_counts_stay_exact():
    topology = Topology.random((64, 96), 0.5)
    n, grow = topology.num_blocks, torch.rand(64, 96)
    drop = torch.where(torch.rand(n) < 0.9, NAN, torch.rand(n))
    grow[torch.rand(64, 96) < 0.5] = NAN
    for drops in (1, n // 20, n // 2, n):
        assert_same_updates([layer(topology, drop, grow, drops)])


@pytest.mark.gpu
def test_strided_scores_other_dtypes_and_empty_grids():
    topology = Topology.random((40, 30), 0.3)
    n = topology.num_blocks
    layers = [layer(topology, torch.rand(2 * n)[::2], torch.rand(30, 40).t(), n // 2)]
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        layers.append(layer(topology, torch.rand(n).to(dtype), torch.rand(40, 30).to(dtype), n // 2))
    for grid in ((0, 5), (5, 0)):
        layers.append(layer(Topology.random(grid, 0.0), torch.rand(0), torch.rand(grid), 0))
    assert_same_updates(layers)


@pytest.mark.parametrize("counts", [(33, 0), (-1, 0), (1, 34), (1, -1)])
def test_counts_out_of_range(counts):
    topology = Topology.random((8, 8), 0.5)
    with pytest.raises(ValueError, match=rf"drop 0 to 32 of 64 .* got {counts[0]} and {counts[1]}"):
        drop_and_grow_layers_cuda([layer(topology, torch.rand(32), torch.rand(8, 8), *counts)])


@pytest.mark.gpu
def test_updates_are_captured_in_a_graph_and_repeat_bit_by_bit():
    topologies = [Topology.random(grid, 0.2) for grid in ((300, 500), (7, 3), (64, 2000))]
    layers = [layer(t, torch.rand(t.num_blocks), torch.rand(t.grid), t.num_blocks // 3) for t in topologies]
    static = [tuple(on_gpu(one)) for one in layers]
    drop_and_grow_layers_cuda(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = drop_and_grow_layers_cuda(static)
    for _ in range(3):
        changed = [layer(t, torch.rand(t.num_blocks), torch.rand(t.grid), t.num_blocks // 3) for t in topologies]
        for one, new in zip(static, changed, strict=True):
            one[0].copy_(new[0])
            one[1].copy_(new[1])
        graph.replay()
        for one, got in zip(changed, captured, strict=True):
            assert_same(got, drop_and_grow_reference(*one), one)


# transpose_index


@pytest.mark.gpu
@pytest.mark.parametrize("grid", [*GRIDS, (1, 1), (4096, 2048), (100_000, 40), (0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_transpose_index(grid, density):
    topology = Topology.random(grid, density)
    arguments = topology.row_ptr, topology.col, grid[1]
    assert_same(torch.ops.sparse_moon.transpose_index(*on_gpu(arguments)), transpose_index_reference(*arguments), grid)


# random words: the same bits as the reference

SIZES = [0, 1, 3, 4, 5, 15, 16, 17, 4095, 4096, 4097, 1_000_003]
COUNTERS = [(0, 0, 0), (-1, 2**32 - 1, 2**62 + 7), (0x2409382229_9F31D, 1 << 31, -5)]  # seed, stream, step


@pytest.mark.gpu
@pytest.mark.parametrize("counters", COUNTERS, ids=str)
def test_masks_and_random_scores(counters):
    seed, stream, step = counters[0], counters[1], torch.tensor(counters[2])
    for size in SIZES:
        expected = random_scores_reference(size, seed, stream, step)
        assert_same([torch.ops.sparse_moon.random_scores(size, seed, stream, step.cuda())], [expected], size)
        like = torch.empty(size)
        for keep in (0.0, 2.0**-32, 0.5, 1 - 2.0**-40, 1.0):
            mask = torch.ops.sparse_moon.bernoulli_mask(like.cuda(), keep, seed, stream, step)
            assert_same([mask], [bernoulli_mask_reference(like, keep, seed, stream, step)], (size, keep))


@pytest.mark.gpu
def test_a_captured_mask_follows_its_step():
    like, step = torch.empty(5000, device="cuda"), torch.tensor(3, device="cuda")
    torch.ops.sparse_moon.bernoulli_mask(like, 0.3, 1, 2, step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = torch.ops.sparse_moon.bernoulli_mask(like, 0.3, 1, 2, step)
    for now in (3, 2**40):
        step.fill_(now)
        graph.replay()
        assert_same([mask], [bernoulli_mask_reference(like.cpu(), 0.3, 1, 2, torch.tensor(now))], now)


# average_


def tensors():
    last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    many = [torch.randn(17 * i) for i in range(100)]  # more than one launch holds
    return [torch.randn(50_000), torch.randn(7).bfloat16(), torch.randn(3, 4).double(), last, torch.empty(0),
            torch.tensor(2.0), torch.randn(9001)[1:], torch.randn(9001).double()[1:], *many]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("keep", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_average_of_mixed_tensors(keep, count):
    """Streams are numbered over all tensors, whichever path each one takes."""
    averages, values, n, step = tensors(), tensors(), torch.tensor(count), torch.tensor(9)
    values[2] = values[2].float()
    ours = [a.cuda() for a in averages]
    versions = [a._version for a in ours]
    average_reference_(averages, values, n, keep, 5, step)
    torch.ops.sparse_moon.average_(ours, on_gpu(values), n, keep, 5, step)
    for a, b in zip(ours, averages, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6 if a.dtype == torch.float32 else None,
                                   atol=1e-7 if a.dtype == torch.float32 else None)  # fmt: skip
    assert all(a._version > before for a, before in zip(ours, versions, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(native is None, reason="the CPU kernels are not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keep", [1.0, 0.7])
def test_averages_have_the_bits_of_the_cpu_kernel(dtype, keep):
    # each product and sum is rounded on its own, as x86-64 code without fused multiply-add does
    sizes = [1, 4095, 4097, 300_001]
    averages = [torch.randn(size, dtype=dtype) for size in sizes]
    ours = on_gpu(averages)
    for count in range(12):
        values = [torch.randn(size, dtype=dtype) for size in sizes]
        ops.average_(averages, values, torch.tensor(count), keep=keep, seed=3, step=torch.tensor(count))
        torch.ops.sparse_moon.average_(ours, on_gpu(values), torch.tensor(count), keep, 3, torch.tensor(count))
        assert_same(ours, averages, count)


@pytest.mark.gpu
def test_first_value_fixed_point_and_what_is_not_finite():
    value, average = torch.randn(99_999, device="cuda"), torch.full((99_999,), 1e30, device="cuda")
    zero, six = torch.tensor(0, device="cuda"), torch.tensor(6, device="cuda")
    torch.ops.sparse_moon.average_([average], [value], zero, 1.0, 0, zero)
    assert torch.equal(average, value)
    torch.ops.sparse_moon.average_([average], [average], six, 1.0, 0, zero)
    assert torch.equal(average, value)
    average = torch.zeros(64, device="cuda")
    torch.ops.sparse_moon.average_([average], [torch.full((64,), INF, device="cuda")], six, 0.5, 0, zero)
    mask = torch.ops.sparse_moon.bernoulli_mask(average, 0.5, 0, 0, zero)
    assert (average[mask] == INF).all() and average[~mask].isnan().all() and mask.any() and not mask.all()


@pytest.mark.gpu
def test_a_captured_average_follows_its_counters():
    value, average = torch.empty(10_000, device="cuda"), torch.zeros(10_000, device="cuda")
    counter, expected = torch.tensor(0, device="cuda"), torch.zeros(10_000)
    torch.ops.sparse_moon.average_([average], [average.clone()], counter, 0.8, 1, counter)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.sparse_moon.average_([average], [value], counter, 0.8, 1, counter)
        counter += 1
    counter.zero_()
    for step in range(4):
        value.copy_(torch.randn(10_000))
        graph.replay()
        average_reference_([expected], [value.cpu()], torch.tensor(step), 0.8, 1, torch.tensor(step))
    torch.testing.assert_close(average.cpu(), expected, rtol=1e-6, atol=1e-7)
    assert counter == 4
