"""A run's metrics for other programs: CSV and TensorBoard's event files, in the run's folder."""

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self, get_args

from sparse_moon import files
from sparse_moon.app.names import Log

CSV, TENSORBOARD = "metrics.csv", "tensorboard"


def check_kinds(kinds: Collection[str]) -> None:
    """Raise ``ValueError`` for a kind of log that is unknown, or whose package is not installed."""
    if unknown := sorted(set(kinds) - set(get_args(Log))):
        raise ValueError(f"log must be of {', '.join(get_args(Log))}, got {', '.join(unknown)}")
    if "tensorboard" in kinds and find_spec("tensorboard") is None:
        raise ValueError("log tensorboard needs the package tensorboard: pip install tensorboard")


class Logs:
    """What ``metrics.jsonl`` has of the whole network, in other forms.

    A context manager: event files are complete when it ends.

    Args:
        folder: of the run.
        kinds: of `Log`.

    Raises:
        ValueError: an unknown kind, or one whose package is not installed.
    """

    def __init__(self, folder: Path, kinds: Collection[str]) -> None:
        check_kinds(kinds)
        self.folder, self.kinds = folder, frozenset(kinds)
        self._open = ExitStack()
        self._events: Any = None
        self._written = 0  # epochs in the event file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def write(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Bring all logs up to date.

        Event files can only be added to: the first call removes those that are there and writes every epoch anew, so
        that a resumed run has each once.

        Args:
            history: a dictionary an epoch.
        """
        if "csv" in self.kinds:
            files.write_text(self.folder / CSV, _table(history))
        if "tensorboard" in self.kinds:
            self._add_events(history)

    def _add_events(self, history: Sequence[Mapping[str, Any]]) -> None:
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            for left in (self.folder / TENSORBOARD).glob("events.out.tfevents.*"):
                left.unlink()
            self._events = self._open.enter_context(SummaryWriter(str(self.folder / TENSORBOARD)))
        for row in history[self._written :]:
            for name, value in row.items():
                if name != "epoch" and value is not None and not isinstance(value, Mapping):
                    self._events.add_scalar(name, value, row["epoch"])
        self._written = len(history)
        self._events.flush()


def _table(history: Sequence[Mapping[str, Any]]) -> str:
    """A line an epoch; a column for each metric that any of them has, but for those of single layers."""
    text = io.StringIO()
    names = dict.fromkeys(name for row in history for name, value in row.items() if not isinstance(value, Mapping))
    writer = csv.DictWriter(text, list(names), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()
