"""Real image data by name or by path: in-distribution (ID) sets and out-of-distribution (OOD) images to go with them.

Everything stays uint8 until a batch is used. Shape letters: N images, C channels (1 grey or 3 RGB), H W plane,
K classes.
"""

import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from sparse_moon.images import Batches, FolderImages, Images, Shape, TensorImages, convert, open_image

__all__ = [
    "NEAR_OOD",
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

NEAR_OOD: dict[str, tuple[str, ...]] = {
    "digits": ("digits-8-9", "letters"),
    "mnist": ("letters", "notmnist", "fashion_mnist", "kmnist"),
    "cifar10": ("cifar100", "tinyimagenet"),
    "cifar100": ("cifar10", "tinyimagenet"),
}
"""By ID set the names of the OOD sets close to it in content, as the literature groups them; all others are far."""


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


def load(dataset: str, root: Path | None = None, *, download: bool = False, image_size: int | None = None) -> DataSet:
    """In-distribution data by name or path.

    Args:
        dataset: one of

            - ``digits``: scikit-learn's 8x8 grey digits, always at hand. Classes 0 to 7; 8 and 9 are left for
              `load_ood`. Every fifth image of a class is for testing.
            - ``mnist``, ``cifar10``, ``cifar100``: ``root/NAME.npz`` if it exists, otherwise torchvision's files
              under ``root``.
            - a path that ends in ``.npz``: arrays ``x_train, y_train, x_test, y_test`` as in Keras. Images (N, H, W),
              (N, H, W, C) or (N, C, H, W), uint8 or floating point in [0, 1]; labels integer, (N,) or (N, 1).
            - a folder with ``train/`` and ``test/`` or ``val/``, each with a folder of images for every class.
              Statistics are taken from at most 20,000 of the training images.
        root: folder of the named sets, ``data`` by default.
        download: whether a named set that is missing is downloaded.
        image_size: images become (C, image_size, image_size), see `convert`; by default they stay as they are and
            must be square and of one size.

    Raises:
        FileNotFoundError: the data is not there.
        ValueError: it is damaged or not as described above.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"expected image_size >= 1, got {image_size}")
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
        return _from_folder(path, image_size)
    if path.suffix == ".npz":
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
                    return [file[key] for key in keys]
            found = file.files
    except (OSError, ValueError, EOFError, RuntimeError, SyntaxError, zipfile.BadZipFile, zlib.error) as error:
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
    return _data_set(name, train, test, _CLASS_NAMES.get(name, tuple(map(str, present))))


def _from_folder(path: Path, image_size: int | None) -> DataSet:
    held_out = next((part for part in ("test", "val") if (path / part).is_dir()), None)
    if held_out is None or not (path / "train").is_dir():
        raise ValueError(
            f"{path}: expected folders train and test (or val), got {sorted(p.name for p in path.iterdir())}"
        )
    train, test = (datasets.ImageFolder(path / part) for part in ("train", held_out))
    if train.classes != test.classes or len(train.classes) < 2:
        raise ValueError(
            f"{path}: expected the same 2 or more class folders in train and {held_out}, "
            f"got {train.classes} and {test.classes}"
        )
    parts = [([Path(file) for file, _ in part.samples], torch.tensor(part.targets)) for part in (train, test)]
    shape = _square(_folder_shape([file for files, _ in parts for file in files], image_size), image_size, str(path))
    sources = [FolderImages(files, shape, labels) for files, labels in parts]
    every = -(-len(sources[0]) // _FOLDER_STATISTICS_IMAGES)
    return _data_set(path.name, sources[0], sources[1], tuple(train.classes), every)


def _folder_shape(paths: Sequence[Path], image_size: int | None) -> Shape:
    """The images' size, one unless they are resized, and their channels: grey if all are. Reads headers only."""
    channels, sizes = 1, set()
    for path in paths:
        with open_image(path) as image:
            sizes.add(image.size)
            if Image.getmodebase(image.mode) != "L":
                channels = 3
        if image_size is None and len(sizes) > 1:
            raise ValueError(f"{path}: images of several sizes, {sizes}: pass image_size to resize them")
        if image_size is not None and channels == 3:
            break
    width, height = sizes.pop()
    return channels, height, width


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
    return [*(["digits-8-9"] if dataset == "digits" else []), *_GENERATED]


def load_ood(
    spec: str, like: DataSet, root: Path | None = None, seed: int = 0, *, download: bool = False
) -> tuple[str, Images]:
    """Out-of-distribution images, in the shape of the in-distribution set ``like``, without labels.

    Args:
        spec: ``NAME=PATH``, where PATH is a .npz file with the images in ``x`` or ``x_test`` (as in `load`) or a folder
            of images, nested in any way; or one of the names

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

    Returns:
        The name and the images.

    Raises:
        FileNotFoundError: the data is not there.
        ValueError: it is damaged or not as described above, or is the in-distribution set itself.
    """
    name, given, place = spec.partition("=")
    shape = like.train.shape
    if given:
        if not name or not place:
            raise ValueError(f"expected NAME=PATH, got {spec!r}")
        return name, _ood_at(Path(place), shape)
    if name == like.name:
        raise ValueError(f"{name} is the in-distribution set")
    if name in _GENERATED:
        return name, TensorImages(_GENERATED[name](shape, np.random.default_rng(seed)), shape=shape)
    if name == "digits-8-9":
        if like.name != "digits":
            raise ValueError(f"digits-8-9 are classes held out of digits, the in-distribution set is {like.name}")
        pixels = _pixels(np.concatenate(_digits_by_class()[8:]), name)
        return name, TensorImages(pixels, shape=shape)
    if name == "svhn" or name in _TORCHVISION:
        root = Path(root or "data")
        path = root / f"{name}.npz"
        if path.exists():
            return name, _ood_at(path, shape)
        return name, TensorImages(_pixels(_torchvision(name, root, False, download)[0], name), shape=shape)
    known = ", ".join(["digits-8-9", *_GENERATED, *_TORCHVISION, "svhn"])
    raise ValueError(f"no out-of-distribution set {name!r}: expected one of {known}, or NAME=PATH")


def _ood_at(path: Path, shape: Shape) -> Images:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
        if not files:
            raise ValueError(f"{path}: no images, expected files that end in one of {', '.join(IMG_EXTENSIONS)}")
        return FolderImages(files, shape)
    (pixels,) = _read_npz(path, ("x",), ("x_test",))
    return TensorImages(_pixels(pixels, str(path)), shape=shape)


def _photos(shape: Shape, rng: np.random.Generator) -> Tensor:
    _, height, width = shape
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    images = []
    for _ in range(_GENERATED_IMAGES):
        photo = photos[rng.integers(len(photos))]
        # Not much smaller than the result where the photographs allow it, so that parts are rarely blown up.
        side = int(rng.integers(min(max(32, height, width), 256), min(photo.size)))
        left, top = (int(rng.integers(extent - side + 1)) for extent in photo.size)
        part = photo.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
        images.append(np.array(part))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def _letters(shape: Shape, rng: np.random.Generator) -> Tensor:
    _, height, width = shape
    # Drawn at 64 pixels or more and averaged down, the way scikit-learn's digits were made from larger bitmaps.
    over = max(1, 64 // min(height, width))
    canvas_size = np.array([width, height]) * over
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    faces = [
        # Capital letters of DejaVu Sans Mono are 0.73 of the font size high and at most 0.6 of it wide.
        ImageFont.truetype(fonts / file, round(share * min(canvas_size) / 0.73))
        for file in ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf")
        for share in (0.7, 0.8, 0.9)
    ]
    images = []
    for i in range(_GENERATED_IMAGES):
        letter, face = _LETTERS[i % len(_LETTERS)], faces[rng.integers(len(faces))]
        left, top, right, bottom = face.getbbox(letter)
        offset = rng.uniform(-1 / 16, 1 / 16, 2) * canvas_size
        corner = (canvas_size - (left + right, top + bottom)) / 2 + offset
        canvas = Image.new("L", (int(canvas_size[0]), int(canvas_size[1])))
        ImageDraw.Draw(canvas).text((float(corner[0]), float(corner[1])), letter, fill=255, font=face)
        images.append(np.array(canvas.reduce(over)))
    return torch.from_numpy(np.stack(images)).unsqueeze(1)


def _noise(shape: Shape, rng: np.random.Generator) -> Tensor:
    images = [rng.normal(127.5, 64, shape).round().clip(0, 255).astype(np.uint8) for _ in range(_GENERATED_IMAGES)]
    return torch.from_numpy(np.stack(images))


_GENERATED: dict[str, Callable[[Shape, np.random.Generator], Tensor]] = {
    "photos": _photos,
    "letters": _letters,
    "noise": _noise,
}
_GENERATED_IMAGES = 1000
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
