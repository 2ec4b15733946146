"""A comparison's table as Markdown."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sparse_moon.app.config import TrainConfig
from sparse_moon.app.experiment import REFERENCE, setting_text
from sparse_moon.app.ood_groups import GROUPS

_Table = Mapping[str, Any]


class _Column(NamedTuple):
    figure: str
    heading: str
    scale: float
    digits: int


def format_markdown(table: _Table) -> str:
    """The table as Markdown: :func:`format_summary`, then figures by axis, and AUROC and FPR95 by score.

    Args:
        table: what :func:`sparse_moon.app.comparison.write_table` returns.
    """
    return "\n".join([format_summary(table), *_by_axis(table), *_by_score(table)]).rstrip("\n") + "\n"


def format_summary(table: _Table) -> str:
    """What every run has with the headline score, what papers have in its place, and differences over the seeds."""
    rows, columns = table["rows"], _columns(table)
    lines = ["# Comparison", "", "Mean ± standard deviation over the seeds.", ""]
    lines += _markdown(["run", "seeds", *(column.heading for column in columns)], [
        [row["label"], str(row["runs"]), *(_cell(row, column) for column in columns)] for row in rows
    ])  # fmt: skip
    lines += [
        "",
        f"{_groups(table)} AUROC and FPR95 (ID positive) in %, means over the sets of a group.",
        f"The score of the first table, {_headline(table)}, is the settings' `headline`, not the best here.",
    ]
    lines += _other_sets(table)
    return "\n".join([*lines, "", *_published(table), *_paired(table)])


def _groups(table: _Table) -> str:
    """The OOD sets by group, for each data set where they differ."""
    texts = {
        dataset: "; ".join(f"{group}: {', '.join(groups.get(group, ())) or 'none'}" for group in GROUPS)
        for dataset, groups in table.get("groups", {"": table}).items()
    }
    if len({*texts.values()}) == 1:
        return f"OOD sets, {next(iter(texts.values()))}."
    return " ".join(f"OOD sets of {dataset}, {text}." for dataset, text in texts.items())


def _headline(table: _Table) -> str:
    return str(table.get("headline", TrainConfig.headline))


def _columns(table: _Table) -> list[_Column]:
    """Those of the first table that any row fills."""
    columns = [
        _Column("accuracy", "accuracy %", 100.0, 2), _Column("ece", "ECE", 1.0, 4),
        _Column("ece_scaled", "ECE after temperature", 1.0, 4), _Column("nll", "NLL", 1.0, 4),
        _Column("forward_flops", "forward FLOPs / dense", 1.0, 3),
        _Column("training_flops", "training FLOPs / dense", 1.0, 3),
        _Column("relative_epoch_time", f"time an epoch / {REFERENCE}", 1.0, 3),
        *(_score_column("auroc", group, _headline(table)) for group in GROUPS),
    ]  # fmt: skip
    return [column for column in columns if any(column.figure in row["figures"] for row in table["rows"])]


def _score_column(metric: str, group: str, score: str) -> _Column:
    return _Column(f"{metric}/{group}/{score}", f"{metric.upper()} % {group}, {score}", 100.0, 2)


def _other_sets(table: _Table) -> list[str]:
    """Which rows have means over other OOD sets, and which of their sets do not count."""
    named = {name for group in GROUPS for name in table.get(group, ())}
    found = [
        f"{row['label']}: {', '.join(row['ood']) or 'none'}"
        for row in table["rows"]
        if {*row.get("ood", named)} != named
    ]
    some = [f"{row['label']}: {', '.join(row['some_ood'])}" for row in table["rows"] if row.get("some_ood")]
    unlike = [f"{name}: {', '.join(places)}" for name, places in table.get("unlike_ood", {}).items()]
    lines = []
    for heading, rows in (
        ("These rows have other OOD sets, so their means are not comparable with the others':", found),
        ("Not all runs of these rows have these OOD sets, which do not count (`--evaluate --ood` adds them):", some),
        ("Runs have these OOD sets from different places, so they do not count:", unlike),
    ):
        lines += ["", heading, *(f"- {line}" for line in rows)] if rows else []
    return lines


def _published(table: _Table) -> list[str]:
    """What papers print, beside what was measured with these settings."""
    known = {column.figure: column for column in _columns(table)}
    lines, notes = [], []
    for row in table["rows"]:
        for one in row.get("published", ()):
            name = one["figure"]
            if name not in row["figures"]:
                continue
            column = known.get(name) or _score_column(*name.split("/", 2))
            number = f"{column.scale * one['value']:.{column.digits}f}"
            lines.append([row["label"], column.heading, number, _cell(row, column), one["source"],
                          "; ".join(one["other"]) or "none"])  # fmt: skip
            notes += [f"{one['source']}: {one['note']}."] if one["note"] else []
    if not lines:
        return []
    heads = ["run", "figure", "published", "measured", "source", "settings that differ from the paper's preset"]
    notes = list(dict.fromkeys(notes))
    return ["## Published beside measured", "", *_markdown(heads, lines), "", *notes, *([""] if notes else [])]


def _paired(table: _Table) -> list[str]:
    """Differences between rows over the seeds that they share."""
    pairs = table.get("paired", ())
    columns = [c for c in _columns(table) if any(c.figure in pair["figures"] for pair in pairs)]
    if not pairs:
        return []
    lines = [
        [pair["axis"], pair["label"], pair["other"], str(len(pair["seeds"])),
         *(_interval(pair["figures"].get(column.figure), column) for column in columns)]
        for pair in pairs
    ]  # fmt: skip
    lines.sort(key=lambda line: line[0])
    heads = ["differ in", "run", "minus", "seeds", *(column.heading for column in columns)]
    return [
        "## Paired differences", "",
        "Mean over the seeds that both have, with its 95 % confidence interval (Student's t). Bold ones exclude 0; of",
        "twenty differences that are 0 in truth, one is bold by chance.", "",
        *_markdown(heads, lines), "",
    ]  # fmt: skip


def _interval(figure: Mapping[str, float] | None, column: _Column) -> str:
    if figure is None or not math.isfinite(figure["mean"]):
        return ""
    mean, low, high = (f"{column.scale * figure[key]:+.{column.digits}f}" for key in ("mean", "low", "high"))
    text = f"{mean} [{low}, {high}]"
    return f"**{text}**" if figure["low"] > 0 or figure["high"] < 0 else text


def _by_axis(table: _Table) -> list[str]:
    """For each axis its values side by side, a table for each figure."""
    lines: list[str] = []
    for axis, values in table.get("axes", {}).items():
        groups: dict[str, dict[str, Any]] = {}
        for row in table["rows"]:
            if axis in row["settings"] and (row["sparse"] or axis != "sparsity"):
                others = {name: value for name, value in row["settings"].items() if name != axis}
                groups.setdefault(json.dumps(others, sort_keys=True), {})[setting_text(row["settings"][axis])] = row
        groups = {key: rows for key, rows in groups.items() if len(rows) > 1}
        heads = [setting_text(value) for value in values]
        for column in _columns(table) if groups else ():
            cells = [
                [_label_without(next(iter(rows.values())), axis),
                 *(_cell(rows[head], column) if head in rows else "" for head in heads)]
                for rows in groups.values()
            ]  # fmt: skip
            lines += [f"## {column.heading} by {axis}", "", *_markdown([axis, *heads], cells), ""]
    return lines


def _label_without(row: Mapping[str, Any], axis: str) -> str:
    """A row's label without its word for this axis."""
    value = row["settings"][axis]
    word = f"{value:g}" if axis == "sparsity" else f"{axis}={setting_text(value)}"
    return f"{row['label']} ".replace(f" {word} ", " ", 1).rstrip()


def _by_score(table: _Table) -> list[str]:
    rows, lines = table["rows"], []
    scores = dict.fromkeys(name.split("/", 2)[2] for row in rows for name in row["figures"] if name.startswith("auroc"))
    for kind in GROUPS:
        for metric, heading in (("auroc", "AUROC"), ("fpr95", "FPR95")):
            columns = [_score_column(metric, kind, score) for score in scores]
            if any(column.figure in row["figures"] for row in rows for column in columns):
                lines += [f"## {heading}, {kind} OOD", ""]
                lines += _markdown(["run", *scores], [
                    [row["label"], *(_cell(row, column) for column in columns)] for row in rows
                ])  # fmt: skip
                lines.append("")
    return lines


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _cell(row: Mapping[str, Any], column: _Column) -> str:
    value = row["figures"].get(column.figure)
    if value is None or not math.isfinite(value["mean"]):
        return ""
    spread = "" if value["std"] is None else f" ± {column.scale * value['std']:.{column.digits}f}"
    return f"{column.scale * value['mean']:.{column.digits}f}{spread}"
