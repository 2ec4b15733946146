import pytest
import torch
import torch.nn.functional as F

from sparse_moon.topology import Topology

kernels = pytest.importorskip("sparse_moon.kernels.sparse_linear", reason="needs triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS = kernels.BLOCKS


def topology_of(rows, block, columns):
    """Row r has blocks at the block columns rows[r], of so many."""
    positions = [r * columns + c for r, cs in enumerate(rows) for c in sorted(cs)]
    shape = (len(rows) * block[0], columns * block[1])
    return Topology(torch.tensor(positions, dtype=torch.int64), shape, block).to(DEVICE)


def operands(topology, tokens, dtype):
    """Input with rows further apart than its features and off any alignment, values, bias, contiguous gradient."""
    rows, columns = topology.shape
    x = torch.randn(tokens, columns + 13).to(DEVICE, dtype)[:, 5 : 5 + columns]
    values = torch.randn(topology.values_shape).to(DEVICE, dtype)
    return x, values, torch.randn(rows).to(DEVICE, dtype), torch.randn(tokens, rows).to(DEVICE, dtype)


def products(topology, x, values, bias, grad, allow_tf32=False):
    """Output, input gradient and values gradient by the kernels; results in NaN-filled memory."""
    row_ptr, col, t_ptr, t_row, t_perm = topology.index
    y, dx, dvalues = torch.empty_like(grad), x.new_empty(x.shape), torch.empty_like(values)
    kernels.sparse_linear(x, values, bias, row_ptr, col, y, allow_tf32=allow_tf32)
    kernels.sparse_linear_input_grad(grad, values, t_ptr, t_row, t_perm, dx, allow_tf32=allow_tf32)
    kernels.sparse_linear_values_grad(grad, x, row_ptr, col, dvalues, allow_tf32=allow_tf32)
    return y, dx, dvalues


def dense_products(topology, x, values, bias, grad):
    """The same by PyTorch, through the scattered weight, in the dtype of the operands."""
    weight = topology.to_dense(values)
    return F.linear(x, weight, bias), grad @ weight, topology.gather(grad.t() @ x)


def check(topology, x, values, bias, grad):
    """Every product at most twice as far from the exact one as PyTorch's, up to a rounding of the largest result."""
    exact = dense_products(topology, *(t if t is None else t.double() for t in (x, values, bias, grad)))
    theirs = dense_products(topology, x, values, bias, grad)
    ours = products(topology, x, values, bias, grad)
    for name, a, b, c in zip(("y", "dx", "dvalues"), ours, theirs, exact, strict=True):
        assert a.isfinite().all(), name
        if a.numel():
            floor = torch.finfo(a.dtype).eps * c.abs().max()
            assert (a - c).abs().max() <= 2 * (b - c).abs().max() + floor, name


@pytest.mark.parametrize(("tokens", "dtype"), [(1, torch.float32), (63, torch.float32), (257, torch.float16)])
@pytest.mark.parametrize("block", BLOCKS)
def test_empty_rows_and_columns(block, tokens, dtype):
    """Rows and columns without entries, also the first and the last."""
    topology = topology_of([set(), {1, 2}, set(), {0, 2, 3}, set()], block, 5)
    x, values, bias, grad = operands(topology, tokens, dtype)
    check(topology, x, values, bias if tokens == 63 else None, grad)


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("block", BLOCKS)
def test_empty_and_full(block, density):
    topology = Topology.random((3 * block[0], 4 * block[1]), density, block).to(DEVICE)
    check(topology, *operands(topology, 5, torch.float32))


@pytest.mark.parametrize("block", BLOCKS)
def test_no_tokens(block):
    """Empty results, and a gradient of zero."""
    topology = Topology.random((3 * block[0], 4 * block[1]), 0.5, block).to(DEVICE)
    _, _, dvalues = products(topology, *operands(topology, 0, torch.float32))
    assert dvalues.count_nonzero() == 0


@pytest.mark.parametrize(("block", "group"), [((16, 16), 8), ((32, 32), 4), ((8, 1), 64), ((32, 1), 64)])
def test_rows_of_many_entries(block, group):
    """Rows of exactly one group of the gradient of the values, of several and a part, of one entry, and empty ones."""
    columns = 2 * group + 9
    counts = [0, group, 2 * group + 3, 0, 1, 0]
    topology = topology_of([set(torch.randperm(columns)[:n].tolist()) for n in counts], block, columns)
    check(topology, *operands(topology, 7, torch.float32))


def test_more_rows_than_one_load_of_the_row_pointer():
    """Values gradient of entries in rows on both sides of the search's tile of 1024 rows, against the definition."""
    rows = [set()] * 1100
    for r in (0, 1022, 1023, 1024, 1099):
        rows[r] = {0}
    topology = topology_of(rows, (128, 128), 1)
    x, grad = torch.randn(3, 128, device=DEVICE), torch.randn(3, 1100 * 128, device=DEVICE)
    dvalues = torch.empty(topology.values_shape, device=DEVICE)
    kernels.sparse_linear_values_grad(grad, x, topology.row_ptr, topology.col, dvalues, allow_tf32=False)
    for entry, r in enumerate((0, 1022, 1023, 1024, 1099)):
        torch.testing.assert_close(dvalues[entry], grad[:, r * 128 : (r + 1) * 128].t() @ x)


@pytest.mark.parametrize("block", [(64, 64), (16, 1)])
def test_split_over_tokens(block):
    """Two and three ranges of tokens, the last one shorter: the sum over all of them, and the same bits twice."""
    topology = topology_of([{0, 1}, {1}], block, 2)
    index = topology.row_ptr, topology.col
    for tokens in (515, 800):
        x, values, _, grad = operands(topology, tokens, torch.float16)
        first, second = torch.empty_like(values), torch.empty_like(values)
        launches = kernels.values_grad_launches(grad, x, *index, first, False)
        assert launches[-2].grid[1] == tokens // 256
        kernels.sparse_linear_values_grad(grad, x, *index, first, allow_tf32=False)
        kernels.sparse_linear_values_grad(grad, x, *index, second, allow_tf32=False)
        exact = topology.gather(grad.double().t() @ x.double())
        assert (first - exact).abs().max() <= torch.finfo(torch.float16).eps * exact.abs().max()
        assert torch.equal(first, second)


def as_precise(ours, theirs, exact):
    """At most twice as far from the exact numbers as PyTorch's, up to a rounding of the largest."""
    floor = torch.finfo(ours.dtype).eps * exact.abs().max()
    assert ours.dtype == theirs.dtype and ours.isfinite().all()
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + floor


@pytest.mark.parametrize(("tokens", "dtype"), [(0, torch.float32), (63, torch.float32), (800, torch.float16)])
@pytest.mark.parametrize("block", BLOCKS)
def test_bias_grad(block, tokens, dtype):
    """In one pass and in three, of rows without entries too, with the values' gradient as ever."""
    topology = topology_of([set(), {1, 2}, set(), {0, 2, 3}, set()], block, 5)
    x, values, bias, grad = operands(topology, tokens, dtype)
    dvalues = torch.full_like(values, torch.nan)
    dbias = torch.full_like(bias, torch.nan)
    kernels.sparse_linear_values_grad(
        grad, x, topology.row_ptr, topology.col, dvalues, allow_tf32=False, bias_grad=dbias
    )
    as_precise(dbias, grad.sum(0), grad.double().sum(0))
    as_precise(dvalues, topology.gather(grad.t() @ x), topology.gather(grad.double().t() @ x.double()))
    again = torch.empty_like(bias)
    kernels.sparse_linear_values_grad(
        grad, x, topology.row_ptr, topology.col, dvalues, allow_tf32=False, bias_grad=again
    )
    assert torch.equal(dbias, again)


@pytest.mark.parametrize("block", BLOCKS)
def test_bias_grad_of_a_layer_without_weights(block):
    topology = topology_of([set(), set()], block, 3)
    x, values, bias, grad = operands(topology, 5, torch.float32)
    kernels.sparse_linear_values_grad(
        grad, x, topology.row_ptr, topology.col, values, allow_tf32=False, bias_grad=bias.fill_(torch.nan)
    )
    torch.testing.assert_close(bias, grad.sum(0))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gelu(block, approximate, dtype):
    """Of what the forward pass rounds and keeps; its derivative at the end of the input gradient."""
    topology = topology_of([set(), {1, 2}, {0, 2, 3}], block, 5)
    x, values, bias, grad = operands(topology, 37, dtype)
    activation = "gelu" if approximate == "none" else "gelu_tanh"
    y, before = torch.full_like(grad, torch.nan), torch.full_like(grad, torch.nan)
    row_ptr, col, *transposed = topology.index
    activated = kernels.Activated(before, activation)
    kernels.sparse_linear(x, values, bias, row_ptr, col, y, allow_tf32=False, activated=activated)
    plain, dx, _ = products(topology, x, values, bias, grad)
    assert torch.equal(before, plain)
    as_precise(y, F.gelu(before, approximate=approximate), F.gelu(before.double(), approximate=approximate))
    if block[1] == 1:
        with pytest.raises(ValueError, match="the input gradient of vectors has no activation"):
            kernels.sparse_linear_input_grad(grad, values, *transposed, dx, allow_tf32=False, activated=activated)
        return

    def backward(dy, weight, at):
        return torch.ops.aten.gelu_backward(dy @ weight, at, approximate=approximate)

    at = torch.randn(37, x.shape[1] + 3).to(DEVICE, dtype)[:, 2:-1]
    got, weight = torch.full_like(dx, torch.nan), topology.to_dense(values)
    activated = kernels.Activated(at, activation)
    kernels.sparse_linear_input_grad(grad, values, *transposed, got, allow_tf32=False, activated=activated)
    as_precise(got, backward(grad, weight, at), backward(grad.double(), weight.double(), at.double()))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gelu_of_all_numbers(approximate, dtype):
    """From the smallest to those at which a square overflows, through a weight of one identity."""
    topology = topology_of([{0}], (16, 16), 1)
    magnitude = torch.cat([torch.logspace(-7, 4 if dtype is torch.float16 else 15, 1500), torch.linspace(0, 9, 3000)])
    edges = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    x = torch.cat([magnitude, -magnitude, edges]).to(dtype)
    x = torch.cat([x, x.new_zeros(-x.numel() % 16)]).view(-1, 16).to(DEVICE)
    # the identity adds 0 * x of others to each: a row of x at a time has one number that is not finite, or none
    x = torch.cat([x[:-1], torch.diag(x[-1])]) if not x[-1].isfinite().all() else x
    finite = x.isfinite().all(1)
    values = torch.eye(16, device=DEVICE, dtype=dtype)[None]
    activation = "gelu" if approximate == "none" else "gelu_tanh"
    y, before, dx = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    row_ptr, col, *transposed = topology.index
    kernels.sparse_linear(
        x, values, None, row_ptr, col, y, allow_tf32=False, activated=kernels.Activated(before, activation)
    )
    kernels.sparse_linear_input_grad(
        torch.ones_like(x), values, *transposed, dx, allow_tf32=False, activated=kernels.Activated(x, activation)
    )
    assert torch.equal(before[finite], x[finite]) and finite.sum() > 500
    theirs, exact = (F.gelu(t, approximate=approximate) for t in (x, x.double()))
    derivatives = [
        torch.ops.aten.gelu_backward(torch.ones_like(t), t, approximate=approximate) for t in (x, x.double())
    ]
    for bound in (1.0, 5.0, 100.0, torch.inf):
        near = finite[:, None] & (x.abs() <= bound)
        as_precise(y[near], theirs[near], exact[near])
        as_precise(dx[near], *(t[near] for t in derivatives))
    assert dx[x.isnan()].isnan().all() and before[~finite].isnan().any()
    assert (y[x == torch.inf].isnan() | (y[x == torch.inf] == torch.inf)).all()


@pytest.mark.parametrize("block", BLOCKS)
def test_features_without_entries_are_never_read(block):
    """NaN in the features of an empty block column, and in gradients of an empty block row, stays there."""
    topology = topology_of([set(), {1, 3}, {1}], block, 4)
    x, values, bias, grad = operands(topology, 3, torch.float32)
    x[:, : block[1]] = torch.nan
    grad[:, : block[0]] = torch.nan
    y, dx, dvalues = products(topology, x, values, bias, grad)
    assert y.isfinite().all() and dx.isfinite().all() and dvalues.isfinite().all()
    torch.testing.assert_close(y[:, : block[0]], bias[: block[0]].expand(3, -1))
    assert dx[:, : block[1]].count_nonzero() == 0


@pytest.mark.parametrize("block", BLOCKS)
def test_tf32(block):
    """Rounding both operands to 10 bits changes each product by at most 2^-10 of itself."""
    topology = topology_of([{0, 2}, {1}], block, 3)
    x, values, bias, grad = operands(topology, 66, torch.float32)
    ours = products(topology, x, values, bias, grad, allow_tf32=True)
    exact = dense_products(topology, x.double(), values.double(), bias.double(), grad.double())
    bounds = dense_products(topology, x.abs(), values.abs(), bias.abs(), grad.abs())
    for a, b, c in zip(ours, exact, bounds, strict=True):
        assert ((a - b).abs() <= 2**-10 * c + 1e-6).all()


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001], ids=hex)
def test_nan_in_tf32(bits):
    """NaN, above all the one that a GPU computes (0x7FFFFFFF), outlives the rounding of either operand."""
    topology = topology_of([{0}], (16, 16), 1)
    for place in range(2):
        x, values, _, grad = operands(topology, 5, torch.float32)
        (x, values)[place].view(torch.int32)[0] = bits
        y, dx, dvalues = products(topology, x, values, None, grad, allow_tf32=True)
        assert y[0].isnan().all()
        assert (dvalues if place == 0 else dx).isnan().all()


def test_takes():
    assert all(kernels.takes(block, dtype) for block in BLOCKS for dtype in (torch.bfloat16, torch.float32))
    assert not kernels.takes((1, 1), torch.float32)
    assert not kernels.takes((64, 1), torch.float16)
    assert not kernels.takes((16, 16), torch.float64)


def test_bad_operands():
    topology = topology_of([{0}], (16, 16), 2)
    x, values, _, grad = operands(topology, 3, torch.float32)
    index, y = (topology.row_ptr, topology.col), torch.empty_like(grad)
    with pytest.raises(ValueError, match=r"block must be one of .*, got \(8, 8\)"):
        kernels.sparse_linear(x, values[:, :8, :8], None, *index, y, allow_tf32=False)
    with pytest.raises(ValueError, match=r"dtype one of .*, got .* torch.float64"):
        kernels.sparse_linear(x.double(), values.double(), None, *index, y, allow_tf32=False)
    with pytest.raises(ValueError, match="input must have 2 dimensions, the last contiguous"):
        kernels.sparse_linear(torch.randn(32, 3, device=DEVICE).t(), values, None, *index, y, allow_tf32=False)


@pytest.mark.gpu
@pytest.mark.parametrize("density", [0.05, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", BLOCKS)
def test_large(block, dtype, density):
    """Every tile that a full chip gets, and bits that repeat."""
    topology = Topology.random((1024, 1536), density, block).to(DEVICE)
    for tokens in (4096, 4097):
        x, values, bias, grad = operands(topology, tokens, dtype)
        check(topology, x.contiguous(), values, bias, grad)
        first, second = (products(topology, x.contiguous(), values, bias, grad) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("block", BLOCKS)
def test_cuda_graph(block):
    """Capture, replay on other numbers, same bits as without a graph."""
    topology = Topology.random((1024, 1024), 0.1, block).to(DEVICE)
    given = operands(topology, 1000, torch.bfloat16)
    products(topology, *given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = products(topology, *given)
    for t in given:
        t.copy_(torch.randn_like(t))
    graph.replay()
    for a, b in zip(captured, products(topology, *given), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("block", [(128, 128), (16, 16), (8, 1)])
def test_more_than_2_31_elements(block):
    """The last token of an input of more than 2^31 elements."""
    tokens, features = 2**20 + 3, 2048
    topology = topology_of([{0, features // block[1] - 1}], block, features // block[1])
    x = torch.zeros(tokens, features, device=DEVICE, dtype=torch.bfloat16)
    x[-1] = torch.randn(features)
    grad = torch.zeros(tokens, block[0], device=DEVICE, dtype=torch.bfloat16)
    grad[-1] = torch.randn(block[0])
    values = torch.randn(topology.values_shape).to(x)
    y, dx, dvalues = products(topology, x, values, None, grad)
    for last, whole in ((y[-1:], y), (dx[-1:], dx)):
        assert whole[:-1].count_nonzero() == 0
        assert last.isfinite().all()
    exact = dense_products(topology, x[-1:].double(), values.double(), None, grad[-1:].double())
    for a, b in zip((y[-1:], dx[-1:], dvalues), exact, strict=True):
        torch.testing.assert_close(a, b.to(a))
