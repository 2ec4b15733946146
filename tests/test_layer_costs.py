"""What a forward pass costs, of any module and on any input; and this package's operators in torch's counter."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sparse_moon as sm
from sparse_moon.flops import flops_report, format_report, layer_costs

X = torch.randn(2, 8, 16)  # as a sequence: 2 or 8 long

BY_HAND = {
    "LSTM": (nn.LSTM(16, 32), (X,), 16 * 2 * 4 * 32 * (16 + 32)),
    "GRU": (nn.GRU(16, 32, bidirectional=True), (X,), 16 * 2 * 2 * 3 * 32 * (16 + 32)),
    "LSTMCell": (nn.LSTMCell(16, 32), (X[0],), 8 * 2 * 4 * 32 * (16 + 32)),
    "RNN": (nn.RNN(16, 32, num_layers=2), (X,), 16 * 2 * 32 * (16 + 32 + 32 + 32)),
    "Conv1d": (nn.Conv1d(8, 4, 3, groups=2), (X,), 2 * 14 * 2 * 4 * 4 * 3),
    "Conv3d": (nn.Conv3d(8, 4, 3), (torch.randn(1, 8, 5, 5, 5),), 27 * 2 * 4 * 8 * 27),
    "ConvTranspose1d": (nn.ConvTranspose1d(8, 4, 3), (X,), 2 * 16 * 2 * 8 * 4 * 3),
    "ConvTranspose2d": (nn.ConvTranspose2d(8, 4, 3, stride=2), (torch.randn(1, 8, 5, 5),), 25 * 2 * 8 * 4 * 9),
    "ConvTranspose3d": (nn.ConvTranspose3d(8, 4, 2), (torch.randn(1, 8, 3, 3, 3),), 27 * 2 * 8 * 4 * 8),
    "Bilinear": (nn.Bilinear(16, 16, 4), (X, X), 16 * 2 * 4 * 16 * 16),
    # 16 tokens of 4 projections; 8 x 2 heads of 2 x 2 x 8, twice
    "MultiheadAttention": (nn.MultiheadAttention(16, 2), (X, X, X), 16 * 2 * 4 * 16 * 16 + 2 * 16 * 2 * 2 * 2 * 8),
}


def total(model, inputs):
    return sum(cost.forward_dense for cost in layer_costs(model, inputs))


@pytest.mark.parametrize("kind", BY_HAND)
def test_other_modules_by_hand(kind):
    module, inputs, expected = BY_HAND[kind]
    assert total(module, inputs) == expected
    assert next(cost.kind for cost in layer_costs(module, inputs)) == kind
    assert total(module.to("meta"), tuple(x.to("meta") for x in inputs)) == expected


class Functions(nn.Module):
    """Weights that no layer is called for: as functions, a layer's weight used elsewhere, and matrix with vector."""

    def __init__(self):
        super().__init__()
        self.weight, self.vector = nn.Parameter(torch.randn(32, 16)), nn.Parameter(torch.randn(32))
        self.kernel = nn.Parameter(torch.randn(4, 8, 3))
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        y = F.linear(x, self.weight) @ self.vector
        return y, F.conv1d(x, self.kernel), x @ self.layer.weight.t(), torch.einsum("abc,dc->abd", x, self.weight)


def test_products_in_the_model_s_own_code():
    costs = layer_costs(Functions(), (8, 16))
    own = 2 * 8 * 32 * 16 + 2 * 8 * 32 + 14 * 2 * 4 * 8 * 3 + 2 * 8 * 16 * 16 + 2 * 8 * 32 * 16
    assert [(c.name, c.kind, c.forward_dense) for c in costs] == [("", "Functions", own), ("layer", "linear", 0)]


@pytest.mark.parametrize("train", [False, True])
def test_a_transformer_layer_costs_what_its_parts_cost(train):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).train(train)
    attention = 8 * 2 * 4 * 16 * 16 + 2 * 2 * 2 * 8 * 8 * 8
    assert total(layer, (8, 16)) == attention + 8 * 2 * 2 * 16 * 32
    assert torch.backends.mha.get_fastpath_enabled()
    decoder = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)
    with FlopCounterMode(display=False) as counter:  # in training mode nothing is fused
        decoder(X, X)
    assert total(decoder, (X, X)) == counter.get_total_flops()


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(100, 16), nn.Linear(16, 100)

    def forward(self, tokens, mask=None):
        return self.head(self.table(tokens))


def test_token_models_and_example_inputs():
    tokens = torch.zeros(3, 5, dtype=torch.int64)
    one = 5 * 2 * 16 * 100
    assert total(Tokens(), (5,)) == one
    for inputs in (tokens, (tokens,), {"tokens": tokens}, (tokens, None)):
        assert total(Tokens(), inputs) == 3 * one
    report = flops_report(Tokens(), (5,), sparsity=0.5)
    assert report["forward_ratio"] == 0.5
    assert report["sparsity"] == pytest.approx(0.25)  # of all weights, the table's too
    assert report["parameters"] == 1600 + 800 + 100


def test_report_of_a_model_with_other_modules():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 64, 10))
    report = flops_report(model, (3, 8, 8), sparsity=0.5, exclude=nn.ConvTranspose2d)
    layers = report["layers"]
    assert layers["1"]["kind"] == "ConvTranspose2d" and layers["1"]["density"] == 1.0
    assert sum(layer["forward_dense"] for layer in layers.values()) == report["forward_dense"]
    assert layers["1"]["forward_dense"] == 36 * 2 * 8 * 8 * 9
    assert "ConvTranspose2d" in format_report(report)


def test_a_subclass_costs_what_its_code_computes():
    class LowRank(nn.Linear):
        def __init__(self):
            super().__init__(16, 16)
            self.down, self.up = nn.Parameter(torch.randn(2, 16)), nn.Parameter(torch.randn(16, 2))

        def forward(self, x):
            return super().forward(x) + x @ self.down.t() @ self.up.t()

    assert total(LowRank(), (8, 16)) == 8 * 2 * 16 * (16 + 2 + 2)


def sparse_network():
    return nn.Sequential(
        sm.SparseConv2d(4, 8, 3, sparsity=0.5, groups=2),
        sm.SparseConv2d(8, 8, 3, sparsity=0.75, pattern="block4", stride=2),
        nn.Flatten(), sm.SparseLinear(72, 16, sparsity=0.9), sm.SparseLinear(16, 8, sparsity=0.5, pattern="vector8"),
    )  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_torch_s_counter_knows_our_operators(device):
    model, x = sparse_network().to(device), torch.randn(3, 4, 10, 10, device=device)
    nnz = [model[i].topology.nnz for i in (0, 1, 3, 4)]
    positions = [3 * 64, 3 * 9, 3, 3]
    forward = [2 * n * p for n, p in zip(nnz, positions, strict=True)]
    with FlopCounterMode(display=False) as counter:
        y = model(x)
    assert counter.get_total_flops() == sum(forward)
    assert total(model, x) * 1.0 != sum(forward) == sum(cost.forward_sparse for cost in layer_costs(model, x))
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * sum(forward) - forward[0]  # the input needs no gradient
    with FlopCounterMode(display=False) as counter:
        model(x.requires_grad_()).sum().backward()
    assert counter.get_total_flops() == 3 * sum(forward)


def test_growth_steps_cost_the_dense_gradient():
    model = nn.Sequential(
        sm.SparseConv2d(4, 8, 3, sparsity=0.5), nn.Flatten(), sm.SparseLinear(8 * 64, 16, sparsity=0.9)
    )
    method = sm.RigL(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=100, interval=1)
    x = torch.randn(3, 4, 10, 10, requires_grad=True)
    forward = sum(cost.forward_sparse for cost in layer_costs(model, x))
    dense = sum(cost.forward_dense for cost in layer_costs(model, x))
    model(x).sum().backward()
    method.step()
    assert method.updates_now
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    assert counter.get_total_flops() == 2 * forward + dense


@pytest.mark.parametrize("order", ["before", "after", "asked for first"])
def test_formulas_are_registered_whenever_the_counter_is_imported(order):
    counter = "from torch.utils.flop_counter import FlopCounterMode\n"
    ours = "import sparse_moon as sm, sys\n"
    code = {
        "before": counter + ours,
        "after": ours
        + "assert 'torch.utils.flop_counter' not in sys.modules and 'triton' not in sys.modules\n"
        + counter,
        "asked for first": ours
        + "import importlib.util\nimportlib.util.find_spec('torch.utils.flop_counter')\n"
        + counter,
    }[order] + (
        "import torch\nlayer = sm.SparseLinear(8, 8, sparsity=0.5)\n"
        "with FlopCounterMode(display=False) as c: layer(torch.randn(2, 8))\n"
        "assert c.get_total_flops() == 2 * 2 * 32, c.get_total_flops()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
