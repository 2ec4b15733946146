"""What the command line does: a module for each command, imported when it is asked for, with ``run(arguments)``."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from sparse_moon.app.config import TrainConfig


def check_model(asked: str | None, config: TrainConfig) -> None:
    """Raise ``ValueError`` unless the model that was asked for, if any, is the run's."""
    if asked not in (None, config.model):
        raise ValueError(f"the run has the model {config.model}, got --model {asked}")


def settings(arguments: Mapping[str, Any]) -> TrainConfig:
    """The settings among a command's arguments."""
    names = {field.name for field in fields(TrainConfig)}
    return TrainConfig.from_dict({name: value for name, value in arguments.items() if name in names})
