"""Dense models out of sparse ones: plain torch, with the same outputs, names and classes."""

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

import sparse_moon as sm
from sparse_moon.app import models
from sparse_moon.nn.fusion import fusions
from sparse_moon.ood import CosineHead


class Nested(nn.Module):
    """A shared block, a buffer and a parameter of a container, a batch norm that stays, and functions only."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.again = nn.ModuleList([self.block])
        self.norm, self.last = nn.BatchNorm2d(8, momentum=None), nn.BatchNorm2d(8)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.register_buffer("shift", torch.ones(8, 1, 1), persistent=False)
        self.head = CosineHead(8, 4)
        self.settings = {"depth": 2}

    def forward(self, x):
        x = self.block(x)
        x = F.relu(self.norm(x) + x * self.scale + self.shift)
        return self.head(self.last(x).mean((2, 3)))


NETWORKS = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=4), 3),
    "small-resnet": (lambda: models.build("small-resnet", 4, in_channels=3, image_size=16), 3),
    "sequential": (
        lambda: nn.Sequential(nn.Conv2d(8, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3),
                              nn.BatchNorm2d(32), nn.ReLU()),
        8,
    ),
    "nested": (Nested, 8),
    "a fused part": (lambda: nn.Sequential(sm.fuse(Nested()), nn.Linear(4, 32), nn.Linear(32, 32)), 8),
}  # fmt: skip


def reload(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.filterwarnings("ignore:a sparsity of 0.6 was asked for")  # the cosine head stays dense
@pytest.mark.parametrize("way", ["itself", "copy", "saved", "later", "moved"])
@pytest.mark.parametrize("name", NETWORKS)
def test_densify_of_a_fused_model_gives_the_model_s_own_classes(name, way):
    build, channels = NETWORKS[name]
    plain = build()
    names, kinds = [*plain.state_dict()], [(n, type(m)) for n, m in sm.densify(copy.deepcopy(plain)).named_modules()]
    fused = sm.sparsify(sm.fuse(plain), 0.6) if way == "later" else sm.sparsify(plain, 0.6, fuse=True)
    assert fused is plain and "fused" in fusions(fused).values()
    x = torch.randn(4, channels, 16, 16)
    fused(x)  # statistics that are not those of the start
    if way == "moved":
        fused, x = fused.double(), x.double()
    fused = {"copy": copy.deepcopy, "saved": reload}.get(way, lambda m: m)(fused)
    expected = copy.deepcopy(fused)
    dense = sm.densify(fused)
    assert [(n, type(m)) for n, m in dense.named_modules()] == kinds
    assert [*dense.state_dict()] == names
    assert not sm.sparse_layers(dense) and "fused" not in fusions(dense).values()
    for training in (False, True, False):
        torch.testing.assert_close(dense.train(training)(x), expected.train(training)(x), rtol=1e-3, atol=1e-3)
    buffers = dict(expected.named_buffers())
    for buffer, tensor in dense.named_buffers():
        torch.testing.assert_close(tensor, buffers[buffer], rtol=1e-3, atol=1e-3)


def test_nothing_of_this_package_is_left():
    for fuse in (False, True):
        model = sm.sparsify(torchvision.models.resnet18(num_classes=4), 0.8, fuse=fuse)
        dense = sm.densify(model)
        assert type(dense) is ResNet and type(dense.layer1[0]) is BasicBlock
        assert dense is model and not any("forward" in vars(module) for module in dense.modules())
        assert not any(type(module).__module__.startswith("sparse_moon") for module in dense.modules())
        dense.layer1(torch.randn(2, 64, 8, 8))  # a container can be called again


@pytest.mark.filterwarnings("ignore:a sparsity of 0.5 was asked for")
def test_a_copy_and_the_dense_model_share_nothing():
    model = sm.sparsify(Nested(), 0.5, fuse=True)
    norm = model.norm
    dense, copied = sm.densify(copy.deepcopy(model)), copy.deepcopy(model)
    assert dense.settings == {"depth": 2} and dense.again[0] is dense.block
    assert model.norm is norm and dense.norm is not norm and dense.norm.momentum is None
    dense.eval()
    assert not dense.block[1].training and model.block[1].training
    assert "fused" in fusions(model).values() and "fused" in fusions(copied).values()


@pytest.mark.parametrize("fuse", [False, True])
def test_export(fuse):
    model = sm.sparsify(torchvision.models.resnet18(num_classes=4), 0.8, fuse=fuse).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    dense = sm.densify(model)
    torch.testing.assert_close(torch.export.export(dense, (x,)).module()(x), expected)
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(dense, (x,), dynamo=True, verbose=False).save(file)
    onnx.checker.check_model(onnx.load_from_string(file.getvalue()))


def test_compiled_and_wrapped_models():
    x = torch.randn(2, 8)
    for wrap in (lambda m: torch.compile(m, backend="eager"), nn.DataParallel):
        inner = sm.sparsify(nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8)), 0.5)
        expected = inner(x)
        wrapped = wrap(inner)
        dense = sm.densify(wrapped)
        assert dense is inner and type(dense[0]) is nn.Linear
        torch.testing.assert_close(dense(x), expected)
    layer = sm.SparseLinear(8, 8, sparsity=0.5)
    model = nn.Sequential(torch.compile(layer, backend="eager"))
    assert type(sm.densify(model)[0]) is nn.Linear  # a compiled layer goes on calling what it was made of
    torch.testing.assert_close(model(x), layer(x))


def test_a_batch_norm_that_the_model_s_own_code_calls_stays_with_a_warning():
    model = nn.Sequential(sm.SparseConv2d(8, 8, 3, sparsity=0.5), sm.BatchNormReLU2d(8))
    with pytest.warns(UserWarning, match="BatchNormReLU2d stays, the model's own code calls it: 1"):
        dense = sm.densify(model)
    assert type(dense[0]) is nn.Conv2d and isinstance(dense[1], sm.BatchNormReLU2d)


def test_fusing_and_densify_lose_no_hooks():
    model, seen = Nested(), []
    model.block.register_forward_hook(lambda m, x, y: seen.append("block"))
    model.last.register_forward_hook(lambda m, x, y: seen.append("last"))
    x = torch.randn(2, 8, 6, 6)
    sm.fuse(model)(x)
    sm.densify(model)(x)
    assert seen == ["block", "last"] * 2
