"""The page a person looks at: one self-contained HTML file on a finished run."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_moon import files
from sparse_moon.app import plots, run_folder
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.ood_groups import GROUPS, ood_group
from sparse_moon.ood.metrics import CalibrationBins, calibration_bins

_METRICS = {  # key: heading, which class is positive, whether more is better
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
)
_REQUIRED = ("accuracy", "ece", "nll", "brier")
_LATER = {  # figures that older runs lack: name, note
    "classwise_ece": ("Classwise ECE", "mean over the classes of each one's calibration error"),
    "adaptive_ece": ("Adaptive ECE", "in 15 bins of as many images each"),
    "aurc": ("AURC", "mean share of wrong predictions among the n most confident, over all n"),
}
_CALIBRATION = ("temperature", "ece_before", "ece_after")
_TIMES, _NONE = "\u00d7", "\u2013"
_MEMORY = ("parameter", "gradient", "optimizer", "index")


@dataclass(frozen=True)
class _Run:
    """The inputs, checked."""

    config: dict[str, Any]
    history: dict[str, np.ndarray]  # by column; NaN where an epoch has no value
    identity: dict[str, float]
    calibration: dict[str, float] | None  # with a temperature from held-out images
    ood: dict[str, dict[str, dict[str, float]]]  # set, score, metric
    sparsity: float
    layers: dict[str, float]  # sparsity
    flops: dict[str, float]
    memory: dict[str, float]
    time_s: float
    environment: dict[str, str]  # empty for older runs
    left_out: dict[str, str]  # reasons, by score
    bins: CalibrationBins
    scores: dict[str, dict[str, np.ndarray]]  # set or "id", score


def write_report(run_dir: Path, *, score: str | None = None) -> Path:
    """Write ``report.html`` from a finished run's config.json, metrics.jsonl, results.json and scores.npz.

    The page needs nothing outside itself. It replaces an earlier one as a whole or not at all.

    Args:
        run_dir: the run's folder.
        score: the detection score whose histograms and ROC curves are drawn; by default the run's ``headline``, or the
            first that all OOD sets have where they lack it.

    Returns:
        The path of the page.

    Raises:
        ValueError: an input file that is missing, damaged or incomplete, by name; or an unknown score.
    """
    run = _read_run(run_dir)
    chosen = _choose(run, score)
    sections = [
        _header(run, chosen),
        _section("In distribution", _in_distribution(run)),
        _section("Out of distribution", _out_of_distribution(run, chosen)),
        _section("Training", _training(run.history)),
        _section("Network", _network(run)),
        _section("Settings", _settings(run.config)),
        *([_section("Made", _settings(run.environment))] if run.environment else []),
    ]
    title = escape(f"{run.config['model']} on {_dataset(run)} · sparse_moon")
    path = run_dir / run_folder.REPORT
    page = _PAGE.format(title=title, style=_STYLE, body="\n".join(sections))
    files.write_text(path, page, errors="backslashreplace")  # paths need not be text
    return path


def _read_run(folder: Path) -> _Run:
    config = _mapping(files.read_json(folder / run_folder.CONFIG), folder / run_folder.CONFIG)
    for key in ("dataset", "model", "method"):
        if not isinstance(config.get(key), str):
            raise ValueError(f"{folder / run_folder.CONFIG} has no text {key!r}")

    path = folder / run_folder.RESULTS
    results = _mapping(files.read_json(path), path)
    epochs = results.get("epochs")
    part = {key: _mapping(results.get(key), path, key) for key in ("id", "ood", "sparsity", "flops", "memory")}
    ood: dict[str, dict[str, dict[str, float]]] = {}
    for name, by_score in part["ood"].items():
        by_score = _mapping(by_score, path, f"ood/{name}")
        ood[name] = {score: _numbers(by_score[score], path, f"ood/{name}/{score}", _METRICS) for score in by_score}
    layers = _mapping(part["sparsity"].get("layers"), path, "sparsity/layers")
    memory_keys = [f"{name}_bytes" for name in _MEMORY] + [f"dense_{name}_bytes" for name in _MEMORY[:3]] + ["ratio"]

    calibration = _mapping(results.get("calibration") or {}, path, "calibration")
    arrays = _read_scores(folder / run_folder.SCORES)
    wanted = {name: list(by_score) for name, by_score in ood.items()}
    wanted["id"] = list(dict.fromkeys(score for by_score in ood.values() for score in by_score))
    for key in ["confidence", "correct", *(f"{name}/{score}" for name in wanted for score in wanted[name])]:
        if key not in arrays:
            raise ValueError(f"{folder / run_folder.SCORES} has no array {key!r}")
    try:
        bins = calibration_bins(torch.from_numpy(arrays["confidence"]), torch.from_numpy(arrays["correct"]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / run_folder.SCORES} is damaged: {error}") from None
    return _Run(
        config=config,
        history=_read_metrics(folder, epochs if isinstance(epochs, int) else None),
        identity=_numbers(part["id"], path, "id", _REQUIRED + tuple(set(_LATER) & part["id"].keys())),
        calibration=_numbers(calibration, path, "calibration", _CALIBRATION) if calibration else None,
        ood=ood,
        sparsity=_numbers(part["sparsity"], path, "sparsity", ("actual",))["actual"],
        layers=_numbers(layers, path, "sparsity/layers", layers),
        flops=_numbers(part["flops"], path, "flops", ("forward_dense", "forward_sparse", "train_ratio")),
        memory=_numbers(part["memory"], path, "memory", memory_keys),
        time_s=_numbers(results, path, "it", ("time_s",))["time_s"],
        environment=_texts(results.get("environment", {}), path, "environment"),
        left_out=_texts(results.get("left_out", {}), path, "left_out"),
        bins=bins,
        scores={name: {score: arrays[f"{name}/{score}"] for score in wanted[name]} for name in wanted},
    )


def _mapping(content: Any, path: Path, where: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: {where or 'it'} should be an object, got {repr(content)[:60]}")
    return content


def _texts(content: Any, path: Path, where: str) -> dict[str, str]:
    content = _mapping(content, path, where)
    return {key: str(value) for key, value in content.items()}


def _numbers(content: Any, path: Path, where: str, keys: Iterable[str]) -> dict[str, float]:
    """The values of these keys; null, which JSON has for a number that does not exist, is NaN."""
    content = _mapping(content, path, where)
    numbers = {}
    for key in keys:
        value = content.get(key, "nothing")
        if not isinstance(value, int | float | None):
            raise ValueError(f"{path} is damaged: {where}/{key} should be a number, got {repr(value)[:60]}")
        numbers[key] = math.nan if value is None else float(value)
    return numbers


def _read_metrics(folder: Path, epochs: int | None) -> dict[str, np.ndarray]:
    """Columns of ``metrics.jsonl``."""
    path = folder / run_folder.METRICS
    columns = ["epoch", *(column for _, series, _, _ in _CURVES for column in series.values())]
    rows = [
        _numbers(dict.fromkeys(columns) | row, path, f"line {number}", columns)
        for number, row in enumerate(run_folder.read_metrics(folder, epochs), 1)
    ]
    if any(math.isnan(row["epoch"]) for row in rows):
        raise ValueError(f"{path} has lines without an epoch")
    return {column: np.array([row[column] for row in rows]) for column in columns}


def _read_scores(path: Path) -> dict[str, np.ndarray]:
    """The arrays of ``scores.npz``: one-dimensional, not empty, without NaN; ``correct`` bool, the others floating."""
    arrays = run_folder.read_scores(path.parent)
    for name, array in arrays.items():
        if array.ndim != 1 or not len(array) or array.dtype.kind != ("b" if name == "correct" else "f"):
            raise ValueError(f"{path} is damaged: {name!r} has shape {array.shape} and type {array.dtype}")
        if np.isnan(array).any():
            raise ValueError(f"{path} is damaged: {name!r} holds NaN")
    return arrays


def _choose(run: _Run, score: str | None) -> str | None:
    """The score to lead with, of those that every set has: the one asked for, or the settings'; None if there is none.

    It is not the best on these test sets, which would be chosen by what it is to be judged by.
    """
    ood = run.ood
    common = [name for name in next(iter(ood.values()), {}) if all(name in by_score for by_score in ood.values())]
    if score is not None and score not in common:
        raise ValueError(f"unknown score {score!r}, expected one of {common}")
    headline = run.config.get("headline", TrainConfig.headline)
    return score or (headline if headline in common else next(iter(common), None))


def _grouped(run: _Run) -> dict[str, list[str]]:
    """Names of the OOD sets by group, without empty groups."""
    of = {name: ood_group(run.config["dataset"], name) for name in run.ood}
    return {group: [name for name in of if of[name] == group] for group in GROUPS if group in of.values()}


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _means(columns: Iterable[list[float]]) -> list[float]:
    return [_mean(row) for row in zip(*columns, strict=True)]


def _dataset(run: _Run) -> str:
    return Path(run.config["dataset"]).name  # it may be a path


def _header(run: _Run, chosen: str | None) -> str:
    config = run.config
    shown = ["method", "reliability", *(["allocation", "pattern"] if run.sparsity else []), "epochs", "seed"]
    tags = [f"{key} {config[key]}" for key in shown if config.get(key) is not None]
    tiles = [
        ("Accuracy", _percent(run.identity["accuracy"]), "ID test images"),
        ("ECE", _decimal(run.identity["ece"]), "calibration error, 15 bins"),
    ]
    if chosen is not None:
        for group, names in _grouped(run).items():
            mean = _mean(run.ood[name][chosen]["auroc"] for name in names)
            sets = names[0] if len(names) == 1 else f"mean of {len(names)} sets"
            tiles.append((f"AUROC {group}", _percent(mean), f"score {chosen}, {sets}"))
    if run.sparsity:
        tiles += [
            ("Sparsity", _percent(run.sparsity), f"{_percent(1 - run.sparsity)} of weights exist"),
            ("Training FLOPs", f"{run.flops['train_ratio']:.3f} {_TIMES}", "of dense training"),
            ("Training memory", f"{run.memory['ratio']:.3f} {_TIMES}", "of dense, for sparse layers"),
        ]
    tiles.append(("Training time", _duration(run.time_s), f"on {config['device']}" if "device" in config else ""))
    return (
        f'<header><p class="eyebrow">sparse_moon</p><h1>{escape(config["model"])} on {escape(_dataset(run))}</h1>'
        f'<p class="tags">{"".join(f"<span>{escape(tag)}</span>" for tag in tags)}</p>'
        f'<div class="tiles">{"".join(_tile(*tile) for tile in tiles)}</div></header>'
    )


def _tile(label: str, value: str, note: str) -> str:
    lines = f"<span>{escape(label)}</span><strong>{escape(value)}</strong><small>{escape(note)}</small>"
    return f'<div class="tile">{lines}</div>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def _in_distribution(run: _Run) -> str:
    values = run.identity
    rows = [
        ("Accuracy", _percent(values["accuracy"]), "share of images classified right"),
        ("ECE", _decimal(values["ece"]), "mean gap between confidence and accuracy, 15 bins of equal width"),
        ("NLL", _decimal(values["nll"]), "negative log-likelihood of the right class, in nats"),
        ("Brier score", _decimal(values["brier"]), "squared error of the probabilities, 0 to 2"),
        *((name, _decimal(values[key]), note) for key, (name, note) in _LATER.items() if key in values),
    ]
    if run.calibration is not None:
        note = f"fitted on held-out images: ECE {_decimal(run.calibration['ece_after'])} in place of "
        note += _decimal(run.calibration["ece_before"])
        rows.append(("Temperature", f"{run.calibration['temperature']:.3f}", note))
    body = "".join(
        f'<tr><th scope="row">{name}</th><td class="strong">{value}</td><td class="note">{note}</td></tr>'
        for name, value, note in rows
    )
    count = int(run.bins.count.sum())
    ece = _decimal(run.bins.expected_calibration_error)
    table = f'<div class="scroll"><table class="facts">{body}</table></div>'
    facts = f'<div class="card"><h3>{count:,} test images</h3>{table}</div>'
    return (
        f'<div class="grid plots">{facts}'
        + _figure("Reliability diagram", f"15 bins, ECE {ece}", plots.reliability_diagram(run.bins))
        + _figure("Confidence", "of right and wrong predictions", plots.confidence_histogram(run.bins))
        + "</div>"
    )


def _out_of_distribution(run: _Run, chosen: str | None) -> str:
    if not run.ood:
        return '<p class="card">This run was evaluated on no out-of-distribution set.</p>'
    content = (
        "<p>A higher score means in-distribution (ID). All values in %; the best of each column is in <b>bold</b>. "
        f'AUPR depends on the sizes of the two sets.</p><div class="grid wide">{_ood_tables(run)}</div>'
    )
    for name, reason in run.left_out.items():
        content += f'<p class="card">The score {escape(name)} was left out: {escape(reason)}.</p>'
    if chosen is None:  # the sets have no score in common
        return content
    ids = run.scores["id"][chosen]
    sets = {name: by_score[chosen] for name, by_score in run.scores.items() if name != "id"}
    # from three on, two histograms, one above the other, stand beside the ROC curves
    tall, roc_height, height = ("tall", 390, 170) if len(sets) > 2 else ("", 300, 300)
    pictures = [_figure("ROC curves", "ID positive", plots.roc_curves(ids, sets, chosen, height=roc_height), tall)]
    for i, (name, scores) in enumerate(sets.items()):
        note = f"{len(scores):,} images, AUROC {_percent(run.ood[name][chosen]['auroc'])}"
        svg = plots.score_histogram(ids, scores, name, chosen, number=i, height=height)
        pictures.append(_figure(name, note, svg))
    fixed = chosen == run.config.get("headline", TrainConfig.headline)
    reason = " <small>the run's headline, fixed before it was tested</small>" if fixed else ""
    content += f'<h3 class="sub">Score <code>{escape(chosen)}</code>{reason}</h3>'
    return content + f'<div class="grid plots">{"".join(pictures)}</div>'


def _ood_tables(run: _Run) -> str:
    """A table for each metric with a column for each set and for means; for one set a table of its metrics."""
    ood, grouped = run.ood, _grouped(run)
    scores = list(dict.fromkeys(score for by_score in ood.values() for score in by_score))

    def values(name: str, metric: str) -> list[float]:
        return [ood[name].get(score, {}).get(metric, math.nan) for score in scores]

    arrow = {metric: "↑" if more_is_better else "↓" for metric, (_, _, more_is_better) in _METRICS.items()}
    if len(ood) == 1:
        (name,) = ood
        columns = [(f"{_METRICS[m][0]} {arrow[m]}", values(name, m), _METRICS[m][2]) for m in _METRICS]
        meanings = "; ".join(f"{heading}: {meaning}" for heading, meaning, _ in _METRICS.values())
        return _matrix(escape(name), meanings, scores, columns)
    tables = ""
    for metric, (heading, meaning, more_is_better) in _METRICS.items():
        columns = []
        for group, names in grouped.items():
            columns += [(f"{name} ({group})", values(name, metric), more_is_better) for name in names]
            if 1 < len(names) < len(ood):
                columns.append((f"{group} mean", _means(values(name, metric) for name in names), more_is_better))
        columns.append(("mean", _means(values(name, metric) for name in ood), more_is_better))
        tables += _matrix(f"{heading} {arrow[metric]}", meaning, scores, columns)
    return tables


def _matrix(title: str, note: str, rows: list[str], columns: list[tuple[str, list[float], bool]]) -> str:
    """Rows by columns of shares; a column says whether more is better, and its best values are marked."""
    best = []
    for _, values, more_is_better in columns:
        best.append((max if more_is_better else min)(filter(math.isfinite, values), default=None))
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name, _, _ in columns)
    body = ""
    for i, row in enumerate(rows):
        cells = ""
        for (_, values, _), winner in zip(columns, best, strict=True):
            mark = ' class="best"' if values[i] == winner else ""
            cells += f"<td{mark}>{_percent(values[i], '')}</td>"
        body += f'<tr><th scope="row">{escape(row)}</th>{cells}</tr>'
    return _table_card(title, note, f"<th></th>{head}", body)


def _table_card(title: str, note: str, head: str, body: str, css: str = "") -> str:
    table = f'<table class="{css}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="card"><h3>{title} <small>{note}</small></h3><div class="scroll">{table}</div></div>'


def _training(history: Mapping[str, np.ndarray]) -> str:
    pictures = []
    for title, series, log, percent in _CURVES:
        present = {label: history[column] for label, column in series.items() if np.isfinite(history[column]).any()}
        if present and not (log and not any((values > 0).any() for values in present.values())):
            svg = plots.curve(history["epoch"].tolist(), present, title, log=log, percent=percent)
            pictures.append(_figure(title, "", svg))
    return f'<div class="grid plots">{"".join(pictures)}</div>'


def _network(run: _Run) -> str:
    dense, sparse, memory = run.flops["forward_dense"], run.flops["forward_sparse"], run.memory
    flops = [
        ("Forward pass", dense, sparse),
        ("Training", 3 * dense, 3 * dense * run.flops["train_ratio"]),
    ]
    labels = ("Weights", "Gradients", "Optimizer state", "Indices")
    sizes = [
        (label, memory.get(f"dense_{name}_bytes", 0.0), memory[f"{name}_bytes"])
        for label, name in zip(labels, _MEMORY, strict=True)
    ]
    sizes.append(("Total", sum(row[1] for row in sizes), sum(row[2] for row in sizes)))
    cards = _cost_table("FLOPs an image", "multiplications and additions counted apart", flops, "FLOPs")
    if sizes[-1][1]:
        cards += _cost_table("Memory of the sparse layers' weights", "at the end of training", sizes, "B")
    content = f'<div class="grid wide">{cards}</div>'
    if any(run.layers.values()):
        densities = {name: 1 - sparsity for name, sparsity in run.layers.items()}
        chart = plots.density_chart(densities, 1 - run.sparsity)
        content += _figure("Density of every layer", "share of weights that exist, in %", chart, "chart")
    else:
        content += '<p class="card">All layers are dense.</p>'
    return content


def _cost_table(title: str, note: str, rows: list[tuple[str, float, float]], unit: str) -> str:
    body = ""
    for label, dense, sparse in rows:
        ratio = sparse / dense if dense else math.nan
        bar = f'<div class="bar"><i style="width:{100 * min(ratio, 1):.1f}%"></i></div>' if dense else ""
        share = f"{ratio:.3f} {_TIMES}" if dense else ""
        body += (
            f'<tr><th scope="row">{label}</th><td>{_si(dense, unit) if dense else _NONE}</td>'
            f"<td>{_si(sparse, unit)}</td><td>{share}</td><td>{bar}</td></tr>"
        )
    head = '<th></th><th scope="col">dense</th><th scope="col">this run</th><th></th><th></th>'
    return _table_card(title, note, head, body, "costs")


def _settings(config: Mapping[str, Any]) -> str:
    items = ""
    for key, value in config.items():
        text = _NONE if value is None or value == [] else value if isinstance(value, str) else json.dumps(value)
        items += f"<div><dt>{escape(key)}</dt><dd>{escape(text)}</dd></div>"
    return f'<dl class="card settings">{items}</dl>'


def _figure(title: str, note: str, svg: str, css: str = "") -> str:
    small = f" <small>{escape(note)}</small>" if note else ""
    caption = f"<figcaption><h3>{escape(title)}{small}</h3></figcaption>"
    return f'<figure class="card {css}">{caption}<div class="scroll">{svg}</div></figure>'


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


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f4f5f7; --card: #ffffff; --ink: #1a1f27; --muted: #5c6675; --grid: #dfe3e8; --accent: #2459d3;
  --c0: #2563eb; --c1: #e8590c; --c2: #0b8a6a; --c3: #c2255c; --c4: #7048e8; --c5: #a07400; --c6: #0c8599;
  --c7: #6b7280;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0e1116; --card: #161b22; --ink: #e6eaf0; --muted: #98a3b3; --grid: #2b323c; --accent: #7cabff;
    --c0: #6ea8fe; --c1: #ff9a5c; --c2: #3ecfa4; --c3: #f783ac; --c4: #a992ff; --c5: #e0b040; --c6: #4cc9dd;
    --c7: #9aa4b2;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1160px; margin: 0 auto; padding: 40px 24px 64px; }
h1 {
  margin: 2px 0 10px; font-size: clamp(26px, 4vw, 36px); line-height: 1.2; letter-spacing: -.02em;
  overflow-wrap: anywhere;
}
h2 { margin: 48px 0 14px; font-size: 21px; letter-spacing: -.01em; }
h3 { margin: 0 0 10px; font-size: 15px; overflow-wrap: anywhere; }
h3.sub { margin: 24px 0 12px; }
small { color: var(--muted); font-size: 13px; font-weight: 400; }
code { font-size: .95em; }
.eyebrow { margin: 0; color: var(--accent); font-size: 13px; font-weight: 600; letter-spacing: .04em; }
.tags { display: flex; flex-wrap: wrap; gap: 6px; margin: 0 0 22px; }
.tags span {
  padding: 2px 11px; border: 1px solid var(--grid); border-radius: 99px; background: var(--card);
  font-size: 13px; color: var(--muted);
}
.card, .tile { background: var(--card); border: 1px solid var(--grid); border-radius: 12px; }
.card { margin: 0; padding: 18px 20px; min-width: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(142px, 1fr)); gap: 12px; }
.tile { padding: 14px 16px; display: flex; flex-direction: column; }
.tile span { color: var(--muted); font-size: 13px; }
.tile strong {
  font-size: 23px; line-height: 1.35; letter-spacing: -.02em; font-variant-numeric: tabular-nums;
  white-space: nowrap;
}
.tile small { font-size: 12px; line-height: 1.35; }
.grid { display: grid; gap: 16px; }
.wide { grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
.plots { grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); }
.tall { grid-row: span 2; }
figure svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit; font-variant-numeric: tabular-nums; }
figure + figure, .grid + .card { margin-top: 16px; }
.plots h3 small { display: block; }
.scroll { overflow-x: auto; }
.chart svg { min-width: 860px; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { font-weight: 400; text-align: left; }
td, thead th { text-align: right; }
th, td { padding: 6px 8px; white-space: nowrap; }
th:first-child { padding-left: 0; }
td:last-child, th:last-child { padding-right: 0; }
thead th { color: var(--muted); font-size: 13px; }
tbody tr { border-top: 1px solid var(--grid); }
td.best, td.strong { font-weight: 700; }
.facts td.note { text-align: left; color: var(--muted); font-size: 13px; white-space: normal; }
.costs td:last-child { width: 32%; min-width: 80px; }
.bar { height: 8px; border-radius: 4px; background: var(--grid); overflow: hidden; }
.bar i { display: block; height: 100%; border-radius: 4px; background: var(--c0); }
.settings { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 240px), 1fr)); gap: 4px 28px; }
.settings div {
  display: flex; justify-content: space-between; gap: 16px; padding: 4px 0;
  border-bottom: 1px solid var(--grid);
}
.settings dt { color: var(--muted); }
.settings dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
@media print { body { background: none; } .card, .tile { break-inside: avoid; } }
"""
