"""Hidden weights stay as they are in a step: by hand, with other optimizers, and in a run of CigL."""

import pytest
import torch
from torch import nn

import sparse_moon as sm
from sparse_moon.app.build import build_run
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.run_data import load_dataset


def net():
    model = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4))
    return sm.sparsify(model, 0.5, "uniform", first_dense=False)


def one_weight(shown):
    """A layer of one weight of 2, a mask that shows it or not as told, and its parts."""
    layer = sm.SparseLinear(1, 1, bias=False, sparsity=0.0)
    with torch.no_grad():
        layer.values.fill_(2.0)
    mask = sm.RandomMask(nn.Sequential(layer), 0.5)
    turns = iter(shown)

    def draw():
        mask.draw()
        answer = next(turns)
        mask.mask = lambda stream, layer: torch.tensor([answer])
        layer.hide = lambda values: values * answer

    return layer, mask, draw


def test_momentum_and_weight_decay_by_hand():
    # lr 0.1, momentum 0.5, weight decay 0.25, loss w x with x = 1: the gradient is 1 where the weight is shown.
    layer, mask, draw = one_weight([True, False, False, True])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.5, weight_decay=0.25)
    sm.freeze_hidden(mask, optimizer)
    seen = []
    for _ in range(4):
        draw()
        layer(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(layer.values.item())
    # buffer 1 + 0.25 * 2 = 1.5; hidden twice; buffer 0.5 * 1.5 + 1 + 0.25 * 1.85 = 2.2125
    assert seen == pytest.approx([1.85, 1.85, 1.85, 1.85 - 0.22125])
    assert optimizer.state[layer.values]["momentum_buffer"].item() == pytest.approx(2.2125)


def test_without_it_they_move():
    layer, _, draw = one_weight([True, False])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.5, weight_decay=0.25)
    for _ in range(2):
        draw()
        layer(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    # the second step has no gradient: buffer 0.5 * 1.5 + 0.25 * 1.85
    assert layer.values.item() == pytest.approx(1.85 - 0.1 * (0.75 + 0.4625))


def test_hidden_in_the_first_step():
    # No momentum is there yet: it begins with 0, not with the weight decay of a weight that had no part.
    layer, mask, draw = one_weight([False, True])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.5, weight_decay=0.25)
    sm.freeze_hidden(mask, optimizer)
    for expected in (0.0, 1.5):
        draw()
        layer(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.state[layer.values]["momentum_buffer"].item() == expected
    assert layer.values.item() == pytest.approx(2 - 0.15)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, amsgrad=True),
        lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
        lambda p: torch.optim.Rprop(p, lr=0.1),
    ],
)
@pytest.mark.parametrize("attached", [False, True])
def test_any_optimizer(make, attached):
    model = net()
    optimizer = make(model.parameters())
    method = sm.RigL(model, optimizer, total_steps=20, interval=5)
    if attached:
        method.attach()
    mask = sm.RandomMask(model, 0.6)
    sm.freeze_hidden(mask, optimizer)
    for batch in range(12):
        updates = method.updates_now
        mask.clear() if updates else mask.draw()
        before = [layer.values.detach().clone() for layer in mask.layers]
        states = [
            {k: s.clone() for k, s in optimizer.state[layer.values].items() if s.shape == layer.values.shape}
            for layer in mask.layers
        ]
        model(torch.randn(8, 24)).square().sum().backward()
        optimizer.step() if attached else method.step()
        optimizer.zero_grad()
        if updates:
            continue
        for stream, layer in enumerate(mask.layers):
            shown = mask.mask(stream, layer)
            assert layer.values.detach()[~shown].equal(before[stream][~shown])
            assert (layer.values.detach()[shown] != before[stream][shown]).any()
            for key, state in states[stream].items():
                now = optimizer.state[layer.values][key]
                assert now[~shown].equal(state[~shown]), (batch, key)


def test_all_weights_move_where_no_mask_is_drawn():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    mask = sm.RandomMask(model, 0.6)
    sm.freeze_hidden(mask, optimizer)
    mask.draw()
    mask.clear()
    before = [layer.values.detach().clone() for layer in mask.layers]
    model(torch.randn(8, 24)).square().sum().backward()
    optimizer.step()
    assert all((layer.values != old).all() for layer, old in zip(mask.layers, before, strict=True))


def test_gradients_of_earlier_draws_move_their_weights():
    # lr 0.1, weight decay 0.25, a weight of 2: one gradient of 1 moves it by 0.1 * (1 + 0.5), none leaves it
    for shown, expected in ([True, False], 1.85), ([False, True], 1.85), ([False, False], 2.0):
        layer, mask, draw = one_weight(shown)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.25)
        sm.freeze_hidden(mask, optimizer)
        for _ in shown:
            draw()
            layer(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        assert layer.values.item() == pytest.approx(expected), shown


def test_penalties_do_not_move_hidden_weights():
    model = net()
    mask, optimizer = sm.RandomMask(model, 0.5), torch.optim.SGD(model.parameters(), 0.1)
    sm.freeze_hidden(mask, optimizer)
    for step in range(4):
        if step == 2:
            mask.clear()  # as a topology update and the end of an epoch do
        mask.draw()
        before = [layer.values.detach().clone() for layer in mask.layers]
        penalty = sum(layer.values.square().sum() for layer in mask.layers)
        (model(torch.randn(32, 24)).square().sum() + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
        for stream, (layer, old) in enumerate(zip(mask.layers, before, strict=True)):
            assert torch.equal(layer.values != old, mask.mask(stream, layer)), step


def test_accumulated_draws_move_what_any_of_them_showed():
    model = net()
    mask, optimizer = sm.RandomMask(model, 0.5), torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    sm.freeze_hidden(mask, optimizer)
    for step in range(3):
        before = [layer.values.detach().clone() for layer in mask.layers]
        shown = [torch.zeros_like(old, dtype=torch.bool) for old in before]
        for micro in range(2):
            if step == 2 and not micro:
                mask.clear()  # and all are shown
            else:
                mask.draw()
            for stream, layer in enumerate(mask.layers):
                shown[stream] |= mask.mask(stream, layer) if mask.drawn else True
            model(torch.randn(32, 24).abs()).square().sum().backward()
        had = [layer.values.grad != 0 for layer in mask.layers]
        optimizer.step()
        optimizer.zero_grad()
        for stream, (layer, old, grad) in enumerate(zip(mask.layers, before, had, strict=True)):
            moved = layer.values.detach() != old
            assert moved[grad].float().mean() > 0.99 and not moved[~shown[stream]].any()
            assert moved[~mask.mask(stream, layer)].any()


def test_a_penalty_does_not_move_what_the_draw_hides():
    # Top-KAST adds its penalty's gradient inside of the step
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    method = sm.TopKAST(model, optimizer, total_steps=20, interval=50, penalty=0.1)
    mask = sm.RandomMask(model, 0.5)
    sm.freeze_hidden(mask, optimizer)
    for _ in range(3):
        mask.draw()
        before = method.state_dict()["values"]
        model(torch.randn(32, 24)).square().sum().backward()
        method.step()
        optimizer.zero_grad()
        for stream, (layer, old) in enumerate(zip(mask.layers, before, strict=True)):
            hidden = ~mask.mask(stream, layer)
            assert method.state_dict()["values"][stream][hidden].equal(old[hidden])


@pytest.mark.parametrize(("without", "frozen"), [((), True), (("freezing",), False)])
def test_a_run_of_cigl_freezes_unless_told_otherwise(without, frozen):
    config = TrainConfig(reliability="cigl", without=without, weight_decay=0.1, width=4, epochs=4, interval=5)
    run = build_run(config, load_dataset(config))
    assert run.reliability.mask is not None
    images, labels = next(run.batches.epoch(0))
    for _ in range(2):
        run.reliability.before_batch(run.method.updates_now)
        before = [layer.values.detach().clone() for layer in run.reliability.mask.layers]
        run.reliability.loss_of(run.model(images), labels).backward()
        run.method.step()
        run.optimizer.zero_grad()
    moved = [
        (layer.values.detach() != old)[~run.reliability.mask.mask(stream, layer)].any().item()
        for stream, (layer, old) in enumerate(zip(run.reliability.mask.layers, before, strict=True))
    ]
    assert any(moved) != frozen
