"""Classes of a user's own, in files that exist for one test."""

import sys
from contextlib import contextmanager

import pytest

from sparse_moon.app.cli import main


@contextmanager
def own_files(folder, monkeypatch, registries, **texts):
    """These modules on the path, and forgotten afterwards, with what they registered."""
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    before = [dict(registry) for registry in registries]
    yield folder
    for registered, kept in zip(registries, before, strict=True):
        for name in registered.keys() - kept:
            del registered[name]
    for name in texts:
        sys.modules.pop(name, None)


def refused(capsys, *argv):
    """The one line with which the command line refuses these arguments."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.count("\n") == 1 and "should not happen" not in printed, printed
    return printed
