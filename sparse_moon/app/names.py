"""Names that settings take, apart from what they name, which takes seconds to import.

Those of training methods and reliability methods are in :mod:`sparse_moon.options`.
"""

from typing import TYPE_CHECKING, Literal

from sparse_moon.settings import Text

ModelName = Literal["mlp", "small-resnet", "resnet18", "resnet50", "resnet101", "wrn-22-2", "densenet101"]

Score = Literal[
    "msp", "maxlogit", "energy", "odin", "knn", "unknown", "klm", "mahalanobis", "dice", "react", "vim", "ash",
    "scale", "gen", "gradnorm", "godin", "temperature",
]  # fmt: skip

if TYPE_CHECKING:
    ScoreWithOptions = str
else:

    class ScoreWithOptions(Text):
        """One of `Score` with options, ``knn:k=200``; see :func:`sparse_moon.ood.make_detector`."""

        form = rf"^({'|'.join(Score.__args__)}):.+$"


Log = Literal["csv", "tensorboard"]
