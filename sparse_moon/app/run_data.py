"""The data of a run: what it trains on, what it keeps back, what it is tested on."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_moon.app import datasets
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.ood_groups import canonical
from sparse_moon.app.ood_sets import default_ood, load_ood

_COUNTS = {"train": "training images", "test": "test images", "classes": "classes"}
_SAME_STATISTICS = 1 / 255  # of one set as arrays and as files, of which a part is read for them
_HOLDOUT_STREAM = 1  # apart from the orders of the epochs, which are hashed from (seed, epoch) as well


@dataclass(frozen=True, eq=False)
class RunData(datasets.DataSet):
    """A data set of which a part of the training images is kept out of training.

    Attributes:
        train: the others.
        holdout: the part, or None.
    """

    holdout: datasets.Images | None = None


class _Part(datasets.Images):
    """Some images of another source."""

    def __init__(self, images: datasets.Images, indices: Tensor) -> None:
        self.images, self.indices, self.shape = images, indices, images.shape
        self.resize, self.workers = images.resize, images.workers
        self.labels = None if images.labels is None else images.labels[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def stream(self, order: Iterable[Tensor]) -> Iterator[Tensor]:
        return self.images.stream(self.indices[indices] for indices in order)

    def random_crops(self, order: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        return self.images.random_crops((self.indices[indices], seeds) for indices, seeds in order)

    def checksum(self) -> str | None:
        """Of the whole source: which part this is follows from the settings."""
        return self.images.checksum()


def load_dataset(config: TrainConfig) -> RunData:
    """The run's in-distribution data, the held-out part drawn by its seed.

    Raises:
        ValueError: data that is damaged, or a holdout that leaves no image on one of both sides, or of a class.
        FileNotFoundError: it is not there.
    """
    root = None if config.data_root is None else Path(config.data_root)
    whole = datasets.load(
        config.dataset, root, download=config.download, image_size=config.image_size, resize=config.resize,
        workers=config.workers,
    )  # fmt: skip
    content = {field.name: getattr(whole, field.name) for field in fields(datasets.DataSet)}
    if not config.holdout:
        return RunData(**content)
    size = len(whole.train)
    count = round(config.holdout * size)
    if not 0 < count < size:
        raise ValueError(f"holdout {config.holdout} of {size} training images leaves one of both parts empty")
    seed = np.random.SeedSequence((config.seed, 0, _HOLDOUT_STREAM)).generate_state(1)[0]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(int(seed)))
    held, kept = order[:count].sort().values, order[count:].sort().values
    if whole.train.labels is not None:
        images = torch.bincount(whole.train.labels[kept], minlength=whole.num_classes)
        if not images.all():
            raise ValueError(
                f"holdout {config.holdout} leaves no training image of class {images.argmin().item()}: "
                "lower holdout, or choose another seed"
            )
    return RunData(**{**content, "train": _Part(whole.train, kept)}, holdout=_Part(whole.train, held))


def identity(dataset: datasets.DataSet) -> dict[str, Any]:
    """By what a run's data is known again; goes into its checkpoints."""
    return {
        "train": len(dataset.train),
        "test": len(dataset.test),
        "classes": dataset.num_classes,
        "mean": dataset.mean.tolist(),
        "std": dataset.std.tolist(),
        "checksum": dataset.train.checksum(),
    }


def difference(kept: Mapping[str, Any] | None, found: Mapping[str, Any]) -> str | None:
    """What is other about the data with the identity ``found`` than about that with ``kept``, or None.

    A checksum tells other training images of the same number, where both are kept in the same form.

    Args:
        kept: None of older checkpoints, which have none.
    """
    if kept is None:
        return None
    for name, things in _COUNTS.items():
        if kept[name] != found[name]:
            return f"{kept[name]} {things}, here are {found[name]}"
    for name in ("mean", "std"):
        pairs = zip(kept[name], found[name], strict=False)
        if len(kept[name]) != len(found[name]) or any(abs(a - b) > _SAME_STATISTICS for a, b in pairs):
            return f"images whose {name} is {kept[name]}, here it is {found[name]}"
    (form, _, old), (other_form, _, new) = (str(one["checksum"]).partition(" ") for one in (kept, found))
    return "other training images or labels of the same number" if form == other_form and old != new else None


def load_ood_sets(config: TrainConfig, dataset: datasets.DataSet) -> dict[str, datasets.Images]:
    """The run's out-of-distribution sets by name, in the shape of its data.

    Raises:
        ValueError: a set that cannot be read, two of one name, in any of its spellings, or a name that cannot stand in
            the results.
        FileNotFoundError: sets that are not there, all of them named.
    """
    root = None if config.data_root is None else Path(config.data_root)
    specs = default_ood(config.dataset) if config.ood is None else config.ood
    names = [spec.partition("=")[0] for spec in specs]
    known = [canonical(name) for name in names]
    for i, name in enumerate(names):
        if name == "id":
            raise ValueError("an OOD set cannot be called 'id', which stands for the in-distribution set")
        if not name.isprintable():
            raise ValueError(f"the name of an OOD set must be printable text, got {name!r}")
        if known[i] in known[:i]:
            other = names[known.index(known[i])]
            raise ValueError(f"two OOD sets are called {name!r}" + f" and {other!r}" * (other != name))
    sets: dict[str, datasets.Images] = {}
    missing: list[str] = []
    for spec in specs:
        try:
            name, images = load_ood(spec, dataset, root, seed=config.seed, download=config.download)
        except FileNotFoundError as error:
            missing.append(str(error))
        else:
            sets[name] = images
    if len(missing) > 1:
        raise FileNotFoundError(f"{len(missing)} OOD sets are missing: {'; '.join(missing)}")
    if missing:
        raise FileNotFoundError(missing[0])
    return sets


def plain_batches(images: datasets.Images, dataset: datasets.DataSet, config: TrainConfig) -> datasets.Batches:
    """Batches in order, without augmentation."""
    return datasets.Batches(
        images, dataset.mean, dataset.std, config.batch_size, device=config.device, channels_last=channels_last(config)
    )


def channels_last(config: TrainConfig) -> bool:
    """Whether the run's images and its network are in this layout, which convolutions on a GPU want."""
    if config.memory_format == "auto":
        return torch.device(config.device).type == "cuda"
    return config.memory_format == "channels_last"
