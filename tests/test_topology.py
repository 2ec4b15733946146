import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_moon.ops.transpose_index import transpose_index_reference
from sparse_moon.topology import Topology, block_shape, matrix_to_weight, pattern_name, weight_to_matrix

BLOCKS = [(1, 1), (4, 1), (2, 2)]


@pytest.mark.parametrize(
    ("pattern", "block"),
    [("unstructured", (1, 1)), ("vector8", (8, 1)), ("block32", (32, 32)), ((16, 1), (16, 1)), ((2, 2), (2, 2))],
)
def test_pattern_names_and_block_shapes(pattern, block):
    assert block_shape(pattern) == block
    assert block_shape(pattern_name(block)) == block


@pytest.mark.parametrize("pattern", ["block", "vector0", "dense", "8", (2, 3), (0, 1), (1, 4), (4,), ("4", 1)])
def test_bad_patterns_are_refused(pattern):
    with pytest.raises(ValueError, match="pattern must be"):
        block_shape(pattern)


@given(
    rows=st.integers(1, 6), cols=st.integers(1, 6), block=st.sampled_from(BLOCKS), data=st.data()
)  # fmt: skip
def test_mask_round_trip_and_index(rows, cols, block, data):
    kept = data.draw(st.lists(st.booleans(), min_size=rows * cols, max_size=rows * cols))
    blocks = torch.tensor(kept).view(rows, cols)
    mask = blocks.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    topology = Topology.from_mask(mask, block)
    assert torch.equal(topology.mask(), mask)
    assert topology.nnz == mask.sum() and topology.num_blocks == blocks.sum()

    values = torch.randn(topology.values_shape)
    dense = topology.to_dense(values)
    assert torch.equal(topology.gather(dense), values)
    assert not dense[~mask].any()

    # the transpose index lists the same blocks, column by column
    transposed = blocks.t().nonzero()
    assert torch.equal(topology.t_row.long(), transposed[:, 1])
    assert torch.equal(topology.t_ptr.diff().long(), blocks.sum(0))
    coordinates = blocks.nonzero()[topology.t_perm.long()]
    assert torch.equal(coordinates.flip(1), transposed)
    assert {t.dtype for t in topology.index} == {torch.int32}


def test_compiled_transpose_index_equals_the_reference():
    topology = Topology.random((257, 63), 0.1)
    reference = transpose_index_reference(topology.row_ptr, topology.col, 63)
    assert all(torch.equal(a, b) for a, b in zip(topology.index[2:], reference, strict=True))


@pytest.mark.parametrize("density", [0.0, 0.013, 0.5, 1.0])
@pytest.mark.parametrize("block", BLOCKS)
def test_random_counts_are_exact(density, block):
    topology = Topology.random((36, 52), density, block)
    blocks = 36 * 52 // (block[0] * block[1])
    assert topology.num_blocks == round(density * blocks)
    assert topology.mask().sum() == topology.nnz


@pytest.mark.parametrize("constant_fan_in", [False, True])
def test_random_is_uniform_and_follows_the_seed(constant_fan_in):
    counts = torch.zeros(8, 8)
    for _ in range(2000):
        counts += Topology.random((8, 8), 0.25, constant_fan_in=constant_fan_in).mask()
    assert (counts / 2000 - 0.25).abs().max() < 0.05  # 5 standard deviations are 0.048
    torch.manual_seed(3)
    first = Topology.random((8, 8), 0.5, constant_fan_in=constant_fan_in)
    torch.manual_seed(3)
    assert first.same_as(Topology.random((8, 8), 0.5, constant_fan_in=constant_fan_in))


def test_from_scores_keeps_the_largest_and_the_first_on_ties():
    scores = torch.tensor([[1.0, 5.0, 1.0], [1.0, 1.0, 9.0]])
    assert Topology.from_scores(scores, 0.5).mask().tolist() == [[True, True, False], [False, False, True]]


def test_weight_and_matrix_orders():
    weight = torch.arange(2 * 4 * 3 * 1).view(2, 4, 3, 1)
    assert torch.equal(weight_to_matrix(weight, 1), weight.reshape(2, 12))
    matrix = weight_to_matrix(weight, 2)
    # first block column: channels 0 and 1 at tap 0; second: the same channels at tap 1
    assert matrix[0, :4].tolist() == [0, 3, 1, 4]
    assert torch.equal(matrix_to_weight(matrix, (2, 4, 3, 1), 2), weight)
    with pytest.raises(ValueError, match="does not divide 4"):
        weight_to_matrix(weight, 3)


def test_bad_masks_are_refused():
    with pytest.raises(ValueError, match="mask must be bool"):
        Topology.from_mask(torch.ones(2, 2))
    with pytest.raises(ValueError, match="whole"):
        Topology.from_mask(torch.eye(2, dtype=torch.bool), (2, 2))
    with pytest.raises(ValueError, match="does not divide"):
        Topology.from_mask(torch.ones(3, 2, dtype=torch.bool), (2, 2))


def test_state_dict_round_trip_rebuilds_the_transpose_index():
    source, target = Topology.random((12, 20), 0.3), Topology.random((12, 20), 0.3)
    assert not source.same_as(target)
    assert set(source.state_dict()) == {"row_ptr", "col"}
    target.load_state_dict(source.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(source.index, target.index, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["col"].fill_(0), "ascend within"),
        (lambda s: s["col"].add_(1000), "outside"),
        (lambda s: s["row_ptr"].add_(1), "row pointers"),
    ],
)
def test_damaged_indices_are_refused(change, message):
    topology = Topology.random((12, 20), 0.3)
    state = copy.deepcopy(topology.state_dict())
    change(state)
    before = [t.clone() for t in topology.index]
    with pytest.raises(RuntimeError, match=message):
        topology.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(before, topology.index, strict=True))


def test_moves_between_devices():
    assert all(t.device.type == "meta" for t in Topology.random((4, 4), 0.5).to("meta").index)


def test_block_scores():
    topology = Topology.from_mask(torch.tensor([[True, False]]).repeat_interleave(2, 0).repeat_interleave(2, 1), (2, 2))
    matrix = torch.tensor([[1.0, -2.0, 3.0, 0.0], [4.0, 0.0, -1.0, -1.0]])
    before = matrix.clone()
    assert topology.block_scores(matrix).tolist() == [[7.0, 5.0]]
    assert torch.equal(matrix, before)
    assert topology.block_scores(matrix, overwrite=True).tolist() == [[7.0, 5.0]]
    assert topology.value_scores(topology.gather(matrix)).tolist() == [7.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_block_scores_of_16_bit_values_are_summed_in_float32(dtype):
    matrix = torch.rand(256, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    topology = Topology.from_scores(matrix, 0.5, (16, 16))
    exact = matrix.double().view(16, 16, 16, 16).sum((1, 3))
    assert topology.positions().tolist() == exact.flatten().topk(128).indices.sort().values.tolist()
    torch.testing.assert_close(topology.block_scores(matrix).double(), exact, rtol=1e-5, atol=0)
    scores = topology.value_scores(topology.gather(matrix))
    torch.testing.assert_close(scores.double(), exact.flatten()[topology.positions()], rtol=1e-5, atol=0)
