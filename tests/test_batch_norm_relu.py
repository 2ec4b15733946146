"""Batch norm, residual sum and rectifier in one operator, against torch's own in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.library import opcheck

import sparse_moon as sm
from sparse_moon.nn import batch_norm_relu as nn_batch_norm_relu
from sparse_moon.nn.batch_norm_relu import BatchNormReLU2d
from sparse_moon.ops.activations import FUNCTIONS, LAST_FLAT, NAMES
from sparse_moon.ops.batch_norm_relu.api import batch_norm_relu
from sparse_moon.ops.native import native

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ISAS = [] if native is None else native.supported_isas()
# Planes of one number, parts of vectors, several channels together, planes in several pieces, rows in several chunks
SHAPES = [(9, 17, 1, 1), (3, 3, 5, 7), (2, 33, 4, 4), (8, 16, 63, 65), (5, 64, 8, 8), (2, 5, 100, 100), (70, 40, 2, 2)]


@pytest.fixture(params=ISAS or ["reference"])
def isa(request):
    if native is None:
        yield
    else:
        before = native.isa()
        native.set_isa(request.param)
        yield
        native.set_isa(before)


def make(shape, layout="contiguous", offset=0.0):
    """Input, weight, bias, residual, running mean and variance, gradient of the output."""
    channels = shape[1]
    x = (torch.randn(shape) * (0.5 + torch.rand(channels, 1, 1)) + offset * torch.randn(channels, 1, 1)).contiguous(
        memory_format=LAYOUTS[layout]
    )
    residual = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout])
    mean, var = x.mean((0, 2, 3)) + 0.1 * torch.randn(channels), 0.5 + torch.rand(channels)
    return x, torch.randn(channels), torch.randn(channels), residual, mean, var, torch.randn(shape)


def torch_s_own(x, mean, var, weight, bias, residual, *, training, activation="relu", momentum=0.1):
    y = F.batch_norm(x, mean, var, weight, bias, training, momentum, 1e-5)
    if residual is not None:
        y = y + residual
    return FUNCTIONS[NAMES.index(activation)](y)


def results(function, dtype, tensors, with_residual, **options):
    """Output, gradients, and running statistics afterwards."""
    *leaves, mean, var, grad = (t.to(dtype).clone() for t in tensors)
    x, weight, bias, residual = (t.requires_grad_() for t in leaves)
    y = function(x, mean, var, weight, bias, residual if with_residual else None, **options)
    inputs = (x, weight, bias, residual) if with_residual else (x, weight, bias)
    return (y.detach(), *torch.autograd.grad(y, inputs, grad), mean, var)


def assert_as_good_as_torch(ours, theirs, exact):
    for i, (a, b, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, i
        # beside twice torch's error one rounding: where terms cancel to nearly nothing torch may be right by luck
        limit = 2 * (b - e).norm() + 2**-24 * e.norm()
        assert (a - e).norm() <= limit, (i, (a - e).norm(), (b - e).norm(), e.norm())


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_precise_as_torch(isa, shape, layout, training, with_residual, activation):
    # smooth derivatives show that the mean is rounded to float32, where torch goes on with float64
    for offset in (0.0, 30.0) if NAMES.index(activation) <= LAST_FLAT else (0.0,):
        tensors = make(shape, layout, offset)
        options = {"training": training, "activation": activation}
        exact = results(torch_s_own, torch.float64, tensors, with_residual, **options)
        theirs = results(torch_s_own, torch.float32, tensors, with_residual, **options)
        ours = results(batch_norm_relu, torch.float32, tensors, with_residual, **options)
        assert_as_good_as_torch(ours, theirs, exact)
        assert ours[0].is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.skipif(native is None, reason="torch's own, which runs then, is less precise in some versions")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_variance_is_precise_wherever_the_mean_is(isa, layout):
    """A first image far from all others, and a mean of 1000 standard deviations."""
    x = torch.randn(40, 20, 12, 12) + 1000
    x[0, 10:] += 1e5
    x = x.contiguous(memory_format=LAYOUTS[layout])
    mean, var = torch.zeros(20), torch.zeros(20)
    batch_norm_relu(x, mean, var, training=True, momentum=1.0)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=2e-7, atol=0)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3)), rtol=2e-6, atol=0)


@pytest.mark.parametrize("activation", NAMES)
def test_activations_and_their_derivatives_over_the_whole_range(isa, activation):
    """Of a batch norm that does nothing else."""
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, 6.0, 3.0, 1e30, -1e30])])
    x = x.view(1, 1, 1, -1)
    zero, one, grad = torch.zeros(1), torch.ones(1), torch.randn(x.shape)
    found = []
    for function in (batch_norm_relu, torch_s_own):
        for dtype in (torch.float32, torch.float64) if function is torch_s_own else (torch.float32,):
            leaf = x.to(dtype, copy=True).requires_grad_()
            y = function(leaf, zero.to(dtype), one.to(dtype), None, None, None, training=False, activation=activation)
            found.append((y.detach(), *torch.autograd.grad(y, leaf, grad.to(dtype))))
    for ours, theirs, exact in zip(*found, strict=True):
        error, limit = ((t.double() - exact).abs() for t in (ours, theirs))
        size = exact.abs() + (x.abs() < 4)  # where derivatives cross 0 their terms cancel
        assert (error <= 2 * limit + 6e-7 * size + 1e-35).all()  # at -87 e^x leaves the normal numbers


def test_values_by_hand():
    x = torch.tensor([1.0, 3.0, 5.0, 7.0]).view(1, 1, 2, 2)  # mean 4, biased variance 5, unbiased 20/3
    mean, var = torch.tensor([10.0]), torch.tensor([1.0])
    weight, bias, residual = torch.tensor([5.0**0.5]), torch.tensor([0.5]), torch.tensor([4.0, 0.0, 0.0, -9.0])
    y = batch_norm_relu(x, mean, var, weight, bias, residual.view(1, 1, 2, 2), training=True, momentum=0.25, eps=1e-30)
    torch.testing.assert_close(y.flatten(), torch.tensor([1.5, 0.0, 1.5, 0.0]))
    torch.testing.assert_close(mean, torch.tensor([8.5]))
    torch.testing.assert_close(var, torch.tensor([0.75 + 0.25 * 20 / 3]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_odd_strides_and_missing_parameters(training, affine):
    big = torch.randn(6, 10, 9, 22)
    residual = torch.randn(6, 7, 9, 5).transpose(1, 3)  # (6, 5, 9, 7), neither layout
    grad = torch.randn(6, 5, 1, 1).expand(6, 5, 9, 7)
    weight, bias = (torch.randn(5, 2)[:, 0] if affine else None for _ in range(2))
    mean, var = torch.randn(5), torch.rand(5) + 0.5
    found = []
    for function in (batch_norm_relu, torch_s_own):
        x, r = big[:, ::2, :, 1::3].detach().requires_grad_(), residual.detach().requires_grad_()
        m, v = mean.clone(), var.clone()
        y = function(x, m, v, weight, bias, r, training=training)
        found.append((y, *torch.autograd.grad(y, (x, r), grad), m, v))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_deterministic_and_right_with_any_number_of_threads(layout, threads):
    tensors = make((6, 48, 33, 31), layout)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = (results(batch_norm_relu, torch.float32, tensors, True, training=True) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    for a, b, e in zip(first, second, results(torch_s_own, torch.float64, tensors, True, training=True),
                       strict=True):  # fmt: skip
        assert torch.equal(a, b)
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)


def test_what_is_not_a_number_shows():
    x = torch.randn(4, 3, 8, 8)
    x[1, 2, 3, 4] = float("nan")
    mean, var = torch.zeros(3), torch.ones(3)
    y = batch_norm_relu(x, mean, var, training=True)
    assert y[:, 2].isnan().all() and not y[:, :2].isnan().any()
    assert mean.isnan().tolist() == var.isnan().tolist() == [False, False, True]
    for activation in NAMES:
        y = batch_norm_relu(x, torch.zeros(3), torch.ones(3), activation=activation)
        assert y.isnan().sum() == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    package = torch.ops.sparse_moon
    x, weight, bias, residual, mean, var, _ = make((3, 4, 5, 6), layout)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
    opcheck(package.batch_norm_relu.default, (x, None, weight, bias, None, None, 1e-5, 1))
    opcheck(package.batch_norm_relu.default, (x, residual, weight, bias, mean, var, 1e-5, 1))
    opcheck(package.batch_norm_relu.default, (x, residual, None, None, None, None, 1e-5, 0))
    x, weight, bias, residual = (t.detach() for t in leaves)
    grad = torch.randn_like(x)
    opcheck(package.batch_norm_relu_backward.default, (grad, x, None, weight, bias, mean, var, 1e-5, 1, True))
    opcheck(package.batch_norm_relu_backward.default, (grad, x, residual, None, None, mean, var, 1e-5, 1, False))


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_reference_gradients(training, with_residual, activation):
    """Of the operator in float64, which has no kernel."""
    if with_residual and NAMES.index(activation) > LAST_FLAT:
        pytest.skip("such an activation follows a sum by itself")
    x, weight, bias, residual, mean, var, _ = (t.double() for t in make((3, 2, 2, 3)))
    leaves = [t.requires_grad_() for t in ((x, weight, bias, residual) if with_residual else (x, weight, bias))]

    def function(x, weight, bias, residual=None):
        statistics = (None, None) if training else (mean, var)
        return torch.ops.sparse_moon.batch_norm_relu(
            x, residual, weight, bias, *statistics, 1e-5, NAMES.index(activation)
        )[0]

    assert torch.autograd.gradcheck(function, leaves)


def as_under_autocast(function, tensors, with_residual, **options):
    """As :func:`results`, of activations that are rounded to bfloat16, with vectors in float32."""
    x, weight, bias, residual, mean, var, grad = (t.clone() for t in tensors)
    leaves = [t.requires_grad_() for t in (x.bfloat16(), weight, bias, residual.bfloat16())]
    x, weight, bias, residual = leaves
    y = function(x, mean, var, weight, bias, residual if with_residual else None, **options)
    inputs = leaves if with_residual else leaves[:3]
    return (y.detach(), *torch.autograd.grad(y, inputs, grad.bfloat16()), mean, var)


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (2, 33, 4, 4), (5, 64, 8, 8), (2, 5, 20, 20)], ids=str)
def test_bfloat16_as_precise_as_torch(isa, monkeypatch, shape, layout, training, with_residual, activation):
    """The kernel takes what autocast makes: activations in bfloat16, all else in float32."""
    tensors = list(make(shape, layout))
    for place in (0, 3, 6):
        tensors[place] = tensors[place].bfloat16().float()
    options = {"training": training, "activation": activation}
    exact = results(torch_s_own, torch.float64, tensors, with_residual, **options)
    theirs = as_under_autocast(torch_s_own, tensors, with_residual, **options)
    if native is not None:
        monkeypatch.setattr(torch, "batch_norm", lambda *inputs: pytest.fail("not the kernel"))
    ours = as_under_autocast(batch_norm_relu, tensors, with_residual, **options)
    for i, (a, b, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, i
        rounding = 2**-8 if a.dtype is torch.bfloat16 else 2**-22
        assert (a - e).norm() <= 2 * (b - e).norm() + rounding * e.norm(), i


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(16, 64, 32, 32), (16, 70, 33, 31)], ids=str)
def test_large_results(isa, shape, layout, with_residual):
    """2 MB in bfloat16: the first are written past the caches, where that is faster."""
    tensors = make(shape, layout)
    for place in (0, 3, 6):
        tensors[place].copy_(tensors[place].bfloat16())
    exact = results(torch_s_own, torch.float64, tensors, with_residual, training=True)
    theirs = results(torch_s_own, torch.float32, tensors, with_residual, training=True)
    assert_as_good_as_torch(
        results(batch_norm_relu, torch.float32, tensors, with_residual, training=True), theirs, exact
    )
    for ours, e in zip(as_under_autocast(batch_norm_relu, tensors, with_residual, training=True), exact, strict=True):
        assert (ours - e).norm() <= 2**-8 * e.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_take_torch_s_own(dtype):
    tensors = make((3, 4, 5, 6))
    x, weight, bias, residual, mean, var, _ = (t.to(dtype) for t in tensors)
    for training in (True, False):
        ours = batch_norm_relu(x, mean.clone(), var.clone(), weight, bias, residual, training=training)
        theirs = torch_s_own(x, mean.clone(), var.clone(), weight, bias, residual, training=training)
        assert torch.equal(ours, theirs)


def test_errors():
    x, v = torch.randn(2, 3, 4, 5), torch.ones(3)
    with pytest.raises(ValueError, match=r"\(N, C, H, W\), got torch.float32 \(2, 3\)"):
        batch_norm_relu(x[:, :, 0, 0], v, v)
    with pytest.raises(ValueError, match="input must be floating point"):
        batch_norm_relu(x.long(), v, v)
    with pytest.raises(ValueError, match=r"residual must have the input's shape \(2, 3, 4, 5\), got \(2, 3, 1, 1\)"):
        batch_norm_relu(x, v, v, residual=x[:, :, :1, :1])
    with pytest.raises(ValueError, match=r"weight must have shape \(3,\), got \(4,\)"):
        batch_norm_relu(x, v, v, torch.ones(4))
    with pytest.raises(ValueError, match=r"activation must be one of \('none', .*\), got 'gelu'"):
        batch_norm_relu(x, v, v, activation="gelu")
    with pytest.raises(ValueError, match=r"activation must be one of \('none', .*\), got 'gelu'"):
        BatchNormReLU2d(3, activation="gelu")
    for activation, error in ((5, "less than 5, got 5"), (3, r"a residual goes with one of .*, got 'silu'")):
        with pytest.raises(ValueError, match=error):
            torch.ops.sparse_moon.batch_norm_relu(x, x, v, v, v, v, 1e-5, activation)
    with pytest.raises(ValueError, match="together"):
        batch_norm_relu(x, v, None, training=True)
    with pytest.raises(ValueError, match="needed outside training"):
        batch_norm_relu(x, None, None)
    one = torch.randn(1, 3, 1, 1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        F.batch_norm(one, v, v, training=True)  # torch says the same
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        batch_norm_relu(one, v, v, training=True)
    assert batch_norm_relu(one, v, v).shape == one.shape
    assert batch_norm_relu(x[:0], v.clone(), v.clone()).shape == (0, 3, 4, 5)


MODULES = [
    {},
    {"momentum": None},
    {"momentum": 0.3, "eps": 1e-3},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False, "momentum": None},
]


@pytest.mark.parametrize("options", MODULES, ids=str)
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("fewest", [0, 1 << 16])
def test_module_is_batch_norm_and_relu(options, with_residual, fewest, monkeypatch):
    monkeypatch.setattr(nn_batch_norm_relu, "FEWEST", fewest)
    plain = nn.BatchNorm2d(5, **options)
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    fused = BatchNormReLU2d.from_batch_norm(copy.deepcopy(plain))
    assert list(fused.state_dict()) == list(plain.state_dict())
    for step in range(5):
        training = step != 3
        plain.train(training)
        fused.train(training)
        x, residual = torch.randn(4, 5, 6, 7), torch.randn(4, 5, 6, 7) if with_residual else None
        y = plain(x)
        expected = F.relu(y if residual is None else y + residual)
        torch.testing.assert_close(fused(x, residual), expected)
        torch.testing.assert_close(fused.state_dict(), plain.state_dict())
    assert fused.num_batches_tracked is None or fused.num_batches_tracked == 4


@pytest.mark.parametrize("recompute", [False, True])
def test_training_between_a_pass_in_evaluation_and_its_backward_pass(recompute, monkeypatch):
    monkeypatch.setattr(nn_batch_norm_relu, "FEWEST", 0)
    plain = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU(), sm.SparseConv2d(5, 4, 3, sparsity=0.5))
    fused = nn.Sequential(
        BatchNormReLU2d.from_batch_norm(copy.deepcopy(plain[0]), recompute=recompute), copy.deepcopy(plain[2])
    )
    x = torch.randn(4, 5, 6, 7)
    plain.eval()(x).square().sum().backward()
    loss = fused.eval()(x).square().sum()
    fused.train()(3 * x + 1)
    loss.backward()
    for ours, expected in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)


@pytest.mark.parametrize("fewest", [0, 1 << 16])
def test_module_broadcasts_and_shares(fewest, monkeypatch):
    monkeypatch.setattr(nn_batch_norm_relu, "FEWEST", fewest)
    plain = nn.BatchNorm2d(5).eval()
    fused = BatchNormReLU2d.from_batch_norm(plain)
    assert not fused.training and fused.weight is plain.weight and fused.running_var is plain.running_var
    x = torch.randn(4, 5, 6, 7)
    for residual in (torch.randn(4, 5, 1, 1), torch.randn(2, 4, 5, 6, 7)):
        torch.testing.assert_close(fused(x, residual), F.relu(plain(x) + residual))
    torch.testing.assert_close(BatchNormReLU2d.from_batch_norm(plain, "none")(x, x), plain(x) + x)
    assert "activation=relu" in repr(fused)
    with pytest.raises(ValueError, match="expected 4D input"):
        fused(x[0])
