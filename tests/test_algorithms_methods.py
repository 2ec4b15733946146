"""Methods beyond SET and RigL: each against a simulation with dense weights and masks, written from its paper."""

import math

import pytest
import torch
import torch.nn.functional as F

import sparse_moon as sm
from small_methods import BATCHES, batches, net, sgd, train
from sparse_moon.algorithms import GMP, MEST, GraNet, SRigL, TopKAST
from sparse_moon.ops.bernoulli_mask import philox

LAYERS = ("0", "3")


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
