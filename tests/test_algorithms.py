import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparse_moon as sm
from sparse_moon.ops.bernoulli_mask import philox


def net(sparsity=0.7, pattern="unstructured"):
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 12))
    return sm.sparsify(model, sparsity, "uniform", first_dense=False, pattern=pattern).double()


def batch():
    return torch.randn(6, 2, 4, 4, dtype=torch.float64), torch.randint(0, 12, (6,))


def train(model, method, steps, batches=None):
    updates = []
    for i in range(steps):
        x, y = batch() if batches is None else batches[i]
        F.cross_entropy(model(x), y).backward()
        updates.append(method.step())
        method.optimizer.zero_grad()
    return updates


class DenseSimulation:
    """RigL or SET with dense weights and masks, written from the paper's Algorithm 1: SGD with momentum, or Adam."""

    def __init__(self, model, kind, *, interval, stop, drop, lr, momentum, seed):
        self.weights = {n: m.dense_weight().detach().clone() for n, m in sm.sparse_layers(model).items()}
        self.masks = {n: m.mask() for n, m in sm.sparse_layers(model).items()}
        self.biases = {n: m.bias.detach().clone() for n, m in sm.sparse_layers(model).items()}
        self.velocity = {n: torch.zeros_like(w) for n, w in self.weights.items()}
        self.bias_velocity = {n: torch.zeros_like(b) for n, b in self.biases.items()}
        self.kind, self.interval, self.stop, self.drop = kind, interval, stop, drop
        self.lr, self.momentum, self.seed, self.t = lr, momentum, seed, 0
        self.started = False

    def step(self, x, y):
        w = {n: (v * self.masks[n]).requires_grad_() for n, v in self.weights.items()}
        b = {n: v.clone().requires_grad_() for n, v in self.biases.items()}
        h = F.conv2d(x, w["0"], b["0"], padding=1).relu().flatten(1)
        F.cross_entropy(F.linear(h, w["3"], b["3"]), y).backward()
        if self.t and self.t < self.stop and self.t % self.interval == 0:
            for stream, name in enumerate(self.weights):
                self.update(name, w[name].grad, stream)
        else:
            for name in self.weights:
                grad = w[name].grad * self.masks[name]
                self.velocity[name] = self.momentum * self.velocity[name] + grad if self.started else grad
                self.bias_velocity[name] = (
                    self.momentum * self.bias_velocity[name] + b[name].grad if self.started else b[name].grad
                )
                self.weights[name] -= self.lr * self.velocity[name] * self.masks[name]
                self.biases[name] -= self.lr * self.bias_velocity[name]
            self.started = True
        self.t += 1

    def update(self, name, grad, stream):
        weight, mask = self.weights[name].flatten(), self.masks[name].flatten().clone()
        count = int(self.drop / 2 * (1 + math.cos(math.pi * self.t / self.stop)) * mask.sum().item())
        active = mask.nonzero().flatten().tolist()
        dropped = sorted(active, key=lambda i: (weight[i].abs().item(), i))[:count]
        old = mask.clone()
        mask[dropped] = False
        score = grad.abs().flatten()
        if self.kind == "set":
            score = philox(mask.numel(), self.seed, 2**31 + stream, torch.tensor(self.t)).float()
        inactive = (~mask).nonzero().flatten().tolist()
        mask[sorted(inactive, key=lambda i: (-score[i].item(), i))[:count]] = True
        fresh = mask & ~old
        gone = ~mask
        for tensor in (self.weights[name], self.velocity[name]):
            tensor.view(-1)[fresh | gone] = 0
        self.masks[name] = mask.view_as(self.masks[name])


@pytest.mark.parametrize("kind", ["rigl", "set"])
def test_fifty_steps_equal_a_dense_simulation(kind):
    torch.manual_seed(2)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    method = {"rigl": sm.RigL, "set": sm.SET}[kind](model, optimizer, total_steps=60, interval=7, stop=0.7, seed=11)
    simulation = DenseSimulation(model, kind, interval=7, stop=42, drop=0.3, lr=0.3, momentum=0.9, seed=11)
    start = {n: m.mask() for n, m in sm.sparse_layers(model).items()}
    batches = [batch() for _ in range(50)]
    updates = train(model, method, 50, batches)
    for x, y in batches:
        simulation.step(x, y)
    assert [i for i, updated in enumerate(updates) if updated] == [7, 14, 21, 28, 35]
    for name, layer in sm.sparse_layers(model).items():
        assert torch.equal(layer.mask(), simulation.masks[name]) and not torch.equal(layer.mask(), start[name])
        torch.testing.assert_close(layer.dense_weight(), simulation.weights[name] * simulation.masks[name])
        torch.testing.assert_close(layer.bias.detach(), simulation.biases[name])
        momentum = layer.topology.to_dense(optimizer.state[layer.values]["momentum_buffer"])
        expected = simulation.velocity[name] * simulation.masks[name]
        torch.testing.assert_close(momentum.view_as(expected), expected)


@pytest.mark.parametrize("method", [sm.RigL, sm.SET])
@pytest.mark.parametrize("pattern", ["unstructured", "vector4", "block2"])
def test_counts_stay_exact_and_something_changes(method, pattern):
    model = net(pattern=pattern)
    layers = sm.sparse_layers(model)
    before = {n: (m.topology.nnz, m.mask()) for n, m in layers.items()}
    m = method(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=100, interval=2)
    assert sum(train(model, m, 30)) == 14
    for name, layer in layers.items():
        assert layer.mask().sum() == layer.topology.nnz == before[name][0]
        assert not torch.equal(layer.mask(), before[name][1])


@pytest.mark.parametrize("kind", ["rigl", "set", "mest"])
@pytest.mark.parametrize("conv", [False, True])
def test_blocks_go_and_come_by_their_sums(conv, kind):
    b, shape = (2, (6, 4, 4, 4)) if conv else (4, (6, 32))
    model = nn.Sequential(nn.Conv2d(4, 8, 3) if conv else nn.Linear(32, 24), nn.Flatten())
    layer = sm.sparsify(model, 0.5, "uniform", first_dense=False, pattern=f"block{b}").double()[0]
    grid = (layer.weight_shape[0] // b, b, layer.weight_shape[1] // b, b, -1)  # the last: the taps of a convolution
    x, y, start = torch.randn(shape, dtype=torch.float64), torch.arange(6), layer.mask()
    weight = layer.dense_weight().detach().clone().requires_grad_()
    output = F.conv2d(x, weight, layer.bias) if conv else F.linear(x, weight, layer.bias)
    F.cross_entropy(output.flatten(1), y).backward()

    exists = start.view(grid).amax((1, 3)).flatten()
    size, gradient = (t.detach().abs().view(grid).sum((1, 3)).flatten() for t in (weight, weight.grad))
    drop = size + 5.0 * gradient if kind == "mest" else size
    grow = gradient if kind == "rigl" else philox(len(exists), 9, 2**31, torch.tensor(1)).float()
    count = int(0.4 * exists.sum())
    exists[exists.nonzero().flatten()[drop[exists].argsort()[:count]]] = False
    exists[(~exists).nonzero().flatten()[grow[~exists].argsort(descending=True)[:count]]] = True
    blocks = exists.view(grid[0], 1, grid[2], 1, -1)

    make = {"rigl": sm.RigL, "set": sm.SET, "mest": partial(sm.MEST, gradient_weight=5.0)}[kind]
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    method = make(model, optimizer, total_steps=10, interval=1, drop_fraction=sm.Constant(0.4), seed=9)
    assert train(model, method, 2, [(x, y), (x, y)]) == [False, True]
    assert torch.equal(layer.mask(), blocks.expand(-1, b, -1, b, -1).reshape(start.shape))
    assert not torch.equal(layer.mask(), start)


def test_ties_everywhere_keep_the_counts():
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    method = sm.RigL(model, torch.optim.SGD(model.parameters(), 0.0), total_steps=100, interval=1)
    nnz = {n: m.topology.nnz for n, m in sm.sparse_layers(model).items()}
    train(model, method, 5)
    assert {n: int(m.mask().sum()) for n, m in sm.sparse_layers(model).items()} == nnz


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    lambda p: torch.optim.Adam(p, amsgrad=True),
    lambda p: torch.optim.AdamW(p, foreach=False),
])  # fmt: skip
def test_optimizer_state_moves_with_its_weight(make):
    model = net()
    optimizer = make(model.parameters())
    method = sm.RigL(model, optimizer, total_steps=100, interval=4)
    layer = model[3]
    train(model, method, 4)

    def by_position():
        state = {k: v for k, v in optimizer.state[layer.values].items() if v is not None and v.dim()}
        places = layer.topology.positions().tolist()
        rows = zip(*[t.tolist() for t in (layer.values.detach(), *state.values())], strict=True)
        return dict(zip(places, rows, strict=True)), len(state)

    before, names = by_position()
    assert names == {"SGD": 1, "Adam": 3, "AdamW": 2}[type(optimizer).__name__]
    assert train(model, method, 1) == [True]
    after, _ = by_position()
    assert len(after) == len(before) and after.keys() != before.keys()
    for place, row in after.items():
        assert row == before.get(place, (0.0,) * (names + 1))


def test_an_update_replaces_the_step_and_the_topology_freezes():
    model = net()
    method = sm.RigL(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=20, interval=3, stop=0.5)
    assert [i for i, u in enumerate(train(model, method, 20)) if u] == [3, 6, 9]
    method = sm.RigL(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=20, interval=1)
    train(model, method, 1)
    bias = model[3].bias.detach().clone()
    assert train(model, method, 1) == [True]
    assert torch.equal(model[3].bias, bias) and model[3].bias.grad is None


def test_the_dense_gradient_exists_only_on_update_batches():
    model = net()
    method = sm.RigL(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=20, interval=2)
    probes = []
    for _ in range(6):
        probes.append(all(m.probe is not None for m in sm.sparse_layers(model).values()))
        train(model, method, 1)
    assert probes == [False, False, True, False, True, False]


def test_only_one_dense_gradient_at_a_time():
    model = net()
    method = sm.RigL(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=20, interval=1)
    train(model, method, 1)
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    assert all(m.probe.grad is None for m in sm.sparse_layers(model).values())


def test_gradient_accumulation_equals_the_large_batch():
    torch.manual_seed(5)
    one = net()
    two = net()
    two.load_state_dict(one.state_dict())
    methods = [
        sm.RigL(m, torch.optim.SGD(m.parameters(), 0.1, 0.9), total_steps=40, interval=3, backwards_per_step=k)
        for m, k in ((one, 1), (two, 2))
    ]
    for _ in range(12):
        x, y = batch()
        F.cross_entropy(one(x), y).backward()
        for part in (slice(0, 3), slice(3, 6)):
            (F.cross_entropy(two(x[part]), y[part]) / 2).backward()
        for method in methods:
            method.step()
            method.optimizer.zero_grad()
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_unannounced_accumulation_is_an_error():
    model = net()
    method = sm.RigL(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=20, interval=1)
    train(model, method, 1)
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="backwards_per_step"):
        F.cross_entropy(model(x), y).backward()


def test_a_weight_in_several_reentrant_checkpoints_is_an_error_that_says_what_to_do():
    def trained(reentrant, passes):
        torch.manual_seed(5)
        layers = sm.SparseLinear(8, 8, sparsity=0.5), sm.SparseLinear(8, 8, sparsity=0.5)
        model = nn.Sequential(*layers).double()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        method = sm.RigL(model, optimizer, total_steps=20, interval=1, backwards_per_step=passes)
        for _ in range(3):
            h = layers[0](torch.randn(4, 8, dtype=torch.float64))
            for _ in range(2):
                h = checkpoint(layers[1], h.tanh(), use_reentrant=reentrant)
            h.square().sum().backward()
            method.step()
            optimizer.zero_grad()
        return model.state_dict()

    with pytest.raises(RuntimeError, match=r"pass backwards_per_step .* in several segments of checkpoint"):
        trained(True, 1)
    states = trained(False, 1), trained(True, 2)
    for a, b in zip(*(state.values() for state in states), strict=True):
        torch.testing.assert_close(a, b)


def test_tied_layers_grow_by_their_common_gradient():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    sm.sparsify(model, 0.5).double()
    method = sm.RigL(model, torch.optim.SGD(model.parameters(), 0.0), total_steps=20, interval=1)
    x = torch.randn(4, 8, dtype=torch.float64)
    dense = sm.densify(copy.deepcopy(model))
    for _ in range(2):
        model(x).square().sum().backward()
        method.step()
    dense(x).square().sum().backward()
    values = (dense[0].weight.detach() * 1.0).flatten()
    active = values.nonzero().flatten()
    count = int(method.drop_fraction(1) * 32)
    survivors = active[values[active].abs().sort(stable=True).indices[count:]]
    score = dense[0].weight.grad.abs().flatten().index_fill(0, survivors, -1)
    expected = torch.cat([survivors, score.sort(descending=True, stable=True).indices[:count]]).sort().values
    assert torch.equal(model[0].topology.positions(), expected)


def test_not_finite_gradients():
    model = net()
    method = sm.RigL(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=20, interval=1)
    train(model, method, 1)
    x, y = batch()
    with pytest.raises(ValueError, match="gradients at batch 1 are not finite"):
        train(model, method, 1, [(x * math.inf, y)])
    with pytest.raises(ValueError, match="gradients at batch 1 are not finite"):
        method.step(torch.amp.GradScaler("cpu", enabled=False))


def test_gradient_scaler_skips_an_update_that_overflowed():
    model = net().float()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    method = sm.RigL(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=20, interval=1)

    def step(x, y, clip=False):
        scaler.scale(F.cross_entropy(model(x.float()), y)).backward()
        if clip:
            scaler.unscale_(method.optimizer)
        updated = method.step(scaler)
        method.optimizer.zero_grad()
        return updated

    step(*batch())
    topology = model[3].topology.col.clone()
    x, y = batch()
    assert step(x * math.inf, y) is False
    assert torch.equal(model[3].topology.col, topology) and scaler.get_scale() == 512.0
    assert step(*batch()) is True and step(*batch(), clip=True) is True
    assert not torch.equal(model[3].topology.col, topology)


def test_scaled_updates_choose_the_same_topology():
    models = [net().float(), net().float()]
    models[1].load_state_dict(models[0].state_dict())
    x, y = batch()
    for model, scaler in zip(models, (None, torch.amp.GradScaler("cpu", init_scale=4096.0)), strict=True):
        method = sm.RigL(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=20, interval=1)
        for _ in range(3):
            loss = F.cross_entropy(model(x.float()), y)
            (loss if scaler is None else scaler.scale(loss)).backward()
            method.step(scaler)
            method.optimizer.zero_grad()
    assert models[0][3].topology.same_as(models[1][3].topology)


def test_compiled_model_trains_to_the_same_topology():
    plain, other = net(), net()
    other.load_state_dict(plain.state_dict())
    batches = [batch() for _ in range(9)]
    for model, run in ((plain, plain), (other, torch.compile(other, fullgraph=True, backend="aot_eager"))):
        method = sm.RigL(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=20, interval=4)
        assert sum(train(run, method, 9, batches)) == 2
    for a, b in zip(plain.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_state_dict_resumes_in_step():
    torch.manual_seed(4)
    model = net()
    method = sm.SET(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=20, interval=2)
    train(model, method, 4)
    resumed = sm.RigL(model, method.optimizer, total_steps=20, interval=2)
    with pytest.raises(ValueError, match="state is of method 'set', this is 'rigl'"):
        resumed.load_state_dict(method.state_dict())
    resumed = sm.SET(model, method.optimizer, total_steps=20, interval=2)
    resumed.load_state_dict(method.state_dict())
    assert resumed.updates_now and resumed.steps == 4
    shorter = sm.SET(model, method.optimizer, total_steps=5, interval=2)
    with pytest.warns(UserWarning, match="of 4 batches, .* until batch 14, and here the last one is at batch 2 of 5"):
        shorter.load_state_dict(method.state_dict())
    assert not shorter.updates_now and shorter.steps == 4


def test_static_and_dense():
    model = net()
    masks = [m.mask() for m in sm.sparse_layers(model).values()]
    assert not any(train(model, sm.Static(model, torch.optim.SGD(model.parameters(), 0.1)), 5))
    assert all(torch.equal(a, m.mask()) for a, m in zip(masks, sm.sparse_layers(model).values(), strict=True))
    with pytest.raises(ValueError, match="'dense' got a model with sparse layers"):
        sm.Dense(model, torch.optim.SGD(model.parameters(), 0.1))
    dense = sm.densify(model)
    assert not any(train(dense, sm.Dense(dense, torch.optim.SGD(dense.parameters(), 0.1)), 2))


def test_errors():
    dense = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="'rigl' needs a model with sparse layers"):
        sm.RigL(dense, torch.optim.SGD(dense.parameters(), 0.1), total_steps=10)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for wrong in ({"interval": 0}, {"stop": 1.5}, {"total_steps": 0}):
        with pytest.raises(ValueError, match="must be positive and stop in"):
            sm.RigL(model, optimizer, **{"total_steps": 10, **wrong})
    with pytest.raises(ValueError, match="backwards_per_step must be positive, got 0"):
        sm.RigL(model, optimizer, total_steps=10, interval=2, backwards_per_step=0)


@pytest.mark.parametrize("kind", [sm.RigL, sm.SET, sm.algorithms.GraNet])
def test_the_drop_fraction_is_a_schedule(kind):
    model = sm.sparsify(nn.Sequential(nn.Linear(32, 32)), 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    own = {"densities": 0.5} if kind is sm.algorithms.GraNet else {}
    for number in (0.0, 0.3, 1):
        with pytest.raises(ValueError, match=rf"drop_fraction must be a schedule, .*, got {number}"):
            kind(model, optimizer, total_steps=100, interval=10, drop_fraction=number, **own)
    for wrong in (sm.Constant(30.0), sm.Cosine(0.3, -1.0, 100)):
        with pytest.raises(ValueError, match=r"drop_fraction must be in \[0, 1\], got .* at batch"):
            kind(model, optimizer, total_steps=100, interval=10, drop_fraction=wrong, **own)
