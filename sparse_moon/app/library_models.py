"""Networks of torchvision and of timm, by their names there, with weights drawn at random."""

from importlib import import_module
from typing import Any

from torch import nn


def build_of_library(name: str, num_outputs: int, in_channels: int, image_size: int) -> nn.Module:
    """``torchvision:NAME`` or ``timm:NAME``; nothing is downloaded.

    Raises:
        ValueError: the library is not installed, has no such network, or cannot make it for these images.
    """
    library, _, known = name.partition(":")
    try:
        network = {"timm": _timm, "torchvision": _torchvision}[library](known, num_outputs, in_channels, image_size)
    except Exception as error:  # each network has its own
        raise ValueError(f"{name} cannot be made: {error}") from error
    if getattr(network, "aux_logits", False):
        raise ValueError(f"{name} has auxiliary outputs in training, which a run cannot train")
    return network


def _torchvision(name: str, num_outputs: int, in_channels: int, image_size: int) -> nn.Module:
    from torchvision.models import get_model  # here, because importing it takes seconds

    if in_channels != 3:
        raise ValueError(f"torchvision's networks are for 3 channels, got {in_channels}")
    sizes = {"image_size": image_size} if name.startswith("vit_") else {}
    network: nn.Module = get_model(name, weights=None, num_classes=num_outputs, **sizes)
    return network


def _timm(name: str, num_outputs: int, in_channels: int, image_size: int) -> nn.Module:
    try:
        timm: Any = import_module("timm")
    except ImportError:
        raise ValueError("timm is not installed: pip install timm") from None
    sizes = {"img_size": image_size} if getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False) else {}
    network: nn.Module = timm.create_model(
        name, pretrained=False, num_classes=num_outputs, in_chans=in_channels, **sizes
    )
    return network
