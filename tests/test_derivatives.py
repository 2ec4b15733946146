"""Second derivatives and torch's other ways to differentiate: what a dense model of the same weights gives."""

import copy
from itertools import product

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import sparse_moon as sm
from sparse_moon.ops import registry
from sparse_moon.ops.unknown_aware_loss import unknown_aware_loss_reference
from sparse_moon.topology import weight_to_matrix

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # torch's forward derivatives
    pytest.mark.filterwarnings("ignore:.* outputs have no weight:UserWarning"),
]


def networks(kind):
    """A sparse network in float64 and the same one dense, for images (N, 3, 8, 8); the first layer is dense in both."""
    torch.manual_seed(1)
    head = [nn.Flatten(), nn.Linear(192, 12), nn.Tanh(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)]
    planes = [nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.Tanh()]
    norms = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()]
    if kind in ("linear", "block"):
        pattern = "block4" if kind == "block" else "unstructured"
        sparse = sm.sparsify(nn.Sequential(*head), 0.5, exclude="1", pattern=pattern)
    elif kind == "conv2d":
        sparse = sm.sparsify(nn.Sequential(*planes, nn.Conv2d(6, 4, 3), nn.Flatten()), 0.5, exclude="0")
    else:
        sparse = sm.sparsify(
            nn.Sequential(*norms, nn.Flatten(), nn.Linear(96, 4)), 0.5, exclude="0", fuse=True
        )  # fmt: skip
    sparse = sparse.double()
    return sparse, sm.densify(copy.deepcopy(sparse))


KINDS = ["linear", "block", "conv2d", "fused"]


def compare(sparse, dense, **tolerance):
    """The gradients of both, those of the sparse layers at the places of their weights."""
    modules = dict(dense.named_modules())
    compared = 0
    for name, module in sparse.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            other = modules[name].weight if key == "values" else getattr(modules[name], key)
            expected = other.grad
            if key == "values":
                weight = weight_to_matrix(expected, module.topology.block[1])
                expected = module.topology.gather(weight)
            if parameter.grad is None:
                assert expected is None or not expected.any(), name
            else:
                torch.testing.assert_close(parameter.grad, expected, **tolerance)
                compared += bool(expected.any())
    assert compared >= 3


@pytest.fixture
def images():
    return torch.randn(5, 3, 8, 8, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_penalty(kind, images, training):
    for model in (pair := networks(kind)):
        model.train(training)
        (grad,) = torch.autograd.grad(model(images).square().sum(), images, create_graph=True)
        (grad.flatten(1).norm(dim=1) - 1).square().mean().backward()
    compare(*pair)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_penalty_in_float32(kind, images, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(registry, "KERNELS", {})
    images = images.detach().float().requires_grad_()
    pair = [model.float() for model in networks(kind)]
    with sm.ops.use_backend("kernel" if kernels else "auto"):
        for model in pair:
            (grad,) = torch.autograd.grad(model(images).square().sum(), images, create_graph=True)
            (grad.flatten(1).norm(dim=1) - 1).square().mean().backward()
    compare(*pair, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_third_derivatives(kind, images):
    results = []
    for model in networks(kind):
        first = torch.autograd.grad(model(images).square().sum(), images, create_graph=True)[0]
        second = torch.autograd.grad(first.square().sum(), images, create_graph=True)[0]
        results.append(torch.autograd.grad(second.square().sum(), images)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_hessian_and_jacobian(kind, images, vectorize):
    x = images.detach()[:2]
    sparse, dense = networks(kind)
    for function in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian):
        results = [function(lambda t, m=m, f=function: m(t).square().sum() if f.__name__ == "hessian" else m(t), x,
                            vectorize=vectorize) for m in (sparse, dense)]  # fmt: skip
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_per_sample_gradients(kind, images):
    """``torch.func``: gradients of each example by ``vmap`` over ``grad``."""
    x, pair, results = images.detach(), networks(kind), []
    for model in pair:
        model.eval()
        buffers = dict(model.named_buffers())

        def loss(parameters, image, model=model, buffers=buffers):
            return torch.func.functional_call(model, (parameters, buffers), (image[None],)).square().sum()

        parameters = {name: p.detach() for name, p in model.named_parameters()}
        results.append(torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x))
        for i in range(2):
            for name, value in torch.func.grad(loss)(parameters, x[i]).items():
                torch.testing.assert_close(results[-1][name][i], value)
    for i in range(len(x)):
        for model, found in zip(pair, results, strict=True):
            for name, parameter in model.named_parameters():
                parameter.grad = found[name][i]
        compare(*pair)


@pytest.mark.parametrize("transform", ["jvp", "jacrev", "jacfwd", "hessian", "dual"])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "fused"])
def test_transforms(kind, images, transform):
    x, tangent = images.detach()[:2], torch.randn(2, 3, 8, 8, dtype=torch.float64)
    results = []
    for model in networks(kind):
        model.eval()
        if transform == "jvp":
            results.append(torch.func.jvp(model, (x,), (tangent,))[1])
        elif transform == "dual":
            with forward_ad.dual_level():
                results.append(forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent)
        elif transform == "hessian":
            results.append(torch.func.hessian(lambda t, m=model: m(t).square().sum())(x))
        else:
            results.append(getattr(torch.func, transform)(model)(x))
    torch.testing.assert_close(*results)


def test_second_derivatives_of_the_loss():
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    target, w = torch.randint(0, 4, (6,)), torch.tensor(0.7, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda z: sm.ops.unknown_aware_loss(z, target, w)[0], logits)
    results = []
    for loss in (lambda z: sm.ops.unknown_aware_loss(z, target, w)[0],
                 lambda z: unknown_aware_loss_reference(z, target, w)):  # fmt: skip
        results.append(torch.func.hessian(loss)(logits.detach()))
    torch.testing.assert_close(*results)


def test_a_dense_gradient_has_the_penalty_in_it(images):
    """The gradient that growth goes by is that of the whole loss."""
    model, dense = networks("conv2d")
    layer = model[2]
    probe = torch.zeros((), dtype=torch.float64).expand(layer.topology.shape).detach().requires_grad_()
    layer.probe = probe
    for m in (model, dense):
        (grad,) = torch.autograd.grad(m(images).square().sum(), images, create_graph=True)
        (grad.flatten(1).norm(dim=1) - 1).square().mean().backward()
    torch.testing.assert_close(probe.grad, dense[2].weight.grad.flatten(1))


def test_ensembles_share_a_topology():
    """``torch.func.stack_module_state`` stacks buffers, too."""
    layer, x = sm.SparseLinear(8, 8, sparsity=0.5), torch.randn(3, 8)
    parameters, buffers = torch.func.stack_module_state([copy.deepcopy(layer) for _ in range(2)])

    def call(*state):
        return torch.func.functional_call(layer, state, (x,))

    torch.testing.assert_close(torch.func.vmap(call)(parameters)[1], layer(x))
    with pytest.raises(ValueError, match="a topology cannot be batched by vmap, only values can"):
        torch.func.vmap(call)(parameters, buffers)


NEEDS = [needs for needs in product((True, False), repeat=3) if any(needs)]


def layer_and_input(kind):
    """In float64, with a bias."""
    if kind == "linear":
        return sm.SparseLinear(6, 4, sparsity=0.5, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    layer = sm.SparseConv2d(4, 6, 3, padding=1, groups=2, sparsity=0.5, dtype=torch.float64)
    return layer, torch.randn(2, 4, 5, 4, dtype=torch.float64)


@pytest.mark.parametrize("backend", ["kernel", "dense"])
@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_what_no_gradient_reads_may_be_written_to(kind, needs, backend):
    """Of input, values and bias those are wanted that ``needs`` says."""
    layer, x = layer_and_input(kind)
    layer, x = layer.float(), x.float()
    dense = layer.to_dense()
    for model, weight in ((layer, layer.values), (dense, dense.weight)):
        input = x.clone()
        for operand, need in zip((input, weight, model.bias), needs, strict=True):
            operand.requires_grad_(need)
        with sm.ops.use_backend(backend):
            y = model(input)
        with torch.no_grad():  # torch's own convolutions keep both
            if model is layer and not needs[0]:
                weight.mul_(2)
            if model is layer and not needs[1]:
                input.mul_(2)
        y.square().sum().backward()
        if model is layer:
            ours = input.grad
    if needs[0]:
        torch.testing.assert_close(ours, input.grad, rtol=1e-4, atol=1e-5)
    if needs[1]:
        flat = weight_to_matrix(dense.weight.grad, 1)
        torch.testing.assert_close(layer.values.grad, layer.topology.gather(flat), rtol=1e-4, atol=1e-5)
    if needs[2]:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_a_frozen_layer_keeps_no_input(kind):
    layer, x = layer_and_input(kind)
    layer.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        layer(x.requires_grad_())
    assert layer.values.data_ptr() in kept and x.data_ptr() not in kept


@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_second_derivatives_of_frozen_layers(kind, needs):
    layer, x = layer_and_input(kind)
    operands = [t.detach() for t in (x, layer.values, layer.bias)]

    def run(*wanted):
        given = iter(wanted)
        x, values, bias = (next(given) if need else t for t, need in zip(operands, needs, strict=True))
        return torch.func.functional_call(layer, {"values": values, "bias": bias}, (x,)).tanh()

    wanted = [t.clone().requires_grad_() for t, need in zip(operands, needs, strict=True) if need]
    assert torch.autograd.gradcheck(run, wanted, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, wanted)
