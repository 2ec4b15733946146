"""A run's folder: what is in it, written so that nothing partial or damaged is ever read back as whole.

config.json     the settings                     metrics.jsonl   a line an epoch
checkpoint.pt   all state after the last epoch   results.json    figures of the finished run
scores.npz      its scores, image by image       report.html     the page to look at

JSON objects and the lines of metrics.jsonl carry a ``checksum`` of the rest, the two archives end with a digest of the
rest. Files without, as one writes by hand, are read as well.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

try:
    import fcntl
except ImportError:  # not on Windows, where runs are not locked
    fcntl = None  # type: ignore[assignment]

CONFIG, METRICS, CHECKPOINT = "config.json", "metrics.jsonl", "checkpoint.pt"
RESULTS, SCORES, REPORT = "results.json", "scores.npz", "report.html"
FILES = (CONFIG, METRICS, CHECKPOINT, RESULTS, SCORES, REPORT)

_CHECKSUM = "checksum"
_DIGEST = b"sha256:"
_DIGEST_SIZE = len(_DIGEST) + 64  # in hexadecimal
_END_SIZE = 22  # of a zip archive's last record, without its comment


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends well, and vanishes otherwise.

    The file is on the disk before it takes the place, and the place before the block ends, so that a crash of the
    machine leaves the old file or the new one.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        _to_disk(temporary)
        os.replace(temporary, path)
        _to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    if os.name == "nt" and path.is_dir():  # which has no handles of folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without it
            raise
    finally:
        os.close(handle)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other processes from writing a run there until the block ends.

    A folder that was made here vanishes again where the block raises and leaves it empty. What a killed process left
    half written is removed.

    Raises:
        ValueError: another process is in such a block for the same folder.
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


def write_text(path: Path, text: str, *, errors: str = "strict") -> None:
    """Replace a text file as a whole, in UTF-8; ``errors`` is that of ``str.encode``."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file by this object and its checksum."""
    write_text(path, json.dumps({**content, _CHECKSUM: _checksum(content)[0]}, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Content of a JSON file, without the checksum.

    Raises:
        ValueError: missing, damaged, or changed without its checksum.
    """
    try:
        content = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return _checked(content, str(path))[0] if isinstance(content, dict) else content


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _checksum(content: Mapping[str, Any], before: int = 0) -> tuple[str, int]:
    """Checksum of an object, following on from that of others."""
    value = zlib.crc32(json.dumps(content).encode(), before)
    return f"crc32:{value:08x}", value


def _checked(content: dict[str, Any], where: str, before: int = 0) -> tuple[dict[str, Any], int]:
    """The object without its checksum, which must be right where there is one, and its value."""
    rest = {key: value for key, value in content.items() if key != _CHECKSUM}
    expected, value = _checksum(rest, before)
    found = content.get(_CHECKSUM)
    # a checksum under another name has been one, before its name was damaged
    misnamed = any(isinstance(value, str) and value.startswith("crc32:") for value in rest.values())
    if misnamed or found not in (None, expected):
        raise ValueError(f"{where} is damaged: its checksum is {expected}, not {found}; drop it if the change is yours")
    return rest, value


def write_metrics(folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Replace the run's metrics by one line an epoch."""
    lines, value = [], 0
    for row in history:
        checksum, value = _checksum(row, value)
        lines.append(json.dumps({**row, _CHECKSUM: checksum}) + "\n")
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
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        where = f"{path}, line {number},"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is damaged: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where} is damaged: expected an object, got {repr(row)[:60]}")
        row, value = _checked(row, where, value)
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no epochs")
    if epochs is not None and len(rows) != epochs:
        raise ValueError(f"{path} is damaged: expected {epochs} epochs, got {len(rows)}")
    return rows


def write_scores(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Replace the run's scores."""
    with replacing(folder / SCORES) as temporary:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **dict(arrays))  # type: ignore[arg-type]
        _add_digest(temporary)


def read_scores(folder: Path) -> dict[str, np.ndarray]:
    """The run's scores.

    Raises:
        ValueError: missing or damaged.
    """

    def load(file: BinaryIO) -> dict[str, np.ndarray]:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}

    return _read_archive(folder / SCORES, "is damaged", load)


def write_archive(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file of tensors, numbers, strings and containers, that ``torch.load`` reads, as a whole.

    Raises:
        OSError: it cannot be written, as on a full disk.
    """
    with replacing(path) as temporary:
        try:
            torch.save(dict(content), temporary)
        except RuntimeError as error:  # of torch's own writer, which does not say why
            free = shutil.disk_usage(path.parent).free
            raise OSError(f"{path} cannot be written, {free:,} bytes are free: {_first_line(error)}") from None
        _add_digest(temporary)


def _add_digest(path: Path) -> None:
    """End a zip archive with a digest of all before, as its comment, which readers pass over."""
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)  # the length of the comment
        file.write(_DIGEST_SIZE.to_bytes(2, "little"))
        digest = _digest(file, file.tell())
        file.seek(0, os.SEEK_END)
        file.write(digest)


def _digest(file: BinaryIO, size: int) -> bytes:
    """Digest of the first ``size`` bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while size:
        part = file.read(min(size, 2**20))
        digest.update(part)
        size -= len(part)
    return _DIGEST + digest.hexdigest().encode()


def _check_archive(file: BinaryIO) -> None:
    """Raise ``ValueError`` if the archive is not what was written, by its digest or by its members' CRC without one."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - _DIGEST_SIZE - _END_SIZE, 0))
    tail = file.read()
    end, record = tail[-_DIGEST_SIZE - 2 :], tail.rfind(b"PK\5\6")
    if end[:2] == _DIGEST_SIZE.to_bytes(2, "little") or end[2:].startswith(_DIGEST):
        if end[2:] != _digest(file, max(size - _DIGEST_SIZE, 0)):
            raise ValueError("it does not have its digest")
    else:
        if record >= 0 and int.from_bytes(tail[record + 20 : record + 22], "little") != len(tail) - record - _END_SIZE:
            raise ValueError("it is cut off")  # in its comment, which zipfile allows
        with zipfile.ZipFile(file) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"the content of {damaged} does not have its CRC")
    file.seek(0)


def read_archive(path: Path, kind: str) -> Any:
    """Content of a file by :func:`write_archive`, on the CPU. Loading executes no code.

    Args:
        kind: what it should be, for messages: ``"a checkpoint"``.

    Raises:
        ValueError: missing, not readable, damaged in any bit that counts, or something else.
    """
    problem = f"is damaged or not {kind}"
    return _read_archive(path, problem, lambda file: torch.load(file, map_location="cpu", weights_only=True))


def _read_archive(path: Path, problem: str, load: Any) -> Any:
    """What ``load`` makes of a zip archive that is as it was written."""
    try:
        with path.open("rb") as file:
            _check_archive(file)
            return load(file)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except MemoryError:
        raise
    except Exception as error:  # damage has no one kind of error
        raise ValueError(f"{path} {problem}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
        raise ValueError(f"{path} does not exist: the run has not finished an epoch")
    state = read_archive(path, "a checkpoint")
    kinds = {"model": dict, "config": dict, "epoch": int, "finished": bool}
    if not isinstance(state, dict) or not all(isinstance(state.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"{path} is not a checkpoint of sparse_moon")
    return state
