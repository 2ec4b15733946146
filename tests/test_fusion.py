"""Models rewritten to use the fused module, against the models that they were."""

import copy
import operator
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from sparse_moon.app import models
from sparse_moon.nn import sparse_layers, sparsify
from sparse_moon.nn.fusion import BatchNormReLU2d, fuse

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
    return [module for module in model.modules() if isinstance(module, BatchNormReLU2d)]


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
    fused = fuse(copy.deepcopy(plain))
    assert len(fused_modules(fused)) == MODELS[name][1]
    assert [node for node in fused.graph.nodes if node.target is F.relu] == []
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in plain.named_parameters()]
    x = torch.randn(6, 3, 8, 8).contiguous(memory_format=layout)
    plain, fused = plain.double(), fused.double()  # the same graph: in float64 nothing is left but the rewriting
    for training in (True, False, True):
        assert_equal_models(plain, fused, x.double(), training)


@pytest.mark.parametrize("name", ["small-resnet", "wrn-22-2"])
def test_the_kernels_in_a_model(name):
    plain = build(name)
    fused = fuse(copy.deepcopy(plain))
    for training in (True, False):
        assert_equal_models(plain, fused, torch.randn(6, 3, 8, 8), training)


def test_torchvision_and_sparse_layers():
    plain = torchvision.models.resnet18(num_classes=4)
    sparsify(plain, 0.8)
    fused = fuse(plain)
    assert len(fused_modules(fused)) == 17 and list(sparse_layers(fused)) == list(sparse_layers(plain))
    assert list(fused.state_dict()) == list(plain.state_dict())
    pairs = zip(fused.named_parameters(), plain.named_parameters(), strict=True)
    assert all(ours is theirs for ours, theirs in pairs for ours, theirs in [(ours[1], theirs[1])])
    assert fused.bn1.running_mean is plain.bn1.running_mean
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x))
    sparsify_later = sparsify(fuse(torchvision.models.resnet18(num_classes=4)), 0.8)
    assert list(sparse_layers(sparsify_later)) == list(sparse_layers(plain))


def test_nothing_to_fuse():
    for model in (models.build("mlp", 3, in_channels=1, image_size=4), nn.BatchNorm2d(3),
                  nn.Sequential(nn.BatchNorm2d(3), nn.Sigmoid())):  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert fuse(model) is model


class Block(nn.Module):
    """A body over ``self.bn``, ``self.relu``, ``self.other`` and an input."""

    def __init__(self, body, inplace=False):
        super().__init__()
        self.bn, self.other, self.relu = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.ReLU(inplace)
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
    "other activation": lambda m, x: F.relu6(m.bn(x)),
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


def test_what_cannot_be_traced_stays_with_one_warning():
    bodies = {
        "symbolically traced": lambda m, x: F.relu(m.bn(x)) if x.sum() > 0 else x,
        r"depends on self\.training": lambda m, x: F.dropout(F.relu(m.bn(x)), training=m.training),
    }
    for reason, body in bodies.items():
        model = Block(body)
        model.bn.eval()
        with pytest.warns(UserWarning, match=reason) as caught:
            assert fuse(model) is model
        assert len(caught) == 1 and model.training and not model.bn.training


def test_copies_keep_names_order_and_independence():
    fused = fuse(Block(FUSED["sum"]))
    clone = copy.deepcopy(copy.deepcopy(fused))
    assert list(clone.state_dict()) == list(fused.state_dict())
    assert type(clone) is not nn.Module and len(fused_modules(clone)) == 1
    x = torch.randn(4, 3, 5, 6)
    torch.testing.assert_close(clone(x), fused(x))
    assert {id(p) for p in clone.parameters()}.isdisjoint(id(p) for p in fused.parameters())
    with torch.no_grad():
        clone.bn.bias += 1
    assert not torch.equal(clone(x), fused(x))
    assert clone.bn.num_batches_tracked == fused.bn.num_batches_tracked == 2
    clone.load_state_dict(fused.state_dict())
    torch.testing.assert_close(clone.eval()(x), fused.eval()(x))
    assert not clone.bn.training and clone.train().bn.training


def test_modules_under_two_names():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
            self.second = self.first
            self.norms = nn.ModuleList([self.first[1]])

        def forward(self, x):
            return self.second(x)

    plain = Twice()
    fused = fuse(plain)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert fused.norms.get_submodule("0") is fused.first.get_submodule("1") and len(fused_modules(fused)) == 1


def test_full_graph_compilation():
    torch._dynamo.reset()
    fused = fuse(build("small-resnet"))
    twin = copy.deepcopy(fused)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 8, 8)
    for _ in range(2):
        ours, theirs = compiled(x), twin(x)
        torch.testing.assert_close(ours, theirs)
    ours.sum().backward()
    theirs.sum().backward()
    for a, b in zip(fused.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(fused.state_dict(), twin.state_dict())


def test_conversion_to_synchronised_batch_norm_does_not_lose_the_rectifier_silently():
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fuse(Block(FUSED["module"])))
    with pytest.raises(TypeError, match="residual"):
        fused(torch.randn(4, 3, 5, 6))
