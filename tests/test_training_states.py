"""States of a training: loaded in any order, in part, or into another training."""

import copy
import warnings

import pytest
import torch

import sparse_moon as sm
from small_training import EXCHANGES, METHODS, backward, batch, changed, make, masks, net, train

CHANGES = [kind for kind in METHODS if kind != "top-kast"]


def states(*parts):
    return [copy.deepcopy(part.state_dict()) for part in parts]


# --- back to an earlier state


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0)])
def test_states_of_all_three_are_loaded_in_any_order(kind, order):
    model = net()
    method = make(kind, model)
    parts = (model, method.optimizer, method)
    train(model, method, 8)
    saved = states(*parts)
    fresh = net()
    others = make(kind, fresh)
    train(fresh, others, 8)  # where as many weights are left
    torch.manual_seed(5)
    data = [batch() for _ in range(8)]
    ends = []
    for network, trained in ((model, method), (fresh, others)):
        if network is fresh:
            for index in order:
                (network, trained.optimizer, trained)[index].load_state_dict(saved[index])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for one in data:
                backward(network, one)
                trained.step()
                trained.optimizer.zero_grad()
        ends.append(network.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(end.values() for end in ends), strict=True))


def rolled_back(kind, optimizer=None):
    """A model in the state of 16 batches ago, its topology another since, and the method, which was not told."""
    model = net()
    method = make(kind, model, optimizer and optimizer(model))
    train(model, method, 8)
    (saved,) = states(model)
    train(model, method, 16)
    model.load_state_dict(saved)
    backward(model, batch())
    return model, method


@pytest.mark.parametrize("kind", [kind for kind in EXCHANGES if kind != "top-kast"])  # of as many weights as before
def test_momentum_of_weights_that_were_loaded_over_is_said_once(kind):
    model, method = rolled_back(kind)
    with pytest.warns(UserWarning, match=r"model was loaded: \['0', '2', '4'\] have other .* batch 24.*momentum"):
        method.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, method, 3)


@pytest.mark.parametrize("kind", CHANGES)
def test_an_optimizer_that_keeps_nothing_has_nothing_to_be_loaded(kind):
    _, method = rolled_back(kind, lambda model: torch.optim.SGD(model.parameters(), 0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.step()


def test_top_kast_does_not_put_its_hidden_values_where_others_are():
    model, method = rolled_back("top-kast")
    before = states(model)
    for _ in range(2):  # not the second time either
        with pytest.raises(RuntimeError, match=r"\['0', '2', '4'\] have other topologies .* have no place there"):
            method.step()
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), model.state_dict().values(), strict=True))


def test_weights_that_are_loaded_before_the_first_batch_are_those_to_train():
    saved = net().state_dict()
    for kind in CHANGES:
        model = net()
        method = make(kind, model)
        model.load_state_dict(saved)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(model, method, 8)


def test_looking_at_an_average_leaves_the_model_as_it_was():
    model = net()
    method, ema = make("top-kast", model), sm.EMA(model, 0.9)
    for _ in range(3):
        train(model, method, 4)
        ema.update(model)
        (own,) = states(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ema.copy_to(model)
            model(batch()[0])
            model.load_state_dict(own)
            train(model, method, 1)


# --- states that do not fit


@pytest.mark.parametrize("kind", METHODS)
def test_a_state_of_other_layers_changes_nothing(kind):
    model = net()
    method = make(kind, model)
    train(model, method, 3)
    (saved,) = states(method)
    model = net()
    model[2].values.requires_grad_(False)
    method = make(kind, model, no_ablation=()) if kind == "srigl" else make(kind, model)
    before = states(model, method)
    with pytest.raises(ValueError, match=r"is of 3 layers, and here it trains 2, \['0', '4'\], and not \['2'\]"):
        method.load_state_dict(saved)
    with pytest.raises(ValueError, match="is of method 'static'"):
        method.load_state_dict({"name": "static", "steps": 3})
    assert str(states(model, method)) == str(before)


def test_a_state_of_top_kast_with_other_numbers_of_weights_changes_nothing():
    model = net(0.8)
    (saved,) = states(make("top-kast", model))
    method = make("top-kast", net())
    before = states(method)
    with pytest.raises(ValueError, match=r"other numbers of weights in \['0', '2', '4'\] than the model: load the"):
        method.load_state_dict(saved)
    assert str(states(method)) == str(before)


@pytest.mark.parametrize("kind", ["gmp", "granet"])
def test_a_run_that_becomes_longer_waits_until_the_plan_has_come_to_it(kind):
    model = net(0.1)
    method = make(kind, model)
    train(model, method, 30)
    parts = states(model, method.optimizer, method)
    held = {name: layer.topology.num_blocks for name, layer in sm.sparse_layers(model).items()}
    longer = make(kind, model, method.optimizer, total_steps=120)
    for part, state in zip((model, longer.optimizer, longer), parts, strict=True):
        part.load_state_dict(state)
    train(model, longer, 6)
    # batch 25 of 60 left (1 - 25 / 40)^3 = 0.05 of what is to go; for batch 30 of 120 it is (1 - 30 / 85)^3 = 0.27
    assert {name: layer.topology.num_blocks for name, layer in sm.sparse_layers(model).items()} == held
    train(model, longer, 84)
    assert longer.unfinished is None
    for layer in sm.sparse_layers(model).values():
        assert layer.topology.num_blocks == round(0.1 * layer.topology.numel)


# --- copies


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("steps", [9, 10])  # in batch 10 the topology is updated
def test_a_copy_goes_on_as_its_original(kind, steps):
    model = net()
    method = make(kind, model)
    train(model, method, steps)
    trained = [(model, method), copy.deepcopy((model, method))]
    for network, own in trained:
        torch.manual_seed(4)
        before = masks(network)
        train(network, own, 3)
        assert changed(before, network)
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m, _ in trained), strict=True))
