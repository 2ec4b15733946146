"""Real image data by name or by path: in-distribution (ID) sets and out-of-distribution (OOD) images to go with them.

Everything stays uint8 until a batch is used. Shape letters: N images, C channels (1 grey or 3 RGB), H W plane,
K classes.
"""

import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision import datasets

from sparse_moon.app.generated_images import GENERATED
from sparse_moon.app.image_files import ENDINGS, MAX_PIXELS, check_images, find_images, visible
from sparse_moon.app.images import Batches, FolderImages, Images, Shape, TensorImages, convert

__all__ = [
    "Batches",
    "DataSet",
    "FolderImages",
    "Images",
    "TensorImages",
    "convert",
    "default_ood",
    "load",
    "load_ood",
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


_KERAS_KEYS = ("x_train", "y_train", "x_test", "y_test")
_TORCHVISION: dict[str, Callable[..., datasets.VisionDataset]] = {
    "mnist": datasets.MNIST,
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
}
_CLASS_NAMES = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}
# Decoding all of ImageNet for its mean would take longer than the first epochs.
_FOLDER_STATISTICS_IMAGES = 20_000


def load(
    dataset: str,
    root: Path | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> DataSet:
    """In-distribution data by name or path.

    Args:
        dataset: one of

            - ``digits``: scikit-learn's 8x8 grey digits, always at hand. Classes 0 to 7; 8 and 9 are left for
              `load_ood`. Every fifth image of a class is for testing.
            - ``mnist``, ``cifar10``, ``cifar100``: ``root/NAME.npz`` if it exists, otherwise torchvision's files
              under ``root``.
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
        max_pixels: width times height of the largest image file that is read.

    Raises:
        FileNotFoundError: the data is not there.
        ValueError: it is damaged or not as described above.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"expected image_size >= 1, got {image_size}")
    _check_text("the data set", dataset)
    path = Path(dataset)
    if dataset == "digits":
        return _digits(image_size)
    if dataset in _TORCHVISION:
        root = Path(root or "data")
        path = root / f"{dataset}.npz"
        if not path.exists():
            arrays = [a for train in (True, False) for a in _torchvision(dataset, root, train, download)]
            return _from_arrays(dataset, str(root), arrays, image_size)
    elif path.is_dir():
        return _from_folder(path, image_size, max_pixels)
    if path.suffix.lower() == ".npz":
        return _from_arrays(path.stem, str(path), _read_npz(path, _KERAS_KEYS), image_size)
    raise FileNotFoundError(
        f"no data set {dataset!r}: expected one of {', '.join(['digits', *_TORCHVISION])}, a .npz file or a folder"
    )


def _digits_by_class() -> list[np.ndarray]:
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return [pixels[digits.target == label] for label in range(10)]


def _digits(image_size: int | None) -> DataSet:
    arrays: list[np.ndarray] = []
    for test in (False, True):
        chosen = [p[np.arange(len(p)) % 5 // 4 == test] for p in _digits_by_class()[:8]]
        arrays += [np.concatenate(chosen), np.repeat(np.arange(8), [len(p) for p in chosen])]
    return _from_arrays("digits", "digits", arrays, image_size)


def _torchvision(name: str, root: Path, train: bool, download: bool) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of the torchvision set ``name``."""
    try:
        if name == "svhn":
            svhn = datasets.SVHN(root, "train" if train else "test", download=download)
            return svhn.data, svhn.labels
        data = _TORCHVISION[name](root, train=train, download=download)
        return np.asarray(data.data), np.asarray(data.targets)
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"{name} was not found: looked for {root / name}.npz and for torchvision's files under {root} ({error}); "
            "pass download=True to fetch them, which needs a network"
        ) from error
    except Exception as error:  # parsers of damaged files raise nearly anything
        raise ValueError(f"{name}: torchvision's files under {root} are damaged: {error!r}") from error


def _read_npz(path: Path, *alternatives: tuple[str, ...]) -> list[np.ndarray]:
    """The arrays of the first alternative whose keys are all there."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: damaged, or not an .npz archive")
    try:
        with np.load(path, allow_pickle=False) as file:
            for keys in alternatives:
                if set(keys) <= set(file.files):
                    # Of a member that is no array, NumPy gives the bytes.
                    return [np.asarray(file[key]) for key in keys]
            found = file.files
    except Exception as error:  # a damaged archive raises nearly anything, up to MemoryError for absurd shapes
        raise ValueError(f"{path}: damaged, or not an .npz archive of plain arrays: {error}") from error
    expected = " or ".join(", ".join(keys) for keys in alternatives)
    raise ValueError(f"{path}: expected the arrays {expected}, got {', '.join(found) or 'none'}")


def _pixels(array: np.ndarray, where: str) -> Tensor:
    """Images of the layouts and types that `load` describes as uint8 (N, C, H, W)."""
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    elif array.ndim != 4 or array.shape[1] not in (1, 3):
        raise ValueError(f"{where}: expected (N, H, W), (N, H, W, 1 or 3) or (N, 1 or 3, H, W), got {array.shape}")
    if array.size == 0:
        raise ValueError(f"{where}: no images, shape {array.shape}")
    if np.issubdtype(array.dtype, np.floating):
        if not ((array >= 0) & (array <= 1)).all():
            raise ValueError(f"{where}: expected floating point in [0, 1], got {array.min()} to {array.max()}")
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"{where}: expected uint8 or floating point in [0, 1], got {array.dtype}")
    return torch.from_numpy(np.ascontiguousarray(array))


def _labels(array: np.ndarray, count: int, where: str) -> Tensor:
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{where}: expected integer labels, got {array.dtype}")
    if array.shape not in ((count,), (count, 1)):
        raise ValueError(f"{where}: expected shape ({count},) or ({count}, 1) as there are images, got {array.shape}")
    return torch.from_numpy(array.reshape(count).astype(np.int64))


def _from_arrays(name: str, where: str, arrays: Sequence[np.ndarray], image_size: int | None) -> DataSet:
    """A data set of x_train, y_train, x_test, y_test, checked."""
    x_train, x_test = _pixels(arrays[0], f"{where}: x_train"), _pixels(arrays[2], f"{where}: x_test")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(f"{where}: training images {(*x_train.shape[1:],)} but test images {(*x_test.shape[1:],)}")
    y_train = _labels(arrays[1], len(x_train), f"{where}: y_train")
    y_test = _labels(arrays[3], len(x_test), f"{where}: y_test")
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
    channels, height, width = x_train.shape[1:]
    shape = _square((channels, height, width), image_size, where)
    train, test = TensorImages(x_train, y_train, shape), TensorImages(x_test, y_test, shape)
    # A file of the name may have other classes.
    names = _CLASS_NAMES.get(name, ())
    return _data_set(name, train, test, names if len(names) == len(present) else tuple(map(str, present)))


def _from_folder(path: Path, image_size: int | None, max_pixels: int) -> DataSet:
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
    for name in classes:
        _check_text("a class folder", name)
    parts = [_class_folders(path / part, classes) for part in ("train", held_out)]
    found = [check_images(files, decode=part > 0, max_pixels=max_pixels) for part, (files, _) in enumerate(parts)]
    sizes, modes = ({*values} for values in zip(*found[0], *found[1], strict=True))
    if image_size is None and len(sizes) > 1:
        raise ValueError(f"{path}: images of several sizes, {sizes}: pass image_size to resize them")
    width, height = sizes.pop()
    shape = _square((1 if modes == {"L"} else 3, height, width), image_size, str(path))
    train, test = (FolderImages(files, shape, labels, max_pixels) for files, labels in parts)
    every = -(-len(train) // _FOLDER_STATISTICS_IMAGES)
    return _data_set(path.name or path.resolve().name, train, test, tuple(classes), every)


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
    histogram = torch.zeros(channels, 256, dtype=torch.float64)
    for batch in train.stream(torch.arange(0, len(train), every).split(256)):
        for counts, pixels in zip(histogram, batch.unbind(1), strict=True):
            counts += torch.bincount(pixels.flatten(), minlength=256)
    share = histogram / histogram.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ levels
    variance = (share * (levels - mean[:, None]) ** 2).sum(1)
    # A constant channel gets the width of one level, so that one can divide by it.
    std = variance.sqrt().clamp_min(1 / 255)
    return DataSet(name, train, test, len(class_names), class_names, mean.float(), std.float(), augment=channels == 3)


def default_ood(dataset: str) -> list[str]:
    """Names for `load_ood` that are always at hand for the data set `load` knows as ``dataset``."""
    return [*(["digits-8-9"] if dataset == "digits" else []), *GENERATED]


def load_ood(
    spec: str,
    like: DataSet,
    root: Path | None = None,
    seed: int = 0,
    *,
    download: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> tuple[str, Images]:
    """Out-of-distribution images, in the shape of the in-distribution set ``like``, without labels.

    Args:
        spec: ``NAME=PATH``, where PATH is a .npz file with the images in ``x`` or ``x_test`` (as in `load`) or a folder
            of images, nested in any way, see `sparse_moon.app.image_files`, each decoded once so that a damaged one is
            found now; NAME is printable, without ``/`` and not ``id``; or one of the names

            - ``digits-8-9``: the held-out digits 8 and 9, for ``digits`` only;
            - ``photos``: 1,000 random parts of scikit-learn's two sample photographs;
            - ``letters``: 1,000 drawings of the letters A to Z, light on dark, in two weights and three sizes. I and O
              are left out, since they cannot be told from the digits 1 and 0;
            - ``noise``: 1,000 images of Gaussian noise, mean 1/2 and standard deviation 1/4 of the range;
            - ``mnist``, ``cifar10``, ``cifar100``, ``svhn``: the test set, under ``root`` as in `load`.
        like: what the images are converted to resemble in channels and size.
        root: folder of the named sets, ``data`` by default.
        seed: of ``photos``, ``letters`` and ``noise``.
        download: whether a named set that is missing is downloaded.
        max_pixels: width times height of the largest image file that is read.

    Returns:
        The name and the images.

    Raises:
        FileNotFoundError: the data is not there.
        ValueError: it is damaged or not as described above, or is the in-distribution set itself.
    """
    name, given, place = spec.partition("=")
    shape = like.train.shape
    if given:
        if not name.strip() or not place:
            raise ValueError(f"expected NAME=PATH, got {spec!r}")
        # Scores are kept as "NAME/SCORE", those of the in-distribution set under "id".
        if name == "id" or "/" in name or "\\" in name or not name.isprintable():
            raise ValueError(f'expected a printable NAME without "/" or "\\" and other than "id", got {name!r}')
        return name, _ood_at(Path(place), shape, max_pixels)
    if name == like.name:
        raise ValueError(f"{name} is the in-distribution set")
    if name in GENERATED:
        return name, TensorImages(GENERATED[name](shape, np.random.default_rng(seed)), shape=shape)
    if name == "digits-8-9":
        if like.name != "digits" or like.num_classes != 8:  # it may be a digits.npz of other classes
            raise ValueError(
                f"digits-8-9 are classes held out of digits, the in-distribution set is {like.name} "
                f"with {like.num_classes} classes"
            )
        pixels = _pixels(np.concatenate(_digits_by_class()[8:]), name)
        return name, TensorImages(pixels, shape=shape)
    if name == "svhn" or name in _TORCHVISION:
        root = Path(root or "data")
        path = root / f"{name}.npz"
        if path.exists():
            return name, _ood_at(path, shape, max_pixels)
        return name, TensorImages(_pixels(_torchvision(name, root, False, download)[0], name), shape=shape)
    known = ", ".join(["digits-8-9", *GENERATED, *_TORCHVISION, "svhn"])
    raise ValueError(f"no out-of-distribution set {name!r}: expected one of {known}, or NAME=PATH")


def _ood_at(path: Path, shape: Shape, max_pixels: int) -> Images:
    if path.is_dir():
        files = find_images(path)
        if not files:
            raise ValueError(f"{path}: no images, expected files that end in one of {', '.join(ENDINGS)}")
        check_images(files, decode=True, max_pixels=max_pixels)
        return FolderImages(files, shape, max_pixels=max_pixels)
    (pixels,) = _read_npz(path, ("x",), ("x_test",))
    return TensorImages(_pixels(pixels, str(path)), shape=shape)


def _check_text(what: str, text: str) -> None:
    """Raise ``ValueError`` for text that came from bytes that are not UTF-8, as it cannot be written to a report."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"expected a name in valid UTF-8, got {text!r} as {what}: rename it") from None
