"""Detectors that read the logits alone."""

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from sparse_moon.ood.calibration import fit_temperature
from sparse_moon.ood.detector import Detector
from sparse_moon.ood.metrics import check_logits, class_probabilities
from sparse_moon.ood.outputs import Outputs, joined
from sparse_moon.ood.passes import model_logits


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
        return known_logits(outputs, self.num_classes).amax(1)


class Energy(Detector):
    """Negative free energy ``T logsumexp(z / T)`` (Liu et al. 2020, equation 4).

    Of logarithms of probabilities, as averaged predictions are, it is 0 up to rounding at T = 1 and says nothing.

    Args:
        num_classes: K.
        temperature: T > 0.
        extra: ``"known"`` sums over the first K logits. ``"all"`` includes the unknown one, as MOON's released code
            does, so that "unknown" mass raises confidence. The same without an unknown output.
    """

    name = "energy"
    logit_scale = True

    def __init__(self, num_classes: int, temperature: float = 1.0, extra: Literal["known", "all"] = "known") -> None:
        super().__init__(num_classes)
        if extra not in ("known", "all"):
            raise ValueError(f'extra must be "known" or "all", got {extra!r}')
        self.temperature = _positive("temperature", temperature)
        self.extra = extra

    def score(self, outputs: Outputs) -> Tensor:
        known = known_logits(outputs, self.num_classes)
        logits = outputs.logits if self.extra == "all" else known
        return self.temperature * (logits.double() / self.temperature).logsumexp(1)


class ODIN(Detector):
    """Temperature-scaled MSP of inputs moved towards their own prediction (Liang et al. 2018, equations 1 and 2).

    ``x' = x - eps / std sign(-d log S_yhat(x; T) / dx)``, then the maximum over the first K of ``softmax(z(x') / T)``;
    yhat is the prediction among the first K, the softmax is over all outputs. Images come normalised,
    ``(pixel - mean) / std``, so that a step of ``eps / std`` is one of eps for pixels in [0, 1].

    Args:
        num_classes: K.
        temperature: T > 0.
        eps: step, for pixels in [0, 1]; 0 leaves the input alone. The paper tunes it for each network and OOD set;
            0.0014 is a common value for CIFAR.
        std: what each of the C channels was divided by, or nothing where images are pixels in [0, 1] themselves.

    Raises:
        ValueError: a negative eps, a temperature or std that is not positive, and in `perturb` images that are not
            (B, C, ...) with as many channels as ``std``.
    """

    name = "odin"

    def __init__(
        self, num_classes: int, temperature: float = 1000.0, eps: float = 0.0014, std: Sequence[float] | None = None
    ) -> None:
        super().__init__(num_classes)
        if not eps >= 0:
            raise ValueError(f"eps must not be negative, got {eps}")
        self.temperature = _positive("temperature", temperature)
        self.eps = eps
        self.std = None if std is None else [_positive("std", float(value)) for value in std]

    @property
    def perturbs(self) -> bool:
        return self.eps > 0

    def perturb(self, model: nn.Module, images: Tensor) -> Tensor:
        """(B, ...) moved images; parameters' gradients are not touched, and it works inside ``no_grad``."""
        step = self._step(images)
        with torch.inference_mode(False), torch.enable_grad():
            images = images.detach().clone().requires_grad_()
            logits = model_logits(model, images.clone())  # which the model may write into
            check_logits(logits, self.num_classes)
            best = (logits / self.temperature).log_softmax(1)[:, : self.num_classes].amax(1)
            (gradient,) = torch.autograd.grad(best.sum(), images)
        return images.detach() + step * gradient.sign()

    def _step(self, images: Tensor) -> Tensor | float:
        """``eps / std`` in the shape of ``images``' channels."""
        if self.std is None:
            return self.eps
        if images.ndim < 2 or images.shape[1] != len(self.std):
            raise ValueError(f"expected images (B, {len(self.std)}, ...) as std has it, got {tuple(images.shape)}")
        return self.eps / images.new_tensor(self.std).view(-1, *[1] * (images.ndim - 2))

    def score(self, outputs: Outputs) -> Tensor:
        return class_probabilities(outputs.logits.double() / self.temperature, self.num_classes).amax(1)


class TemperatureScaling(Detector):
    """MSP of logits divided by the temperature that calibrates the network (Guo et al. 2017), as OpenOOD has it.

    The temperature is that of `fit_temperature` on held-out ID data, never on training or test data; the softmax is
    over all outputs, the maximum over the first K. It changes the order of samples only where they are torn between
    more than two classes, so that it is close to `MSP` where the temperature is close to 1.
    """

    name = "temperature"
    learned = ("temperature",)
    held_out = True
    temperature: Tensor | None

    def start(self) -> None:
        self._parts: list[Outputs] = []

    def update(self, batch: Outputs) -> None:
        """Keep logits and labels.

        Raises:
            ValueError: no labels, or logits that are not (B, K) or (B, K + 1).
        """
        check_logits(batch.logits, self.num_classes)
        if batch.labels is None:
            raise ValueError("the temperature is fitted to labels, got batches without")
        self._parts.append(Outputs(batch.logits, None, batch.labels))

    def finish(self) -> None:
        """Set the 0-d float64 ``temperature``.

        Raises:
            ValueError: no data, or logits that are not finite.
        """
        if not self._parts:
            raise ValueError("TemperatureScaling is not fitted: no held-out data")
        held = joined(self._parts)
        if not held.logits.isfinite().all():
            raise ValueError("held-out logits must be finite")
        fitted = fit_temperature(held.logits, cast(Tensor, held.labels))
        self.temperature = torch.tensor(fitted, dtype=torch.float64, device=held.logits.device)
        self.start()

    def score(self, outputs: Outputs) -> Tensor:
        check_logits(outputs.logits, self.num_classes)
        return class_probabilities(outputs.logits.double() / self.fitted(self.temperature), self.num_classes).amax(1)


class GEN(Detector):
    """Minus the generalized entropy ``sum_j p_j^gamma (1 - p_j)^gamma`` (Liu et al. 2023).

    The sum is over the ``top`` largest probabilities of the softmax over the first K: the unknown output is left out,
    because its mass would make the known probabilities, and with them the entropy, small.

    Args:
        num_classes: K.
        gamma: in (0, 1); the paper takes 0.1.
        top: M, all K by default; the paper takes 100 of ImageNet's 1000.
    """

    name = "gen"

    def __init__(self, num_classes: int, gamma: float = 0.1, top: int | None = None) -> None:
        super().__init__(num_classes)
        if not 0 < gamma < 1:
            raise ValueError(f"gamma must be in (0, 1), got {gamma}")
        if top is not None and not 1 <= top <= num_classes:
            raise ValueError(f"top must be in [1, {num_classes}], got {top}")
        self.gamma, self.top = gamma, top

    def score(self, outputs: Outputs) -> Tensor:
        logits = known_logits(outputs, self.num_classes)
        p = logits.double().softmax(1).sort(1, descending=True).values
        # 1 - p of the largest, as a sum, keeps the digits that the subtraction would lose.
        complement = torch.cat([p[:, 1:].sum(1, keepdim=True), 1 - p[:, 1:]], dim=1)
        return -(p * complement).pow(self.gamma)[:, : self.top].sum(1)


class KLM(Detector):
    """Minus the divergence to the closest class template, ``-min_k KL(p || d_k)`` (Hendrycks et al. 2022).

    The template ``d_k`` is the mean softmax of the training samples predicted as k among the first K; classes that are
    never predicted have none. ``p`` and ``d_k`` are over all outputs, so that mass on the unknown one counts as a
    difference. The paper takes templates from validation data.
    """

    name = "klm"
    learned = ("templates",)
    templates: Tensor | None

    def start(self) -> None:
        self._sums: Tensor | None = None

    def update(self, batch: Outputs) -> None:
        predicted = known_logits(batch, self.num_classes).argmax(1)
        p = batch.logits.double().softmax(1)
        if self._sums is None:
            self._sums = p.new_zeros(self.num_classes, p.shape[1] + 1)
        # One more column, which counts.
        self._sums.index_add_(0, predicted, torch.cat([p, p.new_ones(len(p), 1)], dim=1))

    def finish(self) -> None:
        """Set the (J, K) or (J, K + 1) float64 templates, J <= K.

        Raises:
            ValueError: no training data, or logits that are not finite.
        """
        sums = self.fitted(self._sums)
        if not sums.isfinite().all():
            raise ValueError("training logits must be finite")
        sums = sums[sums[:, -1] > 0]
        self.templates = sums[:, :-1] / sums[:, -1:]
        self.start()

    def score(self, outputs: Outputs) -> Tensor:
        templates = self.fitted(self.templates)
        known_logits(outputs, self.num_classes)
        if outputs.logits.shape[1] != templates.shape[1]:
            raise ValueError(f"fitted to {templates.shape[1]} outputs, got logits {tuple(outputs.logits.shape)}")
        p = outputs.logits.double().softmax(1)
        # A probability that underflowed to zero counts as the smallest positive one.
        log_templates = templates.clamp(min=torch.finfo(torch.float64).tiny).log()
        return (p @ log_templates.T).amax(1) - torch.xlogy(p, p).sum(1)


class Unknown(Detector):
    """``1 - u``, the mass that is not on the unknown output (MOON, arXiv 2403.20047)."""

    name = "unknown"
    unknown_output = True

    def score(self, outputs: Outputs) -> Tensor:
        """(N,) float64.

        Raises:
            ValueError: logits that are not (N, K + 1).
        """
        if outputs.logits.ndim != 2 or outputs.logits.shape[1] != self.num_classes + 1:
            raise ValueError(
                f"the unknown score needs {self.num_classes} + 1 outputs, got logits {tuple(outputs.logits.shape)}"
            )
        # float64: u is often below 1e-7, where 1 - u is 1 in float32. For u near 1 the difference has no digits but the
        # sum of the others has; for u near 0 it is the other way round.
        p = outputs.logits.double().softmax(1)
        u = p[:, -1]
        return torch.where(u < 0.5, 1 - u, p[:, :-1].sum(1))


def known_logits(outputs: Outputs, num_classes: int) -> Tensor:
    """The first K logits, (N, K).

    Raises:
        ValueError: logits that are not (N, K) or (N, K + 1).
    """
    check_logits(outputs.logits, num_classes)
    return outputs.logits[:, :num_classes]


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return value
