"""Names that settings take, apart from what they name, which takes seconds to import.

Those of training methods and reliability methods are in :mod:`sparse_moon.options`.
"""

from typing import Literal

ModelName = Literal["mlp", "small-resnet", "resnet18", "resnet50", "wrn-22-2"]

Score = Literal[
    "msp", "maxlogit", "energy", "odin", "knn", "unknown", "klm", "mahalanobis", "dice", "react", "vim", "ash",
    "scale", "gen", "gradnorm", "godin",
]  # fmt: skip
