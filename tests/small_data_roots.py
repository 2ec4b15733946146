"""Data roots on disk in the layouts of torchvision, OpenOOD and DICE, with a few images in each set."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sparse_moon.app.data_root import LISTS


def save_idx(folder: Path, part: str, x: np.ndarray, y: np.ndarray) -> None:
    """MNIST's own files: big-endian magic number, extents, bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, *x.shape) + x.tobytes())
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, len(y)) + y.astype(np.uint8).tobytes())


def save_mnist(root: Path, x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> None:
    """MNIST as torchvision has it."""
    for part, x, y in (("train", x_train, y_train), ("t10k", x_test, y_test)):
        save_idx(root / "MNIST" / "raw", part, x, y)


def save_images(folder: Path, names: Sequence[str], size: int | tuple[int, int] = 32, mode: str = "RGB") -> None:
    """Random images; each has pixels that follow from its name."""
    width, height = (size, size) if isinstance(size, int) else size
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng([*str(path.relative_to(folder)).encode()])
        pixels = rng.integers(256, size=(height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path)


def save_list(root: Path, dataset: str, part: str, names: Sequence[str], labels: Sequence[object]) -> Path:
    """A list of OpenOOD."""
    path = root / LISTS / dataset / f"{part}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name} {label}\n" for name, label in zip(names, labels, strict=True)))
    return path
