"""From a model and data sets to scores and figures."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from sparse_moon.ood.detector import Detector
from sparse_moon.ood.metrics import ood_metrics
from sparse_moon.ood.outputs import Outputs, joined, linear_head
from sparse_moon.ood.passes import Batches, collect, each_batch, model_device
from sparse_moon.ood.shaping import Shaping


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        metrics: ``{set: {detector: ood_metrics}}`` for every OOD set.
        scores: ``{set: {detector: (N,) tensor on the CPU}}`` for ``"id"`` and every OOD set.
        id_outputs: outputs on the ID set, on the CPU, for classification metrics from the same pass.
    """

    metrics: dict[str, dict[str, dict[str, float]]]
    scores: dict[str, dict[str, Tensor]]
    id_outputs: Outputs


def fit_detectors(
    model: nn.Module,
    detectors: Iterable[Detector],
    batches: Batches,
    *,
    device: torch.device | str | None = None,
    head: str | nn.Module | None = None,
    left_out: dict[str, str] | None = None,
) -> None:
    """Fit all detectors that learn, in one pass over the data.

    Args:
        model: see `collect`.
        detectors: those that learn nothing are left alone.
        batches: ID training data with test transforms, (images, labels) for detectors that need labels; held-out ID
            data for those with ``held_out``, which want a call of their own.
        device: where the model is and the detectors compute; the device of its first parameter by default.
        head: as `collect`.
        left_out: takes the reasons of detectors that cannot be fitted to this data, by name, in place of an error. What
            a call before left there for these names goes.

    Raises:
        ValueError: detectors of both kinds of data, an object that is part of two detectors and would learn twice, or
            as `collect` and the detectors.
    """
    fitting = [detector for detector in detectors if detector.fits]
    if not fitting:
        return
    if len({detector.held_out for detector in fitting}) > 1:
        held = [detector.name for detector in fitting if detector.held_out]
        raise ValueError(f"{held} learn from held-out data and the others from training data: fit them by themselves")

    _check_apart(fitting)
    _forget(fitting, left_out)

    def each(act: Callable[[Detector], object]) -> None:
        for detector in list(fitting):
            with _leaving_out(detector, left_out):
                act(detector)
                continue
            fitting.remove(detector)

    def update(detector: Detector, batch: Outputs) -> None:
        if detector.linear_head:
            linear_head(batch)
        detector.update(batch)

    each(lambda detector: detector.start())
    each_batch(model, batches, lambda batch: each(lambda one: update(one, batch)), device=device, head=head)
    each(lambda detector: detector.finish())


def _check_apart(fitting: Iterable[Detector]) -> None:
    """Raise where an object would learn twice from each batch, by itself or as the inner detector of others."""
    learns_for: dict[int, str] = {}
    for detector in fitting:
        part: Detector | None = detector
        while part is not None and part.fits:
            if id(part) in learns_for:
                both = [learns_for[id(part)], detector.name]
                raise ValueError(f"{both} learn with the same {type(part).__name__}: give each one of its own")
            learns_for[id(part)] = detector.name
            part = part.detector if isinstance(part, Shaping) else None


def _forget(detectors: Iterable[Detector], left_out: dict[str, str] | None) -> None:
    """Drop the reasons of a call before this one: with its data these detectors may fit."""
    for detector in detectors:
        if left_out is not None:
            left_out.pop(detector.name, None)


@contextmanager
def _leaving_out(detector: Detector, left_out: dict[str, str] | None) -> Iterator[None]:
    """The reason why the block fails goes into ``left_out``, where there is one."""
    try:
        yield
    except ValueError as error:
        if left_out is None:
            raise
        left_out[detector.name] = str(error)


def evaluate(
    model: nn.Module,
    detectors: Sequence[Detector],
    *,
    id_batches: Batches,
    ood_batches: Mapping[str, Batches],
    train_batches: Batches | None = None,
    held_out_batches: Batches | None = None,
    device: torch.device | str | None = None,
    head: str | nn.Module | None = None,
    left_out: dict[str, str] | None = None,
) -> Evaluation:
    """Fit the detectors, score the ID test set and every OOD set, and compare.

    The model passes over each data set once, and once more for every detector that perturbs its input.

    Args:
        model: see `collect`.
        detectors: with distinct names.
        id_batches: ID test data; for the forms of batches see `collect`.
        ood_batches: OOD data by name; ``"id"`` is taken.
        train_batches: ID training data with test transforms; needed if a detector learns from it, else not read.
        held_out_batches: ID data, with labels, that neither trains nor tests; needed if a detector learns from that
            (``held_out``), else not read.
        device: where the model is and the detectors compute; the device of its first parameter by default.
        head: the module whose input is the features, or its name; found by what it returns by default, see `collect`.
        left_out: as `fit_detectors`, and of those that do not fit the model or score all of the data. They are missing
            in what is returned.

    Raises:
        ValueError: names that collide, no data for a detector to learn from, an iterator where one needs a second
            pass, scores that are not one finite number a sample, or as `fit_detectors`.
    """
    names = [detector.name for detector in detectors]
    if len(set(names)) < len(names):
        raise ValueError(f"detectors need distinct names, got {names}")
    _forget(detectors, left_out)
    if "id" in ood_batches:
        raise ValueError('an OOD set cannot be named "id", which holds the in-distribution scores')
    sets = {"id": id_batches, **ood_batches}
    again = [detector.name for detector in detectors if detector.perturbs]
    for name, batches in sets.items():
        if again and isinstance(batches, Iterator):
            raise ValueError(
                f"{again} need another pass over {name!r}, and an iterator would be used before: pass a list"
            )
    fitting = [detector for detector in detectors if detector.fits]
    _check_apart(fitting)
    learning = [
        ("train_batches", train_batches, [detector for detector in fitting if not detector.held_out]),
        ("held_out_batches", held_out_batches, [detector for detector in fitting if detector.held_out]),
    ]
    for name, given, some in learning:
        if some and given is None:
            raise ValueError(f"{name} is needed to fit {[detector.name for detector in some]}")
    device = model_device(model) if device is None else device

    def clean_pass(batches: Batches) -> Outputs:
        parts: list[Outputs] = []

        def visit(outputs: Outputs) -> None:
            if not parts:
                _try(detectors, outputs, left_out)
            parts.append(outputs.to("cpu"))

        each_batch(model, batches, visit, device=device, head=head)
        return joined(parts)

    def score(name: str, clean: Outputs) -> dict[str, Tensor]:
        there = clean.to(device)
        scores = {}
        for detector in detectors:
            if detector.name in (left_out or ()):
                continue
            outputs = there
            with _leaving_out(detector, left_out):
                if detector.perturbs:
                    outputs = collect(model, sets[name], device=device, perturb=detector.perturb, head=head).to(device)
                scores[detector.name] = _checked(detector.score(outputs).cpu(), detector.name, name, len(clean.logits))
        return scores

    # First, so that a detector that does not fit the model is found before the training data is read.
    id_outputs = clean_pass(id_batches)
    for _, given, some in learning:
        if fitted := [detector for detector in some if detector.name not in (left_out or ())]:
            fit_detectors(model, fitted, cast(Batches, given), device=device, head=head, left_out=left_out)
    scores = {"id": score("id", id_outputs)}
    for name, batches in ood_batches.items():
        scores[name] = score(name, clean_pass(batches))
    kept = [name for name in names if name not in (left_out or ())]
    scores = {name: {d: by_detector[d] for d in kept} for name, by_detector in scores.items()}
    metrics = {name: {d: ood_metrics(scores["id"][d], scores[name][d]) for d in kept} for name in ood_batches}
    return Evaluation(metrics, scores, id_outputs)


def _try(detectors: Sequence[Detector], outputs: Outputs, left_out: dict[str, str] | None) -> None:
    """Let each detector say what it lacks in the outputs of one batch."""
    for detector in detectors:
        if detector.name in (left_out or ()):
            continue
        with _leaving_out(detector, left_out):
            if detector.linear_head:
                linear_head(outputs)
            if not detector.fits:
                detector.score(outputs)


def _checked(scores: Tensor, detector: str, name: str, count: int) -> Tensor:
    if scores.shape != (count,):
        raise ValueError(f"expected {count} scores {detector!r} of set {name!r}, got shape {tuple(scores.shape)}")
    if wrong := int((~scores.isfinite()).sum()):
        raise ValueError(f"{wrong} of {count} scores {detector!r} of set {name!r} are NaN or infinite")
    return scores
