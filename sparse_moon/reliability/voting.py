"""Averages over the last epochs of a training."""

import math
from typing import ClassVar

from torch import nn

from sparse_moon.allocation import exact
from sparse_moon.averaging import TicketAverage, WeightAverage
from sparse_moon.options import VotingOptions
from sparse_moon.reliability.method import Reliability


class Voting(Reliability):
    """What methods have in common that take the networks at the ends of the late epochs together."""

    Options: ClassVar[type] = VotingOptions
    options: VotingOptions

    def check(self) -> None:
        super().check()
        run = self.run
        if run.epochs < 1:
            raise ValueError(f"{self.name} averages over epochs: epochs must be at least 1, got {run.epochs}")
        if self.averages and run.method.updates and run.stop > self.first_vote / run.epochs:
            raise ValueError(
                f"stop {run.stop} leaves the topology changing at the end of epoch {self.first_vote} of "
                f"{run.epochs}, from which weights are averaged; lower stop or raise vote_from "
                f"({self.options.vote_from})"
            )

    @property
    def averages(self) -> bool:
        """Whether weights are averaged slot by slot, for which the topology must be frozen."""
        return True

    @property
    def first_vote(self) -> int:
        """Number, from 1, of the first epoch whose end takes part in the vote."""
        return min(math.floor(exact(self.options.vote_from) * self.run.epochs) + 1, self.run.epochs)

    def votes(self, epoch: int) -> bool:
        """Whether the end of epoch number ``epoch``, from 1, takes part."""
        return epoch >= self.first_vote

    def make_average(self, model: nn.Module) -> WeightAverage | TicketAverage | None:
        return WeightAverage(model) if self.averages else None

    def end_epoch(self, model: nn.Module, epoch: int) -> None:
        super().end_epoch(model, epoch)
        if self.votes(epoch):
            self.vote(model)

    def vote(self, model: nn.Module) -> None:
        """Take the network at the end of an epoch into the average."""
        if self.average is not None:
            self.average.update(model)
