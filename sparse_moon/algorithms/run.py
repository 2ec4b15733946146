"""What a training method is told of a run: its timing, for the constructor, and its FLOPs, for the accounting."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sparse_moon.schedules import Cosine


@dataclass(frozen=True)
class TrainingRun:
    """The settings of a run that every training method may ask for.

    Attributes:
        total_steps: length of the training, in batches.
        interval: batches from topology update to topology update.
        stop: share of the training after which the topology is frozen.
        drop_fraction: share of a layer's weights that the first update exchanges.
        weight_decay: L2 penalty.
        seed: of what is random.
        densities: gives the density by sparse layer that the network is to end with.
        backwards_per_step: backward passes whose gradients are accumulated for a step.
    """

    total_steps: int
    interval: int
    stop: float
    drop_fraction: float
    weight_decay: float
    seed: int
    densities: Callable[[], Mapping[str, float]]
    backwards_per_step: int = 1

    @property
    def drop_schedule(self) -> Cosine:
        """``drop_fraction``, falling to 0 along half a cosine until ``stop``."""
        return Cosine(self.drop_fraction, 0.0, max(round(self.stop * self.total_steps), 1))


@dataclass(frozen=True)
class TrainingFlops:
    """What the training FLOPs of a method depend on.

    Attributes:
        sparse, dense: forward FLOPs an example of the sparse (in the end) and of the dense network.
        interval: dT, steps from update to update.
        update_fraction: share of the training during which the topology is updated, T_end / T.
        updates_replace_step: whether an update takes the place of a step, or is an extra pass.
        start: forward FLOPs an example of all weights at the start, where there are more than in the end.
        start_fraction: share of the training before which nothing is pruned.
        growth: mean share of weights, over the whole training, that exist besides.

    Raises:
        ValueError: a number out of range.
    """

    sparse: float
    dense: float
    interval: int = 100
    update_fraction: float = 0.75
    updates_replace_step: bool = True
    start: float | None = None
    start_fraction: float = 0.0
    growth: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.sparse <= self.dense or self.dense == 0:
            raise ValueError(f"need 0 <= f_sparse <= f_dense and f_dense > 0, got {self.sparse} and {self.dense}")
        if self.interval < 1 or not 0.0 <= self.update_fraction <= 1.0:
            raise ValueError(
                f"need interval >= 1 and update_fraction in [0, 1], got {self.interval} and {self.update_fraction}"
            )
        start_fits = self.start is None or self.sparse <= self.start <= self.dense
        if not start_fits or not 0.0 <= self.start_fraction <= self.update_fraction or self.growth < 0.0:
            raise ValueError(
                f"need f_sparse <= f_start <= f_dense, 0 <= start <= update_fraction and growth >= 0, "
                f"got f_start {self.start}, start {self.start_fraction} and growth {self.growth}"
            )

    @property
    def step(self) -> float:
        """FLOPs an example of a step of the sparse network: forward and two gradients."""
        return 3 * self.sparse

    def ratio(self, while_updating: float) -> float:
        """To dense training, with these FLOPs an example until ``update_fraction`` and those of a step after it."""
        return (self.update_fraction * while_updating + (1 - self.update_fraction) * self.step) / (3 * self.dense)
