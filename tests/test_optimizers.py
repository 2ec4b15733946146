"""Any optimizer: its state moves with the weights."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparse_moon as sm
from small_frameworks import EXTRA
from small_training import Lookahead, backward, batch, changed, make, masks, net, sgd, train
from sparse_moon.algorithms.optimizers import StateRule, register_state

# --- updates that never come


def test_a_method_that_never_updates_says_so():
    for kind in ("set", "rigl", "mest", "srigl"):
        with pytest.warns(UserWarning, match="never updates the topology"):
            make(kind, net(), total_steps=50, interval=100)
    make("rigl", net(), total_steps=50, interval=100, stop=0.0)  # asked for


@pytest.mark.parametrize("copied", [False, True])
def test_a_step_past_the_method_warns_once(copied):
    model = net()
    optimizer = sgd(model)
    method = sm.RigL(model, optimizer, total_steps=60, interval=5)
    if copied:
        model, optimizer, _ = copy.deepcopy((model, optimizer, method))
    backward(model, batch())
    with pytest.warns(UserWarning, match=r"optimizer\.step\(\) was called and not RigL\.step\(\)"):
        optimizer.step()
    optimizer.step()
    method = sm.RigL(model, optimizer, total_steps=60, interval=5)
    train(model, method, 7)


def test_a_copy_and_a_method_after_it_know_nothing_of_an_update_batch():
    model = net()
    method = make("rigl", model)
    train(model, method, 5)
    copied = copy.deepcopy(model)
    assert all(layer.probe is None for layer in sm.sparse_layers(copied).values())
    static = sm.Static(model, method.optimizer)
    for _ in range(2):
        backward(model, batch())
    static.step()


@pytest.mark.filterwarnings("ignore:the optimizer does not hold the values of")
def test_a_method_of_other_layers_leaves_an_update_batch_alone():
    torch.manual_seed(0)
    models = [net()]
    models.append(copy.deepcopy(models[0]))
    batches, before = [batch() for _ in range(3)], masks(models[0])
    for model, beside in zip(models, (False, True), strict=True):
        method = make("rigl", model, sgd(model[0]), interval=2)
        for number, one in enumerate(batches):
            if number == 2 and beside:
                make("set", model, sgd(model[2]), interval=2)
            backward(model, one)
            assert method.step() == (number == 2)
            model.zero_grad()
        assert changed(before, model) == ["0"]
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))


@pytest.mark.parametrize("attached", [False, True])
def test_of_two_methods_that_share_layers_the_first_cannot_go_on(attached):
    model = net()
    first, second = make("rigl", model), make("set", model[:1], sgd(model[0]))
    step = first.attach().optimizer.step if attached else first.step
    backward(model, batch())
    step()
    train(model, second, 1)
    backward(model, batch())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="'rigl' cannot go on: method 'set' has begun to train layers of it"):
        step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    train(model, second, 6)


def test_methods_that_move_nothing_may_share_layers():
    model = net()
    for method in [sm.Static(model, sgd(model)) for _ in range(2)] * 2:
        train(model, method, 2)


def test_names_that_begin_with_module_are_kept_apart():
    model = nn.Module()
    model.fc, model.module = nn.Linear(32, 32), nn.Module()
    model.module.fc = nn.Linear(32, 6)
    sm.sparsify(model, 0.6, "uniform", first_dense=False)
    assert list(make("rigl", model).layers) == ["fc", "module.fc"]


# --- optimizers


class MyAdamW(torch.optim.AdamW):
    pass


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "ASGD": torch.optim.ASGD,
    "Adagrad": lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.3),
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "Adafactor": torch.optim.Adafactor,
    "RMSprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.5),
    "Rprop": torch.optim.Rprop,
    "AdamW subclass": MyAdamW,
    "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "Adam fused": lambda p: torch.optim.Adam(p, fused=True, amsgrad=True),
    "SGD fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "SGD foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.3, fused=True),
    "Adam capturable": lambda p: torch.optim.Adam(p, amsgrad=True, foreach=True),
    "Lookahead": lambda p: Lookahead(torch.optim.Adam(p)),
}


FOREACH = ("AdamW", "NAdam", "RAdam", "ASGD", "Adadelta", "Adamax", "RMSprop", "Rprop", "Adafactor")
OPTIMIZERS |= {f"{name} foreach": partial(getattr(torch.optim, name), lr=0.01, foreach=True) for name in FOREACH}


@pytest.mark.parametrize("pattern", ["unstructured", "block2"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_of_every_optimizer_moves_with_its_weight(name, pattern):
    check_state_moves(OPTIMIZERS[name], pattern, {"step_size": 0.01, "sum": 0.3})


# of timm's the names of each family, but those for GPUs (apex, bitsandbytes), of second order (adahessian), and kron
TIMM = (
    "adabelief", "adadelta", "adafactor", "adafactorbv", "adamp", "adamwlegacy", "adan", "adopt", "lamb", "laprop",
    "lars", "lion", "cadamw", "clion", "mars", "muon", "nadamw", "novograd", "radamlegacy", "rmsproptf", "sgdp", "sgdw",
)  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_state_of_timms_optimizers_moves_with_its_weight(name):
    optim = pytest.importorskip("timm.optim", reason=f"timm {EXTRA}")
    check_state_moves(lambda p: optim.create_optimizer_v2(list(p), name, lr=0.01), "unstructured", {"square_avg": 1.0})


def check_state_moves(make_optimizer, pattern, start):
    """State of weights that stay is what it was; that of new ones is 0 or ``start``, by name."""
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 6))
    sm.sparsify(model, 0.7, "uniform", first_dense=False, pattern=pattern)
    optimizer = make_optimizer(model.parameters())
    start = start if type(optimizer).__name__ in ("Rprop", "Adagrad", "RMSpropTF") else {}
    method = make("set", model, optimizer, interval=4)
    train(model, method, 4)
    values, topology = model[0].values, model[0].topology

    def rows():
        states = [
            (k, v) for o in (optimizer, getattr(optimizer, "base", None)) if o for k, v in o.state[values].items()
        ]
        kept = {k: v.flatten(1) if v.dim() > 1 else v[:, None] for k, v in states
                if isinstance(v, torch.Tensor) and v.shape[:1] == values.shape[:1] and v.dim()}  # fmt: skip
        places = topology.positions().tolist()
        return kept.keys(), dict(zip(places, zip(*(t.tolist() for t in kept.values()), strict=True), strict=True))

    names, before = rows()
    train(model, method, 1)
    moved, after = rows()
    assert names == moved and names and after.keys() != before.keys()
    for place, row in after.items():
        fresh = tuple([start.get(key, 0.0)] * len(part) for key, part in zip(names, row, strict=True))
        expected = before.get(place, fresh)
        assert all(pytest.approx(a) == b for a, b in zip(row, expected, strict=True)), (place, row, expected)
    train(model, method, 3)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_optimizers_whose_state_cannot_move_say_so():
    model = net()
    with pytest.raises(ValueError, match="LBFGS"):
        make("rigl", model, torch.optim.LBFGS(model.parameters()))
    static = sm.Static(model, torch.optim.LBFGS(model.parameters(), 0.1, max_iter=2))
    one = batch()

    def closure():
        static.optimizer.zero_grad()
        return backward(model, one)

    first = float(F.cross_entropy(model(one[0]), one[1]).detach())
    for _ in range(3):
        static.step(closure=closure)
    assert float(closure().detach()) < first

    class Quantized(torch.optim.SGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                self.state[p]["codes"] = torch.zeros(p.numel(), dtype=torch.uint8)

    method = make("set", model, Quantized(model.parameters(), 0.1))
    with pytest.raises(ValueError, match=r"Quantized keeps 'codes' \(\(832,\)\)"):
        train(model, method, 6)
    with pytest.raises(ValueError, match="moved_state names"):
        train(model, make("set", model, moved_state=["exp_avg"]), 6)
    with pytest.raises(ValueError, match=r"must be a torch\.optim\.Optimizer"):
        make("set", model, object.__new__(type("Nothing", (), {})))


class Paired(torch.optim.Optimizer):
    """Keeps a pair of tensors for each parameter, under one name."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            first, second = self.state[p].setdefault("pair", (torch.zeros_like(p), torch.zeros_like(p)))
            first.lerp_(p.grad, 0.1)
            second.lerp_(p.grad.square(), 0.01)
            p.add_(first / (second.sqrt() + 1e-3), alpha=-0.01)


def test_what_is_registered_moves_as_it_says():
    class Registered(Paired):
        pass

    model = net()
    method = make("set", model, Paired(model.parameters()))
    with pytest.raises(
        ValueError, match=r"Paired keeps 'pair' \(tuple\) .* unless sparse_moon.*register_state says how"
    ):
        train(model, method, 6)

    register_state(Registered, "pair", StateRule(move=lambda pair, remap: tuple(map(remap, pair))))
    model = net()
    optimizer = Registered(model.parameters())
    method = make("set", model, optimizer)
    train(model, method, 5)
    layer = model[0]
    before = dict(
        zip(layer.topology.positions().tolist(), optimizer.state[layer.values]["pair"][0].tolist(), strict=True)
    )
    train(model, method, 1)
    after = dict(
        zip(layer.topology.positions().tolist(), optimizer.state[layer.values]["pair"][0].tolist(), strict=True)
    )
    assert after.keys() != before.keys()
    assert all(value == before.get(place, 0.0) for place, value in after.items())


@pytest.mark.filterwarnings("ignore")  # torchao's own, and those of the compiler that it calls
@pytest.mark.parametrize("name, error", [("AdamW8bit", 0.02), ("AdamWFp8", 0.07), ("AdamW4bit", 0.2)])
def test_state_of_few_bits_moves_with_its_weight(name, error):
    torchao = pytest.importorskip("torchao.optim", reason=f"torchao {EXTRA}")
    model = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 6))
    sm.sparsify(model, 0.5, "uniform", first_dense=False)
    optimizer = getattr(torchao, name)(model.parameters(), lr=1e-3)
    method = make("set", model, optimizer, interval=3)
    train(model, method, 3)
    layer = model[0]
    state = optimizer.state[layer.values]["exp_avg"]
    assert type(state).__name__.startswith("OptimState") and len(state) == 4096

    def rows():
        numbers = optimizer.state[layer.values]["exp_avg"].dequantize().tolist()
        return dict(zip(layer.topology.positions().tolist(), numbers, strict=True))

    before = rows()
    largest = max(map(abs, before.values()))
    train(model, method, 1)
    after = rows()
    assert after.keys() != before.keys()
    differences = [abs(value - before.get(place, 0.0)) for place, value in after.items()]
    assert max(differences) < error * largest  # of few bits, in blocks with other neighbours now
    train(model, method, 3)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_muon_trains_what_is_dense_beside_a_method():
    """Matrices by Muon, sparse values and vectors by another optimizer, which is the method's."""
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 6))
    sm.sparsify(model, 0.7, exclude="0")
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    muon, rest = torch.optim.Muon(matrices, lr=0.02), torch.optim.SGD(others, 0.1, momentum=0.9)
    method = make("rigl", model, rest)
    before, weight = masks(model), model[0].weight.detach().clone()
    for _ in range(12):
        backward(model, batch())
        muon.step()
        muon.zero_grad()
        method.step()
        rest.zero_grad()
    assert changed(before, model) and not torch.equal(weight, model[0].weight)
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon([model[2].values])
