"""Batch norm, residual sum and activation by Triton's kernels, against torch's own operators in float64."""

import pytest
import torch
import torch.nn.functional as F
from host_graph import HostGraph
from torch import nn

import sparse_moon as sm
from sparse_moon.kernels import batch_norm_relu as kernels
from sparse_moon.kernels.launch import Launch
from sparse_moon.nn import batch_norm_relu as nn_batch_norm_relu
from sparse_moon.ops.activations import FUNCTIONS, LAST_FLAT, NAMES
from sparse_moon.ops.batch_norm_relu import cpu, gpu
from sparse_moon.ops.batch_norm_relu.api import batch_norm_relu
from sparse_moon.ops.choice import use_backend
from sparse_moon.ops.registry import KERNELS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = torch.channels_last
OPERATORS = ("batch_norm_relu", "batch_norm_relu_backward")
# planes of one number, one row, fewer channels than a load is wide, odd ones, more than a program takes
SHAPES = [(9, 17, 1, 1), (1, 5, 1, 2), (3, 1, 5, 7), (3, 3, 5, 7), (2, 64, 9, 4), (2, 100, 3, 3), (3, 130, 2, 2)]

# NumPy, under Triton's interpreter, warns where e^-x is infinite and where a NaN is compared
infinities = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def _on_this_device(monkeypatch):
    """At any size; without a GPU the CPU's tensors go where a GPU's would."""
    for fewest in ("FEWEST", "FEWEST_ON_A_GPU"):
        monkeypatch.setattr(nn_batch_norm_relu, fewest, 0)
    if DEVICE == "cpu":
        monkeypatch.setattr(cpu, "takes", gpu.takes)
        for operator in OPERATORS:
            monkeypatch.setitem(KERNELS, (operator, "cpu"), KERNELS[operator, "cuda"])


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that ran."""
    names, call = [], Launch.__call__

    def noted(launch):
        names.append(launch.kernel.fn.__name__)
        call(launch)

    monkeypatch.setattr(Launch, "__call__", noted)
    return names


def make(shape, offset=0.0):
    """Input, weight, bias, residual, running mean and variance, gradient of the output; float32, on the CPU."""
    channels = shape[1]
    x = torch.randn(shape) * (0.5 + torch.rand(channels, 1, 1)) + offset * torch.randn(channels, 1, 1)
    mean, var = x.mean((0, 2, 3)) + 0.1 * torch.randn(channels), 0.5 + torch.rand(channels)
    weight, bias, residual, grad = (torch.randn(size) for size in (channels, channels, shape, shape))
    return x, weight, bias, residual, mean, var, grad


def torch_s_own(x, mean, var, weight, bias, residual, *, training, activation="relu", momentum=0.1):
    y = F.batch_norm(x, mean, var, weight, bias, training, momentum, 1e-5)
    return FUNCTIONS[NAMES.index(activation)](y if residual is None else y + residual)


def results(function, tensors, with_residual, dtype, vector_dtype=None, **options):
    """Output, gradients, and running statistics afterwards, of activations in channels_last."""
    x, weight, bias, residual, mean, var, grad = (t.to(DEVICE, copy=True) for t in tensors)
    x, residual, grad = (t.to(dtype).contiguous(memory_format=LAST) for t in (x, residual, grad))
    weight, bias, mean, var = (t.to(vector_dtype or dtype) for t in (weight, bias, mean, var))
    x, weight, bias, residual = (t.requires_grad_() for t in (x, weight, bias, residual))
    y = function(x, mean, var, weight, bias, residual if with_residual else None, **options)
    inputs = (x, weight, bias, residual) if with_residual else (x, weight, bias)
    return [t.detach().cpu() for t in (y, *torch.autograd.grad(y, inputs, grad), mean, var)]


def assert_as_good_as_torch(tensors, with_residual, dtype, vector_dtype=None, **options):
    """Error against float64 at most twice torch's own in the same dtype, and one rounding.

    Without a GPU eight in float32: the interpreter adds up a column number by number, torch on a CPU in float64.
    """
    roundings = 8 if (DEVICE, dtype) == ("cpu", torch.float32) else 1
    rounded = [t.to(dtype if t.dim() == 4 else vector_dtype or dtype) for t in tensors]
    exact = results(torch_s_own, rounded, with_residual, torch.float64, **options)
    theirs = results(torch_s_own, rounded, with_residual, dtype, vector_dtype, **options)
    ours = results(batch_norm_relu, rounded, with_residual, dtype, vector_dtype, **options)
    for i, (a, b, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, i
        limit = 2 * (b - e).norm() + roundings * torch.finfo(a.dtype).eps / 2 * e.norm()
        assert (a - e).norm() <= limit, (i, (a - e).norm(), (b - e).norm(), e.norm())
    return ours


@infinities
@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_precise_as_torch(shape, training, with_residual, activation, launched):
    y, *_ = assert_as_good_as_torch(make(shape), with_residual, torch.float32, training=training, activation=activation)
    assert y.is_contiguous(memory_format=LAST)
    moments = ["_moments", "_close_moments"] if training else []
    assert launched == [*moments, "_forward", "_gradient_sums", "_close_sums", "_input_grad"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_sixteen_bits(training, with_residual, mixed, dtype, launched):
    """With weights and statistics in float32, as autocast has them, or in the same dtype."""
    vector_dtype = torch.float32 if mixed else dtype
    for activation in NAMES if mixed and not with_residual else ("relu", "relu6"):
        options = {"training": training, "activation": activation}
        assert_as_good_as_torch(make((4, 24, 7, 5)), with_residual, dtype, vector_dtype, **options)
    assert launched


@pytest.mark.parametrize("with_residual", [True, False])
def test_many_parts_and_tiles(with_residual, monkeypatch):
    """Parts of several tiles, and a last one that is shorter; more channels than the last launches take at once."""
    monkeypatch.setattr(kernels, "TILE", 256)
    monkeypatch.setattr(kernels, "MOST_PARTS", 5)
    monkeypatch.setattr(kernels, "CLOSE_TILE", 64)
    for shape in ((5, 70, 6, 5), (2, 3, 23, 17), (1, 64, 29, 7)):
        for training in (True, False):
            assert_as_good_as_torch(make(shape), with_residual, torch.float32, training=training)


def moments(x):
    """Mean and biased variance by the operator."""
    x = x.to(DEVICE).contiguous(memory_format=LAST)
    _, mean, var = KERNELS["batch_norm_relu", "cuda"](x, None, None, None, None, None, 1e-5, 0)
    return mean.cpu().double(), var.cpu().double()


def test_the_variance_is_precise_wherever_the_mean_is(monkeypatch):
    """A mean of 1000 standard deviations, and a first image far from all others."""
    x = torch.randn(10, 20, 12, 12) + 1000
    x[0, 10:] += 1e5
    for parts in (512, 3):
        monkeypatch.setattr(kernels, "MOST_PARTS", parts)
        mean, var = moments(x)
        torch.testing.assert_close(mean, x.double().mean((0, 2, 3)), rtol=3e-7, atol=0)
        torch.testing.assert_close(var, x.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0)
    mean, var = moments(torch.full((2, 3, 4, 5), 1e6 / 3))
    assert (var == 0).all() and (mean == torch.tensor(1e6 / 3)).all()


@infinities
def test_what_is_not_a_number_shows():
    x = torch.randn(4, 3, 8, 8, device=DEVICE).contiguous(memory_format=LAST)
    x[1, 2, 3, 4] = float("nan")
    mean, var = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    y = batch_norm_relu(x, mean, var, training=True)
    assert y[:, 2].isnan().all() and not y[:, :2].isnan().any()
    assert mean.isnan().tolist() == var.isnan().tolist() == [False, False, True]
    leaf = x.requires_grad_()
    for activation in NAMES:
        found = []
        for function in (batch_norm_relu, torch_s_own):
            statistics = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
            y = function(leaf, *statistics, None, None, None, training=False, activation=activation)
            (grad,) = torch.autograd.grad(y.sum(), leaf)
            assert y.isnan().sum() == 1
            found.append((y.detach(), grad.where(~x.isnan(), 0)))  # there torch's own gradient varies with the vectors
        torch.testing.assert_close(*found, equal_nan=True)


@infinities
@pytest.mark.parametrize("activation", NAMES)
def test_activations_and_their_derivatives_over_the_whole_range(activation):
    """Of a batch norm that does nothing else, and of a sum."""
    x = torch.cat([torch.linspace(-100, 100, 401), torch.tensor([0.0, 6.0, 3.0, -3.0, 1e30, -1e30])])
    x, grad = (t.view(1, 1, -1, 1).to(DEVICE) for t in (x, torch.randn(len(x))))
    zero, one = torch.zeros(1, device=DEVICE), torch.ones(1, device=DEVICE)
    for residual in (None, torch.zeros_like(x)) if NAMES.index(activation) <= LAST_FLAT else (None,):
        found = []
        for function in (batch_norm_relu, torch_s_own):
            leaf = x.clone().requires_grad_()
            y = function(leaf, zero, one - 1e-5, None, None, residual, training=False, activation=activation)
            found.append((y.detach(), *torch.autograd.grad(y, leaf, grad)))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_odd_strides_and_missing_parameters(training, launched):
    """Of what goes with a channels_last input: no layout of the rest is asked for. Torch 2.14 itself takes vectors
    with a stride for contiguous ones, so its are."""
    x = torch.randn(6, 5, 9, 7, device=DEVICE).contiguous(memory_format=LAST)
    residual = torch.randn(6, 7, 9, 5, device=DEVICE).transpose(1, 3)
    grad = torch.randn(6, 5, 1, 1, device=DEVICE).expand(6, 5, 9, 7)
    vectors = [torch.rand(5, device=DEVICE) + 0.5 for _ in range(4)]
    for missing in (0, 1):
        found = []
        for function, dtype in ((batch_norm_relu, torch.float32), (torch_s_own, torch.float64)):
            a, b = (t.to(dtype, copy=True).requires_grad_() for t in (x, residual))
            own = [t.to(dtype).expand(3, 5).clone() for t in vectors]
            own = [t[1] if function is torch_s_own else t.T.contiguous()[:, 1] for t in own]
            own[missing] = None
            *affine, mean, var = own
            y = function(a, mean, var, *affine, b, training=training)
            found.append([t.detach().double() for t in (y, *torch.autograd.grad(y, (a, b), grad.to(dtype)), mean, var)])
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert launched


def test_what_the_kernels_do_not_take_is_torch_s_own(launched, monkeypatch):
    x, weight, bias, residual, mean, var, _ = (t.to(DEVICE) for t in make((3, 4, 5, 6)))
    last = x.contiguous(memory_format=LAST)

    def both(x, *rest):
        found = []
        for function in (batch_norm_relu, torch_s_own):
            statistics = [t.clone().to(rest[0].dtype) for t in (mean, var)]
            found.append(function(x, *statistics, *rest, training=True))
        torch.testing.assert_close(*found)

    both(x, weight, bias, residual)  # contiguous
    both(last[:, :, ::2], weight, bias, residual[:, :, ::2])
    both(last[:0], weight, bias, residual[:0])
    both(last.double(), weight.double(), bias.double(), residual.double())
    both(last, weight, bias, residual.double())
    for backend in ("dense", "reference"):
        with use_backend(backend):
            both(last, weight, bias, residual)
    monkeypatch.setattr(gpu, "has_triton", lambda: False)
    both(last, weight, bias, residual)
    assert not launched


def test_gradients_of_gradients():
    x, weight, bias, residual, mean, var, _ = (t.to(DEVICE) for t in make((3, 2, 3, 4)))
    found = []
    for function in (batch_norm_relu, torch_s_own):
        leaves = [t.clone().contiguous(memory_format=LAST) if t.dim() == 4 else t.clone() for t in (x, weight)]
        a, w = (t.requires_grad_() for t in leaves)
        y = function(a, mean.clone(), var.clone(), w, bias, residual, training=True)
        (grad,) = torch.autograd.grad(y.square().sum(), a, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), (a, w)))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_same_bits_again():
    tensors = make((6, 24, 9, 7))
    first, second = (results(batch_norm_relu, tensors, True, torch.float32, training=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


@pytest.mark.parametrize("amp", [None, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_sparsified_models_reach_the_kernels(amp, launched):
    """By themselves, under autocast as well; as the same model unfused."""
    torch.manual_seed(0)
    plain = sm.sparsify(nn.Sequential(Block(16), Block(16)), 0.5, fuse=False)
    torch.manual_seed(0)
    fused = sm.sparsify(nn.Sequential(Block(16), Block(16)), 0.5)
    x, found = torch.randn(3, 16, 6, 5), []
    for model in (plain, fused):
        model.to(DEVICE, memory_format=LAST)
        leaf = x.to(DEVICE).contiguous(memory_format=LAST).requires_grad_()
        with torch.autocast(DEVICE, amp, enabled=amp is not None):
            y = model(leaf.to(amp or torch.float32))  # as a first convolution makes it
        (grad,) = torch.autograd.grad(y.float().square().mean(), leaf)
        found.append((y.detach().float(), grad, *(t.float() for t in model.state_dict().values())))
        assert len(launched) == (0 if model is plain else 6 * 4)
    near = {"rtol": 1e-3, "atol": 1e-4} if amp is None else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(*found, **near)
    assert launched.count("_forward") == 4 and launched.count("_moments") == 4


def test_recomputed_to_the_same_bits(launched):
    """In place of its input a sparse convolution keeps what the batch norm keeps anyway."""
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = sm.sparsify(nn.Sequential(Block(16), Block(16)), 0.5, "uniform", recompute=recompute)
        model.to(DEVICE, memory_format=LAST)
        leaf = torch.randn(3, 16, 6, 5, device=DEVICE).contiguous(memory_format=LAST).requires_grad_()
        y = model(leaf)
        grads = torch.autograd.grad(y.square().mean(), (leaf, *model.parameters()))
        found.append((y.detach(), *grads))
        assert launched.count("_forward") == 4 + 2 * recompute  # without a residual
        launched.clear()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_capture_finds_nothing_forbidden(monkeypatch):
    """Forward and backward pass on the host: no look at a number, no size that depends on one."""
    launches = []
    monkeypatch.setattr(Launch, "__call__", lambda launch: launches.append(launch))
    x, weight, bias, residual, mean, var, grad = make((3, 16, 5, 4))
    x, residual, grad = (t.contiguous(memory_format=LAST) for t in (x, residual, grad))
    forward, backward = (KERNELS[operator, "cuda"] for operator in OPERATORS)

    def step():
        y, *statistics = forward(x, residual, weight, bias, None, None, 1e-5, 1)
        evaluated = forward(x, None, weight, bias, mean, var, 1e-5, 3)
        return evaluated, backward(grad, x, y, weight, bias, *statistics, 1e-5, 1, True)

    HostGraph(torch.device("cpu")).capture(step)
    assert len(launches) == 3 + 1 + 3


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
def test_compiled_without_breaks(launched):
    """The operator is opaque to a compiler, which keeps its layout."""
    plain = sm.BatchNormReLU2d(6).to(DEVICE)
    compiled = sm.BatchNormReLU2d(6).to(DEVICE)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    x, residual = (torch.randn(3, 6, 5, 4, device=DEVICE).contiguous(memory_format=LAST) for _ in range(2))
    for training in (True, False):
        found = []
        for module, call in ((plain.train(training), plain), (compiled.train(training), run)):
            a, b = (t.clone().requires_grad_() for t in (x, residual))
            y = call(a, b)
            found.append((y.detach(), *torch.autograd.grad(y.square().sum(), (a, b, *module.parameters()))))
            assert y.is_contiguous(memory_format=LAST)
        torch.testing.assert_close(*found)
        torch.testing.assert_close(compiled.state_dict(), plain.state_dict())
    assert launched


@pytest.mark.gpu
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 64, 56, 56), (64, 512, 28, 28), (128, 2048, 7, 7), (33, 100, 37, 41)])
def test_large_on_the_gpu(shape, dtype, with_residual):
    for training in (True, False):
        assert_as_good_as_torch(make(shape), with_residual, dtype, torch.float32, training=training)


@pytest.mark.gpu
def test_graph_replays():
    x, weight, bias, residual, mean, var, grad = (t.cuda() for t in make((8, 64, 14, 14)))
    x, residual = (t.contiguous(memory_format=LAST).requires_grad_() for t in (x, residual))
    statistics = [t.clone() for t in (mean, var)]

    def step():
        y = batch_norm_relu(x, *statistics, weight, bias, residual, training=True)
        return y, *torch.autograd.grad(y, (x, residual), grad)

    expected = step()  # compiled outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
