"""A run's folder: what is in it, written so that nothing partial or damaged is ever read back as whole.

config.json     the settings                     metrics.jsonl   a line an epoch
checkpoint.pt   all state after the last epoch   results.json    figures of the finished run
scores.npz      its scores, image by image       report.html     the page to look at

Lines of metrics.jsonl carry a checksum of all before, too; for the others see :mod:`sparse_moon.files`.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sparse_moon.files import (
    CHECKSUM,
    add_digest,
    check_checksum,
    checksum_of,
    read_archive,
    read_checked_archive,
    read_text,
    replacing,
    write_archive,
    write_text,
)

try:
    import fcntl
except ImportError:  # not on Windows, where runs are not locked
    fcntl = None  # type: ignore[assignment]

CONFIG, METRICS, CHECKPOINT = "config.json", "metrics.jsonl", "checkpoint.pt"
RESULTS, SCORES, REPORT = "results.json", "scores.npz", "report.html"
FILES = (CONFIG, METRICS, CHECKPOINT, RESULTS, SCORES, REPORT)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other processes from writing a run there until the block ends.

    A folder that was made here vanishes again where the block raises and leaves it empty. What a killed process left
    half written is removed.

    Raises:
        ValueError: another process is in such a block for the same folder.
        OSError: it cannot be made, or is a link to nothing.
    """
    made, handle = _locked(folder)
    try:
        for name in FILES:
            for left in folder.glob(f".{name}.*{Path(name).suffix}"):
                left.unlink(missing_ok=True)
        yield
    except BaseException:
        if made:
            with suppress(OSError):  # not empty
                folder.rmdir()
        raise
    finally:
        if handle is not None:
            os.close(handle)


def _locked(folder: Path) -> tuple[bool, int | None]:
    """Make and lock the folder: whether it was made here, and the handle that holds the lock."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            folder.mkdir()
            made = True
        except FileExistsError:
            made = False
            if folder.is_symlink() and not folder.exists():
                raise FileNotFoundError(f"{folder} is a link to {folder.readlink()}, which does not exist") from None
        if fcntl is None:
            return made, None
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # its maker has failed and removed it
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ValueError(f"another process is writing the run in {folder}") from None
        except OSError:  # a file system without locks
            pass
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(folder)):
                return made, handle
        os.close(handle)  # removed by its maker between our opening and locking it


def write_metrics(folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Replace the run's metrics by one line an epoch."""
    lines, value = [], 0
    for row in history:
        checksum, value = checksum_of(row, value)
        lines.append(json.dumps({**row, CHECKSUM: checksum}) + "\n")
    write_text(folder / METRICS, "".join(lines))


def read_metrics(folder: Path, epochs: int | None = None) -> list[dict[str, Any]]:
    """The run's metrics, a dictionary an epoch.

    Args:
        epochs: how many there must be, where that is known.

    Raises:
        ValueError: missing or damaged.
    """
    path = folder / METRICS
    rows, value = [], 0
    for number, line in enumerate(read_text(path).splitlines(), 1):
        where = f"{path}, line {number},"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is damaged: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where} is damaged: expected an object, got {repr(row)[:60]}")
        row, value = check_checksum(row, where, value)
        rows.append(row)
    if not rows and epochs != 0:
        raise ValueError(f"{path} holds no epochs")
    if epochs is not None and len(rows) != epochs:
        raise ValueError(f"{path} is damaged: expected {epochs} epochs, got {len(rows)}")
    return rows


def write_scores(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Replace the run's scores."""
    with replacing(folder / SCORES) as temporary:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **dict(arrays))  # type: ignore[arg-type]
        add_digest(temporary)


def read_scores(folder: Path) -> dict[str, np.ndarray]:
    """The run's scores.

    Raises:
        ValueError: missing or damaged.
    """

    def load(file: BinaryIO) -> dict[str, np.ndarray]:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}

    return read_checked_archive(folder / SCORES, "is damaged", load)


def write_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Replace the run's checkpoint."""
    write_archive(folder / CHECKPOINT, state)


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """The run's checkpoint, on the CPU; loading executes no code.

    Raises:
        ValueError: missing, damaged, or not a checkpoint of this package.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        reason = "it was removed since" if (folder / RESULTS).exists() else "the run has not finished an epoch"
        raise ValueError(f"{path} does not exist: {reason}")
    state = read_archive(path, "a checkpoint")
    kinds = {"model": dict, "config": dict, "epoch": int, "finished": bool}
    if not isinstance(state, dict) or not all(isinstance(state.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"{path} is not a checkpoint of sparse_moon")
    return state


def is_finished(folder: Path, state: Mapping[str, Any] | None = None) -> bool:
    """Whether the run has its results and its last checkpoint, which may have been removed since to save space.

    Args:
        state: what the checkpoint holds, where it has been read.
    """
    if not (folder / RESULTS).exists():
        return False
    if state is None and (folder / CHECKPOINT).exists():
        state = read_checkpoint(folder)
    return state is None or bool(state["finished"])
