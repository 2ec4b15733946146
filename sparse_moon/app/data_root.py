"""Where named image sets are in a data root: archives, folders of images, and OpenOOD's lists."""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparse_moon.app.image_files import find_images
from sparse_moon.app.ood_groups import SPELLINGS, plain

LISTS = "benchmark_imglist"
"""OpenOOD's folder of lists: ``benchmark_imglist/cifar10/test_tin.txt``."""

# The folders of image sets in a data root of OpenOOD, and in one of DICE.
_FOLDERS = ("", "images_classic", "images_largescale", "ood_datasets")
# What is for testing, where a set has parts.
_PARTS = ("test", "val", "images")


@dataclass(frozen=True)
class ImageList:
    """A list of OpenOOD, one image a line: a path below a folder of images, and a label.

    Attributes:
        path: of the list.
        files: N images.
        labels: int64 (N,); -1 for images of no known class.
    """

    path: Path
    files: list[Path]
    labels: Tensor


def find_archive(root: Path, name: str) -> Path | None:
    """``NAME.npz`` in ``root``, in any spelling of the set's name.

    Raises:
        ValueError: there are several.
    """
    return _only(name, (path for path in _named(root, name) if path.suffix == ".npz"))


def find_folder(root: Path, name: str) -> Path | None:
    """The folder of the set's test images: in ``root`` or in one of its folders of image sets, in any spelling.

    Where it has a folder ``test``, ``val`` or ``images``, it is the first of them. Folders without images do not count:
    torchvision has some sets in other files.

    Raises:
        ValueError: there are several in one place.
    """
    for place in _FOLDERS:
        folders = (path for path in _named(root / place, name) if path.is_dir())
        inner = (next((f / part for part in _PARTS if (f / part).is_dir()), f) for f in folders)
        if found := _only(name, (folder for folder in inner if find_images(folder))):
            return found
    return None


def find_folder_of_parts(root: Path, name: str, parts: Sequence[str]) -> Path | None:
    """The folder of the set that has these folders: ``root`` itself or one in it or in a folder of image sets.

    Raises:
        ValueError: there are several in one place.
    """
    for place in _FOLDERS:
        folders = [*([root] if not place else []), *_named(root / place, name)]
        if found := _only(name, (f for f in folders if all((f / part).is_dir() for part in parts))):
            return found
    return None


def find_list(root: Path, dataset: str, part: str, name: str) -> ImageList | None:
    """OpenOOD's list of a set for one in-distribution set: ``benchmark_imglist/DATASET/PART_NAME.txt``.

    Raises:
        ValueError: there are several, or a line is not one of a list.
        FileNotFoundError: the images are not there.
    """
    lists = _named(root / LISTS / dataset, name, prefix=f"{part}_")
    path = _only(name, (path for path in lists if path.suffix == ".txt"))
    return None if path is None else _read_list(path, root)


def _read_list(path: Path, root: Path) -> ImageList:
    names, labels = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        name, _, rest = line.partition(" ")
        try:
            label = ast.literal_eval(rest.strip())
            labels.append(int(label["label"] if isinstance(label, dict) else label))
        except (ValueError, SyntaxError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: expected an image and its label, got {line!r}") from None
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{path}, line {number}: expected a path below the folder of images, got {name!r}")
        names.append(name)
    if not names:
        raise ValueError(f"{path}: no images")
    places = [root / place for place in _FOLDERS]
    base = next((place for place in places if (place / names[0]).exists()), None)
    if base is None:
        looked = ", ".join(map(str, places))
        raise FileNotFoundError(f"{path} lists {names[0]}, which was not found in any of {looked}")
    return ImageList(path, [base / name for name in names], torch.tensor(labels))


def _named(folder: Path, name: str, prefix: str = "") -> list[Path]:
    """What is in ``folder`` under a spelling of the set's name, but for its suffix."""
    if not folder.is_dir():
        return []
    spellings = {plain(spelling) for spelling in (name, *SPELLINGS.get(name, ()))}
    entries = (path for path in sorted(folder.iterdir()) if path.name.startswith(prefix))
    return [path for path in entries if plain(path.stem.removeprefix(prefix)) in spellings]


def _only(name: str, paths: Iterator[Path]) -> Path | None:
    found = list(paths)
    if len(found) > 1:
        raise ValueError(
            f"{name} is ambiguous: {' and '.join(map(str, found))}; keep one of them, or name it by its path"
        )
    return found[0] if found else None
