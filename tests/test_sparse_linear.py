import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from sparse_moon import SparseLinear, ops
from sparse_moon.topology import Topology


def probe_for(topology):
    return torch.zeros((), dtype=torch.float64).expand(topology.shape).detach().requires_grad_()


@given(
    lead=st.sampled_from([(), (1,), (7,), (3, 5), (2, 1, 3), (0,)]),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    block=st.sampled_from([(1, 1), (3, 1), (4, 4)]),
    density=st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0]),
    bias=st.booleans(),
    probe=st.booleans(),
    strided=st.booleans(),
)
def test_agrees_with_a_masked_dense_layer(lead, grid, block, density, bias, probe, strided):
    """Forward and every gradient in float64, against F.linear with the masked dense weight."""
    rows, cols = grid[0] * block[0], grid[1] * block[1]
    topology = Topology.random((rows, cols), density, block)
    values = torch.randn(topology.values_shape, dtype=torch.float64, requires_grad=True)
    b = torch.randn(rows, dtype=torch.float64, requires_grad=True) if bias else None
    base = torch.randn(*lead, 2 * cols, dtype=torch.float64)
    x = (base[..., ::2] if strided else base[..., :cols].contiguous()).requires_grad_()
    p = probe_for(topology) if probe else None
    y = ops.sparse_linear(x, values, b, topology.plan(), probe=p)
    upstream = torch.randn_like(y)
    y.backward(upstream)

    weight = topology.to_dense(values.detach()).requires_grad_()
    x2, b2 = x.detach().clone().requires_grad_(), b.detach().clone().requires_grad_() if bias else None
    expected = F.linear(x2, weight, b2)
    expected.backward(upstream)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(values.grad, topology.gather(weight.grad))
    if bias:
        torch.testing.assert_close(b.grad, b2.grad)
    if probe:
        torch.testing.assert_close(p.grad, weight.grad)


@pytest.mark.parametrize("block", [(1, 1), (2, 2)])
def test_gradcheck(block):
    topology = Topology.random((6, 8), 0.5, block)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    values = torch.randn(topology.values_shape, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: ops.sparse_linear(*a, topology.plan()), (x, values, bias))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("block", [(1, 1), (4, 1), (2, 2)])
def test_opcheck(block):
    topology = Topology.random((8, 12), 0.4, block)
    x, values = torch.randn(5, 12, requires_grad=True), torch.randn(topology.values_shape, requires_grad=True)
    bias, probe = torch.randn(8, requires_grad=True), torch.zeros(8, 12, requires_grad=True)
    package = torch.ops.sparse_moon
    opcheck(package.sparse_linear.default, (x, values, bias, probe, *topology.index))
    opcheck(package.sparse_linear.default, (x, values, None, None, *topology.index))
    grad = torch.randn(5, 8)
    opcheck(package.sparse_linear_input_grad.default, (grad, values.detach(), *topology.index))
    opcheck(package.sparse_linear_dense_grad.default, (grad, x.detach()))
    opcheck(package.sparse_linear_values_grad.default, (grad, x.detach(), list(block), *topology.index))
    opcheck(package.transpose_index.default, (topology.row_ptr, topology.col, topology.grid[1]))


def test_bad_operands():
    topology = Topology.random((4, 6), 0.5)
    x, values, plan = torch.randn(2, 6), torch.randn(topology.values_shape), topology.plan()
    with pytest.raises(ValueError, match=r"6 features last, got shape \(2, 5\)"):
        ops.sparse_linear(x[:, :5], values, None, plan)
    with pytest.raises(ValueError, match="features last"):
        ops.sparse_linear(torch.tensor(1.0), values, None, plan)
    with pytest.raises(ValueError, match=r"values must have shape \(12,\), got \(11,\)"):
        ops.sparse_linear(x, values[1:], None, plan)
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\)"):
        ops.sparse_linear(x, values, torch.zeros(5), plan)
    with pytest.raises(ValueError, match="one floating point dtype"):
        ops.sparse_linear(x.double(), values, None, plan)
    with pytest.raises(ValueError, match="one floating point dtype"):
        ops.sparse_linear(x.long(), values.long(), None, plan)
    with pytest.raises(ValueError, match="one device"):
        ops.sparse_linear(x.to("meta"), values, None, plan)
    with pytest.raises(ValueError, match="probe must have shape"):
        ops.sparse_linear(x, values, None, plan, probe=torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_at_most_twice_that_of_pytorch(dtype):
    layer = SparseLinear(257, 63, sparsity=0.9)
    x = torch.randn(65, 257)
    exact = F.linear(x.double(), layer.dense_weight().double(), layer.bias.double())
    dense = F.linear(x.to(dtype), layer.dense_weight().to(dtype), layer.bias.to(dtype))
    ours = layer.to(dtype)(x.to(dtype))
    assert (ours - exact).abs().max() <= 2 * (dense - exact).abs().max() + torch.finfo(dtype).eps
