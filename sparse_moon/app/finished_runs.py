"""The finished runs of a folder, and their evaluation on other OOD sets and with other scores."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sparse_moon import files
from sparse_moon.app import run_folder
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.evaluate import evaluate_model, load_run, scores_for
from sparse_moon.app.ood_sets import default_ood, same_source, set_name
from sparse_moon.app.report import write_report
from sparse_moon.app.run_data import load_ood_sets
from sparse_moon.app.run_record import SPECS, RunRecord, read_record


def finished_runs(folder: Path) -> list[Path]:
    """The folders of the finished runs in ``folder``.

    Raises:
        ValueError: there is none.
    """
    found = [
        path.parent for path in sorted(folder.glob(f"*/{run_folder.RESULTS}")) if run_folder.is_finished(path.parent)
    ]
    if not found:
        raise ValueError(f"{folder} holds no finished run")
    return found


def evaluate_again(
    folder: Path, *, ood: list[str] | None = None, scores: Sequence[str] | None = None,
    where: Mapping[str, Any] | None = None,
) -> list[str]:  # fmt: skip
    """Evaluate every finished run in ``folder`` without training, on these OOD sets and with these scores.

    What is found goes beside what the run's results.json and scores.npz hold already, or in its place. A run that fails
    is reported and leaves the others alone. Of ``where`` see :func:`sparse_moon.app.compare.run_all`.

    Returns:
        Names of the runs that failed.

    Raises:
        ValueError: no finished run, or all failed.
    """
    runs, failed = finished_runs(folder), {}
    changes = {"score": None} if ood is None else {"score": None, "ood": ood}
    for path in runs:
        try:
            _evaluate(path, changes, scores, where or {})
        except (OSError, ValueError) as error:
            print(f"{path.name}: FAILED to evaluate it again: {error}", flush=True)
            failed[path.name] = error
    if len(failed) == len(runs):
        name, first = next(iter(failed.items()))
        raise ValueError(f"no run could be evaluated again; {name}: {first}")
    return list(failed)


def _evaluate(
    path: Path, changes: Mapping[str, Any], scores: Sequence[str] | None, where: Mapping[str, Any]
) -> None:  # fmt: skip
    """Evaluate a finished run with these changes of its settings."""
    with run_folder.only_writer(path):
        record, run = read_record(path), load_run(path, **where)
        config = replace(run.config, **changes)
        specs = _new_specs(record.config, record.results, config)
        added = {name: spec for name, spec in specs.items() if name not in record.results["ood"]}
        new, arrays = evaluate_model(run.predictor, config, run.dataset, load_ood_sets(config, run.dataset), scores)
        record = _with_evaluation(record, {**new, SPECS: {**record.results.get(SPECS, {}), **added}}, arrays)
        run_folder.write_scores(path, record.scores)
        files.write_json(path / run_folder.RESULTS, record.results)
        write_report(path, record)
    print(f"{path.name}: evaluated on {', '.join(new['ood'])}", flush=True)


def add_ood_sets(path: Path, config: TrainConfig, where: Mapping[str, Any]) -> None:
    """Evaluate a finished run on those OOD sets of ``config`` that it lacks, where it was made for others.

    Raises:
        ValueError: it has one of that name from elsewhere.
    """
    settings, results = (files.read_json(path / name) for name in (run_folder.CONFIG, run_folder.RESULTS))
    asked = _new_specs(settings, results, config)
    if settings.get("ood") == config.ood:
        return
    if missing := [spec for name, spec in asked.items() if name not in results["ood"]]:
        _evaluate(path, {"ood": missing, "score": config.score}, None, where)


def _new_specs(settings: Mapping[str, Any], results: Mapping[str, Any], config: TrainConfig) -> dict[str, str]:
    """By name where the OOD sets of ``config`` come from; raise ``ValueError`` where a run has one from elsewhere."""
    kept = kept_specs(settings, results)
    asked = _by_name(config.dataset, config.ood)
    for name, spec in asked.items():
        if not same_source(spec, kept.get(name, spec)):
            raise ValueError(f"it has the OOD set {kept[name]}, got {spec}: give that another name")
    return asked


def kept_specs(settings: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, str]:
    """By name where a run's OOD sets came from, as far as its settings and results say it."""
    dataset, specs = settings.get("dataset", TrainConfig.dataset), settings.get("ood")
    return _by_name(dataset, specs) | results.get(SPECS, {})


def _by_name(dataset: str, specs: Sequence[str] | None) -> dict[str, str]:
    return {set_name(spec): spec for spec in (default_ood(dataset) if specs is None else specs)}


def add_scores(path: Path, config: TrainConfig, where: Mapping[str, Any]) -> None:
    """Evaluate a finished run on OOD sets of ``config`` with the scores that it lacks, of those asked for by name."""
    results = files.read_json(path / run_folder.RESULTS)
    ood = results.get("ood", {})
    sets = [ood[name] for name in _by_name(config.dataset, config.ood) if name in ood]
    left_out = results.get("left_out", {})
    by_name = replace(config, score=config.score or [])  # the headline is always among them
    asked = [score for score in scores_for(by_name) if score not in left_out]
    if missing := [score for score in asked if any(score not in found for found in sets)]:
        _evaluate(path, {"ood": config.ood}, missing, where)


def _with_evaluation(record: RunRecord, new: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> RunRecord:
    """What a run left, with the figures and arrays of another evaluation beside the old ones or in their place."""
    results = {**record.results, **new}
    for part in {"ood", "dice", "left_out"} & results.keys():  # by set, or by score
        results[part] = {**record.results.get(part, {}), **new.get(part, {})}
    for name, by_score in record.results["ood"].items():
        results["ood"][name] = {**by_score, **new["ood"].get(name, {})}
    return replace(record, results=results, scores={**record.scores, **arrays})


def restore_scores(path: Path, where: Mapping[str, Any]) -> None:
    """Write the scores.npz of a finished run anew, of all OOD sets and scores that its results have.

    Raises:
        ValueError: results that do not say where an OOD set came from.
    """
    run, results = load_run(path, **where), files.read_json(path / run_folder.RESULTS)
    kept = kept_specs(run.config.to_dict(), results)
    if unknown := [name for name in results["ood"] if name not in kept]:
        raise ValueError(
            f"{path / run_folder.SCORES} is gone, and {run_folder.RESULTS} does not say where {', '.join(unknown)} "
            "came from: without that file, too, the run is evaluated as its settings say"
        )
    config = replace(run.config, ood=[kept[name] for name in results["ood"]])
    scores = dict.fromkeys(score for by_score in results["ood"].values() for score in by_score)
    sets = load_ood_sets(config, run.dataset)
    _, arrays = evaluate_model(run.predictor, config, run.dataset, sets, list(scores) or None)
    run_folder.write_scores(path, arrays)
