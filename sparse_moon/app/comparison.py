"""The finished runs of a folder as a table: a row an experiment, over its seeds, and differences between rows."""

import json
import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from sparse_moon import files
from sparse_moon.app import plots, run_folder
from sparse_moon.app.comparison_text import format_markdown
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.experiment import NAMED, REFERENCE, experiment, row_label, run_key, varying_settings
from sparse_moon.app.finished_runs import finished_runs, kept_specs
from sparse_moon.app.ood_groups import by_group
from sparse_moon.app.ood_sets import same_source
from sparse_moon.app.published import published_figures
from sparse_moon.ood import score_name

TABLE, MARKDOWN, PLOT = "table.json", "table.md", "plot.png"
_CONFIDENCE = 0.95
_RELIABILITY = ("reliability", "without")  # one axis


@dataclass(frozen=True)
class _Run:
    config: TrainConfig
    settings: dict[str, Any]  # those that make runs different experiments
    results: dict[str, Any]
    specs: dict[str, str]  # by name where its OOD sets came from, as far as that is known
    epoch_s: float


@dataclass(frozen=True)
class _Row:
    """The runs of an experiment, by seed."""

    runs: dict[int, _Run]

    @property
    def first(self) -> _Run:
        return next(iter(self.runs.values()))

    @property
    def settings(self) -> dict[str, Any]:
        return self.first.settings

    @property
    def epoch_s(self) -> float:
        return statistics.mean(run.epoch_s for run in self.runs.values())

    @property
    def is_reference(self) -> bool:
        return f"{self.first.config.method} {self.first.config.label}" == REFERENCE


def write_table(
    folder: Path, relative_times: Mapping[str, float] | None = None, *, headline: str | None = None
) -> dict[str, Any]:
    """Write table.json, table.md and plot.png of all finished runs in ``folder``.

    Runs that differ in nothing but the seed make a row.

    Args:
        relative_times: time over that of RigL alone by label of the row (``rigl moon:-tuning 0.95``), in place of what
            the runs took themselves, which depends on what else their machine did.
        headline: the score of the first table, which runs must have; default that of the first run's settings.

    Returns:
        What ``table.json`` holds: ``near``, ``far`` and ``ungrouped``, the names of the first row's OOD sets by group;
        ``groups``, the same by data set of the first row that has it; ``headline``, the score of the first table;
        ``axes``, the settings besides method and reliability in which rows differ, with their values in order;
        ``rows``, each with ``label``, ``sparse`` (whether its networks are), ``settings``, ``runs``, ``ood`` (names of
        the sets that all its runs have, which alone count), ``some_ood`` (those that only some have), ``figures``
        ``{name: {"mean", "std"}}`` and ``published``, see :func:`sparse_moon.app.published.published_figures`;
        ``paired``, each with the ``axis`` that two rows differ on, ``label`` minus ``other``, their common ``seeds``
        and ``figures`` ``{name: {"mean", "low", "high"}}``, the latter the ends of the 95 % confidence interval;
        ``unlike_ood``, OOD sets of one name that runs have from different places, which do not count, with those
        places. std is that of a sample, None for a single run. Shares are in [0, 1].

    Raises:
        ValueError: no finished run, one that is there twice, or whose results are incomplete; a headline that none has.
    """
    runs = list(_read_runs(folder))
    unlike = _take_out_unlike(runs)
    members = _rows(runs)
    varying = varying_settings(row.settings for row in members)
    axes = _axes(members, varying)
    members.sort(key=lambda row: _order(row, axes))
    headline = _known_headline(headline, members) or members[0].first.config.headline
    rows = [_table_row(row, members, varying, relative_times) for row in members]
    groups: dict[str, dict[str, list[str]]] = {}
    for member, row in zip(members, rows, strict=True):
        dataset = member.first.config.dataset
        groups.setdefault(dataset, by_group(dataset, row["ood"]))
    table: dict[str, Any] = {
        **next(iter(groups.values())), "groups": groups, "headline": headline, "axes": axes, "rows": rows,
        "paired": list(_paired(members, varying)), "unlike_ood": unlike,
    }  # fmt: skip
    files.write_json(folder / TABLE, table)
    files.write_text(folder / MARKDOWN, format_markdown(table))
    with files.replacing(folder / PLOT) as temporary:
        plots.comparison(rows, [headline]).savefig(temporary, dpi=150)
    return table


def _known_headline(headline: str | None, rows: Sequence[_Row]) -> str | None:
    """What results call this score; raise ``ValueError`` where no run has it."""
    scores = {
        score: None for row in rows for run in row.runs.values() for s in run.results["ood"].values() for score in s
    }
    if headline is None:
        return None
    if (name := score_name(headline)) not in scores:
        raise ValueError(f"headline must be a score that some of the runs have, {list(scores)}, got {headline!r}")
    return name


def _read_runs(folder: Path) -> Iterator[_Run]:
    seen: dict[str, Path] = {}
    for path in finished_runs(folder):
        config = TrainConfig.of_run(files.read_json(path / run_folder.CONFIG))
        key = run_key(config.to_dict())
        if key in seen:
            raise ValueError(f"{seen[key]} and {path} hold the same run: remove one of them")
        seen[key] = path
        results = files.read_json(path / run_folder.RESULTS)
        try:
            epochs = [row["time_s"] for row in run_folder.read_metrics(path, results.get("epochs"))]
            epoch_s = statistics.median(epochs) if epochs else math.nan  # with --epochs 0 there are none
            settings = config.to_dict()
            run = _Run(config, experiment(settings), results, kept_specs(settings, results), epoch_s)
            _figures(run, _scored(run))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the results in {path} are incomplete: {error!r}") from None
        yield run


def _take_out_unlike(runs: Iterable[_Run]) -> dict[str, list[str]]:
    """Take OOD sets of one name that come from different places out of all results; returns these places by name."""
    places: dict[str, list[str]] = {}
    for run in runs:
        for name in run.results["ood"].keys() & run.specs.keys():
            found = places.setdefault(name, [])
            if not any(same_source(run.specs[name], place) for place in found):
                found.append(run.specs[name])
    unlike = {name: found for name, found in sorted(places.items()) if len(found) > 1}
    for run in runs:
        run.results["ood"] = {name: scores for name, scores in run.results["ood"].items() if name not in unlike}
    return unlike


def _rows(runs: Iterable[_Run]) -> list[_Row]:
    groups: dict[str, _Row] = {}
    for run in runs:
        key = json.dumps(run.settings, sort_keys=True, default=str)
        groups.setdefault(key, _Row({})).runs[run.config.seed] = run
    return list(groups.values())


def _axes(rows: Iterable[_Row], varying: Sequence[str]) -> dict[str, list[Any]]:
    """Sparsity and the settings in ``varying``, each with its values in order; sparsity only where there are two."""
    found: dict[str, list[Any]] = {}
    for name in ("sparsity", *varying):
        values: list[Any] = []
        for row in rows:
            if name in row.settings and row.settings[name] not in values:
                values.append(row.settings[name])
        if len(values) > 1:
            found[name] = sorted(values, key=_value_order)
    return found


def _value_order(value: Any) -> tuple[bool, bool, Any]:
    number = isinstance(value, int | float)
    return value is not None, not number, value if number else str(value)


def _order(row: _Row, axes: Mapping[str, Sequence[Any]]) -> list[Any]:
    config = row.first.config
    places = [values.index(row.settings[name]) if name in row.settings else -1 for name, values in axes.items()]
    sparsity = config.sparsity if config.method_class.sparse else 0.0
    return [sparsity, config.method, row_label(config), *places]


def _table_row(
    row: _Row, members: Iterable[_Row], varying: Sequence[str], relative_times: Mapping[str, float] | None
) -> dict[str, Any]:
    config, settings, runs = row.first.config, row.settings, row.runs.values()
    found = [_figures(run, _common(runs)) for run in runs]
    figures = {
        name: _mean_and_std([one[name] for one in found]) for name in found[0] if all(name in one for one in found)
    }
    sets = dict.fromkeys(name for run in runs for name in run.results["ood"])
    shared = [name for name in sets if all(name in run.results["ood"] for run in runs)]
    label = row_label(config, varying)
    kin = (other for other in members if other.is_reference and not _differing(row, other) - {"method", "reliability"})
    if relative_times is not None:
        if label in relative_times:
            figures["relative_epoch_time"] = {"mean": relative_times[label], "std": None}
    elif (reference := next(kin, None)) and config.epochs:
        figures["relative_epoch_time"] = _mean_and_std([run.epoch_s / reference.epoch_s for run in runs])
    shown = {name: settings[name] for name in (*NAMED, *varying) if name in settings}
    return {
        "label": label, "sparse": config.method_class.sparse, "settings": {"sparsity": config.sparsity, **shown},
        "runs": len(runs), "epoch_s": row.epoch_s, "ood": shared,
        "some_ood": [name for name in sets if name not in shared], "figures": figures,
        "published": published_figures(settings, shared),
    }  # fmt: skip


def _differing(one: _Row, other: _Row) -> set[str]:
    """Axes on which two rows differ; a setting that one of them does not have is none."""
    common = one.settings.keys() & other.settings.keys()
    found = {name for name in common if one.settings[name] != other.settings[name]}
    return {"reliability" if name in _RELIABILITY else name for name in found}


def _paired(rows: Sequence[_Row], varying: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Differences between rows that differ on one axis, over the seeds that both have, where there are two.

    On each axis a row is compared with its base: the reference's value, or the lowest, of which there are several for
    a row that another axis does not concern, such as a dense one with all sparsities. One without some parts of a
    reliability method is compared with the whole, too.
    """
    for row in rows:
        bases: dict[str, list[_Row]] = {}
        for other in rows:
            axis, seeds = _differing(row, other), row.runs.keys() & other.runs.keys()
            if len(axis) != 1 or len(seeds) < 2:
                continue
            (name,) = axis
            before = bases.get(name, [row])
            if _rank(other, name) < _rank(before[0], name):
                bases[name] = [other]
            elif name in bases and _rank(other, name) == _rank(before[0], name):
                before.append(other)
            if name == "reliability" and not other.settings["without"] and _same_method(row, other):
                yield _pair(name, row, other, varying)
        for name, base in ((name, base) for name, found in bases.items() for base in found):
            if not (name == "reliability" and not base.settings["without"] and _same_method(row, base)):
                yield _pair(name, row, base, varying)


def _same_method(row: _Row, other: _Row) -> bool:
    return bool(row.settings["reliability"] == other.settings["reliability"])


def _rank(row: _Row, axis: str) -> tuple[bool, Any]:
    """Its place on this axis: first the reference's value, then the others in their order."""
    value = row.first.config.label if axis == "reliability" else row.settings[axis]
    return value not in REFERENCE.split(), _value_order(value)


def _pair(axis: str, row: _Row, base: _Row, varying: Sequence[str]) -> dict[str, Any]:
    seeds = sorted(row.runs.keys() & base.runs.keys())
    pairs = [(row.runs[seed], base.runs[seed]) for seed in seeds]
    common = _common(run for pair in pairs for run in pair)
    found = [(_figures(mine, common), _figures(theirs, common)) for mine, theirs in pairs]
    figures = {
        name: _interval([mine[name] - theirs[name] for mine, theirs in found])
        for name in found[0][0]
        if not name.endswith("_flops") and all(name in one for pair in found for one in pair)
    }
    label, other = (row_label(one.first.config, varying) for one in (row, base))
    return {"axis": axis, "label": label, "other": other, "seeds": seeds, "figures": figures}


def _interval(differences: Sequence[float]) -> dict[str, float]:
    """Mean with the ends of its confidence interval by Student's t distribution."""
    mean, count = statistics.mean(differences), len(differences)
    reach = float(stdtrit(count - 1, 0.5 + _CONFIDENCE / 2)) * statistics.stdev(differences) / math.sqrt(count)
    return {"mean": mean, "low": mean - reach, "high": mean + reach}


def _scored(run: _Run) -> set[tuple[str, str]]:
    """Its OOD sets, each with the scores that were computed for it."""
    return {(name, score) for name, by_score in run.results["ood"].items() for score in by_score}


def _common(runs: Iterable[_Run]) -> set[tuple[str, str]]:
    """What all of these runs have of :func:`_scored`."""
    return set.intersection(*map(_scored, runs))


def _figures(run: _Run, counted: Collection[tuple[str, str]]) -> dict[str, float]:
    """A run's figures by name; AUROC and FPR95 as means over the OOD sets of each group, of those in ``counted``."""
    results, groups = run.results, by_group(run.config.dataset, run.results["ood"])
    found = {key: results["id"][key] for key in ("accuracy", "ece", "nll")}
    if "calibration" in results:
        found["ece_scaled"] = results["calibration"]["ece_after"]
    counts = results["flops"]
    found["forward_flops"] = counts.get("passes", 1) * counts["forward_sparse"] / counts["forward_dense"]
    found["training_flops"] = counts["train_ratio"]
    scores = dict.fromkeys(score for by_score in results["ood"].values() for score in by_score)
    for score in scores:
        for kind, names in groups.items():
            sets = [results["ood"][name][score] for name in names if (name, score) in counted]
            for metric in ("auroc", "fpr95") if sets else ():
                found[f"{metric}/{kind}/{score}"] = statistics.mean(metrics[metric] for metrics in sets)
    return found


def _mean_and_std(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None}
