"""Image sets by name that torchvision reads, and downloads."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from torchvision import datasets

Arrays = tuple[np.ndarray, np.ndarray]
"""Images and labels of one part of a set."""


def _svhn(root: Path, train: bool, download: bool) -> Arrays:
    # DICE keeps the file in a folder of the set's name.
    inside = root / "svhn" if (root / "svhn" / "test_32x32.mat").exists() else root
    svhn = datasets.SVHN(inside, "train" if train else "test", download=download)
    return svhn.data, svhn.labels


def _emnist_letters(root: Path, train: bool, download: bool) -> Arrays:
    letters = datasets.EMNIST(root, split="letters", train=train, download=download)
    return np.asarray(letters.data).transpose(0, 2, 1), np.asarray(letters.targets)  # its files have them on their side


TORCHVISION: dict[str, Callable[..., datasets.VisionDataset]] = {
    "mnist": datasets.MNIST,
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
    "fashionmnist": datasets.FashionMNIST,
    "kmnist": datasets.KMNIST,
}
"""Sets that torchvision makes of (root, train=..., download=...), with ``data`` and ``targets``."""

_OTHERS: dict[str, Callable[[Path, bool, bool], Arrays]] = {"svhn": _svhn, "emnist-letters": _emnist_letters}

_FILES: dict[str, Callable[[Path], datasets.VisionDataset]] = {
    "textures": lambda root: datasets.DTD(root, download=True),
    "places365": lambda root: datasets.Places365(root, split="val", small=True, download=True),
}

READ = (*TORCHVISION, *_OTHERS)
"""Names that `read` takes."""

DOWNLOADED = (*READ, *_FILES)
"""Names of the sets that torchvision downloads."""


def read(name: str, root: Path, train: bool, download: bool) -> Arrays:
    """Images and labels of a part of the set ``name``, one of `READ`, from torchvision's files under ``root``.

    Raises:
        FileNotFoundError: they are not there.
        ValueError: they are damaged.
    """
    try:
        if name in _OTHERS:
            return _OTHERS[name](root, train, download)
        data = TORCHVISION[name](root, train=train, download=download)
        return np.asarray(data.data), np.asarray(data.targets)
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"{name} was not found: looked for {root / name}.npz and for torchvision's files under {root} ({error}); "
            "pass download=True to fetch them, which needs a network"
        ) from error
    except Exception as error:  # parsers of damaged files raise nearly anything
        raise ValueError(f"{name}: torchvision's files under {root} are damaged: {error!r}") from error


def download_files(name: str, root: Path) -> None:
    """Download the set ``name``, whose images are files, into a folder under ``root``.

    Raises:
        FileNotFoundError: it cannot be fetched.
    """
    try:
        _FILES[name](root)
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(f"{name} cannot be fetched into {root}: {error}") from error
