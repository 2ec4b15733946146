"""DICE against a loop, and the choice of its p."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from small_outputs import D, K, close, data, linear, logsumexp, network, run
from sparse_moon.ood import DICE, MSP, Energy, Head, Outputs, ReAct, choose_p, collect, fit_detectors


def dice_mask(weight, mean, p):
    """Entries above NumPy's percentile; no two contributions are equal here."""
    contribution = weight * mean
    return contribution > np.percentile(contribution, 100 * p)


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("inner", [Energy, MSP])
def test_dice_against_a_loop(p, extra, inner):
    train, test = data(extra)
    weight, bias = train.head.weight[:K].double(), train.head.bias[:K].double()
    mean = [sum(column) / len(column) for column in zip(*train.features.tolist(), strict=True)]
    mask = dice_mask(weight.numpy(), np.array(mean), p)
    masked = np.where(mask, weight.numpy(), 0).tolist()
    logits = [linear(masked, bias.tolist(), h) for h in test.features.double().tolist()]
    dice = DICE(inner(K), p).fit(train)
    assert dice.mask.numpy().tolist() == mask.tolist()
    close(dice.score(test), inner(K).score(Outputs(torch.tensor(logits, dtype=torch.float64), test.features)))
    dice.name = "mine"
    again = dice.with_p(0.4).with_p(p)
    assert again.score(test).equal(dice.score(test)) and again.name == "mine"


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("select", ["top", "random", "unit pruning"])
def test_dice_that_keeps_all_is_the_energy_bit_for_bit(extra, select):
    train, test = data(extra)
    test.logits.add_(0.125)  # logits of another kernel are used as they are
    assert DICE(Energy(K), 0.0, select).fit(train).score(test).equal(Energy(K).score(test))


def test_dice_is_the_percentile_on_every_size():
    for size in range(2, 40):
        train = run(network(0, size, 1), torch.rand(3, size))
        for p in (0.01, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 0.99):
            dice = DICE(Energy(1), p).fit(train)
            contribution = (train.head.weight.double() * train.features.double().mean(0)).numpy()
            assert dice.mask.sum() == (contribution > np.percentile(contribution, 100 * p)).sum(), (size, p)


def test_dice_ties_go_to_the_lowest_index():
    head = Head(torch.tensor([[1.0, 2.0, 1.0], [1.0, 1.0, -1.0]]), torch.zeros(2))
    train = run(head, torch.ones(4, 3))
    # n = 6, p = 0.5: floor(2.5) + 1 = 3 go.
    assert DICE(Energy(2), 0.5).fit(train).mask.tolist() == [[True, True, True], [False, False, False]]
    # Dead units: all contributions are zero.
    dead = run(head, torch.zeros(4, 3))
    assert DICE(Energy(2), 0.7).fit(dead).mask.tolist() == [[True, True, False], [False, False, False]]


def test_dice_leaves_the_unknown_row_out_before_the_percentile():
    train, test = data(extra=1)
    huge = Head(train.head.weight.clone(), train.head.bias)
    huge.weight[-1] = 1e6
    expected = DICE(Energy(K)).fit(train)
    found = DICE(Energy(K)).fit(run(huge, train.features))
    assert found.mask.equal(expected.mask)
    assert found.score(run(huge, test.features)).equal(expected.score(test))


def test_dice_selections():
    train, _ = data()
    weight, mean = train.head.weight.double(), train.features.double().mean(0)
    contribution = weight * mean
    keep = 4 * 7 - int(0.6 * 27) - 1

    def mask(select, seed=0):
        return DICE(Energy(K), 0.6, select, seed).fit(train).mask

    masks = {s: mask(s) for s in ("top", "bottom", "top+bottom", "random", "weight dropout", "weight pruning")}
    assert all(m.sum() == keep for m in masks.values())
    assert contribution[masks["top"]].min() > contribution[~masks["top"]].max()
    assert contribution[masks["bottom"]].max() < contribution[~masks["bottom"]].min()
    assert weight[masks["weight pruning"]].abs().min() > weight[~masks["weight pruning"]].abs().max()
    half = contribution.flatten().sort().values
    kept_ends = contribution[masks["top+bottom"]].sort().values
    assert kept_ends.equal(torch.cat([half[: keep // 2], half[-((keep + 1) // 2) :]]))
    assert masks["random"].equal(masks["weight dropout"]) and masks["random"].equal(mask("random"))
    assert not masks["random"].equal(mask("random", seed=1))

    units = 7 - int(0.6 * 6) - 1
    for select in ("unit dropout", "unit pruning"):
        found = mask(select)
        assert found.equal(found[:1].expand_as(found)) and found[0].sum() == units
    norms = weight.norm(dim=0)
    kept = mask("unit pruning")[0]
    assert norms[kept].min() > norms[~kept].max()
    assert not mask("unit dropout").equal(mask("unit dropout", seed=3))


def test_dice_composes_with_react_in_both_orders():
    train, test = data(extra=1)
    clip = np.percentile(train.features.numpy().astype(np.float64), 80)
    weight, bias = train.head.weight[:K].double().numpy(), train.head.bias[:K].double().numpy()
    weight = weight * dice_mask(weight, train.features.double().numpy().mean(0), 0.7)
    logits = np.minimum(test.features.double().numpy(), clip) @ weight.T + bias
    expected = [logsumexp(z) for z in logits]
    outside, inside = ReAct(DICE(Energy(K), 0.7), 0.8), DICE(ReAct(Energy(K), 0.8), 0.7)
    assert (outside.name, inside.name) == ("react+dice", "dice+react")
    close(outside.fit(train).score(test), expected, 1e-6)
    close(inside.fit(train).score(test), expected, 1e-6)


def test_dice_arguments():
    for p in (-0.1, 1.0, 90):
        with pytest.raises(ValueError, match=r"p must be in \[0, 1\)"):
            DICE(Energy(K), p)
    with pytest.raises(ValueError, match="select must be one of top, bottom"):
        DICE(Energy(K), select="best")
    with pytest.raises(ValueError, match="4 or 5 outputs, got 6"):
        DICE(Energy(K)).update(run(network(2), torch.rand(3, D)))
    with pytest.raises(AttributeError):
        DICE(Energy(K)).p = 0.5


def test_choose_p():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 30), nn.ReLU(), nn.Linear(30, K)).eval()
    train = [2 + 0.3 * torch.randn(20, 1, 4, 4) for _ in range(3)]
    validation = [(2 + 0.3 * torch.randn(n, 1, 4, 4), torch.zeros(n, dtype=torch.int64)) for n in (20, 9)]
    dice = DICE(Energy(K))
    fit_detectors(net, [dice], train)
    generator = torch.Generator().manual_seed(5)
    noise = torch.cat([torch.randn(n, 1, 4, 4, generator=generator) for n in (20, 9)])
    known, unknown = collect(net, validation), collect(net, [noise])

    def fpr_and_auroc(p):
        i, o = (dice.with_p(p).score(outputs) for outputs in (known, unknown))
        accepted = i.sort().values[29 - math.ceil(0.95 * 29)]
        return (o >= accepted).double().mean().item(), (i[:, None] > o).double().mean().item()

    figures = {p: fpr_and_auroc(p) for p in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)}
    expected = min(figures, key=lambda p: (figures[p][0], -figures[p][1], p))
    before = dice.mask.clone()
    assert choose_p(net, dice, validation, seed=5) == expected
    assert choose_p(net, dice, validation, candidates=[0.5]) == 0.5
    assert dice.mask.equal(before) and dice.p == 0.9
    with pytest.raises(ValueError, match="at least one"):
        choose_p(net, dice, validation, candidates=[])
