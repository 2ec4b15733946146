"""Fine-tuning by low-rank factors on a topology."""

import contextlib
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from host_graph import Dispatched, HostGraph
from torch import nn

import sparse_moon as sm
from small_mlp import mlp, train
from sparse_moon.capture import step as capture_step


def network(dtype=torch.float32, pattern="unstructured"):
    layers = [nn.Conv2d(4, 16, 3, groups=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU()]
    head = [nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 4)]
    model = nn.Sequential(*layers, *head).to(dtype)
    exclude = ["0", "8"] if pattern != "unstructured" else ()
    return sm.sparsify(model, 0.5, "uniform", pattern=pattern, first_dense=False, exclude=exclude, fuse=False)


def lora(model, rank=2, **options):
    """With factors that do something."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="factors of rank")  # which are larger than such layers
        sm.lora(model, rank, **options)
    for name, parameter in model.named_parameters():
        if name.endswith("lora.B"):
            nn.init.normal_(parameter)
    return model


def images(dtype=torch.float32):
    return torch.randn(5, 4, 8, 8, dtype=dtype)


def expected_weight(layer):
    """Base plus masked product, by dense matrices: the specification."""
    base = layer.topology.to_dense(layer.values.detach())
    product = layer.lora.scale * (layer.lora.B @ layer.lora.A)
    return base + layer.topology.mask() * product


@pytest.mark.parametrize("pattern", ["unstructured", "vector4", "block4"])
def test_gradients_are_those_of_a_dense_reference(pattern):
    """In float64, through convolutions, groups and linear layers; only entries of the topology get the product."""
    layer = sm.SparseLinear(12, 8, sparsity=0.5, pattern=pattern).double()
    model = lora(nn.Sequential(layer), alpha=3.0)
    x = torch.randn(5, 12, dtype=torch.float64)
    model(x).square().sum().backward()
    A, B = (t.detach().clone().requires_grad_() for t in (layer.lora.A, layer.lora.B))
    weight = layer.topology.to_dense(layer.values.detach()) + layer.topology.mask() * (3.0 / 2 * (B @ A))
    F.linear(x, weight, layer.bias.detach()).square().sum().backward()
    torch.testing.assert_close(layer.lora.A.grad, A.grad)
    torch.testing.assert_close(layer.lora.B.grad, B.grad)
    assert layer.values.grad is None and layer.bias.grad is None


@pytest.mark.parametrize("pattern", ["unstructured", "vector4", "block4"])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(pattern, groups):
    conv = sm.SparseConv2d(8 * groups, 8, 3, groups=groups, sparsity=0.5, pattern=pattern).double()
    model = lora(nn.Sequential(conv))
    x = torch.randn(2, 8 * groups, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(conv.dense_weight() != 0, conv.mask())
    expected = F.conv2d(x, conv.dense_weight(), conv.bias, groups=groups)
    torch.testing.assert_close(model(x), expected)
    wanted = [conv.lora.A, conv.lora.B]
    found = torch.autograd.grad(model(x).square().sum(), wanted)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), wanted))
    torch.testing.assert_close(conv.topology.to_dense(conv.effective_values()), expected_weight(conv))


def test_it_starts_where_the_model_is():
    model = network().eval()
    x = images()
    before = model(x)
    sparsities = sm.layer_sparsities(model)
    with pytest.warns(UserWarning, match=r"factors of rank 8 have no fewer numbers than the values of 0, "):
        assert sm.lora(model) is model
    assert torch.equal(model(x), before)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"A", "B"}
    assert sm.layer_sparsities(model) == sparsities
    assert sm.overall_sparsity(model) == pytest.approx(0.5, abs=0.01), "factors are no weights of the network"
    assert "rank=8, scale=1" in repr(model) and "scale=2" in repr(lora(network(), 2, alpha=4.0))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 0.0), (torch.float64, 0.0), (torch.bfloat16, 0.0)])
def test_merged_is_the_same(dtype, tolerance):
    plain = network(dtype)
    names, indices = (
        list(plain.state_dict()),
        [layer.topology.col.clone() for layer in sm.sparse_layers(plain).values()],
    )
    trains = {name for name, parameter in plain.named_parameters() if parameter.requires_grad}
    model = lora(plain).eval()
    x = images(dtype)
    before, weights = model(x), [layer.dense_weight() for layer in sm.sparse_layers(model).values()]
    assert sm.merge_lora(model) is model
    torch.testing.assert_close(model(x), before, rtol=tolerance, atol=tolerance)
    for layer, weight, col in zip(sm.sparse_layers(model).values(), weights, indices, strict=True):
        assert torch.equal(layer.dense_weight(), weight) and torch.equal(layer.topology.col, col)
    assert list(model.state_dict()) == names
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trains
    assert torch.equal(sm.merge_lora(model)(x), model(x)), "nothing is left to merge"


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_training_moves_the_factors_alone(make):
    torch.manual_seed(0)
    model = mlp()
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters()}
    lora(model)
    optimizer = make(sm.param_groups(model, 1e-4), lr=0.01)
    method = sm.Static(model, optimizer)
    x, y = torch.randn(32, 64), torch.randint(0, 8, (32,))
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        method.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name])


def test_what_trains_besides():
    model = lora(network(), train="8", exclude="3")
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == {"0.lora.A", "0.lora.B", "6.lora.A", "6.lora.B", "8.values", "8.bias"}
    sm.merge_lora(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_was_frozen_stays_frozen():
    model = network()
    model[0].values.requires_grad_(False)
    sm.merge_lora(lora(model))
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["0.values"]


def test_dense_layers_are_frozen():
    model = sm.sparsify(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), 0.5, exclude="2")
    sm.lora(model, 2)
    assert not model[2].weight.requires_grad and not hasattr(model[2], "lora")
    assert not model[2].bias.requires_grad


def test_a_shared_weight_has_shared_factors():
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    second.weight = first.weight
    model = lora(sm.sparsify(nn.Sequential(first, nn.ReLU(), second), 0.5, "uniform", first_dense=False))
    assert model[0].lora is model[2].lora
    x = torch.randn(3, 16)
    before = model(x)
    sm.merge_lora(model)
    assert model[0].lora is None and model[2].lora is None
    assert torch.equal(model(x), before) and model[0].values is model[2].values


def test_copies_and_state_dicts():
    model = lora(network(), alpha=6.0).eval()
    x = images()
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    copied[0].lora.B.data.zero_()
    assert not torch.equal(copied(x), model(x))
    other = lora(network()).eval()  # other values, topology and scale
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*lora.A"):
        other.load_state_dict(network().state_dict())
    factors = {name: t for name, t in model.state_dict().items() if ".lora." in name}
    base = sm.merge_lora(copy.deepcopy(model))
    with torch.no_grad():  # the base's own values again
        for mine, theirs in zip(sm.sparse_layers(base).values(), sm.sparse_layers(model).values(), strict=True):
            mine.values.copy_(theirs.values)
    lora(base).load_state_dict(factors, strict=False)
    assert torch.equal(base(x), model(x))


def test_saved_and_loaded(tmp_path):
    model = lora(network(), alpha=6.0).eval()
    sm.save(model, tmp_path)
    x = images()
    other = lora(network()).eval()
    assert torch.equal(sm.load(tmp_path, other)(x), model(x))
    plain = network().eval()
    with pytest.raises(ValueError, match=r"the model has no 0.lora.A.*make the model sparse and call sm.lora with"):
        sm.load(tmp_path, plain)
    sm.save(sm.merge_lora(model), tmp_path)
    assert torch.equal(sm.load(tmp_path, plain)(x), model(x))
    with pytest.raises(ValueError, match=r"the folder has no 0.lora.A.*or merge_lora before"):
        sm.load(tmp_path, other)


@pytest.mark.parametrize("method", [sm.RigL, sm.SET, sm.MEST, sm.SRigL])
def test_methods_that_move_weights_refuse(method):
    model = lora(mlp())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    with pytest.raises(ValueError, match=r"the factors of sm.lora do not move, those of \['0', '2'\]: sm.merge_lora"):
        method(model, optimizer, total_steps=100, interval=10)


def test_layers_without_factors_may_move():
    """And those with factors may not, where somebody lets their values train."""
    model = lora(mlp(), train="0")
    method = sm.RigL(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=100, interval=10)
    assert list(method.layers) == ["0"] and list(method.untouched) == ["2"]
    model[2].values.requires_grad_(True)
    with pytest.raises(ValueError, match=r"do not move, those of \['2'\]"):
        sm.RigL(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=100, interval=10)


def test_methods_go_on_after_the_merge():
    model = sm.merge_lora(lora(mlp()))
    before = model[0].topology.col.clone()
    train(model)
    assert not torch.equal(model[0].topology.col, before)


def test_densified():
    model = lora(network()).eval()
    x = images()
    before = model(x)
    dense = sm.densify(copy.deepcopy(model))
    assert type(dense[0]) is nn.Conv2d
    torch.testing.assert_close(dense(x), before)


def test_matrices_are_those_of_the_product():
    layer = lora(mlp())[0]
    torch.testing.assert_close(torch.from_numpy(sm.to_scipy(layer).toarray()), layer.dense_weight().detach())


def test_random_masks_hide_values_with_their_factors():
    model = lora(mlp())
    mask = sm.RandomMask(model, keep=0.5)
    mask.draw()
    layer = model[0]
    hidden = ~mask.mask(0, layer)
    assert layer.effective_values()[hidden].eq(0).all() and hidden.any()
    model(torch.randn(4, 64)).sum().backward()
    mask.clear()
    torch.testing.assert_close(layer.topology.to_dense(layer.effective_values()), expected_weight(layer))


def test_averages():
    model = lora(mlp())
    average = sm.EMA(model, decay=0.5)
    average.update(model)
    copied = copy.deepcopy(model)
    average.copy_to(copied)
    x = torch.randn(3, 64)
    torch.testing.assert_close(copied(x), model(x))


def test_compiled():
    model = lora(mlp())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 64)
    expected, found = model(x), compiled(x)
    torch.testing.assert_close(found, expected)
    wanted = [p for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), wanted), torch.autograd.grad(expected.square().sum(), wanted)
    )


def test_in_autocast():
    model = lora(mlp())
    x = torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    found.float().sum().backward()
    assert model[0].lora.B.grad.dtype == torch.float32
    torch.testing.assert_close(found.float(), model(x), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("options, message", [
    ({"rank": 0}, "rank must be at least 1, got 0"),
    ({"alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
    ({"alpha": float("nan")}, "alpha must be positive and finite, got nan"),
    ({"exclude": "nowhere"}, "exclude 'nowhere' matches no module"),
    ({"train": "nowhere"}, "train 'nowhere' matches no module"),
    ({"exclude": "*"}, "no sparse layer is to have factors"),
])  # fmt: skip
def test_errors_leave_the_model_as_it_was(options, message):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        sm.lora(model, **options)
    assert model[0].lora is None and all(parameter.requires_grad for parameter in model.parameters())


def test_models_that_cannot_have_factors():
    with pytest.raises(ValueError, match=r"call sparsify\(model, ...\) first"):
        sm.lora(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="has factors already: merge_lora"):
        sm.lora(lora(mlp()))
    with pytest.raises(ValueError, match="before DataParallel wraps it"):
        sm.lora(nn.DataParallel(mlp()))


def test_exported_to_onnx_it_is_merged(tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    from sparse_moon.formats.onnx import to_onnx

    model = lora(mlp())
    to_onnx(model, (torch.randn(2, 64),), tmp_path / "model.onnx", sparse=True)
    assert model[0].lora is not None, "the model itself stays as it is"
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    values = model[0].effective_values().detach()
    assert any(torch.equal(torch.from_numpy(t.copy()), values) for t in tensors.values() if t.shape == values.shape)


def test_a_captured_step_trains_the_factors_to_the_same_bits(monkeypatch):
    monkeypatch.setattr(capture_step, "StepGraph", HostGraph)

    def trained(captured):
        torch.manual_seed(0)
        model = lora(mlp(), 1)
        optimizer = torch.optim.AdamW(sm.param_groups(model, 0.01), torch.tensor(0.01), capturable=True, fused=True)
        method = sm.Static(model, optimizer)

        def eager(x, y):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            method.step()
            optimizer.zero_grad()
            return loss.detach()

        step = sm.CapturedStep(eager, method, model) if captured else eager
        batches = [(torch.randn(8, 64), torch.randint(7, (8,))) for _ in range(8)]
        with contextlib.nullcontext() if captured else Dispatched():
            losses = [float(step(*batch)) for batch in batches]
        assert not captured or (step.captures, step.reason) == (1, None)
        return losses, model.state_dict()

    (losses, state), (found, captured) = trained(False), trained(True)
    assert found == losses
    assert state.keys() == captured.keys() and all(torch.equal(state[name], captured[name]) for name in state)
