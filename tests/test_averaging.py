import pytest
import torch
from host_graph import looks
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
    torch.testing.assert_close(model[0].running_var, torch.cat(batches).var(0))
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


def shrink(model, density):
    """Keep the largest weights of the only sparse layer."""
    layer = model[0]
    drop = layer.topology.num_blocks - round(density * 48)
    regrown = sm.ops.drop_and_grow(layer.topology.value_scores(layer.values.detach()), None, layer.topology, drop, 0)
    layer.replace_(regrown.index, regrown.remap(layer.values.detach()))


def test_average_built_before_pruning():
    model = sm.sparsify(net_dense(), 0.5, exclude="3", start_sparsity=0.0)
    average = sm.WeightAverage(model)
    shrink(model, 0.5)
    average.update(model)
    before = [p.detach().clone() for p in model.parameters()]
    perturb(model)
    average.update(model)
    loaded = sm.WeightAverage(sm.sparsify(net_dense(), 0.5, exclude="3", start_sparsity=0.0))
    loaded.load_state_dict(average.state_dict())
    expected = [(p.detach() + b) / 2 for p, b in zip(model.parameters(), before, strict=True)]
    for a in (average, loaded):
        perturb(model)
        a.copy_to(model)
        assert all(torch.allclose(p, e, atol=1e-6) for p, e in zip(model.parameters(), expected, strict=True))
    shrink(model, 0.25)
    with pytest.raises(ValueError, match="topology is not that"):
        average.update(model)


def net_dense():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-15)])
@pytest.mark.parametrize("pattern", ["unstructured", "vector2"])
def test_tickets_of_different_topologies(pattern, dtype, tolerance):
    model = sm.sparsify(net_dense(), 0.75, exclude="3", pattern=pattern).to(dtype)
    average, weights, others = sm.TicketAverage(model), [], []
    layer = model[0]
    for _ in range(3):
        layer.topology.replace_(sm.Topology.random((8, 6), 0.25, layer.topology.block).index)
        perturb(model)
        average.update(model)
        weights.append(layer.dense_weight().detach().clone())
        others.append([p.detach().clone() for p in model.parameters() if p is not layer.values])
    resumed = sm.TicketAverage(net_like(pattern).to(dtype))
    resumed.load_state_dict(average.state_dict())
    mean = torch.stack(weights).mean(0)
    blocks = mean.view(8 // layer.topology.block[0], -1, 6).abs().sum(1).flatten()
    best = torch.zeros_like(blocks, dtype=torch.bool)
    best[blocks.argsort(descending=True, stable=True)[: layer.topology.num_blocks]] = True
    mask = best.view(-1, 1, 6).expand(-1, layer.topology.block[0], 6).reshape(8, 6)
    assert (mean != 0).sum() > mask.sum() == layer.topology.nnz
    for a in (average, resumed):
        perturb(model)
        a.copy_to(model)
        torch.testing.assert_close(layer.dense_weight().detach(), mean * mask, rtol=tolerance, atol=tolerance)
        now = [p.detach() for p in model.parameters() if p is not layer.values]
        for p, *moments in zip(now, *others, strict=True):
            torch.testing.assert_close(p, torch.stack(moments).mean(0), rtol=tolerance, atol=tolerance)
    with pytest.raises(ValueError, match="no model has been averaged"):
        sm.TicketAverage(model).copy_to(model)


def net_like(pattern):
    return sm.sparsify(net_dense(), 0.75, exclude="3", pattern=pattern)


def test_prediction_average():
    networks, x = [nn.Linear(4, 3), nn.Linear(4, 3)], torch.randn(5, 4)
    mean = sum(network(x).softmax(1) for network in networks) / 2
    torch.testing.assert_close(sm.PredictionAverage(networks)(x).exp(), mean)
    wide = sm.PredictionAverage(nn.ModuleList(networks).double())(x.double())
    mean = sum(network(x.double()).softmax(1) for network in networks) / 2
    torch.testing.assert_close(wide, mean.log())  # in float64
    with pytest.raises(ValueError, match="at least one network"):
        sm.PredictionAverage([])


def test_stochastic_passes():
    model, x = net().eval(), torch.randn(5, 6)
    mask = sm.RandomMask(model, 0.5, seed=4)
    passes = sm.StochasticPasses(model, mask, 4)
    found = passes(x)
    assert torch.equal(passes(x[:2]), found[:2])  # the same masks for every batch
    weight, probabilities = model[0].dense_weight().detach(), []
    for step in range(1, 5):
        z = sm.ops.bernoulli_mask(model[0].values, 0.5, seed=4, stream=0, step=torch.tensor(step))
        hidden = weight.clone()
        hidden[model[0].mask()] *= z
        plain = nn.Sequential(nn.Linear(6, 8), *list(model)[1:]).eval()
        plain[0].weight.data, plain[0].bias.data = hidden, model[0].bias.data
        probabilities.append(plain(x).softmax(1))
    torch.testing.assert_close(found.exp(), sum(probabilities) / 4)
    torch.testing.assert_close(model(x), nn.Sequential(*model)(x))  # nothing stays hidden
    with pytest.raises(ValueError, match="samples must be at least 1"):
        sm.StochasticPasses(model, mask, 0)


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_stochastic_passes_leave_the_mask_of_a_training_as_it_was(drawn, fails):
    model, x = net().eval(), torch.randn(5, 6)
    mask = sm.RandomMask(model, 0.5)
    for _ in range(10):
        mask.draw()
    if not drawn:
        mask.clear()
    before, passes = model(x), sm.StochasticPasses(model, mask, 3)
    with torch.inference_mode():
        if fails:
            with pytest.raises(ValueError, match="6 features last"):
                passes(x[:, 1:])
        else:
            passes(x)
    assert mask.step == 10 and mask.drawn == drawn
    after = model(x)
    assert torch.equal(after, before)
    after.sum().backward()  # what hides weights is of no inference mode
    mask.draw()
    assert mask.step == 11


@pytest.mark.parametrize("kind", [sm.WeightAverage, sm.TicketAverage])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_once(kind, dtype):
    model = sm.sparsify(nn.Linear(32, 32), 0.5).to(dtype)
    average, total = kind(model), 0.0
    for _ in range(20):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(1 + torch.rand_like(parameter))
        average.update(model)
        total = total + model.values.detach().double()
    average.copy_to(model)
    error = (model.values.double() - total / 20).abs().max()  # of numbers from 1 to 2
    assert error <= torch.finfo(dtype).eps / 2 + 1e-6


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("kind", [sm.EMA, sm.WeightAverage, sm.TicketAverage])
@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.complex128])
def test_complex_parameters_are_averaged(kind, dtype):
    model = net()
    model.phase = nn.Parameter(torch.ones(2, dtype=dtype))
    model.register_buffer("filter", torch.ones(2, dtype=dtype))
    average = kind(model, 0.5) if kind is sm.EMA else kind(model)
    average.update(model)
    for tensor in (model.phase.data, model.filter):
        tensor.copy_(torch.full((2,), 11 + 5j))
    average.update(model)
    average.copy_to(model)
    for tensor in (model.phase, model.filter) if kind is sm.EMA else (model.phase,):
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor.detach().to(torch.complex64), torch.full((2,), 6 + 2.5j))


def regrow(layer):
    scores = layer.topology.value_scores(layer.values.detach()), torch.rand(layer.topology.grid)
    regrown = sm.ops.drop_and_grow(*scores, layer.topology, 6)
    layer.replace_(regrown.index, regrown.remap(layer.values.detach()))


def test_an_ema_waits_for_the_device_only_where_the_topology_has_moved():
    model = net()
    ema, expected = sm.EMA(model, 0.7), None
    for step in range(6):
        if step == 3:
            regrow(model[0])
        perturb(model)
        with looks() as waits:
            ema.update(model)
        assert bool(waits) == (step in (0, 3)), waits
        now = [model[0].dense_weight().detach(), model[3].weight.detach().clone(), model[1].running_mean.clone()]
        expected = now if expected is None else [0.7 * e + 0.3 * n for e, n in zip(expected, now, strict=True)]
        expected[0] *= now[0] != 0  # one that goes is forgotten
    ema.copy_to(model)
    for got, wanted in zip((model[0].dense_weight(), model[3].weight, model[1].running_mean), expected, strict=True):
        torch.testing.assert_close(got.detach(), wanted)


@pytest.mark.parametrize("assign", [False, True])
def test_an_ema_follows_a_state_that_is_loaded_between_updates(assign):
    model = net()
    ema, other = sm.EMA(model, 0.7), sm.EMA(model, 0.7)
    ema.update(model)
    other.update(model)
    saved = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    regrow(model[0])
    other.update(model)
    other.load_state_dict(saved, assign=assign)  # as many places, but others than the model's
    for average in (ema, other):
        average.update(model)
    assert all(torch.equal(a, b) for a, b in zip(ema.buffers(), other.buffers(), strict=True))
