"""Models on the Hugging Face Hub, and in folders as the Hub has them. Needs ``huggingface_hub``."""

from pathlib import Path
from typing import Any, Self

from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from torch import nn

from sparse_moon.formats.saving import load, save


class HubMixin(PyTorchModelHubMixin):
    """``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` for a model that may be sparse.

    ::

        class Net(nn.Module, HubMixin):
            def __init__(self, classes: int): ...

        sparsify(Net(10), 0.9).save_pretrained("folder")
        model = Net.from_pretrained("folder")

    A folder holds what :func:`sparse_moon.save` writes, beside the arguments of the constructor in ``config.json`` and
    the model card. Reading makes the model by its constructor and then does what :func:`sparse_moon.load` does, with
    the same errors; nothing that a file names is imported. The classes of ``huggingface_hub`` say what arguments there
    are; ``strict`` has no effect, as names and shapes must always fit.
    """

    def _save_pretrained(self, save_directory: Path) -> None:
        assert isinstance(self, nn.Module)
        save(self, save_directory)

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, revision: str | None, cache_dir: str | Path | None, force_download: bool,
        local_files_only: bool, token: str | bool | None, map_location: str = "cpu", strict: bool = False,
        **model_kwargs: Any,
    ) -> Self:  # fmt: skip
        folder = Path(model_id)
        if not folder.is_dir():
            folder = Path(snapshot_download(
                model_id, revision=revision, cache_dir=cache_dir, force_download=force_download, token=token,
                local_files_only=local_files_only, allow_patterns=["model.json", "model-*.safetensors"],
            ))  # fmt: skip
        model: Any = cls(**model_kwargs)
        return load(folder, model.to(map_location)).eval()  # type: ignore[return-value]
