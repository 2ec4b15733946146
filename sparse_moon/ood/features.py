"""Detectors that read the penultimate features."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_moon.ood.detector import Detector, Sample
from sparse_moon.ood.logits import known_logits
from sparse_moon.ood.outputs import Outputs, features_of, linear_head


class KNN(Detector):
    """Minus the distance to the k-th nearest training feature, features L2-normalised (Sun et al. 2022).

    Args:
        num_classes: K; not used, the score is on features.
        k: which neighbour; 50 for CIFAR-10, 200 for CIFAR-100 and 1000 for ImageNet in the paper.
        chunk_elements: similarities in memory at once, as a bound on N times the size of the training set.
    """

    name = "knn"
    learned = ("center", "bank")
    center: Tensor | None
    bank: Tensor | None

    def __init__(self, num_classes: int, k: int = 50, chunk_elements: int = 2**24) -> None:
        super().__init__(num_classes)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.k = k
        self.chunk_elements = chunk_elements

    def start(self) -> None:
        self._parts: list[Tensor] = []

    def update(self, batch: Outputs) -> None:
        """Keep the features.

        Raises:
            ValueError: none, or features that are not finite.
        """
        self._parts.append(_finite_features(batch))

    def finish(self) -> None:
        """Set the (D,) ``center`` of the normalised features and the (M, D) ``bank``, those around it: float64.

        Raises:
            ValueError: fewer than k samples.
        """
        if (count := sum(map(len, self._parts))) < self.k:
            raise ValueError(
                f"k = {self.k} neighbours need as many training samples, got {count}: take KNN(num_classes, k) with a "
                "smaller k, or leave the score out"
            )
        features = F.normalize(torch.cat(self._parts).double())
        self.center = features.mean(0)
        self.bank = features - self.center
        self.start()

    def score(self, outputs: Outputs) -> Tensor:
        center, bank = map(self.fitted, (self.center, self.bank))
        check_size(outputs, bank.shape[1])
        half = bank.square().sum(1) / 2
        rows = max(1, self.chunk_elements // len(bank))
        return torch.cat(
            [
                -self._distance(F.normalize(chunk.double()) - center, bank, half)
                for chunk in features_of(outputs).split(rows)
            ]
        )

    def _distance(self, queries: Tensor, bank: Tensor, half: Tensor) -> Tensor:
        # Features often lie close together, by clusters or far from the origin: the products need float64 and the
        # center to tell the k-th neighbour, and its distance is measured, as a difference of products has no digits.
        neighbour = torch.addmm(-half, queries, bank.T).topk(self.k, dim=1).indices[:, -1]
        return torch.linalg.vector_norm(queries - bank[neighbour], dim=1)


class Mahalanobis(Detector):
    """Minus the smallest squared Mahalanobis distance to a class mean (Lee et al. 2018, equations 1 and 2).

    ``-min_c (h - mu_c)^T S^+ (h - mu_c)`` with the covariance ``S`` of features around their class means, one for all
    classes. Directions in which float32 features do not vary within classes count for nothing (pseudo-inverse).
    Classes without training samples have no mean. The last layer alone, without the paper's input perturbation.

    Args:
        num_classes: K.
        shrinkage: s in [0, 1]: ``S`` becomes ``(1 - s) S + s trace(S) / D I``; for few samples a feature.
    """

    name = "mahalanobis"
    learned = ("center", "whitening", "means")
    center: Tensor | None
    whitening: Tensor | None
    means: Tensor | None

    def __init__(self, num_classes: int, shrinkage: float = 0.0) -> None:
        super().__init__(num_classes)
        if not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage must be in [0, 1], got {shrinkage}")
        self.shrinkage = shrinkage

    def start(self) -> None:
        self._origins: Tensor | None = None

    def update(self, batch: Outputs) -> None:
        """Add up counts, features and their products.

        Raises:
            ValueError: no labels, labels outside [0, K), or features that are not finite.
        """
        features = _finite_features(batch).double()
        if batch.labels is None:
            raise ValueError("Mahalanobis needs the labels of the training data, got none")
        if not ((batch.labels >= 0) & (batch.labels < self.num_classes)).all():
            raise ValueError(f"expected labels in [0, {self.num_classes}), got {batch.labels.unique().tolist()}")
        size = features.shape[1]
        if self._origins is None:
            self._origins = features.new_zeros(self.num_classes, size)
            self._products = features.new_zeros(size, size)
            self._sums = features.new_zeros(self.num_classes, size)
            self._counts = features.new_zeros(self.num_classes)
        counts = self._counts.new_zeros(self.num_classes).index_add_(0, batch.labels, features.new_ones(len(features)))
        # Sums of products lose the fewest digits around a point in the midst of the class: what varies within classes
        # may be far smaller than what lies between them.
        fresh = (self._counts == 0) & (counts > 0)
        means = torch.zeros_like(self._sums).index_add_(0, batch.labels, features) / counts[:, None]
        self._origins[fresh] = means[fresh]
        features = features - self._origins[batch.labels]
        self._products += features.T @ features
        self._sums.index_add_(0, batch.labels, features)
        self._counts += counts

    def finish(self) -> None:
        """Set the (D,) ``center``, the (D, R) ``whitening`` A with ``S^+ = A A^T``, and the (J, R) whitened ``means``.

        Raises:
            ValueError: no training data.
        """
        origins = self.fitted(self._origins)
        present = self._counts > 0
        counts = self._counts[present, None]
        offsets = self._sums[present] / counts
        means = origins[present] + offsets
        covariance = (self._products - offsets.T @ (counts * offsets)) / counts.sum()
        size = len(covariance)
        average = covariance.trace() / size
        covariance = (1 - self.shrinkage) * covariance + self.shrinkage * average * torch.eye(size).to(covariance)
        variance, directions = torch.linalg.eigh(covariance)
        # Rounding of float32 features looks like a variance of about eps^2 of the largest in every direction.
        varies = variance > size * torch.finfo(torch.float32).eps ** 2 * variance[-1]
        self.whitening = directions[:, varies] * variance[varies].rsqrt()
        self.center = means.mean(0)
        self.means = (means - self.center) @ self.whitening
        self.start()

    def score(self, outputs: Outputs) -> Tensor:
        center, whitening, means = map(self.fitted, (self.center, self.whitening, self.means))
        check_size(outputs, len(center))
        points = (features_of(outputs).double() - center) @ whitening
        # Measured to the mean that is found: a difference of products loses the digits of a distance that is small
        # beside the means' own.
        nearest = torch.addmm(-means.square().sum(1) / 2, points, means.T).argmax(1)
        return -(points - means[nearest]).square().sum(1)


class ViM(Detector):
    """Energy minus a virtual logit, the part of h outside the principal space (Wang et al. 2022).

    ``logsumexp(z) - alpha ||R^T (h - o)||`` over the first K logits: ``o = -W^+ b`` of the first K rows of the head, R
    the directions of least variance of training features around ``o``, and alpha the mean largest logit over the mean
    norm. It orders samples as the paper's probability of the virtual class does. The mean norm is taken over an evenly
    spread sample of at most 32768 training images.

    Where training features lie in the principal space up to float32 rounding, there is nothing to compare with: alpha
    is 0 and the score the energy.

    Args:
        num_classes: K.
        dim: of the principal space, in [0, D); by default as the paper: 1000 for D >= 2048, else 512 for D >= 768,
            else D / 2.
    """

    name = "vim"
    learned = ("origin", "residual", "alpha")
    linear_head = True
    origin: Tensor | None
    residual: Tensor | None
    alpha: Tensor | None

    def __init__(self, num_classes: int, dim: int | None = None) -> None:
        super().__init__(num_classes)
        if dim is not None and dim < 0:
            raise ValueError(f"dim must not be negative, got {dim}")
        self.dim = dim

    def start(self) -> None:
        self._origin: Tensor | None = None

    def update(self, batch: Outputs) -> None:
        """Add up products around the origin and the largest logits.

        Raises:
            ValueError: no linear head, features that are not finite, or ``dim`` >= D.
        """
        head = linear_head(batch)
        features = _finite_features(batch)
        largest = known_logits(batch, self.num_classes).amax(1)
        if self._origin is None:
            size = features.shape[1]
            if self.dim is not None and self.dim >= size:
                raise ValueError(f"dim must be below the number of features, {size}, got {self.dim}")
            weight, bias = head.weight[: self.num_classes].double(), head.bias[: self.num_classes].double()
            self._origin = -torch.linalg.pinv(weight) @ bias
            self._products = weight.new_zeros(size, size)
            self._sample = Sample()
            self._largest = weight.new_zeros(())
        centered = features.double() - self._origin
        self._products += centered.T @ centered
        self._largest += largest.double().sum()
        self._sample.add(features)

    def finish(self) -> None:
        """Set the (D,) ``origin``, the (D, D - dim) basis ``residual`` and the 0-d ``alpha``, all float64."""
        origin = self.fitted(self._origin)
        size = len(origin)
        dim = principal_dim(size) if self.dim is None else self.dim
        self.residual = torch.linalg.eigh(self._products).eigenvectors[:, : size - dim].contiguous()
        centered = self._sample.rows().double() - origin
        norm, whole = (centered @ self.residual).norm(dim=1).mean(), centered.norm(dim=1).mean()
        resolved = norm > torch.finfo(torch.float32).eps * whole
        self.alpha = torch.where(resolved, self._largest / self._sample.seen / norm, 0.0)
        self.origin = origin
        self.start()
        del self._products, self._sample

    def score(self, outputs: Outputs) -> Tensor:
        origin, residual, alpha = map(self.fitted, (self.origin, self.residual, self.alpha))
        check_size(outputs, len(origin))
        energy = known_logits(outputs, self.num_classes).double().logsumexp(1)
        return energy - alpha * ((features_of(outputs).double() - origin) @ residual).norm(dim=1)


class GradNorm(Detector):
    """L1 norm of the gradient of ``KL(uniform || softmax(z / T))`` in the head's weight (Huang et al. 2021).

    Without a backward pass: the gradient is the outer product of ``(softmax(z / T) - 1 / K) / T`` and h, so its norm is
    the product of theirs. Over the first K logits; bias and earlier layers take no part, as in the paper.

    Args:
        num_classes: K.
        temperature: T > 0.
    """

    name = "gradnorm"
    linear_head = True

    def __init__(self, num_classes: int, temperature: float = 1.0) -> None:
        super().__init__(num_classes)
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature

    def score(self, outputs: Outputs) -> Tensor:
        linear_head(outputs)
        logits = known_logits(outputs, self.num_classes).double()
        distance = ((logits / self.temperature).softmax(1) - 1 / self.num_classes).abs().sum(1)
        return distance * features_of(outputs).double().abs().sum(1) / self.temperature


class GeneralizedODIN(Detector):
    """``max_i h_i``, the largest cosine among the first K (Hsu et al. 2020), of a network with a `CosineHead`.

    Without the paper's input perturbation.
    """

    name = "godin"
    cosine_head = True

    def score(self, outputs: Outputs) -> Tensor:
        known_logits(outputs, self.num_classes)
        if outputs.head is None or not outputs.head.cosine:
            raise ValueError("Generalized ODIN needs outputs of a network with a cosine head")
        weight = outputs.head.weight[: self.num_classes].double()
        return F.linear(F.normalize(features_of(outputs).double()), F.normalize(weight)).amax(1)


def principal_dim(size: int) -> int:
    """ViM's default dimension of the principal space, for this many features (Wang et al. 2022)."""
    if size >= 2048:
        return 1000
    return 512 if size >= 768 else size // 2


def _finite_features(batch: Outputs) -> Tensor:
    features = features_of(batch)
    if not features.isfinite().all():
        raise ValueError("training features must be finite")
    return features


def check_size(outputs: Outputs, size: int) -> None:
    """Raise ``ValueError`` unless there are ``size`` features."""
    if (got := features_of(outputs).shape[1]) != size:
        raise ValueError(f"expected features of size {size}, got {got}")
