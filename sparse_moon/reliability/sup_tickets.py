"""Sup-tickets: networks of different topologies, averaged and pruned back."""

from bisect import bisect

from torch import nn

from sparse_moon.algorithms import ALGORITHMS
from sparse_moon.averaging import TicketAverage
from sparse_moon.options import SupTicketsOptions
from sparse_moon.reliability.voting import Voting
from sparse_moon.schedules import Cosine, Step

_TICKET_RATE = 5.0  # a cycle starts at this multiple of the final learning rate


class SupTickets(Voting):
    """Sup-tickets (Yin et al. 2022): cycles of the learning rate over the late epochs, whose ends are averaged.

    The topology changes to the end, so it needs a training method that keeps each layer's number of weights.
    """

    name = "sup-tickets"
    Options = SupTicketsOptions
    options: SupTicketsOptions

    def check(self) -> None:
        super().check()
        method = self.run.method
        if not method.exchanges_evenly(method.Options()):
            fitting = [repr(name) for name, one in ALGORITHMS.items() if one.exchanges_evenly(one.Options())]
            raise ValueError(
                f"{self.name!r} needs a method that exchanges weights and keeps their number, "
                f"{', '.join(fitting[:-1])} or {fitting[-1]}, got {method.name!r}"
            )
        if not method.exchanges_evenly(self.run.method_options):
            raise ValueError(
                f"{self.name!r} needs a constant number of weights, {method.name!r} with {self.run.method_options} "
                "has none"
            )

    @property
    def averages(self) -> bool:
        """Not slot by slot: the topology need not be frozen."""
        return False

    @property
    def topology_stop(self) -> float:
        return 1.0

    @property
    def ticket_epochs(self) -> tuple[int, ...]:
        """Numbers, from 1, of the epochs that end a cycle; the cycles cover the epochs of the vote."""
        before, late = self.first_vote - 1, self.run.epochs - self.first_vote + 1
        count = min(self.options.tickets, late)
        return tuple(before + late * (i + 1) // count for i in range(count))

    def votes(self, epoch: int) -> bool:
        return epoch in self.ticket_epochs

    def make_average(self, model: nn.Module) -> TicketAverage:
        return TicketAverage(model)

    def learning_rate(self, schedule: Cosine | Step, step: int, steps_per_epoch: int) -> float:
        """Cycles over the late epochs in place of the schedule's end."""
        starts = [(self.first_vote - 1) * steps_per_epoch, *(epoch * steps_per_epoch for epoch in self.ticket_epochs)]
        if step < starts[0]:
            return schedule(step)
        cycle = min(bisect(starts, step), len(starts) - 1)
        first, last = starts[cycle - 1], starts[cycle]
        return Cosine(_TICKET_RATE * schedule.end, schedule.end, last - first)(step - first)
