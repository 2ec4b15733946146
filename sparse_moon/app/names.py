"""Names that settings take, apart from what they name, which takes seconds to import."""

import re
from typing import TYPE_CHECKING, Literal

from jsonargparse.typing import restricted_string_type

TrainingMethod = Literal["dense", "static", "set", "rigl", "mest", "srigl", "gmp", "granet", "top-kast"]

Reliability = Literal[
    "none", "moon", "cigl", "weight-dropout", "mc-dropout", "label-smoothing", "mixup", "logitnorm", "dac", "vos",
    "generalized-odin", "sup-tickets",
]  # fmt: skip

ModelName = Literal["mlp", "small-resnet", "resnet18", "resnet50", "wrn-22-2"]

Score = Literal[
    "msp", "maxlogit", "energy", "odin", "knn", "unknown", "klm", "mahalanobis", "dice", "react", "vim", "ash",
    "scale", "gen", "gradnorm", "godin",
]  # fmt: skip

_PATH = r"^[^\W\d]\w*(\.[^\W\d]\w*)+$"

if TYPE_CHECKING:
    ImportPath = str
else:
    ImportPath = restricted_string_type("ImportPath", _PATH)
    """Where something of the user's own is: ``package.module.name``."""

OR_IMPORT_PATH = " or your own as package.module.name"
"""What messages add to a list of names that an `ImportPath` may take the place of."""


def is_import_path(value: object) -> bool:
    """Whether ``value`` has the form of an `ImportPath`."""
    return isinstance(value, str) and re.match(_PATH, value) is not None
