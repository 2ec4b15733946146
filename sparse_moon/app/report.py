"""The page a person looks at: one self-contained HTML file on a finished run.

What is said on it is put together here, how it is marked up is in ``report.html.jinja``, how it looks in
``report.css``.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import Environment, StrictUndefined

from sparse_moon import files
from sparse_moon.app import plots, run_folder
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.ood_groups import GROUPS, ood_group
from sparse_moon.app.run_record import MEMORY, METRICS, RunRecord
from sparse_moon.app.tables import kernel_rows, kernels_line
from sparse_moon.app.topology_pictures import topology_pictures
from sparse_moon.ood.metrics import calibration_bins

_METRICS = {  # heading, which class is positive, whether more is better
    "auroc": ("AUROC", "the same with ID or OOD positive", True),
    "fpr95": ("FPR95", "ID positive: share of OOD kept where 95% of ID is kept", False),
    "aupr_in": ("AUPR-in", "ID positive", True),
    "aupr_out": ("AUPR-out", "OOD positive", True),
}
_CURVES = (  # title, {label: column}, logarithmic, in percent
    ("Training loss", {"loss": "loss"}, False, False),
    ("Accuracy", {"training": "train_accuracy", "test": "test_accuracy"}, False, True),
    ("Learning rate", {"lr": "lr"}, False, False),
    ("Weight w of the unknown-aware loss", {"w": "w"}, False, False),
    ("Mean unknown probability u", {"mean_u": "mean_u"}, True, False),
    ("Confidence", {"ID": "id_confidence", "hard ID": "hard_confidence", "OOD": "ood_confidence"}, False, True),
    ("Confidence minus accuracy", {"hard ID": "hard_gap", "size, all tenths": "local_gap"}, False, True),
    ("Variance of logits on ID", {"whole head": "dice_variance_id", "DICE": "dice_variance_id_sparse"}, True, False),
    ("Variance of logits on OOD", {"whole head": "dice_variance_ood", "DICE": "dice_variance_ood_sparse"}, True, False),
    ("Weights that have existed", {"explored": "exploration_rate"}, False, True),
    ("Correlation of random mask and weights", {"Z and W": "mask_correlation"}, False, False),
)
_LATER = {  # figures that older runs lack: name, note
    "classwise_ece": ("Classwise ECE", "mean over the classes of each one's calibration error"),
    "adaptive_ece": ("Adaptive ECE", "in bins of as many images each"),
    "ece_all_outputs": ("ECE over K + 1", "with the output for the unknown among the predictions, where it is wrong"),
    "aurc": ("AURC", "mean share of wrong predictions among the n most confident, over all n"),
}
_MEMORY = {"parameter": "Weights", "gradient": "Gradients", "optimizer": "Optimizer state", "index": "Indices"}
_TIMES, _NONE = "\u00d7", "\u2013"


class _Fact(NamedTuple):
    """A figure with its name and what it means."""

    label: str
    value: str
    note: str


class _Picture(NamedTuple):
    title: str
    note: str
    svg: str
    css: str = ""


class _Cell(NamedTuple):
    text: str
    best: bool


class _Row(NamedTuple):
    label: str
    cells: list[_Cell]


class _Table(NamedTuple):
    title: str
    note: str
    columns: list[str]
    rows: list[_Row]


class _Column(NamedTuple):
    """A column of shares, one a score."""

    name: str
    values: list[float]
    more_is_better: bool


class _Cost(NamedTuple):
    """What the dense network and the run's take; of both the ratio, in figures and as the width of a bar."""

    label: str
    dense: str
    sparse: str
    ratio: str
    bar: str


class _CostTable(NamedTuple):
    title: str
    note: str
    rows: list[_Cost]


def write_report(folder: Path, run: RunRecord, *, score: str | None = None) -> Path:
    """Write ``report.html``, which needs nothing outside itself. It replaces an earlier one as a whole or not at all.

    Args:
        folder: where the page is written.
        run: what the run left behind, from memory, or as :func:`sparse_moon.app.run_record.read_record` reads it.
        score: the detection score whose histograms and ROC curves are drawn; by default the run's ``headline``, or the
            first that all OOD sets have where they lack it.

    Returns:
        The path of the page.

    Raises:
        ValueError: an unknown score.
    """
    chosen = _choose(run, score)
    here = resources.files(__package__)
    jinja = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    page = jinja.from_string((here / "report.html.jinja").read_text(encoding="utf-8")).render(
        style=(here / "report.css").read_text(encoding="utf-8"),
        name=f"{run.config['model']} on {Path(run.config['dataset']).name}",  # it may be a path
        tags=_tags(run),
        tiles=_tiles(run, chosen),
        id=_in_distribution(run),
        ood=_out_of_distribution(run, chosen),
        training=_training(run),
        network=_network(run),
        config={key: _setting(value) for key, value in run.config.items()},
        environment=run.results.get("environment", {}),
    )
    path = folder / run_folder.REPORT
    files.write_text(path, page.lstrip(), errors="backslashreplace")  # paths need not be text
    return path


def _choose(run: RunRecord, score: str | None) -> str | None:
    """The score to lead with, of those that every set has: the one asked for, or the settings'; None if there is none.

    It is not the best on these test sets, which would be chosen by what it is to be judged by.
    """
    ood = run.results["ood"]
    common = [name for name in next(iter(ood.values()), {}) if all(name in by_score for by_score in ood.values())]
    if score is not None and score not in common:
        raise ValueError(f"unknown score {score!r}, expected one of {common}")
    return score or (_headline(run) if _headline(run) in common else next(iter(common), None))


def _headline(run: RunRecord) -> str:
    return str(run.config.get("headline", TrainConfig.headline))


def _bins(run: RunRecord) -> int:
    return int(run.config.get("ece_bins", TrainConfig.ece_bins))


def _grouped(run: RunRecord) -> dict[str, list[str]]:
    """Names of the OOD sets by group, without empty groups."""
    of = {name: ood_group(run.config["dataset"], name) for name in run.results["ood"]}
    return {group: [name for name in of if of[name] == group] for group in GROUPS if group in of.values()}


def _tags(run: RunRecord) -> list[str]:
    sparse = ("allocation", "pattern") if run.results["sparsity"]["actual"] else ()
    shown = ("method", "reliability", *sparse, "epochs", "seed")
    return [f"{key} {run.config[key]}" for key in shown if run.config.get(key) is not None]


def _tiles(run: RunRecord, chosen: str | None) -> list[_Fact]:
    results, sparsity = run.results, run.results["sparsity"]["actual"]
    tiles = [
        _Fact("Accuracy", _percent(results["id"]["accuracy"]), "ID test images"),
        _Fact("ECE", _decimal(results["id"]["ece"]), f"calibration error, {_bins(run)} bins"),
    ]
    if chosen is not None:
        for group, names in _grouped(run).items():
            mean = fmean(results["ood"][name][chosen]["auroc"] for name in names)
            sets = names[0] if len(names) == 1 else f"mean of {len(names)} sets"
            tiles.append(_Fact(f"AUROC {group}", _percent(mean), f"score {chosen}, {sets}"))
    if sparsity:
        tiles += [
            _Fact("Sparsity", _percent(sparsity), f"{_percent(1 - sparsity)} of weights exist"),
            _Fact("Training FLOPs", f"{results['flops']['train_ratio']:.3f} {_TIMES}", "of dense training"),
            _Fact("Training memory", f"{results['memory']['ratio']:.3f} {_TIMES}", "of dense, for sparse layers"),
        ]
    device = f"on {run.config['device']}" if "device" in run.config else ""
    return [*tiles, _Fact("Training time", _duration(results["time_s"]), device), *_steps(results.get("steps", {}))]


def _steps(steps: Mapping[str, Any]) -> list[_Fact]:
    """Times of training steps, which older runs lack."""
    facts = []
    if math.isfinite(steps.get("median_ms", math.nan)):
        facts.append(_Fact("Training step", f"{steps['median_ms']:.2f} ms", "median, without loading data"))
    if dense := steps.get("beside_dense"):
        note = f"dense {dense['dense_ms']:.2f} ms ({dense['dense_layout']}), sparse {dense['sparse_ms']:.2f} ms in turn"
        facts.append(_Fact("Over dense", f"{dense['dense_ms'] / dense['sparse_ms']:.2f} {_TIMES}", note))
    return facts


def _in_distribution(run: RunRecord) -> dict[str, Any]:
    values, calibration = run.results["id"], run.results.get("calibration")
    facts = [
        _Fact("Accuracy", _percent(values["accuracy"]), "share of images classified right"),
        _Fact("ECE", _decimal(values["ece"]), f"mean gap between confidence and accuracy, {_bins(run)} equal bins"),
        _Fact("NLL", _decimal(values["nll"]), "negative log-likelihood of the right class, in nats"),
        _Fact("Brier score", _decimal(values["brier"]), "squared error of the probabilities, 0 to 2"),
        *(_Fact(name, _decimal(values[key]), note) for key, (name, note) in _LATER.items() if key in values),
    ]
    if calibration:
        before, after = (_decimal(calibration[key]) for key in ("ece_before", "ece_after"))
        note = f"fitted on held-out images: ECE {after} in place of {before}"
        facts.append(_Fact("Temperature", f"{calibration['temperature']:.3f}", note))
    confidence, correct = (torch.from_numpy(run.scores[name]) for name in ("confidence", "correct"))
    bins = calibration_bins(confidence, correct, _bins(run))
    ece = _decimal(bins.expected_calibration_error)
    pictures = [
        _Picture("Reliability diagram", f"{_bins(run)} bins, ECE {ece}", plots.reliability_diagram(bins)),
        _Picture("Confidence", "of right and wrong predictions", plots.confidence_histogram(bins)),
    ]
    return {"title": f"{int(bins.count.sum()):,} test images", "facts": facts, "pictures": pictures}


def _out_of_distribution(run: RunRecord, chosen: str | None) -> dict[str, Any]:
    return {
        "tables": _ood_tables(run) if run.results["ood"] else [],
        "left_out": run.results.get("left_out", {}),
        "score": chosen,  # None where the sets have none in common
        "is_headline": chosen == _headline(run),
        "pictures": [] if chosen is None else _score_pictures(run, chosen),
    }


def _score_pictures(run: RunRecord, score: str) -> list[_Picture]:
    ood = run.results["ood"]
    ids = run.scores[f"id/{score}"]
    sets = {name: run.scores[f"{name}/{score}"] for name in ood}
    # from three on, two histograms, one above the other, stand beside the ROC curves
    tall, roc_height, height = ("tall", 390, 170) if len(sets) > 2 else ("", 300, 300)
    roc = plots.roc_curves(ids, sets, score, height=roc_height)
    pictures = [_Picture("ROC curves", "ID positive", roc, tall)]
    for i, (name, scores) in enumerate(sets.items()):
        note = f"{len(scores):,} images, AUROC {_percent(ood[name][score]['auroc'])}"
        svg = plots.score_histogram(ids, scores, name, score, number=i, height=height)
        pictures.append(_Picture(name, note, svg))
    return pictures


def _ood_tables(run: RunRecord) -> list[_Table]:
    """A table for each metric with a column for each set and for means; for one set a table of its metrics."""
    ood, grouped = run.results["ood"], _grouped(run)
    scores = list(dict.fromkeys(score for by_score in ood.values() for score in by_score))

    def column(title: str, names: Iterable[str], metric: str) -> _Column:
        """Means over sets."""
        sets = [[ood[name].get(score, {}).get(metric, math.nan) for score in scores] for name in names]
        return _Column(title, [fmean(values) for values in zip(*sets, strict=True)], _METRICS[metric][2])

    headings = {metric: f"{_METRICS[metric][0]} {'↑' if _METRICS[metric][2] else '↓'}" for metric in METRICS}
    if len(ood) == 1:
        (name,) = ood
        meanings = "; ".join(f"{_METRICS[metric][0]}: {_METRICS[metric][1]}" for metric in METRICS)
        return [_table(name, meanings, scores, [column(headings[metric], [name], metric) for metric in METRICS])]
    tables = []
    for metric in METRICS:
        columns = []
        for group, names in grouped.items():
            columns += [column(f"{name} ({group})", [name], metric) for name in names]
            if 1 < len(names) < len(ood):
                columns.append(column(f"{group} mean", names, metric))
        columns.append(column("mean", ood, metric))
        tables.append(_table(headings[metric], _METRICS[metric][1], scores, columns))
    return tables


def _table(title: str, note: str, scores: Sequence[str], columns: Sequence[_Column]) -> _Table:
    """Scores by columns; the best values of each column are marked."""
    best = [
        (max if column.more_is_better else min)(filter(math.isfinite, column.values), default=None)
        for column in columns
    ]
    rows = [
        _Row(score, [
            _Cell(_percent(column.values[i], ""), column.values[i] == winner)
            for column, winner in zip(columns, best, strict=True)
        ])
        for i, score in enumerate(scores)
    ]  # fmt: skip
    return _Table(title, note, [column.name for column in columns], rows)


def _training(run: RunRecord) -> list[_Picture]:
    def column(name: str) -> np.ndarray:
        return np.array([row.get(name, math.nan) for row in run.history], dtype=np.float64)

    pictures = []
    for title, series, log, percent in _CURVES:
        present = {label: column(name) for label, name in series.items() if np.isfinite(column(name)).any()}
        if present and not (log and not any((values > 0).any() for values in present.values())):
            svg = plots.curve(column("epoch").tolist(), present, title, log=log, percent=percent)
            pictures.append(_Picture(title, "", svg))
    return pictures


def _network(run: RunRecord) -> dict[str, Any]:
    flops, memory = run.results["flops"], run.results["memory"]
    dense = flops["forward_dense"]
    costs = [_CostTable("FLOPs an image", "multiplications and additions counted apart", [
        _cost("Forward pass", dense, flops["forward_sparse"], "FLOPs"),
        _cost("Training", 3 * dense, 3 * dense * flops["train_ratio"], "FLOPs"),
    ])]  # fmt: skip
    sizes = [(memory.get(f"dense_{name}_bytes", 0.0), memory[f"{name}_bytes"]) for name in MEMORY]
    total = sum(dense for dense, _ in sizes), sum(sparse for _, sparse in sizes)
    if total[0]:
        labels = (*(_MEMORY[name] for name in MEMORY), "Total")
        rows = [_cost(label, *both, "B") for label, both in zip(labels, [*sizes, total], strict=True)]
        costs.append(_CostTable("Memory of the sparse layers' weights", "at the end of training", rows))
    found = topology_pictures(run)
    pictures = [_Picture(one.title, one.note, one.svg, "chart" if one.wide else "") for one in found]
    kernels = run.results.get("steps", {}).get("kernels")
    table = None
    if kernels:
        columns, *ran = kernel_rows(run.results)
        cells = [_Row(name, [_Cell(text, False) for text in others]) for name, *others in ran]
        table = _Table("What ran", kernels_line(kernels), list(columns[1:]), cells)
    wide = [picture for picture in pictures if picture.css]
    return {"costs": costs, "topology": wide, "moved": [p for p in pictures if not p.css], "kernels": table}


def _cost(label: str, dense: float, sparse: float, unit: str) -> _Cost:
    if not dense:
        return _Cost(label, _NONE, _si(sparse, unit), "", "")
    ratio = sparse / dense
    return _Cost(label, _si(dense, unit), _si(sparse, unit), f"{ratio:.3f} {_TIMES}", f"{100 * min(ratio, 1):.1f}%")


def _setting(value: Any) -> str:
    if value is None or value in ([], ()):
        return _NONE
    return value if isinstance(value, str) else json.dumps(value)


def _percent(value: float, sign: str = "%") -> str:
    return f"{100 * value:.2f}{sign}" if math.isfinite(value) else _NONE


def _decimal(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else _NONE


def _si(value: float, unit: str) -> str:
    for exponent, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**exponent:
            return f"{value / 10**exponent:.2f} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
