"""References in docstrings, ``:func:`sparse_moon.sparsify```, become links where the site has what they name."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?(?P<name>[\w.]+)`")


class Roles(griffe.Extension):
    """Runs over each object that has a docstring, once it is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda role: link(obj, role["name"]), obj.docstring.value)


def link(obj: griffe.Object, name: str) -> str:
    try:
        target = obj.resolve(name)
    except griffe.NameResolutionError:  # a full name
        target = name
    return f'<autoref optional identifier="{target}"><code>{name}</code></autoref>'
