"""Where a training shows how far it is in one line that is written over."""

import sys
from typing import TextIO


def live_stream() -> TextIO | None:
    """What shows such a line: stderr on a terminal, stdout below a notebook's cell; None where neither is looked at.

    A notebook's streams say that they are no terminal, but a carriage return works in them, without widgets.
    """
    if _in_a_notebook():
        return sys.stdout
    return sys.stderr if sys.stderr.isatty() else None


def _in_a_notebook() -> bool:
    ipython = sys.modules.get("IPython")  # in a notebook it is imported already
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config
