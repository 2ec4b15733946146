"""Pictures of a run's topology for its report: what is left of it in the end, and how it moved."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparse_moon.app import plots
from sparse_moon.app.run_record import RunRecord


class TopologyPicture(NamedTuple):
    """A picture with its title and what it shows."""

    title: str
    note: str
    svg: str
    wide: bool


def topology_pictures(run: RunRecord) -> list[TopologyPicture]:
    """Those of what the run has recorded: none of a dense one, fewer of older ones."""
    return [*_at_the_end(run.results["sparsity"]), *_movement(run.history)]


def _at_the_end(sparsity: Mapping[str, Any]) -> Iterator[TopologyPicture]:
    if any(sparsity["layers"].values()):
        densities = {name: 1 - share for name, share in sparsity["layers"].items()}
        svg = plots.density_chart(densities, 1 - sparsity["actual"])
        yield TopologyPicture("Density of every layer", "share of weights that exist, in %", svg, True)
    if fan_ins := sparsity.get("fan_in"):
        live = sparsity.get("live_outputs", {})
        dead = {name: 1.0 - live.get(name, 1.0) for name in fan_ins}
        note = "inputs of an output, as a share of all: least, middle 80 %, median and most; below: outputs without any"
        yield TopologyPicture("Fan-in of the channels", note, plots.fan_in_chart(fan_ins, dead), True)


def _movement(history: Sequence[Mapping[str, Any]]) -> Iterator[TopologyPicture]:
    """Of the epochs that say what moved, ``moved`` in ``metrics.jsonl``."""
    moved = [row.get("moved") or {} for row in history]
    if not any(counts[0] or counts[1] for layers in moved for counts in layers.values()):
        return
    epochs = [row["epoch"] for row in history]
    sums = np.array([np.sum([[0.0] * 4, *layers.values()], axis=0) for layers in moved])
    went, came, of_start, present = sums.T
    exchange = {"dropped": _share(went, present - came + went), "grown": _share(came, present)}
    svg = plots.curve(epochs, exchange, "Weights that moved", percent=True)
    yield TopologyPicture("Weights that moved", "in an epoch", svg, False)
    svg = plots.curve(epochs, {"overlap": _share(of_start, present)}, "Overlap with the first topology", percent=True)
    yield TopologyPicture("Overlap with the first topology", "weights there that were there at the start", svg, False)
    names = list(moved[-1])
    grown = {name: sum(layers[name][1] for layers in moved if name in layers) for name in names}
    ends = {name: moved[-1][name] for name in names}
    bars = {
        "grown, all epochs": {name: _ratio(grown[name], ends[name][3]) for name in names},
        "overlap in the end": {name: _ratio(ends[name][2], ends[name][3]) for name in names},
    }
    note = "grown weights, over those there; weights there that were there at the start"
    yield TopologyPicture("What moved in every layer", note, plots.layer_bars(bars, "What moved in every layer"), True)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(part), math.nan), where=whole > 0)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
