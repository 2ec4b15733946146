"""Generalized ODIN: a cosine head in place of the linear one."""

from typing import cast

from torch import nn

from sparse_moon.ood import CosineHead
from sparse_moon.reliability.method import Reliability


class GeneralizedODIN(Reliability):
    """Generalized ODIN (Hsu et al. 2020): the model's ``fc`` becomes a :class:`sparse_moon.ood.CosineHead`."""

    name = "generalized-odin"
    keeps_dense = ("fc",)
    cosine_head = True

    @property
    def ends_with(self) -> str:
        return "a cosine head"

    def check_model(self, model: nn.Module, name: str) -> None:
        if not isinstance(getattr(model, "fc", None), nn.Linear):
            raise ValueError(f"{self.name!r} replaces the nn.Linear fc of a model, {name} has none")

    def change(self, model: nn.Module) -> nn.Module:
        linear = cast(nn.Linear, model.get_submodule("fc"))
        model.fc = CosineHead(linear.in_features, linear.out_features)
        return model
