"""Sources of uint8 images, in memory or in files, and batches of them for a network.

Shape letters: B batch, N images, C channels (1 grey or 3 RGB), H W plane.
"""

import math
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from sparse_moon.app.image_files import MAX_PIXELS, read_image

Shape = tuple[int, int, int]
"""(C, H, W)"""

_PADDING = 4
_CHECKSUM_FILES = 256
# Of random crops: shares of the area, width over height.
_AREAS, _ASPECTS = (0.08, 1.0), (3 / 4, 4 / 3)
_Pick = tuple[int, int | None]  # index and, for a random part, seed of an image


class Images(ABC):
    """A source of N uint8 images of one ``shape`` (C, H, W), with ``labels`` int64 (N,) or None.

    ``resize`` is the length that the shorter side of an image gets before the middle H x W are cut out of it, by
    default the one that cuts least. ``workers`` is how many processes decode image files; 0 are threads of this one.
    """

    shape: Shape
    labels: Tensor | None
    resize: int | None = None
    workers: int = 0

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def stream(self, order: Iterable[Tensor]) -> Iterator[Tensor]:
        """For each int64 (B,) of indices in ``order``, B >= 1, the images: uint8 (B, C, H, W) on the CPU."""

    def random_crops(self, order: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        """For each int64 (B,) of indices and of seeds in ``order`` a part of each image, resized to ``shape``.

        The part follows from the seed: 8 to 100 % of the image's area, 3:4 to 4:3 (Szegedy et al. 2015, as torchvision
        has it). ``resize`` does not count.

        Raises:
            ValueError: this source has no crops.
        """
        raise ValueError(f"{type(self).__name__} makes no random crops")

    def batch(self, indices: Tensor) -> Tensor:
        """The images of the int64 ``indices`` (B,), B >= 1: uint8 (B, C, H, W) on the CPU."""
        return next(self.stream([indices]))

    def checksum(self) -> str | None:
        """By which the same images and labels, kept in the same form, are known again wherever they are.

        A word for the form comes first. None where a source does not say.
        """
        return None


class TensorImages(Images):
    """Images in memory.

    Args:
        pixels: uint8 (N, c, h, w), c 1 or 3.
        labels: int64 (N,).
        shape, resize: what a batch is converted to, see `convert`; by default the pixels' own.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor | None = None, shape: Shape | None = None, resize: int | None = None
    ) -> None:
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
            raise ValueError(f"expected uint8 (N, 1 or 3, H, W), got {pixels.dtype} {tuple(pixels.shape)}")
        if labels is not None and (labels.dtype != torch.int64 or labels.shape != pixels.shape[:1]):
            raise ValueError(f"expected int64 labels ({len(pixels)},), got {labels.dtype} {tuple(labels.shape)}")
        _, channels, height, width = pixels.shape
        self.pixels = pixels
        self.labels = labels
        self.shape = shape or (channels, height, width)
        self.resize = resize

    def __len__(self) -> int:
        return len(self.pixels)

    def checksum(self) -> str:
        value = 0
        for part in self.pixels.split(4096):  # which need not be contiguous
            value = zlib.crc32(part.contiguous().numpy().data, value)
        return f"pixels {_with_labels(value, self.labels)}"

    def stream(self, order: Iterable[Tensor]) -> Iterator[Tensor]:
        for indices in order:
            yield convert(self.pixels[indices], self.shape, self.resize)

    def random_crops(self, order: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        from torchvision.transforms.v2.functional import resized_crop  # here, because importing it takes seconds

        channels, *size = self.shape
        height, width = self.pixels.shape[2:]
        for indices, seeds in order:
            images = convert(self.pixels[indices], (channels, height, width))
            parts = (_random_part(width, height, seed) for seed in seeds.tolist())
            yield torch.stack([
                resized_crop(image, top, left, h, w, size, antialias=True)
                for image, (left, top, w, h) in zip(images, parts, strict=True)
            ])  # fmt: skip


class FolderImages(Images):
    """Image files, decoded when they are used: for data larger than memory.

    Args:
        paths: N image files, see `sparse_moon.app.image_files`.
        shape, resize: what every image is converted to, as by `convert`.
        labels: int64 (N,).
        max_pixels: width times height of the largest image that is decoded.
        workers: processes that decode, a batch each; 0 are threads of this one.

    Raises:
        ValueError: when a file is used that cannot be decoded, with its path.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        shape: Shape,
        labels: Tensor | None = None,
        max_pixels: int = MAX_PIXELS,
        *,
        resize: int | None = None,
        workers: int = 0,
    ) -> None:
        self.paths = paths
        self.max_pixels = max_pixels
        self.labels = labels
        self.shape = shape
        self.resize = resize
        self.workers = workers

    def __len__(self) -> int:
        return len(self.paths)

    def checksum(self) -> str:
        """Of the files' names and sizes, and of what some of them hold: to read all takes as long as an epoch."""
        value, every = 0, -(-len(self.paths) // _CHECKSUM_FILES)
        for i, path in enumerate(self.paths):
            value = zlib.crc32(b"%b/%d/" % (os.fsencode(path.name), path.stat().st_size), value)
            if i % every == 0:
                value = zlib.crc32(path.read_bytes(), value)
        return f"files {_with_labels(value, self.labels)}"

    def stream(self, order: Iterable[Tensor]) -> Iterator[Tensor]:
        return self._stream([(i, None) for i in indices.tolist()] for indices in order)

    def random_crops(self, order: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        return self._stream([*zip(indices.tolist(), seeds.tolist(), strict=True)] for indices, seeds in order)

    def _stream(self, order: Iterable[Sequence[_Pick]]) -> Iterator[Tensor]:
        if self.workers:
            # The loader's own seed would be drawn from torch's generator, which the training draws from, too.
            yield from DataLoader(
                _Batched(self.decode), sampler=order, batch_size=None, num_workers=self.workers,
                generator=torch.Generator(),
            )  # fmt: skip
            return
        # Pillow releases the interpreter lock while it decodes. Walking over pairs of batches starts the next one
        # before the caller computes with this one.
        with ThreadPoolExecutor() as pool:
            decoding = (pool.map(self.decode, picks) for picks in order)
            for images, _ in pairwise(chain(decoding, [()])):
                yield torch.stack([*images])

    def decode(self, pick: _Pick) -> Tensor:
        """The image of an index, uint8 (C, H, W), or the part of it that a seed draws."""
        index, seed = pick
        channels, height, width = self.shape
        pixels = read_image(self.paths[index], "L" if channels == 1 else "RGB", self.max_pixels)
        if seed is not None:
            left, top, w, h = _random_part(*pixels.size, seed)
            pixels = pixels.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
        elif self.resize is not None:
            scale = min(pixels.size) / self.resize
            x, y = ((side - cut * scale) / 2 for side, cut in zip(pixels.size, (width, height), strict=True))
            box = (x, y, x + width * scale, y + height * scale)
            pixels = pixels.resize((width, height), Image.Resampling.BILINEAR, box=box)
        elif pixels.size != (width, height):
            pixels = ImageOps.fit(pixels, (width, height), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(pixels)).view(height, width, channels).permute(2, 0, 1)


def _with_labels(checksum: int, labels: Tensor | None) -> str:
    return f"{checksum if labels is None else zlib.crc32(labels.contiguous().numpy().data, checksum):08x}"


class _Batched(Dataset[Tensor]):
    """What a worker's process makes of the indices of a batch."""

    def __init__(self, decode: Callable[[_Pick], Tensor]) -> None:
        self.decode = decode

    def __getitem__(self, picks: Sequence[_Pick]) -> Tensor:
        return torch.stack([self.decode(pick) for pick in picks])


def _random_part(width: int, height: int, seed: int) -> tuple[int, int, int, int]:
    """Left, top, width and height of the part of an image that ``seed`` draws."""
    rng = np.random.default_rng(seed)
    for _ in range(10):
        area = width * height * rng.uniform(*_AREAS)
        aspect = math.exp(rng.uniform(math.log(_ASPECTS[0]), math.log(_ASPECTS[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    # of a long image, the largest middle part of an aspect in the range
    w, h = min(width, round(height * _ASPECTS[1])), min(height, round(width / _ASPECTS[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def convert(images: Tensor, shape: Shape, resize: int | None = None) -> Tensor:
    """Images of another kind and size.

    Grey is made from RGB as luma (ITU-R BT.601), RGB from grey by repeating it. The largest middle part that has the
    aspect of ``shape`` is resized to it, bilinear and antialiased; or with ``resize`` what of it is the middle once the
    shorter side is as long as that.

    Args:
        images: uint8 (B, c, h, w), c 1 or 3.
        shape: (C, H, W).
        resize: at least H and W.

    Returns:
        uint8 (B, C, H, W).
    """
    channels, height, width = shape
    if channels == 1 and images.shape[1] == 3:
        # Pillow's fixed-point weights, so that an array and a folder of the same images agree.
        red, green, blue = images.int().unbind(1)
        images = ((19595 * red + 38470 * green + 7471 * blue + (1 << 15)) >> 16).to(torch.uint8).unsqueeze(1)
    h, w = images.shape[2:]
    if (h, w) != (height, width) or resize is not None:
        scale = min(h / height, w / width) if resize is None else min(h, w) / resize
        crop_h, crop_w = max(1, round(height * scale)), max(1, round(width * scale))
        top, left = (h - crop_h) // 2, (w - crop_w) // 2
        images = images[:, :, top : top + crop_h, left : left + crop_w]
        images = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
    return images.expand(-1, channels, -1, -1).contiguous()


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches of normalised images float32 (B, C, H, W) and labels int64 (B,), -1 where the images have none.

    The order and the augmentation of an epoch follow from (``shuffle_seed``, epoch) alone, so a run that is resumed
    sees the same bits, and for each image they are the same with any ``world_size``. Iterating gives epoch 0.

    Attributes:
        images: the source.
        mean, std: float32 (C,), in the scale [0, 1].
        batch_size: of all processes together.
        shuffle_seed: seed of the order and the augmentation, >= 0; None leaves the order of the source.
        augment: crop at random after padding with 4 pixels of black, and mirror with probability 1/2.
        resized_crops: crop by `Images.random_crops` instead.
        device: where batches are put; they travel as uint8.
        channels_last: whether they are in this layout there.
        drop_last: leave out the last batch if it is not full.
        rank, world_size: of every batch this process takes the ``rank``-th of ``world_size`` slices.

    Raises:
        ValueError: a batch size that ``world_size`` does not divide, or a last batch that leaves a process without
            images; fewer images than one batch with ``drop_last``; augmentation without a seed.
    """

    images: Images
    mean: Tensor
    std: Tensor
    batch_size: int
    _: KW_ONLY
    shuffle_seed: int | None = None
    augment: bool = False
    resized_crops: bool = False
    device: torch.device | str = "cpu"
    channels_last: bool = False
    drop_last: bool = False
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ValueError(f"expected world_size >= 1, got {self.world_size}")
        if self.batch_size < 1 or self.batch_size % self.world_size:
            raise ValueError(f"expected a batch size that {self.world_size} divides, got {self.batch_size}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"expected 0 <= rank < {self.world_size}, got {self.rank}")
        if len(self) == 0:
            raise ValueError(f"no batch: {len(self.images)} images, batch size {self.batch_size}")
        if not self.drop_last and 0 < len(self.images) % self.batch_size < self.world_size:
            raise ValueError(
                f"a last batch of {len(self.images) % self.batch_size} images leaves some of the "
                f"{self.world_size} processes without any: use drop_last or another batch size"
            )
        if self.augment and self.shuffle_seed is None:
            raise ValueError("augmentation is random: expected a shuffle_seed, got None")
        if self.shuffle_seed is not None and self.shuffle_seed < 0:
            raise ValueError(f"expected shuffle_seed >= 0, got {self.shuffle_seed}")
        channels = (self.images.shape[0],)
        if self.mean.shape != channels or self.std.shape != channels:
            raise ValueError(
                f"expected mean and std of shape {channels}, got {tuple(self.mean.shape)} and {tuple(self.std.shape)}"
            )

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        full, rest = divmod(len(self.images), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch, >= 0."""
        if epoch < 0:
            raise ValueError(f"expected epoch >= 0, got {epoch}")
        generator = torch.Generator()
        order = torch.arange(len(self.images))
        if self.shuffle_seed is not None:
            # Hashed, since neighbouring sums or products of seed and epoch would repeat each other's epochs.
            generator.manual_seed(int(np.random.SeedSequence((self.shuffle_seed, epoch)).generate_state(1)[0]))
            order = order[torch.randperm(len(order), generator=generator)]
        seeds = mirrors = torch.empty(0)
        if self.augment and self.resized_crops:
            seeds = torch.randint(2**62, (len(order),), generator=generator)
            mirrors = torch.randint(2, (len(order),), generator=generator).bool()
        mean, std = (channel.to(self.device).view(-1, 1, 1) for channel in (self.mean, self.std))
        slices = [self._slice(indices) for indices in order.split(self.batch_size)[: len(self)]]
        if len(seeds):
            crops = zip(slices, (self._slice(s) for s in seeds.split(self.batch_size)), strict=False)
            source = self.images.random_crops(crops)
        else:
            source = self.images.stream(slices)
        for step, (mine, pixels) in enumerate(zip(slices, source, strict=True)):
            x = pixels.to(self.device)
            if len(seeds):
                mirrored = self._slice(mirrors[step * self.batch_size :][: self.batch_size]).to(self.device)
                x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
            elif self.augment:
                count = min(self.batch_size, len(order) - step * self.batch_size)
                corners = torch.randint(2 * _PADDING + 1, (count, 2), generator=generator)
                mirrored = torch.randint(2, (count,), generator=generator).bool()
                x = _crop_and_mirror(x, self._slice(corners), self._slice(mirrored))
            y = torch.full((len(mine),), -1) if self.images.labels is None else self.images.labels[mine]
            x = (x.float() / 255 - mean) / std
            yield x.contiguous(memory_format=torch.channels_last) if self.channels_last else x, y.to(self.device)

    def _slice(self, batch: Tensor) -> Tensor:
        return batch.tensor_split(self.world_size)[self.rank]


def _crop_and_mirror(images: Tensor, corners: Tensor, mirrored: Tensor) -> Tensor:
    """Each image (B, C, H, W) padded with zeros, cut out at its corner (B, 2) and mirrored where (B,) is True."""
    height, width = images.shape[2:]
    padded = F.pad(images, [_PADDING] * 4)
    corners, mirrored = corners.to(images.device), mirrored.to(images.device)
    rows = corners[:, :1] + torch.arange(height, device=images.device)
    columns = corners[:, 1:] + torch.arange(width, device=images.device)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    image = torch.arange(len(images), device=images.device)[:, None, None]
    # Index tensors around a slice move its dimension, the channels, to the end.
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
