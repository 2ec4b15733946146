import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.library import opcheck
from torch.nn.grad import conv2d_weight

from sparse_moon import SparseConv2d, ops
from sparse_moon.ops.sparse_conv2d import dense
from sparse_moon.topology import Topology, matrix_to_weight, weight_to_matrix

pair = st.tuples(st.integers(1, 3), st.integers(1, 3))


@pytest.mark.filterwarnings("ignore:Using padding=.same.")  # nn.Conv2d's own
@settings(max_examples=200)
@given(
    batch=st.integers(0, 3),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=pair,
    dilation=pair,
    padding=st.one_of(st.tuples(st.integers(0, 3), st.integers(0, 3)), st.sampled_from(["same", "valid"])),
    mode=st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]),
    groups=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    block=st.sampled_from([(1, 1), (1, 1), (3, 1), (2, 2)]),
    density=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    bias=st.booleans(),
    channels_last=st.booleans(),
)
def test_agrees_with_a_masked_dense_layer(
    batch, size, kernel, stride, dilation, padding, mode, groups, channels, block, density, bias, channels_last
):
    """Forward and every gradient of the module in float64, against nn.Conv2d with the masked dense weight."""
    stride = (1, 1) if padding == "same" else stride
    dense = nn.Conv2d(
        channels[0] * groups * block[1], channels[1] * groups * block[0], kernel, stride, padding, dilation, groups,
        bias, mode, dtype=torch.float64,
    )  # fmt: skip
    shape = dense.weight.shape
    mask = matrix_to_weight(Topology.random((shape[0], shape[1:].numel()), density, block).mask(), shape, block[1])
    dense.weight.data *= mask
    sparse = SparseConv2d.from_dense(dense, mask, pattern=block)
    x = torch.randn(batch, dense.in_channels, *size, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    try:
        expected = dense(x1)
    except RuntimeError:  # a kernel that does not fit, or a padding larger than reflection allows
        with pytest.raises((ValueError, RuntimeError)):
            sparse(x2)
        assume(False)
    y = sparse(x2)
    upstream = torch.randn_like(y)
    expected.backward(upstream)
    y.backward(upstream)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x2.grad, x1.grad)
    torch.testing.assert_close(
        sparse.values.grad, sparse.topology.gather(weight_to_matrix(dense.weight.grad, block[1]))
    )
    if bias:
        torch.testing.assert_close(sparse.bias.grad, dense.bias.grad)


@pytest.mark.parametrize("block", [(1, 1), (2, 2)])
def test_dense_gradient_through_the_probe(block):
    topology = Topology.random((4, 4 * 9), 0.3, block)
    values = torch.randn(topology.values_shape, dtype=torch.float64, requires_grad=True)
    probe = torch.zeros((), dtype=torch.float64).expand(topology.shape).detach().requires_grad_()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    plan = topology.plan(ops.Geometry((4, 4, 3, 3), (1, 1), (1, 1), (1, 1), 1))
    y = ops.sparse_conv2d(x, values, None, plan, probe=probe)
    y.square().sum().backward()
    weight = matrix_to_weight(topology.to_dense(values.detach()), (4, 4, 3, 3), block[1]).requires_grad_()
    F.conv2d(x, weight, padding=1).square().sum().backward()
    torch.testing.assert_close(probe.grad, weight_to_matrix(weight.grad, block[1]))
    torch.testing.assert_close(values.grad, topology.gather(probe.grad))


def test_gradcheck():
    topology = Topology.random((4, 4 * 6), 0.4, (2, 2))
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64, requires_grad=True)
    values = torch.randn(topology.values_shape, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    plan = topology.plan(ops.Geometry((4, 4, 2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2))
    assert torch.autograd.gradcheck(lambda *a: ops.sparse_conv2d(*a, plan), (x, values, bias))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("block", [(1, 1), (2, 2)])
def test_opcheck(layout, block):
    topology = Topology.random((8, 4 * 9), 0.4, block)
    x = torch.randn(2, 4, 7, 6).contiguous(memory_format=layout).requires_grad_()
    values, bias = torch.randn(topology.values_shape, requires_grad=True), torch.randn(8, requires_grad=True)
    geometry = ([8, 4, 3, 3], [2, 1], [1, 0], [1, 1], 1)
    package = torch.ops.sparse_moon
    y = package.sparse_conv2d(x, values, bias, None, *geometry, *topology.index)
    assert y.is_contiguous(memory_format=layout)
    opcheck(package.sparse_conv2d.default, (x, values, bias, None, *geometry, *topology.index))
    probe = torch.zeros(topology.shape, requires_grad=True)
    opcheck(package.sparse_conv2d.default, (x, values, None, probe, *geometry, *topology.index))
    grad, x, values = torch.randn_like(y), x.detach(), values.detach()
    opcheck(package.sparse_conv2d_input_grad.default, (grad, values, x.shape, *geometry, *topology.index))
    opcheck(package.sparse_conv2d_dense_grad.default, (grad, x, block[1], *geometry))
    opcheck(package.sparse_conv2d_values_grad.default, (grad, x, list(block), *geometry, *topology.index))
    opcheck(package.sparse_conv2d_grads.default, (grad, x, values, *geometry, *topology.index))


def test_bad_operands():
    topology = Topology.random((4, 27), 0.5)
    x, values = torch.randn(1, 3, 8, 8), torch.randn(topology.values_shape)

    def conv(x=x, weight_shape=(4, 3, 3, 3), stride=(1, 1), groups=1):
        plan = topology.plan(ops.Geometry(weight_shape, stride, (0, 0), (1, 1), groups))
        return ops.sparse_conv2d(x, values, None, plan)

    conv()
    with pytest.raises(ValueError, match=r"input must be \(N, 3, H, W\), got shape \(1, 2, 8, 8\)"):
        conv(x[:, :2])
    with pytest.raises(ValueError, match="input must be"):
        conv(x[0])
    with pytest.raises(ValueError, match=r"does not fit an index of a \(4, 27\) matrix"):
        conv(weight_shape=(4, 3, 1, 3))
    with pytest.raises(ValueError, match="kernel does not fit"):
        conv(x[..., :2])
    with pytest.raises(ValueError, match="invalid stride"):
        conv(stride=(0, 1))
    with pytest.raises(ValueError, match="groups must divide"):
        conv(groups=3)
    with pytest.raises(ValueError, match="one floating point dtype"):
        conv(x.half())


def test_dense_gradient_in_parts_of_the_batch(monkeypatch):
    grad, input = torch.randn(5, 4, 6, 6, dtype=torch.float64), torch.randn(5, 3, 6, 6, dtype=torch.float64)
    arguments = (grad, input, 1, [4, 3, 3, 3], [1, 1], [1, 1], [1, 1], 1)
    whole = torch.ops.sparse_moon.sparse_conv2d_dense_grad(*arguments)
    calls, weight_grad = [], dense.weight_grad
    monkeypatch.setattr(dense, "weight_grad", lambda *given: calls.append(given) or weight_grad(*given))
    monkeypatch.setattr(dense, "PART_BYTES", (grad.nbytes + input.nbytes) // 2)
    torch.testing.assert_close(torch.ops.sparse_moon.sparse_conv2d_dense_grad(*arguments), whole)
    assert [len(given[0]) for given in calls] == [3, 2]
    torch.testing.assert_close(whole, conv2d_weight(input, [4, 3, 3, 3], grad, padding=1).flatten(1))
