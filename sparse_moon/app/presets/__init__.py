"""Settings of the papers, as YAML files for ``sparse-moon train --config``."""

from importlib.resources import files
from pathlib import Path


def presets() -> dict[str, Path]:
    """The settings of the papers that the package brings, by name."""
    folder = Path(str(files("sparse_moon.app.presets")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
