"""Small image sets on disk, for tests of what reads them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparse_moon.app.datasets import DataSet, Images, TensorImages


def everything(images: Images) -> Tensor:
    return images.batch(torch.arange(len(images)))


def arrays(**changes: Any) -> dict[str, np.ndarray]:
    """A small valid set of three classes, 4 x 4 grey."""
    rng = np.random.default_rng(0)
    content: dict[str, np.ndarray] = {
        "x_train": rng.integers(256, size=(9, 4, 4), dtype=np.uint8),
        "y_train": np.arange(9) % 3,
        "x_test": rng.integers(256, size=(5, 4, 4), dtype=np.uint8),
        "y_test": np.arange(5) % 3,
    }
    return content | changes


def save(path: Path, content: dict[str, np.ndarray]) -> str:
    np.savez(path, **content)  # type: ignore[arg-type]
    return str(path)


Tree = dict[str, dict[str, int]]


def save_tree(folder: Path, parts: Tree, size: tuple[int, int] = (4, 4), mode: str = "RGB") -> None:
    """``parts[part][label]`` random images in ``folder/part/label``."""
    rng = np.random.default_rng(0)
    for part, classes in parts.items():
        for label, count in classes.items():
            (folder / part / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(folder / part / label / f"{i}.png")


def rgb(size: int = 16) -> DataSet:
    """Some colour set, for what is converted to be like it."""
    images = TensorImages(torch.zeros(2, 3, size, size, dtype=torch.uint8), torch.arange(2))
    return DataSet("rgb", images, images, 2, ("a", "b"), torch.zeros(3), torch.ones(3), augment=True)
