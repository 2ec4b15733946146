"""CigL: random masks during the training, and averages of the masked networks."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_moon.averaging import PredictionAverage, WeightAverage
from sparse_moon.nn import sparse_layers
from sparse_moon.options import CigLOptions
from sparse_moon.reliability.costs import RunCost, cigl_overhead
from sparse_moon.reliability.frozen import freeze_hidden
from sparse_moon.reliability.voting import Voting


class CigL(Voting):
    """CigL (ICLR 2023): a second, random mask, and weight & mask averaging over the late epochs.

    Without ``"averaging"`` the predictions of the late epochs' masked networks are averaged in place of their weights.
    Without ``"freezing"`` momentum and weight decay move the weights that are hidden.
    """

    name = "cigl"
    Options = CigLOptions
    options: CigLOptions
    parts = ("mask", "averaging", "freezing")
    options_of_parts = MappingProxyType({"mask": ("keep", "rescale"), "averaging": ("rescale",)})

    @property
    def masks(self) -> bool:
        return "mask" not in self.without

    @property
    def averages(self) -> bool:
        return "averaging" not in self.without

    @property
    def several(self) -> bool:
        return not self.averages

    @property
    def passes(self) -> int:
        return max(len(self.members), 1)

    @property
    def ends_with(self) -> str:
        return "several networks" if self.several else ""

    def attach_optimizer(self, optimizer: Optimizer) -> None:
        if self.mask is not None and "freezing" not in self.without:
            freeze_hidden(self.mask, optimizer)

    def make_average(self, model: nn.Module) -> WeightAverage | None:
        return WeightAverage(model, self.mask, rescale=self.options.rescale) if self.averages else None

    def vote(self, model: nn.Module) -> None:
        super().vote(model)
        if self.several:
            self.members.append(self._state(model))

    def _state(self, model: nn.Module) -> dict[str, Tensor]:
        """A copy of the model's state, as the sparser network that the epoch's last batch trained."""
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if self.mask is not None:
            for stream, (name, layer) in enumerate(sparse_layers(model).items()):
                state[f"{name}.values"] *= self.mask.mask(stream, layer)
        return state

    def predictor(self, model: nn.Module, load: Callable[[Mapping[str, Tensor]], nn.Module]) -> nn.Module:
        if not self.several:
            return model
        return PredictionAverage(map(load, self.members)).to(next(model.parameters()).device)

    @classmethod
    def overhead(cls, cost: RunCost) -> dict[str, float]:
        return cigl_overhead(
            cost.training_flops, forward=cost.forward, parameters=cost.parameters, masked=cost.masked,
            examples=cost.examples, epochs=cost.epochs, batch_size=cost.batch_size,
            averaged_epochs=cost.averaged_epochs, refresh=cost.refresh,
        )  # fmt: skip
