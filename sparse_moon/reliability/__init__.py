"""Training for reliability: what a run does so that its network knows what it does not know.

A method is a class, `Reliability` with some of its answers changed: MOON has another loss and averages weights, CigL
hides weights at random. The parts themselves (losses, masks, averages) work in anyone's loop without it.
"""

from sparse_moon.reliability.abstention import DAC, MOON, Gamblers
from sparse_moon.reliability.cigl import CigL
from sparse_moon.reliability.costs import RunCost, cigl_overhead, moon_overhead
from sparse_moon.reliability.dropout import MCDropout, WeightDropout
from sparse_moon.reliability.frozen import freeze_hidden
from sparse_moon.reliability.generalized_odin import GeneralizedODIN
from sparse_moon.reliability.losses import VOS, LabelSmoothing, LogitNorm, Mixup
from sparse_moon.reliability.method import RELIABILITY, Plain, Reliability, ReliabilityRun
from sparse_moon.reliability.sup_tickets import SupTickets

__all__ = [
    "DAC",
    "MOON",
    "RELIABILITY",
    "VOS",
    "CigL",
    "Gamblers",
    "GeneralizedODIN",
    "LabelSmoothing",
    "LogitNorm",
    "MCDropout",
    "Mixup",
    "Plain",
    "Reliability",
    "ReliabilityRun",
    "RunCost",
    "SupTickets",
    "WeightDropout",
    "cigl_overhead",
    "freeze_hidden",
    "moon_overhead",
]
