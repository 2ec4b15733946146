"""A clone's own folder is first on the path of programs started there, and has no kernels: the installed package has.

Importing this module makes a clone where nothing was compiled take its modules from the installation that it hides.
"""

import sys
import warnings
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent

try:
    VERSION = version("sparse_moon")
except PackageNotFoundError:  # a clone that nobody has installed
    VERSION = "0+unknown"


def is_source_tree() -> bool:
    """Whether the package is imported from a clone, and not from an installation."""
    return (PACKAGE.parent / "setup.py").is_file() and (PACKAGE.parent / "csrc").is_dir()


def hidden_installation() -> Path | None:
    """Folder of the package that would be imported if this one were not there."""
    path = [entry for entry in sys.path if Path(entry).resolve() != PACKAGE.parent]
    for finder in sys.meta_path:
        # editable installations of other clones have finders of their own
        spec = finder.find_spec("sparse_moon", path if finder is PathFinder else None)
        if spec is not None and spec.origin is not None and Path(spec.origin).resolve().parent != PACKAGE:
            return Path(spec.origin).resolve().parent
    return None


def _differs(installed: Path) -> bool:
    """Whether a module of the clone is not the installed one."""
    kernels = next((at for at in (installed / "kernels", installed.parent / "kernels") if at.is_dir()), installed)
    places = (PACKAGE, installed), (PACKAGE.parent / "kernels", kernels)  # beside the package in another clone
    pairs = [(path, ours / path.relative_to(source)) for source, ours in places for path in source.rglob("*.py")]
    return any(not there.is_file() or there.read_bytes() != path.read_bytes() for path, there in pairs)


def _use_installation() -> None:
    if not is_source_tree() or any(PACKAGE.glob("_C.*")):
        return
    installed = hidden_installation()
    if installed is None:
        return
    if _differs(installed):
        warnings.warn(
            f"the source tree {PACKAGE.parent} is not what is installed in {installed}, and the latter is used; "
            "run `pip install .` again, or `pip install -e .` to work on the source",
            stacklevel=2,
        )
    sys.modules["sparse_moon"].__path__[:] = [str(installed)]


_use_installation()
