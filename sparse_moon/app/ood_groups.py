"""Names of image sets in all their spellings, and which out-of-distribution (OOD) sets are near which ID set or far."""

import re
from collections.abc import Iterable
from pathlib import Path

SPELLINGS: dict[str, tuple[str, ...]] = {
    "mnist": (),
    "fashionmnist": ("fmnist",),
    "kmnist": ("kuzushiji-mnist",),
    "notmnist": ("notmnist-small",),
    "emnist-letters": ("emnist",),
    "cifar10": (),
    "cifar100": (),
    "imagenet": ("imagenet-1k", "imagenet2012", "ilsvrc2012"),
    "svhn": (),
    "textures": ("texture", "dtd"),
    "places365": ("place365", "val-256"),
    "tinyimagenet": ("tin", "tiny-imagenet-200"),
    "lsun-crop": ("lsun", "lsun-c"),
    "lsun-resize": ("lsun-r",),
    "isun": (),
    "sun": (),
    "places": (),
    "inaturalist": (),
    "openimage-o": (),
    "imagenet-o": (),
    "ssb-hard": (),
    "ninco": (),
    "species": ("species-sub",),
}
"""Image sets by name, each with its other names; case, ``-``, ``_`` and spaces make no difference.

They are those of OpenOOD's folders and lists, of torchvision's folders and of DICE's. ``places`` and ``sun`` are the
10,000 images that do not overlap with ImageNet (Huang and Li 2021), ``places365`` is the validation set.
"""


def plain(name: str) -> str:
    """A name without what makes no difference between two spellings."""
    return re.sub(r"[\s_-]", "", name.lower())


_NAMES = {plain(spelling): name for name, others in SPELLINGS.items() for spelling in (name, *others)}


def canonical(name: str) -> str:
    """The name in `SPELLINGS` that ``name`` is a spelling of: ``textures`` for ``DTD``; one that is not known stays."""
    return _NAMES.get(plain(name), name)


_DRAWN = ("noise", "photos")
_SMALL = ("svhn", "textures", "places365", "lsun-crop", "lsun-resize", "isun", "scenes")
_GREY = ("mnist", "fashionmnist", "kmnist", "notmnist", "emnist-letters", "letters")

NEAR_OOD: dict[str, tuple[str, ...]] = {
    "digits": ("digits-8-9", "letters"),
    "mnist": _GREY[1:],
    "cifar10": ("cifar100", "tinyimagenet"),
    "cifar100": ("cifar10", "tinyimagenet"),
    "imagenet": ("species", "inaturalist", "openimage-o", "imagenet-o", "ssb-hard", "ninco"),
}
"""By ID set the names of the OOD sets close to it in content, as OpenOOD 1.0 and MOON group them.

Those of MNIST beyond notMNIST and Fashion-MNIST are grouped here. Of ImageNet's SSB-hard and NINCO are OpenOOD 1.5's,
which counts iNaturalist and OpenImage-O as far.
"""

FAR_OOD: dict[str, tuple[str, ...]] = {
    "digits": (*_DRAWN, *_SMALL),
    "mnist": (*_DRAWN, *_SMALL, "cifar10", "cifar100", "tinyimagenet"),
    "cifar10": (*_DRAWN, *_SMALL, *_GREY),
    "cifar100": (*_DRAWN, *_SMALL, *_GREY),
    "imagenet": (*_DRAWN, "textures", "mnist", "svhn", "places365", "places", "sun"),
}
"""By ID set the names of the OOD sets far from it in content."""

GROUPS = ("near", "far", "ungrouped")


def ood_group(dataset: str, name: str) -> str:
    """``"near"`` or ``"far"`` by `NEAR_OOD` and `FAR_OOD`, ``"ungrouped"`` for a set that neither of them names.

    Args:
        dataset: the ID set as `sparse_moon.app.datasets.load` takes it, a name or a path.
        name: of the OOD set, in any spelling.
    """
    known, name = canonical(Path(dataset).stem), canonical(name)
    if name in NEAR_OOD.get(known, ()):
        return "near"
    return "far" if name in FAR_OOD.get(known, ()) else "ungrouped"


def by_group(dataset: str, names: Iterable[str]) -> dict[str, list[str]]:
    """Those of the OOD sets in each of `GROUPS`, in their order."""
    found: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name in names:
        found[ood_group(dataset, name)].append(name)
    return found
