"""The compiled CPU products in every instruction set that this processor has, against dense float64."""

from contextlib import contextmanager, nullcontext
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.grad import conv2d_weight

import sparse_moon as sm
from sparse_moon.ops import Geometry, choice, use_backend
from sparse_moon.ops.native import native
from sparse_moon.ops.sparse_conv2d import cpu as conv2d
from sparse_moon.ops.sparse_linear import cpu as linear
from sparse_moon.topology import Topology, matrix_to_weight, weight_to_matrix

if native is None:
    pytest.skip("the compiled kernels were not built", allow_module_level=True)

OPS = torch.ops.sparse_moon
ISAS = native.supported_isas()


@pytest.fixture(autouse=True)
def _kernels_wherever_possible():
    with use_backend("kernel"):
        yield
    native.set_isa(ISAS[0])
    native.set_flat_panels("faster")


@pytest.fixture(params=product(ISAS, ("possible", "never")), ids="-flat-".join)
def kernels(request):
    """Each instruction set in turn, with and without flat panels."""
    isa, flat = request.param
    native.set_isa(isa)
    native.set_flat_panels(flat)


def assert_as_good_as_dense(ours: Tensor, dense: Tensor, exact: Tensor, size: Tensor) -> None:
    """Our error against float64 is at most twice that of PyTorch's own float32, or two units in the last place
    of ``size``, the same product of absolute values: where terms cancel, one result may be right by chance."""
    assert ours.shape == exact.shape and ours.dtype == torch.float32
    if exact.numel() == 0:
        return
    error, allowed = (ours.double() - exact).abs().max(), (dense.double() - exact).abs().max()
    assert error <= 2 * allowed + 2**-22 * size.max()  # NaN fails


def in_layout(tensor: Tensor, channels_last: bool) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def check_linear(
    leading: tuple[int, ...], features: int, outputs: int, block: tuple[int, int], density: float | Tensor
) -> None:
    """With a density at random, or with a mask (outputs, features)."""
    if isinstance(density, Tensor):
        topology = Topology.from_mask(density, block)
    else:
        topology = Topology.random((outputs, features), density, block)
    values = torch.randn(topology.values_shape)
    x, grad, bias = torch.randn(*leading, features), torch.randn(*leading, outputs), torch.randn(outputs)
    weight, plan = topology.to_dense(values), topology.plan()

    def products(x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        d_weight = grad.reshape(-1, outputs).t() @ x.reshape(-1, features)
        return F.linear(x, weight, bias), grad @ weight, topology.gather(d_weight)

    dense = products(x, grad, weight, bias)
    exact = products(x.double(), grad.double(), weight.double(), bias.double())
    sizes = products(x.double().abs(), grad.double().abs(), weight.double().abs(), bias.double().abs())
    for name in ISAS:
        native.set_isa(name)
        ours = (
            linear.forward(x, values, bias, None, plan),
            linear.input_grad(grad, values, plan),
            linear.values_grad(grad, x, plan),
        )
        for result in zip(ours, dense, exact, sizes, strict=True):
            assert_as_good_as_dense(*result)


@contextmanager
def by_winograd():
    """Dense products instead of the sparse kernels, those of Winograd also where they are slow."""
    before, choice.WINOGRAD_TILES = choice.WINOGRAD_TILES, 1
    conv2d.shapes_of.cache_clear()
    try:
        with use_backend("dense"):
            yield
    finally:
        choice.WINOGRAD_TILES = before
        conv2d.shapes_of.cache_clear()


def check_conv2d(
    x: Tensor, geometry: Geometry, block: tuple[int, int], density: float, grad_channels_last: bool, bias: bool,
    ways: tuple[str, ...] = ("possible", "never"),
) -> None:  # fmt: skip
    """With flat panels wherever possible and without them, or ``"winograd"``."""
    shape, options = tuple(geometry.weight_shape), geometry[1:4]
    topology = Topology.random((shape[0], shape[1] * shape[2] * shape[3]), density, block)
    values = torch.randn(topology.values_shape)
    weight, plan = matrix_to_weight(topology.to_dense(values), shape, block[1]), topology.plan(geometry)
    added = torch.randn(shape[0]) if bias else None
    grad = torch.randn(x.shape[0], shape[0], *geometry.output_size(x.shape))
    grad = in_layout(grad, grad_channels_last)

    def products(x: Tensor, grad: Tensor, weight: Tensor, added: Tensor | None) -> tuple[Tensor, ...]:
        if x.shape[0] == 0:
            return grad, x, torch.zeros(topology.values_shape, dtype=x.dtype)
        y = F.conv2d(x, weight, added, *options, geometry.groups)
        dx, dw, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *options, False, [0, 0], geometry.groups, [True, True, False]
        )
        return y, dx, topology.gather(weight_to_matrix(dw, block[1]))

    dense = products(x, grad, weight, added)
    operands = [None if t is None else t.double() for t in (x, grad, weight, added)]
    exact = products(*operands)
    sizes = products(*(None if t is None else t.abs() for t in operands))
    for name, way in product(ISAS, ways):
        native.set_isa(name)
        native.set_flat_panels("never" if way == "winograd" else way)
        with by_winograd() if way == "winograd" else nullcontext():
            ours = (
                conv2d.forward(x, values, added, None, plan),
                conv2d.input_grad(grad, values, x.shape, plan),
                conv2d.values_grad(grad, x, plan),
            )
            together = conv2d.grads(grad, x, values, plan)
        for result in zip((*ours, *together), *(r + r[1:] for r in (dense, exact, sizes)), strict=True):
            assert_as_good_as_dense(*result)


BLOCKS = st.sampled_from([(1, 1), (1, 1), (3, 1), (2, 2)])
DENSITIES = st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0])


@settings(max_examples=60)
@given(
    tokens=st.one_of(st.integers(0, 40), st.sampled_from([255, 256, 257])),
    features=st.sampled_from([1, 3, 16, 17, 63, 300]),
    outputs=st.sampled_from([1, 5, 16, 33, 100]),
    block=BLOCKS,
    density=DENSITIES,
)
def test_linear(tokens, features, outputs, block, density):
    check_linear((tokens,), features * block[1], outputs * block[0], block, density)


@pytest.mark.parametrize(
    ("tokens", "features", "outputs", "block", "density"),
    [
        (33, 300, 40, (1, 1), 0.9),  # just more than two vectors
        (129, 257, 530, (1, 1), 0.3),
        (300, 4500, 24, (1, 1), 0.02),  # features are packed in twice, and outputs once for each
        (300, 24, 4500, (1, 1), 0.5),
        (200, 512, 1030, (1, 2), 0.2),
        (70, 360, 400, (40, 4), 0.5),
        (100, 300, 600, (300, 100), 0.5),  # blocks larger than a block of rows and a chunk
        (64, 2000, 64, (1, 1), 0.07),
    ],
)
def test_linear_from_panels_in_the_first_cache(tokens, features, outputs, block, density):
    check_linear((tokens,), features, outputs, block, density)


def test_linear_with_rows_of_very_different_lengths():
    mask = torch.zeros(500, 400, dtype=torch.bool)
    mask[7] = True
    mask[:, 13] = True
    mask[100:140, 50:300] = True
    check_linear((130,), 400, 500, (1, 1), mask)


@pytest.mark.parametrize("threads", [2, 3])
def test_linear_with_many_tokens_for_each_entry(threads):
    """The values' gradient from tokens that threads share out, of which some may get none."""
    torch.set_num_threads(threads)
    try:
        for block in ((1, 1), (4, 2)):
            check_linear((517,), 40, 300, block, 0.1)
        check_linear((20,), 300, 30, (1, 1), 0.02)
        x, grad, plan = torch.randn(517, 40), torch.randn(517, 300), Topology.random((300, 40), 0.1).plan()
        assert torch.equal(linear.values_grad(grad, x, plan), linear.values_grad(grad, x, plan))
    finally:
        torch.set_num_threads(1)


def test_linear_features_in_chunks():
    """More features than one chunk of the panel holds, with few tokens and with several tiles of them."""
    check_linear((3,), 2500, 40, (1, 1), 0.1)
    check_linear((2, 150), 1300, 35, (1, 1), 0.1)
    check_linear((270,), 1400, 36, (4, 4), 0.2)
    check_linear((20,), 24, 2100, (1, 1), 0.2)  # those of the input's gradient
    check_linear((20,), 24, 2100, (4, 4), 0.2)


PAIR = st.tuples(st.integers(1, 3), st.integers(1, 2))


@settings(max_examples=120)
@given(
    batch=st.sampled_from([0, 1, 2, 3, 7, 15, 16, 17, 20, 33]),
    size=st.tuples(st.sampled_from([1, 4, 5, 8, 13, 17]), st.sampled_from([1, 2, 4, 7, 8, 14, 16, 19, 33])),
    kernel=st.tuples(st.sampled_from([1, 2, 3, 5, 7]), st.sampled_from([1, 2, 3, 5, 7])),
    stride=PAIR,
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=PAIR,
    groups=st.integers(1, 3),
    channels=st.tuples(st.sampled_from([1, 3, 6, 17]), st.sampled_from([1, 2, 5, 18])),
    block=BLOCKS,
    density=DENSITIES,
    bias=st.booleans(),
    layouts=st.tuples(st.booleans(), st.booleans()),
)
def test_conv2d(
    batch, size, kernel, stride, padding, dilation, groups, channels, block, density, bias, layouts
):  # fmt: skip
    shape = [channels[1] * groups * block[0], channels[0] * block[1], *kernel]
    geometry = Geometry(shape, stride, padding, dilation, groups)
    x = in_layout(torch.randn(batch, shape[1] * groups, *size), layouts[0])
    assume(min(geometry.output_size(x.shape)) >= 1)
    check_conv2d(x, geometry, block, density, layouts[1], bias)


@pytest.mark.parametrize("channels_last", [False, True])
def test_conv2d_plane_in_blocks_of_rows(channels_last):
    """A plane whose panel outgrows its size limit, in full groups of images and in bands of single images."""
    geometry = Geometry((8, 48, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    for batch in (1, 17):
        x = in_layout(torch.randn(batch, 48, 40, 41), channels_last)
        check_conv2d(x, geometry, (1, 1), 0.05, channels_last, False)


@pytest.mark.parametrize(("kernel", "padding", "dilation", "groups"), [
    ((3, 3), (1, 1), (1, 1), 1), ((5, 3), (2, 0), (1, 1), 1), ((3, 1), (2, 3), (2, 1), 2), ((1, 1), (0, 0), (1, 1), 1),
])  # fmt: skip
@pytest.mark.parametrize("layouts", [(False, False), (True, True), (False, True)])
def test_conv2d_that_keeps_the_height(kernel, padding, dilation, groups, layouts):
    """Both gradients from one panel of the output's gradient."""
    geometry = Geometry((12, 8 // groups, *kernel), (1, 1), padding, dilation, groups)
    for batch, size in ((17, (7, 9)), (32, (30, 12))):
        x = in_layout(torch.randn(batch, 8, *size), layouts[0])
        assert geometry.output_size(x.shape)[0] == size[0]
        for block in ((1, 1), (2, 2)):
            check_conv2d(x, geometry, block, 0.2, layouts[1], False)


@pytest.mark.parametrize(("size", "kernel", "padding"), [
    ((4, 4), 3, 1), ((12, 150), 3, 1), ((5, 250), 1, 0), ((40, 3), 5, 3), ((9, 28), 3, 2), ((1, 1), 1, 0),
])  # fmt: skip
def test_conv2d_of_few_entries(size, kernel, padding):
    """Several images in a flat panel and fewer in the last, long and short rows, some channels without entries."""
    geometry = Geometry((18, 17, kernel, kernel), (1, 1), (padding,) * 2, (1, 1), 1)
    check_conv2d(torch.randn(37, 17, *size), geometry, (1, 1), 0.02, False, True)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize(("batch", "size"), [(11, (1, 5)), (5, (1, 2)), (9, (2, 3)), (7, (1, 9))])
def test_conv2d_of_fewer_images_in_the_last_flat_panel(batch, size, threads):
    """Without padding the lines of channels follow each other without a gap."""
    torch.set_num_threads(threads)
    try:
        check_conv2d(
            torch.randn(batch, 6, *size), Geometry((5, 6, 1, 1), (1, 1), (0, 0), (1, 1), 1), (1, 1), 0.6, False, True
        )
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_conv2d_of_large_images(padding):
    """Flat panels of blocks of rows; fewer, as many and more rows out than in."""
    geometry = Geometry((3, 50, 3, 2), (1, 1), (padding, 1), (1, 1), 1)
    check_conv2d(torch.randn(5, 50, 70, 90), geometry, (1, 1), 0.02, False, True)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("stride", "size", "block"), [(1, (6, 9), (1, 1)), (2, (7, 16), (1, 1)), (1, (8, 8), (2, 2))])
def test_conv2d_of_many_channels_in_chunks(channels_last, stride, size, block):
    x = in_layout(torch.randn(9, 96, *size), channels_last)
    check_conv2d(x, Geometry((70, 96, 3, 3), (stride,) * 2, (1, 1), (1, 1), 1), block, 0.5, channels_last, True)


@pytest.mark.parametrize(("batch", "size", "kernel", "stride", "padding", "dilation"), [
    (9, (9, 7), 1, (2, 2), 0, 1), (70, (6, 17), 1, (1, 3), 0, 1), (3, (8, 8), 1, (3, 2), 0, 1),  # of one pixel
    (1, (4, 9), 3, (2, 2), 1, 1), (1, (5, 6), 3, (3, 2), 2, 2), (1, (3, 5), 2, (2, 1), 0, 1),  # of small batches
    (2, (2, 4), 3, (2, 2), 1, 1), (1, (2, 2), 1, (2, 2), 0, 1),
])  # fmt: skip
@pytest.mark.parametrize("layouts", [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize("block", [(1, 1), (2, 4)])
def test_conv2d_by_columns(batch, size, kernel, stride, padding, dilation, layouts, block):
    x = in_layout(torch.randn(batch, 24, *size), layouts[0])
    geometry = Geometry((40, 24, kernel, kernel), stride, (padding,) * 2, (dilation,) * 2, 1)
    check_conv2d(x, geometry, block, 0.3, layouts[1], True, ("never",))


@settings(max_examples=40)
@given(
    batch=st.sampled_from([1, 2, 3, 9]),
    size=st.tuples(st.sampled_from([4, 5, 7, 16]), st.sampled_from([4, 6, 9, 33])),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    channels=st.tuples(st.sampled_from([16, 18, 40, 146]), st.sampled_from([16, 26, 34])),
    block=st.sampled_from([(1, 1), (2, 2)]),
    density=st.sampled_from([0.0, 0.5, 1.0]),
    bias=st.booleans(),
    layouts=st.tuples(st.booleans(), st.booleans()),
)
def test_conv2d_by_winograd(batch, size, padding, channels, block, density, bias, layouts):
    geometry = Geometry((channels[1], channels[0], 3, 3), (1, 1), padding, (1, 1), 1)
    x = in_layout(torch.randn(batch, channels[0], *size), layouts[0])
    assume(min(geometry.output_size(x.shape)) >= 4)
    with by_winograd():
        assert conv2d.shapes_of(x.shape, geometry, torch.contiguous_format, x.dtype).winograd
    check_conv2d(x, geometry, block, density, layouts[1], bias, ("winograd",))


@pytest.mark.parametrize("channels_last", [False, True])
def test_conv2d_by_winograd_with_results_written_past_the_caches(channels_last):
    geometry = Geometry((16, 16, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    x = in_layout(torch.randn(33, 16, 64, 64), channels_last)
    check_conv2d(x, geometry, (1, 1), 0.9, channels_last, True, ("winograd",))


def test_conv2d_by_winograd_with_sums_of_some_outputs_at_a_time():
    x = torch.randn(8, 512, 5, 4)
    check_conv2d(x, Geometry((150, 512, 3, 3), (1, 1), (1, 1), (1, 1), 1), (1, 1), 0.5, True, False, ("winograd",))


def test_winograd_with_any_number_of_threads():
    """Fewer units of work than threads too; only the sums of the weight's gradient depend on their number."""
    x, values, topology = torch.randn(2, 16, 9, 40), torch.randn(20 * 16 * 9), Topology.random((20, 144), 1.0)
    geometry, grad = Geometry((20, 16, 3, 3), (1, 1), (1, 1), (1, 1), 1), torch.randn(2, 20, 9, 40)
    exact, plan = conv2d_weight(x.double(), geometry.weight_shape, grad.double(), padding=1), topology.plan(geometry)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            with by_winograd():
                results.append((
                    conv2d.forward(x, values, None, None, plan),
                    conv2d.input_grad(grad, values, x.shape, plan),
                ))  # fmt: skip
                weight_grad, again = (conv2d.dense_grad(grad, x, 1, *geometry) for _ in range(2))
            assert torch.equal(weight_grad, again)
            torch.testing.assert_close(weight_grad.double(), exact.flatten(1), rtol=1e-5, atol=1e-4)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_winograd_where_it_is_the_faster_one(monkeypatch):
    """Plain 3 x 3 convolutions in float32, with enough to do; then of all products that are not sparse."""
    calls = []
    for name in ("winograd_conv2d", "winograd_input_grad", "winograd_weight_grad"):
        real = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *a, name=name, real=real: calls.append(name) or real(*a))

    def calls_of(shape=(8, 16, 8, 8), dtype=torch.float32, backend="dense", **options):
        layer = sm.SparseConv2d(shape[1], 16, sparsity=0.5, bias=False, **{"kernel_size": 3, "padding": 1} | options)
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        calls.clear()
        with use_backend(backend):
            layer.to(dtype)(x).sum().backward()
        return calls.copy()

    assert calls_of() == ["winograd_conv2d", "winograd_input_grad", "winograd_weight_grad"]
    assert calls_of(backend="kernel") == calls_of(dtype=torch.float64) == []
    for emulates in (False, True):  # then they are computed in float32
        monkeypatch.setattr(conv2d, "emulated", lambda dtype, emulates=emulates: emulates and dtype is torch.bfloat16)
        assert calls_of(dtype=torch.bfloat16) == (calls_of() if emulates else [])
    assert calls_of(stride=2) == calls_of(kernel_size=5) == calls_of(groups=2) == calls_of(dilation=2) == []
    assert calls_of((8, 15, 8, 8)) == calls_of((1, 16, 8, 8)) == calls_of((50, 16, 3, 8)) == []


def test_not_a_number_stays_one_by_winograd():
    geometry = Geometry((16, 16, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    topology, x = Topology.random((16, 144), 1.0), torch.randn(8, 16, 8, 8)
    x[3, 5, 2, 2] = torch.nan
    with by_winograd():
        y = conv2d.forward(x, torch.randn(topology.nnz), None, None, topology.plan(geometry))
    assert y[3, :, 1:4, 1:4].isnan().all() and y[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()


def test_linear_with_results_written_past_the_caches():
    """Whole cache lines in the forward pass, which bypass the caches, and rows that are not whole lines."""
    for features, outputs in ((8, 1920), (8, 1921), (40, 1920)):  # the last from panels in the first cache
        check_linear((1100,), features, outputs, (1, 1), 0.3)


def test_conv2d_with_results_written_past_the_caches():
    x = torch.randn(16, 4, 64, 64)
    check_conv2d(x, Geometry((32, 4, 3, 3), (1, 1), (1, 1), (1, 1), 1), (1, 1), 0.1, False, True)


def test_results_do_not_depend_on_the_number_of_threads(kernels):
    topology = Topology.random((24, 9 * 20), 0.2)
    values, x, grad = torch.randn(topology.nnz), torch.randn(35, 20, 12, 12), torch.randn(35, 24, 12, 12)
    plan = topology.plan(Geometry((24, 20, 3, 3), (1, 1), (1, 1), (1, 1), 1))
    tokens, token_grad = torch.randn(50, 180), torch.randn(50, 24)
    wide = Topology.random((700, 180), 0.3)  # from panels in the first cache
    wide_values, wide_grad, wide_plan = torch.randn(wide.nnz), torch.randn(50, 700), wide.plan()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((
                conv2d.forward(x, values, None, None, plan),
                conv2d.input_grad(grad, values, x.shape, plan),
                conv2d.grads(grad, x, values, plan)[0],
                linear.forward(tokens, values, None, None, plan),
                linear.input_grad(token_grad, values, plan),
                linear.values_grad(token_grad, tokens, plan),
                linear.forward(tokens, wide_values, None, None, wide_plan),
                linear.input_grad(wide_grad, wide_values, wide_plan),
            ))  # fmt: skip
            first = conv2d.values_grad(grad, x, plan)
            again = conv2d.values_grad(grad, x, plan)
            assert torch.equal(first, again)
            first, again = (conv2d.grads(grad, x, values, plan)[1] for _ in range(2))
            assert torch.equal(first, again)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_operands_in_other_layouts(kernels):
    """Slices, transposes and expanded tensors give what their contiguous copies give."""
    topology = Topology.random((6, 36), 0.5)
    plan = topology.plan(Geometry((6, 4, 3, 3), (1, 1), (1, 1), (1, 1), 1))
    values = torch.randn(2 * topology.nnz)[::2]
    x = torch.randn(18, 9, 4, 14).transpose(1, 2)[..., ::2]
    grad = torch.randn(6, 1, 1).expand(18, 6, 9, 7)
    tokens, token_grad = torch.randn(36, 40).t(), torch.randn(1, 6).expand(40, 6)

    def products(x: Tensor, grad: Tensor, values: Tensor, tokens: Tensor, token_grad: Tensor) -> list[Tensor]:
        return [
            conv2d.forward(x, values, None, None, plan),
            conv2d.input_grad(grad, values, x.shape, plan),
            conv2d.values_grad(grad, x, plan),
            *conv2d.grads(grad, x, values, plan),
            linear.forward(tokens, values, None, None, plan),
            linear.input_grad(token_grad, values, plan),
            linear.values_grad(token_grad, tokens, plan),
        ]

    operands = (x, grad, values, tokens, token_grad)
    assert not any(t.is_contiguous() for t in operands)
    for ours, expected in zip(products(*operands), products(*(t.contiguous() for t in operands)), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_take_the_reference(dtype):
    topology = Topology.random((6, 36), 0.5)
    values, x, grad = (torch.randn(n, dtype=dtype) for n in ((topology.nnz,), (5, 36), (5, 6)))
    plan = topology.plan()
    y = linear.forward(x, values, None, None, plan)
    assert y.dtype == dtype
    torch.testing.assert_close(y, F.linear(x, topology.to_dense(values)))
    assert linear.input_grad(grad, values, plan).dtype == dtype
    assert linear.values_grad(grad, x, plan).dtype == dtype


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "shape", [(4, 10), (3, 7, 70), (5000, 130), (2, 5, 3, 3), (8, 33, 40, 41), (0, 6), (0, 3, 4, 4)]
)
def test_the_gradient_of_the_bias_comes_with_the_others(shape, threads):
    """Long sums of numbers that do not cancel: there a sum in float32 would round most."""
    grad, plane = 1 + torch.rand(shape), len(shape) == 4
    outputs = shape[1] if plane else shape[-1]
    topology = Topology.random((outputs, 5), 0.5)
    plan = topology.plan(Geometry((outputs, 5, 1, 1), (1, 1), (0, 0), (1, 1), 1) if plane else None)
    x = torch.randn((shape[0], 5, *shape[2:]) if plane else (*shape[:-1], 5))
    values, run = torch.randn(topology.values_shape), (conv2d if plane else linear).grads
    dims = [d for d in range(len(shape)) if d != (1 if plane else len(shape) - 1)]
    dense, exact = grad.sum(dims), grad.double().sum(dims)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for channels_last in (False, True) if plane else (False,):
            laid = in_layout(grad, channels_last) if plane else grad
            *pair, d_bias = run(laid, x, values, plan, True)
            assert all(torch.equal(a, b) for a, b in zip(pair, run(laid, x, values, plan), strict=True))
            assert_as_good_as_dense(d_bias, dense, exact, exact)
            assert (d_bias.double() - exact).abs().max() <= 2**-23 * exact.max()
            with use_backend("dense"):
                assert_as_good_as_dense(run(laid, x, values, plan, True)[2], dense, exact, exact)
    finally:
        torch.set_num_threads(before)
