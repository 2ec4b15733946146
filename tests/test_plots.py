import re
from io import StringIO

import matplotlib
import numpy as np
import pytest

from sparse_moon.app import plots


def test_curve_breaks_where_values_are_missing() -> None:
    svg = plots.curve([1, 2, 3, 4, 5], {"loss": np.array([1.0, 2.0, np.nan, 3.0, 1.0])}, "Loss")
    line = next(d for d in re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--c0\); stroke-width: 2', svg))
    assert line.count("M") == 2 and line.count("L") == 2


def test_density_bars_are_as_high_as_the_densities() -> None:
    svg = plots.density_chart({"a": 1.0, "b": 0.25, "c": 0.5}, 0.4)
    heights = []
    for d in re.findall(r'<path d="([^"]*)"[^>]*fill: var\(--c0\)', svg):
        ys = [float(y) for y in re.findall(r"[ML] [-\d.]+ ([-\d.]+)", d)]
        heights.append(max(ys) - min(ys))
    assert len(heights) == 3
    assert np.array(heights) / heights[0] == pytest.approx([1.0, 0.25, 0.5], abs=1e-3)


def test_density_chart_of_many_layers_leaves_out_names() -> None:
    svg = plots.density_chart({f"layer{i}": 0.1 for i in range(200)}, 0.1)
    assert "layer199" not in svg and "in the network" in svg


def test_long_names_are_shortened_in_figures() -> None:
    name = "a" * 100 + "end"
    svg = plots.density_chart({name: 0.5}, 0.5)
    assert name not in svg and "aaaend" in svg


@pytest.mark.parametrize(
    ("low", "high", "label"), [(2.1e-5, 8e-5, "5·10⁻⁵"), (1e-7, 1e-2, "10⁻⁵"), (3e-4, 3e-4, "10⁻⁴")]
)
def test_logarithmic_axes_have_labels(low: float, high: float, label: str) -> None:
    svg = plots.curve([1, 2], {"u": np.array([low, high])}, "u", log=True)
    assert any(text.endswith(label) for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg))


def test_tiny_unknown_probabilities_are_drawn_by_their_logarithm() -> None:
    """Matplotlib wrote 1e-5 + 9.9999e-1."""
    rng = np.random.default_rng(0)
    svg = plots.score_histogram(1 - 10 ** rng.uniform(-9, -6, 99), 1 - 10 ** rng.uniform(-7, -5, 99), "x", "unknown",
                                  number=0, height=300)  # fmt: skip
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert "log₁₀ u" in texts and "\u22128" in texts
    svg = plots.score_histogram(rng.uniform(0.99995, 0.99999, 99), rng.uniform(0.99994, 0.99999, 99), "x", "msp",
                                  number=0, height=300)  # fmt: skip
    assert not any("e" in text and "+" in text for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg))


def test_names_that_begin_with_an_underscore_are_in_legends() -> None:
    scores = np.random.default_rng(0).normal(size=(3, 50))
    drawn = [
        plots.roc_curves(scores[0], {"_x": scores[1], "y": scores[2]}, "msp", height=300),
        plots.roc_curves(scores[0], {"_x": scores[1]}, "msp", height=300),
        plots.score_histogram(scores[0], scores[1], "_x", "msp", number=0, height=300),
    ]
    for svg in drawn:
        assert "_x" in [text.lstrip("\u200b") for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]
    rows = [
        {"label": f"_own.Method none {sparsity}", "sparse": True, "settings": {"sparsity": sparsity},
         "figures": {"accuracy": {"mean": 0.5, "std": None}}}
        for sparsity in (0.8, 0.9)
    ]  # fmt: skip
    (legend,) = plots.comparison(rows, ["msp"]).legends
    assert [text.get_text().lstrip("\u200b") for text in legend.get_texts()] == ["_own.Method none"]


@pytest.mark.parametrize("sparsities", [(0.9,), (0.8, 0.9)])
def test_names_with_dollar_signs_are_no_mathematics(sparsities: tuple[float, ...]) -> None:
    figures = {name: {"mean": 0.5, "std": None} for name in ("accuracy", "ece")}
    rows = [
        {"label": rf"rigl none {sparsity} dataset=/d/$a_{{$b", "settings": {"sparsity": sparsity}, "sparse": True,
         "figures": figures}
        for sparsity in sparsities
    ]  # fmt: skip
    file = StringIO()
    plots.comparison(rows, ["msp"]).savefig(file, format="svg")
    assert "dataset=/d/$a_{$b" in file.getvalue()


@pytest.mark.filterwarnings("error")
def test_a_user_s_layout_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matplotlib.rcParams, "figure.constrained_layout.use", True)
    assert plots.curve([1, 2], {"a": np.array([1.0, 2.0])}, "t")
