"""What a layer's values are turned into before each product, lasting and for the time being."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

import sparse_moon as sm


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(3.0))

    def forward(self, values):
        return values * self.factor


def doubled(values):
    return 2 * values


def reloaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def network(transform=None):
    torch.manual_seed(0)
    model = sm.sparsify(nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)), 0.5, "uniform")
    model[2].transform = transform
    return model


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": reloaded,
    "AveragedModel": lambda model: AveragedModel(model).module,
    "densify": lambda model: sm.densify(copy.deepcopy(model)),
    "compile": lambda model: torch.compile(model, backend="eager", fullgraph=True),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("transform", [doubled, Scale()], ids=["function", "module"])
def test_a_transform_is_part_of_the_layer(transform, way):
    model, x = network(copy.deepcopy(transform)), torch.randn(4, 32)
    factor = 2.0 if transform is doubled else 3.0
    hidden = model[1](model[0](x))
    expected = F.linear(hidden, factor * model[2].topology.to_dense(model[2].values), model[2].bias)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(COPIES[way](model)(x), expected)
    torch.testing.assert_close(model[2].dense_weight(), model[2].weight.as_subclass(torch.Tensor))


def test_layers_that_share_values_have_their_own_when_dense():
    model, x = nn.Sequential(*(sm.SparseLinear(32, 32, sparsity=0.5) for _ in range(3))), torch.randn(4, 32)
    for layer in model:
        layer.values, layer.topology, layer.transform = model[0].values, model[0].topology, doubled
    model[2].transform = None
    expected = model(x)
    torch.testing.assert_close(sm.densify(model)(x), expected)
    assert model[0].weight is model[1].weight is not model[2].weight


def test_the_module_s_parameters_train_and_are_saved():
    model = network(Scale())
    model(torch.randn(4, 32)).sum().backward()
    assert model[2].transform.factor.grad.ne(0)
    assert "2.transform.factor" in model.state_dict()
    model[2].transform = doubled
    assert model[2].transform is doubled and "2.transform.factor" not in model.state_dict()
    model[2].transform = Scale()
    model[2].transform = None
    assert model[2].transform is None


def test_a_mask_is_over_it_for_the_time_being():
    model, x = network(doubled), torch.randn(4, 32)
    expected = model(x)
    mask = sm.RandomMask(model, 0.5)
    mask.draw()
    torch.testing.assert_close(model[2].effective_values(), 2 * model[2].values * mask.mask(0, model[2]))
    mask.clear()
    torch.testing.assert_close(model(x), expected)


def test_detectors_see_the_head_with_it():
    outputs = sm.ood.collect(network(doubled), [torch.randn(4, 32)])
    torch.testing.assert_close(F.linear(outputs.features, outputs.head.weight, outputs.head.bias), outputs.logits)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_has_no_mask_and_no_probe_of_others(way):
    model, x = network(), torch.randn(4, 32)
    expected = model(x)
    sm.RandomMask(model, 0.5).draw()
    for layer in sm.sparse_layers(model).values():
        layer.probe = torch.zeros(layer.topology.shape, requires_grad=True)
    new = COPIES[way](model)
    torch.testing.assert_close(new(x), expected)
    assert all(layer.hide is None and layer.probe is None for layer in sm.sparse_layers(new).values())
    assert all(layer.hide and layer.probe is not None for layer in sm.sparse_layers(model).values())
