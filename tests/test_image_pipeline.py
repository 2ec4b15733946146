"""ImageNet's pipeline: resized middle, random resized crops, files decoded by processes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from small_data_roots import save_images
from small_image_sets import everything, rgb
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.datasets import load
from sparse_moon.app.images import Batches, FolderImages, Images, TensorImages
from sparse_moon.app.ood_sets import load_ood
from sparse_moon.app.run_data import load_dataset


def smooth(folder: Path, width: int, height: int, count: int = 1) -> list[Path]:
    """Colour ramps, which resize alike where pixels are placed a fraction of one apart."""
    across, down = np.arange(width) * (200 / width), np.arange(height)[:, None] * (50 / height)
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        pixels = np.stack([across + down + i, across + 0 * down, down + 0 * across], 2).astype(np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


@pytest.mark.parametrize(("width", "height"), [(100, 80), (80, 100), (90, 90), (30, 28)])
def test_the_resized_middle_is_torchvisions(tmp_path: Path, width: int, height: int) -> None:
    (path,) = smooth(tmp_path, width, height)
    with Image.open(path) as image:
        expected = v2.functional.pil_to_tensor(v2.CenterCrop(56)(v2.Resize(64)(image))).int()
    folder = FolderImages([path], (3, 56, 56), resize=64)
    assert (folder.batch(torch.tensor([0]))[0].int() - expected).abs().max() <= max(4, 200 / min(width, height))
    pixels = FolderImages([path], (3, height, width)).batch(torch.tensor([0]))
    memory = TensorImages(pixels, shape=(3, 56, 56), resize=64)
    assert (memory.batch(torch.tensor([0]))[0].int() - expected).abs().max() <= max(4, 200 / min(width, height))


def test_resize_is_of_all_sets_of_a_run(tmp_path: Path) -> None:
    for part in ("train", "val"):
        save_images(tmp_path / part, ["a/0.png", "b/0.png"], size=(20, 16))
    save_images(tmp_path / "far", ["0.png"], size=(20, 16))
    whole = load(str(tmp_path), image_size=8)
    dataset = load(str(tmp_path), image_size=8, resize=16)
    for images, cut in ((whole.test, dataset.test), (load_ood(f"far={tmp_path / 'far'}", whole)[1],
                        load_ood(f"far={tmp_path / 'far'}", dataset)[1])):  # fmt: skip
        assert cut.resize == 16 and not torch.equal(everything(images), everything(cut))
    with Image.open(tmp_path / "val" / "a" / "0.png") as image:
        middle = np.asarray(image)[4:12, 6:14]  # resized to 16, it is as large as before
    assert np.array_equal(dataset.test.batch(torch.tensor([0]))[0].permute(1, 2, 0).numpy(), middle)
    for bad in ({"resize": 16}, {"resize": 7, "image_size": 8}):
        with pytest.raises(ValueError, match="resize needs an image_size that is at most as long"):
            load(str(tmp_path), **bad)  # type: ignore[arg-type]


def seeds_of(count: int) -> torch.Tensor:
    return torch.arange(count) + 2**61


def test_random_crops_are_those_of_their_seeds(tmp_path: Path) -> None:
    paths = smooth(tmp_path, 60, 40, count=3)
    files = FolderImages(paths, (3, 16, 16))
    pixels = FolderImages(paths, (3, 40, 60)).batch(torch.arange(3))
    for source in (files, TensorImages(pixels, shape=(3, 16, 16))):
        first, again = (next(source.random_crops([(torch.arange(3), seeds_of(3))])) for _ in range(2))
        assert first.shape == (3, 3, 16, 16) and first.dtype == torch.uint8
        assert torch.equal(first, again)
        alone = next(source.random_crops([(torch.tensor([1]), seeds_of(3)[1:2])]))
        assert torch.equal(alone[0], first[1])
        other = next(source.random_crops([(torch.arange(3), seeds_of(3) + 3)]))
        assert not torch.equal(other, first)
    memory = TensorImages(pixels, shape=(3, 16, 16))
    crops = [next(source.random_crops([(torch.arange(3), seeds_of(3))])) for source in (files, memory)]
    assert (crops[0].int() - crops[1].int()).abs().max() <= 3


def parts(width: int, height: int, count: int) -> torch.Tensor:
    """The corners (count, 4), left, right, top and bottom, of random parts, by what a picture of coordinates shows."""
    across = torch.arange(width).expand(height, width)
    down = torch.arange(height)[:, None].expand(height, width)
    picture = torch.stack([across, down, across]).to(torch.uint8)[None]
    source = TensorImages(picture, shape=(3, 64, 64))
    crops = next(source.random_crops([(torch.zeros(count, dtype=torch.int64), seeds_of(count))])).double()
    return torch.stack([crops[:, 0, 0, 0], crops[:, 0, 0, -1], crops[:, 1, 0, 0], crops[:, 1, -1, 0]], 1)


def test_random_crops_have_the_areas_and_aspects_of_torchvision() -> None:
    left, right, top, bottom = parts(200, 200, 600).unbind(1)
    width, height = right - left + 1, bottom - top + 1
    area, aspect = width * height / 200**2, width / height
    assert area.min() > 0.06 and area.max() <= 1.0 and aspect.min() > 0.7 and aspect.max() < 1.4
    # torchvision draws again where a part does not fit, so large ones are a little rarer than uniform
    assert area.mean() == pytest.approx(0.5, abs=0.05)
    assert aspect.log().mean().item() == pytest.approx(0, abs=0.03)
    assert (left / (200 - width).clamp_min(1)).mean() == pytest.approx(0.5, abs=0.1)


def test_a_random_crop_of_a_very_long_image_is_its_middle() -> None:
    left, right, top, bottom = parts(250, 2, 5).unbind(1)
    assert {*left.tolist()} <= {123.0, 124.0} and (right - left <= 3).all()
    assert (top == 0).all() and (bottom <= 1).all()


def run_batches(images: Images, **settings: Any) -> list[torch.Tensor]:
    mean, std = torch.zeros(images.shape[0]), torch.ones(images.shape[0])
    batches = Batches(images, mean, std, 4, augment=True, resized_crops=True, **settings)
    return [x for x, _ in batches.epoch(1)]


def test_epochs_of_resized_crops_are_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    images = FolderImages(smooth(tmp_path, 40, 30, count=10), (3, 8, 8), torch.arange(10))
    whole = run_batches(images, shuffle_seed=3)
    assert [len(x) for x in whole] == [4, 4, 2]
    halves = [run_batches(images, shuffle_seed=3, rank=rank, world_size=2) for rank in (0, 1)]
    for x, one, two in zip(whole, *halves, strict=True):
        assert torch.equal(x, torch.cat([one, two]))
    assert not torch.equal(whole[0], run_batches(images, shuffle_seed=4)[0])
    across = torch.cat([x[:, 1, 0, -1] - x[:, 1, 0, 0] for x in whole])
    assert (across > 0).any() and (across < 0).any()  # some are mirrored


# From Python 3.12 on forking warns where there are threads; the children use none of this process' locks.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_decode_what_threads_do(tmp_path: Path) -> None:
    paths = smooth(tmp_path, 40, 30, count=10)
    threads, processes = (FolderImages(paths, (3, 8, 8), torch.arange(10), workers=workers) for workers in (0, 2))
    torch.manual_seed(5)
    for x, y in zip(run_batches(threads, shuffle_seed=3), run_batches(processes, shuffle_seed=3), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(everything(threads), everything(processes))
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))  # nothing took a number from the generator of the training
    paths[7].write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"7\.png: cannot be decoded"):
        everything(processes)


def test_a_holdout_has_random_crops(tmp_path: Path) -> None:
    for part in ("train", "val"):
        save_images(tmp_path / part, [f"{label}/{i}.png" for label in "ab" for i in range(6)], size=20)
    config = TrainConfig(
        dataset=str(tmp_path), image_size=8, resize=10, crops="resized", workers=1, holdout=0.3, reliability="none"
    )
    data = load_dataset(config)
    assert (data.train.resize, data.train.workers) == (10, 1)
    data.train.workers = 0
    crops = next(data.train.random_crops([(torch.arange(3), seeds_of(3))]))
    assert crops.shape == (3, 3, 8, 8)


def test_a_source_without_random_crops() -> None:
    class Mine(Images):
        shape, labels = (3, 4, 4), None

        def __len__(self) -> int:
            return 4

        def stream(self, order: Any) -> Any:
            return (rgb(4).train.batch(indices) for indices in order)

    with pytest.raises(ValueError, match="Mine makes no random crops"):
        run_batches(Mine(), shuffle_seed=0)
