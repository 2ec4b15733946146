"""The figures of a run's report, as inline SVG that takes its colours and fonts from the page, and of a comparison.

Every function but :func:`comparison` returns one ``<svg>`` element. Colours are drawn as stand-ins and replaced by the
page's CSS variables, so one figure is right in a light and in a dark page.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from io import StringIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from sparse_moon.ood.metrics import CalibrationBins

_NAMED = 64  # so many layers have room for their names
_SERIES = 8  # CSS variables --c0 ... --c7; --c0 is the in-distribution colour
_INK, _MUTED, _GRID = "#010203", "#010204", "#010205"
_COLOURS = [f"#0102{16 + i:02x}" for i in range(_SERIES)]
_VARIABLES = {_INK: "ink", _MUTED: "muted", _GRID: "grid", **{c: f"c{i}" for i, c in enumerate(_COLOURS)}}

_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: selectable, searchable, in the page's font
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.size": 10.5,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": False,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "lines.linewidth": 2.0,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
}


@matplotlib.rc_context(_STYLE)
def curve(
    epochs: Sequence[float], series: Mapping[str, np.ndarray], title: str, *, log: bool = False, percent: bool = False
) -> str:
    """Lines over the epochs, NaN where there is no value; with a legend if there are several."""
    figure, axes = _axes(340, 210)
    for i, (label, values) in enumerate(series.items()):
        shown = np.where(values > 0, values, np.nan) if log else values
        marker = "o" if len(epochs) <= 20 else None
        axes.plot(epochs, shown, label=label, color=_COLOURS[i], marker=marker, markersize=4)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    if log:
        _log_scale(axes)
    elif percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if len(series) > 1:
        _legend_above(axes)
    return _svg(figure, title)


@matplotlib.rc_context(_STYLE)
def reliability_diagram(bins: CalibrationBins) -> str:
    """Accuracy over confidence, bin by bin."""
    left, width, filled = _filled(bins)
    accuracy, confidence = bins.accuracy.numpy()[filled], bins.confidence.numpy()[filled]
    figure, axes = _axes(340, 300)
    axes.bar(left, accuracy, width, align="edge", color=_COLOURS[0], alpha=0.75, linewidth=0, label="accuracy")
    axes.bar(left, confidence - accuracy, width, bottom=accuracy, align="edge", facecolor="none",
             edgecolor=_COLOURS[1], hatch="////", linewidth=1, label="gap to confidence")  # fmt: skip
    axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    _legend_above(axes)
    return _svg(figure, "Reliability diagram")


@matplotlib.rc_context(_STYLE)
def confidence_histogram(bins: CalibrationBins) -> str:
    """How many images each confidence bin holds, right and wrong ones."""
    left, width, filled = _filled(bins)
    count = bins.count.numpy()[filled]
    right = count * bins.accuracy.numpy()[filled]
    figure, axes = _axes(340, 300)
    axes.bar(left, right, width, align="edge", color=_COLOURS[0], alpha=0.75, linewidth=0, label="right")
    axes.bar(left, count - right, width, bottom=right, align="edge", color=_COLOURS[1], alpha=0.85, linewidth=0,
             label="wrong")  # fmt: skip
    axes.set(xlim=(0, 1), xlabel="confidence", ylabel="images")
    _legend_above(axes)
    return _svg(figure, "Histogram of confidence")


def _filled(bins: CalibrationBins) -> tuple[np.ndarray, float, np.ndarray]:
    """Left edges of the bins that hold images, the width of a bin, and which bins these are."""
    filled = bins.count.numpy() > 0
    return bins.edges.numpy()[:-1][filled], 1.0 / len(filled), filled


def _legend_above(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2, handlelength=1.2,
                columnspacing=1.2)  # fmt: skip


@matplotlib.rc_context(_STYLE)
def score_histogram(
    id_scores: np.ndarray, ood_scores: np.ndarray, name: str, score: str, *, number: int, height: int
) -> str:
    """Distributions of a score on ID and on one OOD set; the set's ``number`` gives it its colour.

    ``unknown`` is 1 - u with a u that is mostly tiny: drawn is the logarithm of u.
    """
    label_x = score
    if score == "unknown":
        id_scores, ood_scores = (np.log10((1 - s).clip(np.finfo(np.float64).eps)) for s in (id_scores, ood_scores))
        label_x = "log₁₀ u"
    pooled = np.concatenate([id_scores, ood_scores])
    low, high = np.quantile(pooled[np.isfinite(pooled)], [0.002, 0.998]) if np.isfinite(pooled).any() else (0.0, 1.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    bins = np.linspace(low, high, 51)
    figure, axes = _axes(340, height)
    highest = 0.0
    for scores, label, colour in ((id_scores, "ID", _COLOURS[0]), (ood_scores, name, _set_colour(number))):
        counts, _ = np.histogram(scores.clip(low, high), bins)  # what lies outside goes into the outermost bins
        share = counts / counts.sum()
        highest = max(highest, share.max())
        axes.stairs(share, bins, fill=True, color=colour, alpha=0.3)
        axes.stairs(share, bins, color=colour, linewidth=1.5, label=_in_legend(_short(label)))
    axes.set(xlim=(low, high), xlabel=label_x, ylabel="share of images")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.ticklabel_format(axis="x", useOffset=False)
    if highest > 0.4:  # all in one place, as probabilities often are: the rest would not be seen
        _log_scale(axes)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _legend_above(axes)
    return _svg(figure, f"Histogram of {score} on ID and {name}")


@matplotlib.rc_context(_STYLE)
def roc_curves(id_scores: np.ndarray, ood_scores: Mapping[str, np.ndarray], score: str, *, height: int) -> str:
    """ROC of one score, ID positive, a curve for each OOD set."""
    from sklearn.metrics import roc_curve  # here, so that torch's OpenMP library is loaded before sklearn's

    figure, axes = _axes(340, height)
    axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.axhline(0.95, color=_MUTED, linewidth=0.8)
    axes.annotate("95% of ID kept", (0.99, 0.945), ha="right", va="top", color=_MUTED, fontsize=9)
    for i, (name, scores) in enumerate(ood_scores.items()):
        is_id = np.repeat([True, False], [len(id_scores), len(scores)])
        # ranks, because infinite scores are allowed
        rank = np.unique(np.concatenate([id_scores, scores]), return_inverse=True)[1]
        false, true, _ = roc_curve(is_id, rank)
        axes.plot(false, true, color=_set_colour(i), label=_in_legend(_short(name)))
    axes.set(xlim=(0, 1), ylim=(0, 1.005), xlabel="share of OOD kept", ylabel="share of ID kept")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(loc="lower right")
    return _svg(figure, f"ROC curves of {score}")


@matplotlib.rc_context(_STYLE | {"axes.grid.axis": "y"})
def density_chart(densities: Mapping[str, float], overall: float) -> str:
    """Density of every layer as a bar, in the network's order."""
    names, values = list(densities), np.array(list(densities.values()))
    labelled = len(names) <= _NAMED
    top = max(1.08 * values.max(), 1e-6)
    figure, axes = _axes(1040, 300 if labelled else 220)
    axes.bar(range(len(names)), values, 0.78, color=_COLOURS[0], alpha=0.8, linewidth=0)
    label = f"whole network {overall:.2%}"
    axes.axhline(overall, color=_COLOURS[1], linewidth=1.3, linestyle=(0, (4, 3)), label=label)
    if labelled:
        for i, value in enumerate(values):
            text = f"{100 * value:.0f}" if value >= 0.0995 else f"{100 * value:.1f}"
            crossed = value < overall < value + 0.09 * top
            place = (i, overall if crossed else value)
            axes.annotate(text, place, (0, 2), textcoords="offset points", ha="center", fontsize=8, color=_MUTED)
    axes.set(ylim=(0, top), ylabel="density")
    _layers_below(axes, names)
    axes.legend(loc="upper right", bbox_to_anchor=(1, 1.12))
    return _svg(figure, "Density of every layer")


@matplotlib.rc_context(_STYLE | {"axes.grid.axis": "y"})
def fan_in_chart(fan_ins: Mapping[str, Sequence[float]], dead: Mapping[str, float]) -> str:
    """How many inputs the channels of every layer have, as a share of all: a range a layer, and the share without any.

    Args:
        fan_ins: by layer the least, the first tenth, the median, the ninth tenth and the most.
        dead: by layer the share of its outputs that have no input.
    """
    figure, axes = _axes(1040, 300 if len(fan_ins) <= _NAMED else 220)
    places = np.arange(len(fan_ins))
    least, low, middle, high, most = np.array(list(fan_ins.values()), dtype=np.float64).reshape(-1, 5).T
    axes.vlines(places, least, most, color=_COLOURS[0], linewidth=1.2, label="all")
    axes.vlines(places, low, high, color=_COLOURS[0], linewidth=6, alpha=0.55, label="middle 80 %")
    axes.plot(places, middle, linestyle="", marker="o", markersize=4, color=_INK, label="median")
    for place, name in zip(places, fan_ins, strict=True):
        if dead[name] > 0:
            axes.annotate(f"{100 * dead[name]:.2g}%", (place, 0), (0, -3), textcoords="offset points", ha="center",
                          va="top", fontsize=8, color=_COLOURS[1])  # fmt: skip
    axes.set(ylim=(-0.08 * max(most.max(), 1e-6), 1.08 * max(most.max(), 1e-6)), ylabel="fan-in")
    _layers_below(axes, list(fan_ins))
    _legend_above(axes)
    return _svg(figure, "Fan-in of the channels")


@matplotlib.rc_context(_STYLE | {"axes.grid.axis": "y"})
def layer_bars(series: Mapping[str, Mapping[str, float]], title: str) -> str:
    """Shares of every layer, side by side: by label and by layer, all of the same layers."""
    names = list(next(iter(series.values())))
    figure, axes = _axes(1040, 300 if len(names) <= _NAMED else 220)
    width = 0.78 / len(series)
    for i, (label, values) in enumerate(series.items()):
        places = np.arange(len(names)) + (i - (len(series) - 1) / 2) * width
        axes.bar(places, [values[name] for name in names], width, color=_COLOURS[i], alpha=0.8, linewidth=0,
                 label=label)  # fmt: skip
    axes.set(ylabel="share")
    _layers_below(axes, names)
    _legend_above(axes)
    return _svg(figure, title)


def _layers_below(axes: Axes, names: Sequence[str]) -> None:
    """Layers along the x axis, shares of something along the y axis."""
    if len(names) <= _NAMED:
        axes.set_xticks(range(len(names)), [_short(name) for name in names], rotation=90, fontsize=8.5)
    else:
        axes.set_xlabel("layer, in the network's order")
    axes.tick_params(axis="x", length=0)
    axes.set(xlim=(-0.7, len(names) - 0.3))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


@matplotlib.rc_context({"text.parse_math": _STYLE["text.parse_math"]})
def comparison(rows: Sequence[Mapping[str, Any]], scores: Sequence[str]) -> Figure:
    """Accuracy, ECE and near and far AUROC of ``scores``: over the sparsity where there are several, or a line a row.

    Args:
        rows: of ``table.json``, see :func:`sparse_moon.app.comparison.write_table`.
    """
    columns = [[("accuracy", "accuracy"), ("ece", "ECE")]]
    for score in scores:
        panels = [(f"auroc/{kind}/{score}", f"AUROC {score}, {kind} OOD") for kind in ("near", "far")]
        columns.append([panel for panel in panels if any(panel[0] in row["figures"] for row in rows)])
    sparsities = sorted({row["settings"]["sparsity"] for row in rows if row["sparse"]})
    several = len(sparsities) > 1
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        words = row["label"].split(" ")
        if several and row["sparse"]:
            del words[2]  # the sparsity
        lines.setdefault(_in_legend(" ".join(words)), []).append(row)
    height = 6.4 + 0.2 * len(lines) / 4 if several else 2 * (1.2 + 0.25 * len(lines))
    figure = Figure(figsize=(4.2 * len(columns), height), layout="constrained")
    grid = figure.subplots(2, len(columns), squeeze=False, sharey=False if several else "row")
    for column, panels in zip(grid.T, columns, strict=True):
        for axes, (name, title) in zip(column, panels, strict=False):
            for i, (label, line) in enumerate(lines.items()):
                shown = [row for row in line if name in row["figures"]]
                means = [row["figures"][name]["mean"] for row in shown]
                spreads = [row["figures"][name]["std"] or 0.0 for row in shown]
                style: dict[str, Any] = {"color": matplotlib.colormaps["tab20"](i % 20), "marker": "o", "markersize": 4}
                if not several:
                    axes.errorbar(means, [i] * len(means), xerr=spreads, linestyle="", capsize=3, **style)
                elif not line[0]["sparse"]:
                    axes.axhline(means[0] if means else np.nan, label=label, color=style["color"], linestyle="--")
                else:
                    x = [sparsities.index(row["settings"]["sparsity"]) for row in shown]
                    axes.errorbar(x, means, spreads, label=label, capsize=3, **style)
            axes.set_title(title, fontsize=10)
            axes.grid(axis="both" if several else "x", linewidth=0.4, alpha=0.6)
            axes.ticklabel_format(axis="y" if several else "x", useOffset=False)
            if several:
                axes.set_xticks(range(len(sparsities)), [f"{sparsity:g}" for sparsity in sparsities])
                axes.set_xlabel("sparsity")
        for axes in column[len(panels) :]:
            axes.set_axis_off()
    if several:
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    else:
        for axes in grid[:, 0]:
            axes.set_yticks(range(len(lines)), list(lines), fontsize=8)
            axes.invert_yaxis()
    return figure


def _axes(width: int, height: int) -> tuple[Figure, Axes]:
    """One set of axes in a figure of this size in CSS pixels. Not pyplot's: nothing is kept after it is drawn."""
    figure = Figure(figsize=(width / 72, height / 72))
    return figure, figure.subplots()


def _log_scale(axes: Axes) -> None:
    """Logarithmic y axis with labels in plain text: matplotlib's are mark-up that only its own text engine reads."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    narrow = high < 30 * low  # may hold no power of ten
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,), numticks=6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _power(y)))


def _power(value: float) -> str:
    """``2·10⁻⁴`` for 0.0002."""
    mantissa, exponent = f"{value:.0e}".split("e")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if mantissa == "1" else f"{mantissa}·{power}"


def _set_colour(number: int) -> str:
    return _COLOURS[1 + number % (_SERIES - 1)]


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:12]}…{name[-15:]}"


def _in_legend(label: str) -> str:
    """As a legend has it: of one that begins with ``_`` matplotlib makes no entry, so it begins with no width."""
    return f"\u200b{label}" if label.startswith("_") else label


def _svg(figure: Figure, title: str) -> str:
    """The figure as an element for an HTML page: no outer declarations, no fixed size, no ids shared with another."""
    file = StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": title}), warnings.catch_warnings():
        # the page's fonts draw the text, and they know more scripts than matplotlib's
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        # half of the time of savefig with a constrained layout, which draws all of it twice more
        figure.tight_layout(pad=0.3)
        FigureCanvasSVG(figure).print_svg(file, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    text = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    text = re.sub("|".join(_VARIABLES), lambda match: f"var(--{_VARIABLES[match[0]]})", text)
    return text
