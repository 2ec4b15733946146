"""What the command line does: a module for each command, imported when it is asked for, with ``run(arguments)``."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from sparse_moon.app.config import TrainConfig, config_of, own_options
from sparse_moon.app.own import NAMES

COMMANDS = {
    "train": "train, evaluate and report one sparse model",
    "compare": "train every combination of settings and put their figures side by side",
    "eval": "evaluate a finished run again, on other OOD sets or with other scores",
    "flops": "count the FLOPs of a sparse model, layer by layer",
    "export": "write a finished run's model for use elsewhere: dense, sparse, ONNX",
    "doctor": "show what is installed, which kernels are built and what they are chosen by",
}


def check_own(arguments: Mapping[str, Any], config: TrainConfig) -> None:
    """Raise ``ValueError`` unless the model and the methods that were asked for, if any, are the run's."""
    for name in NAMES:
        asked, kept = arguments[name], getattr(config, name)
        if asked not in (None, kept):
            raise ValueError(f"the run has the {name} {kept}, got --{name} {asked}")


def settings(arguments: Mapping[str, Any]) -> TrainConfig:
    """The settings among a command's arguments."""
    names = {field.name for field in fields(TrainConfig)} | own_options(
        [arguments["method"]], [arguments["reliability"]]
    ).keys()
    return config_of({name: value for name, value in arguments.items() if name in names})
