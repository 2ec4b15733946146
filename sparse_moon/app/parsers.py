"""What parses options: jsonargparse, told of the texts that settings take.

Nothing else imports it, so that networks can be built and trained where it is not installed.
"""

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import register_type

from sparse_moon.app.names import ScoreWithOptions
from sparse_moon.settings import ImportPath, LibraryModel

__all__ = ["ArgumentError", "ArgumentParser", "Namespace"]

for kind in (ImportPath, LibraryModel, ScoreWithOptions):
    register_type(kind)
