"""Image classifiers by name, each with its head as the last module, an ``nn.Linear`` called ``fc``."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_moon.app.library_models import build_of_library
from sparse_moon.app.own import imported
from sparse_moon.settings import is_library_model

if TYPE_CHECKING:
    from torchvision.models.resnet import BasicBlock, Bottleneck

# Up to this side, in pixels, a ResNet has CIFAR's stem, above it ImageNet's.
_LARGEST_SMALL_IMAGE = 64


@dataclass(frozen=True)
class Model:
    """How to build a network.

    Attributes:
        build: from (num_outputs, in_channels, image_size, width).
        width: the default width.
        smallest_image: side of the smallest square image, in pixels, that it is meant for.
    """

    build: Callable[[int, int, int, int], nn.Module]
    width: int
    smallest_image: int = 1


def build(name: str, num_outputs: int, *, in_channels: int, image_size: int, width: int | None = None) -> nn.Module:
    """A freshly initialised network for images (B, in_channels, image_size, image_size).

    Args:
        name: one of `MODELS`, or the import path of your own.

            - ``mlp``: two hidden layers of ``width`` units.
            - ``small-resnet``: 3 stages of two basic blocks (ResNet-14); for images of 8 to 32 pixels.
            - ``resnet18``, ``resnet50``, ``resnet101``: He et al. 2016, up to 64 pixels as used for CIFAR, with a 3x3
              stem and no max pooling; for larger images torchvision's, with a 7x7 stem (RGB and width 64 only).
            - ``wrn-22-2``: pre-activation wide ResNet (Zagoruyko and Komodakis 2016), depth 22, widening factor 2.
            - ``densenet101``: DenseNet-BC of depth 100 and growth rate ``width``, 12 (Huang et al. 2017), three blocks
              of 16 layers, for images of 32 pixels; DICE calls it DenseNet-101. Its tensors have the names that they
              have in DICE's code.
            - ``torchvision:NAME``, ``timm:NAME``: of these libraries, with weights drawn at random; without ``width``.
            - ``package.module.make``: what ``make(num_outputs=..., in_channels=..., image_size=...)`` returns, called
              with ``width=...``, too, if one is given. Its module must have been imported.

        num_outputs: size of the head, at least 2. A network trained to know the unknown has one more than classes.
        in_channels: C of the images.
        image_size: H = W of the images, in pixels.
        width: hidden units of ``mlp``, channels of the first stage of a ResNet; each stage doubles them. ``wrn-22-2``
            has twice as many in its first stage as in its stem, which has ``width``.

    Raises:
        ValueError: an unknown name, or sizes that do not fit the network.
    """
    if is_library_model(name):
        if width is not None:
            raise ValueError(f"{name} has the width of its name, got width {width}")
        network = build_of_library(name, num_outputs, in_channels, image_size)
        return _checked(network, name, num_outputs, in_channels, image_size)
    if "." in name:
        return _own(name, num_outputs, in_channels, image_size, width)
    if name not in MODELS:
        raise ValueError(f"no model {name!r}: expected one of {', '.join(MODELS)}")
    model = MODELS[name]
    width = model.width if width is None else width
    if num_outputs < 2:
        raise ValueError(f"expected at least 2 outputs, got {num_outputs}")
    if in_channels < 1 or width < 1:
        raise ValueError(f"expected in_channels and width >= 1, got {in_channels} and {width}")
    if image_size < model.smallest_image:
        raise ValueError(f"{name}: expected images of {model.smallest_image} pixels or more, got {image_size}")
    return model.build(num_outputs, in_channels, image_size, width)


def _own(path: str, num_outputs: int, in_channels: int, image_size: int, width: int | None) -> nn.Module:
    """The user's network at an import path."""
    make = imported(path)
    sizes = {"num_outputs": num_outputs, "in_channels": in_channels, "image_size": image_size}
    if width is not None:
        sizes["width"] = width
    try:
        inspect.signature(make).bind(**sizes)
    except (TypeError, ValueError) as error:
        call = ", ".join(f"{size}={value}" for size, value in sizes.items())
        raise ValueError(f"{path} cannot be called with {call}: {error}") from None
    network = make(**sizes)
    if not isinstance(network, nn.Module):
        raise ValueError(f"{path} must return an nn.Module, got {type(network).__name__}")
    return _checked(network, path, num_outputs, in_channels, image_size)


def _checked(network: nn.Module, name: str, num_outputs: int, in_channels: int, image_size: int) -> nn.Module:
    """The network, once it was seen to give the logits that are expected."""
    images = torch.zeros(1, in_channels, image_size, image_size)
    try:
        with torch.no_grad():
            logits = network.eval()(images)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{name} does not take images {tuple(images.shape)}: {error}") from error
    if not isinstance(logits, Tensor) or logits.shape != (1, num_outputs):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{name}: expected logits (1, {num_outputs}) for images {tuple(images.shape)}, got {got}")
    return network.train()


def _mlp(num_outputs: int, in_channels: int, image_size: int, width: int) -> nn.Module:
    layers: list[tuple[str, nn.Module]] = [
        ("flatten", nn.Flatten()),
        ("hidden1", nn.Linear(in_channels * image_size**2, width)),
        ("relu1", nn.ReLU()),
        ("hidden2", nn.Linear(width, width)),
        ("relu2", nn.ReLU()),
        ("fc", nn.Linear(width, num_outputs)),
    ]
    return nn.Sequential(OrderedDict(layers))


class ResNet(nn.Module):
    """Residual network for small images: a 3x3 stem, stages with strides 1, 2, 2, ..., the mean over the plane, a head.

    Args:
        block: torchvision's block.
        blocks: how many of them each stage has. A stage has twice the channels of the one before.
        width: channels of the stem, and of the 3x3 convolutions of the first stage.
    """

    def __init__(
        self,
        block: "type[BasicBlock | Bottleneck]",
        blocks: Sequence[int],
        num_outputs: int,
        in_channels: int,
        width: int,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages = nn.Sequential()
        channels = width
        for s, count in enumerate(blocks):
            stage = nn.Sequential()
            for i in range(count):
                stride = 2 if s > 0 and i == 0 else 1
                planes, out = width << s, (width << s) * block.expansion
                shortcut = None
                if stride > 1 or channels != out:
                    shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
                stage.append(block(channels, planes, stride, shortcut))
                channels = out
            self.stages.append(stage)
        self.fc = nn.Linear(channels, num_outputs)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_outputs) of images (B, C, H, W)."""
        x = self.stages(F.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class _PreActivationBlock(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))), x replaced by a 1x1 convolution of relu(bn(x)) where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        same = stride == 1 and in_channels == channels
        self.shortcut = None if same else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(active))))


class WideResNet(nn.Module):
    """Pre-activation wide ResNet without dropout (Zagoruyko and Komodakis 2016), three stages with strides 1, 2, 2.

    Args:
        depth: 6 n + 4 with n blocks a stage.
        widen: channels of the first stage as a multiple of ``width``.
        width: channels of the stem.
    """

    def __init__(self, depth: int, widen: int, num_outputs: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.stages = nn.Sequential()
        channels = width
        for s in range(3):
            stage = nn.Sequential()
            for i in range((depth - 4) // 6):
                stage.append(_PreActivationBlock(channels, widen * width << s, 2 if s > 0 and i == 0 else 1))
                channels = widen * width << s
            self.stages.append(stage)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_outputs)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_outputs) of images (B, C, H, W)."""
        x = F.relu(self.bn(self.stages(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class _DenseLayer(nn.Module):
    """x beside conv2(relu(bn2(conv1(relu(bn1(x)))))), of ``growth`` channels."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return torch.cat([x, new], 1)


class _DenseBlock(nn.Module):
    def __init__(self, layers: int, in_channels: int, growth: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(*(_DenseLayer(in_channels + i * growth, growth) for i in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class _Transition(nn.Module):
    """The mean over 2 x 2 pixels of conv1(relu(bn1(x))), which has half the channels."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, in_channels // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2)


class DenseNet(nn.Module):
    """DenseNet-BC for small images (Huang et al. 2017): three dense blocks, between them half the channels and pixels.

    Args:
        depth: 6 n + 4 with n layers of two convolutions a block.
        growth: channels that a layer adds; the stem has twice as many.
    """

    def __init__(self, depth: int, growth: int, num_outputs: int, in_channels: int) -> None:
        super().__init__()
        layers, channels = (depth - 4) // 6, 2 * growth
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.block1 = _DenseBlock(layers, channels, growth)
        self.trans1 = _Transition(channels := channels + layers * growth)
        self.block2 = _DenseBlock(layers, channels := channels // 2, growth)
        self.trans2 = _Transition(channels := channels + layers * growth)
        self.block3 = _DenseBlock(layers, channels := channels // 2, growth)
        self.bn1 = nn.BatchNorm2d(channels := channels + layers * growth)
        self.fc = nn.Linear(channels, num_outputs)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_outputs) of images (B, C, H, W)."""
        x = self.trans1(self.block1(self.conv1(x)))
        x = self.block3(self.trans2(self.block2(x)))
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


def _initialise(network: nn.Module) -> None:
    """He initialisation of the convolutions by their fan-out, as torchvision has it; the rest keeps torch's default."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _small_resnet(num_outputs: int, in_channels: int, image_size: int, width: int) -> nn.Module:
    from torchvision.models.resnet import BasicBlock  # here, because importing it takes seconds

    return ResNet(BasicBlock, (2, 2, 2), num_outputs, in_channels, width)


def _resnet(name: str, block: str, blocks: Sequence[int]) -> Callable[[int, int, int, int], nn.Module]:
    """How to build the network of this name, and its block's, in torchvision."""

    def build(num_outputs: int, in_channels: int, image_size: int, width: int) -> nn.Module:
        from torchvision.models import resnet  # here, because importing it takes seconds

        if image_size <= _LARGEST_SMALL_IMAGE:
            return ResNet(getattr(resnet, block), blocks, num_outputs, in_channels, width)
        if (in_channels, width) != (3, 64):
            raise ValueError(
                f"a ResNet for images over {_LARGEST_SMALL_IMAGE} pixels has 3 channels and width 64, "
                f"got {in_channels} and {width}"
            )
        network: nn.Module = getattr(resnet, name)(num_classes=num_outputs)
        return network

    return build


def _densenet101(num_outputs: int, in_channels: int, image_size: int, width: int) -> nn.Module:
    return DenseNet(100, width, num_outputs, in_channels)


def _wrn_22_2(num_outputs: int, in_channels: int, image_size: int, width: int) -> nn.Module:
    return WideResNet(22, 2, num_outputs, in_channels, width)


MODELS: dict[str, Model] = {
    "mlp": Model(_mlp, width=512),
    "small-resnet": Model(_small_resnet, width=16, smallest_image=4),
    "resnet18": Model(_resnet("resnet18", "BasicBlock", (2, 2, 2, 2)), width=64, smallest_image=8),
    "resnet50": Model(_resnet("resnet50", "Bottleneck", (3, 4, 6, 3)), width=64, smallest_image=8),
    "resnet101": Model(_resnet("resnet101", "Bottleneck", (3, 4, 23, 3)), width=64, smallest_image=8),
    "wrn-22-2": Model(_wrn_22_2, width=16, smallest_image=4),
    "densenet101": Model(_densenet101, width=12, smallest_image=4),
}
"""The networks that `build` knows."""
