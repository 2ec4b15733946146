"""The compiled CPU extension, or None where it was not built."""

import importlib
import warnings
from types import ModuleType


def _load() -> ModuleType | None:
    try:
        return importlib.import_module("sparse_moon._C")
    except ImportError as error:
        warnings.warn(
            f"sparse_moon runs without its compiled CPU kernels ({error}); everything works on the slower reference "
            "path. Install a C++17 compiler and reinstall to build them.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


native = _load()
