"""The scattered weight of dense products: made once a step, and never an old one."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparse_moon as sm
from sparse_moon.ops import dense_weight

LAYERS = {
    "linear": (lambda: nn.Linear(12, 9), (5, 12)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5)),
    "winograd": (lambda: nn.Conv2d(16, 16, 3, padding=1), (8, 16, 6, 6)),
}


@pytest.fixture(params=LAYERS)
def layer_and_input(request):
    build, shape = LAYERS[request.param]
    torch.manual_seed(0)
    dense = build()
    kind = sm.SparseConv2d if isinstance(dense, nn.Conv2d) else sm.SparseLinear
    with sm.ops.use_backend("dense"):
        yield kind.from_dense(dense, sparsity=0.6), torch.randn(shape)


@pytest.fixture
def scatters(monkeypatch):
    """References to the weights made so far."""
    made, scatter = [], dense_weight.scattered

    def noted(*args, **kwargs):
        weight = scatter(*args, **kwargs)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(dense_weight, "scattered", noted)
    return made


def check(layer, x):
    """Output and gradients against dense torch on the layer's weight now."""
    exact, z, grad = layer.to_dense().double(), x.clone().requires_grad_(), torch.randn_like(layer(x))
    y = layer(z)
    found = torch.autograd.grad(y, (z, layer.values), grad)
    w = x.double().requires_grad_()
    z_exact, weight_exact = torch.autograd.grad(exact(w), (w, exact.weight), grad.double())
    flat = sm.topology.weight_to_matrix(weight_exact, 1)
    for ours, theirs in ((y, exact(w)), (found[0], z_exact), (found[1], layer.topology.gather(flat))):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-3, atol=1e-4)


def test_one_scatter_a_step(layer_and_input, scatters):
    layer, x = layer_and_input
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    x.requires_grad_()
    for step in range(3):
        layer(x).square().sum().backward()
        optimizer.step()
        assert len(scatters) == step + 1
    check(layer, x.detach())


def test_each_forward_pass_with_gradients_has_a_weight_of_its_own(layer_and_input, scatters):
    """What docs/speed.md says of scatters and memory: values may be written through ``.data`` between two passes."""
    layer, x = layer_and_input
    x.requires_grad_()
    for _ in range(4):  # batches whose gradients are added up
        layer(x).sum().backward()
    assert len(scatters) == 4 and all(weight() is None for weight in scatters)
    scatters.clear()
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert len(scatters) == 2 and all(weight() is None for weight in scatters)
    scatters.clear()
    loss = sum(layer(x).sum() for _ in range(5))
    assert len(scatters) == 5 and all(weight() is not None for weight in scatters)
    loss.backward()
    assert len(scatters) == 5 and all(weight() is None for weight in scatters)


def test_no_scatter_in_evaluation_but_the_first_two(layer_and_input, scatters):
    layer, x = layer_and_input
    with torch.no_grad():
        outputs = [layer(x) for _ in range(5)]
    assert len(scatters) == 2  # the second pass learns that weights are used again, and keeps what it made them of
    assert all(torch.equal(y, outputs[0]) for y in outputs)


def test_a_gpu_keeps_no_weight_after_an_evaluation(layer_and_input, scatters, monkeypatch):
    layer, x = layer_and_input
    monkeypatch.setattr(dense_weight, "may_compare", lambda values: False)
    for _ in range(2):
        with torch.no_grad():
            layer(x)
            layer(x)
        assert all(weight() is None for weight in scatters)
        scatters.clear()
        loss = layer(x.requires_grad_()).sum()
        assert scatters[0]() is not None
        loss.backward()
        assert len(scatters) == 1  # the backward pass takes that of the forward pass
    check(layer, x.detach())


@pytest.mark.parametrize("write", ["in place", "through data", "another tensor", "load", "topology"])
def test_new_values_are_used(layer_and_input, write):
    layer, x = layer_and_input
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        match write:
            case "in place":
                layer.values.mul_(2)
            case "through data":
                layer.values.data.mul_(2)
            case "another tensor":
                layer.values.data = 3 * layer.values
            case "load":
                layer.load_state_dict({k: 2 * v if k == "values" else v for k, v in layer.state_dict().items()})
            case "topology":
                method = sm.RigL(layer, torch.optim.SGD(layer.parameters(), 0.1), total_steps=10, interval=1)
                with torch.enable_grad():
                    for _ in range(3):
                        layer(x).square().mean().backward()
                        method.step()
    check(layer, x)


@pytest.mark.parametrize("write", ["in place", "through data"])
def test_a_kernel_s_backward_pass_takes_no_weight_of_an_earlier_evaluation(layer_and_input, write):
    layer, x = layer_and_input
    with torch.no_grad():
        layer(x)
        (layer.values if write == "in place" else layer.values.data).mul_(-1)
    x.requires_grad_()
    with sm.ops.use_backend("kernel"):
        y = layer(x)
    exact = layer.to_dense()  # input gradients are by the dense product of the backward pass
    with sm.ops.use_backend("dense"):
        grad = torch.autograd.grad(y, x, torch.ones_like(y))[0]
    torch.testing.assert_close(grad, torch.autograd.grad(exact(x).sum(), x)[0], rtol=1e-4, atol=1e-4)


def test_a_transform_of_each_pass(layer_and_input):
    layer, x = layer_and_input
    x.requires_grad_()
    layer.transform = lambda values: values * next(factors)
    factors, known, grads = iter((1.0, 2.0, 3.0)), layer.values.detach().clone(), []
    outputs = [layer(x) for _ in range(3)]
    for y in reversed(outputs):
        grads += torch.autograd.grad(y.sum(), x)
    layer.transform = None
    for factor, y, grad in zip((1.0, 2.0, 3.0), outputs, reversed(grads), strict=True):
        layer.values.data = factor * known
        exact = layer.to_dense()
        torch.testing.assert_close(y, exact(x))
        torch.testing.assert_close(grad, torch.autograd.grad(exact(x).sum(), x)[0])


def test_backward_twice_and_between_other_passes(layer_and_input):
    layer, x = layer_and_input
    x.requires_grad_()
    y = layer(x)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    with torch.no_grad():
        layer.values.data.mul_(2)  # unseen by autograd, as in torch's own layers: the next pass takes it
        layer(x)
        layer.values.data.div_(2)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], first)


def test_a_weight_goes_with_what_autograd_saves(layer_and_input, scatters):
    layer, x = layer_and_input
    loss = layer(x.requires_grad_()).sum()
    assert scatters[0]() is not None
    loss.backward()
    assert scatters[0]() is None and loss.grad_fn is not None


@pytest.mark.parametrize("backward", ["dense", "kernel"])
def test_a_weight_that_no_product_takes_is_not_a_later_pass_s(layer_and_input, scatters, backward):
    layer, x = layer_and_input
    with sm.ops.use_backend("dense"):
        y = layer(x.requires_grad_(backward == "kernel")).sum()
    with sm.ops.use_backend(backward):
        y.backward()
    assert scatters[0]() is None
    with torch.no_grad():
        layer.values.mul_(2)
    x.requires_grad_()
    with sm.ops.use_backend("kernel"):
        y = layer(x)
    grad = torch.autograd.grad(y.sum(), x)[0]  # by a dense product, for which the kernel has made no weight
    exact = layer.to_dense()
    torch.testing.assert_close(grad, torch.autograd.grad(exact(x).sum(), x)[0], rtol=1e-4, atol=1e-4)
