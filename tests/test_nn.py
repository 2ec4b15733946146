import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparse_moon as sm
from sparse_moon.nn import SparseLayer, layer_densities


def small_net():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, "valid"), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 9, 32), nn.ReLU(), nn.Linear(32, 4),
    )  # fmt: skip


def test_same_constructor_and_defaults_as_torch():
    linear, conv = sm.SparseLinear(6, 4, sparsity=0.5), sm.SparseConv2d(3, 4, 3, sparsity=0.5)
    assert linear.bias.shape == (4,) and linear.values.shape == (12,) and linear.values.dtype == torch.float32
    assert (conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode) == (
        (1, 1), (0, 0), (1, 1), 1, "zeros",
    )  # fmt: skip
    assert sm.SparseLinear(6, 4, False, "cpu", torch.float64, sparsity=0.5).values.dtype == torch.float64
    assert sm.SparseConv2d(4, 4, (1, 3), 2, "valid", 1, 2, False, "circular", sparsity=0.5).bias is None
    assert [n for n, _ in linear.named_parameters()] == ["values", "bias"]


def test_initial_values_have_the_dense_range():
    layer, dense = sm.SparseConv2d(16, 64, 3, sparsity=0.5), nn.Conv2d(16, 64, 3)
    assert layer.values.abs().max() <= 1 / 12 and layer.values.std().item() == pytest.approx(
        dense.weight.std().item(), rel=0.05
    )


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_bad_sparsity(sparsity):
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\)"):
        sm.SparseLinear(4, 4, sparsity=sparsity)
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\)"):
        sm.sparsify(small_net(), sparsity)


def test_bad_arguments_keep_torchs_messages():
    with pytest.raises(ValueError, match="in_channels must be divisible by groups"):
        sm.SparseConv2d(3, 4, 3, groups=2, sparsity=0.5)
    with pytest.raises(ValueError, match="does not divide"):
        sm.SparseConv2d(3, 4, 3, sparsity=0.5, pattern="block2")
    with pytest.raises(ValueError, match="pattern must be"):
        sm.SparseLinear(4, 4, sparsity=0.5, pattern="blocky")


@pytest.mark.parametrize("pattern", ["unstructured", "vector4", "block2"])
def test_from_and_to_dense(pattern):
    dense = nn.Conv2d(4, 8, 3, bias=False).eval()
    dense.weight.requires_grad_(False)
    sparse = sm.SparseConv2d.from_dense(dense, sparsity=0.7, pattern=pattern)
    assert not sparse.training and not sparse.values.requires_grad
    back = sparse.to_dense()
    assert type(back) is nn.Conv2d and not back.training and not back.weight.requires_grad
    assert torch.equal(back.weight, dense.weight * sparse.mask())
    again = sm.SparseConv2d.from_dense(back, back.weight != 0, pattern=pattern)
    assert torch.equal(again.values, sparse.values) and again.topology.same_as(sparse.topology)


def test_from_dense_by_magnitude():
    dense = nn.Linear(10, 10)
    sparse = sm.SparseLinear.from_dense(dense, sparsity=0.8, selection="magnitude")
    assert sparse.values.abs().min() >= dense.weight[~sparse.mask()].abs().max()


def test_blocks_of_a_convolution_by_magnitude():
    dense = nn.Conv2d(8, 12, 3)
    sparse = sm.SparseConv2d.from_dense(dense, sparsity=0.75, pattern="block2", selection="magnitude")
    sums = dense.weight.detach().abs().view(6, 2, 4, 2, 9).sum((1, 3), keepdim=True)  # two channels by two, at one tap
    kept = sums >= sums.flatten().topk(54).values[-1]
    assert torch.equal(sparse.mask(), kept.expand(6, 2, 4, 2, 9).reshape(12, 8, 3, 3))


def test_from_dense_errors():
    dense = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="either a mask or a sparsity"):
        sm.SparseLinear.from_dense(dense)
    with pytest.raises(ValueError, match=r"weight's shape \(4, 3\)"):
        sm.SparseLinear.from_dense(dense, torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="selection must be"):
        sm.SparseLinear.from_dense(dense, sparsity=0.5, selection="best")


def test_single_image_without_batch_dimension():
    layer = sm.SparseConv2d(2, 3, 3, padding=1, sparsity=0.5)
    x = torch.randn(2, 5, 5)
    assert torch.equal(layer(x), layer(x[None])[0])


def test_outputs_without_weights_are_not_live():
    topology = sm.Topology(torch.tensor([0, 2, 9]), (4, 5))  # rows 0, 0 and 1
    layer = sm.SparseLinear(5, 4, sparsity=0.85)
    layer.topology = topology
    assert sm.live_outputs(nn.Sequential(layer, nn.Linear(4, 2))) == {"0": 0.5, "1": 1.0}


def test_sparsify_reaches_the_sparsity_and_densify_inverts_it():
    model = small_net()
    assert sm.sparsify(model, 0.9) is model
    assert sm.overall_sparsity(model) == pytest.approx(0.9, abs=0.001)
    assert sm.layer_sparsities(model).keys() == {"0", "3", "6", "8"}
    x = torch.randn(2, 1, 8, 8)
    expected = model.eval()(x)
    assert sm.densify(model) is model
    assert not sm.sparse_layers(model) and type(model[0]) is nn.Conv2d
    torch.testing.assert_close(model(x), expected)


def test_layers_with_density_one_stay_dense_modules():
    model = sm.sparsify(small_net(), 0.5, "uniform")
    assert type(model[0]) is nn.Conv2d and isinstance(model[3], sm.SparseConv2d)
    assert not sm.sparse_layers(sm.sparsify(small_net(), 0.0))


@pytest.mark.parametrize(
    "exclude",
    ["0", ["[03]"], nn.Conv2d, lambda name, module: isinstance(module, nn.Conv2d), ("0", lambda n, m: n == "3")],
)
def test_exclude(exclude):
    model = sm.sparsify(small_net(), 0.8, exclude=exclude)
    assert type(model[0]) is nn.Conv2d and isinstance(model[6], sm.SparseLinear)


def test_exclude_everything():
    with pytest.raises(ValueError, match="no linear or 2-d convolution"):
        sm.sparsify(small_net(), 0.8, exclude="*")


def test_a_model_that_is_one_layer():
    layer = sm.sparsify(nn.Linear(10, 10), 0.5)
    assert isinstance(layer, sm.SparseLinear) and type(sm.densify(layer)) is nn.Linear


def test_indivisible_layers_stay_dense_with_a_warning():
    with pytest.warns(UserWarning, match=r"block \(8, 8\) does not divide these layers, they stay dense: \['0', '8'\]"):
        model = sm.sparsify(small_net(), 0.8, "uniform", pattern="block8", first_dense=False)
    assert isinstance(model[3], sm.SparseConv2d) and model[3].topology.block == (8, 8)


def test_already_sparse_layers_are_left_alone():
    model = nn.Sequential(sm.SparseLinear(8, 8, sparsity=0.25), nn.Linear(8, 8))
    first = model[0]
    sm.sparsify(model, 0.5)  # 16 of 64 are gone, 48 more make the half of 128
    assert model[0] is first and model[1].sparsity == 0.75


def test_one_module_in_two_places():
    shared = nn.Linear(8, 8)
    model = sm.sparsify(nn.Sequential(shared, nn.ReLU(), shared), 0.5)
    assert model[0] is model[2] and len(sm.sparse_layers(model)) == 1
    sm.densify(model)
    assert model[0] is model[2] and type(model[0]) is nn.Linear


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    sm.sparsify(model, 0.5)
    assert model[0].values is model[2].values and model[0].topology is model[2].topology
    assert model[0].bias is not model[2].bias and len(sm.sparse_layers(model)) == 1
    sm.densify(model)
    assert model[0].weight is model[2].weight


class OwnAttention(nn.MultiheadAttention):
    pass


def test_weights_tied_to_an_embedding_and_subclasses_stay_dense():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.attention = nn.Embedding(8, 8), OwnAttention(8, 2)
            self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
            self.head.weight = self.embedding.weight

    with pytest.warns(UserWarning, match=r"dense stay OwnAttention \(50\.0%\), Embedding \(16\.7%\), Multihe"):
        model = sm.sparsify(Model(), 0.5)
    assert list(sm.sparse_layers(model)) == ["inner"] and model.head.weight is model.embedding.weight


def test_input_size_orders_by_use_and_restores_modes():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x):
            return self.second(self.norm(self.first(x)))

    model = Backwards()
    model.norm.eval()
    sm.sparsify(model, 0.5, "uniform", input_size=(8,))
    assert type(model.first) is nn.Linear and isinstance(model.second, sm.SparseLinear)
    assert model.training and not model.norm.training and model.norm.num_batches_tracked == 0
    assert not model.first._forward_pre_hooks
    assert type(sm.sparsify(Backwards(), 0.5, "uniform").second) is nn.Linear


def test_topology_follows_the_seed():
    torch.manual_seed(1)
    a = sm.sparsify(small_net(), 0.9)
    torch.manual_seed(1)
    b = sm.sparsify(small_net(), 0.9)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_state_dict_round_trip_and_size_mismatch():
    source, target = sm.sparsify(small_net(), 0.9).eval(), sm.sparsify(small_net(), 0.9).eval()
    x = torch.randn(2, 1, 8, 8)
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(x), target(x))
    layer = sm.SparseLinear(6, 4, sparsity=0.5)
    with pytest.raises(RuntimeError, match=r"size mismatch for topology\.row_ptr"):
        sm.SparseLinear(6, 8, sparsity=0.5).load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="columns outside"):
        sm.SparseLinear(4, 4, sparsity=0.5).load_state_dict(sm.SparseLinear(6, 4, sparsity=0.0).state_dict())


@pytest.mark.parametrize("pattern", ["unstructured", "block2"])
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_with_another_number_of_weights(pattern, assign):
    source, target = (sm.SparseLinear(6, 4, sparsity=s, pattern=pattern) for s in (0.5, 0.0))
    x, values = torch.randn(3, 6), target.values
    target(x).sum().backward()
    target.load_state_dict(source.state_dict(), assign=assign)
    assert (target.values is values) is not assign and target.values.grad is None
    assert target.topology.same_as(source.topology) and torch.equal(target(x), source(x))
    x.requires_grad_()
    target(x).square().sum().backward()
    assert target.values.grad.shape == source.values.shape and x.grad is not None


def test_constant_fan_in():
    layer = sm.SparseConv2d.from_dense(nn.Conv2d(3, 8, 3), sparsity=0.6, selection="constant_fan_in")
    assert layer.topology.row_ptr.diff().tolist() == [round(0.4 * 27)] * 8


def test_sparsify_for_a_training_that_prunes():
    densities = layer_densities(small_net(), 0.9)
    for start, full in ((0.0, True), (0.5, False)):
        model = sm.sparsify(small_net(), 0.9, start_sparsity=start)
        layers = sm.sparse_layers(model)
        assert layers.keys() == {name for name, density in densities.items() if density < 1.0}
        assert all((layer.sparsity == 0.0) == full or layer.topology.nnz > 0 for layer in layers.values())
        assert all(1.0 - layer.sparsity >= densities[name] - 1e-3 for name, layer in layers.items())
    with pytest.raises(ValueError, match=r"start_sparsity must be at most the sparsity 0.5, got 0.6"):
        sm.sparsify(small_net(), 0.5, start_sparsity=0.6)


def test_deepcopy_is_independent():
    model = sm.sparsify(small_net(), 0.9)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[6].values.zero_()
        twin[6].topology.col.zero_()
    assert model[6].values.any() and model[6].topology.col.any()


def test_meta_device():
    with torch.device("meta"):
        model = sm.sparsify(small_net(), 0.9)
    assert model(torch.empty(2, 1, 8, 8, device="meta")).shape == (2, 4)


def test_compile_without_graph_breaks():
    model = sm.sparsify(small_net(), 0.8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 1, 8, 8)
    model(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    compiled(x).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


def test_autocast_computes_in_low_precision_and_keeps_float32_gradients():
    model = sm.sparsify(small_net(), 0.8)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(3, 1, 8, 8))
        assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    layers = [m for m in model.modules() if isinstance(m, SparseLayer)]
    assert all(m.values.grad.dtype == torch.float32 and m.values.grad.any() for m in layers)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_autocast_leaves_float64_as_torch_does(kind):
    dense, shape = (nn.Linear(12, 8), (3, 12)) if kind == "linear" else (nn.Conv2d(4, 6, 3), (2, 4, 5, 5))
    dense = dense.double()
    layer = (sm.SparseLinear if kind == "linear" else sm.SparseConv2d).from_dense(dense, sparsity=0.0)
    x = torch.randn(shape, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = layer(x), dense(x)
    assert output.dtype is expected.dtype is torch.float64
    torch.testing.assert_close(output, expected)


def test_gradient_checkpointing():
    model = sm.sparsify(small_net(), 0.8).eval()
    x = torch.randn(3, 1, 8, 8)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_repr_says_what_it_is():
    text = repr(sm.SparseConv2d(8, 8, 3, sparsity=0.75, pattern="block2"))
    assert "sparsity=0.7500" in text and "'block2'" in text


def test_no_warnings_in_ordinary_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sm.sparsify(small_net(), 0.9)(torch.randn(2, 1, 8, 8)).sum().backward()
