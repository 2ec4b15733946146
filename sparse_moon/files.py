"""Files that are written as a whole, and of which damage is noticed when they are read.

JSON objects carry a ``checksum`` of the rest, archives (of torch and NumPy) end with a digest of the rest. Files
without, as one writes by hand, are read as well.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

CHECKSUM = "checksum"
_DIGEST = b"sha256:"
_DIGEST_SIZE = len(_DIGEST) + 64  # in hexadecimal
_END_SIZE = 22  # of a zip archive's last record, without its comment


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends well, and vanishes otherwise.

    The file is on the disk before it takes the place, and the place before the block ends, so that a crash of the
    machine leaves the old file or the new one.

    Raises:
        OSError: it cannot be written; its ``filename`` is ``path``, also where the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
    temporary.touch(exist_ok=False)  # mkstemp would make it for its owner alone
    try:
        mode = temporary.stat().st_mode  # by the umask, which only a new file tells without a change of it
        yield temporary
        temporary.chmod(mode)  # safetensors puts a file of its own in the place
        _to_disk(temporary)
        os.replace(temporary, path)
        _to_disk(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary)):  # None of a write
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
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


def write_text(path: Path, text: str, *, errors: str = "strict") -> None:
    """Replace a text file as a whole, in UTF-8; ``errors`` is that of ``str.encode``."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file by this object and its checksum."""
    write_text(path, json.dumps({**content, CHECKSUM: checksum_of(content)[0]}, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Content of a JSON file, without the checksum.

    Raises:
        ValueError: missing, damaged, or changed without its checksum.
    """
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return check_checksum(content, str(path))[0] if isinstance(content, dict) else content


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def checksum_of(content: Mapping[str, Any], before: int = 0) -> tuple[str, int]:
    """Checksum of an object, following on from that of others."""
    value = zlib.crc32(json.dumps(content).encode(), before)
    return f"crc32:{value:08x}", value


def check_checksum(content: dict[str, Any], where: str, before: int = 0) -> tuple[dict[str, Any], int]:
    """The object without its checksum, which must be right where there is one, and its value."""
    rest = {key: value for key, value in content.items() if key != CHECKSUM}
    expected, value = checksum_of(rest, before)
    found = content.get(CHECKSUM)
    # a checksum under another name has been one, before its name was damaged
    misnamed = any(isinstance(value, str) and value.startswith("crc32:") for value in rest.values())
    if misnamed or found not in (None, expected):
        raise ValueError(f"{where} is damaged: its checksum is {expected}, not {found}; drop it if the change is yours")
    return rest, value


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
        add_digest(temporary)


def add_digest(path: Path) -> None:
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
    return read_checked_archive(path, problem, lambda file: torch.load(file, map_location="cpu", weights_only=True))


def read_checked_archive(path: Path, problem: str, load: Callable[[BinaryIO], Any]) -> Any:
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
