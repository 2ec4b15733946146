"""The ``Conv1D`` of transformers, GPT-2's linear layer, made sparse and dense again."""

import copy
import io
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import sparse_moon as sm
from sparse_moon.flops import flops_report, layer_costs

transformers = pytest.importorskip("transformers")
Conv1D = transformers.pytorch_utils.Conv1D


def layer(i=24, o=40, dtype=torch.float64):
    module = Conv1D(o, i).to(dtype)
    nn.init.normal_(module.bias)
    return module


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=64, n_layer=2, n_head=4, n_positions=16, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def sparse(model, allocation="uniform", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the embedding stays dense
        return sm.sparsify(model, 0.8, allocation, first_dense=False, **options)


@pytest.mark.filterwarnings("ignore:.* outputs have no weight")
@pytest.mark.parametrize("selection", ["random", "magnitude", "constant_fan_in"])
@pytest.mark.parametrize("pattern", ["unstructured", "vector8", "block4"])
def test_results_and_gradients_are_those_of_the_dense_layer(pattern, selection):
    dense = layer()
    module = sm.sparsify(copy.deepcopy(dense), 0.5, "uniform", first_dense=False, pattern=pattern, selection=selection)
    assert type(module) is sm.SparseConv1D and module.weight_shape == (40, 24)
    assert torch.equal(module.dense_weight(), dense.weight.t() * module.mask())
    again = sm.densify(copy.deepcopy(module))
    assert type(again) is Conv1D and list(again.state_dict()) == list(dense.state_dict())
    assert again.weight.is_contiguous()
    assert vars(again).keys() == vars(dense).keys() and (again.nf, again.nx) == (40, 24)
    results = []
    for m in (module, again):
        x = torch.linspace(-1, 1, 2 * 3 * 24, dtype=torch.float64).view(2, 3, 24).requires_grad_()
        y = m(x)
        y.square().sum().backward()
        results.append((y, x.grad, m.bias.grad))
    torch.testing.assert_close(*results)
    assert torch.equal(again.weight, (dense.weight * module.mask().t()))
    torch.testing.assert_close(module.values.grad, module.topology.gather(again.weight.grad.t()))


def test_the_language_model_trains_moves_saves_and_becomes_dense_again(tmp_path):
    model = gpt2()
    names, size = list(model.state_dict()), model.transformer.wte.weight.numel() + model.transformer.wpe.weight.numel()
    with pytest.warns(UserWarning, match=r"dense stay Embedding \(\d\.\d%\); see") as caught:
        model = sm.sparsify(model, 0.8)
    assert len(caught) == 1
    weights = sm.summary(model).weights
    assert sm.summary(model).dense_share == {"Embedding": pytest.approx(size / weights)}
    assert model.lm_head.weight is model.transformer.wte.weight
    assert {type(m) for m in sm.sparse_layers(model).values()} == {sm.SparseConv1D}

    optimizer = torch.optim.AdamW(sm.param_groups(model, 0.01), 3e-3)
    method = sm.RigL(model, optimizer, total_steps=30, interval=5)
    before = {name: module.mask() for name, module in sm.sparse_layers(model).items()}
    tokens = torch.randint(3, 50, (8, 12))
    losses = []
    for _ in range(20):
        losses.append(model(input_ids=tokens, labels=tokens).loss)
        losses[-1].backward()
        method.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    after = {name: module.mask() for name, module in sm.sparse_layers(model).items()}
    assert all(not torch.equal(before[name], after[name]) for name in before)

    expected = model.eval()(tokens).logits
    sm.save(model, tmp_path)
    assert torch.equal(sm.load(tmp_path, gpt2()).eval()(tokens).logits, expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(tokens).logits, expected)
        dense = sm.densify(other)
        assert list(dense.state_dict()) == names and type(dense.transformer.h[0].mlp.c_fc) is Conv1D
        torch.testing.assert_close(dense(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_what_fails_or_only_asks_leaves_the_model_as_it_was():
    model = gpt2()
    parameters, before = [*model.parameters()], dict(vars(model.transformer.h[0].mlp.c_fc))
    tokens = torch.randint(3, 50, (1, 12))
    report = flops_report(model, (tokens,), sparsity=0.8)
    costs = {cost.name: cost for cost in layer_costs(model, (tokens,))}
    assert costs["transformer.h.1.mlp.c_fc"].forward_dense == 2 * 12 * 64 * 256
    assert costs["transformer.h.1.mlp.c_fc"].weight_shape == (256, 64)
    with pytest.raises(ValueError, match="'nothing'"):
        sm.sparsify(model, 0.5, exclude="nothing")
    with pytest.raises(ValueError, match=r"its weights are in Embedding"):
        sm.sparsify(model, 0.5, exclude=Conv1D)
    assert [*model.parameters()] == parameters and type(model.transformer.h[0].mlp.c_fc) is Conv1D
    assert vars(model.transformer.h[0].mlp.c_fc).keys() - before.keys() <= {"dense_because"}
    sparsity = report["sparsity"]
    model = sparse(model, allocation="erk")
    found = flops_report(model, (tokens,))
    assert found["layers"].keys() == report["layers"].keys()
    assert found["forward_ratio"] == pytest.approx(report["forward_ratio"], abs=1e-3)
    assert sm.overall_sparsity(model) == pytest.approx(sparsity, abs=1e-3)


def test_exclusions_sharing_and_subclasses():
    class Own(Conv1D):
        pass

    model = nn.ModuleDict({"a": layer(24, 24), "b": layer(24, 24), "own": Own(24, 24), "linear": nn.Linear(24, 24)})
    model["b"].weight = model["a"].weight
    linear_only = sparse(copy.deepcopy(model), exclude=Conv1D)
    assert list(sm.sparse_layers(linear_only)) == ["linear"]
    rows = {row.name: row.dense_because for row in sm.summary(linear_only).rows}
    assert rows["a"] == "excluded" and sm.summary(model).rows[0].dense_because == "not made sparse"
    assert list(sm.sparse_layers(sparse(copy.deepcopy(model), exclude=nn.Linear))) == ["a"]
    model = sparse(model)
    assert model["a"].values is model["b"].values and type(model["own"]) is Own
    assert sm.densify(model)["a"].weight is model["b"].weight


def test_masks_are_as_the_weight_is():
    dense = layer()
    mask = torch.rand(24, 40) < 0.5
    for layout in ("torch", "flax"):
        model = sm.from_masks(nn.Sequential(copy.deepcopy(dense)), {"0.weight": mask}, layout=layout)
        assert torch.equal(model[0].mask(), mask.t())
    with torch.no_grad():
        dense.weight *= mask
    assert torch.equal(sm.from_masks(nn.Sequential(dense))[0].mask(), mask.t())
    with pytest.raises(ValueError, match=r"shape \(24, 40\) of its weight, got \(40, 24\)"):
        sm.from_masks(nn.Sequential(layer()), {"0": mask.t()})


def test_transformers_is_not_imported():
    code = (
        "import sys, torch, sparse_moon as sm\n"
        "sm.densify(sm.sparsify(torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)]), 0.5))\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
