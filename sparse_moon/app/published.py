"""What papers print for the settings of a row, from published.yaml."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from sparse_moon.app.experiment import NAMED, OPTIONS, experiment

# Settings that a row must share with the paper; the others are named where they differ.
_SAME = {"dataset", "model", "pattern", "allocation", "exclude", *NAMED, *OPTIONS}


@dataclass(frozen=True)
class _Entry:
    source: str
    note: str | None
    preset: str
    settings: Mapping[str, Any]  # of the experiment, but those that the paper does not state
    ood: Collection[str] | None  # names of the preset's OOD sets
    figures: Mapping[str, float]


def published_figures(settings: Mapping[str, Any], ood: Collection[str]) -> list[dict[str, Any]]:
    """What papers have in the place of a row.

    Args:
        settings: the row's :func:`sparse_moon.app.experiment.experiment`.
        ood: names of its OOD sets.

    Returns:
        For each number ``figure``, as ``table.json`` names it, ``value``, ``source`` (paper and table), ``preset``,
        ``other``, the texts of what is different in the row's settings from the paper's, and ``note``, text or None.
    """
    found = []
    for entry in _entries():
        differing = [name for name, value in entry.settings.items() if settings.get(name, value) != value]
        if _SAME & {*differing, *(entry.settings.keys() - settings.keys())}:
            continue
        other = [f"{name} {settings[name]} (paper {entry.settings[name]})" for name in differing]
        if entry.ood is not None and {*entry.ood} != {*ood}:
            other.append("other OOD sets")
        found += [
            {"figure": name, "value": value, "source": entry.source, "preset": entry.preset, "other": other,
             "note": entry.note}
            for name, value in entry.figures.items()
        ]  # fmt: skip
    return found


@cache
def _entries() -> Sequence[_Entry]:
    text = (files("sparse_moon.app") / "published.yaml").read_text(encoding="utf-8")
    return [_entry(group, **row) for group in yaml.safe_load(text) for row in group["rows"]]


def _entry(
    group: Mapping[str, Any], changes: Mapping[str, Any], figures: Mapping[str, float], note: str | None = None
) -> _Entry:
    preset, table = group["preset"], group["table"]
    content = yaml.safe_load((files("sparse_moon.app.presets") / f"{preset}.yaml").read_text(encoding="utf-8"))
    settings = experiment({**content, **changes})
    ood = content.get("ood")
    return _Entry(
        source=group["paper"] if table is None else f"{group['paper']}, Table {table}",
        note=note or group.get("note"),
        preset=preset,
        settings={name: value for name, value in settings.items() if name not in group.get("any", ())},
        ood=None if ood is None else {spec.partition("=")[0] for spec in ood},
        figures=figures,
    )
