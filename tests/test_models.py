"""The networks: sizes known from the literature, shapes, initialisation, errors."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from sparse_moon.app.models import MODELS, build

SMALLEST = {name: model.smallest_image for name, model in MODELS.items()}


def parameters(
    name: str, num_outputs: int, in_channels: int = 3, image_size: int = 32, width: int | None = None
) -> int:
    with torch.device("meta"):
        model = build(name, num_outputs, in_channels=in_channels, image_size=image_size, width=width)
    assert all(p.is_meta for p in model.parameters())
    return sum(p.numel() for p in model.parameters())


def test_published_sizes() -> None:
    assert parameters("resnet18", 10) == 11_173_962
    assert parameters("resnet50", 10) == 23_520_842
    assert parameters("resnet50", 1000, image_size=224) == 25_557_032
    assert parameters("resnet18", 1000, image_size=224) == 11_689_512


def test_wrn_22_2_by_hand() -> None:
    def block(i: int, o: int) -> int:
        return 2 * i + 9 * i * o + 2 * o + 9 * o * o + (i * o if i != o else 0)

    stages = [block(i, o) + 2 * block(o, o) for i, o in ((16, 32), (32, 64), (64, 128))]
    assert parameters("wrn-22-2", 10) == 27 * 16 + sum(stages) + 2 * 128 + 128 * 10 + 10 == 1_079_642


def test_small_networks_by_hand() -> None:
    def block(i: int, o: int) -> int:
        return 9 * i * o + 2 * o + 9 * o * o + 2 * o + (i * o + 2 * o if i != o else 0)

    blocks = sum(block(i, o) + block(o, o) for i, o in ((16, 16), (16, 32), (32, 64)))
    assert parameters("small-resnet", 8, 1, 8) == 9 * 16 + 2 * 16 + blocks + 64 * 8 + 8
    assert parameters("mlp", 8, 1, 8) == 65 * 512 + 513 * 512 + 513 * 8


def test_width() -> None:
    assert parameters("mlp", 8, 3, 4, width=10) == 49 * 10 + 11 * 10 + 11 * 8
    with torch.device("meta"):
        narrow: Any = build("resnet50", 10, in_channels=3, image_size=32, width=8)
        wide: Any = build("wrn-22-2", 10, in_channels=3, image_size=32, width=32)
    assert narrow.fc.weight.shape == (10, 8 * 8 * 4)
    assert wide.fc.weight.shape == (10, 32 * 2 * 4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("in_channels", [1, 3])
def test_smallest_images(name: str, in_channels: int) -> None:
    size = SMALLEST[name]
    model = build(name, 5, in_channels=in_channels, image_size=size)
    x = torch.randn(2, in_channels, size, size)
    kept = x.clone()
    logits = model(x)
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert torch.equal(x, kept)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_the_head_is_the_last_module(name: str) -> None:
    with torch.device("meta"):
        model = build(name, 7, in_channels=3, image_size=64)
    last, head = [*model.named_modules()][-1]
    assert last == "fc"
    assert isinstance(head, nn.Linear) and head.out_features == 7


@pytest.mark.parametrize(
    ("name", "size", "planes"),
    [("small-resnet", 32, [32, 16, 8]), ("resnet18", 32, [32, 16, 8, 4]), ("wrn-22-2", 32, [32, 16, 8])],
)
def test_planes_of_the_stages(name: str, size: int, planes: list[int]) -> None:
    with torch.device("meta"):
        model: Any = build(name, 10, in_channels=3, image_size=size)
        x = model.conv1(torch.empty(1, 3, size, size))
        seen = []
        for stage in model.stages:
            x = stage(x)
            seen.append(x.shape[-1])
    assert seen == planes


def test_wide_resnet_by_its_equations() -> None:
    """x + conv2(relu(bn2(conv1(relu(bn1(x)))))) in evaluation mode, where batch norm is affine."""
    model: Any = build("wrn-22-2", 3, in_channels=1, image_size=8, width=2).double().eval()
    norms: list[Any] = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for bn in norms:
        for tensor in (bn.weight, bn.bias, bn.running_mean):
            nn.init.normal_(tensor)
        bn.running_var.uniform_(0.5, 2)

    def bn_relu(bn: Any, x: torch.Tensor) -> torch.Tensor:
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        return ((x - bn.running_mean[:, None, None]) * scale[:, None, None] + bn.bias[:, None, None]).clamp_min(0)

    x = images = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    x = model.conv1(x)
    for s, stage in enumerate(model.stages):
        for i, block in enumerate(stage):
            active = bn_relu(block.bn1, x)
            y = nn.functional.conv2d(active, block.conv1.weight, padding=1, stride=2 if s and not i else 1)
            y = nn.functional.conv2d(bn_relu(block.bn2, y), block.conv2.weight, padding=1)
            if i == 0:
                x = nn.functional.conv2d(active, block.shortcut.weight, stride=2 if s else 1)
            x = x + y
    expected = bn_relu(model.bn, x).mean((2, 3)) @ model.fc.weight.T + model.fc.bias
    torch.testing.assert_close(model(images), expected)


def test_initialisation() -> None:
    model = build("resnet18", 10, in_channels=3, image_size=32)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            # The standard error of a standard deviation of n samples is 1 / sqrt(2 n).
            tolerance = 5 / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=tolerance)


@pytest.mark.parametrize("name", ["mlp", "small-resnet", "wrn-22-2"])
def test_traceable(name: str) -> None:
    model = build(name, 3, in_channels=1, image_size=8, width=4)
    x = torch.randn(2, 1, 8, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="no model 'vgg': expected one of mlp, small-resnet, resnet18, resnet50, "):
        build("vgg", 10, in_channels=3, image_size=32)


@pytest.mark.parametrize("name", [name for name, size in SMALLEST.items() if size > 1])
def test_images_too_small(name: str) -> None:
    size = SMALLEST[name]
    with pytest.raises(ValueError, match=f"{name}: expected images of {size} pixels or more, got {size - 1}"):
        build(name, 10, in_channels=3, image_size=size - 1)


@pytest.mark.parametrize(
    ("name", "num_outputs", "in_channels", "width", "message"),
    [
        ("mlp", 1, 3, None, "expected at least 2 outputs, got 1"),
        ("mlp", 10, 0, None, "expected in_channels and width >= 1, got 0 and 512"),
        ("resnet18", 10, 3, 0, "expected in_channels and width >= 1, got 3 and 0"),
        ("resnet50", 10, 1, None, "images over 64 pixels has 3 channels and width 64, got 1 and 64"),
        ("resnet18", 10, 3, 32, "images over 64 pixels has 3 channels and width 64, got 3 and 32"),
    ],
)
def test_bad_sizes(name: str, num_outputs: int, in_channels: int, width: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, num_outputs, in_channels=in_channels, image_size=65, width=width)
