"""What makes two runs the same experiment, and what experiments and their runs are called."""

import json
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from sparse_moon.app.config import TrainConfig
from sparse_moon.options import MethodOptions, ReliabilityOptions

NAMED = ("method", "reliability", "without", "sparsity")
"""Settings that every name of an experiment begins with."""

WHERE = ("device", "capture", "memory_format", "data_root", "download", "workers")
"""Where and how a run computes and finds its data, which may be elsewhere when it goes on."""

PLACE = (*WHERE, "ood", "headline", "score")
"""Settings that do not make two runs different: these, and what is looked at afterwards."""

OPTIONS = {field.name for kind in (MethodOptions, ReliabilityOptions) for field in fields(kind)}
"""Settings that some methods have and others do not."""

REFERENCE = "rigl none"
"""Method and label of the experiment with which others are compared first."""

_DEFAULTS = {field.name: field.default for field in fields(TrainConfig) if field.default is not MISSING}
_OF_SPARSE = ("sparsity", "pattern", "allocation", "selection", "exclude")
_LONGEST_NAME = 120


def experiment(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make a run what it is, but for its seed.

    Options of other methods than the run's, or of parts that it leaves out, make no difference, nor do those of sparse
    layers to a dense network, nor settings of updates to a method that has none, nor the order of ``without``.

    Args:
        settings: as ``config.json`` has them; those that it lacks have their defaults.
    """
    from sparse_moon.algorithms import ALGORITHMS
    from sparse_moon.reliability import RELIABILITY

    content = {**_DEFAULTS, **settings}
    if content["amp"] == "auto":
        content["amp"] = "bfloat16" if str(content["device"]).startswith("cuda") else "none"
    content["without"] = sorted(content["without"])
    own = content.pop("own", None) or {}
    method = _find(ALGORITHMS, content["method"])
    reliability = _find(RELIABILITY, content["reliability"])
    if method is not None and reliability is not None:
        options = {option.name: option for kind in (method, reliability) for option in fields(kind.Options)}
        content = {name: value for name, value in content.items() if name in options or name not in OPTIONS}
        content |= {name: option.default for name, option in options.items() if name not in content}
        unread = {option for part in content["without"] for option in reliability.options_of_parts.get(part, ())}
        content = {name: value for name, value in content.items() if name not in unread}
    left_out = {"seed", *PLACE}
    if method is not None:
        left_out |= {*method.unread, *(() if method.sparse else _OF_SPARSE)}
    return {name: plain(value) for name, value in {**content, **own}.items() if name not in left_out}


def _find(registry: Any, name: str) -> Any:
    """The class, or None where it is of a module that is not imported, or of another version."""
    try:
        return registry.find(name)
    except ValueError:
        return None


def plain(value: Any) -> Any:
    """A setting as JSON has it, with 1.0 and 1 the same."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def run_key(settings: Mapping[str, Any]) -> str:
    """The same text for the same experiment with the same seed, and only for that."""
    return json.dumps([experiment(settings), settings.get("seed", TrainConfig.seed)], sort_keys=True, default=str)


def run_name(config: TrainConfig, varying: Iterable[str] = ()) -> str:
    """Name of a run, with the settings in ``varying``: ``rigl-moon-without-tuning-0.95-final_weight=0.1-seed0``."""
    without = f"-without-{'-'.join(config.without)}" if config.without else ""
    sparsity = f"-{config.sparsity:g}" if config.method_class.sparse else ""
    others = "".join(f"-{word}" for word in setting_words(experiment(config.to_dict()), varying))
    others = re.sub(r"[^\w.,+=-]", "_", others)[:_LONGEST_NAME]
    return f"{config.method}-{config.reliability}{without}{sparsity}{others}-seed{config.seed}"


def unlike_name(config: TrainConfig, varying: Iterable[str] = ()) -> str:
    """:func:`run_name` with a checksum of all settings, for where another experiment has that name."""
    return f"{run_name(config, varying)}-{zlib.crc32(run_key(config.to_dict()).encode()):08x}"


def row_label(config: TrainConfig, varying: Iterable[str] = ()) -> str:
    """Name of an experiment, with the settings in ``varying``: ``rigl moon:-tuning 0.95 pattern=block8``."""
    sparsity = [f"{config.sparsity:g}"] if config.method_class.sparse else []
    return " ".join([config.method, config.label, *sparsity, *setting_words(experiment(config.to_dict()), varying)])


def setting_words(settings: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """``name=value`` of those of these settings that an experiment has."""
    return [f"{name}={setting_text(settings[name])}" for name in names if name in settings]


def setting_text(value: Any) -> str:
    """A setting's value in a name."""
    return "+".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def varying_settings(experiments: Iterable[Mapping[str, Any]]) -> list[str]:
    """Settings in which some of the experiments that have them differ, beside those that every name begins with."""
    values: dict[str, set[str]] = {}
    for settings in experiments:
        for name, value in settings.items():
            values.setdefault(name, set()).add(json.dumps(value, default=str))
    return [name for name, found in values.items() if name not in NAMED and len(found) > 1]
