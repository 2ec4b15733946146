"""``nn.MultiheadAttention`` made sparse: the numbers of the dense one, all ways of calling it, and back again."""

import copy
import io
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import prune

import sparse_moon as sm
from small_training import METHODS
from sparse_moon.flops import flops_report, layer_costs
from sparse_moon.topology import weight_to_matrix

E, HEADS, BATCH, LENGTH = 12, 3, 2, 5


def sparse(model, sparsity=0.5, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shortfalls
        return sm.sparsify(model, sparsity, "uniform", first_dense=False, **options)


def attention(dtype=torch.float64, **options):
    module = nn.MultiheadAttention(E, HEADS, dtype=dtype, **options)
    for parameter in module.parameters():  # biases start at 0
        nn.init.normal_(parameter, std=0.5)
    return module


def sequences(kind, batch_first, width, dtype):
    """Query, key and value: all one tensor, keys and values one, or all apart."""
    size = LENGTH if kind == "self" else LENGTH + 2
    q, k, v = (torch.randn(BATCH, n, w, dtype=dtype) for n, w in ((LENGTH, E), (size, width), (size, width)))
    if not batch_first:
        q, k, v = (x.transpose(0, 1).contiguous() for x in (q, k, v))
    return {"self": (q, q, q), "cross": (q, k, k), "apart": (q, k, v)}[kind]


def masks(kind, which, dtype):
    size = LENGTH if kind == "self" else LENGTH + 2
    padding = torch.arange(size).expand(BATCH, size) >= torch.tensor([[size], [size - 2]])
    added = torch.zeros(BATCH, size, dtype=dtype).masked_fill(padding, -torch.inf)
    square = torch.randn(LENGTH, size, dtype=dtype)
    each = torch.randn(BATCH * HEADS, LENGTH, size, dtype=dtype)
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=dtype)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "bool": {"attn_mask": torch.ones(LENGTH, size, dtype=torch.bool).triu(3), "key_padding_mask": padding},
        "square": {"attn_mask": square},
        "each head": {"attn_mask": each, "key_padding_mask": added},
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal, padding": {"attn_mask": causal, "key_padding_mask": added, "is_causal": True},
    }[which]


def passes(module, arguments, options):
    """Output, weights of attention, and the gradients of inputs and parameters."""
    leaves = {id(x): x.clone().requires_grad_() for x in arguments}
    module.zero_grad()
    output, weights = module(*(leaves[id(x)] for x in arguments), **options)
    factors = torch.arange(output.numel(), dtype=output.dtype).view_as(output).sin()
    loss = (output * factors).sum() + (0.0 if weights is None else weights.square().sum())
    loss.backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    return output, weights, [x.grad for x in leaves.values()], grads


def gathered(module, dense_grads):
    """The gradients of a dense attention as the sparse one has them."""
    grads = dict(dense_grads)
    if "in_proj_weight" in grads:
        parts = zip("qkv", grads.pop("in_proj_weight").chunk(3), strict=True)
        grads |= {f"{name}_proj.weight": part for name, part in parts}
    if "in_proj_bias" in grads:
        parts = zip("qkv", grads.pop("in_proj_bias").chunk(3), strict=True)
        grads |= {f"{name}_proj.bias": part for name, part in parts}
    grads = {name.replace("_proj_weight", "_proj.weight"): grad for name, grad in grads.items()}
    for name, layer in sm.sparse_layers(module).items():
        matrix = weight_to_matrix(grads.pop(f"{name}.weight"), layer.topology.block[1])
        grads[f"{name}.values"] = layer.topology.gather(matrix)
    return grads


CALLS = ["none", "padding", "bool", "square", "each head"]
KINDS = [*itertools.product(("cross", "apart"), CALLS, (E, 8)),
         *itertools.product(("self",), (*CALLS, "causal", "causal, padding"), (E,))]  # fmt: skip


@pytest.mark.parametrize(("kind", "which", "width"), KINDS)
def test_results_and_all_gradients_are_those_of_the_dense_module(kind, which, width):
    for batch_first, bias, more, need in itertools.product((True, False), repeat=4):
        module = attention(bias=bias, add_bias_kv=more, add_zero_attn=more, kdim=width, vdim=width,
                           batch_first=batch_first)  # fmt: skip
        module = sparse(module)
        dense = sm.densify(copy.deepcopy(module))
        assert type(module) is sm.SparseMultiheadAttention and type(dense) is nn.MultiheadAttention
        arguments = sequences(kind, batch_first, width, torch.float64)
        options = masks(kind, which, torch.float64) | {"need_weights": need, "average_attn_weights": bias}
        output, weights, inputs, grads = passes(module, arguments, options)
        expected, expected_weights, expected_inputs, dense_grads = passes(dense, arguments, options)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(weights, expected_weights, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(inputs, expected_inputs, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(grads, gathered(module, dense_grads), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("need_weights", [True, False])
def test_rounding_is_at_most_twice_torch_s(need_weights):
    worst = []
    for seed in range(5):
        torch.manual_seed(seed)
        exact = sparse(nn.MultiheadAttention(48, 4, batch_first=True, dtype=torch.float64), 0.8)
        module = copy.deepcopy(exact).float()
        dense = sm.densify(copy.deepcopy(module))
        exact.load_state_dict(module.state_dict())
        x = torch.randn(3, 20, 48)
        found = [passes(m, (y, y, y), {"need_weights": need_weights})
                 for m, y in ((exact, x.double()), (module, x), (dense, x))]  # fmt: skip
        exact_grads, grads, dense_grads = found[0][3], found[1][3], gathered(module, found[2][3])
        pairs = [(found[0][0], found[1][0], found[2][0]), (found[0][2][0], found[1][2][0], found[2][2][0])]
        pairs += [(exact_grads[name], grads[name], dense_grads[name]) for name in grads if "k_proj.bias" not in name]
        worst.append([((ours - e).norm() / (theirs - e).norm()).item() for e, ours, theirs in pairs])
    assert torch.tensor(worst).mean(0).max() < 2


@pytest.mark.parametrize("average", [True, False])
def test_weights_under_autocast_have_torch_s_dtype(average):
    module = sparse(nn.MultiheadAttention(E, HEADS, batch_first=True))
    dense, x = sm.densify(copy.deepcopy(module)), torch.randn(3, LENGTH, E)
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    for mask in (None, causal, causal < 0):
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = (m(x, x, x, attn_mask=mask, average_attn_weights=average) for m in (module, dense))
        assert [t.dtype for t in found] == [t.dtype for t in expected] == [torch.bfloat16] * 2
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


def test_one_example_evaluation_and_dropout_as_torch_s():
    module = sparse(attention(dropout=0.4))
    dense = sm.densify(copy.deepcopy(module))
    x = torch.randn(LENGTH, E, dtype=torch.float64)
    mask = torch.zeros(LENGTH, dtype=torch.bool)
    mask[-1] = True
    for need, average in ((True, True), (True, False), (False, True)):
        options = {"key_padding_mask": mask, "need_weights": need, "average_attn_weights": average}
        for mode in (True, False):
            torch.manual_seed(0)
            found = module.train(mode)(x, x, x, **options)
            torch.manual_seed(0)
            torch.testing.assert_close(found, dense.train(mode)(x, x, x, **options))


def test_the_object_its_hooks_and_attributes_stay():
    model, calls = nn.ModuleDict({"attention": attention(batch_first=True)}), []
    module = model["attention"]
    module.register_forward_hook(lambda *_: calls.append("called"))
    names, before, order = list(module.state_dict()), dict(vars(module)), list(module._parameters)
    module.out_proj.requires_grad_(False)
    sparse(model)
    assert model["attention"] is module and isinstance(module, nn.MultiheadAttention)
    assert list(sm.sparse_layers(model)) == [f"attention.{name}_proj" for name in ("q", "k", "v", "out")]
    assert [name for name in module.state_dict() if name.startswith("q_proj")] == [
        "q_proj.values", "q_proj.bias", "q_proj.topology.row_ptr", "q_proj.topology.col"
    ]  # fmt: skip
    x = torch.randn(2, 4, E, dtype=torch.float64)
    expected, _ = module(x, x, x)
    sm.densify(model)
    assert model["attention"] is module and type(module) is nn.MultiheadAttention
    assert type(module.out_proj) is NonDynamicallyQuantizableLinear and not module.out_proj.weight.requires_grad
    assert list(module.state_dict()) == names and vars(module).keys() == before.keys()
    assert list(module._parameters) == order
    torch.testing.assert_close(module(x, x, x)[0], expected)
    assert calls == ["called", "called"]


def test_weights_that_other_code_reads_are_right_and_read_only():
    for width in (E, 8):
        module = sparse(attention(kdim=width, vdim=width))
        dense = sm.densify(copy.deepcopy(module))
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"):
            weight, expected = getattr(module, name), getattr(dense, name)
            assert (weight is None) == (expected is None), name
            if weight is not None:
                assert torch.equal(torch.Tensor(weight), expected)
    with pytest.raises(RuntimeError, match="writing to it changes nothing"), torch.no_grad():
        sparse(attention()).in_proj_weight.zero_()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize("exclude", [(), "*linear*", "*.self_attn", "*.out_proj"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_fast_paths_of_the_encoder_are_not_taken(exclude, norm_first, monkeypatch):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    model = sparse(encoder, exclude=exclude).eval()
    dense = sm.densify(copy.deepcopy(model))
    x = torch.randn(3, 6, 16)
    padding = torch.arange(6).expand(3, 6) >= torch.tensor([[6], [4], [2]])
    with torch.no_grad():
        expected = dense(x, src_key_padding_mask=padding)
        expected_whole = dense(x)
        for name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention", "_nested_tensor_from_mask"):
            if name != "_native_multi_head_attention" or exclude != "*.self_attn":  # which has torch's own weights
                monkeypatch.setattr(torch, name, None)
        torch.testing.assert_close(model(x), expected_whole, rtol=1e-4, atol=1e-5)
        found = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(found[~padding], expected[~padding], rtol=1e-4, atol=1e-5)


def vision_transformer():
    return torchvision.models.VisionTransformer(16, 4, 2, 2, 64, 128, num_classes=10)


WHOLE = {
    "VisionTransformer": (vision_transformer, lambda: (torch.randn(2, 3, 16, 16),)),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True), 2),
        lambda: (torch.randn(2, 6, 64),),
    ),
    "Transformer": (
        lambda: nn.Transformer(64, 4, 1, 1, 128, 0.0, batch_first=True),
        lambda: (torch.randn(2, 6, 64), torch.randn(2, 4, 64)),
    ),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_models_are_sparse_and_train_like_the_dense_ones(kind):
    build, inputs = WHOLE[kind]
    model = build()
    names, x = [*model.state_dict()], inputs()
    model = sparse(model, 0.9)
    assert sm.overall_sparsity(model) > 0.87 and not sm.summary(model).dense_share.get("MultiheadAttention")
    dense = sm.densify(copy.deepcopy(model))
    assert [*dense.state_dict()] == names
    assert not any(type(module).__module__.startswith("sparse_moon") for module in dense.modules())
    for mode in (True, False):
        torch.manual_seed(1)
        expected = dense.train(mode)(*x)
        torch.manual_seed(1)
        torch.testing.assert_close(model.train(mode)(*x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.* have no weight")
@pytest.mark.parametrize("kind", METHODS)
def test_every_method_moves_the_projections(kind):
    model = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = sparse(model, 0.8, selection="constant_fan_in")
    before = {name: layer.mask() for name, layer in sm.sparse_layers(model).items()}
    method = METHODS[kind](model, torch.optim.AdamW(model.parameters(), 1e-3), total_steps=40, interval=4)
    x, y = torch.randn(8, 10, 32), torch.randn(8, 10, 32)
    for _ in range(12):
        F.mse_loss(model(x), y).backward()
        method.step()
        method.optimizer.zero_grad()
    after = {name: layer.mask() for name, layer in sm.sparse_layers(model).items()}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")} <= moved
    output = model.eval()(x)
    torch.testing.assert_close(sm.densify(model).eval()(x), output, rtol=1e-4, atol=1e-5)


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_copies_pickles_state_dicts_and_folders(tmp_path):
    model, x = sparse(vision_transformer(), 0.8).eval(), torch.randn(2, 3, 16, 16)
    expected = model(x)
    state = sparse(vision_transformer(), 0.8).eval()
    state.load_state_dict(model.state_dict())
    sm.save(model, tmp_path / "folder")
    others = [
        copy.deepcopy(model), pickled(model), state,
        sm.load(tmp_path / "folder", vision_transformer()).eval(),  # dense until then
        sm.load(tmp_path / "folder", sparse(vision_transformer(), 0.7)).eval(),
    ]  # fmt: skip
    for other in others:
        assert torch.equal(other(x), expected)
        assert type(other.encoder.layers[0].self_attention) is sm.SparseMultiheadAttention
    sm.save(sm.densify(model), tmp_path / "dense")
    assert type(sm.load(tmp_path / "dense", vision_transformer()).encoder.layers[0].self_attention) is (
        nn.MultiheadAttention
    )
    part = sparse(vision_transformer(), 0.8, exclude=("*.q_proj", "*layer_0.self_attention")).eval()
    sm.save(part, tmp_path / "part")
    torch.testing.assert_close(sm.load(tmp_path / "part", vision_transformer()).eval()(x), part(x), rtol=0, atol=0)


def test_what_fails_or_only_asks_leaves_the_module_as_it_was(tmp_path):
    model = nn.ModuleDict({"a": attention(), "b": nn.LSTM(4, 4)})
    state, parameters = copy.deepcopy(model.state_dict()), [*model.parameters()]
    sm.save(sparse(nn.ModuleDict({"a": nn.MultiheadAttention(16, 2)})), tmp_path)
    densities = sm.layer_densities(model, 0.5)
    assert list(densities) == [f"a.{name}_proj" for name in ("q", "k", "v", "out")]
    layer_costs(model["a"], tuple(torch.randn(3, 2, E, dtype=torch.float64) for _ in range(3)))
    for call in (
        lambda: sm.sparsify(model, 0.5, exclude="a.nothing"),
        lambda: sm.sparsify(model, 0.5, exclude="a"),
        lambda: sm.load(tmp_path, model),
        lambda: sm.from_masks(model, {"a.q_proj": torch.ones(2, 2)}),
    ):
        with pytest.raises(ValueError):
            call()
        assert type(model["a"]) is nn.MultiheadAttention and [*model.parameters()] == parameters
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_excluded_shared_and_foreign_attentions_stay_dense_and_are_named():
    class Own(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict({
        "own": Own(E, HEADS), "pruned": attention(), "first": attention(), "second": attention(),
        "excluded": attention(), "plain": attention(),
    })  # fmt: skip
    prune.random_unstructured(model["pruned"], "in_proj_weight", 0.5)
    model["second"].in_proj_weight = model["first"].in_proj_weight
    with pytest.warns(UserWarning, match=r"dense stay MultiheadAttention \(\d+\.\d%\), Own \(\d+\.\d%\)"):
        sm.sparsify(model, 0.5, exclude="excluded")
    assert type(model["plain"]) is sm.SparseMultiheadAttention
    assert all(type(model[name]) is nn.MultiheadAttention for name in ("pruned", "first", "second", "excluded"))
    reasons = {row.name: row.dense_because for row in sm.summary(model).rows}
    assert reasons["excluded"] == reasons["excluded.out_proj"] == "excluded"
    some = sparse(nn.ModuleDict({"a": attention()}), exclude=["a.k_proj", "*.out_proj"])
    assert list(sm.sparse_layers(some)) == ["a.q_proj", "a.v_proj"] and type(some["a"].k_proj) is nn.Linear
    x = torch.randn(3, 2, E, dtype=torch.float64)
    torch.testing.assert_close(some["a"](x, x, x), sm.densify(copy.deepcopy(some))["a"](x, x, x))


def test_flops_of_projections():
    tokens = LENGTH * BATCH
    x = torch.randn(LENGTH, BATCH, E)
    products = 2 * 2 * BATCH * LENGTH * LENGTH * E
    dense = nn.MultiheadAttention(E, HEADS)
    report = flops_report(dense, (x, x, x), sparsity=0.75, allocation="erk")
    model = sm.sparsify(copy.deepcopy(dense), 0.75)
    assert report["layers"] == flops_report(model, (x, x, x))["layers"]
    costs = {cost.name: cost for cost in layer_costs(model, (x, x, x))}
    assert list(costs) == ["", "q_proj", "k_proj", "v_proj", "out_proj"]
    assert costs[""].kind == "MultiheadAttention" and costs[""].forward_sparse == products
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        assert costs[name].forward_dense == 2 * tokens * E * E
        assert costs[name].forward_sparse == pytest.approx(2 * tokens * model.get_submodule(name).topology.nnz)
    assert report["sparsity"] == pytest.approx(0.75, abs=0.01) and type(dense) is nn.MultiheadAttention


def test_masks_of_packed_weights():
    dense = attention()
    mask = torch.rand(3 * E, E) < 0.5
    model = sm.from_masks(copy.deepcopy(dense), {"in_proj_weight": mask, "out_proj.weight": mask[:E]})
    assert torch.equal(torch.cat([model.q_proj.mask(), model.k_proj.mask(), model.v_proj.mask()]), mask)
    pruned = copy.deepcopy(dense)
    with torch.no_grad():
        pruned.in_proj_weight *= mask
    found = sm.from_masks(copy.deepcopy(pruned))
    assert torch.equal(found.v_proj.mask(), mask[2 * E :]) and type(found.out_proj) is nn.Linear
    torch.testing.assert_close(sm.densify(found).in_proj_weight, pruned.in_proj_weight)
    with pytest.raises(ValueError, match="mask 'q_proj' must have the shape"):
        sm.from_masks(dense, {"in_proj_weight": mask.t()})


def test_compiled_and_exported():
    model, x = sparse(vision_transformer(), 0.8).eval(), torch.randn(2, 3, 16, 16)
    expected = model(x)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-5)
    layer = sparse(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True))
    x = torch.randn(2, 5, 16)
    expected = layer(x)
    expected.square().sum().backward()
    grad, layer.self_attn.q_proj.values.grad = layer.self_attn.q_proj.values.grad, None
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(x).square().sum().backward()
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.self_attn.q_proj.values.grad, grad, rtol=1e-4, atol=1e-5)


def test_bad_calls_are_errors():
    module, x = sparse(attention(batch_first=True)), torch.randn(2, 5, E, dtype=torch.float64)
    for arguments, options, match in (
        ((x, x[:, :3], x), {}, r"keys with values of one length.*\(2, 3, 12\)"),
        ((x[None], x[None], x[None]), {}, "2 or 3 dimensions"),
        ((x, x, x), {"attn_mask": torch.zeros(5, 4)}, r"attn_mask must have shape \(5, 5\) or \(6, 5, 5\)"),
        ((x, x, x), {"key_padding_mask": torch.zeros(5, 2)}, r"key_padding_mask must have shape \(2, 5\)"),
        ((x, x, x), {"key_padding_mask": torch.zeros(2, 5, dtype=torch.int32)}, "bool or floating point"),
        ((x, x, x), {"is_causal": True}, "is_causal"),
        ((torch.nested.nested_tensor([x[0]], layout=torch.jagged),) * 3, {}, "nested"),
    ):
        with pytest.raises(ValueError, match=match):
            module(*arguments, **options)
    with pytest.raises(TypeError, match=r"is made of an nn\.MultiheadAttention"):
        sm.SparseMultiheadAttention()
