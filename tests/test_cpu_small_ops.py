"""The compiled CPU kernels of the small operators against their references, on what is hard for them."""

import itertools

import pytest
import torch
from torch.library import opcheck

from sparse_moon import ops
from sparse_moon.ops.average_ import average_reference_
from sparse_moon.ops.bernoulli_mask import bernoulli_mask_reference, philox, random_scores, random_scores_reference
from sparse_moon.ops.drop_and_grow import drop_and_grow_reference
from sparse_moon.ops.native import native
from sparse_moon.ops.unknown_aware_loss import unknown_aware_loss_reference
from sparse_moon.topology import Topology

pytestmark = pytest.mark.skipif(native is None, reason="the CPU kernels are not built")

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("name", ["drop_and_grow", "unknown_aware_loss", "average_", "bernoulli_mask", "random_scores"])
def test_the_kernel_is_registered(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sparse_moon::{name}", "CPU")


# drop_and_grow: the same bits as the reference


def assert_same_update(topology, drop, grow, drops, grows=None):
    arguments = (drop, grow, topology.row_ptr, topology.col, drops, drops if grows is None else grows)
    got, expected = torch.ops.sparse_moon.drop_and_grow(*arguments), drop_and_grow_reference(*arguments)
    for name, a, b in zip(("row_ptr", "col", "t_ptr", "t_row", "t_perm", "source"), got, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), (name, arguments)


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


@pytest.mark.parametrize("scores", SCORE_SETS, ids=str)
@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (5, 1), (2, 3)], ids=str)
def test_every_mask_and_count_of_small_grids(grid, scores):
    table = torch.tensor(scores)
    for bits in itertools.product([False, True], repeat=grid[0] * grid[1]):
        topology = Topology.from_mask(torch.tensor(bits).view(grid))
        n = topology.num_blocks
        drop = table[torch.randint(len(scores), (n,))]
        grow = table[torch.randint(len(scores), grid)]
        for drops in range(n + 1):
            for grows in range(grid[0] * grid[1] - n + drops + 1):
                assert_same_update(topology, drop, grow, drops, grows)


# from 32768 positions on the kernel looks at a sample first
@pytest.mark.parametrize("grid", [(3, 64), (3, 65), (129, 300), (1, 50_000), (50_000, 1)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_random_grids(grid, density):
    topology = Topology.random(grid, density)
    n = topology.num_blocks
    for share in (0.0, 0.01, 0.3, 1.0):
        assert_same_update(topology, torch.randn(n).abs(), torch.randn(grid).abs(), int(share * n))
        assert_same_update(topology, torch.randint(3, (n,)).float(), torch.randint(3, grid).float(), int(share * n))
        assert_same_update(topology, torch.randn(n).abs(), torch.full(grid, NAN), int(share * n), 0)
        room = grid[0] * grid[1] - n
        assert_same_update(topology, torch.randn(n).abs(), torch.randn(grid).abs(), int(share * n), int(share * room))


def test_full_and_empty_rows():
    mask = torch.rand(200, 190) < 0.1
    mask[::3], mask[1::7], mask[:, 5], mask[:, 64] = True, False, True, False
    topology = Topology.from_mask(mask)
    assert_same_update(topology, torch.rand(topology.num_blocks), torch.rand(200, 190), topology.num_blocks // 3)


@pytest.mark.parametrize("case", ["equal", "zeros", "survivors", "rows", "infinite"])
def test_growth_scores_that_mislead_a_sample(case):
    grid, topology = (150, 400), Topology.random((150, 400), 0.3)
    mask = topology.mask()
    grow = {
        "equal": torch.ones(grid),
        "zeros": torch.where(torch.rand(grid) < 0.02, torch.rand(grid), 0.0),  # fewer candidates above 0 than asked for
        "survivors": torch.where(mask, INF, torch.rand(grid)),
        "rows": torch.rand(grid) * 10.0 ** torch.linspace(-30, 30, 150)[:, None],
        "infinite": torch.where(torch.rand(grid) < 0.5, INF, 1.0),
    }[case]
    assert_same_update(topology, torch.rand(topology.num_blocks), grow, topology.num_blocks // 4)


def test_a_bound_guessed_too_high_is_replaced():
    """High scores at all sampled places and nowhere else: too few positions reach the guessed bound."""
    grid, topology = (256, 500), Topology.random((256, 500), 0.4)
    sampled = [i * 0x9E3779B97F4A7C15 % 2**64 % (256 * 500) for i in range(1, 2**13 + 1)]
    grow = torch.rand(256 * 500)
    grow[sampled] += 1.0
    count = topology.num_blocks // 2
    assert count > 2**13
    assert_same_update(topology, torch.rand(topology.num_blocks), grow.view(grid), count)


@pytest.mark.parametrize("block", [(4, 1), (4, 4)], ids=str)
def test_blocks(block):
    topology = Topology.random((64, 96), 0.3, block)
    values, gradient = torch.randn(topology.values_shape), torch.randn(64, 96)
    scores = topology.value_scores(values), topology.block_scores(gradient)
    assert_same_update(topology, *scores, topology.num_blocks // 3)
    regrown = ops.drop_and_grow(*scores, topology, topology.num_blocks // 3)
    assert regrown.remap(values).count_nonzero() <= values.count_nonzero()


def test_strided_scores_and_other_dtypes():
    topology = Topology.random((40, 30), 0.3)
    n = topology.num_blocks
    assert_same_update(topology, torch.rand(2 * n)[::2], torch.rand(30, 40).t(), n // 2)
    for dtype in (torch.float64, torch.bfloat16):
        assert_same_update(topology, torch.rand(n).to(dtype), torch.rand(40, 30).to(dtype), n // 2)
        assert_same_update(topology, torch.rand(n), torch.rand(40, 30).to(dtype), n // 2)


# random words: the same bits as the reference

SIZES = [0, 1, 3, 4, 5, 31, 32, 33, 2047, 2048, 2049, 8193]
COUNTERS = [(0, 0, 0), (-1, 2**32 - 1, 2**62 + 7), (0x2409382229_9F31D, 1 << 31, -5)]  # seed, stream, step


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("counters", COUNTERS, ids=str)
def test_masks_and_random_scores(size, counters):
    seed, stream, step = counters[0], counters[1], torch.tensor(counters[2])
    scores = random_scores(size, seed=seed, stream=stream, step=step)
    assert torch.equal(scores, random_scores_reference(size, seed, stream, step)) and scores.dtype == torch.float32
    like = torch.empty(size)
    for keep in (0.0, 2.0**-32, 0.5, 0.9, 1 - 2.0**-32, 1 - 2.0**-40, 1.0):
        mask = ops.bernoulli_mask(like, keep, seed=seed, stream=stream, step=step)
        assert torch.equal(mask, bernoulli_mask_reference(like, keep, seed, stream, step))


def test_a_word_equal_to_the_threshold_is_not_kept():
    like, step = torch.empty(16), torch.tensor(2)
    for i, word in enumerate(philox(16, 7, 1, step).tolist()):
        assert not ops.bernoulli_mask(like, word / 2**32, seed=7, stream=1, step=step)[i]
        assert ops.bernoulli_mask(like, (word + 1) / 2**32, seed=7, stream=1, step=step)[i]


def test_mask_of_a_strided_tensor_follows_its_logical_order():
    like, step = torch.empty(6, 5).t(), torch.tensor(3)
    mask = ops.bernoulli_mask(like, 0.5, seed=1, stream=0, step=step)
    assert torch.equal(mask, ops.bernoulli_mask(torch.empty(5, 6), 0.5, seed=1, stream=0, step=step))


def test_random_scores_opcheck_and_errors():
    opcheck(torch.ops.sparse_moon.random_scores.default, (11, 3, 1, torch.tensor(2)))
    with pytest.raises(ValueError, match="size must be at least 0, got -1"):
        random_scores(-1, seed=0, stream=0, step=torch.tensor(0))
    with pytest.raises(ValueError, match="stream must be in"):
        random_scores(4, seed=0, stream=2**32, step=torch.tensor(0))


# average_


@pytest.mark.parametrize("keep", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_average_of_mixed_tensors(keep, count):
    """Streams are numbered over all tensors, whichever path each one takes."""

    def tensors():
        last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
        return [torch.randn(5000), torch.randn(7).bfloat16(), torch.randn(3, 4).double(), last,
                torch.empty(0), torch.tensor(2.0)]  # fmt: skip

    averages, values = tensors(), tensors()
    values[2] = values[2].float()
    expected = [t.clone() for t in averages]
    versions = [t._version for t in averages]
    step = torch.tensor(9)
    average_reference_(expected, values, torch.tensor(count), keep, 5, step)
    ops.average_(averages, values, torch.tensor(count), keep=keep, seed=5, step=step)
    for a, b in zip(averages, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6 if a.dtype == torch.float32 else None,
                                   atol=1e-7 if a.dtype == torch.float32 else None)  # fmt: skip
    assert all(t._version > before for t, before in zip(averages, versions, strict=True))


def test_first_value_and_fixed_point_are_exact():
    value = torch.randn(999)
    average = torch.full((999,), 1e30)
    ops.average_([average], [value], torch.tensor(0))
    assert torch.equal(average, value)
    ops.average_([average], [average], torch.tensor(6))
    assert torch.equal(average, value)


def test_an_average_of_what_is_not_finite_says_so():
    average = torch.zeros(64)
    ops.average_([average], [torch.full((64,), INF)], torch.tensor(3), keep=0.5, step=torch.tensor(0))
    mask = ops.bernoulli_mask(average, 0.5, seed=0, stream=0, step=torch.tensor(0))
    assert (average[mask] == INF).all() and average[~mask].isnan().all() and mask.any() and not mask.all()


# unknown_aware_loss


def loss_and_gradient(function, logits, target, w):
    logits = logits.detach().clone().requires_grad_()
    loss = function(logits, target, w)
    loss.backward()
    return loss.detach(), logits.grad


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 15, 16, 17, 33, 1001])
@pytest.mark.parametrize("spread", [0.1, 3.0, 40.0])
def test_loss_is_as_exact_as_pytorch(classes, spread):
    """The error against float64 is at most twice that of PyTorch in float32."""
    logits, w = spread * torch.randn(19, classes), torch.tensor(1.5)
    target = torch.randint(0, classes - 1, (19,))
    exact = loss_and_gradient(unknown_aware_loss_reference, logits.double(), target, w)
    plain = loss_and_gradient(unknown_aware_loss_reference, logits, target, w)
    ours = loss_and_gradient(lambda *a: ops.unknown_aware_loss(*a)[0], logits, target, w)
    for best, other, mine in zip(exact, plain, ours, strict=True):
        resolution = torch.finfo(torch.float32).eps * best.abs().max()
        assert (mine - best).abs().max() <= 2 * (other - best).abs().max() + resolution
    p = logits.double().softmax(1)
    ce = -p.gather(1, target[:, None])[:, 0].log()
    statistics = ops.unknown_aware_loss(logits, target, w)[1]
    torch.testing.assert_close(statistics.beta, ((1 - p[:, -1]) * ce).mean().float())
    torch.testing.assert_close(statistics.mean_u, p[:, -1].mean().float())
    assert statistics.errors == (logits.argmax(1) != target).sum()


def test_gradient_of_probabilities_down_to_denormals():
    logits = torch.tensor([[0.0, -50.0, -87.5, -95.0, -103.0, -103.9, -104.5, -1e30, -INF, -20.0]])
    target, w = torch.tensor([0]), torch.tensor(0.0)
    _, gradient = loss_and_gradient(lambda *a: ops.unknown_aware_loss(*a)[0], logits, target, w)
    expected = logits.double().softmax(1)
    assert (gradient - expected)[0, 1:].abs().max() <= 2e-7 * expected[0, 9]
    torch.testing.assert_close(gradient[0, 1:8].double(), expected[0, 1:8], rtol=3e-7, atol=1.5e-45)
    assert gradient[0, 7] == gradient[0, 8] == 0


@pytest.mark.parametrize(
    "row", [[1.0, 1.0, 1.0], [0.0, -0.0, -1.0], [2.0, 5.0, 5.0], [NAN, 1.0, 2.0], [1.0, 2.0, NAN], [INF, 0.0, INF],
            [-INF, -INF, -INF], [0.0, NAN, INF]], ids=str
)  # fmt: skip
def test_ties_and_what_is_not_finite(row):
    logits, w = torch.tensor([row, [0.0, 1.0, 2.0]]), torch.tensor(1.0)
    for y in (0, 1):
        target = torch.tensor([y, 1])
        loss, statistics = ops.unknown_aware_loss(logits, target, w)
        torch.testing.assert_close(loss, unknown_aware_loss_reference(logits, target, w), equal_nan=True)
        assert statistics.errors == (logits.argmax(1) != target).sum()


def test_strided_logits_repeated_calls_and_weights_of_other_dtypes():
    logits, target = torch.randn(11, 64).t(), torch.randint(0, 10, (128,))[::2]
    runs = [torch.ops.sparse_moon.unknown_aware_loss(logits, target, torch.tensor(0.7, dtype=dtype))
            for dtype in (torch.float32, torch.float32, torch.float64)]  # fmt: skip
    dense = torch.ops.sparse_moon.unknown_aware_loss(logits.contiguous(), target.contiguous(), torch.tensor(0.7))
    for run in runs:
        assert all(torch.equal(a, b) for a, b in zip(run, dense, strict=True))


@pytest.mark.parametrize("bad", [-100, -1, 3, 4, 2**40])
def test_targets_out_of_range(bad):
    with pytest.raises(ValueError, match=rf"target must be in \[0, 3\), got {bad} in row 2"):
        ops.unknown_aware_loss(torch.randn(3, 4), torch.tensor([0, 1, bad]), torch.tensor(1.0))


# threads


def test_results_do_not_depend_on_the_number_of_threads():
    logits, target, w = torch.randn(64, 1001), torch.randint(0, 1000, (64,)), torch.tensor(1.5)
    values = [torch.randn(n) for n in (200_003, 7)]
    step, results = torch.tensor(3), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            averages = [torch.ones_like(v) for v in values]
            ops.average_(averages, values, step, keep=0.5, seed=4, step=step)
            ops.average_(averages, values, step)
            results.append([*torch.ops.sparse_moon.unknown_aware_loss(logits, target, w), *averages])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
