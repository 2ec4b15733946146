"""Sparse training that is really faster, for models that know what they do not know.

Public names are imported when they are first used (they stand in ``__init__.pyi``): ``import sparse_moon`` takes no
time, and the command line imports what a command needs.
"""

import lazy_loader

from sparse_moon.source_tree import VERSION  # first: decides where all other modules come from

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = VERSION
