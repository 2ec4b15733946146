"""Which out-of-distribution (OOD) sets are near the in-distribution (ID) set, and which are far from it."""

from pathlib import Path

NEAR_OOD: dict[str, tuple[str, ...]] = {
    "digits": ("digits-8-9", "letters"),
    "mnist": ("letters", "notmnist", "fashion_mnist", "kmnist"),
    "cifar10": ("cifar100", "tinyimagenet"),
    "cifar100": ("cifar10", "tinyimagenet"),
}
"""By ID set the names of the OOD sets close to it in content, as the literature groups them."""

_FAR = ("noise", "photos", "svhn", "dtd", "textures", "scenes", "places365", "lsun")
FAR_OOD: dict[str, tuple[str, ...]] = {
    "digits": _FAR,
    "mnist": (*_FAR, "cifar10", "cifar100", "tinyimagenet"),
    "cifar10": (*_FAR, "letters", "mnist", "fashion_mnist", "kmnist", "notmnist"),
    "cifar100": (*_FAR, "letters", "mnist", "fashion_mnist", "kmnist", "notmnist"),
}
"""By ID set the names of the OOD sets far from it in content."""

GROUPS = ("near", "far", "ungrouped")


def ood_group(dataset: str, name: str) -> str:
    """``"near"`` or ``"far"`` by `NEAR_OOD` and `FAR_OOD`, ``"ungrouped"`` for a set that neither of them names.

    Args:
        dataset: the ID set as `sparse_moon.app.datasets.load` takes it, a name or a path.
        name: of the OOD set.
    """
    stem = Path(dataset).stem
    if name in NEAR_OOD.get(stem, ()):
        return "near"
    return "far" if name in FAR_OOD.get(stem, ()) else "ungrouped"
