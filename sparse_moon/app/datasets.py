"""In-distribution (ID) image data by name or by path.

Everything stays uint8 until a batch is used. Shape letters: N images, C channels (1 grey or 3 RGB), H W plane,
K classes.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparse_moon.app.data_root import find_archive, find_folder_of_parts, find_list
from sparse_moon.app.image_arrays import labels, pixels, read_npz
from sparse_moon.app.image_files import ENDINGS, MAX_PIXELS, check_images, find_images, visible
from sparse_moon.app.images import Batches, FolderImages, Images, Shape, TensorImages, convert

__all__ = [
    "Batches",
    "DataSet",
    "FolderImages",
    "Images",
    "TensorImages",
    "convert",
    "digits_by_class",
    "load",
]


@dataclass(frozen=True, eq=False)
class DataSet:
    """A classification problem.

    Attributes:
        name: the name given to `load`, or the last part of the path, without suffix.
        train, test: images of one square shape with labels 0..K-1.
        num_classes: K.
        class_names: K names.
        mean, std: float32 (C,), over the training images in the scale [0, 1].
        augment: whether cropped and mirrored images keep their meaning: so for colour images, which are taken for
            natural ones, but not for digits.
    """

    name: str
    train: Images
    test: Images
    num_classes: int
    class_names: tuple[str, ...]
    mean: Tensor
    std: Tensor
    augment: bool


class _View(NamedTuple):
    """How images are read, as the arguments of `load` say."""

    image_size: int | None
    resize: int | None
    max_pixels: int
    workers: int


_KERAS_KEYS = ("x_train", "y_train", "x_test", "y_test")
_FROM_TORCHVISION = ("mnist", "cifar10", "cifar100")
_NAMES = (*_FROM_TORCHVISION, "imagenet")
_CLASS_NAMES = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}
# Those that everybody takes, and that published weights were trained with.
_STATISTICS = {"imagenet": (torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225]))}
# Decoding all of ImageNet for its mean would take longer than the first epochs.
_FOLDER_STATISTICS_IMAGES = 20_000


def load(
    dataset: str,
    root: Path | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
    resize: int | None = None,
    max_pixels: int = MAX_PIXELS,
    workers: int = 0,
) -> DataSet:
    """In-distribution data by name or path.

    Args:
        dataset: one of

            - ``digits``: scikit-learn's 8x8 grey digits, always at hand. Classes 0 to 7; 8 and 9 are left for
              `sparse_moon.app.ood_sets`. Every fifth image of a class is for testing.
            - ``mnist``, ``cifar10``, ``cifar100``, ``imagenet``: ``root/NAME.npz`` if it exists, otherwise OpenOOD's
              lists ``root/benchmark_imglist/NAME/train_NAME.txt`` and ``test_NAME.txt``, with the images in
              ``root/images_classic`` or ``root/images_largescale``; otherwise torchvision's files under ``root``, which
              for ImageNet are folders ``train`` and ``val`` in ``root``, or in a folder of the name.
            - a path that ends in ``.npz``: arrays ``x_train, y_train, x_test, y_test`` as in Keras. Images (N, H, W),
              (N, H, W, C) or (N, C, H, W), uint8 or floating point in [0, 1]; labels integer, (N,) or (N, 1).
            - a folder with ``train/`` and ``test/`` or ``val/``, each with a folder of images for every class, nested
              in any way, see `sparse_moon.app.image_files`. Every test image is decoded once, so that a damaged one is
              found now, and at most 20,000 of the training images, for the statistics; of the others the header.

            The classes are those of the training labels, which must be 0..K-1, also where a file has the name of a
            set that is known to have others.
        root: folder of the named sets, ``data`` by default.
        download: whether a named set that is missing is downloaded.
        image_size: images become (C, image_size, image_size), see `convert`; by default they stay as they are and
            must be square and of one size.
        resize: length of their shorter side before the middle ``image_size`` of them is cut out, see `convert`.
        max_pixels: width times height of the largest image file that is read.
        workers: processes that decode image files, see `FolderImages`.

    Raises:
        FileNotFoundError: the data is not there.
        ValueError: it is damaged or not as described above.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"expected image_size >= 1, got {image_size}")
    if resize is not None and (image_size is None or resize < image_size):
        raise ValueError(f"resize needs an image_size that is at most as long, got {resize} and {image_size}")
    view = _View(image_size, resize, max_pixels, workers)
    _check_text("the data set", dataset)
    path = Path(dataset)
    if dataset == "digits":
        return _digits(view)
    if dataset in _NAMES:
        return _named(dataset, Path(root or "data"), download, view)
    if path.is_dir():
        return _from_folder(path.name or path.resolve().name, path, view)
    if path.suffix.lower() == ".npz":
        return _from_arrays(path.stem, str(path), read_npz(path, _KERAS_KEYS), view)
    raise FileNotFoundError(
        f"no data set {dataset!r}: expected one of {', '.join(['digits', *_NAMES])}, a .npz file or a folder"
    )


def _named(name: str, root: Path, download: bool, view: _View) -> DataSet:
    if archive := find_archive(root, name):
        return _from_arrays(name, str(archive), read_npz(archive, _KERAS_KEYS), view)
    lists = [find_list(root, name, part, name) for part in ("train", "test")]
    if lists[0] and lists[1]:
        where, parts = str(lists[0].path.parent), [(one.files, one.labels) for one in lists if one]
        classes = _check_labels(lists[0].labels, lists[1].labels, where)
        return _from_files(name, where, parts, _class_names(name, classes), view)
    if name in _FROM_TORCHVISION:
        from sparse_moon.app.torchvision_sets import read  # here, because importing torchvision takes seconds

        arrays = [array for train in (True, False) for array in read(name, root, train, download)]
        return _from_arrays(name, str(root), arrays, view)
    if folder := find_folder_of_parts(root, name, ("train", "val")):
        return _from_folder(name, folder, view)
    raise FileNotFoundError(
        f"{name} was not found: looked for {root / name}.npz, for OpenOOD's lists under {root}, and for folders train "
        f"and val in {root} or in a folder of the name there"
    )


def digits_by_class() -> list[np.ndarray]:
    """Scikit-learn's digits, uint8 (N, 8, 8), of each of the ten classes."""
    from sklearn.datasets import load_digits  # here, because importing it takes seconds

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return [pixels[digits.target == label] for label in range(10)]


def _digits(view: _View) -> DataSet:
    arrays: list[np.ndarray] = []
    for test in (False, True):
        chosen = [p[np.arange(len(p)) % 5 // 4 == test] for p in digits_by_class()[:8]]
        arrays += [np.concatenate(chosen), np.repeat(np.arange(8), [len(p) for p in chosen])]
    return _from_arrays("digits", "digits", arrays, view)


def _from_arrays(name: str, where: str, arrays: Sequence[np.ndarray], view: _View) -> DataSet:
    """A data set of x_train, y_train, x_test, y_test, checked."""
    x_train, x_test = pixels(arrays[0], f"{where}: x_train"), pixels(arrays[2], f"{where}: x_test")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(f"{where}: training images {(*x_train.shape[1:],)} but test images {(*x_test.shape[1:],)}")
    y_train = labels(arrays[1], len(x_train), f"{where}: y_train")
    y_test = labels(arrays[3], len(x_test), f"{where}: y_test")
    classes = _check_labels(y_train, y_test, where)
    channels, height, width = x_train.shape[1:]
    shape = _square((channels, height, width), view.image_size, where)
    train, test = (TensorImages(x, y, shape, view.resize) for x, y in ((x_train, y_train), (x_test, y_test)))
    return _data_set(name, train, test, _class_names(name, classes))


def _check_labels(y_train: Tensor, y_test: Tensor, where: str) -> int:
    """How many classes there are; ``ValueError`` unless the labels are 0..K-1, K >= 2, and all are in training."""
    present = y_train.unique().tolist()
    expected = next((i for i, label in enumerate(present) if i != label), len(present))
    if expected < len(present) or expected < 2:
        raise ValueError(
            f"{where}: expected training labels 0..K-1, K >= 2, each at least once, got "
            f"{present[0]} to {present[-1]} without {expected}"
        )
    if not 0 <= int(y_test.min()) <= int(y_test.max()) < len(present):
        raise ValueError(
            f"{where}: expected test labels 0 to {len(present) - 1} as in training, "
            f"got {int(y_test.min())} to {int(y_test.max())}"
        )
    return len(present)


def _class_names(name: str, classes: int) -> tuple[str, ...]:
    """Those of a known set, unless a file of its name has other classes."""
    names = _CLASS_NAMES.get(name, ())
    return names if len(names) == classes else tuple(map(str, range(classes)))


def _from_folder(name: str, path: Path, view: _View) -> DataSet:
    held_out = next((part for part in ("test", "val") if (path / part).is_dir()), None)
    if held_out is None or not (path / "train").is_dir():
        raise ValueError(
            f"{path}: expected folders train and test (or val), got {sorted(p.name for p in path.iterdir())}"
        )
    classes, held_out_classes = (
        sorted(entry.name for entry in visible(path / part) if entry.is_dir()) for part in ("train", held_out)
    )
    if classes != held_out_classes or len(classes) < 2:
        only = [sorted({*a} - {*b}) for a, b in ((classes, held_out_classes), (held_out_classes, classes))]
        raise ValueError(
            f"{path}: expected the same 2 or more class folders in train and {held_out}, "
            f"got {classes} and {held_out_classes}; only in train: {only[0]}, only in {held_out}: {only[1]}"
        )
    for folder in classes:
        _check_text("a class folder", folder)
    parts = [_class_folders(path / part, classes) for part in ("train", held_out)]
    return _from_files(name, str(path), parts, tuple(classes), view)


def _from_files(
    name: str,
    where: str,
    parts: Sequence[tuple[Sequence[Path], Tensor]],
    class_names: tuple[str, ...],
    view: _View,
) -> DataSet:
    """A data set of the files and labels of both parts."""
    found = [check_images(files, decode=part > 0, max_pixels=view.max_pixels) for part, (files, _) in enumerate(parts)]
    sizes, modes = ({*values} for values in zip(*found[0], *found[1], strict=True))
    if view.image_size is None and len(sizes) > 1:
        raise ValueError(f"{where}: images of several sizes, {sizes}: pass image_size to resize them")
    width, height = sizes.pop()
    shape = _square((1 if modes == {"L"} else 3, height, width), view.image_size, where)
    train, test = (
        FolderImages(files, shape, labels, view.max_pixels, resize=view.resize, workers=view.workers)
        for files, labels in parts
    )
    every = -(-len(train) // _FOLDER_STATISTICS_IMAGES)
    return _data_set(name, train, test, class_names, every)


def _class_folders(part: Path, classes: Sequence[str]) -> tuple[list[Path], Tensor]:
    """The files of all classes, and their labels."""
    files = [find_images(part / name) for name in classes]
    loose = [path.name for path in visible(part) if path.is_file() and path.suffix.lower() in ENDINGS]
    if loose:
        warnings.warn(f"{part}: {len(loose)} images such as {loose[0]} are in no class folder: left out", stacklevel=4)
    empty = [name for name, found in zip(classes, files, strict=True) if not found]
    if empty:
        raise FileNotFoundError(
            f"{part}: no valid file for the classes {', '.join(empty)}: expected images that end in one of "
            f"{', '.join(ENDINGS)}"
        )
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([*map(len, files)]))
    return [file for found in files for file in found], labels


def _square(shape: Shape, image_size: int | None, where: str) -> Shape:
    channels, height, width = shape
    if image_size is None and height != width:
        raise ValueError(f"{where}: images of {height} x {width} are not square: pass image_size to crop and resize")
    return channels, image_size or height, image_size or width


def _data_set(name: str, train: Images, test: Images, class_names: tuple[str, ...], every: int = 1) -> DataSet:
    """The statistics are of every ``every``-th training image, exact through a histogram of the 256 levels."""
    channels = train.shape[0]
    if name in _STATISTICS and channels == 3:
        return DataSet(name, train, test, len(class_names), class_names, *_STATISTICS[name], augment=True)
    histogram = torch.zeros(channels, 256, dtype=torch.float64)
    for batch in train.stream(torch.arange(0, len(train), every).split(256)):
        for counts, channel in zip(histogram, batch.unbind(1), strict=True):
            counts += torch.bincount(channel.flatten(), minlength=256)
    share = histogram / histogram.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ levels
    variance = (share * (levels - mean[:, None]) ** 2).sum(1)
    # A constant channel gets the width of one level, so that one can divide by it.
    std = variance.sqrt().clamp_min(1 / 255)
    return DataSet(name, train, test, len(class_names), class_names, mean.float(), std.float(), augment=channels == 3)


def _check_text(what: str, text: str) -> None:
    """Raise ``ValueError`` for text that came from bytes that are not UTF-8, as it cannot be written to a report."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"expected a name in valid UTF-8, got {text!r} as {what}: rename it") from None
