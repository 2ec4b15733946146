"""A run of the command line: training, evaluation, and the run's folder."""

import math
import sys
import warnings
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from sparse_moon import files, flops
from sparse_moon.app import datasets, run_folder, run_record
from sparse_moon.app.build import autocast, emulates_amp, final_densities
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.environment import environment
from sparse_moon.app.evaluate import evaluate_model, scores_for
from sparse_moon.app.experiment import PLACE, WHERE
from sparse_moon.app.finished_runs import restore_scores
from sparse_moon.app.logs import Logs
from sparse_moon.app.progress import live_stream
from sparse_moon.app.report import write_report
from sparse_moon.app.run_data import load_dataset, load_ood_sets
from sparse_moon.app.step_times import beside_dense
from sparse_moon.app.trainer import Trainer
from sparse_moon.distributed import rank, world_size
from sparse_moon.nn import layer_sparsities, live_outputs, overall_sparsity, sparse_layers
from sparse_moon.nn.inspect import fan_ins
from sparse_moon.nn.what_runs import what_runs, what_would_pay
from sparse_moon.ood import KNN, make_detector


def train(
    config: TrainConfig, folder: Path, *, resume: bool = False, progress: bool = True, time_dense: bool = False,
    log: Collection[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Train, evaluate and report one run; returns what ``results.json`` holds.

    Args:
        folder: where the run is written; it must not hold another run unless ``resume``.
        resume: continue from the folder's checkpoint (from the start if there is none yet); the end is the same, bit
            for bit, as that of an uninterrupted run. A finished run stays as it is; files that were removed come back.
        progress: show a progress bar on a terminal and in a notebook, and elsewhere print a line an epoch.
        time_dense: after training, time a few steps of the network beside those of the same network made dense, on
            copies; of a finished run as well, whose results then gain them.
        log: what to write the metrics of each epoch to besides ``metrics.jsonl``: ``"csv"``, ``"tensorboard"``; of a
            finished run as well.

    Raises:
        ValueError: bad settings or data, a folder that holds a run or that another process writes to, a checkpoint
            that cannot be read or is of other settings, a loss that is not finite; ``time_dense`` of a dense run or
            with several processes; a log whose package is not installed. Earlier results stay intact.
        OSError: the folder cannot be written.
    """
    with Logs(folder, log) as logs, run_folder.only_writer(folder) if rank() == 0 else nullcontext():
        return _train(config, folder, resume=resume, progress=progress, time_dense=time_dense, logs=logs)


def _train(
    config: TrainConfig, folder: Path, *, resume: bool, progress: bool, time_dense: bool, logs: Logs
) -> dict[str, Any]:
    if time_dense and (not config.method_class.sparse or world_size() > 1):
        kind = f"method {config.method!r}" if world_size() == 1 else f"{world_size()} processes"
        raise ValueError(f"time_dense times a sparse network beside a dense one, in one process; got {kind}")
    if not resume and (folder / run_folder.CONFIG).exists():
        raise ValueError(f"{folder} holds a run already: continue it with --resume, or choose another --out")
    state = run_folder.read_checkpoint(folder) if resume and (folder / run_folder.CHECKPOINT).exists() else None
    if resume and run_folder.is_finished(folder, state):
        return _finished(config, folder, state, time_dense=time_dense, logs=logs)
    finished = state is not None and state["finished"]  # its results were removed
    if state is not None:
        _check_settings(config, TrainConfig.of_run(state["config"]))
    dataset = load_dataset(config)
    ood_sets = load_ood_sets(config, dataset)
    if config.headline not in scores_for(config):
        fitting = scores_for(replace(config, score=None))
        raise ValueError(f"headline must be a score that fits this run, {fitting}, got {config.headline!r}")
    # all, so that what is wrong with their options is said now
    headline, *_ = [make_detector(score, dataset.num_classes) for score in (config.headline, *(config.score or ()))]
    if isinstance(headline, KNN) and headline.k > (count := len(dataset.train)):
        raise ValueError(f"the headline {headline.name!r} needs {headline.k} training images or more, got {count}")
    if others := [score for score in config.score or () if score not in scores_for(config)]:
        warnings.warn(f"scores left out, which do not fit this run: {', '.join(others)}", stacklevel=2)
    trainer = Trainer(config, dataset, ood_sets)
    if state is not None:
        trainer.load_state_dict(state)
    main = rank() == 0
    if main and not finished:
        _say_what_is_slow(trainer)
    if main:
        files.write_json(folder / run_folder.CONFIG, config.to_dict())
        run_folder.write_metrics(folder, trainer.history)
        logs.write(trainer.history)

    done = trainer.epoch * len(trainer.batches)
    shown = progress and main
    stream = live_stream() if shown else None
    with tqdm(total=trainer.total_steps, initial=done, unit="batch", file=stream, disable=stream is None) as bar:
        while trainer.epoch < config.epochs:
            trainer.run_epoch(bar)
            if main:
                run_folder.write_checkpoint(folder, _checkpoint(trainer))
                run_folder.write_metrics(folder, trainer.history)
                logs.write(trainer.history)
            if shown and stream is None:
                print(_line(trainer), file=sys.stderr, flush=True)
    model = trainer.predictor() if finished else trainer.finish()
    return _results(trainer, model, ood_sets, folder, finished, time_dense) if main else {}


def _finished(
    config: TrainConfig, folder: Path, state: Mapping[str, Any] | None, *, time_dense: bool, logs: Logs
) -> dict[str, Any]:
    """The results of a finished run; what was removed or is asked for now is added to its folder, the rest stays.

    Without ``state``, as its checkpoint may be removed to save space, only the page can be added.
    """
    saved = files.read_json(folder / run_folder.CONFIG) if state is None else state["config"]
    _check_settings(config, TrainConfig.of_run(saved))
    if rank() > 0:
        return {}
    lacks = [name for name in run_folder.FILES if not (folder / name).exists()]
    results: dict[str, Any] = files.read_json(folder / run_folder.RESULTS)
    untimed = time_dense and "beside_dense" not in results.get("steps", {})
    if state is None:
        wanted = [name for name in lacks if name not in (run_folder.CHECKPOINT, run_folder.REPORT)]
        if wanted or untimed:
            raise ValueError(
                f"the run in {folder} is finished, and its {run_folder.CHECKPOINT} is gone: it lacks "
                f"{' and '.join([*wanted, *['the times beside a dense network'] * untimed])}, which need that file. "
                f"Without {run_folder.RESULTS} it is trained anew"
            )
        history = run_folder.read_metrics(folder, results.get("epochs"))
    else:
        history = state["history"]
        if run_folder.CONFIG in lacks:
            files.write_json(folder / run_folder.CONFIG, saved)
        if run_folder.METRICS in lacks:
            run_folder.write_metrics(folder, history)
        if run_folder.SCORES in lacks:
            restore_scores(folder, {name: getattr(config, name) for name in WHERE})
        if untimed:
            trainer = Trainer(replace(config, diagnostics=False), load_dataset(config))
            trainer.load_state_dict(state)
            results = {**results, "steps": {**_steps(trainer, time_dense), **results.get("steps", {})}}
            files.write_json(folder / run_folder.RESULTS, results)
    if untimed or run_folder.REPORT in lacks:
        write_report(folder, run_record.read_record(folder))
    logs.write(history)
    return results


def _check_settings(config: TrainConfig, saved: TrainConfig) -> None:
    """A run goes on with the settings that it began with; where it computes and finds its data may change."""
    for field in fields(TrainConfig):
        asked, kept = getattr(config, field.name), getattr(saved, field.name)
        if asked != kept and field.name not in PLACE:
            raise ValueError(f"the checkpoint does not fit this run: it has {field.name} {kept!r}, not {asked!r}")


def _line(trainer: Trainer) -> str:
    """The last epoch in a line of a log."""
    row = trainer.history[-1]
    return (
        f"epoch {row['epoch']}/{trainer.config.epochs}: loss {row['loss']:.4f}, accuracy {row['train_accuracy']:.4f}, "
        f"test accuracy {row['test_accuracy']:.4f}, {row['time_s']:.1f} s"
    )


def _zeros(trainer: Trainer) -> torch.Tensor:
    """As large as a batch of this process, of which few images make a smaller one than was asked for."""
    size = min(trainer.config.batch_size, len(trainer.dataset.train))
    return torch.zeros(size // world_size(), *trainer.dataset.train.shape, device=trainer.device)


def _say_what_is_slow(trainer: Trainer) -> None:
    """One warning each where mixed precision is emulated, and where no kernel of the device is faster than dense."""
    if emulates_amp(trainer.config):
        kind = trainer.config.amp
        warnings.warn(
            f"torch only emulates products of {kind} on this processor: layers that stay dense take many times as long "
            "as in float32, which --amp none trains in", stacklevel=2,
        )  # fmt: skip
    densities = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # building the network has said the same
        if trainer.method.resizes:
            densities = final_densities(trainer.config, trainer.dataset)
    with autocast(trainer.config):
        note = what_would_pay(trainer.model, _zeros(trainer), densities)
    if note is not None:
        warnings.warn(note, stacklevel=2)


def _steps(trainer: Trainer, time_dense: bool) -> dict[str, Any]:
    """``steps`` in ``results.json``: the median of the epochs' medians, which products ran on kernels in the end."""
    captured = bool(trainer.history) and trainer.history[-1].get("captured", False)
    with autocast(trainer.config):
        steps: dict[str, Any] = {"kernels": what_runs(trainer.model, _zeros(trainer)), "captured": captured}
    medians = [row["step_ms"] for row in trainer.history if "step_ms" in row]
    steps["median_ms"] = median(medians) if medians else math.nan
    if time_dense:
        batch = next(trainer.batches.epoch(0))
        steps["beside_dense"] = beside_dense(trainer.model, trainer.config, trainer.dataset, batch, captured=captured)
    return steps


def _fan_in_quantiles(model: nn.Module) -> dict[str, list[float]]:
    """By sparse layer the least, first tenth, median, ninth tenth and most of its outputs' shares of all inputs."""
    shares = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    layers = sparse_layers(model)
    return {
        name: (counts.double().cpu().quantile(shares) / layers[name].topology.shape[1]).tolist()
        for name, counts in fan_ins(model).items()
        if counts.numel()
    }


def _checkpoint(trainer: Trainer, *, finished: bool = False) -> dict[str, Any]:
    return {"config": trainer.config.to_dict(), "finished": finished, **trainer.state_dict()}


def _results(
    trainer: Trainer, model: nn.Module, ood_sets: Mapping[str, datasets.Images], folder: Path, finished: bool,
    time_dense: bool,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate the finished model; write what is made from it, and its checkpoint unless that is there."""
    config, dataset = trainer.config, trainer.dataset
    checkpoint = _checkpoint(trainer, finished=True)  # with the random state from which the model is evaluated
    figures, arrays = evaluate_model(model, config, dataset, ood_sets)
    results = {
        **figures,
        "sparsity": {
            "target": config.sparsity if config.method_class.sparse else 0.0,
            "actual": overall_sparsity(trainer.model),
            "layers": layer_sparsities(trainer.model),
            "live_outputs": live_outputs(trainer.model),
            "fan_in": _fan_in_quantiles(trainer.model),
        },
        "flops": trainer.flop_counts(),
        "memory": flops.memory_report(trainer.model, trainer.optimizer),
        "epochs": trainer.epoch,
        "time_s": sum(row["time_s"] for row in trainer.history),
        "steps": _steps(trainer, time_dense),
        "environment": environment(config.device),
    }
    if trainer.diagnostics is not None:
        results["diagnostics"] = trainer.diagnostics.figures()
    run_folder.write_scores(folder, arrays)
    files.write_json(folder / run_folder.RESULTS, results)
    write_report(folder, run_record.RunRecord(config.to_dict(), trainer.history, results, arrays))
    # last, because this checkpoint holds the finished model: a run killed before comes here again
    if not finished:
        run_folder.write_checkpoint(folder, checkpoint)
    return results
