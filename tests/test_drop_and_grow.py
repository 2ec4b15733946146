import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from sparse_moon import ops
from sparse_moon.topology import Topology


def naive(drop, grow, positions, drops, grows):
    """Independent version with Python's sorts: dropped and grown positions, and where each new entry came from."""
    order = sorted(range(len(positions)), key=lambda i: (drop[i], i))
    survivors = {positions[i] for i in order[drops:]}
    candidates = sorted((p for p in range(len(grow)) if p not in survivors), key=lambda p: (-grow[p], p))
    updated = sorted(survivors | set(candidates[:grows]))
    place = {p: i for i, p in enumerate(positions)}
    return updated, [place.get(p, -1) for p in updated]


# few distinct scores, so that ties are the rule, and the extremes of float32
SCORES = [0.0, 1e-45, 1.0, 1.0000001, 3.4e38, float("inf")]


@given(rows=st.integers(1, 6), cols=st.integers(1, 6), data=st.data())
def test_agrees_with_sorting_in_python(rows, cols, data):
    size = rows * cols
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))).view(rows, cols)
    topology = Topology.from_mask(mask)
    n = topology.num_blocks
    drop = data.draw(st.lists(st.sampled_from(SCORES), min_size=n, max_size=n))
    grow = data.draw(st.lists(st.sampled_from(SCORES), min_size=size, max_size=size))
    drops = data.draw(st.integers(0, n))
    grows = data.draw(st.none() | st.integers(0, size - n + drops))
    positions = mask.flatten().nonzero().flatten().tolist()
    regrown = ops.drop_and_grow(
        torch.tensor(drop, dtype=torch.float32),
        torch.tensor(grow, dtype=torch.float32).view(rows, cols),
        topology,
        drops,
        grows,
    )
    updated, source = naive(drop, grow, positions, drops, drops if grows is None else grows)
    assert regrown.source.tolist() == source
    expected = torch.zeros(size, dtype=torch.bool)
    expected[updated] = True
    expected = Topology.from_mask(expected.view(rows, cols))
    assert all(torch.equal(a, b) for a, b in zip(regrown.index, expected.index, strict=True))
    assert all(t.dtype == torch.int32 for t in (*regrown.index, regrown.source))


def test_by_hand():
    # active: 0 (score 3), 2 (score 1), 3 (score 1); the tie drops position 2. Candidates: 1, 2, 4, 5; 4 has the largest
    topology = Topology.from_mask(torch.tensor([[True, False, True], [True, False, False]]))
    drop, grow = torch.tensor([3.0, 1.0, 1.0]), torch.tensor([[9.0, 1.0, 2.0], [9.0, 5.0, 5.0]])
    regrown = ops.drop_and_grow(drop, grow, topology, 1)
    assert regrown.index[0].tolist() == [0, 1, 3] and regrown.index[1].tolist() == [0, 0, 1]
    assert regrown.source.tolist() == [0, 2, -1]
    assert regrown.remap(torch.tensor([[10.0], [20.0], [30.0]])).tolist() == [[10.0], [30.0], [0.0]]


def test_what_is_dropped_may_return_and_is_then_moved():
    topology = Topology.from_mask(torch.tensor([[True, True, False]]))
    regrown = ops.drop_and_grow(torch.tensor([1.0, 2.0]), torch.tensor([[9.0, 0.0, 1.0]]), topology, 1)
    assert topology.col.equal(regrown.index[1]) and regrown.source.tolist() == [0, 1]


def test_counts_of_their_own_by_hand():
    topology = Topology.from_mask(torch.tensor([[True, False, True], [True, False, False]]))
    drop, grow = torch.tensor([3.0, 1.0, 1.0]), torch.tensor([[9.0, 1.0, 2.0], [9.0, 5.0, 5.0]])
    assert ops.drop_and_grow(drop, None, topology, 2, 0).source.tolist() == [0]
    more = ops.drop_and_grow(drop, grow, topology, 0, 2)
    assert more.source.tolist() == [0, 1, 2, -1, -1] and more.index[1].tolist() == [0, 2, 0, 1, 2]
    less = ops.drop_and_grow(drop, grow, topology, 3, 1)
    assert less.index[0].tolist() == [0, 1, 1] and less.source.tolist() == [0]
    assert less.remap(torch.tensor([1.0, 2.0, 3.0])).tolist() == [1.0]


def test_growth_from_nothing_to_everything():
    empty = Topology.random((3, 4), 0.0)
    regrown = ops.drop_and_grow(torch.empty(0), torch.rand(3, 4), empty, 0, 12)
    full = Topology.random((3, 4), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(regrown.index, full.index, strict=True))
    assert regrown.remap(torch.empty(0, 2)).equal(torch.zeros(12, 2))
    regrown = ops.drop_and_grow(torch.rand(12), None, full, 12, 0)
    assert all(torch.equal(a, b) for a, b in zip(regrown.index, empty.index, strict=True))


def test_scores_that_nothing_grows_by_need_no_meaning():
    topology = Topology.random((9, 7), 0.5)
    drop = torch.rand(topology.num_blocks)
    expected = ops.drop_and_grow(drop, None, topology, 5, 0)
    got = ops.drop_and_grow(drop, torch.full((9, 7), torch.nan), topology, 5, 0)
    assert got.source.equal(expected.source) and got.source.numel() == topology.num_blocks - 5


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full(density):
    topology = Topology.random((3, 4), density)
    n = topology.num_blocks
    regrown = ops.drop_and_grow(torch.rand(n), torch.rand(3, 4), topology, n)
    assert all(torch.equal(a, b) for a, b in zip(regrown.index, topology.index, strict=True))


def test_opcheck():
    topology = Topology.random((8, 12), 0.4)
    for counts in ((5, 5), (5, 0), (2, 7)):
        args = (torch.rand(topology.num_blocks), torch.rand(8, 12), topology.row_ptr, topology.col, *counts)
        opcheck(torch.ops.sparse_moon.drop_and_grow.default, args)


def test_errors():
    topology = Topology.random((3, 4), 0.5)
    with pytest.raises(ValueError, match=r"expected scores of shape \(6,\) and \(3, 4\)"):
        ops.drop_and_grow(torch.rand(5), torch.rand(3, 4), topology, 1)
    with pytest.raises(ValueError, match="expected scores"):
        ops.drop_and_grow(torch.rand(6), torch.rand(4, 3), topology, 1)
    with pytest.raises(ValueError, match=r"drop must be in \[0, 6\], got 7"):
        ops.drop_and_grow(torch.rand(6), torch.rand(3, 4), topology, 7)
    with pytest.raises(ValueError, match=r"grow must be in \[0, 8\] after a drop of 2, got 9"):
        ops.drop_and_grow(torch.rand(6), torch.rand(3, 4), topology, 2, 9)
    with pytest.raises(ValueError, match=r"grow must be in .*, got -1"):
        ops.drop_and_grow(torch.rand(6), torch.rand(3, 4), topology, 2, -1)
    with pytest.raises(ValueError, match="to grow 2 blocks a grow_score is needed, got None"):
        ops.drop_and_grow(torch.rand(6), None, topology, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_of_minus_infinity_grow_last_and_no_entry_twice(dtype):
    topology = Topology(torch.tensor([0, 4, 5]), (2, 4))
    grow_score = torch.full((2, 4), -torch.inf, dtype=dtype)
    grow_score[1, 3] = -1.0
    found = ops.drop_and_grow(torch.tensor([3.0, 1.0, 2.0], dtype=dtype), grow_score, topology, 1, 3)
    assert found.index[0].tolist() == [0, 3, 5] and found.index[1].tolist() == [0, 1, 2, 1, 3]
    assert found.source.tolist() == [0, -1, -1, 2, -1]
