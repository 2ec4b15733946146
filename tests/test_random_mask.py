import copy

import pytest
import torch
from torch import nn

import sparse_moon as sm


def net(inputs=64):
    model = nn.Sequential(nn.Linear(inputs, 96), nn.ReLU(), nn.Linear(96, 10))
    return sm.sparsify(model, 0.5, "uniform", first_dense=False)


def test_forward_and_gradient_are_those_of_the_hidden_network():
    model = net()
    mask = sm.RandomMask(model, 0.7, seed=3)
    mask.draw()
    x = torch.randn(5, 64)
    output = model(x)
    output.square().sum().backward()

    plain = copy.deepcopy(model)
    for layer in sm.sparse_layers(plain).values():
        layer.hide = None
    hidden = [mask.mask(stream, layer) for stream, layer in enumerate(mask.layers)]
    with torch.no_grad():
        for layer, z in zip(sm.sparse_layers(plain).values(), hidden, strict=True):
            layer.values.mul_(z)
            layer.values.grad = None
    expected = plain(x)
    expected.square().sum().backward()
    torch.testing.assert_close(output, expected)
    for layer, other, z in zip(mask.layers, sm.sparse_layers(plain).values(), hidden, strict=True):
        assert not z.all() and layer.values.detach()[~z].ne(0).all()  # the weights themselves stay
        assert layer.values.grad[~z].eq(0).all()
        torch.testing.assert_close(layer.values.grad[z], other.values.grad[z])


def test_keep_rate_and_independence_of_draws_and_layers():
    model = net(512)
    mask = sm.RandomMask(model, 0.9, seed=1)
    draws = []
    for _ in range(40):
        mask.draw()
        draws.append(mask.mask(0, mask.layers[0]).float())
    kept = torch.stack(draws)  # (40, 24576)
    count = kept.numel()
    assert abs(kept.mean().item() - 0.9) < 5 * (0.09 / count) ** 0.5
    pairs = (kept[1:] * kept[:-1]).mean().item()
    assert abs(pairs - 0.81) < 5 * (0.81 * 0.19 / count) ** 0.5
    assert not torch.equal(mask.mask(0, mask.layers[1]), mask.mask(1, mask.layers[1]))


def test_nothing_is_hidden_after_clear_or_with_keep_one():
    model = net()
    x = torch.randn(3, 64)
    expected = model(x)
    mask = sm.RandomMask(model, 0.5)
    mask.draw()
    assert not torch.equal(model(x), expected)
    mask.clear()
    assert torch.equal(model(x), expected)
    sm.RandomMask(model, 1.0).draw()
    assert torch.equal(model(x), expected)


def test_a_resumed_mask_goes_on_with_the_same_draws():
    model = net()
    first, second = sm.RandomMask(model, 0.5, seed=9), sm.RandomMask(model, 0.5, seed=9)
    first.draw()
    first.draw()
    second.load_state_dict(first.state_dict())
    first.draw()
    second.draw()
    assert torch.equal(first.mask(0, first.layers[0]), second.mask(0, second.layers[0]))
    assert not torch.equal(first.mask(0, first.layers[0]), sm.RandomMask(model, 0.5, 9).mask(0, first.layers[0]))


def test_tied_layers_hide_the_same_weights():
    shared = nn.Linear(8, 8, bias=False)
    model = sm.sparsify(nn.Sequential(shared, nn.Sequential(shared)), 0.5, "uniform", first_dense=False)
    mask = sm.RandomMask(model, 0.5)
    mask.draw()
    assert len(mask.layers) == 1
    w = model[0].topology.to_dense(model[0].values * mask.mask(0, mask.layers[0]))
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), x @ w.T @ w.T)


@pytest.mark.parametrize("rescale", [False, True])
def test_weight_and_mask_averaging(rescale):
    model = net()
    mask = sm.RandomMask(model, 0.7, seed=2)
    average = sm.WeightAverage(model, mask, rescale=rescale)
    expected = [torch.zeros_like(p) for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    for n in range(4):
        mask.draw()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        average.update(model)
        for i, (name, p) in enumerate(model.named_parameters()):
            stream = {"0.values": 0, "2.values": 1}.get(name)
            z = 1.0 if stream is None else mask.mask(stream, mask.layers[stream]) / (0.7 if rescale else 1.0)
            expected[i] = (n * expected[i] + z * p.detach()) / (n + 1)
    average.copy_to(model)
    for name, p, e in zip(names, model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), e, msg=name)


def test_errors():
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\], got 0"):
        sm.RandomMask(net(), 0.0)
    with pytest.raises(ValueError, match="needs a model with sparse layers"):
        sm.RandomMask(nn.Linear(3, 3))
