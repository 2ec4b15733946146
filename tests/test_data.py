"""Data sets by name and by path, and what is wrong with them."""

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from small_data_roots import save_mnist
from small_image_sets import Tree, arrays, everything, save, save_tree
from sparse_moon.app import datasets, torchvision_sets
from sparse_moon.app.datasets import DataSet, Images, load
from sparse_moon.app.ood_sets import load_ood


def labels_of(images: Images) -> list[int]:
    assert images.labels is not None
    assert images.labels.dtype == torch.int64
    return images.labels.tolist()


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load("digits")


def test_digits(digits: DataSet) -> None:
    assert (digits.name, digits.num_classes, digits.augment) == ("digits", 8, False)
    assert digits.class_names == ("0", "1", "2", "3", "4", "5", "6", "7")
    assert digits.train.shape == digits.test.shape == (1, 8, 8)
    assert (len(digits.train), len(digits.test)) == (1158, 285)
    source = load_digits()
    counts = np.bincount(source.target)[:8]
    assert np.bincount(labels_of(digits.test)).tolist() == (counts // 5).tolist()
    assert np.bincount(labels_of(digits.train)).tolist() == (counts - counts // 5).tolist()
    sixes = source.images[source.target == 6]
    test_sixes = everything(digits.test)[torch.tensor(labels_of(digits.test)) == 6][:, 0]
    np.testing.assert_allclose(test_sixes / 255, sixes[4::5] / 16, atol=0.5 / 255)


def test_digits_parts_are_disjoint_and_complete(digits: DataSet) -> None:
    source = load_digits()
    expected = sorted(
        np.rint(image * 255 / 16).astype(np.uint8).tobytes() for image in source.images[source.target < 8]
    )
    parts = [[image.numpy().tobytes() for image in everything(part)] for part in (digits.train, digits.test)]
    assert sorted(parts[0] + parts[1]) == expected
    assert not set(parts[0]) & set(parts[1])


def test_digits_are_the_same_every_time(digits: DataSet) -> None:
    again = load("digits")
    assert torch.equal(everything(again.train), everything(digits.train))
    assert labels_of(again.test) == labels_of(digits.test)


def test_statistics(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(256, size=(300, 5, 5, 3), dtype=np.uint8)
    x[..., 2] = 51
    content = arrays(x_train=x, y_train=np.arange(300) % 3, x_test=x[:5])
    dataset = load(save(tmp_path / "a.npz", content))
    assert dataset.mean.dtype == dataset.std.dtype == torch.float32
    np.testing.assert_allclose(dataset.mean.numpy(), (x / 255).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(dataset.std[:2].numpy(), (x / 255).std((0, 1, 2))[:2], rtol=1e-6)
    # A constant channel must not divide by zero.
    assert dataset.std[2].item() == pytest.approx(1 / 255)


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "NHWC": lambda x: x,
    "NCHW": lambda x: x.transpose(0, 3, 1, 2),
    "float32": lambda x: (x / 255).astype(np.float32),
    "float64 NCHW": lambda x: (x / 255).transpose(0, 3, 1, 2),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_npz_layouts(tmp_path: Path, layout: str, channels: int) -> None:
    rng = np.random.default_rng(0)
    x_train, x_test = (rng.integers(256, size=(count, 5, 5, channels), dtype=np.uint8) for count in (9, 4))
    content = arrays(
        x_train=LAYOUTS[layout](x_train),
        x_test=LAYOUTS[layout](x_test),
        y_train=(np.arange(9, dtype=np.uint8) % 3)[:, None],
        y_test=np.array([2, 0, 0, 1], np.int32),
    )
    dataset = load(save(tmp_path / "mine.npz", content))
    assert (dataset.name, dataset.num_classes, dataset.class_names) == ("mine", 3, ("0", "1", "2"))
    assert dataset.train.shape == dataset.test.shape == (channels, 5, 5)
    assert dataset.augment == (channels == 3)
    assert np.array_equal(everything(dataset.train).permute(0, 2, 3, 1).numpy(), x_train)
    assert np.array_equal(everything(dataset.test).permute(0, 2, 3, 1).numpy(), x_test)
    assert labels_of(dataset.train) == [0, 1, 2] * 3
    assert labels_of(dataset.test) == [2, 0, 0, 1]


def test_floating_point_is_rounded(tmp_path: Path) -> None:
    x_test = np.repeat([0.0, 0.001, 0.003, 0.999, 1.0], 16).reshape(5, 4, 4)
    dataset = load(save(tmp_path / "mine.npz", arrays(x_test=x_test)))
    assert everything(dataset.test)[:, 0, 0, 0].tolist() == [0, 0, 1, 255, 255]


def test_npz_without_channels(tmp_path: Path) -> None:
    content = arrays()
    dataset = load(save(tmp_path / "mine.npz", content))
    assert dataset.train.shape == (1, 4, 4)
    assert np.array_equal(everything(dataset.train)[:, 0].numpy(), content["x_train"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.zeros((9, 4))}, r"x_train: expected \(N, H, W\), .* got \(9, 4\)"),
        ({"x_test": np.zeros((5, 4, 4, 2))}, r"x_test: expected .* got \(5, 4, 4, 2\)"),
        ({"x_train": np.zeros((0, 4, 4), np.uint8)}, r"x_train: no images, shape \(0, 1, 4, 4\)"),
        ({"x_test": np.zeros((0, 4, 4), np.uint8)}, r"x_test: no images"),
        ({"x_train": np.zeros((9, 0, 0), np.uint8)}, r"x_train: no images"),
        ({"x_train": np.zeros((9, 4, 4), np.int64)}, "x_train: expected uint8 or floating point .* got int64"),
        ({"x_train": np.zeros((9, 4, 4), bool)}, "x_train: expected uint8 or floating point .* got bool"),
        ({"x_train": np.full((9, 4, 4), 255.0)}, r"x_train: expected floating point in \[0, 1\], got 255.0 to 255.0"),
        ({"x_train": np.full((9, 4, 4), -0.1)}, r"x_train: expected floating point in \[0, 1\], got -0.1"),
        ({"x_test": np.full((5, 4, 4), np.nan)}, r"x_test: expected floating point in \[0, 1\], got nan"),
        ({"x_test": np.zeros((5, 5, 5), np.uint8)}, r"training images \(1, 4, 4\) but test images \(1, 5, 5\)"),
        ({"y_train": np.zeros(9)}, "y_train: expected integer labels, got float64"),
        ({"y_train": np.arange(8) % 3}, r"y_train: expected shape \(9,\) or \(9, 1\) .* got \(8,\)"),
        ({"y_test": np.zeros((5, 3), int)}, r"y_test: expected shape \(5,\) or \(5, 1\) .* got \(5, 3\)"),
        ({"y_train": np.zeros(9, int)}, r"expected training labels 0..K-1, K >= 2, .* got 0 to 0 without 1"),
        ({"y_train": np.array([0, 1, 3] * 3)}, r"expected training labels 0..K-1, .* got 0 to 3 without 2"),
        ({"y_train": np.arange(9) % 3 + 1}, r"expected training labels 0..K-1, .* got 1 to 3 without 0"),
        (
            {"y_train": np.arange(9) % 3 * 10**12},
            r"expected training labels 0..K-1, .* got 0 to 2000000000000 without 1",
        ),
        ({"y_train": np.arange(9) % 3 - 1}, r"expected training labels 0..K-1, .* got -1 to 1 without 0"),
        ({"y_test": np.arange(5)}, "expected test labels 0 to 2 as in training, got 0 to 4"),
        ({"y_test": np.arange(5) % 3 - 1}, "expected test labels 0 to 2 as in training, got -1 to 1"),
        (
            {"x_train": np.zeros((9, 4, 6), np.uint8), "x_test": np.zeros((5, 4, 6), np.uint8)},
            "images of 4 x 6 are not square: pass image_size",
        ),
    ],
)
def test_bad_arrays(tmp_path: Path, changes: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=rf"mine\.npz: .*{message}"):
        load(save(tmp_path / "mine.npz", arrays(**changes)))


def test_missing_arrays(tmp_path: Path) -> None:
    content = arrays()
    del content["y_test"]
    path = save(tmp_path / "mine.npz", content)
    with pytest.raises(
        ValueError, match=r"mine.npz: expected the arrays x_train, y_train, x_test, y_test, got x_train, "
    ):
        load(path)


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    good = Path(save(path, arrays())).read_bytes()
    broken = {
        "empty": b"",
        "truncated": good[: len(good) // 2],
        "array": good[:200] + bytes([good[200] ^ 1]) + good[201:],
        "not an archive": b"x" * 100,
    }
    for content in broken.values():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"mine\.npz: damaged"):
            load(str(path))
    with io.BytesIO() as file:
        np.save(file, np.zeros(3))
        path.write_bytes(file.getvalue())
    with pytest.raises(ValueError, match=r"mine.npz: damaged, or not an .npz archive"):
        load(str(path))


def test_pickles_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "mine.npz", arrays(y_test=np.array([object()] * 5)))
    with pytest.raises(ValueError, match=r"mine.npz: .*allow_pickle=False"):
        load(path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"mine.npz does not exist"):
        load(str(tmp_path / "mine.npz"))
    with pytest.raises(
        FileNotFoundError, match=r"no data set 'nosuch': expected one of digits, mnist, cifar10, cifar100"
    ):
        load("nosuch")
    with pytest.raises(FileNotFoundError, match=r"mnist was not found: looked for .*mnist.npz and .* download=True"):
        load("mnist", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"cifar10 was not found: looked for .*cifar10.npz"):
        load("cifar10", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_image_size(tmp_path: Path) -> None:
    wide = arrays(x_train=np.zeros((9, 4, 6), np.uint8), x_test=np.zeros((5, 4, 6), np.uint8))
    dataset = load(save(tmp_path / "wide.npz", wide), image_size=8)
    assert dataset.train.shape == dataset.test.shape == (1, 8, 8)
    assert everything(dataset.test).shape == (5, 1, 8, 8)
    with pytest.raises(ValueError, match="expected image_size >= 1, got 0"):
        load("digits", image_size=0)


def test_named_npz(tmp_path: Path) -> None:
    x_train, x_test = (np.zeros((count, 2, 2, 3), np.uint8) for count in (20, 10))
    labels = {"y_train": np.arange(20) % 10, "y_test": np.arange(10)}
    save(tmp_path / "cifar10.npz", {"x_train": x_train, "x_test": x_test, **labels})
    dataset = load("cifar10", tmp_path)
    assert (dataset.name, dataset.augment) == ("cifar10", True)
    assert dataset.class_names[:3] == ("airplane", "automobile", "bird")
    assert labels_of(dataset.test) == list(range(10))


def test_torchvision_files(tmp_path: Path, digits: DataSet) -> None:
    content = arrays()
    save_mnist(tmp_path, **content)
    dataset = load("mnist", tmp_path)
    assert np.array_equal(everything(dataset.train)[:, 0].numpy(), content["x_train"])
    assert labels_of(dataset.test) == content["y_test"].tolist()
    name, ood = load_ood("mnist", digits, tmp_path)
    assert (name, len(ood), ood.shape, ood.labels) == ("mnist", 5, (1, 8, 8), None)
    # An .npz of the name goes first.
    save(tmp_path / "mnist.npz", arrays(x_test=content["x_test"][:3], y_test=content["y_test"][:3]))
    assert len(load("mnist", tmp_path).test) == 3
    assert len(load_ood("mnist", digits, tmp_path)[1]) == 3


@pytest.mark.parametrize("size", [0, 3, 10])
def test_damaged_torchvision_files(tmp_path: Path, size: int) -> None:
    save_mnist(tmp_path, **arrays())
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"mnist: torchvision's files under .* are damaged"):
        load("mnist", tmp_path)


@pytest.mark.parametrize("download", [False, True])
def test_torchvision_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: DataSet, download: bool) -> None:
    asked: list[tuple[Any, ...]] = []

    class Cifar:
        def __init__(self, root: Path, *, train: bool, download: bool) -> None:
            asked.append((root, train, download))
            self.data = np.full((6, 4, 4, 3), 10 if train else 20, np.uint8)
            self.targets = [0, 1, 2, 0, 1, 2]

    class Svhn:
        def __init__(self, root: Path, split: str, *, download: bool) -> None:
            asked.append((root, split, download))
            self.data = np.full((7, 3, 8, 8), 30, np.uint8)
            self.labels = np.zeros(7, int)

    monkeypatch.setitem(torchvision_sets.TORCHVISION, "cifar100", Cifar)
    monkeypatch.setattr(torchvision_sets.datasets, "SVHN", Svhn)
    dataset = load("cifar100", tmp_path, download=download)
    assert asked == [(tmp_path, True, download), (tmp_path, False, download)]
    assert (dataset.train.shape, dataset.num_classes) == ((3, 4, 4), 3)
    assert everything(dataset.train).unique().tolist() == [10]
    assert everything(dataset.test).unique().tolist() == [20]
    assert everything(load_ood("cifar100", digits, tmp_path, download=download)[1]).unique().tolist() == [20]
    assert everything(load_ood("svhn", digits, tmp_path, download=download)[1]).unique().tolist() == [30]
    assert asked[2:] == [(tmp_path, False, download), (tmp_path, "test", download)]


@pytest.mark.parametrize("held_out", ["test", "val"])
@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1), ("P", 3)])
def test_folder(tmp_path: Path, held_out: str, mode: str, channels: int) -> None:
    save_tree(tmp_path / "pets", {"train": {"dog": 3, "cat": 2}, held_out: {"cat": 1, "dog": 1}}, mode=mode)
    dataset = load(str(tmp_path / "pets"))
    assert (dataset.name, dataset.class_names, dataset.num_classes) == ("pets", ("cat", "dog"), 2)
    assert dataset.train.shape == (channels, 4, 4)
    assert labels_of(dataset.train) == [0, 0, 1, 1, 1]
    assert labels_of(dataset.test) == [0, 1]
    pixels = everything(dataset.train)
    with Image.open(tmp_path / "pets" / "train" / "dog" / "1.png") as image:
        expected = np.asarray(image.convert("RGB" if channels == 3 else "L")).reshape(4, 4, channels)
    assert np.array_equal(pixels[3].permute(1, 2, 0).numpy(), expected)
    torch.testing.assert_close(dataset.mean, (pixels.double() / 255).mean((0, 2, 3)).float())


def test_folder_of_several_sizes_and_modes(tmp_path: Path) -> None:
    save_tree(tmp_path, {"train": {"a": 2, "b": 2}}, mode="L")
    save_tree(tmp_path, {"test": {"a": 1, "b": 1}}, size=(9, 6))
    with pytest.raises(ValueError, match=r"images of several sizes, .*\(9, 6\).*: pass image_size"):
        load(str(tmp_path))
    dataset = load(str(tmp_path), image_size=5)
    assert dataset.train.shape == (3, 5, 5)
    assert everything(dataset.train).shape == (4, 3, 5, 5)


def test_folder_statistics_of_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tree(tmp_path, {"train": {"a": 5, "b": 4}, "test": {"a": 1, "b": 1}})
    monkeypatch.setattr(datasets, "_FOLDER_STATISTICS_IMAGES", 4)
    dataset = load(str(tmp_path))
    every_third = dataset.train.batch(torch.tensor([0, 3, 6])).double() / 255
    torch.testing.assert_close(dataset.mean, every_third.mean((0, 2, 3)).float())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"train": {"a": 1, "b": 1}}, r"expected folders train and test \(or val\), got \['train'\]"),
        ({"test": {"a": 1, "b": 1}}, r"expected folders train and test \(or val\), got \['test'\]"),
        ({"train": {"a": 1, "b": 1}, "test": {"a": 1, "c": 1}}, r"got \['a', 'b'\] and \['a', 'c'\]"),
        ({"train": {"a": 1}, "test": {"a": 1}}, "expected the same 2 or more class folders in train and test"),
    ],
)
def test_bad_folders(tmp_path: Path, parts: Tree, message: str) -> None:
    save_tree(tmp_path / "pets", parts)
    with pytest.raises(ValueError, match=f"pets: .*{message}"):
        load(str(tmp_path / "pets"))


def test_folder_with_an_empty_class(tmp_path: Path) -> None:
    save_tree(tmp_path, {"train": {"a": 1, "b": 0}, "test": {"a": 1, "b": 1}})
    with pytest.raises(FileNotFoundError, match="no valid file for the classes b"):
        load(str(tmp_path))


def test_folder_with_a_damaged_image(tmp_path: Path) -> None:
    save_tree(tmp_path, {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}})
    (tmp_path / "train" / "b" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"0\.png: cannot be decoded"):
        load(str(tmp_path))


def test_folder_of_images_that_are_not_square(tmp_path: Path) -> None:
    save_tree(tmp_path, {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}}, size=(6, 4))
    with pytest.raises(ValueError, match="images of 4 x 6 are not square: pass image_size"):
        load(str(tmp_path))


def test_folder_with_links_and_litter(tmp_path: Path) -> None:
    save_tree(tmp_path / "set", {"train": {"a": 1, "b": 2}, "test": {"a": 1, "b": 1}})
    save_tree(tmp_path / "more", {"x": {"y": 3}})
    (tmp_path / "set" / "train" / "a" / "more").symlink_to(tmp_path / "more" / "x")
    for litter in ("train/.ipynb_checkpoints/0.png", "test/__MACOSX/a/._0.png", "train/.DS_Store", "train/a/Thumbs.db"):
        (tmp_path / "set" / litter).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / litter).write_bytes(b"no image")
    dataset = load(str(tmp_path / "set"))
    assert dataset.class_names == ("a", "b")
    assert labels_of(dataset.train) == [0, 0, 0, 0, 1, 1]


def test_folder_of_photographs_on_their_side(tmp_path: Path) -> None:
    """Width and height are those of the upright image."""
    save_tree(tmp_path, {"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}}, size=(6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in tmp_path.rglob("*.png"):
        with Image.open(path) as image:
            image.save(path, exif=exif)
    with pytest.raises(ValueError, match="images of 6 x 4 are not square"):
        load(str(tmp_path))
    first = load(str(tmp_path), image_size=4).train.batch(torch.tensor([0]))[0].permute(1, 2, 0).numpy()
    with Image.open(tmp_path / "train" / "a" / "0.png") as image:
        assert np.array_equal(first, np.asarray(image.transpose(Image.Transpose.ROTATE_270))[1:5])


def test_images_in_no_class_folder_are_said(tmp_path: Path) -> None:
    save_tree(tmp_path, {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}})
    Image.new("RGB", (4, 4)).save(tmp_path / "train" / "stray.PNG")
    with pytest.warns(UserWarning, match=r"train: 1 images such as stray\.PNG are in no class folder: left out"):
        assert len(load(str(tmp_path)).train) == 2


@pytest.mark.parametrize("place", ["train/b/0.png", "test/b/0.png", "far/x/1.png"])
@pytest.mark.parametrize("fault", ["no image", "truncated", "16 bits", "too large"])
def test_a_bad_image_is_found_when_its_set_is_loaded(tmp_path: Path, place: str, fault: str, digits: DataSet) -> None:
    save_tree(tmp_path, {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}, "far": {"x": 3}}, size=(30, 30))
    path = tmp_path / place
    match fault:
        case "no image":
            path.write_bytes(b"no image")
        case "truncated":
            path.write_bytes(path.read_bytes()[:-300])
        case "16 bits":
            Image.fromarray(np.full((30, 30), 40000, np.uint16)).save(path)
    limit = {"max_pixels": 899} if fault == "too large" else {}
    with pytest.raises(ValueError, match=r"\d\.png: cannot be decoded: "):
        if "far" in place:
            load_ood(f"far={tmp_path / 'far'}", digits, **limit)
        else:
            load(str(tmp_path), **limit)


@pytest.mark.parametrize("classes", [6, 10, 11])
@pytest.mark.parametrize("by_path", [False, True])
def test_known_name_with_other_classes(tmp_path: Path, classes: int, by_path: bool) -> None:
    x, y = np.zeros((22, 4, 4, 3), np.uint8), np.arange(22) % classes
    path = save(tmp_path / "cifar10.npz", {"x_train": x, "y_train": y, "x_test": x, "y_test": y})
    dataset = load(path) if by_path else load("cifar10", tmp_path)
    assert (dataset.num_classes, len(dataset.class_names)) == (classes, classes)
    assert dataset.class_names[0] == ("airplane" if classes == 10 else "0")


@pytest.mark.parametrize(
    "labels", [np.eye(3, dtype=int)[np.arange(9) % 3], np.array(list("abcabcabc")), np.ones(9) > 0]
)
def test_labels_of_other_kinds_are_refused(tmp_path: Path, labels: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"mine\.npz: y_train: expected"):
        load(save(tmp_path / "mine.npz", arrays(y_train=labels)))


def test_archive_members_that_are_no_arrays(tmp_path: Path) -> None:
    path = Path(save(tmp_path / "mine.npz", {}))
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999999999,), }"
    for content in (b"text", header.ljust(127) + b"\n"):
        with zipfile.ZipFile(path, "w") as archive:
            for key in arrays():
                archive.writestr(f"{key}.npy", content)
        with pytest.raises(ValueError, match=r"mine\.npz: "):
            load(str(path))


def test_names_that_are_not_utf8(tmp_path: Path, digits: DataSet) -> None:
    """They cannot be written to the report: the run would be lost at its end."""
    bad = tmp_path / os.fsdecode(b"caf\xe9")
    save_tree(bad, {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}})
    with pytest.raises(ValueError, match="expected a name in valid UTF-8"):
        load(str(bad))
    assert len(load_ood(f"far={bad}", digits)[1]) == 4  # whose name is "far"
    with pytest.raises(ValueError, match="printable"):
        load_ood(os.fsdecode(b"caf\xe9") + f"={bad}", digits)
    for part in ("train", "test"):
        (bad / part / "b").rename(bad / part / os.fsdecode(b"\xff"))
    with pytest.raises(ValueError, match=r"expected a name in valid UTF-8, .*class folder"):
        load(str(bad.rename(tmp_path / "good")))
    # Names of the images themselves stand nowhere but in errors.
    image = tmp_path / "good" / "train" / "a" / os.fsdecode(b"\xfe.png")
    Image.new("L", (8, 8)).save(image)
    assert len(load_ood(f"far={tmp_path / 'good' / 'train' / 'a'}", digits)[1]) == 2
