"""A run's folder: what is in it, written so that nothing partial is ever read back as whole.

config.json     the settings                     metrics.jsonl   a line an epoch
checkpoint.pt   all state after the last epoch   results.json    figures of the finished run
scores.npz      its scores, image by image       report.html     the page to look at
"""

import json
import os
import pickle
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

try:
    import fcntl
except ImportError:  # not on Windows, where runs are not locked
    fcntl = None  # type: ignore[assignment]

CONFIG, METRICS, CHECKPOINT = "config.json", "metrics.jsonl", "checkpoint.pt"
RESULTS, SCORES, REPORT = "results.json", "scores.npz", "report.html"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends well, and vanishes otherwise."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other processes from writing a run there until the block ends.

    An empty folder vanishes again where the block raises.

    Raises:
        ValueError: another process is in such a block for the same folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if handle is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process is writing the run in {folder}") from None
            except OSError:  # a file system without locks
                pass
        yield
    except BaseException:
        with suppress(OSError):
            folder.rmdir()
        raise
    finally:
        if handle is not None:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file as a whole."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        ValueError: missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def write_metrics(folder: Path, history: list[dict[str, Any]]) -> None:
    """Replace the run's metrics by one line an epoch."""
    write_text(folder / METRICS, "".join(json.dumps(row) + "\n" for row in history))


def write_scores(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Replace the run's scores."""
    with replacing(folder / SCORES) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **dict(arrays))  # type: ignore[arg-type]


def read_scores(folder: Path) -> dict[str, np.ndarray]:
    """The run's scores.

    Raises:
        ValueError: missing or damaged.
    """
    path = folder / SCORES
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def write_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Replace the run's checkpoint."""
    with replacing(folder / CHECKPOINT) as temporary:
        torch.save(dict(state), temporary)


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """The run's checkpoint, on the CPU; loading executes no code.

    Raises:
        ValueError: missing, damaged, or not a checkpoint of this package.
    """
    path = folder / CHECKPOINT
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: the run has not finished an epoch") from None
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged or not a checkpoint: {error}") from None
    if not isinstance(state, dict) or not {"model", "config", "epoch"} <= state.keys():
        raise ValueError(f"{path} is not a checkpoint of sparse_moon")
    return state
