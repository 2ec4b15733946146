"""``sparse-moon export``."""

import json
from pathlib import Path
from typing import Any

import torch

from sparse_moon import files
from sparse_moon.app.commands import check_own
from sparse_moon.app.evaluate import FinishedRun, load_run
from sparse_moon.app.parsers import Namespace
from sparse_moon.formats.saving import save
from sparse_moon.nn import densify

_DESCRIPTION = "preprocessing.json"


def run(arguments: Namespace) -> None:
    """Write a finished run's network in the forms that are asked for."""
    forms = (arguments.dense, arguments.folder, arguments.onnx, arguments.sparse_onnx)
    targets = [Path(form) for form in forms if form is not None]
    if not targets:
        raise ValueError("missing: --dense, --folder, --onnx or --sparse-onnx")
    for target in targets:
        if not target.parent.is_dir():
            raise ValueError(f"the folder {target.parent} does not exist")
    if len({target.resolve() for target in targets}) < len(targets):
        raise ValueError(f"each form needs a place of its own, got {', '.join(map(str, targets))}")
    if arguments.onnx or arguments.sparse_onnx:
        _check_onnx()
    finished = load_run(Path(arguments.run), device="cpu", data_root=arguments.data_root)
    check_own(vars(arguments), finished.config)
    network, name = finished.network, finished.config.model
    description = _description(finished)
    in_json = {name: v.tolist() if isinstance(v, torch.Tensor) else v for name, v in description.items()}
    if arguments.folder is not None:
        save(network, arguments.folder)
        files.write_json(Path(arguments.folder) / _DESCRIPTION, in_json)
        print(f"wrote {arguments.folder}: a sparse {name}, load it with sparse_moon.load")
    if arguments.onnx is not None:
        _write_onnx(network, arguments.onnx, in_json, sparse=False)
        print(f"wrote {arguments.onnx}: a plain {name} in ONNX")
    if arguments.sparse_onnx is not None:
        _write_onnx(network, arguments.sparse_onnx, in_json, sparse=True)
        print(f"wrote {arguments.sparse_onnx}: a sparse {name} in ONNX")
    if arguments.dense is not None:
        files.write_archive(Path(arguments.dense), {**description, "state_dict": densify(network).state_dict()})
        print(f"wrote {arguments.dense}: state_dict of a plain {name}, load it with torch.load(..., weights_only=True)")


def _description(finished: FinishedRun) -> dict[str, Any]:
    """How to make the network and what to feed it."""
    config, dataset = finished.config, finished.dataset
    reliability = config.make_reliability()
    if reliability.ends_with:
        raise ValueError(
            f"a run with {config.label} ends with {reliability.ends_with}, not with one plain {config.model}"
        )
    channels, size, _ = dataset.train.shape
    return {
        "model": config.model,
        "num_outputs": dataset.num_classes + reliability.unknown_output,
        "in_channels": channels,
        "image_size": size,
        "width": config.width,
        "mean": dataset.mean,
        "std": dataset.std,
        "config": config.to_dict(),
    }


def _check_onnx() -> None:
    try:
        import onnxscript  # noqa: F401 - an optional package
    except ImportError as error:
        raise ValueError(f"ONNX needs onnx and onnxscript ({error}): pip install 'sparse_moon[integrations]'") from None


def _write_onnx(network: torch.nn.Module, target: str, description: dict[str, Any], *, sparse: bool) -> None:
    from sparse_moon.formats.onnx import to_onnx  # only here, as it needs optional packages

    example = torch.zeros(2, description["in_channels"], description["image_size"], description["image_size"])
    batch = torch.export.Dim("batch")
    metadata = {name: json.dumps(value) for name, value in description.items()}
    to_onnx(network, (example,), target, sparse=sparse, dynamic_shapes=({0: batch},), metadata=metadata)
