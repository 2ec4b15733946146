"""Many runs side by side: train every combination, each in a folder of its own, and tabulate what came of them."""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sparse_moon import files
from sparse_moon.app import plots, run_folder
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.evaluate import evaluate_model, load_run
from sparse_moon.app.ood_groups import GROUPS, ood_group
from sparse_moon.app.own import options_to_import
from sparse_moon.app.report import write_report
from sparse_moon.app.run_data import load_ood_sets
from sparse_moon.app.run_record import RunRecord, read_record

TABLE, MARKDOWN, PLOT, LOG = "table.json", "table.md", "plot.png", "log.txt"

# Settings that do not make two runs different experiments.
_PLACE = ("seed", "device", "data_root", "download", "ood", "headline")
# Settings with columns of their own.
_SHOWN = ("method", "reliability", "without", "sparsity")
# What a run's time is compared with: its method and label.
_REFERENCE = "rigl none"


def run_name(config: TrainConfig) -> str:
    """Name of a run's folder: ``rigl-moon-without-tuning-0.95-seed0``."""
    without = f"-without-{'-'.join(config.without)}" if config.without else ""
    sparsity = f"-{config.sparsity:g}" if config.method_class.sparse else ""
    return f"{config.method}-{config.reliability}{without}{sparsity}-seed{config.seed}"


def row_label(config: TrainConfig, varying: Iterable[str] = ()) -> str:
    """Name of a run's row in the table, with the settings in ``varying``: ``rigl moon:-tuning 0.95 pattern=block8``."""
    sparsity = [f"{config.sparsity:g}"] if config.method_class.sparse else []
    others = [f"{key}={getattr(config, key)}" for key in varying]
    return " ".join([config.method, config.label, *sparsity, *others])


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """SIGTERM raises ``SystemExit`` in the block, so that what has to be done at its end is done."""
    if threading.current_thread() is not threading.main_thread():  # where Python handles no signals
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Processes:
    """Processes of runs that threads start and wait for. Once they are told to end, no other starts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._ending = False

    def run(self, folder: Path) -> int:
        """Run the one of this folder to its end: its exit code."""
        with self._lock:
            if self._ending:
                raise CancelledError
            process = _start(folder)
            self._running.add(process)
        try:
            return process.wait()
        finally:
            with self._lock:
                self._running.discard(process)

    def end(self) -> None:
        with self._lock:
            self._ending = True
            for process in self._running:
                process.terminate()


@_exit_on_sigterm()
def run_all(configs: Iterable[TrainConfig], folder: Path, *, jobs: int = 1) -> list[str]:
    """Train each run in ``folder / run_name``; skip finished ones, resume interrupted ones.

    Each is a process of its own, ``jobs`` at a time; what it prints goes to ``log.txt`` in its folder. One that fails
    is reported and leaves the others alone, also where it is killed, which would break a pool of processes as a whole.

    Returns:
        Names of the runs that failed.

    Raises:
        ValueError: a folder of such a name that holds a run with other settings.
    """
    runs = {run_name(config): config for config in configs}
    for name, config in runs.items():
        _prepare(folder / name, config)
    failed: list[str] = []
    pool, processes = ThreadPoolExecutor(jobs), _Processes()
    try:
        names = {pool.submit(_train, folder / name, processes): name for name in runs}
        for done, future in enumerate(as_completed(names), 1):
            finished, outcome = future.result()
            if not finished:
                failed.append(names[future])
            print(f"[{done}/{len(runs)}] {names[future]}: {outcome}", flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        processes.end()
        pool.shutdown()
    return failed


def _train(folder: Path, processes: _Processes) -> tuple[bool, str]:
    """Train a run unless that is done: whether it is finished now, and what came of it in words."""
    try:
        if _finished(folder):
            return True, "finished before"
        code = processes.run(folder)
        if code == 0 and _finished(folder):
            return True, _summary(files.read_json(folder / run_folder.RESULTS))
        return False, f"FAILED with code {code}: {_reason(folder)}"
    except (OSError, ValueError) as error:  # such as damaged files
        return False, f"FAILED: {error}"


def _prepare(folder: Path, config: TrainConfig) -> None:
    """Write the settings of a run that is to be started; those of one that is there must be the same."""
    path = folder / run_folder.CONFIG
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(path, asdict(config))
        return
    saved, asked = (_experiment(c) for c in (TrainConfig.from_dict(files.read_json(path)), config))
    for key, value in asked.items():
        if saved[key] != value:
            raise ValueError(f"the run in {folder} has {key} {saved[key]!r}, not {value!r}: choose another --out")


def _experiment(config: TrainConfig) -> dict[str, Any]:
    settings = {key: value for key, value in asdict(config).items() if key not in _PLACE}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


def _finished(folder: Path) -> bool:
    """Whether the run has its results and its last checkpoint, which may have been removed since to save space."""
    if not (folder / run_folder.RESULTS).exists():
        return False
    return not (folder / run_folder.CHECKPOINT).exists() or bool(run_folder.read_checkpoint(folder)["finished"])


def _start(folder: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "sparse_moon", "train", "--resume", "--out", str(folder)]
    command += options_to_import(files.read_json(folder / run_folder.CONFIG))
    # this package, rather than one in the working folder: a checkout there has no compiled kernels
    path = {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **path})


def _summary(results: Mapping[str, Any]) -> str:
    return f"accuracy {results['id']['accuracy']:.4f}, ECE {results['id']['ece']:.4f}, {results['time_s']:.1f} s"


def _reason(folder: Path) -> str:
    """Why the run failed, by its log: the message of the command line, or the last line."""
    text = (folder / LOG).read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line for line in text.split("\n") if line.strip()]
    messages = [line for line in lines if ": error: " in line]
    return (messages or lines or ["it printed nothing"])[-1]


def evaluate_again(
    folder: Path, *, ood: list[str] | None = None, scores: Sequence[str] | None = None, device: str | None = None
) -> None:
    """Evaluate every finished run in ``folder`` without training, on these OOD sets and with these scores.

    What is found goes beside what the run's results.json and scores.npz hold already, or in its place.

    Raises:
        ValueError: no finished run, or as :func:`sparse_moon.app.evaluate.evaluate_model`.
    """
    for path in _run_folders(folder):
        with run_folder.only_writer(path):
            run = load_run(path, device=device)
            config = run.config if ood is None else replace(run.config, ood=ood)
            sets = load_ood_sets(config, run.dataset)
            new, arrays = evaluate_model(run.predictor, config, run.dataset, sets, scores)
            record = _with_evaluation(read_record(path), new, arrays)
            run_folder.write_scores(path, record.scores)
            files.write_json(path / run_folder.RESULTS, record.results)
            write_report(path, record)
        print(f"{path.name}: evaluated on {', '.join(new['ood'])}", flush=True)


def _with_evaluation(record: RunRecord, new: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> RunRecord:
    """What a run left, with the figures and arrays of another evaluation beside the old ones or in their place."""
    ood = {name: {**by_score} for name, by_score in record.results["ood"].items()}
    for name, by_score in new["ood"].items():
        ood.setdefault(name, {}).update(by_score)
    return replace(record, results={**record.results, **new, "ood": ood}, scores={**record.scores, **arrays})


def _run_folders(folder: Path) -> list[Path]:
    found = [path.parent for path in sorted(folder.glob(f"*/{run_folder.RESULTS}")) if _finished(path.parent)]
    if not found:
        raise ValueError(f"{folder} holds no finished run")
    return found


@dataclass(frozen=True)
class _Run:
    config: TrainConfig
    settings: dict[str, Any]  # those that make runs different experiments
    results: dict[str, Any]
    epoch_s: float


def write_table(folder: Path, relative_times: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Write table.json, table.md and plot.png of all finished runs in ``folder``.

    Runs that differ in nothing but the seed make a row.

    Args:
        relative_times: time over that of RigL alone by label of the row (``rigl moon:-tuning 0.95``), in place of what
            the runs took themselves, which depends on what else their machine did.

    Returns:
        What ``table.json`` holds: ``near``, ``far`` and ``ungrouped``, the names of the OOD sets by group;
        ``headline``, the score of the first run's settings; ``rows``, each with ``label``, ``sparse`` (whether its
        networks are), ``settings``, ``runs`` and ``figures`` ``{name: {"mean", "std"}}``; std is that of a sample, None
        for a single run. Shares are in [0, 1].

    Raises:
        ValueError: no finished run.
    """
    groups: dict[str, list[_Run]] = {}
    for path in _run_folders(folder):
        config = TrainConfig.from_dict(files.read_json(path / run_folder.CONFIG))
        results = files.read_json(path / run_folder.RESULTS)
        try:
            epochs = [row["time_s"] for row in run_folder.read_metrics(path, results.get("epochs"))]
            run = _Run(config, _experiment(config), results, statistics.median(epochs))
            _figures(run)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the results in {path} are incomplete: {error!r}") from None
        groups.setdefault(json.dumps(run.settings, sort_keys=True), []).append(run)
    members = list(groups.values())
    varying = [
        key for key in members[0][0].settings
        if key not in _SHOWN and len({json.dumps(group[0].settings[key]) for group in members}) > 1
    ]  # fmt: skip
    reference_s = {_kin(group[0]): _seconds(group) for group in members if _is_reference(group[0].config)}
    rows: list[dict[str, Any]] = []
    for group in members:
        config, settings = group[0].config, group[0].settings
        gathered: dict[str, list[float]] = {}
        for run in group:
            for name, value in _figures(run).items():
                gathered.setdefault(name, []).append(value)
        row_figures = {name: _mean_and_std(values) for name, values in gathered.items()}
        shown = {key: settings[key] for key in (*_SHOWN, *varying)}
        label = row_label(config, varying)
        if relative_times is not None:
            if label in relative_times:
                row_figures["relative_epoch_time"] = {"mean": relative_times[label], "std": None}
        elif reference := reference_s.get(_kin(group[0])):
            row_figures["relative_epoch_time"] = _mean_and_std([run.epoch_s / reference for run in group])
        rows.append({"label": label, "sparse": config.method_class.sparse, "settings": shown, "runs": len(group),
                     "epoch_s": _seconds(group), "figures": row_figures})  # fmt: skip
    rows.sort(key=lambda row: (row["settings"]["sparsity"], row["settings"]["method"], row["label"]))
    headline = members[0][0].config.headline
    table: dict[str, Any] = {**_groups(members[0][0]), "headline": headline, "rows": rows}
    files.write_json(folder / TABLE, table)
    files.write_text(folder / MARKDOWN, format_markdown(table))
    with files.replacing(folder / PLOT) as temporary:
        plots.comparison(rows, [headline]).savefig(temporary, dpi=150)
    return table


def _kin(run: _Run) -> str:
    """The settings that a run has in common with the reference for its time."""
    own = ("method", "reliability", "without")
    return json.dumps({key: value for key, value in run.settings.items() if key not in own})


def _is_reference(config: TrainConfig) -> bool:
    return f"{config.method} {config.label}" == _REFERENCE


def _seconds(group: Iterable[_Run]) -> float:
    return statistics.mean(run.epoch_s for run in group)


def _groups(run: _Run) -> dict[str, list[str]]:
    """Names of the OOD sets by group."""
    by_group: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name in run.results["ood"]:
        by_group[ood_group(run.config.dataset, name)].append(name)
    return by_group


def _figures(run: _Run) -> dict[str, float]:
    """A run's figures by name; AUROC and FPR95 as means over the OOD sets of each group."""
    results, by_group = run.results, _groups(run)
    found = {key: results["id"][key] for key in ("accuracy", "ece", "nll")}
    if "calibration" in results:
        found["ece_scaled"] = results["calibration"]["ece_after"]
    counts = results["flops"]
    found["forward_flops"] = counts.get("passes", 1) * counts["forward_sparse"] / counts["forward_dense"]
    found["training_flops"] = counts["train_ratio"]
    scores = dict.fromkeys(score for by_score in results["ood"].values() for score in by_score)
    for score in scores:
        for kind, names in by_group.items():
            sets = [results["ood"][name][score] for name in names if score in results["ood"][name]]
            for metric in ("auroc", "fpr95") if sets else ():
                found[f"{metric}/{kind}/{score}"] = statistics.mean(metrics[metric] for metrics in sets)
    return found


def _mean_and_std(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def format_markdown(table: Mapping[str, Any]) -> str:
    """The table as Markdown: first what every run has and the headline score, then AUROC and FPR95 by score."""
    rows, headline = table["rows"], table.get("headline", TrainConfig.headline)
    columns = [
        ("accuracy", "accuracy %", 100.0, 2), ("ece", "ECE", 1.0, 4), ("ece_scaled", "ECE after temperature", 1.0, 4),
        ("nll", "NLL", 1.0, 4), ("forward_flops", "forward FLOPs / dense", 1.0, 3),
        ("training_flops", "training FLOPs / dense", 1.0, 3),
        ("relative_epoch_time", f"time an epoch / {_REFERENCE}", 1.0, 3),
        *((f"auroc/{group}/{headline}", f"AUROC % {group}, {headline}", 100.0, 2) for group in GROUPS),
    ]  # fmt: skip
    columns = [column for column in columns if any(column[0] in row["figures"] for row in rows)]
    lines = ["# Comparison", "", "Mean ± standard deviation over the seeds.", ""]
    lines += _markdown(["run", "seeds", *(heading for _, heading, _, _ in columns)], [
        [row["label"], str(row["runs"]), *(_cell(row, name, scale, digits) for name, _, scale, digits in columns)]
        for row in rows
    ])  # fmt: skip
    sets = "; ".join(f"{group}: {', '.join(table.get(group, ())) or 'none'}" for group in GROUPS)
    lines += ["", f"OOD sets, {sets}. AUROC and FPR95 (ID positive) in %, means over the sets of a group.",
              f"The score of the first table, {headline}, is the settings' `headline`, not the best here."]  # fmt: skip
    scores = dict.fromkeys(name.split("/", 2)[2] for row in rows for name in row["figures"] if name.startswith("auroc"))
    for kind in GROUPS:
        for metric, heading in (("auroc", "AUROC"), ("fpr95", "FPR95")):
            if any(f"{metric}/{kind}/{score}" in row["figures"] for row in rows for score in scores):
                lines += ["", f"## {heading}, {kind} OOD", ""]
                lines += _markdown(["run", *scores], [
                    [row["label"], *(_cell(row, f"{metric}/{kind}/{score}", 100.0, 2) for score in scores)]
                    for row in rows
                ])  # fmt: skip
    return "\n".join(lines) + "\n"


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _cell(row: Mapping[str, Any], name: str, scale: float, digits: int) -> str:
    value = row["figures"].get(name)
    if value is None or not math.isfinite(value["mean"]):
        return ""
    spread = "" if value["std"] is None else f" ± {scale * value['std']:.{digits}f}"
    return f"{scale * value['mean']:.{digits}f}{spread}"
