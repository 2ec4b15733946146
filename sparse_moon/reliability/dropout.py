"""Random masks on the weights: weight dropout, and Monte Carlo dropout."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from sparse_moon.averaging import StochasticPasses
from sparse_moon.options import MaskOptions, MCDropoutOptions
from sparse_moon.random_mask import RandomMask
from sparse_moon.reliability.method import Reliability


class WeightDropout(Reliability):
    """A random mask on the weights in training, and the whole network to predict with."""

    name = "weight-dropout"
    Options = MaskOptions
    options: MaskOptions

    @property
    def masks(self) -> bool:
        return True


class MCDropout(WeightDropout):
    """Monte Carlo dropout (Gal & Ghahramani 2016) on the weights: predictions are averaged over random masks, too."""

    name = "mc-dropout"
    Options = MCDropoutOptions
    options: MCDropoutOptions

    @property
    def several(self) -> bool:
        return True

    @property
    def passes(self) -> int:
        return self.options.samples

    def predictor(self, model: nn.Module, load: Callable[[Mapping[str, Tensor]], nn.Module]) -> nn.Module:
        return StochasticPasses(model, RandomMask(model, self.options.keep, self.run.seed), self.options.samples)
