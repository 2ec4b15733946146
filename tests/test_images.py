"""Sources of images, their conversion, and batches: order, augmentation, slices of several processes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sparse_moon.app.images import Batches, FolderImages, Images, TensorImages, convert


def random_pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def numbered(count: int, **settings: Any) -> Batches:
    """Batches of ``count`` black images whose labels are their places."""
    images = TensorImages(torch.zeros(count, 1, 2, 2, dtype=torch.uint8), torch.arange(count))
    return Batches(images, torch.zeros(1), torch.ones(1), **settings)


def seen(batches: Batches, epoch: int = 0) -> list[list[int]]:
    return [labels.tolist() for _, labels in batches.epoch(epoch)]


def save_pngs(folder: Path, pixels: Tensor) -> list[Path]:
    paths = [folder / f"{i}.png" for i in range(len(pixels))]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(path)
    return paths


def test_luma_by_hand() -> None:
    red, green, blue, white = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]
    pixels = torch.tensor([red, green, blue, white], dtype=torch.uint8).T.reshape(1, 3, 2, 2)
    # 0.299 * 255 = 76.2, 0.587 * 255 = 149.7, 0.114 * 255 = 29.1
    assert convert(pixels, (1, 2, 2)).tolist() == [[[[76, 150], [29, 255]]]]


def test_grey_is_repeated() -> None:
    pixels = random_pixels(2, 1, 3, 3)
    converted = convert(pixels, (3, 3, 3))
    assert converted.is_contiguous()
    assert torch.equal(converted, torch.cat([pixels] * 3, 1))


def test_same_shape_is_kept() -> None:
    pixels = random_pixels(2, 3, 4, 4)
    assert torch.equal(convert(pixels, (3, 4, 4)), pixels)


@pytest.mark.parametrize("size", [5, 8, 20, 31])
@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_agrees_with_pillow(size: int, channels: int) -> None:
    pixels = random_pixels(3, channels, 20, 20)
    images = [Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()) for image in pixels]
    expected = [np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)) for image in images]
    converted = convert(pixels, (channels, size, size))
    assert converted.dtype == torch.uint8
    error = converted.permute(0, 2, 3, 1).numpy().reshape(3, -1).astype(int) - np.stack(expected).reshape(3, -1)
    assert abs(error).max() <= 1


@pytest.mark.parametrize(("h", "w"), [(4, 10), (10, 4)])
def test_the_middle_is_cropped(h: int, w: int) -> None:
    pixels = random_pixels(1, 1, h, w)
    middle = pixels[:, :, (h - 4) // 2 :, (w - 4) // 2 :][:, :, :4, :4]
    assert torch.equal(convert(pixels, (1, 4, 4)), middle)


def test_sources_agree(tmp_path: Path) -> None:
    pixels = random_pixels(5, 3, 6, 6)
    paths = save_pngs(tmp_path, pixels)
    order = torch.tensor([3, 0, 3, 4])
    for shape in [(3, 6, 6), (1, 6, 6)]:
        sources: list[Images] = [TensorImages(pixels, shape=shape), FolderImages(paths, shape)]
        memory, folder = (source.batch(order) for source in sources)
        assert [len(source) for source in sources] == [5, 5]
        assert memory.shape == (4, *shape) and memory.dtype == torch.uint8
        assert torch.equal(memory, folder)
    assert torch.equal(TensorImages(pixels).batch(order), pixels[order])


@pytest.mark.parametrize(("h", "w"), [(12, 12), (9, 14)])
def test_sources_resize_alike(tmp_path: Path, h: int, w: int) -> None:
    # Smooth images: where the middle falls between pixels, the two may differ by a fraction of one.
    ramp = torch.arange(w) * 8 + torch.arange(h)[:, None] * 4
    pixels = ramp.to(torch.uint8).expand(2, 1, h, w)
    folder = FolderImages(save_pngs(tmp_path, pixels), (3, 5, 5)).batch(torch.arange(2))
    memory = TensorImages(pixels, shape=(3, 5, 5)).batch(torch.arange(2))
    assert (folder.int() - memory.int()).abs().max() <= (1 if h == w else 8)


def test_folder_reads_one_batch_ahead(tmp_path: Path) -> None:
    pixels = random_pixels(6, 1, 2, 2)
    asked = []

    def order() -> Any:
        for indices in torch.arange(6).split(2):
            asked.append(indices.tolist())
            yield indices

    stream = FolderImages(save_pngs(tmp_path, pixels), (1, 2, 2)).stream(order())
    assert torch.equal(next(stream), pixels[:2])
    assert asked == [[0, 1], [2, 3]]
    assert torch.equal(torch.cat([*stream]), pixels[2:])


def test_folder_names_a_damaged_file(tmp_path: Path) -> None:
    path = save_pngs(tmp_path, random_pixels(1, 3, 16, 16))[0]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"0\.png: cannot be decoded"):
        FolderImages([path], (3, 16, 16)).batch(torch.tensor([0]))


def test_folder_refuses_16_bits(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png: .*expected 8 bits a channel, got mode I;16"):
        FolderImages([tmp_path / "deep.png"], (1, 4, 4)).batch(torch.tensor([0]))


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (torch.zeros(2, 3, 4, 4), None, r"expected uint8 \(N, 1 or 3, H, W\), got torch.float32 \(2, 3, 4, 4\)"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), None, r"got torch.uint8 \(2, 4, 4\)"),
        (torch.zeros(2, 2, 4, 4, dtype=torch.uint8), None, r"got torch.uint8 \(2, 2, 4, 4\)"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3).long(), r"labels \(2,\), got torch.int64 \(3,\)"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2), r"labels \(2,\), got torch.float32 \(2,\)"),
    ],
)
def test_bad_tensors(pixels: Tensor, labels: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TensorImages(pixels, labels)


def test_batches_are_normalised() -> None:
    pixels = random_pixels(5, 3, 4, 4)
    mean, std = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.3, 0.4])
    batches = Batches(TensorImages(pixels, torch.arange(5)), mean, std, 2)
    assert len(batches) == 3
    got = [*batches]
    assert [len(x) for x, _ in got] == [2, 2, 1]
    x, y = torch.cat([x for x, _ in got]), torch.cat([y for _, y in got])
    expected = (pixels.double().numpy() / 255 - mean.numpy()[:, None, None]) / std.numpy()[:, None, None]
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    assert x.is_contiguous()
    np.testing.assert_allclose(x.numpy(), expected, atol=1e-6)
    assert y.tolist() == [0, 1, 2, 3, 4]


def test_batches_in_channels_last_hold_the_same() -> None:
    images = TensorImages(random_pixels(4, 3, 8, 8))
    plain, last = (Batches(images, torch.zeros(3), torch.ones(3), 2, channels_last=last) for last in (False, True))
    for (a, _), (b, _) in zip(plain, last, strict=True):
        assert torch.equal(a, b) and a.is_contiguous() and b.is_contiguous(memory_format=torch.channels_last)


def test_images_without_labels_give_minus_one() -> None:
    images = TensorImages(random_pixels(3, 1, 2, 2))
    assert [y.tolist() for _, y in Batches(images, torch.zeros(1), torch.ones(1), 2)] == [[-1, -1], [-1]]


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 4, 2]), (True, [4, 4])])
def test_every_image_once_an_epoch(drop_last: bool, sizes: list[int]) -> None:
    batches = numbered(10, batch_size=4, shuffle_seed=1, drop_last=drop_last)
    for epoch in range(3):
        order = seen(batches, epoch)
        assert [len(batch) for batch in order] == sizes
        assert len(batches) == len(sizes)
        assert len({i for batch in order for i in batch}) == sum(sizes)


def test_epochs_repeat_and_differ() -> None:
    batches = numbered(50, batch_size=25, shuffle_seed=1)
    epochs = [seen(batches, epoch) for epoch in range(4)]
    resumed = numbered(50, batch_size=25, shuffle_seed=1)
    assert [seen(resumed, epoch) for epoch in (3, 1)] == [epochs[3], epochs[1]]
    assert len({str(epoch) for epoch in epochs}) == 4
    # Not the epochs of another seed in another place either.
    others = [seen(numbered(50, batch_size=25, shuffle_seed=seed), epoch) for seed in (0, 2) for epoch in range(4)]
    assert not any(other in epochs for other in others)
    assert [labels.tolist() for _, labels in batches] == epochs[0]
    assert [labels.tolist() for _, labels in batches] == epochs[0]


def test_order_of_the_source_without_a_seed() -> None:
    assert seen(numbered(5, batch_size=3), epoch=7) == [[0, 1, 2], [3, 4]]


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    images = TensorImages(random_pixels(4, 1, 8, 8))
    first = [x for x, _ in Batches(images, torch.zeros(1), torch.ones(1), 2, shuffle_seed=3, augment=True)]
    assert torch.equal(torch.rand(3), expected)
    again = [x for x, _ in Batches(images, torch.zeros(1), torch.ones(1), 2, shuffle_seed=3, augment=True)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def augmented(epoch: int, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, what augmentation made of them as uint8, and their places."""
    pixels = random_pixels(64, 3, 6, 6).clamp_min(1)
    images = TensorImages(pixels, torch.arange(64))
    batches = Batches(images, torch.zeros(3), torch.ones(3), 32, shuffle_seed=0, augment=True, **settings)
    x, y = (torch.cat(parts) for parts in zip(*batches.epoch(epoch), strict=True))
    return pixels, (x * 255).round().to(torch.uint8), y


def test_augmentation_crops_and_mirrors() -> None:
    pixels, got, places = augmented(epoch=0)
    padded = np.zeros((64, 3, 14, 14), np.uint8)
    padded[:, :, 4:10, 4:10] = pixels.numpy()
    found = []
    for image, place in zip(got.numpy(), places.tolist(), strict=True):
        ways = [
            (top, left, mirrored)
            for top in range(9)
            for left in range(9)
            for mirrored in (False, True)
            if np.array_equal(padded[place, :, top : top + 6, left : left + 6][:, :, :: -1 if mirrored else 1], image)
        ]
        assert len(ways) == 1
        found += ways
    tops, lefts, mirrored = zip(*found, strict=True)
    # 64 draws of 9 values miss a given one with probability 5e-4; of a fair coin all lie within 4 standard deviations.
    assert len(set(tops)) == len(set(lefts)) == 9
    assert 16 <= sum(mirrored) <= 48
    assert tops != lefts


def test_augmentation_follows_the_epoch() -> None:
    _, first, places = augmented(epoch=0)
    _, again, _ = augmented(epoch=0)
    _, other, other_places = augmented(epoch=1)
    assert torch.equal(first, again)
    assert not torch.equal(first[places.argsort()], other[other_places.argsort()])


def split_settings() -> dict[str, Any]:
    images = TensorImages(random_pixels(22, 1, 5, 5), torch.arange(22))
    statistics = {"mean": torch.zeros(1), "std": torch.ones(1)}
    return {"images": images, **statistics, "batch_size": 8, "shuffle_seed": 5, "augment": True}


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_each_batch(world_size: int) -> None:
    alone = [*Batches(**split_settings())]
    ranks = [[*Batches(**split_settings(), rank=rank, world_size=world_size)] for rank in range(world_size)]
    for step, (x, y) in enumerate(alone):
        parts = [rank[step] for rank in ranks]
        assert max(len(part[1]) for part in parts) - min(len(part[1]) for part in parts) <= 1
        assert torch.equal(torch.cat([part[0] for part in parts]), x)
        assert torch.equal(torch.cat([part[1] for part in parts]), y)
    assert {len(rank) for rank in ranks} == {len(alone)} == {3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "expected a batch size that 1 divides, got 0"),
        ({"batch_size": 6, "world_size": 4}, "expected a batch size that 4 divides, got 6"),
        ({"batch_size": 4, "world_size": 2, "rank": 2}, "expected 0 <= rank < 2, got 2"),
        ({"batch_size": 4, "rank": -1}, "expected 0 <= rank < 1, got -1"),
        ({"batch_size": 2, "world_size": 0}, "expected world_size >= 1, got 0"),
        ({"batch_size": 11, "drop_last": True}, "no batch: 10 images, batch size 11"),
        ({"batch_size": 3, "world_size": 3}, "a last batch of 1 images leaves some of the 3 processes without any"),
        ({"batch_size": 4, "augment": True}, "augmentation is random: expected a shuffle_seed, got None"),
        ({"batch_size": 4, "shuffle_seed": -1}, "expected shuffle_seed >= 0, got -1"),
    ],
)
def test_bad_batches(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        numbered(10, **settings)


def test_statistics_of_another_number_of_channels() -> None:
    with pytest.raises(ValueError, match=r"expected mean and std of shape \(3,\), got \(1,\) and \(3,\)"):
        Batches(TensorImages(random_pixels(2, 3, 2, 2)), torch.zeros(1), torch.ones(3), 2)


def test_negative_epoch() -> None:
    with pytest.raises(ValueError, match="expected epoch >= 0, got -1"):
        next(numbered(4, batch_size=2, shuffle_seed=0).epoch(-1))


@pytest.mark.gpu
def test_the_device_gets_the_same_batches() -> None:
    settings = split_settings()
    for (x, y), (x_gpu, y_gpu) in zip(Batches(**settings), Batches(**settings, device="cuda"), strict=True):
        assert x_gpu.is_cuda and y_gpu.is_cuda
        torch.testing.assert_close(x_gpu.cpu(), x)
        assert torch.equal(y_gpu.cpu(), y)
