"""A fused model stays the model that it was."""

import copy
import inspect
import io
import traceback
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.resnet import BasicBlock, ResNet

import sparse_moon as sm
from sparse_moon.nn import batch_norm_relu
from sparse_moon.nn.fusion import fusions
from sparse_moon.ops.native import native

pytestmark = pytest.mark.skipif(native is None, reason="without compiled kernels nothing is fused by itself")


@pytest.fixture(autouse=True)
def kernels_for_small_inputs(monkeypatch):
    monkeypatch.setattr(batch_norm_relu, "FEWEST", 0)


class Block(nn.Module):
    gain = 1.0

    def __init__(self):
        super().__init__()
        self.settings, self.scales, self.options = SimpleNamespace(epoch=0), [1.0], {"more": {"scale": 1.0}}
        self.conv, self.bn, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.shortcut, self.scale = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), 1.0
        self.last = nn.Conv2d(4, 16, 1)

    def forward(self, x):
        y = self.bn(self.conv(x))
        y += self.shortcut(x) * (self.scale * self.scales[0] * self.options["more"]["scale"] * self.gain)
        if self.settings.epoch > 5:
            y = y + 1
        return self.last(self.act(y))


def fused_names(model):
    return [name for name, what in fusions(model).items() if what == "fused"]


def runs_fused(model, x):
    """How many batch norms a forward pass does not call by themselves."""
    called, forward = set(), nn.BatchNorm2d.forward

    def noted(norm, x):
        called.add(norm)
        return forward(norm, x)

    nn.BatchNorm2d.forward = noted
    try:
        model(x)
    finally:
        nn.BatchNorm2d.forward = forward
    return sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) - len(called)


def pair():
    torch.manual_seed(0)
    plain = Block()
    return plain, sm.fuse(copy.deepcopy(plain))


def assert_same(a, b, x, training=True):
    for model in (a, b):
        model.train(training)
    torch.testing.assert_close(a(x), b(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(a.named_buffers()), dict(b.named_buffers()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fuse", ["auto", True, False])
def test_sparsify_returns_the_same_object(fuse):
    model = torchvision.models.resnet18(num_classes=4)
    seen = []
    model.layer1.register_forward_hook(lambda m, args, y: seen.append("layer1"))
    model.layer1[0].register_forward_hook(lambda m, args, y: seen.append("block"))
    model.layer1[0].conv1.register_forward_hook(lambda m, args, y: seen.append("conv"))
    kinds = [(name, type(m)) for name, m in model.named_modules() if not isinstance(m, nn.Conv2d | nn.Linear)]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    names = [*sm.densify(copy.deepcopy(model)).state_dict()]
    assert sm.sparsify(model, 0.8, fuse=fuse) is model
    assert type(model) is ResNet and type(model.layer1[0]) is BasicBlock and type(model.layer1) is nn.Sequential
    after = {name: type(m) for name, m in model.named_modules()}
    assert all(after[name] is kind for name, kind in kinds)
    assert [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == norms
    assert len(fused_names(model)) == (17 if fuse else 0)
    model(torch.randn(2, 3, 32, 32))
    assert seen == ["conv", "block", "layer1"]
    assert str(inspect.signature(model.forward)) == str(inspect.signature(ResNet(BasicBlock, [1] * 4).forward))
    assert sm.densify(model) is model and [*model.state_dict()] == names
    assert fused_names(model) == [] and not any("forward" in vars(m) for m in model.modules())


def test_training_is_the_same_within_rounding():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=4)
    plain = sm.sparsify(model, 0.8, fuse=False)
    fused = sm.fuse(copy.deepcopy(plain))
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(4, (8,))
    losses = []
    for model in (plain, fused):
        optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
        losses.append([])
        for _ in range(3):
            loss = F.cross_entropy(model(images), labels)
            losses[-1].append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert plain.bn1.num_batches_tracked == fused.bn1.num_batches_tracked == 3


def test_checkpoints_of_either_kind_fit():
    plain, fused = pair()
    plain(torch.randn(4, 4, 6, 6))
    fused.load_state_dict(plain.state_dict())
    assert_same(plain, fused, torch.randn(4, 4, 6, 6), training=False)
    plain.load_state_dict(fused.state_dict())


@pytest.mark.parametrize("way", ["copy", "twice", "saved"])
def test_copies_are_fused_and_independent(way):
    plain, fused = pair()
    if way == "saved":
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        clone = torch.load(file, weights_only=False)
    else:
        clone = copy.deepcopy(copy.deepcopy(fused) if way == "twice" else fused)
    x = torch.randn(4, 4, 6, 6)
    assert fused_names(clone) == fused_names(fused) == ["bn"] and runs_fused(clone, x) == runs_fused(fused, x) == 1
    with torch.no_grad():
        for p in clone.parameters():
            p.zero_()
    assert clone(x).abs().sum() == 0 and fused(x).abs().sum() > 0
    assert clone.bn.num_batches_tracked == fused.bn.num_batches_tracked == 2
    fused.load_state_dict(plain.state_dict())
    assert_same(plain, fused, x)


def test_what_is_changed_afterwards_counts():
    x = torch.randn(4, 4, 6, 6)
    changes = {
        "a convolution": (lambda m: setattr(m, "conv", copy.deepcopy(other)), 1),
        "another batch norm": (lambda m: setattr(m, "bn", nn.BatchNorm2d(4, eps=0.1)), 1),
        "none": (lambda m: setattr(m, "bn", nn.Identity()), 0),
        "a kind of batch norm": (lambda m: setattr(m, "bn", nn.SyncBatchNorm(4).eval()), 0),
        "activation": (lambda m: setattr(m, "act", nn.GELU()), 0),
        "attribute": (lambda m: setattr(m, "scale", 3.0), 0),
        "object": (lambda m: setattr(m.settings, "epoch", 7), 0),
        "list": (lambda m: m.scales.__setitem__(0, 3.0), 0),
        "dict": (lambda m: m.options["more"].update(scale=3.0), 0),
        "equal list": (lambda m: setattr(m, "scales", [1.0]), 1),
        "parametrization": (
            lambda m: nn.utils.parametrize.register_parametrization(m.bn, "weight", nn.Softplus(), unsafe=True), 0,
        ),
        "momentum": (lambda m: setattr(m.bn, "momentum", None), 1),
        "frozen statistics": (lambda m: m.bn.eval(), 1),
    }  # fmt: skip
    other = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    for name, (change, fuses) in changes.items():
        plain, fused = pair()
        for model in (plain, fused):
            change(model)
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(dict(fused.named_buffers()), dict(plain.named_buffers()), rtol=1e-4, atol=1e-5)
        norms = sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
        assert runs_fused(fused, x) == fuses, name
        if norms == 2 and not fuses:
            assert "was changed" in fusions(fused)["bn"], name


def test_attributes_of_the_class_count(monkeypatch):
    plain, fused = pair()
    x = torch.randn(4, 4, 6, 6)
    monkeypatch.setattr(Block, "gain", 3.0)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
    assert runs_fused(fused, x) == 0


@pytest.mark.parametrize("part", ["bn", "act"])
def test_hooks_are_called(part):
    plain, fused = pair()
    x, seen = torch.randn(4, 4, 6, 6), []
    handle = fused.get_submodule(part).register_forward_hook(lambda m, args, y: seen.append(1))
    assert_same(plain, fused, x)
    assert seen == [1] and "has hooks" in fusions(fused)["bn"]
    handle.remove()
    assert_same(plain, fused, x)
    assert seen == [1] and runs_fused(fused, x) == 1
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(m))
    try:
        fused(x)
    finally:
        handle.remove()
    assert fused.bn in seen


def test_compilation():
    plain, fused = pair()
    x = torch.randn(4, 4, 6, 6)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for model in (plain, compiled):
        model(x).square().sum().backward()
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(dict(fused.named_buffers()), dict(plain.named_buffers()))
    exported = torch.export.export(fused.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), plain.eval()(x))


def test_functional_calls_use_their_parameters():
    plain, fused = pair()
    x = torch.randn(4, 4, 6, 6)
    zeros = {name: torch.zeros_like(p) for name, p in fused.eval().named_parameters()}
    assert torch.func.functional_call(fused, zeros, (x,)).abs().sum() == 0
    weights = dict(fused.named_parameters())
    found = torch.func.vmap(lambda x: torch.func.functional_call(fused, weights, (x,)))(x[None])
    torch.testing.assert_close(found[0], plain.eval()(x), rtol=1e-4, atol=1e-5)


def test_data_parallel_replicas_are_not_fused():
    _, fused = pair()
    replica = fused._replicate_for_data_parallel()
    assert "forward" not in vars(replica) and replica.forward.__self__ is replica


def test_distributed_data_parallel(tmp_path):
    plain, fused = pair()
    x = torch.randn(4, 4, 6, 6)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(fused)
        for model in (plain, parallel):
            model(x).square().sum().backward()
        assert runs_fused(parallel, x) == 1
    finally:
        dist.destroy_process_group()
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)


def test_errors_show_where():
    _, fused = pair()
    try:
        fused(torch.randn(4, 5, 6, 6))
    except RuntimeError as error:
        text = "".join(traceback.format_tb(error.__traceback__))
    assert "fused Block" in text and "self.conv(x)" in text


def test_a_wrong_argument():
    with pytest.raises(ValueError, match="fuse must be 'auto', True or False, got 'yes'"):
        sm.sparsify(Block(), 0.5, fuse="yes")
