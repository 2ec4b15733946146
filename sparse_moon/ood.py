"""Out-of-distribution (OOD) detection: what a trained network says about an input, and detectors that score it.

A detector reads `Outputs`, what one pass over a data set leaves behind, so one pass serves all detectors. A new one
subclasses `Detector`, implements ``score`` (and ``fit`` if it learns from training data, ``perturb`` if it changes the
input) and joins `DETECTORS`. For every detector a higher score means in-distribution (ID).

``K`` is the number of classes. A network trained for unknown-awareness (MOON) has ``K + 1`` outputs, the extra
"unknown" one last, with softmax probability ``u``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_moon.metrics import check_logits, class_probabilities, ood_metrics
from sparse_moon.nn import SparseLinear, evaluation_mode

Batches = Iterable[Tensor] | Iterable[Sequence[Tensor]]
"""Batches of images, or of (images, labels). A data loader or a list: something that can be iterated again."""

Perturb = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a network computed for N samples.

    Attributes:
        logits: (N, K) or (N, K + 1) float32.
        features: (N, D) float32, penultimate features: the input of the classifier head.
        labels: (N,) int64, or None where the data has none.

    Raises:
        ValueError: shapes that do not fit together.
    """

    logits: Tensor
    features: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.logits.ndim != 2 or self.features.ndim != 2 or len(self.logits) != len(self.features):
            raise ValueError(
                "expected logits (N, K) and features (N, D), "
                f"got {tuple(self.logits.shape)} and {tuple(self.features.shape)}"
            )
        if self.labels is not None and self.labels.shape != self.logits.shape[:1]:
            raise ValueError(f"expected {len(self.logits)} labels, got shape {tuple(self.labels.shape)}")

    def to(self, device: torch.device | str) -> "Outputs":
        """The same outputs on ``device``."""
        labels = None if self.labels is None else self.labels.to(device)
        return Outputs(self.logits.to(device), self.features.to(device), labels)


def classifier_head(model: nn.Module) -> nn.Module:
    """The last linear module, ``nn.Linear`` or `SparseLinear`, in definition order.

    Raises:
        ValueError: the model has no linear module.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear | SparseLinear)]
    if not linear:
        raise ValueError(f"{type(model).__name__} has no linear module to take as the classifier head")
    return linear[-1]


@torch.no_grad()
def collect(
    model: nn.Module,
    batches: Batches,
    *,
    device: torch.device | str | None = None,
    perturb: Perturb | None = None,
) -> Outputs:
    """Run ``model`` once over ``batches`` in evaluation mode and keep logits, features and labels.

    The model is left as it was found, also after an error: the mode of every module, hooks, gradients.

    Args:
        model: classifier from images to (B, K) or (B, K + 1) logits, with a linear head (see `classifier_head`).
        batches: images, or (images, labels).
        device: where the images go; the device of the model's first parameter by default.
        perturb: ``(model, images) -> images``, applied to each batch first.

    Returns:
        Outputs on the CPU, where those of a large training set fit.

    Raises:
        ValueError: no batches, no head, a head that the forward pass does not reach or that sees other than (B, D)
            features, or labels in only some of the batches.
    """
    head = classifier_head(model)
    device = _model_device(model) if device is None else device
    seen: list[Tensor] = []

    def keep_input(module: nn.Module, args: tuple[Any, ...]) -> None:
        # A copy: the input may be a view into something larger or be overwritten later in the forward pass.
        seen.append(args[0].to("cpu", torch.float32, copy=True))

    logits: list[Tensor] = []
    features: list[Tensor] = []
    labels: list[Tensor] = []
    with evaluation_mode(model), head.register_forward_pre_hook(keep_input):
        for batch in batches:
            if isinstance(batch, Tensor):
                images = batch.to(device)
            else:
                images, target = batch
                images = images.to(device)
                labels.append(target.to("cpu", torch.int64))
            if perturb is not None:
                images = perturb(model, images)
            seen.clear()  # of what perturb ran
            output = model(images)
            if not seen:
                raise ValueError(
                    "the forward pass does not reach the last linear module, so it is not the head "
                    "(or the model is compiled and skips hooks: pass the original)"
                )
            logits.append(output.to("cpu", torch.float32))
            features.append(seen[-1])
    if not logits:
        raise ValueError("no batches: empty data, or an iterator that was used before")
    if labels and len(labels) != len(logits):
        raise ValueError(f"expected labels in all batches or in none, got them in {len(labels)} of {len(logits)}")
    return Outputs(torch.cat(logits), torch.cat(features), torch.cat(labels) if labels else None)


class Detector(ABC):
    """Scores how much a sample looks in-distribution; higher is more so.

    Everything is computed on the device of the outputs; `fit` and `score` expect the same one.

    Attributes:
        name: key in tables and in `DETECTORS`. To compare two settings of one detector, give an instance another.
        num_classes: K; with K + 1 outputs the last is the unknown one.
    """

    name: str

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes

    def fit(self, train: Outputs) -> Self:
        """Learn from the training set; nothing by default."""
        return self

    def perturb(self, model: nn.Module, images: Tensor) -> Tensor:
        """Change the images before the pass that is scored; nothing by default."""
        return images

    @abstractmethod
    def score(self, outputs: Outputs) -> Tensor:
        """(N,) floating scores, of the perturbed pass where `perturb` changes the images.

        Raises:
            ValueError: logits that are not (N, K) or (N, K + 1).
        """

    @property
    def fits(self) -> bool:
        """Whether `fit` needs the training set."""
        return type(self).fit is not Detector.fit

    @property
    def perturbs(self) -> bool:
        """Whether `score` needs a pass of its own."""
        return type(self).perturb is not Detector.perturb


class MSP(Detector):
    """Maximum softmax probability (Hendrycks & Gimpel 2017): softmax over all outputs, maximum over the first K.

    With an unknown output this is ``(1 - u)`` times the MSP of the first K alone.
    """

    name = "msp"

    def score(self, outputs: Outputs) -> Tensor:
        return class_probabilities(outputs.logits, self.num_classes).amax(1)


class MaxLogit(Detector):
    """Largest of the first K logits (Hendrycks et al. 2022)."""

    name = "maxlogit"

    def score(self, outputs: Outputs) -> Tensor:
        check_logits(outputs.logits, self.num_classes)
        return outputs.logits[:, : self.num_classes].amax(1)


class Energy(Detector):
    """Negative free energy ``T logsumexp(z / T)`` (Liu et al. 2020, equation 4).

    Args:
        num_classes: K.
        temperature: T > 0.
        extra: ``"known"`` sums over the first K logits. ``"all"`` includes the unknown one, as MOON's released code
            does, so that "unknown" mass raises confidence. The same without an unknown output.
    """

    name = "energy"

    def __init__(self, num_classes: int, temperature: float = 1.0, extra: Literal["known", "all"] = "known") -> None:
        super().__init__(num_classes)
        if extra not in ("known", "all"):
            raise ValueError(f'extra must be "known" or "all", got {extra!r}')
        self.temperature = _positive(temperature)
        self.extra = extra

    def score(self, outputs: Outputs) -> Tensor:
        check_logits(outputs.logits, self.num_classes)
        logits = outputs.logits if self.extra == "all" else outputs.logits[:, : self.num_classes]
        return self.temperature * (logits.double() / self.temperature).logsumexp(1)


class ODIN(Detector):
    """Temperature-scaled MSP of inputs moved towards their own prediction (Liang et al. 2018, equations 1 and 2).

    ``x' = x - eps sign(-d log S_yhat(x; T) / dx)``, then the maximum over the first K of ``softmax(z(x') / T)``; yhat
    is the prediction among the first K, the softmax is over all outputs.

    Args:
        num_classes: K.
        temperature: T > 0.
        eps: step in the units of the network's input, after normalisation; 0 leaves the input alone.
    """

    name = "odin"

    def __init__(self, num_classes: int, temperature: float = 1000.0, eps: float = 0.0014) -> None:
        super().__init__(num_classes)
        if eps < 0:
            raise ValueError(f"eps must not be negative, got {eps}")
        self.temperature = _positive(temperature)
        self.eps = eps

    @property
    def perturbs(self) -> bool:
        return self.eps > 0

    def perturb(self, model: nn.Module, images: Tensor) -> Tensor:
        """(B, ...) moved images; parameters' gradients are not touched, and it works inside ``no_grad``."""
        with torch.inference_mode(False), torch.enable_grad():
            images = images.detach().clone().requires_grad_()
            logits = model(images)
            check_logits(logits, self.num_classes)
            best = (logits / self.temperature).log_softmax(1)[:, : self.num_classes].amax(1)
            (gradient,) = torch.autograd.grad(best.sum(), images)
        return images.detach() + self.eps * gradient.sign()

    def score(self, outputs: Outputs) -> Tensor:
        return class_probabilities(outputs.logits.double() / self.temperature, self.num_classes).amax(1)


class KNN(Detector):
    """Minus the distance to the k-th nearest training feature, features L2-normalised (Sun et al. 2022).

    Args:
        num_classes: K; not used, the score is on features.
        k: which neighbour; 50 for CIFAR-10, 200 for CIFAR-100 and 1000 for ImageNet in the paper.
        chunk_elements: similarities in memory at once, as a bound on N times the size of the training set.
    """

    name = "knn"

    def __init__(self, num_classes: int, k: int = 50, chunk_elements: int = 2**24) -> None:
        super().__init__(num_classes)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.k = k
        self.chunk_elements = chunk_elements
        self.bank: Tensor | None = None

    def fit(self, train: Outputs) -> Self:
        """Keep the (M, D) normalised training features.

        Raises:
            ValueError: fewer than k samples, or features that are not finite.
        """
        if len(train.features) < self.k:
            raise ValueError(f"k = {self.k} neighbours need as many training samples, got {len(train.features)}")
        if not train.features.isfinite().all():
            raise ValueError("training features must be finite")
        self.bank = F.normalize(train.features)
        return self

    def score(self, outputs: Outputs) -> Tensor:
        if self.bank is None:
            raise ValueError("KNN is not fitted: call fit(train) first")
        if outputs.features.shape[1] != self.bank.shape[1]:
            raise ValueError(f"expected features of size {self.bank.shape[1]}, got {outputs.features.shape[1]}")
        rows = max(1, self.chunk_elements // len(self.bank))
        return torch.cat([-self._distance(F.normalize(chunk), self.bank) for chunk in outputs.features.split(rows)])

    def _distance(self, queries: Tensor, bank: Tensor) -> Tensor:
        # Find the neighbour by inner product, then measure: sqrt(2 - 2 q.b) loses all digits below 3e-4.
        neighbour = (queries @ bank.T).neg_().kthvalue(self.k, dim=1).indices
        return torch.linalg.vector_norm(queries - bank[neighbour], dim=1)


class Unknown(Detector):
    """``1 - u``, the mass that is not on the unknown output (MOON, arXiv 2403.20047)."""

    name = "unknown"

    def score(self, outputs: Outputs) -> Tensor:
        """(N,) float64.

        Raises:
            ValueError: logits that are not (N, K + 1).
        """
        if outputs.logits.ndim != 2 or outputs.logits.shape[1] != self.num_classes + 1:
            raise ValueError(
                f"the unknown score needs {self.num_classes} + 1 outputs, got logits {tuple(outputs.logits.shape)}"
            )
        # float64: u is often below 1e-7, where 1 - u is 1 in float32.
        return 1 - outputs.logits.double().softmax(1)[:, -1]


DETECTORS: dict[str, type[Detector]] = {d.name: d for d in (MSP, MaxLogit, Energy, ODIN, KNN, Unknown)}
"""Detectors by name; each can be made from the number of classes alone."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        metrics: ``{set: {detector: ood_metrics}}`` for every OOD set.
        scores: ``{set: {detector: (N,) tensor on the CPU}}`` for ``"id"`` and every OOD set.
        id_outputs: outputs on the ID set, on the CPU, for classification metrics from the same pass.
    """

    metrics: dict[str, dict[str, dict[str, float]]]
    scores: dict[str, dict[str, Tensor]]
    id_outputs: Outputs


def evaluate(
    model: nn.Module,
    detectors: Sequence[Detector],
    *,
    id_batches: Batches,
    ood_batches: Mapping[str, Batches],
    train_batches: Batches | None = None,
    device: torch.device | str | None = None,
) -> Evaluation:
    """Fit the detectors, score the ID test set and every OOD set, and compare.

    The model passes over each data set once, and once more for every detector that perturbs its input.

    Args:
        model: see `collect`.
        detectors: with distinct names.
        id_batches: ID test data, (images, labels) or images.
        ood_batches: OOD data by name; ``"id"`` is taken.
        train_batches: ID training data with test transforms; needed if a detector fits, not read otherwise.
        device: where the model is and the detectors compute; the device of its first parameter by default.

    Raises:
        ValueError: names that collide, no training data for a detector that fits, NaN scores, or as `collect`.
    """
    names = [detector.name for detector in detectors]
    if len(set(names)) < len(names):
        raise ValueError(f"detectors need distinct names, got {names}")
    if "id" in ood_batches:
        raise ValueError('an OOD set cannot be named "id", which holds the in-distribution scores')
    device = _model_device(model) if device is None else device

    fitting = [detector for detector in detectors if detector.fits]
    if fitting:
        if train_batches is None:
            raise ValueError(f"train_batches is needed to fit {[detector.name for detector in fitting]}")
        train = collect(model, train_batches, device=device).to(device)
        for detector in fitting:
            detector.fit(train)
        del train  # can be the largest thing on the device

    def score(batches: Batches) -> tuple[Outputs, dict[str, Tensor]]:
        clean = collect(model, batches, device=device)
        there = clean.to(device)
        scores = {}
        for detector in detectors:
            perturb = detector.perturb if detector.perturbs else None
            outputs = there if perturb is None else collect(model, batches, device=device, perturb=perturb).to(device)
            scores[detector.name] = detector.score(outputs).cpu()
        return clean, scores

    id_outputs, id_scores = score(id_batches)
    scores = {"id": id_scores}
    metrics = {}
    for name, batches in ood_batches.items():
        _, scores[name] = score(batches)
        metrics[name] = {d: ood_metrics(id_scores[d], scores[name][d]) for d in names}
    return Evaluation(metrics, scores, id_outputs)


def _model_device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _positive(temperature: float) -> float:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return temperature
