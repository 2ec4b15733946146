"""What a finished run leaves behind, in memory as its folder has it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from sparse_moon import files
from sparse_moon.app import run_folder
from sparse_moon.ood.metrics import check_predictions
from sparse_moon.ops.choice import Backend

METRICS = ("auroc", "fpr95", "aupr_in", "aupr_out")
"""What the results hold of each OOD set and score, in [0, 1]."""

MEMORY = ("parameter", "gradient", "optimizer", "index")
"""What the bytes in the results are counted of; of dense weights all but the last."""

SPECS = "ood_specs"
"""In the results: by name where OOD sets that were added later came from, NAME or NAME=PATH; older results lack it."""

_IDENTITY = ("accuracy", "ece", "nll", "brier")
_LATER = ("classwise_ece", "adaptive_ece", "ece_all_outputs", "aurc")  # which older or other runs lack
_CALIBRATION = ("temperature", "ece_before", "ece_after")
_FLOPS = ("forward_dense", "forward_sparse", "train_ratio")
_FLOATING = (np.float16, np.float32, np.float64)
_CURVES = (
    "epoch", "loss", "train_accuracy", "test_accuracy", "lr", "w", "mean_u",
    # with --diagnostics
    "id_confidence", "hard_confidence", "ood_confidence", "hard_gap", "local_gap", "exploration_rate",
    "mask_correlation", "dice_variance_id", "dice_variance_id_sparse", "dice_variance_ood", "dice_variance_ood_sparse",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class RunRecord:
    """The settings and the outcome of a run. Numbers that do not exist are NaN.

    Attributes:
        config: the settings, as in config.json.
        history: of each epoch the metrics, as in a line of metrics.jsonl.
        results: the figures of the finished run, as in results.json.
        scores: the arrays of scores.npz: of the ID test images ``confidence``, (N,) floating, ``correct``, (N,) bool,
            and ``id/SCORE``, (N,) floating; of each OOD set ``SET/SCORE``. None holds NaN.
    """

    config: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    results: Mapping[str, Any]
    scores: Mapping[str, np.ndarray]


def read_record(folder: Path) -> RunRecord:
    """What the files of a finished run hold, checked: all that a report is made of is there.

    Raises:
        ValueError: a file that is missing, damaged or incomplete, by name.
    """
    config = _mapping(files.read_json(folder / run_folder.CONFIG), folder / run_folder.CONFIG)
    for key in ("dataset", "model", "method"):
        if not isinstance(config.get(key), str):
            raise ValueError(f"{folder / run_folder.CONFIG} has no text {key!r}")
    results = _read_results(folder / run_folder.RESULTS)
    epochs = results.get("epochs")
    return RunRecord(
        config=config,
        history=_read_history(folder, epochs if isinstance(epochs, int) else None),
        results=results,
        scores=_read_scores(folder / run_folder.SCORES, results["ood"]),
    )


def _read_results(path: Path) -> dict[str, Any]:
    content = _mapping(files.read_json(path), path)
    part = {key: _mapping(content.get(key), path, key) for key in ("id", "ood", "sparsity", "flops", "memory")}
    ood: dict[str, dict[str, dict[str, float]]] = {}
    for name, by_score in part["ood"].items():
        by_score = _mapping(by_score, path, f"ood/{name}")
        ood[name] = {score: _numbers(by_score[score], path, f"ood/{name}/{score}", METRICS) for score in by_score}
    layers = _mapping(part["sparsity"].get("layers"), path, "sparsity/layers")
    memory = [f"{name}_bytes" for name in MEMORY] + [f"dense_{name}_bytes" for name in MEMORY[:3]] + ["ratio"]
    identity = (*_IDENTITY, *(key for key in _LATER if key in part["id"]))
    fan_ins = _mapping(part["sparsity"].get("fan_in", {}), path, "sparsity/fan_in")
    _number_lists(fan_ins, path, "sparsity/fan_in", 5)
    live = _mapping(part["sparsity"].get("live_outputs", {}), path, "sparsity/live_outputs")
    _numbers(live, path, "sparsity/live_outputs", live)
    results = {
        **_numbers(content, path, "it", ("time_s",)),
        "id": _numbers(part["id"], path, "id", identity),
        "ood": ood,
        "sparsity": {
            **_numbers(part["sparsity"], path, "sparsity", ("actual",)),
            "layers": _numbers(layers, path, "sparsity/layers", layers),
        },
        "flops": _numbers(part["flops"], path, "flops", _FLOPS),
        "memory": _numbers(part["memory"], path, "memory", memory),
    }
    if calibration := content.get("calibration"):
        results["calibration"] = _numbers(calibration, path, "calibration", _CALIBRATION)
    if "steps" in content:
        results["steps"] = _read_steps(content["steps"], layers, path)
    for key in ("environment", "left_out", SPECS):
        _mapping(content.get(key, {}), path, key)
    return {**content, **results}


def _read_steps(content: Any, layers: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Times of training steps, and what ran in them."""
    steps = _numbers(content, path, "steps", ("median_ms",))
    kernels = _mapping(steps.get("kernels"), path, "steps/kernels")
    for name, ran in kernels.items():
        passes = _mapping(ran, path, f"steps/kernels/{name}")
        known = all(backend in get_args(Backend) for backend in passes.values())
        if name not in layers or "forward" not in passes or not known:
            raise ValueError(f"{path} is damaged: steps/kernels/{name} is {repr(ran)[:60]}")
    if beside := steps.get("beside_dense"):
        steps["beside_dense"] = _numbers(beside, path, "steps/beside_dense", ("sparse_ms", "dense_ms"))
        if not isinstance(beside.get("dense_layout"), str):
            raise ValueError(f"{path} is damaged: steps/beside_dense has no text 'dense_layout'")
    return steps


def _read_history(folder: Path, epochs: int | None) -> list[dict[str, Any]]:
    path, rows = folder / run_folder.METRICS, []
    for number, row in enumerate(run_folder.read_metrics(folder, epochs), 1):
        rows.append(_numbers(row, path, f"line {number}", [key for key in _CURVES if key in row]))
        if math.isnan(rows[-1].get("epoch", math.nan)):
            raise ValueError(f"{path} has lines without an epoch")
        _number_lists(_mapping(row.get("moved", {}), path, f"line {number}/moved"), path, f"line {number}/moved", 4)
    return rows


def _read_scores(path: Path, ood: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
    arrays = run_folder.read_scores(path.parent)
    for name, array in arrays.items():
        if array.ndim != 1 or not len(array) or array.dtype not in ((np.bool_,) if name == "correct" else _FLOATING):
            raise ValueError(f"{path} is damaged: {name!r} has shape {array.shape} and type {array.dtype}")
        if np.isnan(array).any():
            raise ValueError(f"{path} is damaged: {name!r} holds NaN")
    named = [f"{name}/{score}" for name, by_score in ood.items() for score in by_score]
    of_id = [f"id/{score}" for by_score in ood.values() for score in by_score]
    for key in ("confidence", "correct", *named, *of_id):
        if key not in arrays:
            raise ValueError(f"{path} has no array {key!r}")
    try:
        check_predictions(*map(torch.from_numpy, (arrays["confidence"], arrays["correct"])), bounded=True)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return arrays


def _mapping(content: Any, path: Path, where: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: {where or 'it'} should be an object, got {repr(content)[:60]}")
    return content


def _number_lists(content: Mapping[str, Any], path: Path, where: str, length: int) -> None:
    """Raise ``ValueError`` unless each entry is a list of so many finite numbers."""
    for key, values in content.items():
        fits = isinstance(values, list) and len(values) == length
        if not fits or not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            raise ValueError(f"{path} is damaged: {where}/{key} should be {length} numbers, got {repr(values)[:60]}")


def _numbers(content: Any, path: Path, where: str, keys: Iterable[str]) -> dict[str, Any]:
    """``content``, of which these keys are checked to be numbers; null, JSON's number that does not exist, is NaN."""
    content = _mapping(content, path, where)
    numbers = {}
    for key in keys:
        value = content.get(key, "nothing")
        if not isinstance(value, int | float | None):
            raise ValueError(f"{path} is damaged: {where}/{key} should be a number, got {repr(value)[:60]}")
        numbers[key] = math.nan if value is None else value
    return {**content, **numbers}
