"""Sparse training that is really faster, for models that know what they do not know.

Public names are imported when they are first used (they stand in ``__init__.pyi``): ``import sparse_moon`` takes no
time, and the command line imports what a command needs.
"""

from importlib.metadata import PackageNotFoundError, version

import lazy_loader

import sparse_moon.source_tree  # noqa: F401 - first: decides where all other modules come from

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
try:
    __version__ = version(__name__)
except PackageNotFoundError:  # a clone that nobody has installed
    __version__ = "0+unknown"
