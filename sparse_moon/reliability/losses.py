"""Methods that change the loss or its targets and nothing else."""

from typing import cast

from torch import Tensor, nn

from sparse_moon.losses import LogitNormLoss, VirtualOutlierLoss, mixup
from sparse_moon.ood import classifier_head
from sparse_moon.options import LabelSmoothingOptions, LogitNormOptions, MixupOptions, VOSOptions
from sparse_moon.reliability.method import Reliability


class LabelSmoothing(Reliability):
    """Cross-entropy with smoothed labels (Szegedy et al. 2016)."""

    name = "label-smoothing"
    Options = LabelSmoothingOptions
    options: LabelSmoothingOptions

    def make_loss(self, model: nn.Module) -> nn.Module:
        return nn.CrossEntropyLoss(label_smoothing=self.options.label_smoothing)


class Mixup(Reliability):
    """Mixed images with mixed labels (Zhang et al. 2018)."""

    name = "mixup"
    Options = MixupOptions
    options: MixupOptions

    def batch(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return mixup(images, labels, self.num_classes, self.options.mixup_alpha)


class LogitNorm(Reliability):
    """Cross-entropy of normalised logits (Wei et al. 2022)."""

    name = "logitnorm"
    Options = LogitNormOptions
    options: LogitNormOptions

    def make_loss(self, model: nn.Module) -> nn.Module:
        return LogitNormLoss(self.options.logit_temperature)


class VOS(Reliability):
    """Virtual outlier synthesis (Du et al. 2022) from the features of the model's head."""

    name = "vos"
    Options = VOSOptions
    options: VOSOptions
    loss: VirtualOutlierLoss

    def attach(self, model: nn.Module, num_classes: int) -> None:
        super().attach(model, num_classes)
        self._head = classifier_head(model)
        self._head.register_forward_pre_hook(self._keep_features)

    def make_loss(self, model: nn.Module) -> nn.Module:
        options, features = self.options, cast(nn.Linear, classifier_head(model)).in_features
        return VirtualOutlierLoss(
            self.num_classes, features, self.run.epochs, start=options.outliers_from, weight=options.outlier_weight
        )

    def _keep_features(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0]

    def loss_of(self, logits: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.loss(logits, targets, self._features, self._head)
        return loss

    def end_epoch(self, model: nn.Module, epoch: int) -> None:
        self.loss.end_epoch()
        super().end_epoch(model, epoch)
