"""Methods beyond SET and RigL: each against a simulation with dense weights and masks, written from its paper."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparse_moon as sm
from sparse_moon.algorithms import GMP, MEST, GraNet, SRigL, TopKAST
from sparse_moon.ops.bernoulli_mask import philox
from sparse_moon.topology import Topology

BATCHES = 50
LAYERS = ("0", "3")


def net(sparsity=0.7, pattern="unstructured", constant_fan_in=False):
    """A convolution (8, 18) and a linear layer (12, 128); sparsity 0 has sparse layers that are full."""
    conv, linear = nn.Conv2d(2, 8, 3, padding=1), nn.Linear(8 * 16, 12)
    masks = [None, None]
    if constant_fan_in:
        topologies = [Topology.random(s, 1 - sparsity, constant_fan_in=True) for s in ((8, 18), (12, 128))]
        masks = [topologies[0].mask().view(8, 2, 3, 3), topologies[1].mask()]
    chosen = {"sparsity": None if constant_fan_in else sparsity, "pattern": pattern}
    first = sm.SparseConv2d.from_dense(conv, masks[0], **chosen)
    return nn.Sequential(
        first, nn.ReLU(), nn.Flatten(), sm.SparseLinear.from_dense(linear, masks[1], **chosen)
    ).double()  # fmt: skip


def batch(generator=None):
    x = torch.randn(6, 2, 4, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 12, (6,), generator=generator)


def batches(count=BATCHES):
    generator = torch.Generator().manual_seed(3)
    return [batch(generator) for _ in range(count)]


def train(model, method, data):
    updates = []
    for x, y in data:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        updates.append(method.step())
        method.optimizer.zero_grad()
    return updates


def largest(score, among, count):
    """The ``count`` of the places ``among`` with the highest score, the first on ties."""
    return sorted(among, key=lambda i: (-score[i].item(), i))[:count]


def smallest(score, among, count):
    return sorted(among, key=lambda i: (score[i].item(), i))[:count]


def cosine(start, step, stop):
    return start / 2 * (1 + math.cos(math.pi * step / stop))


class Simulation:
    """SGD with momentum on dense weights of which only those under the masks exist."""

    lr, momentum = 0.3, 0.9

    def __init__(self, model):
        layers = sm.sparse_layers(model)
        self.w = {n: m.dense_weight().detach().clone() for n, m in layers.items()}
        self.b = {n: m.bias.detach().clone() for n, m in layers.items()}
        self.mask = {n: m.mask().clone() for n, m in layers.items()}
        self.v = {n: torch.zeros_like(t) for n, t in (*self.w.items(), *((f"{n}b", t) for n, t in self.b.items()))}
        self.first = {n: int(m.sum()) for n, m in self.mask.items()}
        self.t = 0

    def gradients(self, x, y, mask=None):
        """Dense gradients of the weights, and those of the biases, of the network under the masks."""
        w = {n: (t * (mask or self.mask)[n]).requires_grad_() for n, t in self.w.items()}
        b = {n: t.clone().requires_grad_() for n, t in self.b.items()}
        h = F.conv2d(x, w["0"], b["0"], padding=1).relu().flatten(1)
        F.cross_entropy(F.linear(h, w["3"], b["3"]), y).backward()
        return {n: t.grad for n, t in w.items()}, {n: t.grad for n, t in b.items()}

    def descend(self, dw, db):
        for n in self.w:
            self.v[n] = (self.momentum * self.v[n] + dw[n]) * self.mask[n]
            self.w[n] -= self.lr * self.v[n]
            self.v[f"{n}b"] = self.momentum * self.v[f"{n}b"] + db[n]
            self.b[n] -= self.lr * self.v[f"{n}b"]

    def set_mask(self, n, places):
        """New mask; what was not there before starts at 0."""
        mask = torch.zeros(self.mask[n].numel(), dtype=torch.bool)
        mask[list(places)] = True
        mask = mask.view_as(self.mask[n])
        self.w[n] *= mask & self.mask[n]
        self.v[n] *= mask & self.mask[n]
        self.mask[n] = mask

    def active(self, n):
        return self.mask[n].flatten().nonzero().flatten().tolist()

    def random(self, n, seed):
        stream = 2**31 + LAYERS.index(n)
        return philox(self.mask[n].numel(), seed, stream, torch.tensor(self.t)).float()

    def exchange(self, n, drop_score, drop, grow_score, grow):
        survivors = set(self.active(n)) - set(smallest(drop_score.flatten(), self.active(n), drop))
        others = [i for i in range(self.mask[n].numel()) if i not in survivors]
        self.set_mask(n, survivors | set(largest(grow_score.flatten(), others, grow)))

    def check(self, model, optimizer):
        for n, layer in sm.sparse_layers(model).items():
            assert torch.equal(layer.mask(), self.mask[n])
            for ours, exact in (
                (layer.dense_weight(), self.w[n] * self.mask[n]),
                (layer.bias, self.b[n]),
                (layer.topology.to_dense(optimizer.state[layer.values]["momentum_buffer"]), self.v[n]),
            ):
                torch.testing.assert_close(ours.detach().view_as(exact), exact, rtol=1e-9, atol=1e-12)


def sgd(model, momentum=0.9, **options):
    return torch.optim.SGD(model.parameters(), 0.3, momentum=momentum, **options)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("start", [0.0, 0.25])
def test_gmp_equals_a_dense_simulation(start, momentum):
    torch.manual_seed(0)
    model, densities = net(0.0), {"0": 0.3, "3": 0.1}
    optimizer = sgd(model, momentum)
    simulation = Simulation(model)
    simulation.momentum = momentum
    method = GMP(model, optimizer, total_steps=60, interval=4, start=start, stop=0.7, densities=densities)
    updates = train(model, method, batches())
    begin, last, sizes = int(start * 60), 40, []  # 41 is the last batch before stop
    for t, (x, y) in enumerate(batches()):
        simulation.t = t
        simulation.descend(*simulation.gradients(x, y))
        if begin < t <= last and t % 4 == 0:
            for n in LAYERS:
                total = simulation.first[n]
                final = round(densities[n] * total)
                kept = final + round((total - final) * (1 - (t - begin) / (last - begin)) ** 3)
                places = simulation.active(n)
                weight = simulation.w[n].abs().flatten()
                simulation.set_mask(n, set(places) - set(smallest(weight, places, len(places) - kept)))
                sizes.append(kept)
    assert [i for i, updated in enumerate(updates) if updated] == [t for t in range(4, 41, 4) if t > begin]
    assert sizes[0] > sizes[2] > sizes[-2] == 43
    if momentum:
        simulation.check(model, optimizer)
    else:
        for n, layer in sm.sparse_layers(model).items():
            torch.testing.assert_close(layer.dense_weight().detach(), simulation.w[n], rtol=1e-9, atol=1e-12)
            assert torch.equal(layer.mask(), simulation.mask[n])
    assert [m.topology.nnz for m in sm.sparse_layers(model).values()] == [round(0.3 * 144), round(0.1 * 1536)]


@pytest.mark.parametrize("options", [{}, {"start": 0.3, "drop_fraction": sm.Constant(0.2)}])
def test_granet_equals_a_dense_simulation(options):
    torch.manual_seed(1)
    model = net(0.5)
    optimizer, simulation = sgd(model), None
    simulation = Simulation(model)
    method = GraNet(model, optimizer, total_steps=60, interval=6, stop=0.7, densities=0.2, **options)
    updates = train(model, method, batches())
    begin, last = int(options.get("start", 0.0) * 60), 36
    for t, (x, y) in enumerate(batches()):
        dw, db = simulation.gradients(x, y)
        if not (0 < t <= last and t % 6 == 0):
            simulation.descend(dw, db)
            continue
        for n in LAYERS:
            first, final = simulation.first[n], round(0.2 * simulation.w[n].numel())
            kept = final + round((first - final) * (1 - max(t - begin, 0) / (last - begin)) ** 3)
            exchanged = int((0.2 if options else cosine(0.5, t, 42)) * kept)
            # first the prune, then the exchange, which may take what was pruned
            simulation_drop = len(simulation.active(n)) - kept
            survivors = set(simulation.active(n)) - set(
                smallest(simulation.w[n].abs().flatten(), simulation.active(n), simulation_drop)
            )
            survivors -= set(smallest(simulation.w[n].abs().flatten(), survivors, exchanged))
            others = [i for i in range(simulation.w[n].numel()) if i not in survivors]
            simulation.set_mask(n, survivors | set(largest(dw[n].abs().flatten(), others, exchanged)))
    assert [i for i, updated in enumerate(updates) if updated] == [6, 12, 18, 24, 30, 36]
    simulation.check(model, optimizer)
    assert [m.topology.nnz for m in sm.sparse_layers(model).values()] == [round(0.2 * 144), round(0.2 * 1536)]


@pytest.mark.parametrize("gradient_weight", [0.0, 5.0])
@pytest.mark.parametrize("soft", [False, True])
def test_mest_equals_a_dense_simulation(soft, gradient_weight):
    torch.manual_seed(2)
    model = net()
    optimizer, simulation = sgd(model), Simulation(model)
    method = MEST(
        model, optimizer, total_steps=60, interval=6, stop=0.7, seed=9,
        gradient_weight=gradient_weight, soft_memory_bound=soft,
    )  # fmt: skip
    sizes = []
    updates = []
    for x, y in batches():
        updates += train(model, method, [(x, y)])
        sizes.append(model[3].topology.nnz)
    for t, (x, y) in enumerate(batches()):
        dw, db = simulation.gradients(x, y)
        if not (0 < t < 42 and t % 6 == 0):
            simulation.descend(dw, db)
            continue
        simulation.t = t
        for n in LAYERS:
            score = simulation.w[n].abs() + gradient_weight * dw[n].abs()
            count = int(cosine(0.3, t, 42) * simulation.first[n])
            drop = count
            if soft:
                drop = len(simulation.active(n)) - simulation.first[n]
                count = 0 if t == 36 else count
            simulation.exchange(n, score, drop, simulation.random(n, 9), count)
    assert [i for i, updated in enumerate(updates) if updated] == [6, 12, 18, 24, 30, 36]
    simulation.check(model, optimizer)
    assert sizes[5] == sizes[36] == sizes[-1] and (sizes[6] > sizes[12] > sizes[5]) == soft


@pytest.mark.parametrize("options", [
    {},
    {"forward_share": 0.8, "penalty": 0.05, "drop_fraction": sm.Constant(0.4)},
    {"drop_fraction": sm.Constant(0.0), "penalty": 0.0},
])  # fmt: skip
@pytest.mark.parametrize("stop", [0.7, 1.0])
def test_top_kast_equals_a_dense_simulation(options, stop):
    torch.manual_seed(3)
    model = net()
    optimizer, simulation = sgd(model), Simulation(model)
    method = TopKAST(model, optimizer, total_steps=60, interval=6, stop=stop, seed=4, **options)
    share, penalty = options.get("forward_share", 0.5), options.get("penalty", 1e-4)
    updates = train(model, method, batches())

    def forward_set(n):
        chosen = largest(simulation.w[n].abs().flatten(), simulation.active(n), round(share * simulation.first[n]))
        mask = torch.zeros(simulation.w[n].numel(), dtype=torch.bool)
        mask[chosen] = True
        return mask.view_as(simulation.w[n])

    inner = {n: forward_set(n) for n in LAYERS}
    end = round(stop * 60)
    for t, (x, y) in enumerate(batches()):
        simulation.t = t
        dw, db = simulation.gradients(x, y, inner)
        for n in LAYERS:
            density = round(share * simulation.first[n]) / simulation.w[n].numel()
            dw[n] += penalty * simulation.w[n] * torch.where(inner[n], torch.ones_like(dw[n]), 1 / density)
        simulation.descend(dw, db)
        if not (t == end - 1 or (0 < t < end and t % 6 == 0)):
            continue
        for n in LAYERS:
            idle = len(simulation.active(n)) - round(share * simulation.first[n])
            fraction = options["drop_fraction"].value if options else cosine(0.3, t, end)
            count = int(fraction * idle)
            drop, grow = (idle, 0) if t == end - 1 else (count, count)
            simulation.exchange(n, simulation.w[n].abs(), drop, simulation.random(n, 4), grow)
        inner = {n: forward_set(n) for n in LAYERS}
    expected = [t for t in range(BATCHES) if (0 < t < end and t % 6 == 0) or t == end - 1]
    assert [i for i, updated in enumerate(updates) if updated] == expected
    for n, layer in sm.sparse_layers(model).items():
        assert torch.equal(layer.mask(), simulation.mask[n])
        torch.testing.assert_close(
            layer.dense_weight().detach(), simulation.w[n] * inner[n], rtol=1e-9, atol=1e-12
        )  # fmt: skip
        hidden = simulation.w[n][simulation.mask[n] & ~inner[n]]
        whole = simulation.w[n][simulation.mask[n]]
        torch.testing.assert_close(method.state_dict()["values"][LAYERS.index(n)], whole, rtol=1e-9, atol=1e-12)
        momentum = layer.topology.to_dense(optimizer.state[layer.values]["momentum_buffer"])
        torch.testing.assert_close(momentum.view_as(simulation.v[n]), simulation.v[n], rtol=1e-9, atol=1e-12)
        if stop < 1.0:
            assert layer.topology.nnz == round(share * simulation.first[n]) and hidden.numel() == 0


@pytest.mark.parametrize("options", [{}, {"gamma_sal": 0.9, "no_ablation": ()}, {"gamma_sal": 0.0}])
def test_srigl_equals_a_dense_simulation(options):
    torch.manual_seed(4)
    model = net(constant_fan_in=True)
    optimizer, simulation = sgd(model), Simulation(model)
    method = SRigL(model, optimizer, total_steps=60, interval=6, stop=0.7, **options)
    gamma = options.get("gamma_sal", 0.3)
    train(model, method, batches())
    removed = 0
    for t, (x, y) in enumerate(batches()):
        dw, db = simulation.gradients(x, y)
        if not (0 < t < 42 and t % 6 == 0):
            simulation.descend(dw, db)
            continue
        for n in LAYERS:
            rows, mask = simulation.w[n].shape[0], simulation.mask[n].flatten()
            cols = mask.numel() // rows
            weight, grad = simulation.w[n].abs().flatten(), dw[n].abs().flatten()
            active = simulation.active(n)
            fan_in = max(simulation.mask[n].flatten(1).sum(1).tolist())
            count = int(cosine(0.3, t, 42) * len(active))
            survivors = set(active) - set(smallest(weight, active, count))
            others = [i for i in range(mask.numel()) if i not in survivors]
            salient = survivors | set(largest(grad, others, count))
            per_row = [sum(i // cols == r for i in salient) for r in range(rows)]
            keep = [r for r in range(rows) if per_row[r] >= gamma * fan_in]
            if gamma == 0.0 or (n == "3" and "no_ablation" not in options):
                keep = list(range(rows))
            needed = math.ceil(simulation.first[n] / cols)
            keep = set(keep) | set(sorted(range(rows), key=lambda r: (-per_row[r], r))[:needed])
            removed += rows - len(keep)
            width = simulation.first[n] // len(keep)
            places = set()
            for r in keep:
                stay = largest(weight, [i for i in survivors if i // cols == r], width)
                rest = [i for i in range(r * cols, (r + 1) * cols) if i not in survivors]
                places |= set(stay) | set(largest(grad, rest, width - len(stay)))
            simulation.set_mask(n, places)
    simulation.check(model, optimizer)
    assert (removed > 0) == (gamma == 0.9)
    for layer in sm.sparse_layers(model).values():
        lengths = layer.topology.row_ptr.diff()
        assert lengths[lengths > 0].unique().numel() == 1


def make(kind, model, optimizer, **options):
    """Each method with updates every 3 batches, in all its parts; ``total_steps`` 24."""
    common = {"total_steps": 24, "interval": 3, "stop": 0.8, **options}
    return {
        "set": lambda: sm.SET(model, optimizer, **common),
        "rigl": lambda: sm.RigL(model, optimizer, **common),
        "mest": lambda: MEST(model, optimizer, gradient_weight=1.0, **common),
        "mest-soft": lambda: MEST(model, optimizer, gradient_weight=1.0, soft_memory_bound=True, **common),
        "gmp": lambda: GMP(model, optimizer, densities=0.1, **common),
        "granet": lambda: GraNet(model, optimizer, densities=0.1, **common),
        "top-kast": lambda: TopKAST(model, optimizer, penalty=0.01, **common),
        "srigl": lambda: SRigL(model, optimizer, gamma_sal=0.9, **common),
    }[kind]()


KINDS = ("set", "rigl", "mest", "mest-soft", "gmp", "granet", "top-kast", "srigl")


def start(kind, make_optimizer=sgd, **options):
    """A model of density 0.4, its optimizer and the method; the same at every call."""
    torch.manual_seed(6)
    model = net(0.6, constant_fan_in=kind == "srigl")
    optimizer = make_optimizer(model)
    return model, optimizer, make(kind, model, optimizer, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method_last", [False, True])
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(kind, method_last, tmp_path):
    def adam(model):
        return torch.optim.AdamW(model.parameters(), 0.02)

    data = batches(24)
    whole, optimizer, method = start(kind, adam)
    updates = train(whole, method, data)
    assert sum(updates) >= 6
    for interruption in (1, 3, 4, 11, 20):  # 4 comes after an update, 3 and 20 before one or after the last
        model, optimizer, method = start(kind, adam)
        train(model, method, data[:interruption])
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "method": method.state_dict()}
        torch.save(state, tmp_path / "state.pt")
        model, optimizer, method = start(kind, adam)
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        if method_last:
            method = make(kind, model, optimizer)
        optimizer.load_state_dict(state["optimizer"])
        method.load_state_dict(state["method"])
        assert train(model, method, data[interruption:]) == updates[interruption:]
        for (name, a), (other, b) in zip(whole.state_dict().items(), model.state_dict().items(), strict=True):
            assert name == other and torch.equal(a, b), (interruption, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make_optimizer", [
    sgd, lambda model: torch.optim.Adam(model.parameters(), amsgrad=True), lambda m: torch.optim.AdamW(m.parameters()),
])  # fmt: skip
def test_values_and_optimizer_state_move_with_their_weight(kind, make_optimizer):
    model, optimizer, method = start(kind, make_optimizer)
    layer, parameter = model[3], model[3].values

    def by_position():
        state = [v for v in optimizer.state[parameter].values() if v is not None and v.dim()]
        places = layer.topology.positions().tolist()
        # Top-KAST hides some values between two batches
        tensors = [*state] if kind == "top-kast" else [parameter.detach(), *state]
        assert all(t.shape == layer.topology.values_shape for t in tensors)
        return dict(zip(places, zip(*[t.tolist() for t in tensors], strict=True), strict=True))

    train(model, method, batches(3))
    method.replaces_step = True  # so that nothing else changes in this batch
    before = by_position()
    assert train(model, method, batches(1)) == [True]
    after = by_position()
    assert after.keys() != before.keys() and layer.values is parameter
    for place, row in after.items():
        assert row == before.get(place, (0.0,) * len(row))
    train(model, method, batches(6))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", ["vector4", "block2"])
def test_blocks(kind, pattern):
    torch.manual_seed(7)
    if kind == "srigl":
        model = nn.Sequential(nn.Flatten(), sm.SparseLinear(32, 24, sparsity=0.5), nn.ReLU(), nn.Linear(24, 12))
        block = sm.topology.block_shape(pattern)
        layer = model[1]
        layer.topology = Topology.random((24, 32), 0.5, block, constant_fan_in=True)
        layer.values = nn.Parameter(torch.randn(layer.topology.values_shape))
        model = model.double()
    else:
        model = net(0.5, pattern)
    method = make(kind, model, sgd(model))
    before = [layer.mask() for layer in sm.sparse_layers(model).values()]
    train(model, method, batches(24))
    for old, layer in zip(before, sm.sparse_layers(model).values(), strict=True):
        topology = layer.topology
        assert layer.values.shape == topology.values_shape and not torch.equal(old, layer.mask())
        expected = {"gmp": round(0.1 * topology.grid[0] * topology.grid[1])}
        expected["granet"] = expected["gmp"]
        expected["top-kast"] = round(0.5 * (old.sum().item() // (topology.block[0] * topology.block[1])))
        unchanged = old.sum().item() // (topology.block[0] * topology.block[1])
        assert kind == "srigl" or topology.num_blocks == expected.get(kind, unchanged)


@pytest.mark.parametrize("kind", KINDS)
def test_ties_everywhere_keep_the_counts(kind):
    counts = []
    for fill in (None, 0.0):
        model, _, method = start(kind, lambda model: torch.optim.SGD(model.parameters(), 0.0))
        if fill is not None:
            with torch.no_grad():
                for p in model.parameters():
                    p.fill_(fill)
        train(model, method, batches(24))
        counts.append([int(m.mask().sum()) for m in sm.sparse_layers(model).values()])
        assert counts[-1] == [m.topology.nnz for m in sm.sparse_layers(model).values()]
    assert kind == "srigl" or counts[0] == counts[1]


def test_gmp_prunes_to_nothing_and_stops():
    model = net(0.0)
    method = GMP(model, sgd(model), total_steps=20, interval=1, stop=0.5, densities={"0": 0.0, "3": 1.0})
    assert [i for i, u in enumerate(train(model, method, batches(20))) if u] == list(range(1, 10))
    assert model[0].topology.nnz == 0 and model[3].sparsity == 0.0 and model[0].values.shape == (0,)


def test_gmp_takes_the_batchs_step_and_keeps_the_largest():
    model = net(0.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    twin = net(0.0)
    twin.load_state_dict(model.state_dict())
    method = GMP(model, optimizer, total_steps=4, interval=1, stop=0.5, densities=0.25)
    train(model, method, batches(2))
    static = sm.Static(twin, torch.optim.SGD(twin.parameters(), 0.1))
    train(twin, static, batches(2))
    dense = twin[3].dense_weight().detach()
    kept = model[3].mask()
    assert kept.sum() == 384 and torch.equal(model[3].dense_weight().detach(), dense * kept)
    assert dense[kept].abs().min() >= dense[~kept].abs().max()


def test_compiled_models_follow_a_change_of_size():
    plain, other = net(0.0), net(0.0)
    other.load_state_dict(plain.state_dict())
    for model, run in ((plain, plain), (other, torch.compile(other, fullgraph=True, backend="aot_eager"))):
        method = GMP(model, sgd(model), total_steps=9, interval=3, densities=0.2)
        for x, y in batches(9):
            F.cross_entropy(run(x), y).backward()
            method.step()
            method.optimizer.zero_grad()
    for a, b in zip(plain.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_layers_that_the_allocation_keeps_dense_need_not_be_sparse():
    model = nn.Sequential(nn.Linear(6, 6), sm.SparseLinear(6, 6, sparsity=0.0))
    GMP(model, sgd(model), total_steps=200, densities={"0": 1.0, "1": 0.5})
    with pytest.raises(ValueError, match=r"no sparse layers \['0'\], without a density \['1'\]"):
        GMP(model, sgd(model), total_steps=200, densities={"0": 0.5})


def test_an_average_taken_after_the_last_update_fits():
    model, _, method = start("gmp")
    train(model, method, batches(20))
    average = sm.WeightAverage(model)
    average.update(model)
    before = model[3].values.detach().clone()
    train(model, method, batches(2))
    average.update(model)
    after = model[3].values.detach().clone()
    average.copy_to(model)
    torch.testing.assert_close(model[3].values.detach(), (before + after) / 2)


def test_mest_reads_unscaled_gradients():
    chosen = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=4096.0)):
        torch.manual_seed(8)
        model = net().float()
        method = MEST(model, sgd(model), total_steps=20, interval=1, gradient_weight=3.0)
        for x, y in batches(3):
            loss = F.cross_entropy(model(x.float()), y)
            (loss if scaler is None else scaler.scale(loss)).backward()
            method.step(scaler)
            method.optimizer.zero_grad()
        chosen.append(model[3].topology)
    assert chosen[0].same_as(chosen[1])


@pytest.mark.parametrize("kind", ["mest", "granet", "srigl"])
def test_an_update_that_overflowed_is_skipped(kind):
    torch.manual_seed(9)
    model = net(0.6, constant_fan_in=kind == "srigl").float()
    method = make(kind, model, sgd(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    topology = model[3].topology.col.clone()
    for t, (x, y) in enumerate(batches(7)):
        scaler.scale(F.cross_entropy(model(x.float() * (math.inf if t == 3 else 1.0)), y)).backward()
        assert method.step(scaler) == (t == 6)
        method.optimizer.zero_grad()
        if t == 3:
            assert torch.equal(model[3].topology.col, topology) and scaler.get_scale() == 512.0
    assert not torch.equal(model[3].topology.col, topology)
    with pytest.raises(ValueError, match="gradients at batch 9 are not finite"):
        train(model.double(), method, [*batches(2), (batch()[0] * math.inf, batch()[1])])


@pytest.mark.parametrize("kind", ["gmp", "top-kast"])
def test_an_overflow_skips_only_the_step_where_the_update_comes_after_it(kind):
    torch.manual_seed(10)
    model = net(0.6).float()
    method = make(kind, model, sgd(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t, (x, y) in enumerate(batches(4)):
        bias = model[3].bias.detach().clone()
        scaler.scale(F.cross_entropy(model(x.float() * (math.inf if t == 3 else 1.0)), y)).backward()
        assert method.step(scaler) == (t == 3)
        method.optimizer.zero_grad()
        assert torch.equal(bias, model[3].bias) == (t == 3)
    assert scaler.get_scale() == 512.0 and all(p.isfinite().all() for p in model.parameters())


def test_top_kast_model_is_the_forward_network_and_ends_as_it():
    model = net()
    first = model[3].topology.nnz
    method = TopKAST(model, sgd(model), total_steps=12, interval=5, forward_share=0.25)
    assert model[3].values.count_nonzero() == round(0.25 * first) and model[3].topology.nnz == first
    for data in batches(11):
        train(model, method, [data])
        assert model[3].values.count_nonzero() == round(0.25 * first)
    x = batch()[0]
    train(model, method, batches(1))
    output = model(x)
    assert model[3].topology.nnz == round(0.25 * first) == model[3].values.count_nonzero()
    torch.testing.assert_close(sm.densify(model)(x), output)


def test_top_kast_gives_gradients_to_all_of_b():
    model = net()
    TopKAST(model, sgd(model), total_steps=12)
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    hidden = model[3].values == 0
    assert hidden.sum() > 100 and (model[3].values.grad[hidden] != 0).float().mean() > 0.5


def test_srigl_brings_a_neuron_back():
    torch.manual_seed(11)
    layer = sm.SparseLinear.from_dense(nn.Linear(8, 4), Topology.random((4, 8), 0.25, constant_fan_in=True).mask())
    model = nn.Sequential(layer, nn.Linear(4, 1)).double()
    options = {"total_steps": 30, "interval": 1, "gamma_sal": 0.6, "no_ablation": (), "drop_fraction": sm.Constant(0.5)}
    method = SRigL(model, torch.optim.SGD(model.parameters(), 0.0), **options)

    def step(neuron_gradients):
        with torch.no_grad():
            model[1].weight.copy_(torch.tensor([neuron_gradients]))
        model(torch.linspace(1.0, 2.0, 8, dtype=torch.float64)[None]).sum().backward()
        method.step()
        method.optimizer.zero_grad()
        return layer.topology.row_ptr.diff().tolist()

    with torch.no_grad():
        layer.values.copy_(torch.tensor([4.0, 3.9, 0.3, 3.7, 0.2, 0.1, 0.2, 3.0]))
    step([1.0, 1.0, 1.0, 1.0])
    # salient: weights 2, 1, 0, 1 and the four largest gradients, all in row 3; a fan-in of 2 asks for 1.2
    assert step([2.0, 2.0, 0.0, 9.0]) == [4, 0, 0, 4]
    # now weights 2, 0, 0, 2 and gradients in row 2; a fan-in of 4 asks for 2.4
    assert step([0.0, 0.0, 9.0, 0.0]) == [0, 0, 8, 0]


def test_srigl_keeps_the_largest_where_the_fan_in_falls():
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[0] = True
    layer = sm.SparseLinear.from_dense(nn.Linear(8, 4), mask)
    model = nn.Sequential(layer, nn.Linear(4, 1)).double()
    method = SRigL(
        model, torch.optim.SGD(model.parameters(), 0.0), total_steps=30, interval=1, gamma_sal=0.25, no_ablation=(),
        drop_fraction=sm.Constant(0.25),
    )  # fmt: skip
    with torch.no_grad():
        layer.values.copy_(torch.tensor([8.0, 1.0, 7.0, 2.0, 6.0, 3.0, 5.0, 4.0]))
        model[1].weight.copy_(torch.tensor([[0.0, 0.1, 0.0, 9.0]]))
    for _ in range(2):
        model(torch.linspace(1.0, 2.0, 8, dtype=torch.float64)[None]).sum().backward()
        method.step()
        method.optimizer.zero_grad()
    # six survive in row 0, two salient gradients lie in row 3; each row is to have four
    expected = torch.zeros(4, 8, dtype=torch.float64)
    expected[0] = torch.tensor([8.0, 0.0, 7.0, 0.0, 6.0, 0.0, 5.0, 0.0])
    assert torch.equal(layer.dense_weight(), expected)
    assert layer.mask()[3].tolist() == [False] * 4 + [True] * 4 and layer.topology.nnz == 8


def test_srigl_layers_without_ablation():
    for no_ablation, whole in ((None, "3"), (("0",), "0"), ((), None)):
        model, _, _ = start("srigl")
        method = SRigL(model, sgd(model), total_steps=24, interval=3, gamma_sal=1.0, no_ablation=no_ablation)
        train(model, method, batches(13))
        for name, layer in sm.sparse_layers(model).items():
            assert bool((layer.topology.row_ptr.diff() > 0).all()) == (name == whole)
    with pytest.raises(ValueError, match=r"no_ablation names no sparse layers \['7'\]"):
        SRigL(model, sgd(model), total_steps=24, interval=2, no_ablation=["7"])


def test_constant_fan_in_topologies():
    topology = Topology.random((40, 30), 0.35, constant_fan_in=True)
    assert topology.row_ptr.diff().tolist() == [10] * 40 and torch.ops.sparse_moon.check_index(*topology.index)[0] == 0
    assert topology.mask().sum(0).float().std() > 0
    assert Topology.random((4, 30), 0.001, constant_fan_in=True).row_ptr.diff().tolist() == [1] * 4
    assert Topology.random((4, 30), 0.0, constant_fan_in=True).num_blocks == 0
    assert Topology.random((8, 30), 0.5, (2, 2), constant_fan_in=True).row_ptr.diff().tolist() == [8, 8, 8, 8]


def test_errors():
    model = net()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match=r"layer '0' cannot be pruned from density 0\.2986 to 0\.5"):
        GMP(model, optimizer, total_steps=200, densities=0.5)
    with pytest.raises(ValueError, match=r"'granet' needs an update after start and before stop, got start 0\.75"):
        GraNet(model, optimizer, total_steps=200, densities=0.1, start=0.75)
    with pytest.raises(ValueError, match="needs an update"):
        GMP(model, optimizer, total_steps=20, densities=0.1)
    with pytest.raises(ValueError, match="gradient_weight must be at least 0, got -1"):
        MEST(model, optimizer, total_steps=200, gradient_weight=-1.0)
    for wrong in ({"forward_share": 0.0}, {"forward_share": 1.1}, {"penalty": -1.0}, {"stop": 0.0}):
        with pytest.raises(ValueError, match="forward_share must be in"):
            TopKAST(model, optimizer, total_steps=200, **wrong)
    with pytest.raises(ValueError, match=r"rows of different lengths in \['0', '3'\]"):
        SRigL(model, optimizer, total_steps=200)
    with pytest.raises(ValueError, match=r"gamma_sal must be in \[0, 1\], got 2"):
        SRigL(model, optimizer, total_steps=200, gamma_sal=2.0)
