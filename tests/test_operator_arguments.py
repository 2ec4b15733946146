"""Operators called by other code than this package's, with what no kernel may see: an error, before memory is read."""

import pytest
import torch

from sparse_moon import SparseConv2d, Topology
from sparse_moon.ops.check_index import check_rows
from sparse_moon.ops.sparse_linear.api import sparse_linear
from sparse_moon.topology import build_index

OPS = torch.ops.sparse_moon
ROWS, COLS = 4, 6


@pytest.fixture
def index():
    return build_index(torch.tensor([0, 3, 7, 13, 20]), (ROWS, COLS))


def values(block=()):
    return torch.randn(5, *block)


@pytest.mark.parametrize("wrong", ["features", "bias", "no dimension", "values", "values of two dimensions"])
def test_sparse_linear(index, wrong):
    x = {"features": torch.randn(3, COLS - 1), "no dimension": torch.tensor(1.0)}.get(wrong, torch.randn(3, COLS))
    bias = torch.randn(ROWS - 1) if wrong == "bias" else None
    weight = {"values": values()[1:], "values of two dimensions": values((2,))}.get(wrong, values())
    with pytest.raises(ValueError, match=r"must have shape|values of 4 entries"):
        OPS.sparse_linear(x, weight, bias, None, *index)


@pytest.mark.parametrize("part", range(3))
def test_operands_on_several_devices(index, part):
    operands = [torch.randn(3, COLS), values(), torch.randn(ROWS)]
    operands[part] = operands[part].to("meta")
    plan = Topology((torch.tensor([0, 3, 7, 13, 20])), (ROWS, COLS)).plan()
    with pytest.raises(ValueError, match=r"must be on one device, got .*meta"):
        sparse_linear(*operands, plan)


def test_planes_and_weights_of_no_pixels(index):
    """A kernel divided by their number."""
    for size in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match="does not fit input"):
            OPS.sparse_conv2d(torch.randn(2, 6, *size), values(), None, None, *conv2d(padding=[1, 1]), *index)
    with pytest.raises(ValueError, match="with taps"):
        OPS.scatter_values(values((2, 2)), [8, 12, 0, 3], False, *index[:2])
    with pytest.raises(ValueError, match="with taps"):
        OPS.gather_values(torch.randn(8, 12, 0, 3), [2, 2], *index[:2])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_convolutions_of_no_channels():
    layer = SparseConv2d(0, 0, 3, sparsity=0.5)
    assert layer(torch.randn(2, 0, 5, 5)).shape == (2, 0, 3, 3)


def test_gradients_of_sparse_linear(index):
    x, grad = torch.randn(3, COLS), torch.randn(3, ROWS)
    with pytest.raises(ValueError, match=r"grad must have shape \(3, 4\), got \(3, 3\)"):
        OPS.sparse_linear_input_grad(grad[:, 1:], values(), *index)
    for pair in ((grad[:, 1:], x), (grad, x[:, 1:]), (grad[1:], x)):
        with pytest.raises(ValueError, match="must have shape"):
            OPS.sparse_linear_values_grad(*pair, [1, 1], *index)
    for block in ([1], [0, 1], [1, 1, 1]):
        with pytest.raises(ValueError, match="block must be two positive integers"):
            OPS.sparse_linear_values_grad(grad, x, block, *index)


def conv2d(**changes):
    geometry = {"weight_shape": [ROWS, 6, 1, 1], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
    return list((geometry | changes).values())


@pytest.mark.parametrize(("changes", "message"), [
    ({"weight_shape": [ROWS, 6, 1, 2]}, r"weight shape .* does not fit an index of a \(4, 6\) matrix"),
    ({"weight_shape": [ROWS, 6]}, r"weight shape must be \(O, C/groups, kh, kw\), got"),
    ({"weight_shape": [ROWS, 6, 0, 1]}, r"weight shape must be \(O, C/groups, kh, kw\), got"),
    ({"stride": [1]}, r"invalid stride \S*1\S*, padding"), ({"stride": [0, 1]}, r"invalid stride \S*0, 1\S*, padding"),
    ({"padding": [-1, 0]}, r"padding \S*-1, 0\S* or"), ({"padding": [0]}, r"padding \S*0\S* or"),
    ({"dilation": [1, 0]}, r"or dilation \S*1, 0"),
    ({"groups": 3}, "groups must divide 4 output channels, got 3"),
    ({"groups": 0}, "groups must divide 4 output channels, got 0"),
    ({"weight_shape": [ROWS, 5, 1, 1]}, r"input must be \(N, 5, H, W\), got shape \(2, 6, 5, 5\)"),
], ids=str)  # fmt: skip
def test_geometry_of_sparse_conv2d(index, changes, message):
    x, grad, spec = torch.randn(2, 6, 5, 5), torch.randn(2, ROWS, 5, 5), (*conv2d(**changes), *index)
    for call in (
        lambda: OPS.sparse_conv2d(x, values(), None, None, *spec),
        lambda: OPS.sparse_conv2d_input_grad(grad, values(), list(x.shape), *spec),
        lambda: OPS.sparse_conv2d_values_grad(grad, x, [1, 1], *spec),
        lambda: OPS.sparse_conv2d_grads(grad, x, values(), *spec),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_operands_of_sparse_conv2d(index):
    x, grad, geometry = torch.randn(2, 6, 5, 5), torch.randn(2, ROWS, 5, 5), conv2d()
    spec = (*geometry, *index)
    with pytest.raises(ValueError, match="input must be"):
        OPS.sparse_conv2d(x[:, 1:], values(), None, None, *spec)
    with pytest.raises(ValueError, match="bias must have shape"):
        OPS.sparse_conv2d(x, values(), torch.randn(ROWS + 1), None, *spec)
    with pytest.raises(ValueError, match="grad must have shape"):
        OPS.sparse_conv2d_input_grad(grad[..., 1:], values(), list(x.shape), *spec)
    with pytest.raises(ValueError, match="grad must have shape"):
        OPS.sparse_conv2d_values_grad(grad[1:], x, [1, 1], *spec)
    with pytest.raises(ValueError, match="grad must have shape"):
        OPS.sparse_conv2d_dense_grad(grad[..., 1:], x, 1, *geometry)
    with pytest.raises(ValueError, match="does not divide the channels"):
        OPS.sparse_conv2d_dense_grad(grad, x, 4, *geometry)
    with pytest.raises(ValueError, match="grad must have shape"):
        OPS.sparse_conv2d_grads(grad[:, 1:], x, values(), *spec)


@pytest.mark.parametrize("place", ["row_ptr", "col"])
@pytest.mark.parametrize("number", [-1, 1 << 29, -(1 << 31)])
def test_operators_of_rows_refuse_numbers_that_are_no_index(index, place, number):
    row_ptr, col = (t.clone() for t in index[:2])
    (row_ptr if place == "row_ptr" else col)[2] = number
    for call in (
        lambda: OPS.transpose_index(row_ptr, col, COLS),
        lambda: OPS.drop_and_grow(torch.rand(5), torch.rand(ROWS, COLS), row_ptr, col, 1, 1),
        lambda: OPS.scatter_values(values(), [ROWS, COLS], False, row_ptr, col),
        lambda: OPS.gather_values(torch.randn(ROWS, COLS), [1, 1], row_ptr, col),
    ):
        with pytest.raises(ValueError, match="the index is damaged"):
            call()


def test_operators_of_rows_refuse_other_integers_and_sizes(index):
    row_ptr, col, *_ = index
    for pair in ((row_ptr.long(), col), (row_ptr, col.long()), (row_ptr[None], col)):
        with pytest.raises(ValueError, match="index tensors must be int32"):
            OPS.transpose_index(*pair, COLS)
    with pytest.raises(ValueError, match="the index is damaged"):
        OPS.transpose_index(row_ptr, col, 2)
    with pytest.raises(ValueError, match="block rows"):
        OPS.scatter_values(values(), [ROWS - 1, COLS], False, row_ptr, col)
    with pytest.raises(ValueError, match="does not divide"):
        OPS.gather_values(torch.randn(ROWS, COLS), [1, 5], row_ptr, col)


@pytest.mark.parametrize("wrong", ["values", "rows", "columns of int64", "scores", "counts", "block", "target", "w"])
def test_what_the_dispatcher_calls_on_a_gpu_checks_shapes(index, wrong):
    row_ptr, col, *_ = index
    scores, grid, logits = torch.rand(5), torch.rand(ROWS, COLS), torch.randn(3, 4)
    name, *inputs = {
        "values": ("scatter_values", values()[1:], [ROWS, COLS], False, row_ptr, col),
        "rows": ("scatter_values", values(), [ROWS - 1, COLS], False, row_ptr, col),
        "columns of int64": ("transpose_index", row_ptr, col.long(), COLS),
        "scores": ("drop_and_grow", scores[1:], grid, row_ptr, col, 1, 1),
        "counts": ("drop_and_grow", scores, grid, row_ptr, col, 6, 1),
        "block": ("gather_values", torch.randn(ROWS, COLS), [1, 5], row_ptr, col),
        "target": ("unknown_aware_loss", logits, torch.zeros(2, dtype=torch.int64), torch.tensor(1.0)),
        "w": ("unknown_aware_loss", logits, torch.zeros(3, dtype=torch.int64), torch.ones(1)),
    }[wrong]
    said = "values of 4 ent|block rows|must be int32|expected scores|drop must|does not divide|target must|w must"
    with pytest.raises(ValueError, match=said):
        getattr(OPS, name).default.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *inputs)


def test_the_numbers_of_an_index_are_not_waited_for(index):
    check_rows(*(t.to("meta") for t in index[:2]), COLS)  # where nothing can be looked at
    with pytest.raises(ValueError, match="index tensors must be int32"):
        check_rows(index[0].to("meta"), index[1].long().to("meta"), COLS)


def test_check_index_refuses_tensors_of_other_sizes(index):
    for number in (1, 3, 4):
        with pytest.raises(ValueError, match="index tensors have sizes"):
            OPS.check_index(*(t[:-1] if place == number else t for place, t in enumerate(index)))
    with pytest.raises(ValueError, match="index tensors must be int32"):
        OPS.check_index(*index[:4], index[4].long())


def test_operators_refuse_an_index_with_gaps(index):
    for number in range(5):
        gaps = [torch.stack([t, t], 1)[:, 0] if place == number else t for place, t in enumerate(index)]
        with pytest.raises(ValueError, match="index tensors must be contiguous"):
            OPS.sparse_linear(torch.randn(3, COLS), values(), None, None, *gaps)
        if number < 2:
            with pytest.raises(ValueError, match="index tensors must be contiguous"):
                OPS.transpose_index(*gaps[:2], COLS)


@pytest.mark.parametrize(("drop", "grow"), [(-1, 0), (6, 0), (0, -1), (0, 20), (5, 25)])
def test_drop_and_grow_counts(index, drop, grow):
    with pytest.raises(ValueError, match="must be in"):
        OPS.drop_and_grow(torch.rand(5), torch.rand(ROWS, COLS), *index[:2], drop, grow)


def test_drop_and_grow_scores(index):
    for scores in ((torch.rand(4), torch.rand(ROWS, COLS)), (torch.rand(5), torch.rand(ROWS - 1, COLS))):
        with pytest.raises(ValueError, match="expected scores of shape"):
            OPS.drop_and_grow(*scores, *index[:2], 1, 1)


def test_average():
    with pytest.raises(RuntimeError, match=r"tensor a \(4\) must match the size of tensor b \(3\)"):
        OPS.average_([torch.zeros(4)], [torch.zeros(3)], torch.tensor(0), 1.0, 0, torch.tensor(0))
    with pytest.raises(ValueError, match="is shorter than argument 1"):
        OPS.average_([torch.zeros(4)], [], torch.tensor(0), 1.0, 0, torch.tensor(0))


def test_unknown_aware_loss():
    logits, w = torch.randn(3, 4), torch.tensor(1.0)
    for target in (torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int32)):
        with pytest.raises(ValueError, match="target must be int64"):
            OPS.unknown_aware_loss(logits, target, w)
    with pytest.raises(ValueError, match=r"\(B, K\+1\)"):
        OPS.unknown_aware_loss(logits[:0], torch.zeros(0, dtype=torch.int64), w)


def test_batch_norm_relu():
    x, v, short = torch.randn(2, 3, 4, 5), torch.ones(3), torch.ones(2)
    for operands in ((x[1:], v, v, v, v), (None, short, v, v, v), (None, v, short, v, v), (None, v, v, short, v)):
        with pytest.raises(ValueError, match="must have"):
            OPS.batch_norm_relu(x, *operands, 1e-5, 1)
    with pytest.raises(ValueError, match="together"):
        OPS.batch_norm_relu(x, None, v, v, v, None, 1e-5, 1)
    with pytest.raises(ValueError, match=r"eps must be positive in training, got 0\.0"):
        OPS.batch_norm_relu(x, None, v, v, None, None, 0.0, 1)
    with pytest.raises(ValueError, match=r"eps must be at least 0, got -1\.0"):
        OPS.batch_norm_relu(x, None, v, v, v, v, -1.0, 1)
    assert OPS.batch_norm_relu(x, None, v, v, v, v, 0.0, 1)[0].isfinite().all()
    for operands in ((x[1:], x, None, v, v, v, v), (x, x, x[1:], v, v, v, v), (x, x, None, v, v, v, short)):
        with pytest.raises(ValueError, match="must have"):
            OPS.batch_norm_relu_backward(*operands, 1e-5, 1, True)


def test_batch_norm_relu_backward_with_an_output_that_was_not_rectified():
    x, grad, v = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.ones(3)
    found = OPS.batch_norm_relu_backward(grad, x, torch.randn_like(x), v, v, v, v, 1e-5, 0, True)
    assert torch.equal(found[1], grad) and found[0].isfinite().all()
