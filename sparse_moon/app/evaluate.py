"""From a trained network to its figures."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

from torch import Tensor, nn

from sparse_moon.app import datasets, run_folder
from sparse_moon.app.build import load_network
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.names import Score
from sparse_moon.app.own import imported
from sparse_moon.app.run_data import RunData, difference, identity, load_dataset, plain_batches
from sparse_moon.ood import (
    DICE,
    SCORES,
    Detector,
    choose_p,
    collect,
    detector_class,
    evaluate,
    fit_detectors,
    make_detector,
    parse_score,
    threshold,
)
from sparse_moon.ood.calibration import adaptive_calibration_error, classwise_calibration_error, fit_temperature
from sparse_moon.ood.metrics import (
    area_under_risk_coverage,
    classification_metrics,
    open_set_classification_rate,
    predictions,
)
from sparse_moon.settings import is_import_path


@dataclass(frozen=True)
class FinishedRun:
    """A run as its folder has it.

    Attributes:
        config, dataset: its settings and data.
        network: the trained network, in evaluation mode.
        predictor: what it predicts with; the network itself for most reliability methods.
    """

    config: TrainConfig
    dataset: RunData
    network: nn.Module
    predictor: nn.Module


def load_run(folder: Path, **where: Any) -> FinishedRun:
    """A finished run, with its networks and data.

    Args:
        where: settings that say where it computes and finds its data, such as ``device`` and ``data_root``, in place of
            its own; None leaves those.

    Raises:
        ValueError: a folder without a finished run, damaged files, other data than it was trained with, or a model of
            the user's own that has not been imported.
    """
    state = run_folder.read_checkpoint(folder)
    if not state["finished"]:
        raise ValueError(f"the run in {folder} has not finished: continue it with --resume")
    config = TrainConfig.from_dict({**state["config"], **{k: v for k, v in where.items() if v is not None}})
    if is_import_path(config.model):
        imported(config.model)
    dataset = load_dataset(config)
    if other := difference(state.get("data_identity"), identity(dataset)):
        raise ValueError(f"the run in {folder} was trained with {other}")
    try:
        model = load_network(config, dataset, state["model"]).to(config.device).eval()
        reliability = config.make_reliability()
        reliability.members = state.get("members", [])
        whole = reliability.predictor(model, partial(load_network, config, dataset)).eval()
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the checkpoint in {folder} does not fit its settings: {error}") from None
    return FinishedRun(config, dataset, model, whole)


def scores_for(config: TrainConfig) -> list[str]:
    """The scores of a run, or all there are, that fit it: what it predicts with, and whether it holds images out.

    The headline is among them with its options, if it fits.
    """
    reliability = config.make_reliability()

    def fits(name: str) -> bool:
        kind = detector_class(parse_score(name)[0])
        return reliability.fits(kind) and (config.holdout > 0 or not kind.held_out)

    # ours in the order of the list, whatever was imported first
    names = (*get_args(Score), *SCORES) if config.score is None else config.score
    return [name for name in dict.fromkeys((*names, config.headline)) if fits(name)]


def evaluate_model(
    model: nn.Module,
    config: TrainConfig,
    dataset: RunData,
    ood_sets: Mapping[str, datasets.Images],
    scores: Sequence[str] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """ID and OOD figures of a model, from one pass over each set (and one more a score that perturbs its input).

    Where the run holds training images out, they choose DICE's p and a temperature, too.

    Args:
        scores: names or import paths of registered detectors, with options as
            :func:`sparse_moon.ood.make_detector` takes them; by default those of the settings that fit the model.
            Those among these that cannot be computed for this data or model, such as KNN with fewer training images
            than neighbours, or DICE where no linear layer returns the logits, are left out with a warning.

    Returns:
        The ``id``, ``ood`` and, with held-out images, ``calibration`` and ``dice`` parts of ``results.json``, with
        ``left_out`` the reasons of scores that were left out, and the arrays of ``scores.npz``.

    Raises:
        ValueError: an unknown score, or one that does not fit the model.
    """
    left_out: dict[str, str] = {}
    held_batches = None if dataset.holdout is None else plain_batches(dataset.holdout, dataset, config)
    detectors, head = [], config.make_reliability().head(model)
    for name in scores_for(config) if scores is None else dict.fromkeys(scores):
        try:
            detectors.append(_detector(name, model, config, dataset))
        except ValueError as error:
            if scores is not None:
                raise
            left_out[name] = str(error)
    evaluation = evaluate(
        model,
        detectors,
        train_batches=plain_batches(dataset.train, dataset, config),
        held_out_batches=held_batches,
        id_batches=plain_batches(dataset.test, dataset, config),
        ood_batches={name: plain_batches(images, dataset, config) for name, images in ood_sets.items()},
        device=config.device,
        head=head,
        left_out=left_out if scores is None else None,
    )
    if left_out:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in left_out.items())
        warnings.warn(f"scores left out, which this data or model does not allow: {reasons}", stacklevel=2)
    logits, labels = evaluation.id_outputs.logits, cast(Tensor, evaluation.id_outputs.labels)
    confidence, correct = predictions(logits, labels, dataset.num_classes)
    arrays = {"confidence": confidence.numpy(), "correct": correct.numpy()}
    scores_of, ood = evaluation.scores, evaluation.metrics
    for set_name, values_by_score in scores_of.items():
        arrays |= {f"{set_name}/{score}": values.numpy() for score, values in values_by_score.items()}
    for set_name, by_score in ood.items():
        for score, metrics in by_score.items():
            metrics["oscr"] = open_set_classification_rate(scores_of["id"][score], correct, scores_of[set_name][score])
    figures: dict[str, Any] = {"id": _identity(logits, labels, dataset.num_classes, config.ece_bins), "ood": ood}
    if left_out:
        figures["left_out"] = left_out
    if held_batches is not None:
        held = collect(model, held_batches, device=config.device, head=head)
        temperature = fit_temperature(held.logits, cast(Tensor, held.labels))
        scaled = _identity(logits / temperature, labels, dataset.num_classes, config.ece_bins)
        figures["calibration"] = {
            "temperature": temperature,
            **{f"{name}_before": figures["id"][name] for name in _SCALED},
            **{f"{name}_after": scaled[name] for name in _SCALED},
        }
        chosen = {d.name: d.p for d in detectors if isinstance(d, DICE) and _chooses_p(d.name)}
        if chosen:
            figures["dice"] = {"p" if name == DICE.name else name: p for name, p in chosen.items()}
    return figures, arrays


_SCALED = ("ece", "classwise_ece", "adaptive_ece", "nll", "brier")


def _identity(logits: Tensor, labels: Tensor, num_classes: int, bins: int) -> dict[str, float]:
    """Figures on the ID test set."""
    confidence, correct = predictions(logits, labels, num_classes)
    figures = {
        **classification_metrics(logits, labels, num_classes, bins),
        "classwise_ece": classwise_calibration_error(logits, labels, num_classes, bins),
        "adaptive_ece": adaptive_calibration_error(confidence, correct, bins),
        "aurc": area_under_risk_coverage(confidence, correct),
    }
    if logits.shape[1] > num_classes:
        figures["ece_all_outputs"] = classification_metrics(logits, labels, num_classes, bins, extra="all")["ece"]
    return figures


def _chooses_p(score: str) -> bool:
    return "p" not in parse_score(score)[1]


def _detector(score: str, model: nn.Module, config: TrainConfig, dataset: RunData) -> Detector:
    """The score of this text; DICE without a p of its own gets the one that held-out images choose, if there are any.

    Raises:
        ValueError: an unknown score or option, or a value that it does not take.
    """
    detector = make_detector(score, dataset.num_classes, std=dataset.std.tolist())
    if detector.held_out and dataset.holdout is None:
        raise ValueError(f"the score {score!r} learns from held-out images, of which the run has none: --holdout")
    if isinstance(detector, DICE) and _chooses_p(score) and dataset.holdout is not None:
        fit_detectors(model, [detector], plain_batches(dataset.train, dataset, config), device=config.device)
        held = plain_batches(dataset.holdout, dataset, config)
        return detector.with_p(choose_p(model, detector, held, device=config.device, seed=config.seed))
    return detector


def fit_detector(score: str, model: nn.Module, config: TrainConfig, dataset: RunData, tpr: float = 0.95) -> Detector:
    """One score, fitted on the training images, with the threshold that a share ``tpr`` of other ID images reach.

    The others are those held out of training, or the test images where none are. A temperature is fitted on those held
    out.

    Raises:
        ValueError: an unknown score or one that does not fit the model, or a rate outside (0, 1].
    """
    detector = _detector(score, model, config, dataset)
    images = dataset.test if dataset.holdout is None else dataset.holdout
    batches, train = (plain_batches(some, dataset, config) for some in (images, dataset.train))
    head = config.make_reliability().head(model)
    fit_detectors(model, [detector], batches if detector.held_out else train, device=config.device, head=head)
    perturb = detector.perturb if detector.perturbs else None
    outputs = collect(model, batches, device=config.device, perturb=perturb, head=head)
    detector.threshold = threshold(detector.score(outputs.to(config.device)), tpr)
    return detector
