"""Models that run batch norm and activation as one operation, against the models that they were."""

import copy
import operator
import random
import warnings

import numpy
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparse_moon.app import models
from sparse_moon.nn import batch_norm_relu, sparse_layers, sparsify
from sparse_moon.nn.fusion import fuse, fusions

# image classifiers of this package, and how many batch norms are followed by a rectifier in each
MODELS = {"small-resnet": (8, 13), "resnet18": (4, 17), "resnet50": (4, 49), "wrn-22-2": (4, 19)}


def build(name, **options):
    model = models.build(name, 5, in_channels=3, image_size=8, width=MODELS[name][0])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return model


def fused_modules(model):
    return [name for name, what in fusions(model).items() if what == "fused"]


def assert_equal_models(plain, fused, x, training):
    """Outputs, gradients of the input and of all parameters, and buffers afterwards."""
    found = []
    for model in (plain, fused):
        model.train(training)
        image = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = model(image)
        parameters = dict(model.named_parameters())
        grads = torch.autograd.grad(y.square().sum(), [image, *parameters.values()])
        found.append((y, dict(zip(["input", *parameters], grads, strict=True)), dict(model.named_buffers())))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_package_s_models(name, layout):
    plain = build(name)
    fused = copy.deepcopy(plain)
    assert fuse(fused) is fused and len(fused_modules(fused)) == MODELS[name][1]
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in plain.named_parameters()]
    x = torch.randn(6, 3, 8, 8).contiguous(memory_format=layout)
    plain, fused = plain.double(), fused.double()  # the same graph: in float64 nothing is left but the rewriting
    for training in (True, False, True):
        assert_equal_models(plain, fused, x.double(), training)


@pytest.mark.parametrize("name", ["small-resnet", "wrn-22-2"])
def test_the_kernels_in_a_model(name, monkeypatch):
    monkeypatch.setattr(batch_norm_relu, "FEWEST", 0)
    plain = build(name)
    fused = fuse(copy.deepcopy(plain))
    for training in (True, False):
        assert_equal_models(plain, fused, torch.randn(6, 3, 8, 8), training)


def test_sparse_layers_before_and_after():
    plain = torchvision.models.resnet18(num_classes=4)
    sparsify(plain, 0.8, fuse=False)
    fused = fuse(copy.deepcopy(plain))
    assert len(fused_modules(fused)) == 17 and list(sparse_layers(fused)) == list(sparse_layers(plain))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x))
    later = sparsify(fuse(torchvision.models.resnet18(num_classes=4)), 0.8, fuse=False)
    assert list(sparse_layers(later)) == list(sparse_layers(plain)) and len(fused_modules(later)) == 17


def test_nothing_to_fuse():
    for model in (models.build("mlp", 3, in_channels=1, image_size=4), nn.BatchNorm2d(3),
                  nn.Sequential(nn.BatchNorm2d(3), nn.Sigmoid())):  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert fuse(model) is model and "forward" not in vars(model)


class Block(nn.Module):
    """A body over ``self.bn``, ``self.relu``, ``self.other`` and an input."""

    def __init__(self, body, inplace=False):
        super().__init__()
        self.bn, self.other, self.relu = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.ReLU(inplace)
        self.identity = nn.Identity()
        self.unused, self.scale = nn.Linear(2, 2), nn.Parameter(torch.randn(3, 1, 1))
        self.body = body

    def forward(self, x):
        return self.body(self, x)


FUSED = {
    "module": lambda m, x: m.relu(m.bn(x)),
    "relu in place": lambda m, x: F.relu(m.bn(x), inplace=True),
    "torch.relu": lambda m, x: torch.relu(m.bn(x)),
    "relu_": lambda m, x: m.bn(x).relu_(),
    "method": lambda m, x: m.bn(x).relu(),
    "sum": lambda m, x: F.relu(m.bn(m.other(x)) + x),
    "sum, other first": lambda m, x: F.relu(x + m.bn(m.other(x))),
    "sum in place": lambda m, x: F.relu_(operator.iadd(m.bn(m.other(x)), x)),
    "torch.add": lambda m, x: F.relu(torch.add(m.bn(x), m.other(x))),
    "method add_": lambda m, x: m.bn(x).add_(m.other(x)).relu_(),
    "broadcast": lambda m, x: F.relu(m.bn(x) + m.other(x).mean((2, 3), keepdim=True)),
    "a parameter": lambda m, x: F.relu(m.bn(x) + m.scale),
    "a size": lambda m, x: F.relu(m.bn(x) + x.shape[0]),
    "a size in place": lambda m, x: m.bn(x).add_(x.shape[0]).relu_(),
    "an item": lambda m, x: F.relu(x.mean().item() + m.bn(x)),
    "identity": lambda m, x: F.relu(m.identity(m.identity(m.bn(x)) + x)),
    "relu6": lambda m, x: F.relu6(m.bn(x)),
    "relu6 of a sum": lambda m, x: F.relu6(m.bn(x) + x),
    "silu": lambda m, x: F.silu(m.bn(x)),
    "hardswish": lambda m, x: F.hardswish(m.bn(x), inplace=True),
    "relu used twice": lambda m, x: (lambda y: y * y.sum())(m.relu(m.bn(x))),
}
NOT_FUSED = {
    "batch norm used twice": lambda m, x: (lambda y: F.relu(y) + y)(m.bn(x)),
    "sum used twice": lambda m, x: (lambda y: F.relu(y) + y)(m.bn(x) + x),
    "called twice": lambda m, x: F.relu(m.bn(F.relu(m.bn(x)))),
    "sum with itself": lambda m, x: (lambda y: F.relu(y + y))(m.bn(x)),
    "a number": lambda m, x: F.relu(m.bn(x) + 1),
    "a multiple": lambda m, x: F.relu(torch.add(m.bn(x), x, alpha=2)),
    "into the other": lambda m, x: (lambda y: F.relu(operator.iadd(y, m.bn(x))) * y)(m.other(x)),
    "input overwritten": lambda m, x: (lambda y: F.relu(m.bn(y) + y.mul_(2)))(m.other(x)),
    "input overwritten by a module": lambda m, x: (lambda y: F.relu(m.bn(y) + m.relu(y)))(m.other(x)),
    "input overwritten after the sum": lambda m, x: (lambda y, z: F.relu((z, y.mul_(2))[0]))(
        *(lambda y: (y, m.bn(y) + x))(m.other(x))
    ),
    "input overwritten by position": lambda m, x: (lambda y: F.relu(m.bn(y) + F.relu(y, True)))(m.other(x)),
    "silu of a sum": lambda m, x: F.silu(m.bn(x) + x),
    "other activation": lambda m, x: F.gelu(m.bn(x)),
}


@pytest.mark.parametrize("body", [*FUSED, *NOT_FUSED])
def test_patterns(body):
    plain = Block((FUSED | NOT_FUSED)[body], inplace=True)
    fused = fuse(copy.deepcopy(plain))
    assert len(fused_modules(fused)) == (body in FUSED)
    assert list(fused.state_dict()) == list(plain.state_dict())
    x = torch.randn(4, 3, 5, 6)
    for training in (True, False):
        torch.testing.assert_close(fused.train(training)(x), plain.train(training)(x))
        torch.testing.assert_close(fused.state_dict(), plain.state_dict())


@pytest.mark.parametrize("body", ["sum", "sum in place", "method add_"])
def test_sums_of_two_dtypes(body):
    """In bfloat16 the sum in place has the dtype of the batch norm's output, the other that of the residual."""
    plain = Block(FUSED[body])
    fused = fuse(copy.deepcopy(plain))

    class Other(nn.Module):  # the input or the residual, whichever comes out of it, in bfloat16
        def forward(self, x):
            return x.bfloat16()

    for model in (plain, fused):
        model.other = Other()
    x = torch.randn(4, 3, 5, 6)
    assert len(fused_modules(fused)) == 1
    ours, theirs = fused(x), plain(x)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs)


def test_autocast():
    plain = build("small-resnet")
    fused = fuse(copy.deepcopy(plain))
    x = torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(x), plain(x))


def switched(m, x):
    with torch.no_grad():
        x = m.other(x)
    return F.relu(m.bn(x))


def kept(m, x):
    m.seen = m.bn(x)
    return F.relu(m.seen)


def checkpointed(m, x):
    return checkpoint(lambda x: F.relu(m.bn(x)), x, use_reentrant=False)


UNTRACEABLE = {
    "symbolically traced": lambda m, x: F.relu(m.bn(x)) if x.sum() > 0 else x,
    r"depends on self\.training": lambda m, x: F.dropout(F.relu(m.bn(x)), training=m.training),
    r"self\.training, on whether there are gradients": lambda m, x: (
        F.relu(m.bn(x)) if torch.is_grad_enabled() else F.relu(m.bn(x)) + 0.0
    ),
    "or on autocast": lambda m, x: F.relu(m.bn(x)) if torch.is_autocast_enabled("cpu") else F.relu(m.bn(x)) + 0.0,
    "asks for the type of its input": lambda m, x: F.relu(m.bn(x)) if isinstance(x, torch.Tensor) else x,
    "switches gradients": switched,
    "switches gradients, autocast or checkpoints": checkpointed,
    "writes to the module": kept,
    "draws random numbers": lambda m, x: F.relu(m.bn(x)) if torch.rand(()) < 2 else x,
    "random numbers by itself": lambda m, x: F.relu(m.bn(x)) if random.random() < 2 else x,
    "draws random numbers by itself": lambda m, x: F.relu(m.bn(x)) if numpy.random.rand() < 2 else x,
}


@pytest.mark.parametrize("reason", UNTRACEABLE)
def test_what_cannot_be_traced_stays_with_one_warning(reason):
    model = Block(UNTRACEABLE[reason])
    model.bn.eval()
    before, state = dict(vars(model)), (torch.get_rng_state(), random.getstate())
    with pytest.warns(UserWarning, match=reason) as caught:
        assert fuse(model) is model
    assert len(caught) == 1 and model.training and not model.bn.training
    assert vars(model) == before
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    sparsified = sparsify(nn.Sequential(model, nn.Conv2d(3, 8, 3)), 0.2, "uniform", first_dense=False)  # "auto": silent
    sparsified(torch.rand(2, 3, 8, 8)).sum().backward()
    assert sparsified[0].bn.weight.grad is not None and fused_modules(sparsified) == []


def test_modules_under_two_names():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
            self.second = self.first
            self.norms = nn.ModuleList([self.first[1]])

        def forward(self, x):
            return self.second(x)

    fused = fuse(Twice())
    assert fused.norms.get_submodule("0") is fused.first.get_submodule("1") and len(fused_modules(fused)) == 1
    assert "forward" in vars(fused.first) and "forward" not in vars(fused)  # the innermost that has it all


def test_across_modules():
    """A batch norm at the end of one module, the sum and the activation in another; lists of modules."""

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(2))
            self.act = nn.ReLU()

        def forward(self, x, twice=False):
            for part in self.parts:
                x = self.act(part(x) + x)
            return 2 * x if twice else x

    plain = Whole()
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(2, 3, 4, 4)
    assert fused_modules(fused) == ["parts.0.1", "parts.1.1"]
    for call in (lambda m: m(x), lambda m: m(x, True), lambda m: m(x=x, twice=True)):
        torch.testing.assert_close(call(fused), call(plain))
    for model in (plain, fused):
        model.parts.append(nn.Identity())
    torch.testing.assert_close(fused(x), plain(x))
    seen = []
    fused.parts[0].register_forward_hook(lambda m, args, y: seen.append(y))
    fused(x)
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "timm resnet50"])
def test_architectures_of_others(name):
    if name.startswith("timm"):
        plain = pytest.importorskip("timm").create_model(name.split()[1], num_classes=4)
    else:
        plain = getattr(torchvision.models, name)(num_classes=4)
    expected = {"resnet18": 17, "resnet50": 49, "mobilenet_v2": 35, "mobilenet_v3_small": 23, "timm resnet50": 49}
    fused = fuse(copy.deepcopy(plain))
    assert len(fused_modules(fused)) == expected[name]
    x = torch.randn(2, 3, 64, 64)
    for training in (True, False):
        found = []
        for model in (plain.double(), fused.double()):
            torch.manual_seed(0)  # of dropout
            y = model.train(training)(x.double())
            grads = torch.autograd.grad(y.square().sum(), list(model.parameters()))
            found.append((y, grads, dict(model.named_buffers())))
        torch.testing.assert_close(*found)
