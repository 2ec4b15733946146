import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch

from sparse_moon.app.report import write_report
from sparse_moon.app.run_record import read_record
from sparse_moon.ood.metrics import calibration_bins, ood_metrics

TIMES, NONE = "\u00d7", "\u2013"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags are balanced; collects attributes, ids, and table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.bold: set[str] = set()
        self.text = ""
        self._best = False
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._best = ("class", "best") in attrs

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
            if self._best:
                self.bold.add(data)

    def row(self, *first: str) -> list[str]:
        """The only row that starts with these cells."""
        (found,) = [row for row in self.rows if tuple(row[: len(first)]) == first]
        return found

    def values(self, name: str) -> list[str]:
        return [value or "" for key, value in self.attributes if key == name]


def write_run(folder: Path, **changes: Any) -> Path:
    """A run's folder with made-up but consistent content."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    config = {
        "dataset": "mnist", "model": "small-resnet", "method": "rigl", "reliability": "moon", "sparsity": 0.9,
        "allocation": "erk", "pattern": "unstructured", "epochs": 3, "batch_size": 128, "lr": 0.12, "seed": 7,
        "ood": None, "exclude": ["fc", "conv*"], "amp": "none", "device": "cpu",
    }  # fmt: skip
    metrics = [
        {"epoch": e, "loss": 2.0 / e, "train_accuracy": 0.3 * e, "test_accuracy": 0.29 * e, "lr": 0.12 / e,
         "w": 0.1 * (e - 1), "mean_u": 10.0**-e, "density": 0.1, "time_s": 1.5}
        for e in (1, 2, 3)
    ]  # fmt: skip
    scores = changes.pop("scores", ("msp", "knn"))
    sets = changes.pop("sets", {"kmnist": (50, 1.0), "fashion": (70, 2.0)})
    confidence = rng.uniform(0.1, 1.0, 200)
    arrays = {"confidence": confidence, "correct": rng.random(200) < confidence}
    ood: dict[str, dict[str, dict[str, float]]] = {}
    for k, score in enumerate(scores):
        arrays[f"id/{score}"] = rng.normal(0, 1, 200)
        for name, (count, shift) in sets.items():
            arrays[f"{name}/{score}"] = rng.normal(-shift * (k + 1), 1, count)
            pair = torch.from_numpy(arrays[f"id/{score}"]), torch.from_numpy(arrays[f"{name}/{score}"])
            ood.setdefault(name, {})[score] = ood_metrics(*pair)
    results = {
        "id": {"accuracy": 0.8765, "ece": 0.0321, "nll": 0.4567, "brier": 0.1234},
        "ood": ood,
        "sparsity": {"target": 0.9, "actual": 0.9012, "layers": {"conv1": 0.0, "conv2": 0.95, "fc": 0.4}},
        "flops": {"forward_dense": 2.0e9, "forward_sparse": 5.0e8, "train_ratio": 0.3},
        "memory": {
            "parameter_bytes": 1000, "gradient_bytes": 1000, "optimizer_bytes": 1000, "index_bytes": 3000,
            "dense_parameter_bytes": 10_000, "dense_gradient_bytes": 10_000, "dense_optimizer_bytes": 10_000,
            "ratio": 0.2,
        },
        "time_s": 4000.0,
    }  # fmt: skip
    content = {"config": config, "metrics": metrics, "results": results, "arrays": arrays, **changes}
    (folder / "config.json").write_text(json.dumps(content["config"]))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content["metrics"]))
    (folder / "results.json").write_text(json.dumps(content["results"]))
    np.savez(folder / "scores.npz", **content["arrays"])
    return folder


STEPS = {
    "median_ms": 12.345,
    "kernels": {
        "conv2": {"forward": "kernel", "grads": "kernel"},
        "fc": {"forward": "dense", "input_grad": "dense", "values_grad": "kernel"},
    },
    "beside_dense": {"dense_ms": 30.0, "sparse_ms": 12.0, "dense_layout": "channels_last"},
}


def change(folder: Path, file: str, edit: Any) -> None:
    content = json.loads((folder / file).read_text())
    edit(content)
    (folder / file).write_text(json.dumps(content))


def arrays_of(folder: Path) -> dict[str, Any]:
    with np.load(folder / "scores.npz") as file:
        return dict(file)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def report_of(folder: Path, **arguments: Any) -> Path:
    return write_report(folder, read_record(folder), **arguments)


def page_of(folder: Path, **arguments: Any) -> Page:
    return Page(report_of(folder, **arguments).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its report, not to be changed."""
    folder = write_run(tmp_path_factory.mktemp("report") / "run")
    assert report_of(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def text(reported: Path) -> str:
    return (reported / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_needs_nothing_outside_itself(page: Page, text: str) -> None:
    assert not page.values("src")
    links = page.values("href") + page.values("xlink:href")
    assert links and all(link.startswith("#") for link in links)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_ids_are_unique_and_references_resolve(page: Page, text: str) -> None:
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#([^)]*)\)", text)
    assert {*used, *(link[1:] for link in page.values("xlink:href"))} <= set(ids)


def test_tables_hold_the_results(page: Page) -> None:
    assert page.row("Accuracy")[1] == "87.65%"
    assert page.row("ECE")[1] == "0.0321"
    assert page.row("NLL")[1] == "0.4567"
    assert page.row("Brier score")[1] == "0.1234"
    assert page.row("Forward pass")[1:4] == ["2.00 GFLOPs", "500.00 MFLOPs", f"0.250 {TIMES}"]
    assert page.row("Training")[1:4] == ["6.00 GFLOPs", "1.80 GFLOPs", f"0.300 {TIMES}"]
    assert page.row("Total")[1:4] == ["30.00 kB", "6.00 kB", f"0.200 {TIMES}"]
    assert page.row("Indices")[1:4] == [NONE, "3.00 kB", ""]
    assert "small-resnet on mnist" in page.text
    assert "1 h 07 min" in page.text
    assert '["fc", "conv*"]' in page.text


def test_ood_table_marks_the_best_and_names_the_positive_class(page: Page, reported: Path) -> None:
    ood = json.loads((reported / "results.json").read_text())["ood"]
    for metric, best in (("auroc", max), ("fpr95", min), ("aupr_in", max), ("aupr_out", max)):
        rows = {score: [100 * ood[name][score][metric] for name in ood] for score in ("msp", "knn")}
        for score, values in rows.items():
            assert [score, *(f"{v:.2f}" for v in [*values, sum(values) / 2])] in page.rows
        for column in zip(*rows.values(), strict=True):
            assert f"{best(column):.2f}" in page.bold
    assert "FPR95 ↓" in page.text and "AUROC ↑" in page.text
    assert page.text.count("ID positive") >= 2 and "OOD positive" in page.text


def test_draws_the_score_fixed_beforehand_or_the_one_asked_for(page: Page, run: Path) -> None:
    # knn is made the better one
    assert "Score msp" in page.text and "ROC curves of msp" in page.values("aria-label")
    assert "the run's headline, fixed before it was tested" in page.text and "score msp, kmnist" in page.text
    page = page_of(run, score="knn")
    assert "headline" not in page.text
    assert "Score knn" in page.text and "ROC curves of knn" in page.values("aria-label")
    change(run, "config.json", lambda config: config.update(headline="knn"))
    page = page_of(run)
    assert "Score knn" in page.text and "the run's headline" in page.text
    with pytest.raises(ValueError, match=r"unknown score 'energy', expected one of \['msp', 'knn'\]"):
        report_of(run, score="energy")


def test_figures(page: Page) -> None:
    labels = page.values("aria-label")
    assert labels == [
        "Reliability diagram",
        "Histogram of confidence",
        "ROC curves of msp",
        "Histogram of msp on ID and kmnist",
        "Histogram of msp on ID and fashion",
        "Training loss",
        "Accuracy",
        "Learning rate",
        "Weight w of the unknown-aware loss",
        "Mean unknown probability u",
        "Density of every layer",
    ]


def test_reliability_diagram_shows_the_binned_error(page: Page, reported: Path) -> None:
    arrays = arrays_of(reported)
    bins = calibration_bins(torch.from_numpy(arrays["confidence"]), torch.from_numpy(arrays["correct"]))
    assert f"15 bins, ECE {bins.expected_calibration_error:.4f}" in page.text


def test_dense_run_without_w(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", scores=("msp",), sets={"kmnist": (50, 1.0)})
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: row[key] for key in ("epoch", "loss", "test_accuracy")} | {"w": None} for row in rows]
    rows[1]["loss"] = None
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def dense(results: dict[str, Any]) -> None:
        results["sparsity"] = {"target": 0.0, "actual": 0.0, "layers": {"fc": 0.0}}
        results["memory"] = dict.fromkeys(results["memory"], 0) | {"ratio": 1.0}

    change(folder, "results.json", dense)
    page = page_of(folder)
    labels = page.values("aria-label")
    assert labels[-2:] == ["Training loss", "Accuracy"]
    assert "All layers are dense." in page.text
    assert "Training memory" not in page.text and "Optimizer state" not in page.text
    assert page.row("", "AUROC ↑") == ["", "AUROC ↑", "FPR95 ↓", "AUPR-in ↑", "AUPR-out ↑"]  # one set, one table


def test_times_of_steps_and_what_ran(run: Path) -> None:
    assert "What ran" not in report_of(run).read_text(encoding="utf-8")  # of before
    change(run, "results.json", lambda results: results.update(steps=STEPS))
    page, text = page_of(run), report_of(run).read_text(encoding="utf-8")
    assert page.row("conv2")[1:] == ["0.9500", "kernel", "kernel", "kernel"]
    assert page.row("fc")[1:] == ["0.4000", "dense", "dense", "kernel"]
    for words in (
        "12.35 ms",
        "1 of 2 sparse layers ran sparse kernels, 1 in part: fc",
        "2.50 \u00d7",
        "30.00 ms (channels_last)",
    ):
        assert words in text
    change(run, "results.json", lambda results: results["steps"].update(median_ms=None))
    assert "Training step" not in report_of(run).read_text(encoding="utf-8")


def test_run_without_ood_sets(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", sets={}))
    assert "no out-of-distribution set" in page.text
    assert not any("ROC" in label for label in page.values("aria-label"))


def test_scores_that_only_some_sets_have(run: Path) -> None:
    change(run, "results.json", lambda results: results["ood"]["kmnist"].pop("knn"))
    page = page_of(run)
    assert "Score msp" in page.text
    assert all(row[1] == NONE and row[3] == NONE for row in page.rows if row[0] == "knn")


def test_single_epoch_and_null_figures(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"epoch": 1, "loss": 2.5, "mean_u": 0.0, "lr": 0.1}\n')
    change(run, "results.json", lambda results: results["id"].update(nll=None, brier=float("nan")))
    page = page_of(run)
    assert page.row("NLL")[1] == page.row("Brier score")[1] == NONE
    assert "Mean unknown probability u" not in page.values("aria-label")  # nothing that a logarithm could show


def test_infinite_and_constant_scores(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    arrays = arrays_of(folder)
    arrays["id/knn"][:3] = np.inf
    arrays["kmnist/knn"][:] = -np.inf
    arrays["id/msp"][:] = arrays["kmnist/msp"][:] = arrays["fashion/msp"][:] = 1.0
    arrays["fashion/msp"][0] = np.nextafter(1.0, 0.0)
    np.savez(folder / "scores.npz", **arrays)
    for score in ("knn", "msp"):
        assert page_of(folder, score=score).tags.count("svg") == 11


HOSTILE = "<script>alert('x')</script>&\"$\\frac{ é中"


def test_everything_foreign_is_escaped(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", scores=(HOSTILE,), sets={HOSTILE: (50, 1.0), "b": (50, 1.0), "c": (40, 1.0)})
    change(
        folder, "config.json", lambda config: config.update({"dataset": HOSTILE, "model": HOSTILE, HOSTILE: HOSTILE})
    )
    change(folder, "results.json", lambda results: results["sparsity"]["layers"].update({HOSTILE: 0.5}))
    text = report_of(folder).read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert HOSTILE in page.text
    assert any(HOSTILE in label for label in page.values("aria-label"))


@pytest.mark.parametrize("file", ["config.json", "metrics.jsonl", "results.json", "scores.npz"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage", "empty"])
def test_damaged_inputs_are_named_and_the_old_report_survives(run: Path, file: str, damage: str) -> None:
    (run / "report.html").write_text("old")
    content = (run / file).read_bytes()
    if damage == "missing":
        (run / file).unlink()
    else:
        damaged = {"truncated": content[: len(content) // 2], "garbage": b"\xff\x00{" * 9, "empty": b""}[damage]
        (run / file).write_bytes(damaged)
    with pytest.raises(ValueError, match=re.escape(file)):
        report_of(run)
    assert (run / "report.html").read_text() == "old"
    assert len(list(run.iterdir())) == (4 if damage == "missing" else 5)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.pop("id"), "id should be an object"),
        (lambda r: r["id"].pop("ece"), "id/ece should be a number, got 'nothing'"),
        (lambda r: r["flops"].update(train_ratio="much"), "flops/train_ratio should be a number, got 'much'"),
        (lambda r: r["ood"].update(svhn=[1]), "ood/svhn should be an object"),
        (lambda r: r["ood"]["kmnist"].update(odin={}), "ood/kmnist/odin/auroc"),
        (lambda r: r["sparsity"].update(layers={"fc": "x"}), "sparsity/layers/fc"),
        (lambda r: r.pop("time_s"), "time_s"),
        (lambda r: r.update(steps={"kernels": {}}), "steps/median_ms should be a number"),
        (lambda r: r.update(steps={**STEPS, "kernels": {"fc": {"forward": ["dense"]}}}), "steps/kernels/fc is"),
        (lambda r: r.update(steps={**STEPS, "kernels": {"other": {"forward": "dense"}}}), "steps/kernels/other is"),
        (
            lambda r: r.update(steps={**STEPS, "beside_dense": {"dense_ms": 1, "sparse_ms": 1}}),
            "no text 'dense_layout'",
        ),
    ],
)
def test_incomplete_results(run: Path, edit: Any, message: str) -> None:
    change(run, "results.json", edit)
    with pytest.raises(ValueError, match=message) as error:
        report_of(run)
    assert "results.json" in str(error.value)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("confidence", np.full(200, 1.5), "in \\[0, 1\\]"),
        ("confidence", np.full(3, 0.5), "shape"),
        ("correct", np.ones(200), "'correct' has shape"),
        ("id/knn", np.zeros((2, 2)), "'id/knn' has shape"),
        ("id/knn", np.array([]), "'id/knn' has shape"),
        ("kmnist/knn", np.array([0.0, np.nan]), "'kmnist/knn' holds NaN"),
        ("kmnist/knn", np.array(["a"]), "'kmnist/knn' has shape"),
        ("kmnist/knn", np.array([None]), "scores.npz"),
        ("kmnist/knn", None, "has no array 'kmnist/knn'"),
    ],
)
def test_bad_score_arrays(tmp_path: Path, name: str, array: np.ndarray | None, message: str) -> None:
    folder = write_run(tmp_path / "run")
    arrays = arrays_of(folder)
    arrays.pop(name)
    if array is not None:
        arrays[name] = array
    np.savez(folder / "scores.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        report_of(folder)
    assert "scores.npz" in str(error.value)


def test_averaged_confidences_may_pass_one_by_rounding(run: Path) -> None:
    np.savez(run / "scores.npz", **(arrays_of(run) | {"confidence": np.full(200, 1 + 1e-7)}))
    assert "ECE" in page_of(run).text


def test_scores_that_are_one_array(run: Path) -> None:
    with (run / "scores.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"scores\.npz is damaged"):
        report_of(run)


@pytest.mark.parametrize("line", ['{"loss": 1.0}', '{"epoch": 4, "loss": "x"}', "[4]", ""])
def test_bad_metric_lines(run: Path, line: str) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        report_of(run)


def test_config_without_a_model(run: Path) -> None:
    change(run, "config.json", lambda config: config.pop("model"))
    with pytest.raises(ValueError, match=r"config\.json has no text 'model'"):
        report_of(run)


def test_replaces_as_a_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run / "report.html"
    report.write_text("old")
    seen = []

    def interrupted(source: Any, target: Any) -> None:
        seen.append((Path(source).parent, Path(source).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report_of(run)
    assert seen == [(run, True)]  # complete before it takes the place, and in the same folder
    assert report.read_text() == "old"
    assert len(list(run.iterdir())) == 5


def test_same_inputs_give_the_same_page_and_leave_matplotlib_alone(text: str, run: Path) -> None:
    settings = dict(matplotlib.rcParams)
    assert report_of(run).read_text(encoding="utf-8") == text
    assert dict(matplotlib.rcParams) == settings
    assert len(text) < 400_000


def test_colours_come_from_the_page(text: str) -> None:
    body = text[text.index("<body>") :]
    assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r'(href|url\()="?#\w+', "", body))
    used, defined = set(re.findall(r"var\(--(\w+)\)", text)), set(re.findall(r"--(\w+):", text))
    assert {"ink", "muted", "grid", "c0", "c1"} <= used <= defined


def test_later_figures_and_the_temperature(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    results = json.loads((folder / "results.json").read_text())
    results["id"] |= {"classwise_ece": 0.0123, "adaptive_ece": 0.0456, "aurc": 0.0078}
    results["calibration"] = {"temperature": 1.5, "ece_before": 0.06, "ece_after": 0.02}
    (folder / "results.json").write_text(json.dumps(results))
    page = Page(report_of(folder).read_text(encoding="utf-8"))
    assert page.row("Classwise ECE")[1] == "0.0123" and page.row("AURC")[1] == "0.0078"
    assert page.row("Temperature")[1] == "1.500" and "ECE 0.0200 in place of 0.0600" in page.row("Temperature")[2]
    plain = Page(report_of(write_run(tmp_path / "plain")).read_text(encoding="utf-8"))
    assert "Temperature" not in plain.text and "AURC" not in plain.text


def test_groups_of_sets(tmp_path: Path) -> None:
    sets = {"kmnist": (50, 1.0), "letters": (50, 1.0), "noise": (50, 1.0), "mine": (50, 1.0)}
    folder = write_run(tmp_path / "run", sets=sets)
    page = page_of(folder)
    ood = json.loads((folder / "results.json").read_text())["ood"]
    columns = ["", "kmnist (near)", "letters (near)", "near mean", "noise (far)", "mine (ungrouped)", "mean"]
    assert page.rows.count(columns) == 4
    near = 50 * (ood["kmnist"]["msp"]["auroc"] + ood["letters"]["msp"]["auroc"])
    assert f"{near:.2f}%" in page.text and "AUROC near" in page.text and "AUROC ungrouped" in page.text


def test_the_report_says_when_with_what_and_where_it_was_made(run: Path) -> None:
    made = {"date": "2026-11-28 10:00 UTC", "command": "sparse-moon train <x>", "sparse_moon": "0.1", "processor": "P"}
    change(run, "results.json", lambda results: results.update(environment=made, left_out={"knn": "too few"}))
    page = page_of(run)
    assert all(value in page.text for value in made.values())
    assert "The score knn was left out: too few." in page.text


def test_tables_scroll_by_themselves(text: str) -> None:
    """On a phone the page does not get wider than the screen."""
    assert len(re.findall(r'<div class="scroll"><table', text)) == text.count("<table")


def test_paths_that_are_no_text_do_not_stop_the_page(run: Path) -> None:
    change(run, "config.json", lambda config: config.update(dataset="/data/\udcff.npz"))
    assert "udcff" in report_of(run).read_text(encoding="utf-8")
