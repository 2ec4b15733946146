import copy

import pytest
import torch
from torch import nn

import sparse_moon as sm
from sparse_moon.nn.tune import chosen_backends
from sparse_moon.ops import choice
from sparse_moon.ops.choice import PASSES, Work
from sparse_moon.ops.native import native

pytestmark = [
    pytest.mark.skipif(native is None, reason="needs the compiled CPU kernels"),
    pytest.mark.usefixtures("nothing_measured"),
]


def net(sparsity=0.9):
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1),
        nn.Dropout(), nn.Flatten(), nn.Linear(2048, 64), nn.Linear(64, 32),
    )  # fmt: skip
    return sm.sparsify(model, sparsity, "uniform", first_dense=False)


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = sm.SparseLinear(32, 32, sparsity=0.9)

    def forward(self, x):
        return self.layer(input=x)


def table_of(crossovers):
    """A table as one of a device on which patterns differ: crossovers by block and dtype, of a convolution."""
    return [
        (Work(pass_, 4, 32, 32, 64, 9, 1, 1, block=block, dtype=dtype), crossover)
        for (block, dtype), crossover in crossovers.items()
        for pass_ in PASSES
    ]


@pytest.fixture
def measured(monkeypatch):
    def patch(crossovers):
        monkeypatch.setattr(choice, "table", lambda device: table_of(crossovers))
        choice.forget()

    yield patch
    monkeypatch.undo()
    choice.forget()


def test_it_says_what_runs_and_leaves_no_trace():
    model, batch = net(), torch.randn(4, 3, 8, 8)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    for pass_ in PASSES:
        choice.remember(Work(pass_, 4, 32, 32, 64, 9, 1, 1), 1.0)
        choice.remember(Work(pass_, 4, 64, 32, 1, 1, 1, 1), 0.0)
    runs = sm.what_runs(model, batch)
    assert list(runs) == list(sm.sparse_layers(model))
    # the images need no gradient
    assert runs["0"].keys() == {"forward", "values_grad"}
    assert runs["3"] == {"forward": "kernel", "grads": "kernel"}
    assert runs["7"] == {"forward": "dense", "input_grad": "dense", "values_grad": "dense"}
    shapes = {"0": (4, 3, 8, 8), "3": (4, 32, 8, 8), "6": (4, 2048), "7": (4, 64)}
    for name, layer in sm.sparse_layers(model).items():
        assert runs[name].items() <= chosen_backends(layer, shapes[name]).items()
    torch.set_rng_state(state)  # which chosen_backends has moved on
    assert sm.what_runs(model, (batch,)) == sm.what_runs(model, {"input": batch}) == runs
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_convolution_whose_gradients_run_apart():
    model, batch = net(), torch.randn(4, 3, 8, 8)
    for pass_ in PASSES:
        choice.remember(Work(pass_, 4, 32, 32, 64, 9, 1, 1), 0.0)
    # by Winograd's, which computes one after the other
    assert sm.what_runs(model, batch)["3"] == {"forward": "dense", "input_grad": "dense", "values_grad": "dense"}


def test_layers_that_are_called_with_keywords():
    model = ByKeyword()
    runs = sm.what_runs(model, torch.randn(4, 32))
    assert runs == {"layer": sm.what_runs(model.layer, torch.randn(4, 32))[""]}
    assert sm.tune(model, (32,), 4).keys() == {"layer"}


def test_the_pattern_that_would_pay_where_none_does(measured):
    model, batch = net(), torch.randn(4, 3, 8, 8)
    unstructured, blocks, halves = ((1, 1), "float32"), ((32, 32), "float32"), ((16, 16), "bfloat16")
    measured({unstructured: 0.01, blocks: 0.2, halves: 0.5})
    said = sm.what_would_pay(model, batch)
    assert said.startswith(
        "no sparse kernel is known to pay on this device for unstructured weights in float32 at 90% sparsity: all 4 "
    )
    # three channels are no block
    assert said.endswith("the pattern block32 pays in 3 of them, block16 in 16 bits pays in 3 of them")
    assert "\n" not in said
    measured({unstructured: 0.01, blocks: 0.05})
    assert sm.what_would_pay(model, batch).endswith("no pattern was measured to pay at these sizes and densities")
    # a pruning method ends sparser
    in_the_end = dict.fromkeys(sm.sparse_layers(model), 0.04)
    assert "96% sparsity" in sm.what_would_pay(model, batch, in_the_end)
    assert "block32 pays" in sm.what_would_pay(model, batch, in_the_end)
    measured({})
    assert sm.what_would_pay(model, batch) is None  # nothing but the CPU has one speed for all patterns
    measured({unstructured: 0.15, blocks: 0.2})
    assert sm.what_would_pay(model, batch) is None
    assert sm.what_would_pay(nn.Linear(3, 3), torch.zeros(1, 3)) is None


def test_on_the_cpu_nothing_is_said():
    assert sm.what_would_pay(net(0.1), torch.randn(4, 3, 8, 8)) is None
