"""What users name by import path, ``package.module.name``: models and detectors of their own.

Only what someone typed is imported, never what a file names: `import_modules` is for the command line, and the rest
looks up what has been imported.
"""

import os
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Any


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
