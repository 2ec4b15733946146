import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet50

from sparse_moon.allocation import Allocation
from sparse_moon.flops import (
    LayerCost,
    flops_report,
    format_report,
    layer_costs,
    memory_report,
    training_flops_ratio,
)
from sparse_moon.nn import SparseConv2d, SparseLinear, sparse_layers, sparsify
from sparse_moon.reliability import cigl_overhead, moon_overhead
from sparse_moon.schedules import Cubic
from sparse_moon.topology import Topology


@pytest.fixture(scope="module")
def imagenet_resnet50() -> nn.Module:
    with torch.device("meta"):
        return resnet50()


class SmallNet(nn.Module):
    """Convolutions with stride and groups, batch norm, dropout, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, (1, 3), groups=4, bias=False)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.norm(self.conv(x)).relu())
        return self.fc(self.drop(x.mean((2, 3))))


# 3 x 32 x 32: conv to 8 x 16 x 16, grouped to 12 x 16 x 14
SMALL_NET_FLOPS = {
    "conv": 2 * 3 * 3 * 3 * 8 * 16 * 16,
    "grouped": 2 * 1 * 3 * (8 // 4) * 12 * 16 * 14,
    "fc": 2 * 12 * 10,
}


def test_counts_by_hand() -> None:
    costs = {cost.name: cost for cost in layer_costs(SmallNet(), (3, 32, 32))}
    assert {name: cost.forward_dense for name, cost in costs.items()} == SMALL_NET_FLOPS
    assert {name: cost.forward_sparse for name, cost in costs.items()} == SMALL_NET_FLOPS
    assert costs["grouped"] == LayerCost("grouped", "conv2d", (12, 2, 1, 3), 1.0, 32256, 32256.0)
    assert costs["fc"].kind == "linear"


def test_counts_against_torch_flop_counter() -> None:
    model = SmallNet().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 20, 28))
    assert sum(cost.forward_dense for cost in layer_costs(model, (3, 20, 28))) == counter.get_total_flops()


def test_dilation_and_asymmetric_padding() -> None:
    conv = nn.Conv2d(4, 6, (3, 5), stride=(1, 2), padding=(0, 2), dilation=(2, 1))
    (cost,) = layer_costs(conv, (4, 9, 11))
    assert cost.name == ""
    assert cost.forward_dense == 2 * (3 * 5) * 4 * 6 * (9 - 4) * 6


def test_linear_counts_tokens() -> None:
    (cost,) = layer_costs(nn.Linear(5, 7), (3, 4, 5))
    assert cost.forward_dense == 2 * 5 * 7 * 12


def test_each_call_counts_and_uncalled_layers_cost_nothing() -> None:
    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.square = nn.Linear(6, 6)
            self.again = self.square
            self.idle = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.square(self.square(x)))

    costs = layer_costs(Repeated(), (6,))
    assert [(cost.name, cost.forward_dense) for cost in costs] == [("square", 3 * 72), ("idle", 0)]


def test_densities_scale_and_default_to_one() -> None:
    costs = {cost.name: cost for cost in layer_costs(SmallNet(), (3, 32, 32), {"conv": 0.25, "fc": 0.0})}
    assert costs["conv"].forward_sparse == SMALL_NET_FLOPS["conv"] / 4
    assert costs["conv"].forward_dense == SMALL_NET_FLOPS["conv"]
    assert costs["fc"].forward_sparse == 0
    assert costs["grouped"].density == 1.0


def test_density_of_sparse_modules_is_that_of_their_topology() -> None:
    model = nn.Sequential(
        SparseConv2d(4, 8, 3, padding=1, groups=2, sparsity=0.75),
        nn.Flatten(),
        SparseLinear(8 * 5 * 5, 16, sparsity=0.9, pattern="vector8"),
    )
    conv, linear = layer_costs(model, (4, 5, 5))
    assert (conv.kind, conv.weight_shape, conv.density) == ("conv2d", (8, 2, 3, 3), 36 / 144)
    assert conv.forward_dense == 2 * 9 * 2 * 8 * 25
    assert conv.forward_sparse == conv.forward_dense / 4
    assert (linear.kind, linear.weight_shape) == ("linear", (16, 200))
    assert linear.forward_sparse == 2 * sparse_layers(model)["2"].topology.nnz


def test_sparse_modules_on_the_meta_device() -> None:
    model = sparsify(SmallNet(), 0.5)
    here = layer_costs(model, (3, 32, 32))
    assert layer_costs(model.to("meta"), (3, 32, 32)) == here


@pytest.mark.parametrize(
    ("model", "densities", "message"),
    [
        (nn.ReLU(), None, "no linear or 2-d convolution"),
        (nn.Linear(2, 2), {"typo": 0.5}, "typo"),
        (nn.Linear(2, 2), {"": 1.5}, r"in \[0, 1\], got 1.5"),
        (SparseLinear(4, 4, sparsity=0.5), {"": 0.5}, "not a dense"),
    ],
)
def test_bad_arguments(model: nn.Module, densities: dict[str, float] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_costs(model, (2,), densities)


def state_of(model: nn.Module) -> tuple[list[bool], int, dict[str, Tensor]]:
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    return [m.training for m in model.modules()], hooks, {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("input_size", [(3, 32, 32), (4, 32, 32)], ids=["runs", "fails"])
def test_the_model_is_left_as_it_was(input_size: tuple[int, ...]) -> None:
    model = SmallNet()
    model.norm.eval()  # a mixture of modes, to be kept
    model(torch.randn(2, 3, 32, 32))
    modes, hooks, state = state_of(model)
    if input_size[0] == 3:
        layer_costs(model, input_size)
    else:
        with pytest.raises(RuntimeError):
            layer_costs(model, input_size)
    modes_after, hooks_after, state_after = state_of(model)
    assert modes_after == modes and hooks_after == hooks == 0
    assert all(torch.equal(state[name], state_after[name]) for name in state)


def test_batch_norm_statistics_are_untouched_in_training_mode() -> None:
    model = SmallNet().train()
    layer_costs(model, (3, 32, 32))
    assert model.training and model.norm.training
    assert model.norm.num_batches_tracked == 0
    assert model.state_dict()["norm.running_mean"].tolist() == [0.0] * 8


def test_resnet50_dense(imagenet_resnet50: nn.Module) -> None:
    forward = sum(cost.forward_dense for cost in layer_costs(imagenet_resnet50, (3, 224, 224)))
    assert forward == pytest.approx(8.2e9, rel=0.01)
    assert 3 * forward * 32_000 * 4096 == pytest.approx(3.2e18, rel=0.01)  # RigL, section 4.1


@pytest.mark.parametrize(
    ("sparsity", "allocation", "low", "high"),
    [(0.8, "uniform", 0.22, 0.23), (0.8, "erk", 0.41, 0.42), (0.9, "uniform", 0.10, 0.13), (0.9, "erk", 0.24, 0.25)],
)
def test_resnet50_sparse(
    imagenet_resnet50: nn.Module, sparsity: float, allocation: Allocation, low: float, high: float
) -> None:
    report = flops_report(imagenet_resnet50, (3, 224, 224), sparsity=sparsity, allocation=allocation)
    assert low <= report["forward_ratio"] <= high
    assert report["sparsity"] == pytest.approx(sparsity, abs=4e-4)


def test_training_ratio_by_hand() -> None:
    # f_S = 1, f_D = 5, an update each 4 steps: (3 * 3 + 2 + 5) / 4 = 4, or as an extra pass (3 * 4 + 2 + 5) / 5 = 3.8
    assert training_flops_ratio("dense", 1, 5) == 1.0
    assert training_flops_ratio("static", 1, 5) == pytest.approx(0.2)
    assert training_flops_ratio("set", 1, 5, interval=4) == pytest.approx(0.2)
    assert training_flops_ratio("rigl", 1, 5, interval=4, update_fraction=1.0) == pytest.approx(4 / 15)
    assert training_flops_ratio("rigl", 1, 5, interval=4, update_fraction=0.5) == pytest.approx(3.5 / 15)
    assert training_flops_ratio("rigl", 1, 5, interval=4, update_fraction=0.0) == pytest.approx(0.2)
    extra = training_flops_ratio("rigl", 1, 5, interval=4, update_fraction=1.0, updates_replace_step=False)
    assert extra == pytest.approx(3.8 / 15)
    assert training_flops_ratio("rigl", 1, 5, interval=1, update_fraction=1.0) == pytest.approx(7 / 15)
    assert training_flops_ratio("rigl", 5, 5) == pytest.approx(1.0)


def test_training_ratio_of_other_methods_by_hand() -> None:
    ratio = training_flops_ratio
    assert ratio("mest", 1, 5, interval=4) == pytest.approx(0.2)
    assert ratio("mest", 1, 5, interval=4, growth=0.1) == pytest.approx(0.22)
    assert ratio("srigl", 1, 5, interval=4, update_fraction=0.5) == ratio("rigl", 1, 5, interval=4, update_fraction=0.5)
    # f = 0.1 * 5 + (0.5 - 0.1) * (1 + 4 / 4) + 0.5 * 1 = 1.8
    gmp = {"interval": 4, "update_fraction": 0.5, "start": 0.1}
    assert ratio("gmp", 1, 5, **gmp) == pytest.approx(1.8 / 5)
    assert ratio("gmp", 1, 5, f_start=3.0, **gmp) == pytest.approx((0.1 * 3 + 0.4 * 1.5 + 0.5) / 5)
    # the dense gradient, while it prunes: (0.5 * 5 - 1.3) / 4
    assert ratio("granet", 1, 5, **gmp) == pytest.approx((3 * 1.8 + 0.3) / 15)
    assert ratio("top-kast", 1, 5, f_start=2.0, update_fraction=0.75) == pytest.approx((0.75 * 2 + 0.25) / 5)
    assert ratio("top-kast", 1, 5) == pytest.approx(0.2)


def test_training_ratio_of_gmp_is_that_of_its_schedule() -> None:
    cubic = Cubic(5.0, 1.0, 60_000)
    steps = sum(cubic(max(step - 10_000, 0)) for step in range(100_000)) / 100_000
    assert training_flops_ratio("gmp", 1, 5, update_fraction=0.7, start=0.1) == pytest.approx(steps / 5, rel=1e-4)


def test_report_of_methods_that_begin_with_more_weights() -> None:
    report = flops_report(
        nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100)), (100,), sparsity=0.9, allocation="uniform",
        method="gmp", update_fraction=0.5, built_sparsity=0.0,
    )  # fmt: skip
    dense, sparse = 40_000, 20_000 + 2_000  # the first layer stays dense
    assert (report["forward_dense"], report["forward_sparse"]) == (dense, pytest.approx(sparse))
    expected = (0.5 * (sparse + (dense - sparse) / 4) + 0.5 * sparse) / dense
    assert report["train_ratio"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "magic"}, "'magic'"),
        ({"method": "gmp", "f_start": 0.5}, r"f_sparse <= f_start <= f_dense, .* got f_start 0\.5, start 0"),
        ({"method": "gmp", "f_start": 6.0}, r"f_sparse <= f_start <= f_dense, .* got f_start 6\.0, start 0"),
        ({"method": "gmp", "start": 0.8}, r"0 <= start <= update_fraction .* got f_start None, start 0\.8"),
        ({"method": "mest", "growth": -0.1}, r"growth >= 0, got .* growth -0\.1"),
        ({"f_sparse": 6.0}, r"0 <= f_sparse <= f_dense and f_dense > 0, got 6\.0 and 5\.0"),
        ({"f_sparse": -1.0}, r"0 <= f_sparse <= f_dense and f_dense > 0, got -1\.0 and 5\.0"),
        ({"f_sparse": 0.0, "f_dense": 0.0}, r"f_dense > 0, got 0\.0 and 0\.0"),
        ({"interval": 0}, "need interval >= 1 and .* got 0 and"),
        ({"update_fraction": 1.1}, r"update_fraction in \[0, 1\], got 100 and 1\.1"),
    ],
)
def test_training_ratio_rejects(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training_flops_ratio(**{"method": "rigl", "f_sparse": 1.0, "f_dense": 5.0, **arguments})


def test_moon_overhead_is_appendix_f() -> None:
    # ResNet-50 at 80 %, uniform, ImageNet, batch 32, 100 epochs: the setting of Appendix F
    forward, examples = 1.88e9, 1_281_167
    settings: dict[str, Any] = {
        "forward": forward,
        "parameters": 5.1e6,
        "num_classes": 1000,
        "examples": examples,
        "epochs": 100,
    }
    training = 3 * forward * examples * 100
    final = moon_overhead(training, **settings)
    steps = examples / 32 * 100
    assert final["loss"] == pytest.approx(steps * (0.05 * 1.3e5 + 0.95 * 2.6e5), rel=0.02)
    assert final["loss"] == pytest.approx(1.0e12, rel=0.02)
    assert final["averaging"] == 3 * 5.1e6 * 20
    assert final["batch_norm"] == pytest.approx(2.4e15, rel=0.01)
    assert final["total"] == final["loss"] + final["averaging"] + final["batch_norm"]
    assert final["ratio"] == pytest.approx(0.0033, abs=5e-5)
    every_epoch = moon_overhead(training, **settings, refresh="epoch")
    assert every_epoch["batch_norm"] == 20 * final["batch_norm"]
    assert every_epoch["ratio"] == pytest.approx(0.067, abs=5e-4)


def test_cigl_overhead_by_hand() -> None:
    cost = cigl_overhead(
        1e6, forward=10.0, parameters=7.0, masked=5.0, examples=100, epochs=4, batch_size=30, averaged_epochs=2,
        refresh="epoch",
    )  # fmt: skip
    assert cost == {
        "mask": 2 * 5 * 4 * 4,
        "averaging": (3 * 7 + 5) * 2,
        "batch_norm": 10 * 100 * 2,
        "total": 160 + 52 + 2000,
        "ratio": 2212 / 1e6,
    }


def test_nothing_averaged_needs_no_refresh() -> None:
    cost = moon_overhead(1.0, forward=1.0, parameters=1.0, num_classes=1, examples=1, epochs=8, averaged_epochs=0)
    assert (cost["averaging"], cost["batch_norm"]) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"refresh": "never"}, "unknown refresh 'never'"),
        ({"averaged_epochs": 11}, r"averaged_epochs must be in \[0, 10\], got 11"),
        ({"warmup_epochs": 11}, r"warmup_epochs must be in \[0, 10\], got 11"),
        ({"training_flops": 0.0}, r"training_flops must be positive, got 0\.0"),
    ],
)
def test_overhead_rejects(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "training_flops": 1.0,
        "forward": 1.0,
        "parameters": 1,
        "num_classes": 2,
        "examples": 9,
        "epochs": 10,
    }
    with pytest.raises(ValueError, match=message):
        moon_overhead(**{**good, "averaged_epochs": 2, **arguments})


def test_report_agrees_with_the_sparsified_model() -> None:
    """Densities of the allocation and of a really sparse model differ by rounding to whole weights only."""
    settings: dict[str, Any] = {"method": "rigl", "interval": 10, "epochs": 7, "examples": 1000, "batch_size": 64}
    planned = flops_report(SmallNet(), (3, 32, 32), sparsity=0.6, exclude=("fc",), **settings)
    model = sparsify(SmallNet(), 0.6, exclude=("fc",))
    actual = flops_report(model, (3, 32, 32), **settings)
    assert planned["layers"].keys() == actual["layers"].keys()
    for name, layer in planned["layers"].items():
        numel = math.prod(layer["weight_shape"])
        assert layer["density"] == pytest.approx(actual["layers"][name]["density"], abs=0.5 / numel)
    assert planned["layers"]["fc"]["density"] == 1.0
    assert actual["parameters"] == sum(p.numel() for p in model.parameters())
    assert planned["parameters"] == pytest.approx(actual["parameters"], abs=2)
    for key in ("sparsity", "forward_ratio", "train_ratio"):
        assert planned[key] == pytest.approx(actual[key], rel=0.02)
    assert planned["train_ratio"] > planned["forward_ratio"]


@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_report_of_dense_training(sparsity: float | None) -> None:
    report = flops_report(SmallNet(), (3, 32, 32), method="dense", sparsity=sparsity)
    assert report["forward_dense"] == report["forward_sparse"] == sum(SMALL_NET_FLOPS.values())
    assert (report["sparsity"], report["forward_ratio"], report["train_ratio"]) == (0.0, 1.0, 1.0)
    assert report["parameters"] == sum(p.numel() for p in SmallNet().parameters())
    assert report["overhead"]["cigl"]["mask"] == 0


def test_report_counts_shared_weights_once() -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(20, 20, bias=False), nn.ReLU(), nn.Linear(20, 20, bias=False))
        model[2].weight = model[0].weight
        return model

    report = flops_report(tied(), (20,), sparsity=0.5)
    assert report["parameters"] == 200
    assert report["forward_ratio"] == 0.5 and report["forward_dense"] == 2 * 2 * 400
    assert flops_report(sparsify(tied(), 0.5), (20,))["layers"] == report["layers"]


def test_report_of_modules_with_several_weights() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.fc = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.lstm(x)[0][:, -1])

    report = flops_report(Recurrent(), (5, 8))
    weights = 4 * 16 * (8 + 16) + 16 * 4
    assert (report["sparsity"], report["parameters"]) == (0.0, weights + 2 * 4 * 16 + 4)
    report = flops_report(Recurrent(), (5, 8), sparsity=0.5)
    assert (report["sparsity"], report["parameters"]) == (pytest.approx(32 / weights), 1732 - 32)


def test_report_of_layers_of_several_sizes_that_share_a_weight() -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8))
        model[1].weight = model[0].weight
        return model

    planned = flops_report(tied(), (32,), sparsity=0.8, method="static")
    actual = flops_report(sparsify(tied(), 0.8), (32,), method="static")
    assert planned == actual
    assert planned["forward_sparse"] == 2 * (2 * 158 + 99)  # 158 and 99 weights by ERK
    assert planned["train_ratio"] == pytest.approx(830 / 4608)
    own = layer_costs(tied(), (32,), {"0": 0.5, "1": 0.25})
    assert [cost.density for cost in own] == [0.5, 0.25, 1.0]


@pytest.mark.parametrize(
    ("method", "pattern", "fc"),
    # round(0.3 * 8) of 4 x 2 blocks; in each row round(0.3 * 2), or round(0.3 * 32) weights
    [("rigl", "block16", 2 / 8), ("srigl", "block16", 1 / 2), ("srigl", "unstructured", 10 / 32)],
)
def test_report_counts_whole_blocks(method: str, pattern: str, fc: float) -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.Flatten(), nn.Linear(32, 32), nn.Linear(32, 64))

    settings: dict[str, Any] = {"allocation": "uniform", "pattern": pattern}
    planned = flops_report(net(), (16, 1, 1), sparsity=0.7, **settings, method=method)
    selection = "constant_fan_in" if method == "srigl" else "random"
    with pytest.warns(UserWarning, match="the rest is rounding to whole blocks or rows"):
        model = sparsify(net(), 0.7, **settings, selection=selection)
    actual = flops_report(model, (16, 1, 1), method=method)
    assert planned == actual
    assert planned["layers"]["3"]["density"] == fc


def test_report_keeps_dense_what_the_block_does_not_divide() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 10))
    with pytest.warns(UserWarning, match="stay dense"):
        layers = flops_report(model, (16,), sparsity=0.5, pattern="vector8")["layers"]
    assert (layers["0"]["density"], layers["1"]["density"]) == (0.5, 1.0)


def test_report_rejects() -> None:
    with pytest.raises(ValueError, match="has sparse layers"):
        flops_report(sparsify(SmallNet(), 0.5), (3, 32, 32), sparsity=0.5)

    class Uncalled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ValueError, match="is called in a forward pass"):
        flops_report(Uncalled(), (2,))


def test_report_is_json_and_formats_as_an_aligned_table() -> None:
    report = flops_report(SmallNet(), (3, 32, 32), sparsity=0.5, allocation="uniform")
    text = format_report(json.loads(json.dumps(report)))
    assert text == format_report(report)
    table = text.split("\n\n")[0].splitlines()
    numbers = [line for line in table if line[0].isalpha()][1:]
    assert len({line.rindex(".") for line in numbers}) == 1
    assert table[3] == "grouped  conv2d  12x2x1x3   0.5000      32.26 k       16.13 k"
    assert [line.split()[0] for line in table if line[0].isalpha()] == ["layer", "conv", "grouped", "fc", "total"]
    assert "MOON" in text and "CigL" in text
    assert all(line == line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize(
    ("optimizer", "moments"),
    [
        (lambda p: torch.optim.SGD(p, 0.1), 0),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), 1),
        (lambda p: torch.optim.AdamW(p), 2),
    ],
    ids=["sgd", "momentum", "adamw"],
)
def test_memory_by_hand(optimizer: Callable[..., torch.optim.Optimizer], moments: int) -> None:
    model = nn.Sequential(SparseLinear(32, 16, sparsity=0.75), nn.ReLU(), nn.Linear(16, 4))
    trained = optimizer(model.parameters())
    before = memory_report(model, trained)
    assert before["optimizer_bytes"] == before["dense_optimizer_bytes"] == 0
    model(torch.randn(2, 32)).sum().backward()
    trained.step()
    report = memory_report(model, trained)
    nnz, numel = 128, 512
    index_bytes = 4 * ((16 + 1) + nnz + (32 + 1) + nnz + nnz)  # int32: row_ptr, col, t_ptr, t_row, t_perm
    assert report == {
        "parameter_bytes": 4 * nnz,
        "gradient_bytes": 4 * nnz,
        "optimizer_bytes": 4 * nnz * moments,
        "index_bytes": index_bytes,
        "dense_parameter_bytes": 4 * numel,
        "dense_gradient_bytes": 4 * numel,
        "dense_optimizer_bytes": 4 * numel * moments,
        "ratio": (4 * nnz * (2 + moments) + index_bytes) / (4 * numel * (2 + moments)),
    }
    json.dumps(report)


def test_memory_counts_dtype_blocks_and_shared_weights() -> None:
    model = nn.Sequential(*[SparseLinear(16, 16, sparsity=0.5, pattern="vector8", dtype=torch.bfloat16) for _ in "ab"])
    model[1].values, model[1].topology = model[0].values, model[0].topology
    report = memory_report(model, torch.optim.SGD(model.parameters(), 0.1))
    assert report["parameter_bytes"] == 2 * 128
    assert report["dense_parameter_bytes"] == 2 * 256
    assert report["index_bytes"] == 4 * (3 + 17 + 3 * 16)


def test_memory_of_a_dense_model() -> None:
    report = memory_report(nn.Linear(3, 3), torch.optim.SGD(nn.Linear(3, 3).parameters(), 0.1))
    assert report.pop("ratio") == 1.0
    assert set(report.values()) == {0}


def test_memory_of_a_full_topology_exceeds_dense_by_its_indices() -> None:
    layer = SparseLinear.from_dense(nn.Linear(8, 8), mask=torch.ones(8, 8, dtype=torch.bool))
    assert isinstance(layer.topology, Topology)
    report = memory_report(layer, torch.optim.SGD(layer.parameters(), 0.1))
    assert report["ratio"] == 1 + report["index_bytes"] / (2 * 64 * 4)
