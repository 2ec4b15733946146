"""Pruned models of other tools: exactly the weights that they have kept."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import sparse_moon as sm


def net():
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10),
    ).eval()  # fmt: skip


def masks_for(model, density=0.4):
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return {n: torch.rand_like(m.weight) < density for n, m in layers.items()}


def masked(model, masks):
    for name, mask in masks.items():
        model.get_submodule(name).weight.data *= mask
    return model


@pytest.fixture
def x():
    return torch.randn(3, 4, 8, 8)


def check(model, masks, x, expected):
    assert {name: layer.mask().tolist() for name, layer in sm.sparse_layers(model).items()} == {
        name: mask.tolist() for name, mask in masks.items()
    }
    torch.testing.assert_close(model(x), expected)


def test_pruning_of_torch(x):
    model = net()
    prune.l1_unstructured(model[3], "weight", 0.7)
    prune.random_unstructured(model[6], "weight", 0.5)
    prune.ln_structured(model[6], "weight", 0.25, n=2, dim=1)
    model[6].weight_orig.data[0] = 0.0  # is kept where the mask says so
    masks = {"3": model[3].weight_mask.bool(), "6": model[6].weight_mask.bool()}
    expected = model(x).detach()
    assert sm.from_masks(model) is model
    check(model, masks, x, expected)
    assert not prune.is_pruned(model) and type(model[0]) is nn.Conv2d


def test_a_checkpoint_of_pruning_of_torch(x):
    pruned = net()
    prune.l1_unstructured(pruned[3], "weight", 0.7)
    fresh = net()
    prune.identity(fresh[3], "weight")
    fresh.load_state_dict(pruned.state_dict())
    check(sm.from_masks(fresh), {"3": pruned[3].weight_mask.bool()}, x, pruned(x).detach())


def test_masks_of_biases_are_said(x):
    model = net()
    prune.random_unstructured(model[6], "weight", 0.5)
    prune.random_unstructured(model[6], "bias", 0.5)
    expected = model(x).detach()
    with pytest.warns(UserWarning, match="biases keep their zeros, but no mask: 6"):
        sm.from_masks(model)
    torch.testing.assert_close(model(x), expected)
    assert set(dict(model[6].named_parameters())) == {"values", "bias"}


@pytest.mark.parametrize("ending", ["", ".weight", ".weight_mask", ".kernel"])
@pytest.mark.parametrize("convert", [
    lambda mask: mask, lambda mask: mask.numpy(), lambda mask: mask.float(), lambda mask: mask.numpy().astype(np.uint8),
    lambda mask: mask.tolist(),
])  # fmt: skip
def test_dictionaries_of_masks(x, ending, convert):
    model = net()
    masks = masks_for(model)
    expected = masked(net_like(model), masks)(x).detach()
    sm.from_masks(model, {f"{name}{ending}": convert(mask) for name, mask in masks.items()})
    check(model, masks, x, expected)


def net_like(model):
    other = net()
    other.load_state_dict(model.state_dict())
    return other


def test_trees_of_jax(x):
    model = nn.ModuleDict({"block": nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3)}), "head": nn.Linear(4, 4)})
    conv, head = torch.rand(4, 4, 3, 3) < 0.5, torch.rand(4, 4) < 0.5
    tree = {
        "block": {"conv": {"kernel": conv.permute(2, 3, 1, 0).numpy(), "bias": None}},
        "head": {"kernel": head.T.numpy(), "bias": None},
    }
    sm.from_masks(model, tree, layout="flax")
    assert torch.equal(model["block"]["conv"].mask(), conv) and torch.equal(model["head"].mask(), head)


def test_masks_of_jaxpruner(x):
    jaxpruner = pytest.importorskip("jaxpruner", reason="jaxpruner is not installed")
    jnp = pytest.importorskip("jax.numpy", reason="jax is not installed")
    weights = {
        "6": {"kernel": jnp.asarray(np.random.rand(8, 16))},
        "8": {"kernel": jnp.asarray(np.random.rand(16, 10))},
    }
    pruner = jaxpruner.MagnitudePruning(sparsity_distribution_fn=lambda w: {"6": {"kernel": 0.5}, "8": {"kernel": 0.5}})
    _, masks = pruner.instant_sparsify(weights)
    model = sm.from_masks(net(), masks, layout="flax")
    assert model[6].topology.nnz == 64 and model[8].topology.nnz == 80


def test_training_of_rigl_torch_goes_on(x):
    """Its scheduler's masks, after a training with updates; RigL of ours then moves the same number of weights."""
    rigl = pytest.importorskip("rigl_torch.RigL", reason="rigl-torch is not installed")
    model, images, labels = net().train(), torch.randn(16, 4, 8, 8), torch.randint(10, (16,))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = rigl.RigLScheduler(
        model, optimizer, dense_allocation=0.3, T_end=20, delta=3, ignore_linear_layers=False
    )  # fmt: skip
    for _ in range(7):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        if scheduler():
            optimizer.step()
    assert scheduler.rigl_steps == 2
    names = {id(parameter): name.removesuffix(".weight") for name, parameter in model.named_parameters()}
    masks = {
        names[id(weight)]: mask
        for weight, mask in zip(scheduler.W, scheduler.backward_masks, strict=True)
        if mask is not None
    }
    expected = model.eval()(x).detach()
    with pytest.warns(UserWarning, match=r"replaced, so register their hooks .*: 3.weight, 6.weight, 8.weight$"):
        model = sm.from_masks(model, masks)  # those that mask gradients, which sparse layers do by themselves
    check(model, masks, x, expected)
    ours = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    method = sm.RigL(model.train(), ours, total_steps=20, interval=1)
    updates = 0
    for _ in range(3):
        nn.functional.cross_entropy(model(images), labels).backward()
        updates += method.step()
        ours.zero_grad()
    assert updates and all(model.get_submodule(n).topology.nnz == int(m.sum()) for n, m in masks.items())


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
@pytest.mark.parametrize("structure", ["0:0", "2:4"])
def test_a_checkpoint_of_llm_compressor(structure, tmp_path):
    """Pruned by its SparseGPT and saved, then loaded by transformers."""
    compressor = pytest.importorskip("llmcompressor", reason="llmcompressor is not installed")
    pruning = pytest.importorskip("llmcompressor.modifiers.pruning")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({str(i): i for i in range(64)}, unk_token="0")
    processor = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), pad_token="0")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    tokens = torch.randint(0, 64, (8, 16))
    examples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    compressor.oneshot(
        model=model, dataset=torch.utils.data.DataLoader(examples, batch_size=4), processor=processor,
        recipe=pruning.SparseGPTModifier(sparsity=0.5, mask_structure=structure, ignore=["re:.*lm_head"]),
        num_calibration_samples=8, max_seq_length=16,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "sparse")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").eval()
    expected = loaded(tokens).logits.detach()
    layers = sm.sparse_layers(sm.from_masks(loaded))
    assert len(layers) == 14 and all(abs(layer.sparsity - 0.5) < 0.01 for layer in layers.values())
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_sparseml(x):
    """Pruned, trained and saved by SparseML 1.8.0: tests/checkpoints/make_sparseml.py."""
    model = net()
    saved = torch.load(Path(__file__).parent / "checkpoints" / "sparseml-1.8.0.pth", weights_only=True)
    model.load_state_dict(saved["state_dict"])
    masks = {name: model.get_submodule(name).weight != 0 for name in ("3", "6")}
    expected = model(x).detach()
    with pytest.warns(UserWarning, match="outputs have no weight, most of them in '6'"):
        check(sm.from_masks(model), masks, x, expected)
    assert [layer.sparsity for layer in sm.sparse_layers(model).values()] == [0.75, 0.75]


def test_checkpoints_with_zeros(x):
    model = net()
    masks = masks_for(model)
    expected = masked(model, masks)(x).detach()
    check(sm.from_masks(model), masks, x, expected)


def test_two_of_four(x):
    model = net()
    weight = model[6].weight.detach()
    keep = torch.zeros(16, 2, 4, dtype=torch.bool).scatter_(2, weight.abs().view(16, 2, 4).topk(2).indices, True)
    masks = {"6": keep.view(16, 8)}
    expected = masked(model, masks)(x).detach()
    check(sm.from_masks(model), masks, x, expected)
    assert (model[6].mask().view(16, 2, 4).sum(2) == 2).all()


@pytest.mark.parametrize("pattern, block", [("vector4", (4, 1)), ("block4", (4, 4))])
def test_patterns(x, pattern, block):
    model = net()
    blocks = torch.rand(8 // block[0], 8 // block[1], 3, 3) < 0.5
    masks = {"3": blocks.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)}
    expected = masked(model, masks)(x).detach()
    check(sm.from_masks(model, masks, pattern=pattern), masks, x, expected)
    assert model[3].topology.block == block
    with pytest.raises(ValueError, match=r"the mask of '8': mask does not consist of whole .* blocks|does not divide"):
        sm.from_masks(net(), {"8": torch.rand(10, 16) < 0.5}, pattern=pattern)


def test_shared_weights():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    mask = torch.rand(8, 8) < 0.5
    sm.from_masks(model, {"2": mask})
    assert model[0].values is model[2].values and torch.equal(model[0].mask(), mask)
    other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    other[1].weight = other[0].weight
    with pytest.raises(ValueError, match="'0' and '1' share a weight, but not a mask"):
        sm.from_masks(other, {"0": mask, "1": ~mask})


def test_few_zeros_are_no_mask():
    model = net()
    model[6].weight.data[0, 0] = 0.0
    with pytest.raises(ValueError, match="nothing becomes sparse: the model has no pruned layer"):
        sm.from_masks(model)
    assert isinstance(sm.from_masks(model, min_sparsity=0.0)[6], sm.SparseLinear)


def test_what_stays_dense_is_said():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv1d(8, 8, 3))
    for module in (model[0], model[2]):
        module.weight.data[:, ::2] = 0.0
    model[1].weight.data.zero_()
    with pytest.warns(UserWarning, match=r"stay dense.*: 2 \(Conv1d, 50%\); zero everywhere, .*dense stay 1"):
        sm.from_masks(model)
    assert [type(m) for m in model] == [sm.SparseLinear, nn.Linear, nn.Conv1d]


def test_masks_that_keep_all_leave_layers_dense():
    model = sm.from_masks(net(), {"6": torch.rand(16, 8) < 0.5, "8": torch.ones(10, 16)})
    assert type(model[8]) is nn.Linear
    with pytest.raises(ValueError, match="nothing becomes sparse: the 1 masks keep everything"):
        sm.from_masks(net(), {"8": torch.ones(10, 16)})


@pytest.mark.parametrize("masks, message", [
    ({"7.weight": torch.ones(2)}, "mask '7.weight' is of a ReLU"),
    ({"66": torch.ones(2)}, r"mask '66' is of no layer of the model, did you mean one of \['6'\]"),
    ({"8": torch.ones(16, 10)}, r"must have the shape \(10, 16\) of its weight, got \(16, 10\); with layout='flax'"),
    ({"8": torch.ones(10, 17)}, r"must have the shape \(10, 16\) of its weight, got \(10, 17\)$"),
    ({"8": torch.full((10, 16), 0.5)}, r"mask '8' must hold 0 and 1, got \[0.5, 0.5, 0.5\] among them"),
    ({"8.bias": torch.ones(10)}, "mask '8.bias' is of no layer of the model"),
])  # fmt: skip
def test_masks_that_do_not_fit(masks, message):
    model = net()
    modules = list(model.modules())
    with pytest.raises(ValueError, match=message):
        sm.from_masks(model, {"6": torch.rand(16, 8) < 0.5, **masks})
    assert list(model.modules()) == modules


def test_a_failure_leaves_pruning_as_it_was():
    model = net()
    prune.random_unstructured(model[6], "weight", 0.5)
    with pytest.raises(ValueError, match="whole"):
        sm.from_masks(model, pattern="block4")
    assert prune.is_pruned(model[6])
    with pytest.raises(ValueError, match="is of a layer that is pruned already"):
        sm.from_masks(model, {"6": torch.rand(16, 8) < 0.5})
    with pytest.raises(ValueError, match="layout must be"):
        sm.from_masks(model, layout="tf")


def test_what_was_imported_is_saved_and_trains_on(tmp_path):
    model = net()
    masks = masks_for(model)
    sm.from_masks(masked(model, masks))
    sm.save(model, tmp_path)
    loaded = sm.load(tmp_path, net())
    assert all(torch.equal(layer.mask(), masks[name]) for name, layer in sm.sparse_layers(loaded).items())
