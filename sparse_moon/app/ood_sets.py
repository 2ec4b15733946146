"""Out-of-distribution (OOD) images by name or by path, to go with an in-distribution set."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from sparse_moon.app.data_root import LISTS, find_archive, find_folder, find_list
from sparse_moon.app.datasets import DataSet, digits_by_class
from sparse_moon.app.generated_images import GENERATED
from sparse_moon.app.image_arrays import pixels, read_npz
from sparse_moon.app.image_files import ENDINGS, MAX_PIXELS, check_images, find_images
from sparse_moon.app.images import FolderImages, Images, TensorImages
from sparse_moon.app.ood_groups import SPELLINGS, canonical


def default_ood(dataset: str) -> list[str]:
    """Names for `load_ood` that are always at hand for the data set `sparse_moon.app.datasets.load` calls so."""
    return [*(["digits-8-9"] if dataset == "digits" else []), *GENERATED]


def set_name(spec: str) -> str:
    """What the results call the set of a spec of `load_ood`."""
    name, given, _ = spec.partition("=")
    return name if given else canonical(name)


def same_source(spec: str, other: str) -> bool:
    """Whether two specs of `load_ood` of one name say the same place, seen from the working folder."""
    (_, given, path), (_, other_given, other_path) = spec.partition("="), other.partition("=")
    return given == other_given and os.path.realpath(path) == os.path.realpath(other_path)


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
        spec: ``NAME=PATH``, where PATH is a .npz file with the images in ``x`` or ``x_test`` (as in
            `sparse_moon.app.datasets.load`) or a folder of images, nested in any way, see
            `sparse_moon.app.image_files`, each decoded once so that a damaged one is found now; NAME is printable,
            without ``/`` and not ``id``; or one of the names

            - ``digits-8-9``: the held-out digits 8 and 9, for ``digits`` only;
            - ``photos``: 1,000 random parts of scikit-learn's two sample photographs;
            - ``letters``: 1,000 drawings of the letters A to Z, light on dark, in two weights and three sizes. I and O
              are left out, since they cannot be told from the digits 1 and 0;
            - ``noise``: 1,000 images of Gaussian noise, mean 1/2 and standard deviation 1/4 of the range;
            - those of `sparse_moon.app.ood_groups.SPELLINGS`: the test set of that name, from the first of

              1. ``root/NAME.npz``;
              2. OpenOOD's list for the in-distribution set, ``root/benchmark_imglist/DATASET/test_NAME.txt``, which
                 leaves out images of known classes, with the images in ``root/images_classic`` or
                 ``root/images_largescale``;
              3. a folder of that name in one of these two, or in ``root``: all its images, or those in its folder
                 ``test``, ``val`` or ``images``;
              4. torchvision's files under ``root``, if torchvision has the set.

        like: what the images are converted to resemble in channels and size.
        root: folder of the named sets, ``data`` by default.
        seed: of ``photos``, ``letters`` and ``noise``.
        download: whether a named set that is missing is downloaded, where torchvision does so.
        max_pixels: width times height of the largest image file that is read.

    Returns:
        The name, as `canonical` has it unless it came with a path, and the images.

    Raises:
        FileNotFoundError: the data is not there.
        ValueError: it is damaged or not as described above, or is the in-distribution set itself, by name or as its
            test images.
    """
    name, images = _load(spec, like, root, seed, download, max_pixels)
    if _same(images, like.test):
        raise ValueError(f"{spec} holds the test images of the in-distribution set {like.name}")
    return name, images


def _load(
    spec: str, like: DataSet, root: Path | None, seed: int, download: bool, max_pixels: int
) -> tuple[str, Images]:
    name, given, place = spec.partition("=")
    shape = like.train.shape
    if given:
        if not name.strip() or not place:
            raise ValueError(f"expected NAME=PATH, got {spec!r}")
        # Scores are kept as "NAME/SCORE", those of the in-distribution set under "id".
        if name == "id" or "/" in name or "\\" in name or not name.isprintable():
            raise ValueError(f'expected a printable NAME without "/" or "\\" and other than "id", got {name!r}')
        return name, _at(Path(place), like, max_pixels)
    name = canonical(name)
    if name == canonical(like.name):
        raise ValueError(f"{name} is the in-distribution set")
    if name in GENERATED:
        return name, TensorImages(GENERATED[name](shape, np.random.default_rng(seed)), shape=shape)
    if name == "digits-8-9":
        if like.name != "digits" or like.num_classes != 8:  # it may be a digits.npz of other classes
            raise ValueError(
                f"digits-8-9 are classes held out of digits, the in-distribution set is {like.name} "
                f"with {like.num_classes} classes"
            )
        return name, _in_memory(np.concatenate(digits_by_class()[8:]), name, like)
    if name in SPELLINGS:
        return name, _named(name, like, Path(root or "data"), download, max_pixels)
    known = ", ".join(["digits-8-9", *GENERATED, *SPELLINGS])
    raise ValueError(f"no out-of-distribution set {name!r}: expected one of {known}, or NAME=PATH")


def _same(images: Images, others: Images) -> bool:
    """Whether two sources have the same images, as far as one can tell without decoding files."""
    if len(images) != len(others):
        return False
    if isinstance(images, TensorImages) and isinstance(others, TensorImages):
        return torch.equal(images.pixels, others.pixels)
    if isinstance(images, FolderImages) and isinstance(others, FolderImages):
        return {path.resolve() for path in images.paths} == {path.resolve() for path in others.paths}
    return False


def _named(name: str, like: DataSet, root: Path, download: bool, max_pixels: int) -> Images:
    if archive := find_archive(root, name):
        return _at(archive, like, max_pixels)
    if listed := find_list(root, like.name, "test", name):
        return _from_files(listed.files, like, max_pixels)
    if folder := find_folder(root, name):
        return _at(folder, like, max_pixels)
    from sparse_moon.app.torchvision_sets import DOWNLOADED, READ, download_files, read  # here: it takes seconds

    if name in READ:
        return _in_memory(read(name, root, False, download)[0], name, like)
    if download and name in DOWNLOADED:
        download_files(name, root)
        if folder := find_folder(root, name):
            return _at(folder, like, max_pixels)
    spelled = "/".join((name, *SPELLINGS[name]))
    raise FileNotFoundError(
        f"{name} was not found: looked for {root / name}.npz, for {root / LISTS / like.name}/test_{name}.txt, and for "
        f"a folder {spelled} in {root}, images_classic and images_largescale; "
        + ("pass download=True to fetch it" if name in DOWNLOADED else "torchvision does not download it")
        + f", or say where it is: {name}=PATH"
    )


def _at(path: Path, like: DataSet, max_pixels: int) -> Images:
    if path.is_dir():
        files = find_images(path)
        if not files:
            raise ValueError(f"{path}: no images, expected files that end in one of {', '.join(ENDINGS)}")
        return _from_files(files, like, max_pixels)
    (array,) = read_npz(path, ("x",), ("x_test",))
    return _in_memory(array, str(path), like)


def _from_files(files: Sequence[Path], like: DataSet, max_pixels: int) -> Images:
    check_images(files, decode=True, max_pixels=max_pixels)
    train = like.train
    return FolderImages(files, train.shape, max_pixels=max_pixels, resize=train.resize, workers=train.workers)


def _in_memory(array: np.ndarray, where: str, like: DataSet) -> Images:
    return TensorImages(pixels(array, where), shape=like.train.shape, resize=like.train.resize)
