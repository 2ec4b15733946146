"""DICE: only the weights of the head that contribute most on the training set take part in the score."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_moon.ood.detector import Detector, check_share
from sparse_moon.ood.features import check_size
from sparse_moon.ood.logits import known_logits
from sparse_moon.ood.metrics import ood_metrics
from sparse_moon.ood.outputs import Head, Outputs, features_of, linear_head
from sparse_moon.ood.passes import Batches, collect, read_batch
from sparse_moon.ood.shaping import Shaping

Selection = Literal[
    "top", "bottom", "top+bottom", "random", "weight dropout", "unit dropout", "weight pruning", "unit pruning"
]

CANDIDATES = (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)


class DICE(Shaping):
    """Score of logits from a sparsified head (Sun & Li 2022).

    With the contributions ``V = W * mean_train(h)``, the weights whose contribution is at most the p-percentile of all
    entries of V are left out; the bias stays. Exactly ``floor(p (n - 1)) + 1`` of n weights go (none for p = 0), the
    number that lies at or below NumPy's percentile if no two are equal; among equal ones the lowest index stays. With
    p = 0 the score is that of the inner detector on the first K logits, bit for bit.

    With K + 1 outputs the unknown row is left out first, before the percentile, and the inner detector sees K logits.

    Args:
        detector: `Energy` as in the paper, `MSP`, or another that reads logits; see `Shaping`.
        p: sparsity of the head in [0, 1); see `choose_p`.
        select: which weights stay: the ``"top"`` of V, or for ablation the ``"bottom"``, half from each end
            (``"top+bottom"``), or ``"random"`` ones, which are ``"weight dropout"`` too; ``"weight pruning"`` keeps the
            largest absolute weights. ``"unit dropout"`` and ``"unit pruning"`` keep whole columns of W: random ones, or
            those of the largest L2 norm; there n is the number of units.
        seed: of random selections.
    """

    name = "dice"
    learned = ("mean", "weight", "bias", "mask")
    mean: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    mask: Tensor | None

    def __init__(self, detector: Detector, p: float = 0.9, select: Selection = "top", seed: int = 0) -> None:
        super().__init__(detector)
        if select not in _SCORES:
            raise ValueError(f"select must be one of {', '.join(_SCORES)}, got {select!r}")
        self._p = check_share("p", p)
        self.select, self.seed = select, seed

    @property
    def p(self) -> float:
        """Sparsity of the head; read-only, because the mask goes with it. See `with_p`."""
        return self._p

    def start(self) -> None:
        super().start()
        self._head: Head | None = None

    def update(self, batch: Outputs) -> None:
        """Add up the features.

        Raises:
            ValueError: no linear head, or fewer outputs than classes.
        """
        super().update(batch)
        head, features = linear_head(batch), features_of(batch)
        if self._head is None:
            self._head = _first_rows(head, self.num_classes)
            self._sum = features.new_zeros(features.shape[1], dtype=torch.float64)
            self._count = 0
        self._sum += features.sum(0, dtype=torch.float64)
        self._count += len(features)

    def finish(self) -> None:
        """Set ``mean`` (D,) and, for the first K outputs, ``weight`` (K, D), ``bias`` (K,) and ``mask``, True = kept.

        Raises:
            ValueError: no training data, or features that are not finite.
        """
        super().finish()
        if self._head is None:
            raise ValueError("DICE is not fitted: no training data")
        mean = self._sum / self._count
        if not mean.isfinite().all():
            raise ValueError("training features must be finite")
        self.mean, self.weight, self.bias = mean, self._head.weight, self._head.bias
        self.mask = self._choose(mean, self.weight)
        self._head = None

    def with_p(self, p: float) -> "DICE":
        """The same fitted detector with another p."""
        other = DICE(self.detector, p, self.select, self.seed)
        other.name = self.name
        other.mean, other.weight, other.bias = self.fitted(self.mean), self.fitted(self.weight), self.bias
        other.mask = other._choose(other.mean, other.weight)
        return other

    def output_variance(self, outputs: Outputs) -> tuple[float, float]:
        """Variance over samples of a logit, mean over the K, with all weights and with those that are kept.

        Lemma 2 of the paper: leaving out the weights that contribute least takes the variance of their part away, and
        twice its covariance with the rest, which may be negative.

        Raises:
            ValueError: not fitted, or features of another size.
        """
        weight, mask = self.fitted(self.weight).double(), self.fitted(self.mask)
        check_size(outputs, weight.shape[1])
        features = features_of(outputs).double()
        whole, sparse = (
            F.linear(features, some).var(0, correction=0).mean().item() for some in (weight, weight * mask)
        )
        return whole, sparse

    def shape(self, outputs: Outputs) -> Outputs:
        weight, bias, mask = map(self.fitted, (self.weight, self.bias, self.mask))
        check_size(outputs, weight.shape[1])
        head = Head(weight * mask, bias)
        # With all weights the network's own logits, whatever kernel and precision computed them.
        whole = known_logits(outputs, self.num_classes)
        return replace(outputs, logits=whole if self.p == 0 else head.logits(features_of(outputs)), head=head)

    def _choose(self, mean: Tensor, weight: Tensor) -> Tensor:
        if self.p == 0:
            return torch.ones_like(weight, dtype=torch.bool)
        generator = torch.Generator().manual_seed(self.seed)
        scores = _SCORES[self.select](weight.double(), mean, generator)
        size = scores.numel()
        keep = size - int(self.p * (size - 1)) - 1
        order = scores.flatten().argsort(descending=True, stable=True)
        if self.select == "top+bottom":
            kept = torch.cat([order[: (keep + 1) // 2], order[size - keep // 2 :]])
        else:
            kept = order[:keep]
        mask = torch.zeros(size, dtype=torch.bool, device=weight.device)
        mask[kept] = True
        return mask.view(scores.shape).expand_as(weight).contiguous()


def choose_p(
    model: nn.Module,
    dice: DICE,
    validation: Batches,
    *,
    candidates: Sequence[float] = CANDIDATES,
    device: torch.device | str | None = None,
    seed: int = 0,
    head: str | nn.Module | None = None,
) -> float:
    """The p that best tells validation images from Gaussian noise (Sun & Li 2022).

    As many noise images as validation images, each value drawn from N(0, 1) in the units of the network's input. The
    smallest FPR95 wins, then the largest AUROC, then the smallest p. No test data takes part.

    Args:
        model: see `collect`.
        dice: fitted; not changed. Use ``dice.with_p(p)`` with what is returned.
        validation: held-out in-distribution images, or (images, labels); iterated twice.
        candidates: values of p.
        device: as `collect`, that of ``dice``.
        seed: of the noise.
        head: as `collect`.

    Raises:
        ValueError: no candidates, or as `collect` and `DICE`.
    """
    if not candidates:
        raise ValueError("expected at least one candidate")

    def noise() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        for batch in validation:
            images, _ = read_batch(batch)
            yield torch.randn(images.shape, generator=generator).to(images.dtype)

    there = dice.fitted(dice.mean).device
    known, unknown = (collect(model, images, device=device, head=head).to(there) for images in (validation, noise()))

    def rank(p: float) -> tuple[float, float, float]:
        detector = dice.with_p(p)
        metrics = ood_metrics(detector.score(known), detector.score(unknown))
        return metrics["fpr95"], -metrics["auroc"], p

    return min(candidates, key=rank)


def _first_rows(head: Head, num_classes: int) -> Head:
    if len(head.weight) not in (num_classes, num_classes + 1):
        raise ValueError(f"expected a head of {num_classes} or {num_classes + 1} outputs, got {len(head.weight)}")
    return Head(head.weight[:num_classes].clone(), head.bias[:num_classes].clone())


def _random(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    # On the CPU, so that the choice is the same on every device.
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(like.device)


# From (weight (K, D), mean (D,)) to scores of which the largest stay: (K, D), or (1, D) for whole units.
_SCORES: dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "top": lambda weight, mean, generator: weight * mean,
    "bottom": lambda weight, mean, generator: -weight * mean,
    "top+bottom": lambda weight, mean, generator: weight * mean,
    "random": lambda weight, mean, generator: _random(tuple(weight.shape), generator, weight),
    "weight dropout": lambda weight, mean, generator: _random(tuple(weight.shape), generator, weight),
    "unit dropout": lambda weight, mean, generator: _random((1, weight.shape[1]), generator, weight),
    "weight pruning": lambda weight, mean, generator: weight.abs(),
    "unit pruning": lambda weight, mean, generator: weight.norm(dim=0, keepdim=True),
}
