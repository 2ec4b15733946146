"""Layers with GELU between them in the code of modules, fused as on a GPU; without one, by its kernels on a CPU."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparse_moon as sm
from sparse_moon.nn import gelu_mlp
from sparse_moon.nn.fused_forward import FusedForward
from sparse_moon.ops.choice import use_backend
from sparse_moon.ops.registry import KERNELS
from sparse_moon.ops.sparse_mlp import cpu, gpu

pytest.importorskip("sparse_moon.kernels.launch")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),  # of the interpreter
    pytest.mark.filterwarnings("ignore:.* outputs have no weight"),
]


@pytest.fixture
def fused(monkeypatch):
    """The activations of the operations that ran."""
    names, run = [], gelu_mlp.sparse_mlp

    def noted(*inputs, **probes):
        names.append(inputs[-1])
        return run(*inputs, **probes)

    monkeypatch.setattr(gelu_mlp, "sparse_mlp", noted)
    monkeypatch.setattr(cpu, "pays", lambda *operands: gpu.pays(*operands[:3]))
    for operator in ("sparse_mlp", "sparse_mlp_grads"):
        monkeypatch.setitem(KERNELS, (operator, DEVICE), KERNELS[operator, "cuda"])
    with use_backend("triton"):
        yield names


class Block(nn.Module):
    """What the code of many transformers does between two norms."""

    def __init__(self, activation=F.gelu, bias=True, p=0.0, **options):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(32, 64, bias=bias), nn.Linear(64, 32, bias=bias)
        self.drop, self.activation, self.options = nn.Dropout(p), activation, options

    def forward(self, x):
        return x + self.fc2(self.drop(self.activation(self.fc1(x), **self.options)))


class Twice(Block):
    """Whose hidden features are read by more than the second layer."""

    def forward(self, x):
        hidden = F.gelu(self.fc1(x))
        return self.fc2(hidden) + hidden.mean(-1, keepdim=True)


def timm_mlp():
    return pytest.importorskip("timm.layers").Mlp(32, 64)


def gpt2_mlp():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=32, resid_pdrop=0.0)
    return transformers.models.gpt2.modeling_gpt2.GPT2MLP(64, config)


def sequence(activation=None, p=0.0):
    return nn.Sequential(nn.Linear(32, 64), activation or nn.GELU(), nn.Dropout(p), nn.Identity(), nn.Linear(64, 32))


MODULES = {
    "function": (Block, "gelu"),
    "tanh": (lambda: Block(approximate="tanh"), "gelu_tanh"),
    "sequence": (sequence, "gelu"),
    "module tanh": (lambda: sequence(nn.GELU("tanh")), "gelu_tanh"),
    "timm": (timm_mlp, "gelu"),
    "transformers": (gpt2_mlp, "gelu_tanh"),
}


def make(build, pattern="block16", fuse="auto"):
    torch.manual_seed(0)
    return sm.sparsify(build(), 0.5, "uniform", pattern=pattern, first_dense=False, fuse=fuse).to(DEVICE)


def step(model, x, **options):
    """Output, and all gradients."""
    with torch.autocast(DEVICE, **options) if options else torch.enable_grad():
        y = model(x)
    model.zero_grad()
    y.float().square().mean().backward()
    return [y.detach().float(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", MODULES)
def test_as_the_same_model_unfused(name, fused):
    build, activation = MODULES[name]
    x = torch.randn(2, 3, 32, device=DEVICE)
    expected = step(make(build, fuse=False), x)
    assert not fused
    torch.testing.assert_close(step(make(build), x), expected, rtol=1e-4, atol=1e-6)
    assert fused == [activation]


def test_autocast(fused):
    x = torch.randn(2, 3, 32, device=DEVICE)
    expected = step(make(Block, fuse=False), x, dtype=torch.float16)
    torch.testing.assert_close(step(make(Block), x, dtype=torch.float16), expected, rtol=2e-2, atol=2e-3)
    assert fused


@pytest.mark.parametrize("why", [
    "unstructured", "vectors at the end", "no bias", "dropout", "frozen", "hook", "another activation", "used twice",
    "inference of torch.func", "a transform that counts",
])  # fmt: skip
def test_what_stays_as_it_is(why, fused):
    """The same numbers, by the layers one after the other."""
    pattern = {"unstructured": "unstructured", "vectors at the end": "vector16"}.get(why, "block16")
    build = {
        "no bias": lambda: Block(bias=False),
        "dropout": lambda: Block(p=0.5),
        "another activation": lambda: Block(F.silu),
        "used twice": Twice,
    }.get(why, Block)
    found, x = [], torch.randn(3, 32, device=DEVICE)
    for fuse in (False, "auto"):
        model, called = make(build, pattern, fuse), []
        if why == "frozen":
            model.fc2.values.requires_grad_(False)
        if why == "a transform that counts":  # with a frozen bias, so that layers run, and each weight is made once
            model.fc2.bias.requires_grad_(False)
            for layer in (model.fc1, model.fc2):
                layer.transform = lambda values: (called.append(1), 2 * values)[1]  # noqa: B023
        if why == "hook":
            model.fc1.register_forward_hook(lambda *_: called.append(1))  # noqa: B023
        torch.manual_seed(1)
        if why == "inference of torch.func":
            found.append([torch.func.vmap(model)(x)])
        else:
            found.append(step(model, x))
        assert len(called) == {"hook": 1, "a transform that counts": 2}.get(why, 0)
    torch.testing.assert_close(*found)
    assert not fused


def test_dropout_of_a_model_in_evaluation(fused):
    model = make(lambda: Block(p=0.5)).eval()
    x = torch.randn(3, 32, device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(model(x), make(lambda: Block(p=0.5), fuse=False).eval()(x), rtol=1e-4, atol=1e-6)
    assert len(fused) == 1


def test_training_with_updates(fused):
    """Also in batches with an update, whose dense gradients are wanted."""
    found = []
    for fuse in (False, "auto"):
        torch.manual_seed(0)
        model = make(lambda: nn.Sequential(Block(), nn.LayerNorm(32), Block()), fuse=fuse)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        method = sm.RigL(model, optimizer, total_steps=20, interval=3)
        torch.manual_seed(1)
        updates = 0
        for _ in range(8):
            updates += method.updates_now
            model(torch.randn(8, 32, device=DEVICE)).square().mean().backward()
            method.step()
            optimizer.zero_grad()
        found.append(model.state_dict())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert updates == 2 and len(fused) == 2 * 8


def test_copies_pickles_and_the_way_back(fused):
    model, x = make(Block), torch.randn(3, 32, device=DEVICE)
    expected = model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        fused.clear()
        torch.testing.assert_close(copied(x), expected)
        assert len(fused) == 1
    assert type(vars(model)["forward"]) is FusedForward
    fused.clear()
    dense = sm.densify(model)
    torch.testing.assert_close(dense(x), expected, rtol=1e-4, atol=1e-6)
    assert "forward" not in vars(dense) and not fused


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
def test_compiled_without_breaks(fused, monkeypatch):
    """A compiler sees the operation, which it could not make; an exporter sees what it knows."""
    x = torch.randn(3, 32, device=DEVICE)
    model = make(Block)
    expected = step(model, x)
    run, targets, pays = model, [], gelu_mlp.pays
    monkeypatch.setattr(gelu_mlp, "pays", lambda *given: torch.compiler.is_compiling() or pays(*given))  # as on a GPU

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.testing.assert_close(step(torch.compile(run, fullgraph=True, backend="aot_eager"), x), expected)
    torch.compile(run, fullgraph=True, backend=backend)(x)
    assert "sparse_moon.sparse_mlp.default" in targets
    exported = torch.export.export(model, (x,))
    assert "sparse_mlp" not in str(exported.graph)
    hooked = make(Block)
    hooked.fc1.register_forward_hook(lambda *_: None)
    targets.clear()
    torch.compile(hooked, fullgraph=True, backend=backend)(x)
    assert targets and "sparse_moon.sparse_mlp.default" not in targets
