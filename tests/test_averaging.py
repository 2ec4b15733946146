import pytest
import torch
from torch import nn

import sparse_moon as sm


def net():
    return sm.sparsify(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), 0.5, exclude="3")


def perturb(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))


def test_uniform_average_and_support():
    model = net()
    average, history = sm.WeightAverage(model), []
    for _ in range(4):
        perturb(model)
        average.update(model)
        history.append([p.detach().clone() for p in model.parameters()])
    perturb(model)
    average.copy_to(model)
    for p, *moments in zip(model.parameters(), *history, strict=True):
        torch.testing.assert_close(p.detach(), torch.stack(moments).mean(0))
    assert model[0].sparsity == 0.5


def test_batch_norm_refresh_equals_the_statistics_of_the_data():
    model = nn.Sequential(nn.BatchNorm1d(5, momentum=0.1)).eval()
    batches = [torch.randn(8, 5) * 3 + 1 for _ in range(4)]
    sm.refresh_batch_norm(model, [(x, None) for x in batches])
    torch.testing.assert_close(model[0].running_mean, torch.cat(batches).mean(0))
    torch.testing.assert_close(model[0].running_var, torch.stack([x.var(0) for x in batches]).mean(0))
    assert not model[0].training and model[0].momentum == 0.1


def test_changed_topology_is_refused():
    model = net()
    average = sm.WeightAverage(model)
    average.update(model)
    layer = model[0]
    regrown = sm.ops.drop_and_grow(
        layer.topology.value_scores(layer.values.detach()), torch.rand(layer.topology.grid), layer.topology, 6
    )
    layer.topology.replace_(regrown.index)
    with pytest.raises(ValueError, match="topology is not that of the models averaged"):
        average.update(model)
    with pytest.raises(ValueError, match="topology is not that"):
        average.copy_to(model)


def test_topology_may_change_before_the_first_update():
    model = net()
    average = sm.WeightAverage(model)
    model[0].topology.replace_(sm.Topology.random((8, 6), 0.5).index)
    average.update(model)
    average.copy_to(model)


def test_state_dict_resumes():
    model = net()
    average = sm.WeightAverage(model)
    average.update(model)
    resumed = sm.WeightAverage(model)
    resumed.load_state_dict(average.state_dict())
    perturb(model)
    for a in (average, resumed):
        a.update(model)
    assert all(torch.equal(x, y) for x, y in zip(average.buffers(), resumed.buffers(), strict=True))
    assert resumed.count == 2


def test_nothing_averaged_yet():
    with pytest.raises(ValueError, match="no model has been averaged"):
        sm.WeightAverage(net()).copy_to(net())
