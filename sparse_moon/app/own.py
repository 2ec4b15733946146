"""What users name by import path, ``package.module.name``: models, detectors and methods of their own.

Only what someone typed is imported, never what a file names: `import_modules` is for the command line, and the rest
looks up what has been imported.
"""

import os
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

from sparse_moon.settings import is_import_path

NAMES = ("model", "method", "reliability")
"""Settings of a run that may be an import path."""


def typed_paths(argv: Sequence[str], names: Collection[str]) -> list[str]:
    """Import paths among the values of these options on a command line, which is not parsed yet."""
    found, taken = [], False
    for word in argv:
        if word.startswith("--"):
            option, _, word = word.partition("=")
            taken = option[2:] in names
        path = word.partition(":-")[0]  # of a reliability method without some of its parts
        if taken and is_import_path(path):
            found.append(path)
    return found


def options_to_import(settings: Mapping[str, Any]) -> list[str]:
    """Options that name what a run's settings have from outside, so that another process may import it."""
    paths = [(name, settings.get(name)) for name in NAMES]
    return [word for name, path in paths if is_import_path(path) for word in (f"--{name}", str(path))]


def import_modules(paths: Iterable[str]) -> None:
    """Import the modules of these import paths, which may lie in the working folder.

    Raises:
        ValueError: one that is not there or fails.
    """
    for path in paths:
        if (folder := os.getcwd()) not in sys.path:
            sys.path.append(folder)  # the last, so that it hides nothing that is installed
        module = path.rpartition(".")[0]
        try:
            import_module(module)
        except Exception as error:  # it is the user's code
            raise ValueError(f"{path}: importing {module} failed: {type(error).__name__}: {error}") from error


def imported(path: str) -> Any:
    """What is at an import path, of a module that has been imported.

    Raises:
        ValueError: it has not, or has nothing of this name.
    """
    module, _, name = path.rpartition(".")
    if module not in sys.modules:
        raise ValueError(f"{path} is not imported: import {module} first, or pass it to the command line as --model")
    found = vars(sys.modules[module])
    if name not in found:
        raise ValueError(f"the module {module} has no {name}")
    return found[name]
