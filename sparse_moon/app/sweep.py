"""Axes of a comparison beside method, reliability, sparsity and seed: ``--sweep NAME=VALUE,VALUE``."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, get_type_hints

from sparse_moon.app.config import TrainConfig
from sparse_moon.app.experiment import PLACE
from sparse_moon.app.messages import parse_message, suggestion
from sparse_moon.app.parsers import ArgumentError, ArgumentParser

_ELSEWHERE = {"without": "reliability (moon:-tuning)", **{name: name for name in ("method", "sparsity", "seed")}}
_ELSEWHERE["reliability"] = "reliability"


def parse_sweeps(texts: Iterable[str], own: Mapping[str, type]) -> dict[str, list[Any]]:
    """Values by name of a setting, each checked by the setting's own type.

    Args:
        texts: ``NAME=VALUE,VALUE``; a value that is itself a list is ``[A,B]``, none is ``null``.
        own: by name of an option of the user's own methods, the dataclass that has it.

    Raises:
        ValueError: a setting that is unknown, is no part of an experiment, has an option of its own for several values
            or stands there twice; no value, one twice, or one that is not of the setting's type.
    """
    hints = {name: hint for name, hint in get_type_hints(TrainConfig).items() if name != "own"}
    hints |= {name: get_type_hints(kind)[name] for name, kind in own.items()}
    found: dict[str, list[Any]] = {}
    for text in texts:
        word, equals, values = text.partition("=")
        name = word.strip().removeprefix("--").replace("-", "_")
        if not equals:
            raise ValueError(f"--sweep must be NAME=VALUE,VALUE, got {text!r}")
        _check_name(name, hints, found)
        found[name] = _parse_values(name, values, hints[name])
    return found


def _check_name(name: str, known: Collection[str], taken: Collection[str]) -> None:
    if name in _ELSEWHERE:
        raise ValueError(f"--sweep {name}: give its values to --{_ELSEWHERE[name]}")
    if name in PLACE:
        raise ValueError(f"--sweep {name}: runs that differ in {name} alone are the same experiment")
    if name not in known:
        swept = [one for one in known if one not in (*_ELSEWHERE, *PLACE)]
        meant = suggestion(name, swept) or ", see sparse-moon train --help"
        raise ValueError(f"--sweep {name}: train has no such option{meant}")
    if name in taken:
        raise ValueError(f"--sweep {name}: give all its values at once, as in {name}=1,2")


def _parse_values(name: str, text: str, hint: Any) -> list[Any]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{name}", type=list[hint])
    try:
        values = parser.parse_args([f"--{name}=[{text}]"])[name]
    except ArgumentError as error:
        raise ValueError(f"--sweep: {parse_message(str(error), ())}") from None
    if not values:
        raise ValueError(f"--sweep {name}: expected values, got none")
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ValueError(f"--sweep {name}: {value} stands there twice")
    return [str(value) if isinstance(value, str) else value for value in values]
