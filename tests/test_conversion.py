"""What `sparsify` says about what it did not do, what counts as a weight, and the table of a model."""

import copy
import warnings
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import sparse_moon as sm
from sparse_moon.nn import weight_layers


def said(function, *arguments, **options):
    """The result, and the one warning, or an empty string."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*arguments, **options)
    texts = [str(w.message) for w in caught if not issubclass(w.category, FutureWarning)]
    assert len(texts) <= 1
    return result, "".join(texts)


def mlp(*sizes):
    return nn.Sequential(*[nn.Linear(i, o) for i, o in pairwise(sizes)])


class StandardisedConv2d(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias, self.stride, self.padding)


class Factors(nn.Module):
    """A weight of its own, (in, out), that no class of torch has."""

    def __init__(self, i, o):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(i, o))

    def forward(self, x):
        return x @ self.weight


DENSE = {
    "LSTM": lambda: nn.LSTM(64, 256),
    "GRU": lambda: nn.GRU(64, 256),
    "RNN": lambda: nn.RNN(64, 256),
    "Conv1d": lambda: nn.Conv1d(64, 256, 3),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(64, 256, 3),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(64, 256, 3),
    "Conv3d": lambda: nn.Conv3d(64, 256, 3),
    "Embedding": lambda: nn.Embedding(1000, 256),
    "Bilinear": lambda: nn.Bilinear(64, 64, 16),
    "StandardisedConv2d": lambda: StandardisedConv2d(64, 128, 3),
    "Factors": lambda: Factors(128, 256),
    "ParametrizedLinear": lambda: parametrizations.weight_norm(nn.Linear(128, 256)),
    "ParametrizedConv2d": lambda: parametrizations.spectral_norm(nn.Conv2d(32, 64, 3)),
    "Linear with a computed weight": lambda: prune.random_unstructured(nn.Linear(128, 256), "weight", 0.5),
    "Conv2d with a computed weight": lambda: nn.utils.spectral_norm(nn.Conv2d(32, 64, 3)),
}


@pytest.mark.parametrize("kind", DENSE)
def test_a_shortfall_is_said_with_the_types_that_stayed_dense(kind):
    model = nn.ModuleDict({"other": DENSE[kind](), "first": nn.Linear(64, 64), "head": nn.Linear(64, 64)})
    _, text = said(sm.sparsify, model, 0.5)
    reached = sm.overall_sparsity(model)
    assert reached < 0.3 and f"a sparsity of 0.5 was asked for, {reached:.3f} of the weights are left out" in text
    summary = sm.summary(model)
    assert summary.sparsity == pytest.approx(reached)
    assert f"dense stay {kind} ({summary.dense_share[kind]:.1%})" in text
    assert summary.dense_share[kind] == pytest.approx(
        1 - sum(r.weights for r in summary.rows if r.pattern) / summary.weights
    )
    if kind != "Linear with a computed weight":  # whose type is that of layers that are converted
        _, text = said(sm.sparsify, sm.densify(model), 0.5, exclude=type(model["other"]))
        assert text == ""  # meant to stay dense


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.95])
def test_what_rules_keep_dense_and_trivial_shares_are_no_shortfall(sparsity):
    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions = nn.Parameter(torch.zeros(1, 10, 16))
            self.layers = mlp(256, 256, 256, 16)
            self.norm = nn.LayerNorm((10, 256))

    for options in ({}, {"allocation": "uniform"}, {"exclude": "layers.2"}, {"exclude": nn.Linear}, {"exclude": "*.2"}):
        if options.get("exclude") is not nn.Linear:
            assert said(sm.sparsify, Vision(), sparsity, **options)[1] == ""


def test_rounding_that_misses_the_sparsity_is_said():
    for selection, pattern, reason in (
        ("constant_fan_in", "unstructured", "rounding to whole blocks or rows"),
        ("random", "block32", "rounding to whole blocks or rows"),
    ):
        model, text = said(sm.sparsify, mlp(64, 96, 64), 0.99, "uniform", first_dense=False, selection=selection,
                           pattern=pattern)  # fmt: skip
        assert abs(sm.overall_sparsity(model) - 0.99) > 0.001
        assert "a sparsity of 0.99 was asked for" in text and reason in text


def test_layers_and_outputs_without_weights_are_said():
    _, text = said(sm.sparsify, mlp(64, 64, 64, 64), 0.8, "uniform", first_dense=False, pattern="block64")
    assert "no weight is left in 0, 1, 2" in text
    model, text = said(sm.sparsify, mlp(16, 200, 200), 0.9, "uniform", first_dense=False)
    dead = round((1 - sm.live_outputs(model)["0"]) * 200)
    count = f"{dead} of 400 outputs have no weight, most of them in '0' ({dead} of 200)"
    assert dead > 20 and text == f"{count}; see sparse_moon.live_outputs(model)"


def test_a_training_that_prunes_is_held_to_its_end():
    model = nn.ModuleList([nn.LSTM(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)])
    _, text = said(sm.sparsify, model, 0.9, start_sparsity=0.0)
    assert "a sparsity of 0.9 was asked for, 0.180 of the weights" in text and "LSTM (80.0%)" in text
    assert said(sm.sparsify, mlp(64, 64, 64), 0.9, start_sparsity=0.0)[1] == ""


def test_an_exclude_that_matches_nothing_is_an_error_with_what_is_close():
    for call in (sm.sparsify, sm.layer_densities):
        model = nn.Sequential()
        model.body, model.head = nn.Linear(8, 8), nn.Linear(8, 8)
        with pytest.raises(ValueError, match=r"exclude 'heda' matches no module.*did you mean.*'head'"):
            call(model, 0.5, exclude="heda")
        with pytest.raises(ValueError, match=r"'heda\*'"):
            call(model, 0.5, exclude=["body", "heda*"])
        with pytest.raises(ValueError, match=r"'head\.weight'.*did you mean.*'head'"):
            call(model, 0.5, exclude="head.weight")
        assert type(model.head) is nn.Linear


@pytest.mark.parametrize("exclude", ["stage", "stag?", nn.ModuleList])
def test_excluding_a_container_excludes_what_is_in_it(exclude):
    model = nn.Sequential()
    model.stage, model.head = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)]), nn.Linear(32, 32)
    sm.sparsify(model, 0.5, exclude=exclude)
    assert list(sm.sparse_layers(model)) == ["head"]


def test_what_shares_an_excluded_weight_is_excluded():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].weight = model[0].weight
    sm.sparsify(model, 0.5, exclude="0")
    assert list(sm.sparse_layers(model)) == ["2"] and model[1].weight is model[0].weight
    shared = nn.Linear(32, 32)
    model = sm.sparsify(nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(32, 32)}), 0.5, exclude="a")
    assert model["a"] is model["b"] is shared


def test_sparsify_again_keeps_what_is_asked_for():
    model = sm.sparsify(mlp(64, 256, 256, 4), 0.9)
    assert type(model[2]) is nn.Linear  # by its allocation
    before = copy.deepcopy(model.state_dict())
    sm.sparsify(model, 0.9)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for asked in (0.5, 0.99):
        with pytest.raises(
            ValueError, match=rf"sparsity {asked} cannot be reached: the layers that are sparse already"
        ):
            sm.sparsify(model, asked)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    model = sm.sparsify(mlp(256, 256, 256, 256), 0.6, exclude=["1", "2"])
    sm.sparsify(model, 0.8)
    assert sm.overall_sparsity(model) == pytest.approx(0.8, abs=1e-3)
    assert sm.layer_sparsities(model) == pytest.approx({"0": 0.6, "1": 0.9, "2": 0.9}, abs=1e-3)

    model = sm.sparsify(mlp(256, 256, 256, 256), 0.9, exclude="2")
    sm.sparsify(model, 0.5, exclude=["0", "1"])  # a sparsity of its own
    assert sm.layer_sparsities(model) == pytest.approx({"0": 0.9, "1": 0.9, "2": 0.5}, abs=1e-3)

    model = sm.sparsify(mlp(64, 64, 64, 64), 0.75, "uniform")
    assert type(sm.sparsify(model, 0.75, "uniform")[0]) is nn.Linear


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "hooks: weight_norm": nn.utils.weight_norm,
    "hooks: spectral_norm": nn.utils.spectral_norm,
    "hooks: prune": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_count_once_each_and_always(kind):
    def build():
        return nn.Sequential(*[COMPUTED[kind](nn.Linear(16, 16)) for _ in range(10)], *mlp(*[16] * 11))

    model = build()
    said(sm.sparsify, model, 0.9, "uniform", first_dense=False)
    assert len(weight_layers(model)) == 20 and len(sm.sparse_layers(model)) == 10
    state = copy.deepcopy(model.state_dict())
    for _ in range(3):
        assert sm.overall_sparsity(model) == sm.linear_conv2d_sparsity(model) == pytest.approx(0.45, abs=1e-3)
        assert sm.summary(model).weights == 20 * 256
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="no linear or 2-d"):
        sm.sparsify(COMPUTED[kind](nn.Linear(16, 16)), 0.5)


def test_overall_sparsity_counts_all_weights_and_the_other_the_layers():
    model = nn.ModuleList([nn.Embedding(32, 16), nn.LSTM(16, 16), nn.LayerNorm((4, 16)), *mlp(16, 32, 16)])
    model[4].weight = nn.Parameter(model[3].weight.detach().t())
    said(sm.sparsify, model, 0.5, "uniform", first_dense=False)
    sizes = {"embedding": 32 * 16, "lstm": 2 * 64 * 16, "linear": 2 * 512}
    assert sm.overall_sparsity(model) == pytest.approx(512 / sum(sizes.values()))
    assert sm.linear_conv2d_sparsity(model) == 0.5
    tied = nn.ModuleList([nn.Linear(16, 32, bias=False), nn.Embedding(32, 16)])
    tied[1].weight = tied[0].weight
    assert sm.summary(tied).weights == 512


def test_lazy_layers_are_refused_before_anything_is_done():
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8))
    for call in (sm.overall_sparsity, sm.summary, lambda m: sm.sparsify(m, 0.5)):
        with pytest.raises(ValueError, match="LazyLinear '1' has no shape yet"):
            call(model)
    assert type(model[0]) is nn.Linear


def test_wrapped_models_are_refused():
    model = torch.compile(mlp(8, 8), backend="eager")
    with pytest.raises(ValueError, match="before OptimizedModule wraps it"):
        sm.sparsify(model, 0.5)
    with pytest.raises(ValueError, match="before DataParallel wraps it"):
        sm.sparsify(nn.DataParallel(mlp(8, 8)), 0.5)


def test_hooks_stay():
    model, calls = mlp(8, 8, 8), []
    handles = [model[1].register_forward_hook(lambda m, x, y: calls.append("after"))]
    handles.append(model[1].register_forward_pre_hook(lambda m, x, k: calls.append("before"), with_kwargs=True))
    handles.append(model[1].register_full_backward_hook(lambda m, g, o: calls.append("backward")))
    for convert in (lambda m: sm.sparsify(m, 0.5), sm.densify):
        convert(model)
        model(torch.randn(2, 8, requires_grad=True)).sum().backward()
        assert calls == ["before", "after", "backward"]
        calls.clear()
    for handle in handles:
        handle.remove()
    model(torch.randn(2, 8)).sum().backward()
    assert calls == []


def test_hooks_for_state_dicts_stay():
    model, calls = mlp(8, 8, 8), []
    dense = model[1]
    handles = [
        dense.register_state_dict_pre_hook(lambda module, *_: calls.append(module)),
        dense.register_state_dict_post_hook(lambda module, *_: calls.append(module)),
        dense.register_load_state_dict_pre_hook(lambda module, *_: calls.append(module)),
        dense.register_load_state_dict_post_hook(lambda module, _: calls.append(module)),
    ]
    del dense  # hooks know their layer by a weak reference
    for convert in (lambda m: sm.sparsify(m, 0.5), sm.densify):
        convert(model)
        model.load_state_dict(model.state_dict())
        assert calls == [model[1]] * 4
        calls.clear()
    for handle in handles:
        handle.remove()
    model.load_state_dict(model.state_dict())
    assert calls == []


def test_hooks_of_weights_are_said_to_be_lost():
    model, kept = nn.Sequential(mlp(8, 8, 8), nn.MultiheadAttention(8, 2)), []
    model[0][0].weight.register_hook(lambda grad: None)
    model[0][1].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    model[0][1].bias.register_hook(kept.append)
    model[1].in_proj_weight.register_hook(lambda grad: None)
    where = "register their hooks with values of the sparse layers, where they are still needed"
    text = said(sm.sparsify, model, 0.5)[1]
    assert text == f"these parameters were replaced, so {where}: 0.0.weight, 0.1.weight, 1.in_proj_weight"
    model[0](torch.randn(2, 8)).sum().backward()
    assert len(kept) == 1
    sm.densify(model)
    model[0][1].weight.register_hook(lambda grad: None)
    masks = {"0.1": torch.eye(8, dtype=torch.bool)}
    assert said(sm.from_masks, model, masks)[1].endswith(": 0.1.weight")


def test_a_read_only_weight_takes_no_hooks():
    layer = sm.SparseLinear(8, 8, sparsity=0.5)
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        with pytest.raises(RuntimeError, match=r"register them with layer\.values"):
            getattr(layer.weight, register)(lambda grad: None)


def test_token_models_are_ordered_by_use():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(16, 8)
            self.second, self.first = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, tokens, *, scale=1.0):
            return self.second(self.first(self.embedding(tokens))) * scale

    tokens = torch.zeros(1, 4, dtype=torch.int64)
    for inputs in ((4,), tokens, (tokens,), {"tokens": tokens, "scale": 2.0}):
        model = sm.sparsify(Model(), 0.5, "uniform", input_size=inputs, exclude=nn.Embedding)
        assert type(model.first) is nn.Linear and isinstance(model.second, sm.SparseLinear)


def test_summary():
    model = nn.Sequential()
    model.conv, model.norm, model.act = nn.Conv2d(8, 32, 3), nn.BatchNorm2d(32), nn.ELU()
    model.conv2, model.norm2, model.relu = nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.ReLU()
    model.pool, model.fc = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(64, 32)
    assert {row.dense_because for row in sm.summary(model).rows if row.weights} == {"not made sparse"}
    assert [row.fused for row in sm.summary(model).rows if not row.weights] == [
        "not fused: followed by ELU",
        "not fused: fuse(model) would",
    ]
    model = sm.sparsify(model, 0.8, "uniform", pattern="vector8", exclude="fc", fuse=True)
    summary = sm.summary(model)
    rows = {row.name: row for row in summary.rows}
    assert list(rows) == ["conv", "norm", "conv2", "norm2", "fc"]
    assert (rows["conv"].dense_because, rows["fc"].dense_because) == ("first layer", "excluded")
    conv2 = rows["conv2"]
    assert (conv2.type, conv2.shape, conv2.weights) == ("SparseConv2d", (64, 32, 3, 3), 64 * 32 * 9)
    assert conv2.pattern == "vector8" and conv2.dense_because is None and conv2.sparsity == pytest.approx(0.8, abs=1e-3)
    assert (rows["norm"].fused, rows["norm2"].fused) == ("not fused: followed by ELU", "fused")
    assert summary.sparsity == pytest.approx(sm.overall_sparsity(model))
    text = str(summary)
    assert text == repr(summary) and "dense: excluded" in text and f"{summary.weights:,}" in text
    assert len({line.find("vector8") for line in text.splitlines() if "vector8" in line}) == 1


FOLLOWED = {
    "Sigmoid": nn.Sigmoid,
    "Mish": nn.Mish,
    "GELU": nn.GELU,
    "Conv2d": lambda: nn.Conv2d(4, 4, 1),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_batch_norms_that_are_not_fused_are_visible(name):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), FOLLOWED[name]())
    model = sm.sparsify(model, 0.5, fuse=True)
    assert sm.summary(model).rows[1].fused == f"not fused: followed by {name}"


def test_batch_norms_of_models_that_cannot_be_traced():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x):
            return F.relu(self.bn(x)) if x.sum() > 0 else x

    assert sm.summary(Untraceable()).rows[0].fused == "not fused: torch.fx cannot trace the model"


def test_a_model_without_layers_to_convert_is_refused_with_what_it_has():
    with pytest.raises(ValueError, match=r"no linear or 2-d convolution layer.*its weights are in LSTM \(100\.0%\)"):
        sm.sparsify(nn.LSTM(8, 8), 0.5)


def test_a_subclass_of_the_same_name_is_told_apart():
    class Linear(nn.Linear):
        pass

    _, text = said(sm.sparsify, nn.ModuleList([Linear(64, 64), nn.Linear(64, 64)]), 0.5)
    assert f"{__name__.partition('.')[0]}.Linear (50.0%)" in text


def test_depthwise_convolutions_stay_dense_in_a_uniform_allocation():
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3, groups=32), nn.Conv2d(64, 256, 1), nn.Conv2d(256, 256, 3, groups=8)
    )
    densities = sm.layer_densities(model, 0.9, "uniform")
    assert densities == {"0": 1.0, "1": 1.0, "2": pytest.approx(0.1), "3": pytest.approx(0.1)}
    assert sm.layer_densities(model, 0.9, "uniform", depthwise_dense=False)["1"] == pytest.approx(0.1)
    model, text = said(sm.sparsify, model, 0.9, "uniform", depthwise_dense=True)
    assert text == ""  # meant to stay, and so not counted
    assert [type(layer) for layer in model] == [nn.Conv2d, nn.Conv2d, sm.SparseConv2d, sm.SparseConv2d]
    assert "dense: depthwise" in str(sm.summary(model))
    assert said(sm.sparsify, model, 0.9, "uniform")[1] == ""  # again
    assert [type(layer) for layer in model] == [nn.Conv2d, nn.Conv2d, sm.SparseConv2d, sm.SparseConv2d]


def test_nothing_but_depthwise_convolutions():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 3, groups=8))
    assert sm.layer_densities(model, 0.5, "uniform") == {"0": 1.0, "1": 1.0}
    assert sm.layer_densities(model, 0.5, "uniform", first_dense=False, depthwise_dense=False) == {"0": 0.5, "1": 0.5}


@pytest.mark.parametrize("parametrize", [
    lambda layer: nn.utils.parametrizations.weight_norm(layer, "values"),
    lambda layer: nn.utils.parametrize.register_parametrization(layer, "values", nn.Tanh()),
])  # fmt: skip
def test_values_are_not_parametrized_and_the_layer_stays_whole(parametrize):
    layer = sm.SparseLinear(8, 8, sparsity=0.5)
    x, before = torch.randn(2, 8), dict(layer.named_parameters())
    expected = layer(x)
    with pytest.raises(TypeError, match="the values of SparseLinear cannot be taken away or parametrized"):
        parametrize(layer)
    assert dict(layer.named_parameters()) == before and torch.equal(layer(x), expected)


def test_complex_layers_stay_dense_and_are_said():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, dtype=torch.complex64))
    with pytest.warns(UserWarning, match=r"dense stay Linear"):
        sm.sparsify(model, 0.9, "uniform", first_dense=False)
    assert [type(layer) for layer in model] == [sm.SparseLinear, nn.Linear]


@pytest.mark.parametrize("direction", ["sparsify", "densify"])
def test_a_bias_that_is_shared_stays_shared(direction):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10))
    model[1].bias = model[0].bias
    model.register_parameter("offset", model[2].bias)
    before = dict(model.named_parameters(remove_duplicate=False))
    sm.sparsify(model, 0.5)
    if direction == "densify":
        sm.densify(model)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is before[name] for name in ("0.bias", "1.bias", "2.bias", "offset"))


def test_the_biases_of_an_attention_take_no_more_memory_than_theirs():
    module = sm.sparsify(nn.MultiheadAttention(64, 4), 0.5)
    biases = [layer.bias for layer in module.inputs().values()]
    assert [bias.untyped_storage().nbytes() for bias in biases] == [64 * 4] * 3


def test_a_layer_with_a_forward_pass_of_its_own_stays():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[0].forward = lambda x: 10 * F.linear(x, model[0].weight, model[0].bias)
    x = torch.randn(3, 64)
    expected = model[0](x)
    _, text = said(sm.sparsify, model, 0.5)
    assert type(model[0]) is nn.Linear and type(model[1]) is sm.SparseLinear and "dense stay Linear" in text
    assert torch.equal(model[0](x), expected)


def test_layers_that_plain_attributes_hold_are_said():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = mlp(64, 64, 64, 64)
            self.listed = nn.ModuleList([self.a])
            self.order, self.by_name, self.call = [(self.a,)], {"b": self.b}, self.c.forward
            self.order.append(self.order)

    inner = Model()
    outer = nn.Sequential(inner)
    text = said(sm.sparsify, outer, 0.5)[1]
    assert text == "these still hold layers that were replaced, so assign them again: 0.order, 0.by_name, 0.call"
    inner.order, inner.by_name, inner.call = [inner.a], {}, None
    assert said(sm.densify, outer)[1].endswith(": 0.order")


def test_a_shared_weight_has_one_density_under_its_first_name():
    model = mlp(64, 64, 64, 32)
    model[1].weight = model[0].weight
    densities = sm.layer_densities(model, 0.8)
    assert list(densities) == ["0", "2"]
    assert 4096 * densities["0"] + 2048 * densities["2"] == pytest.approx(0.2 * 6144, abs=2)
    sm.sparsify(model, 0.8, start_sparsity=0.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = sm.GMP(model, optimizer, total_steps=20, interval=5, densities=densities, stop=0.9)
    for _ in range(20):
        model(torch.randn(4, 64)).square().sum().backward()
        method.step()
        optimizer.zero_grad()
    assert sm.overall_sparsity(model) == pytest.approx(0.8, abs=1e-3)
