"""States of a training: loaded in any order, in part, or into another training."""

import copy
import warnings

import pytest
import torch

import sparse_moon as sm
from small_training import EXCHANGES, METHODS, backward, batch, make, net, train

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
