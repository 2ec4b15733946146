"""What holds for updates of every method beyond SET and RigL: resuming, state, blocks, ties, overflows."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparse_moon as sm
from small_methods import batch, batches, net, sgd, train
from sparse_moon.algorithms import GMP, MEST, GraNet, SRigL, TopKAST
from sparse_moon.topology import Topology


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
    for fill in (None, 0.5):
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


def test_srigl_compares_with_the_share_as_it_is_written():
    """0.3 of a fan-in of 50 are 15; in float32 the product is above."""
    mask = torch.zeros(2, 100, dtype=torch.bool)
    mask[:, :50] = True
    model = nn.Sequential(sm.SparseLinear.from_dense(nn.Linear(100, 2), mask))
    method = SRigL(
        model, torch.optim.SGD(model.parameters(), 0.0), total_steps=30, interval=1, gamma_sal=0.3, no_ablation=(),
        drop_fraction=sm.Constant(1.0),
    )  # fmt: skip
    x = torch.full((2, 100), 0.001)
    x[0, :15] = x[1, :85] = 1.0  # the largest gradients, 15 in row 0 and 85 in row 1
    for _ in range(2):
        model(x).diagonal().sum().backward()
        method.step()
        method.optimizer.zero_grad()
    assert model[0].topology.row_ptr.diff().tolist() == [50, 50]


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


def test_top_kast_keeps_the_order_of_layers_where_one_was_frozen():
    def network():
        torch.manual_seed(0)
        layers = [nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)]
        model = sm.sparsify(nn.Sequential(*layers), 0.5, "uniform", first_dense=False)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        return model, TopKAST(model, optimizer, total_steps=20, interval=3)

    model, method = network()
    for step in range(6):
        if step == 2:
            model[2].values.requires_grad_(False)
        model(torch.randn(8, 16)).square().mean().backward()
        method.step()
        method.optimizer.zero_grad()
    other, resumed = network()
    other.load_state_dict(model.state_dict())
    other[2].values.requires_grad_(False)
    resumed.load_state_dict(method.state_dict())
    for place in (0, 2, 4):
        assert torch.equal(other[place].values, model[place].values)


def test_top_kast_needs_a_batch_to_end_with():
    model = sm.sparsify(nn.Linear(16, 16), 0.5)
    with pytest.raises(ValueError, match=r"number stop \* total_steps, at least 1, got 0.004 \* 100"):
        TopKAST(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=100, stop=0.004)


def test_top_kast_starts_from_attentions_and_from_shared_weights():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.MultiheadAttention(64, 4))
    model[1].weight = model[0].weight
    densities = sm.layer_densities(model, 0.8, "uniform", first_dense=False)
    assert list(densities) == ["0", "2.q_proj", "2.k_proj", "2.v_proj", "2.out_proj"]
    start = TopKAST.start_sparsity(TopKAST.Options(forward_share=0.5), 0.8, model, densities)
    assert start == pytest.approx(0.6) and type(model[2]) is nn.MultiheadAttention


@pytest.mark.parametrize("kind", ["granet", "mest-soft"])
def test_a_last_update_that_overflowed_is_made_up_for(kind):
    expected, _, method = start(kind, stop=0.85)
    train(expected, method, batches(24))
    torch.manual_seed(6)
    model = net(0.6).float()
    method = make(kind, model, sgd(model), stop=0.85)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    updates = []
    for t, (x, y) in enumerate(batches(24)):
        scaler.scale(F.cross_entropy(model(x.float() * (math.inf if t == method.last_update else 1.0)), y)).backward()
        if method.step(scaler):
            updates.append(t)
        method.optimizer.zero_grad()
    assert method.last_update == 18 == updates[-1] - 1 and method.unfinished is None
    counts = [layer.topology.num_blocks for layer in sm.sparse_layers(model).values()]
    assert counts == [layer.topology.num_blocks for layer in sm.sparse_layers(expected).values()]


def test_a_final_density_that_was_missed_is_said():
    model, _, method = start("top-kast")
    for t, data in enumerate(batches(24)):
        model[3].requires_grad_(t < 10)
        train(model, method, [data])
    assert method.unfinished.startswith("method 'top-kast' did not bring ['3'] to their final density")


@pytest.mark.parametrize("kind", ["set", "rigl", "mest", "srigl", "granet"])
def test_a_layer_whose_gradient_is_all_zeros_is_not_exchanged(kind):
    model, _, method = start(kind)
    kept = model[3].topology.mask()
    for x, y in batches(24):  # the first layer learns, of the other the output counts nothing
        (model[0](x).square().mean() + F.cross_entropy(model(x), y) * 0.0).backward()
        method.step()
        method.optimizer.zero_grad()
    if kind == "granet":  # it is pruned, and grows nothing
        assert model[3].topology.num_blocks < kept.sum() and kept[model[3].topology.mask()].all()
    else:
        assert torch.equal(model[3].topology.mask(), kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_srigl_counts_exactly_in_16_bits(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 101, bias=False)).to(dtype)
    sm.sparsify(model, 1 - 61 / 128, "uniform", selection="constant_fan_in", first_dense=False)
    method = SRigL(model, sgd(model), total_steps=10, interval=1, gamma_sal=0.0)
    for _ in range(6):
        model(torch.randn(16, 128, dtype=dtype)).square().mean().backward()
        method.step()
        method.optimizer.zero_grad()
        assert model[0].topology.row_ptr.diff().tolist() == [61] * 101
