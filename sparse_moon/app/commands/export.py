"""``sparse-moon export``."""

from pathlib import Path

from jsonargparse import Namespace

from sparse_moon import files
from sparse_moon.app.commands import check_own
from sparse_moon.app.evaluate import load_run
from sparse_moon.nn import densify


def run(arguments: Namespace) -> None:
    """Write a finished run's network as a plain dense state dict."""
    target = Path(arguments.dense)
    if not target.parent.is_dir():
        raise ValueError(f"the folder {target.parent} does not exist")
    finished = load_run(Path(arguments.run), device="cpu")
    check_own(vars(arguments), finished.config)
    config, dataset = finished.config, finished.dataset
    reliability = config.make_reliability()
    if reliability.ends_with:
        raise ValueError(
            f"a run with {config.label} ends with {reliability.ends_with}, not with one plain {config.model}"
        )
    channels, size, _ = dataset.train.shape
    content = {
        "model": config.model,
        "num_outputs": dataset.num_classes + reliability.unknown_output,
        "in_channels": channels,
        "image_size": size,
        "width": config.width,
        "mean": dataset.mean,
        "std": dataset.std,
        "config": config.to_dict(),
        "state_dict": densify(finished.network).state_dict(),
    }
    files.write_archive(target, content)
    print(f"wrote {target}: state_dict of a plain {config.model}, load it with torch.load(..., weights_only=True)")
