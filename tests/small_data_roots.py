"""Data roots on disk in the layouts of torchvision, OpenOOD and DICE, with a few images in each set."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sparse_moon.app.data_root import LISTS

CLASSES = 4


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


def save_data_root(root: Path) -> None:
    """All sets that presets name, each in a layout in which its authors or its users have it."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(256, size=(24, 28, 28), dtype=np.uint8), np.arange(24) % CLASSES
    save_mnist(root, x, y, x[:12], y[:12])
    for part in ("train", "t10k"):
        save_idx(root / "FashionMNIST" / "raw", part, x[:4], y[:4])
    classic, large = root / "images_classic", root / "images_largescale"
    for name in ("cifar10", "cifar100"):
        for part, count in (("train", 6), ("test", 3)):
            names = [f"{name}/{part}/class{label}/{i}.png" for label in range(CLASSES) for i in range(count)]
            save_images(classic, names)
            save_list(root, name, f"{part}_{name}", names, [label for label in range(CLASSES) for _ in range(count)])
    images = [f"{i}.png" for i in range(4)]
    # OpenOOD's, with lists for CIFAR-10 alone
    for name, spelled in (("tin", "tin/test/n01"), ("svhn", "svhn/test/1"), ("notmnist", "notmnist/test/A")):
        save_images(classic / spelled, images)
        save_list(root, "cifar10", f"test_{name}", [f"{spelled}/{image}" for image in images[1:]], [-1] * 3)
    for name in ("species_sub", "inaturalist", "openimage_o", "imagenet_o"):
        save_images(large / name / "images", [f"{i}.jpg" for i in range(4)], size=(90, 80))
    # torchvision's and DICE's
    folders = ("dtd/dtd/images/banded", "val_256", "LSUN/test", "LSUN_resize/LSUN_resize", "iSUN/iSUN_patches")
    for folder in (*folders, "SUN/images", "Places/images"):
        save_images(root / folder, images, size=40)
    for part, count in (("train", 6), ("val", 3)):
        files = [f"n0{label}/{i}.JPEG" for label in range(CLASSES) for i in range(count)]
        save_images(root / "ILSVRC-2012" / part, files, size=(100, 90))
