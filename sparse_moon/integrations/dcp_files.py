"""Files of ``torch.distributed.checkpoint`` (DCP) that are read without executing code.

DCP unpickles what its folders hold besides tensors, the ``.metadata`` and all numbers and texts, so that a folder of
somebody else could run whatever it wants.
"""

import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem, WriteItem

_DCP = "torch.distributed.checkpoint"
_CLASSES = {  # by their modules: all of them hold data only
    f"{_DCP}.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}.filesystem": {"_StorageInfo"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
}  # fmt: skip


class CheckingPlanner(DefaultSavePlanner):
    """Writes nothing that :class:`SafePlanner` refuses."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        content = super().transform_object(write_item, object)
        if isinstance(content, BytesIO):
            content.seek(0)
            try:
                torch.load(content, weights_only=True)
            except pickle.UnpicklingError as error:
                raise ValueError(
                    f"{write_item.index.fqn} is {object!r:.200}, which no checkpoint can hold: it would be read by "
                    f"executing code. {error}"
                ) from None
        return content


class SafePlanner(DefaultLoadPlanner):
    """Reads numbers, texts, tensors and containers of them, and what ``torch.serialization.add_safe_globals`` has."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        again = BytesIO()  # as DCP unpickles it in any case
        torch.save(torch.load(value, weights_only=True), again)
        again.seek(0)
        super().load_bytes(read_item, again)


class SafeReader(FileSystemReader):
    """Reads a folder of DCP.

    Raises:
        ValueError: metadata that cannot be read, or that are of something else.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        path = folder / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _Unpickler(file).load()
        except Exception as error:  # damage has no one kind of error
            raise ValueError(f"{path} cannot be read: {error}") from None
        if not isinstance(metadata, Metadata):
            raise ValueError(f"{path} has a {type(metadata).__name__}, not DCP's metadata")
        self._metadata = metadata

    def read_metadata(self) -> Metadata:  # those of one process alone, which are not written
        return self._metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        if name in _UNREAD:
            return _UNREAD[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could execute code")


# Of the folder's name and of a field that DCP no longer reads; neither function does anything.
_UNREAD = {
    "PosixPath": lambda *parts: None,
    "WindowsPath": lambda *parts: None,
    "_get_layout": lambda name: torch.strided,
}
