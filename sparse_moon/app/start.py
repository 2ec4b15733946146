"""A run from its settings, wherever they come from: what the command line and :func:`sparse_moon.train` share."""

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from sparse_moon import files
from sparse_moon.app import run_folder
from sparse_moon.app.config import TrainConfig, config_of
from sparse_moon.app.experiment import WHERE, plain, run_name
from sparse_moon.app.own import NAMES, import_modules
from sparse_moon.app.presets import presets
from sparse_moon.app.settings_files import parse_settings
from sparse_moon.app.train import train as train_in
from sparse_moon.memory import keep_for_training
from sparse_moon.settings import is_import_path

# The others wait while the first process evaluates, for which NCCL's 10 minutes, or gloo's 30, may be too few.
_EVALUATION = timedelta(days=2)


def train(
    config: TrainConfig | Mapping[str, Any] | Path | str | None = None,
    *,
    out: Path | str | None = None,
    resume: bool = False,
    progress: bool = True,
    time_dense: bool = False,
    log: Collection[str] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Train, evaluate and report one run: what ``sparse-moon train`` does with the same settings, to the same bits.

    With several processes (``torchrun``) each of them calls this.

    Args:
        config: settings to begin with: a :class:`TrainConfig`, a mapping, a YAML file, or the name of a preset such as
            ``"moon-cifar10"``; by default the command line's defaults.
        out: the run's folder; by default in ``runs/``, named after the settings.
        resume: continue the run in ``out`` from its checkpoint, or begin it.
        progress: show a progress bar on a terminal and in a notebook, and elsewhere print a line an epoch.
        time_dense: in the end time steps of the network and of the same made dense, in turn.
        log: write the metrics of each epoch to ``metrics.csv`` (``"csv"``) or event files (``"tensorboard"``) as well.
        settings: single settings, with underscores: ``sparsity=0.95``; they precede those of ``config``. Modules that
            ``model``, ``method`` and ``reliability`` name are imported.

    Returns:
        What ``results.json`` holds: ``["id"]["accuracy"]``, ``["ood"][SET][SCORE]["auroc"]``, ``["sparsity"]``,
        ...; and ``"folder"``, where the run and its ``report.html`` are. Empty but in the first of several processes.

    Raises:
        ValueError: unknown settings, bad settings or data, or a folder that holds another run.
        OSError: the folder cannot be written.
    """
    content = _content(config) | settings  # of a TrainConfig all
    paths = [str(content[name]) for name in NAMES if is_import_path(content.get(name))]
    import_modules(paths)
    results, _, folder = start(
        config_of(content), out, given=content, resume=resume, progress=progress, time_dense=time_dense, log=log
    )
    return {**results, "folder": str(folder)} if results else {}


def start(
    config: TrainConfig, out: Path | str | None, *, given: Collection[str], resume: bool, progress: bool,
    time_dense: bool, log: Collection[str],
) -> tuple[dict[str, Any], TrainConfig, Path]:  # fmt: skip
    """Train a run in its folder, with the processes that ``torchrun`` started.

    Args:
        given: names of the settings that were asked for; where a run goes on, the others are its own.

    Returns:
        What ``results.json`` holds (empty but in the first of several processes), the run's settings, and its folder.
    """
    folder = Path(out or f"runs/{Path(config.dataset).stem}-{config.model}-{run_name(config)}")
    if resume:
        config = _resumed(config, folder, given)
    joins = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if joins:
        config = _join_processes(config)
    if config.device == "cpu":
        keep_for_training()
    results = train_in(config, folder, resume=resume, progress=progress, time_dense=time_dense, log=log)
    if joins:
        dist.barrier()  # none leaves while another still needs it
        dist.destroy_process_group()
    return results, config, folder


def _content(config: TrainConfig | Mapping[str, Any] | Path | str | None) -> dict[str, Any]:
    """Settings by name."""
    if config is None:
        return {}
    if isinstance(config, TrainConfig):
        content = config.to_dict()
        return content | content.pop("own", {})
    if isinstance(config, Mapping):
        return dict(config)
    path = Path(config)
    if config in presets() and not path.is_file():  # but perhaps the folder of its run
        path = presets()[str(config)]
    elif not path.exists():
        raise ValueError(f"{path} is neither a file nor one of the presets {', '.join(presets())}")
    try:
        content = parse_settings(files.read_text(path))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"the settings of {path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold settings by name, got {type(content).__name__}")
    return content


def _resumed(config: TrainConfig, folder: Path, given: Collection[str]) -> TrainConfig:
    """The run's own settings, if there is one, but for where it goes on; others that were asked for must be its own."""
    if (folder / run_folder.CONFIG).exists():
        content = files.read_json(folder / run_folder.CONFIG)
    elif (folder / run_folder.CHECKPOINT).exists():
        content = run_folder.read_checkpoint(folder)["config"]
    else:
        return config
    saved = TrainConfig.from_dict({**content, **{name: getattr(config, name) for name in WHERE if name in given}})
    all_asked, all_kept = ({**vars(settings), **settings.own} for settings in (config, saved))
    for name in given:
        asked, kept = all_asked.get(name), all_kept.get(name)
        if plain(asked) != plain(kept):
            raise ValueError(f"the run in {folder} has {name} {kept!r}, it cannot be resumed with {asked!r}")
    return saved


def _join_processes(config: TrainConfig) -> TrainConfig:
    """Join the process group that ``torchrun`` describes in the environment; the settings with its device."""
    cuda = config.device.startswith("cuda")
    if cuda:
        config = replace(config, device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        torch.cuda.set_device(config.device)  # or the barrier takes the first GPU in every process
    dist.init_process_group("nccl" if cuda else "gloo", timeout=_EVALUATION)
    return config
