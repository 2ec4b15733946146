"""Weight decay reaches the weights of sparse layers, which have one dimension."""

import warnings

import pytest
import torch
from torch import nn

import sparse_moon as sm
from sparse_moon.weight_decay import check_weight_decay


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.scale = nn.Parameter(torch.zeros(()))
        self.embed = nn.Embedding(8, 16)
        self.attention = nn.MultiheadAttention(16, 2, add_bias_kv=True)  # bias_k and bias_v are (1, 1, 16)
        self.norm = nn.LayerNorm((4, 16))  # of two dimensions
        self.fc = nn.Linear(16, 32)
        self.block = nn.Linear(32, 32)
        self.head = nn.Linear(32, 8)


def net(**changes):
    return sm.sparsify(
        Net(), 0.5, "uniform", first_dense=False, **{"exclude": ("head", "attention*", nn.Embedding), **changes}
    )


def names(model, params):
    return {name for name, p in model.named_parameters() if any(p is other for other in params)}


WEIGHTS = {"token", "embed.weight", "attention.in_proj_weight", "attention.out_proj.weight", "fc.values",
           "block.values", "head.weight"}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.* outputs have no weight:UserWarning")
@pytest.mark.parametrize("pattern", ["unstructured", "vector8", "block16"])
def test_sparse_values_decay_and_biases_and_norms_do_not(pattern):
    model = net(pattern=pattern)
    decayed, others = sm.param_groups(model, 0.05)
    assert names(model, decayed["params"]) == WEIGHTS and decayed["weight_decay"] == 0.05
    assert names(model, others["params"]) == {n for n, _ in model.named_parameters()} - WEIGHTS
    assert others["weight_decay"] == 0.0
    optimizer = torch.optim.SGD(sm.param_groups(model, 0.5), 0.1)
    before = model.fc.values.detach().clone(), model.fc.bias.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.fc.values.detach(), 0.95 * before[0])
    assert torch.equal(model.fc.bias, before[1])


def test_names_without_decay_frozen_and_tied_parameters():
    model = net()
    model.block.requires_grad_(False)
    model.head.weight = nn.Parameter(torch.zeros(8, 16))
    model.embed.weight = model.head.weight
    decayed, others = sm.param_groups(model, 0.1, no_decay=("tok*", "fc.values"))
    assert names(model, decayed["params"]) == WEIGHTS - {"token", "fc.values", "block.values", "head.weight"}
    assert not any(p is model.block.values or p is model.block.bias for p in decayed["params"] + others["params"])
    found = [p for group in (decayed, others) for p in group["params"]]
    assert len(found) == len({id(p) for p in found})
    _, others = sm.param_groups(model, 0.1, no_decay="head.weight")  # one of its two names
    assert any(p is model.embed.weight for p in others["params"])
    model.requires_grad_(False)
    assert sm.param_groups(model, 0.1) == []


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compiled", "in DataParallel"])
def test_names_are_those_of_the_model_inside(wrap):
    model = net()
    plain, wrapped = (sm.param_groups(m, 0.1, no_decay="fc.values") for m in (model, wrap(model)))
    for ours, theirs in zip(plain, wrapped, strict=True):
        assert [*map(id, ours["params"])] == [*map(id, theirs["params"])]


def test_tied_sparse_layers_decay_once():
    first, second = sm.SparseLinear(8, 8, sparsity=0.5), sm.SparseLinear(8, 8, sparsity=0.5)
    second.values = first.values
    (decayed, _) = sm.param_groups(nn.Sequential(first, second), 0.1)
    assert [p is first.values for p in decayed["params"]] == [True]


def test_errors_of_param_groups():
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight_decay must be finite"):
            sm.param_groups(net(), bad)
    with pytest.raises(ValueError, match=r"'fc\.weight' matches no parameter"):
        sm.param_groups(net(), 0.1, no_decay="fc.weight")


def by_dimensions(model, decay=0.1):
    many, few = [], []
    for p in model.parameters():
        (many if p.dim() >= 2 else few).append(p)
    return [{"params": many, "weight_decay": decay}, {"params": few, "weight_decay": 0.0}]


def test_lost_weight_decay_is_said_once():
    model = net()
    with pytest.warns(UserWarning, match=r"weights of 2 sparse layers \(fc, block\) have less weight decay") as caught:
        check_weight_decay(model, torch.optim.AdamW(by_dimensions(model)))
    assert len(caught) == 1
    whole = nn.Sequential(sm.SparseLinear(8, 8, sparsity=0.5), sm.SparseLinear(8, 4, sparsity=0.5))
    with pytest.warns(UserWarning, match="weights of 2 sparse layers"):  # no weight was found at all
        check_weight_decay(whole, torch.optim.SGD(by_dimensions(whole), 0.1))
    less = [{"params": [model.fc.values], "weight_decay": 0.01}, {"params": [model.head.weight], "weight_decay": 0.1}]
    with pytest.warns(UserWarning, match="weights of 1 sparse layers"):
        check_weight_decay(model, torch.optim.SGD(less, 0.1))


def test_weight_decay_that_is_as_asked_is_no_news():
    model = net()
    embedding = {"params": [model.embed.weight], "weight_decay": 0.0}
    some = {"params": [model.fc.values], "weight_decay": 0.05}
    more = {"params": [model.head.weight], "weight_decay": 0.1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for groups in (model.parameters(), sm.param_groups(model, 0.1), sm.param_groups(model, 0.0),
                       by_dimensions(model, 0.0), [embedding, some, more]):  # fmt: skip
            check_weight_decay(model, torch.optim.SGD(groups, 0.1))
        check_weight_decay(model, torch.optim.LBFGS(model.parameters()))
        check_weight_decay(model, torch.optim.SGD([model.fc.values], 0.1))
        check_weight_decay(nn.Linear(2, 2), torch.optim.SGD([torch.zeros(2, requires_grad=True)], 0.1))
