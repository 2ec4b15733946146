"""Image sets by name, in all spellings and in the layouts of torchvision, OpenOOD and DICE."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from small_data_roots import save_idx, save_images, save_list
from small_image_sets import everything, rgb
from sparse_moon.app import torchvision_sets
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.datasets import DataSet, load
from sparse_moon.app.ood_groups import FAR_OOD, NEAR_OOD, SPELLINGS, canonical, ood_group, plain
from sparse_moon.app.ood_sets import load_ood
from sparse_moon.app.run_data import load_ood_sets


def cifar10() -> DataSet:
    return replace(rgb(32), name="cifar10")


def test_spellings_are_of_one_set_each() -> None:
    spellings = [plain(spelling) for name, others in SPELLINGS.items() for spelling in (name, *others)]
    assert len(spellings) == len({*spellings})
    assert all(canonical(name) == name for name in SPELLINGS)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("DTD", "textures"), ("Texture", "textures"), ("TIN", "tinyimagenet"), ("Tiny-ImageNet", "tinyimagenet"),
        ("Fashion_MNIST", "fashionmnist"), ("notMNIST", "notmnist"), ("EMNIST letters", "emnist-letters"),
        ("LSUN", "lsun-crop"), ("LSUN_resize", "lsun-resize"), ("iSUN", "isun"), ("place365", "places365"),
        ("CIFAR-10", "cifar10"), ("iNaturalist", "inaturalist"), ("openimage_o", "openimage-o"),
        ("ImageNet-O", "imagenet-o"), ("cats", "cats"), ("digits-8-9", "digits-8-9"),
    ],
)  # fmt: skip
def test_spellings(spelling: str, name: str) -> None:
    assert canonical(spelling) == name


@pytest.mark.parametrize(
    ("dataset", "near", "far"),
    [
        ("mnist", "notMNIST Fashion-MNIST kmnist emnist_letters", "Texture CIFAR-10 TIN places365"),
        ("cifar10", "CIFAR-100 tin", "MNIST svhn dtd place365 LSUN lsun_resize iSUN"),
        ("cifar100.npz", "cifar10 TinyImageNet", "mnist svhn textures places365 lsun-crop isun"),
        ("data/ImageNet", "species iNaturalist openimage_o ImageNet-O", "textures mnist Places SUN"),
        ("digits", "digits-8-9 letters", "noise photos"),
    ],
)
def test_groups_do_not_depend_on_the_spelling(dataset: str, near: str, far: str) -> None:
    assert {ood_group(dataset, name) for name in near.split()} == {"near"}
    assert {ood_group(dataset, name) for name in far.split()} == {"far"}
    assert ood_group(dataset, "cats") == ood_group("mine.npz", "svhn") == "ungrouped"


def test_no_set_is_in_two_groups_or_beside_itself() -> None:
    for dataset in {*NEAR_OOD, *FAR_OOD}:
        assert not {*NEAR_OOD[dataset]} & {*FAR_OOD[dataset]}
        assert dataset not in (*NEAR_OOD[dataset], *FAR_OOD[dataset])
        assert all(canonical(name) == name for name in (*NEAR_OOD[dataset], *FAR_OOD[dataset]))


@pytest.mark.parametrize(
    ("spec", "name", "folder"),
    [
        ("dtd", "textures", "dtd/dtd/images/banded"),  # torchvision's
        ("textures", "textures", "ood_datasets/dtd/images/banded"),  # DICE's
        ("texture", "textures", "images_classic/texture/banded"),  # OpenOOD's
        ("places365", "places365", "val_256"),  # torchvision's
        ("LSUN", "lsun-crop", "LSUN/test"),
        ("lsun-resize", "lsun-resize", "ood_datasets/LSUN_resize/LSUN_resize"),
        ("isun", "isun", "iSUN/iSUN_patches"),
        ("tin", "tinyimagenet", "tiny-imagenet-200/val/images"),
        ("tinyimagenet", "tinyimagenet", "images_classic/tin/test/n01"),
        ("svhn", "svhn", "images_classic/svhn/test"),
        ("openimage-o", "openimage-o", "images_largescale/openimage_o/images"),
        ("inaturalist", "inaturalist", "iNaturalist/images"),
        ("sun", "sun", "SUN/images"),
    ],
)
def test_folders_of_the_layouts(tmp_path: Path, spec: str, name: str, folder: str) -> None:
    save_images(tmp_path / folder, ["0.png", "1.png", "2.png"])
    found, images = load_ood(spec, cifar10(), tmp_path)
    assert (found, len(images), images.shape) == (name, 3, (3, 32, 32))


def test_parts_that_are_not_for_testing_are_left_out(tmp_path: Path) -> None:
    for part, count in (("train", 4), ("val", 2)):
        save_images(tmp_path / "tiny-imagenet-200" / part, [f"{i}.png" for i in range(count)])
    assert len(load_ood("tin", cifar10(), tmp_path)[1]) == 2


def test_a_list_of_openood_goes_before_the_folder(tmp_path: Path) -> None:
    names = [f"tin/test/n0{i}/{i}.png" for i in range(5)]
    save_images(tmp_path / "images_classic", names)
    assert len(load_ood("tin", cifar10(), tmp_path)[1]) == 5
    save_list(tmp_path, "cifar10", "test_tin", names[1:3], [-1, "{'label': -1}"])
    assert len(load_ood("tin", cifar10(), tmp_path)[1]) == 2
    assert len(load_ood("tin", replace(rgb(32), name="cifar100"), tmp_path)[1]) == 5  # it is for CIFAR-10
    np.savez(tmp_path / "TinyImageNet.npz", x=np.zeros((7, 8, 8, 3), np.uint8))
    assert len(load_ood("tin", cifar10(), tmp_path)[1]) == 7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tin/0.png\n", "line 1: expected an image and its label"),
        ("tin/0.png -1\ntin/1.png cat\n", "line 2: expected an image and its label"),
        ("tin/0.png {'name': 1}\n", "line 1: expected an image and its label"),
        ("tin/0.png [1]\n", "line 1: expected an image and its label"),
        ("/tin/0.png -1\n", "line 1: expected a path below the folder"),
        ("../tin/0.png -1\n", "line 1: expected a path below the folder"),
        ("\n", "no images"),
    ],
)
def test_bad_lists(tmp_path: Path, content: str, message: str) -> None:
    save_images(tmp_path / "images_classic", ["tin/0.png"])
    save_list(tmp_path, "cifar10", "test_tin", [], []).write_text(content)
    with pytest.raises(ValueError, match=rf"test_tin\.txt.*{message}"):
        load_ood("tin", cifar10(), tmp_path)


def test_a_list_without_its_images(tmp_path: Path) -> None:
    save_list(tmp_path, "cifar10", "test_tin", ["tin/0.png", "tin/1.png"], [-1, -1])
    with pytest.raises(FileNotFoundError, match=r"test_tin\.txt lists tin/0\.png, which was not found in any of "):
        load_ood("tin", cifar10(), tmp_path)
    save_images(tmp_path / "images_classic", ["tin/0.png"])
    with pytest.raises(ValueError, match=r"1\.png: cannot be decoded: there is no such file"):
        load_ood("tin", cifar10(), tmp_path)


def test_in_distribution_lists(tmp_path: Path) -> None:
    names = [f"cifar10/{part}/{i}.png" for part in ("train", "test") for i in range(4)]
    save_images(tmp_path / "images_classic", names)
    save_list(tmp_path, "cifar10", "train_cifar10", names[:4], [0, 1, 1, 0])
    save_list(tmp_path, "cifar10", "test_cifar10", names[6:], [1, 0])
    dataset = load("cifar10", tmp_path)
    assert (dataset.name, dataset.num_classes, len(dataset.test)) == ("cifar10", 2, 2)
    assert dataset.train.labels is not None and dataset.train.labels.tolist() == [0, 1, 1, 0]
    save_list(tmp_path, "cifar10", "train_cifar10", names[:4], [0, 2, 2, 0])
    with pytest.raises(ValueError, match=r"benchmark_imglist/cifar10: expected training labels 0\.\.K-1"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("place", ["", "ILSVRC-2012", "imagenet", "images_largescale/imagenet_1k"])
def test_imagenet_in_its_layouts(tmp_path: Path, place: str) -> None:
    for part in ("train", "val"):
        save_images(tmp_path / place / part, ["n01/0.JPEG", "n02/0.JPEG"], size=(12, 9))
    dataset = load("imagenet", tmp_path, image_size=8)
    assert (dataset.name, dataset.class_names, dataset.train.shape) == ("imagenet", ("n01", "n02"), (3, 8, 8))
    torch.testing.assert_close(dataset.mean, torch.tensor([0.485, 0.456, 0.406]))


def test_imagenet_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"imagenet was not found: looked for .*imagenet\.npz, for OpenOOD's"):
        load("imagenet", tmp_path)


def test_grey_sets_of_torchvision(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(256, size=(4, 28, 28), dtype=np.uint8)
    save_idx(tmp_path / "EMNIST" / "raw", "emnist-letters-test", x, np.arange(4) + 1)
    save_idx(tmp_path / "EMNIST" / "raw", "emnist-letters-train", x, np.arange(4) + 1)
    for name in ("FashionMNIST", "KMNIST"):
        for part in ("train", "t10k"):
            save_idx(tmp_path / name / "raw", part, x, np.arange(4))
        images = load_ood(name, rgb(28), tmp_path)[1]
        assert np.array_equal(everything(images)[:, 0].numpy(), x)
    name, images = load_ood("emnist", rgb(28), tmp_path)
    assert name == "emnist-letters"
    assert np.array_equal(everything(images)[:, 0].numpy(), x.transpose(0, 2, 1))  # upright


@pytest.mark.parametrize(("name", "folder"), [("textures", "dtd/dtd/images/banded"), ("places365", "val_256")])
def test_sets_that_torchvision_downloads_as_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, folder: str
) -> None:
    asked = []

    def fetch(root: Path, **settings: Any) -> None:
        asked.append(settings)
        save_images(root / folder, ["0.png", "1.png"])

    monkeypatch.setattr(torchvision_sets.datasets, "DTD", fetch)
    monkeypatch.setattr(torchvision_sets.datasets, "Places365", fetch)
    with pytest.raises(FileNotFoundError, match=rf"{name} was not found: .*pass download=True"):
        load_ood(name, cifar10(), tmp_path)
    assert not asked
    for _ in range(2):  # the second time they are there
        assert len(load_ood(name, cifar10(), tmp_path, download=True)[1]) == 2
    assert len(asked) == 1 and asked[0]["download"]


@pytest.mark.parametrize("name", ["tinyimagenet", "lsun-crop", "isun", "notmnist", "sun", "inaturalist", "species"])
def test_sets_that_torchvision_does_not_download(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{name} was not found: .*does not download it, or .*{name}=PATH"):
        load_ood(name, cifar10(), tmp_path, download=True)


def test_two_folders_of_one_set(tmp_path: Path) -> None:
    for folder in ("dtd", "Textures"):
        save_images(tmp_path / folder, ["0.png"])
    with pytest.raises(ValueError, match=r"textures is ambiguous: .*Textures and .*dtd; keep one"):
        load_ood("textures", cifar10(), tmp_path)


def test_the_in_distribution_set_in_another_spelling(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cifar10 is the in-distribution set"):
        load_ood("CIFAR-10", cifar10(), tmp_path)


def test_one_set_twice_in_two_spellings(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 8, 8), np.uint8))
    config = TrainConfig(ood=["dtd", f"Textures={tmp_path / 'x.npz'}"], data_root=str(tmp_path))
    with pytest.raises(ValueError, match="two OOD sets are called 'Textures' and 'dtd'"):
        load_ood_sets(config, load("digits"))


def test_all_missing_sets_are_named_at_once(tmp_path: Path) -> None:
    config = TrainConfig(ood=["noise", "lsun", "isun", "svhn"], data_root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"3 OOD sets are missing: lsun-crop was .*; isun was .*; svhn was "):
        load_ood_sets(config, load("digits"))
