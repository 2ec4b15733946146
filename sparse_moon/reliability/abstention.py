"""Networks with an output for "unknown": MOON, the deep abstaining classifier and Deep Gamblers."""

from types import MappingProxyType

from torch import nn

from sparse_moon.losses import AbstainingLoss, AbstentionLoss, GamblersLoss, UnknownAwareLoss
from sparse_moon.options import AbstentionOptions, GamblersOptions, MOONOptions
from sparse_moon.reliability.costs import RunCost, moon_overhead
from sparse_moon.reliability.method import Reliability
from sparse_moon.reliability.voting import Voting

# w in the last epoch, by dataset (arXiv 2403.20047, Section 5 and Appendix G).
_FINAL_WEIGHT = {"mnist": 0.01, "cifar10": 1.0, "cifar100": 2.0, "imagenet": 0.001}


class _Abstaining(Reliability):
    """What they have in common."""

    def progress(self) -> dict[str, str]:
        if not isinstance(self.loss, AbstentionLoss):  # left out
            return {}
        return {"w": f"{self.loss.w.item():.3f}", "u": f"{self.loss.mean_u.item():.1e}"}

    def metrics(self) -> dict[str, float]:
        if not isinstance(self.loss, AbstentionLoss):
            return {}
        return {"w": self.loss.w.item(), "mean_u": self.loss.mean_u.item()}

    def end_epoch(self, model: nn.Module, epoch: int) -> None:
        if isinstance(self.loss, AbstentionLoss):
            self.loss.end_epoch()
        super().end_epoch(model, epoch)


class MOON(_Abstaining, Voting):
    """MOON (arXiv 2403.20047): unknown-aware loss, its weight's tuning, and voting over the late epochs."""

    name = "moon"
    Options = MOONOptions
    options: MOONOptions
    parts = ("loss", "tuning", "voting")
    options_of_parts = MappingProxyType(
        {"loss": ("final_weight", "warmup_epochs"), "tuning": ("warmup_epochs",), "voting": ("vote_from",)}
    )

    @property
    def unknown_output(self) -> bool:
        return "loss" not in self.without

    @property
    def averages(self) -> bool:
        return "voting" not in self.without

    def make_loss(self, model: nn.Module) -> nn.Module:
        if not self.unknown_output:
            return nn.CrossEntropyLoss()
        weight = self.options.final_weight
        return UnknownAwareLoss(
            self.num_classes,
            self.run.epochs,
            final_weight=_FINAL_WEIGHT.get(self.run.dataset, 1.0) if weight is None else weight,
            warmup_epochs=self.options.warmup_epochs,
            auto_tune="tuning" not in self.without,
        )

    @classmethod
    def overhead(cls, cost: RunCost) -> dict[str, float]:
        return moon_overhead(
            cost.training_flops, forward=cost.forward, parameters=cost.parameters, num_classes=cost.num_classes,
            examples=cost.examples, epochs=cost.epochs, warmup_epochs=cost.warmup_epochs,
            averaged_epochs=cost.averaged_epochs, refresh=cost.refresh,
        )  # fmt: skip


class DAC(_Abstaining):
    """Deep abstaining classifier (Thulasidasan et al. 2019)."""

    name = "dac"
    Options = AbstentionOptions
    options: AbstentionOptions

    @property
    def unknown_output(self) -> bool:
        return True

    def make_loss(self, model: nn.Module) -> nn.Module:
        weight = self.options.final_weight
        return AbstainingLoss(
            self.num_classes,
            self.run.epochs,
            final_weight=1.0 if weight is None else weight,
            warmup_epochs=self.options.warmup_epochs,
        )


class Gamblers(_Abstaining, Voting):
    """Deep Gamblers (Liu et al. 2019), with MOON's voting over the late epochs."""

    name = "gamblers"
    Options = GamblersOptions
    options: GamblersOptions
    parts = ("voting",)
    options_of_parts = MappingProxyType({"voting": ("vote_from",)})

    @property
    def unknown_output(self) -> bool:
        return True

    @property
    def averages(self) -> bool:
        return "voting" not in self.without

    def make_loss(self, model: nn.Module) -> nn.Module:
        return GamblersLoss(
            self.num_classes, self.run.epochs, payoff=self.options.payoff, warmup_epochs=self.options.warmup_epochs
        )
