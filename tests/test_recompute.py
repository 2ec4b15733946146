"""Activations that are computed again in the backward pass: the same bits, less memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparse_moon as sm
from sparse_moon.app import models
from sparse_moon.app.config import TrainConfig
from sparse_moon.nn import batch_norm_relu
from sparse_moon.nn.fused_forward import FusedForward
from sparse_moon.ops.native import native

pytestmark = pytest.mark.skipif(native is None, reason="needs the compiled CPU kernels")


@pytest.fixture(autouse=True)
def kernels_for_small_inputs(monkeypatch):
    monkeypatch.setattr(batch_norm_relu, "FEWEST", 0)


def network(recompute):
    torch.manual_seed(0)
    model = models.build("small-resnet", 10, in_channels=1, image_size=14, width=8)
    return sm.sparsify(model, 0.8, fuse=True, recompute=recompute)


def kept_bytes(function):
    """Bytes of what autograd keeps for the backward pass, and the function's result."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return sum(kept.values()), result


def test_training_ends_with_the_same_bits_in_less_memory():
    ends, kept = [], []
    images, labels = torch.randn(16, 1, 14, 14), torch.randint(10, (16,))
    for recompute in (False, True):
        model = network(recompute)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
        method = sm.RigL(model, optimizer, total_steps=20, interval=3)
        for _ in range(7):  # two of them topology updates
            nbytes, loss = kept_bytes(lambda model=model: F.cross_entropy(model(images), labels))
            loss.backward()
            method.step()
            optimizer.zero_grad()
        kept.append(nbytes)
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert kept[1] < 0.8 * kept[0]  # one activation of four in each block


def pair(recompute=True):
    torch.manual_seed(0)
    norm = sm.BatchNormReLU2d(6, recompute=recompute)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm, sm.SparseConv2d(6, 4, 3, padding=1, sparsity=0.5)


def gradients(between, *, recompute, mode="train", layout=torch.contiguous_format):
    """Of a convolution of ``between(norm(x))``."""
    norm, conv = pair(recompute)
    norm.running_mean.add_(0.3)
    norm.train(mode == "train")
    torch.manual_seed(1)
    x = torch.randn(5, 6, 7, 9).contiguous(memory_format=layout).requires_grad_()
    torch.manual_seed(2)
    nbytes, loss = kept_bytes(lambda: conv(between(norm(x))).square().sum())
    return nbytes, torch.autograd.grad(loss, [x, conv.values, norm.weight, norm.bias])


BETWEEN = {
    "nothing": (lambda y: y, True),
    "written in place": (lambda y: y.mul_(2.0), False),
    "dropout in place": (lambda y: F.dropout(y, 0.5, inplace=True), False),
    "a view": (lambda y: y.flatten(2).unflatten(2, (7, 9)), False),
    "another tensor": (lambda y: y + 1.0, False),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", list(BETWEEN))
def test_only_what_the_recipe_makes_is_made_again(name, mode, layout):
    between, saves = BETWEEN[name]
    more, expected = gradients(between, recompute=False, mode=mode, layout=layout)
    less, got = gradients(between, recompute=True, mode=mode, layout=layout)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert (less < more) == saves


def test_written_after_its_use():
    norm, conv = pair()
    x = torch.randn(5, 6, 7, 9, requires_grad=True)
    y = norm(x)
    z = conv(y)
    expected = torch.autograd.grad(z.sum(), conv.values, retain_graph=True)[0]
    y.detach().zero_()  # what is kept is not the output
    assert torch.equal(torch.autograd.grad(z.sum(), conv.values)[0], expected)


def test_a_written_operand_is_noticed():
    norm, conv = pair()
    z = conv(norm(torch.randn(5, 6, 7, 9)))
    with torch.no_grad():
        norm.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_second_derivatives_are_refused():
    x, found = torch.randn(5, 3, 8, 8, requires_grad=True), []
    for recompute in (False, True):
        dense = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3))
        model = sm.sparsify(dense, 0.5, exclude="0", fuse=True, recompute=recompute)
        found.append(kept_bytes(lambda model=model: model(x).square().sum()))
    (more, kept), (less, dropped) = found
    assert less < more and torch.autograd.grad(kept, x, create_graph=True)[0].requires_grad
    with pytest.raises(RuntimeError, match="recompute"):
        torch.autograd.grad(dropped, x, create_graph=True)
    dropped.backward()


def test_it_works_with_checkpointing_and_compilation():
    x = torch.randn(5, 6, 7, 9)
    both = nn.Sequential(*pair())
    expected = torch.autograd.grad(both(x).square().sum(), list(both.parameters()))
    for output in (
        checkpoint(both, x, use_reentrant=False),
        torch.compile(both, backend="aot_eager", fullgraph=True)(x),
    ):
        torch.testing.assert_close(output, both(x))
        again = torch.autograd.grad(output.square().sum(), list(both.parameters()))
        torch.testing.assert_close(again, expected)


def test_it_needs_the_fused_batch_norm():
    with pytest.raises(ValueError, match="recompute needs fuse"):
        sm.sparsify(models.build("mlp", 4, in_channels=1, image_size=4), 0.5, fuse=False, recompute=True)
    with pytest.raises(ValueError, match="recompute needs fuse"):
        TrainConfig(fuse=False, recompute=True)


def test_the_command_line_passes_it_on():
    from sparse_moon.app.build import build_model
    from sparse_moon.app.run_data import load_dataset

    config = TrainConfig(recompute=True)
    model = build_model(config, load_dataset(config))
    assert any(m.forward.recompute for m in model.modules() if isinstance(m.forward, FusedForward))
