"""Out-of-distribution images by name and by path, and what is wrong with them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from small_image_sets import arrays, everything, rgb, save, save_tree
from sparse_moon.app.datasets import DataSet, load
from sparse_moon.app.ood_sets import default_ood, load_ood


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load("digits")


def test_default_ood(digits: DataSet) -> None:
    assert default_ood("digits") == ["digits-8-9", "photos", "letters", "noise"]
    assert default_ood("cifar10") == ["photos", "letters", "noise"]
    for spec in default_ood("digits"):
        name, images = load_ood(spec, digits)
        assert (name, images.shape, images.labels) == (spec, (1, 8, 8), None)
        pixels = everything(images)
        assert pixels.shape == (len(images), 1, 8, 8) and pixels.dtype == torch.uint8


def test_held_out_digits(digits: DataSet) -> None:
    _, images = load_ood("digits-8-9", digits)
    source = load_digits()
    expected = np.concatenate([source.images[source.target == label] for label in (8, 9)])
    np.testing.assert_allclose(everything(images)[:, 0] / 255, expected / 16, atol=0.5 / 255)
    with pytest.raises(ValueError, match="digits-8-9 are classes held out of digits, the in-distribution set is rgb"):
        load_ood("digits-8-9", rgb())


@pytest.mark.parametrize("name", ["photos", "letters", "noise"])
def test_generated_sets(digits: DataSet, name: str) -> None:
    for like in (digits, rgb()):
        images = load_ood(name, like)[1]
        pixels = everything(images)
        assert pixels.shape == (1000, *like.train.shape)
        assert torch.equal(pixels, everything(load_ood(name, like, seed=0)[1]))
        assert not torch.equal(pixels, everything(load_ood(name, like, seed=1)[1]))
        assert len(pixels.flatten(1).unique(dim=0)) > 900


def test_noise(digits: DataSet) -> None:
    pixels = everything(load_ood("noise", digits)[1]).double()
    assert pixels.mean().item() == pytest.approx(127.5, abs=1)
    # 64, but for the 5 % beyond two deviations that are clipped.
    assert 60 < pixels.std().item() < 64
    colour = everything(load_ood("noise", rgb())[1]).double()
    assert abs(torch.corrcoef(colour.transpose(0, 1).flatten(1))[0, 1]) < 0.01


def test_photos_look_like_photos() -> None:
    pixels = everything(load_ood("photos", rgb())[1]).double()
    neighbours = torch.stack([pixels[..., :-1].flatten(), pixels[..., 1:].flatten()])
    assert torch.corrcoef(neighbours)[0, 1] > 0.9
    colours = (pixels[:, 0] - pixels[:, 2]).abs().mean((1, 2))
    assert (colours > 5).double().mean() > 0.5


def test_letters_are_24_kinds(digits: DataSet) -> None:
    for like, least in ((digits, 0.7), (rgb(28), 0.8)):
        pixels = everything(load_ood("letters", like)[1])[:, :1].flatten(1).double()
        kinds = torch.arange(1000) % 24
        train, test = torch.arange(1000) < 720, torch.arange(1000) >= 720
        nearest = torch.cdist(pixels[test], pixels[train]).argmin(1)
        assert (kinds[train][nearest] == kinds[test]).double().mean() > least


def test_letters_resemble_digits(digits: DataSet) -> None:
    letters, known = everything(load_ood("letters", digits)[1]).double(), everything(digits.train).double()
    # Light on dark, about as much ink, centred, with grey from averaging.
    assert letters.mean().item() == pytest.approx(known.mean().item(), rel=0.4)
    assert (letters[..., 0].mean() + letters[..., -1].mean()) / 2 < 15
    assert ((letters > 30) & (letters < 225)).double().mean() > 0.15


def test_ood_from_npz(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(256, size=(3, 16, 16), dtype=np.uint8)
    for key in ("x", "x_test"):
        path = save(tmp_path / f"{key}.npz", {key: x, "y": np.zeros(3)})
        name, images = load_ood(f"mine={path}", rgb(16))
        assert (name, images.shape, images.labels) == ("mine", (3, 16, 16), None)
        assert np.array_equal(everything(images)[:, 1].numpy(), x)
    with pytest.raises(ValueError, match=r"bad.npz: expected the arrays x or x_test, got z"):
        load_ood(f"mine={save(tmp_path / 'bad.npz', {'z': x})}", rgb())
    with pytest.raises(FileNotFoundError, match=r"nosuch.npz does not exist"):
        load_ood(f"mine={tmp_path / 'nosuch.npz'}", rgb())
    with pytest.raises(ValueError, match=r"flat.npz: expected \(N, H, W\)"):
        load_ood(f"mine={save(tmp_path / 'flat.npz', {'x': x[0]})}", rgb())


def test_ood_from_folder(tmp_path: Path, digits: DataSet) -> None:
    save_tree(tmp_path / "a=b", {"x": {"deep": 2}, "y": {".": 1}}, size=(20, 10))
    (tmp_path / "a=b" / "notes.txt").write_text("no image")
    name, images = load_ood(f"mine={tmp_path / 'a=b'}", digits)
    assert (name, len(images), images.labels) == ("mine", 3, None)
    assert everything(images).shape == (3, 1, 8, 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no images, expected files that end in one of \.jpg"):
        load_ood(f"mine={tmp_path / 'empty'}", digits)


@pytest.mark.parametrize("spec", ["=a.npz", "mine=", "="])
def test_bad_specs(spec: str, digits: DataSet) -> None:
    with pytest.raises(ValueError, match=f"expected NAME=PATH, got '{spec}'"):
        load_ood(spec, digits)


def test_ood_that_is_not_there(tmp_path: Path, digits: DataSet) -> None:
    with pytest.raises(ValueError, match="no out-of-distribution set 'cats': expected one of digits-8-9, photos, "):
        load_ood("cats", digits)
    with pytest.raises(ValueError, match="no out-of-distribution set ''"):
        load_ood("", digits)
    for name in ("mnist", "svhn"):
        with pytest.raises(
            FileNotFoundError, match=rf"{name} was not found: looked for .*{name}.npz and .* download=True"
        ):
            load_ood(name, digits, tmp_path)


def test_the_in_distribution_set_is_not_ood(tmp_path: Path) -> None:
    save(tmp_path / "mnist.npz", arrays())
    with pytest.raises(ValueError, match="mnist is the in-distribution set"):
        load_ood("mnist", load("mnist", tmp_path), tmp_path)
    for file, spelling in (("CIFAR-10.npz", "cifar10"), ("cifar10.npz", "CIFAR_10"), ("tin.npz", "tinyimagenet")):
        mine = load(save(tmp_path / file, arrays()))
        with pytest.raises(ValueError, match=r"(cifar10|tinyimagenet) is the in-distribution set"):
            load_ood(spelling, mine, tmp_path)
        (tmp_path / file).unlink()


def test_the_test_images_are_not_ood_by_another_name(tmp_path: Path) -> None:
    mine = load(save(tmp_path / "mine.npz", arrays()))
    with pytest.raises(ValueError, match=r"other=.*mine.npz holds the test images of the in-distribution set mine"):
        load_ood(f"other={tmp_path / 'mine.npz'}", mine)
    assert load_ood(f"other={save(tmp_path / 'x.npz', {'x': 255 - arrays()['x_test']})}", mine)[0] == "other"
    save_tree(tmp_path / "folder", {"train": {"a": 1, "b": 1}, "test": {"a": 2, "b": 1}})
    mine = load(str(tmp_path / "folder"))
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "test")
    with pytest.raises(ValueError, match=r"other=.*link holds the test images of the in-distribution set folder"):
        load_ood(f"other={tmp_path / 'link'}", mine)
    assert len(load_ood(f"other={tmp_path / 'link' / 'a'}", mine)[1]) == 2


def test_held_out_digits_are_not_those_of_another_file(tmp_path: Path) -> None:
    mine = load(save(tmp_path / "digits.npz", arrays()))
    with pytest.raises(ValueError, match=r"digits-8-9 are classes held out of digits, .* is digits with 3 classes"):
        load_ood("digits-8-9", mine)


@pytest.mark.parametrize("name", ["id", " ", "a/b", "/", "..\\a", "a\0b", "a\nb", "\udcff"])
def test_bad_names_of_ood_sets(tmp_path: Path, name: str, digits: DataSet) -> None:
    path = save(tmp_path / "x.npz", {"x": arrays()["x_test"]})
    with pytest.raises(ValueError, match="expected"):
        load_ood(f"{name}={path}", digits)


def test_good_names_of_ood_sets(tmp_path: Path, digits: DataSet) -> None:
    path = save(tmp_path / "x.npz", {"x": arrays()["x_test"]})
    for name in ("ID", "straße 7", "猫", "a.b"):
        assert load_ood(f"{name}={path}", digits)[0] == name
