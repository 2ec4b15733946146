"""``sparse-moon train``."""

import os
from dataclasses import MISSING, fields, replace
from pathlib import Path

import torch.distributed as dist
from jsonargparse import Namespace

from sparse_moon import files
from sparse_moon.app import run_folder
from sparse_moon.app.commands import settings
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.experiment import run_name
from sparse_moon.app.tables import format_kernels, format_results
from sparse_moon.app.train import train
from sparse_moon.distributed import rank
from sparse_moon.memory import keep_freed_memory


def run(arguments: Namespace) -> None:
    """Train one run and print its figures."""
    config = settings(vars(arguments))
    default_out = f"runs/{Path(config.dataset).stem}-{config.model}-{run_name(config)}"
    folder = Path(arguments.out or default_out)
    if arguments.resume:
        config = _resumed(config, folder)
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        config = _join_processes(config)
    if config.device == "cpu":
        keep_freed_memory()
    results = train(
        config, folder, resume=arguments.resume, progress=not arguments.quiet, time_dense=arguments.time_dense
    )
    if rank() == 0:
        print(format_results(results, config))
        if arguments.time_dense:
            print(f"\n{format_kernels(results)}")
        print(f"\nall scores, figures and curves are in the report: {folder / run_folder.REPORT}")
    if dist.is_initialized():
        dist.barrier()  # none leaves while another still needs it
        dist.destroy_process_group()


def _resumed(config: TrainConfig, folder: Path) -> TrainConfig:
    """The run's own settings, if there is one; what was asked for besides must not contradict them."""
    if (folder / run_folder.CONFIG).exists():
        saved = TrainConfig.from_dict(files.read_json(folder / run_folder.CONFIG))
    elif (folder / run_folder.CHECKPOINT).exists():
        saved = TrainConfig.from_dict(run_folder.read_checkpoint(folder)["config"])
    else:
        return config
    for field in fields(TrainConfig):
        asked, kept = getattr(config, field.name), getattr(saved, field.name)
        default = {} if field.default is MISSING else field.default
        if asked not in (default, kept):
            raise ValueError(f"the run in {folder} has {field.name} {kept!r}, it cannot be resumed with {asked!r}")
    return saved


def _join_processes(config: TrainConfig) -> TrainConfig:
    """Join the process group that ``torchrun`` describes in the environment; the device of this process."""
    cuda = config.device.startswith("cuda")
    dist.init_process_group("nccl" if cuda else "gloo")
    return replace(config, device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}") if cuda else config
