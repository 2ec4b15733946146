import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from sparse_moon import ops
from sparse_moon.topology import Topology


def naive(drop, grow, positions, count):
    """Independent version with Python's sorts: dropped and grown positions, and where each new entry came from."""
    order = sorted(range(len(positions)), key=lambda i: (drop[i], i))
    survivors = {positions[i] for i in order[count:]}
    candidates = sorted((p for p in range(len(grow)) if p not in survivors), key=lambda p: (-grow[p], p))
    updated = sorted(survivors | set(candidates[:count]))
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
    count = data.draw(st.integers(0, n))
    positions = mask.flatten().nonzero().flatten().tolist()
    regrown = ops.drop_and_grow(
        torch.tensor(drop, dtype=torch.float32),
        torch.tensor(grow, dtype=torch.float32).view(rows, cols),
        topology,
        count,
    )
    updated, source = naive(drop, grow, positions, count)
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


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full(density):
    topology = Topology.random((3, 4), density)
    n = topology.num_blocks
    regrown = ops.drop_and_grow(torch.rand(n), torch.rand(3, 4), topology, n)
    assert all(torch.equal(a, b) for a, b in zip(regrown.index, topology.index, strict=True))


def test_opcheck():
    topology = Topology.random((8, 12), 0.4)
    args = (torch.rand(topology.num_blocks), torch.rand(8, 12), topology.row_ptr, topology.col, 5)
    opcheck(torch.ops.sparse_moon.drop_and_grow.default, args)


def test_errors():
    topology = Topology.random((3, 4), 0.5)
    with pytest.raises(ValueError, match=r"expected scores of shape \(6,\) and \(3, 4\)"):
        ops.drop_and_grow(torch.rand(5), torch.rand(3, 4), topology, 1)
    with pytest.raises(ValueError, match="expected scores"):
        ops.drop_and_grow(torch.rand(6), torch.rand(4, 3), topology, 1)
    with pytest.raises(ValueError, match=r"count must be in \[0, 6\], got 7"):
        ops.drop_and_grow(torch.rand(6), torch.rand(3, 4), topology, 7)
