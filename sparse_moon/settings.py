"""What every setting of a run is: a field of a frozen dataclass, with a type, perhaps a bound, and a line of help.

    keep: Annotated[float, POSITIVE_SHARE] = 0.9

The help is the field's line below ``Args:`` in the docstring of its class.
"""

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

_LIBRARY_MODEL = r"^(timm|torchvision):[\w.-]+$"
_PATH = r"^[^\W\d]\w*(\.[^\W\d]\w*)+$"


class Text(str):
    """A text of a certain form, which is a regular expression; any other is a ``ValueError``."""

    form: ClassVar[str]

    def __new__(cls, text: str) -> "Text":
        """Check the text."""
        if not re.match(cls.form, text):
            raise ValueError(f"{text} does not match regular expression {cls.form}")
        return super().__new__(cls, text)


if TYPE_CHECKING:
    ImportPath = str
    LibraryModel = str
else:

    class ImportPath(Text):
        """Where something of the user's own is: ``package.module.name``."""

        form = _PATH

    class LibraryModel(Text):
        """A network of timm or torchvision: ``timm:NAME``, ``torchvision:NAME``."""

        form = _LIBRARY_MODEL


OR_LIBRARY = ", timm:NAME, torchvision:NAME"
"""What messages add to a list of names that a `LibraryModel` may take the place of."""

OR_IMPORT_PATH = " or your own as package.module.name"
"""What messages add to a list of names that an `ImportPath` may take the place of."""


def is_import_path(value: object) -> bool:
    """Whether ``value`` has the form of an `ImportPath`."""
    return isinstance(value, str) and re.match(_PATH, value) is not None


def is_library_model(value: object) -> bool:
    """Whether ``value`` has the form of a `LibraryModel`."""
    return isinstance(value, str) and re.match(_LIBRARY_MODEL, value) is not None


class Bound(NamedTuple):
    """What numbers a setting takes, beside its type in ``Annotated``."""

    text: str
    fits: Callable[[float], bool]


SHARE = Bound("in [0, 1]", lambda number: 0.0 <= number <= 1.0)
SHARE_BELOW_ONE = Bound("in [0, 1)", lambda number: 0.0 <= number < 1.0)
POSITIVE_SHARE = Bound("in (0, 1]", lambda number: 0.0 < number <= 1.0)
POSITIVE = Bound("positive", lambda number: number > 0.0)
AT_LEAST_0 = Bound("at least 0", lambda number: number >= 0)
AT_LEAST_1 = Bound("at least 1", lambda number: number >= 1)
ABOVE_1 = Bound("above 1", lambda number: number > 1)


@dataclass(frozen=True)
class NoOptions:
    """Of what has none."""


def check_settings(settings: Any) -> None:
    """Raise ``ValueError`` unless all fields of a dataclass have values of their types, finite and in their bounds."""
    hints = get_type_hints(type(settings), include_extras=True)
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    plain = get_type_hints(type(settings))
    for name, value in values.items():
        _check_type(name, value, plain[name])
    for name, value in values.items():
        for bound in _bounds(hints[name]):
            if value is not None and not bound.fits(value):
                raise ValueError(f"{name} must be {bound.text}, got {value}")


def _bounds(hint: Any) -> Iterator[Bound]:
    if get_origin(hint) is Annotated:
        yield from (extra for extra in hint.__metadata__ if isinstance(extra, Bound))
    elif get_origin(hint) in (Union, UnionType):
        for part in get_args(hint):
            yield from _bounds(part)


def _check_type(name: str, value: Any, hint: Any) -> None:
    expected = {bool: "true or false", int: "an integer", float: "a number", str: "a text", NoneType: "nothing"}
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    names = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
    if names:
        others = OR_LIBRARY * (LibraryModel in parts) + OR_IMPORT_PATH * (ImportPath in parts)
        absent = value is None and NoneType in parts
        if value not in names and not absent and not any(_has_form(part, value) for part in parts):
            raise ValueError(f"{name} must be one of {', '.join(names)}{others}, got {value!r}")
        return
    for part in parts:
        if get_origin(part) in (list, tuple):
            fits = isinstance(value, list | tuple) and all(_is_a(item, get_args(part)[0]) for item in value)
        else:
            fits = _is_a(value, part)
        if fits:
            return
    kinds = " or ".join(expected.get(part) or f"a list of {_ITEMS[get_args(part)[0]]}" for part in parts)
    raise ValueError(f"{name} must be {kinds}, got {value!r}")


def _has_form(kind: Any, value: object) -> bool:
    """Whether ``kind`` is a type of texts of a certain form, such as `ImportPath`, and ``value`` one of them."""
    if not (isinstance(kind, type) and issubclass(kind, str) and kind is not str and isinstance(value, str)):
        return False
    try:
        kind(value)
    except ValueError:
        return False
    return True


_ITEMS = {str: "texts", float: "numbers"}


def _is_a(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else get_origin(kind) or kind)


def helps(settings: type) -> dict[str, str]:
    """The line of help of each field, from the docstrings of a dataclass and of those that it inherits from."""
    found: dict[str, str] = {}
    for cls in reversed(settings.__mro__):
        text = inspect.cleandoc(vars(cls).get("__doc__") or "").partition("Args:\n")[2]
        pairs = (line.strip().partition(": ") for line in text.splitlines())
        found |= {name: line for name, _, line in pairs if line}
    return {field.name: found.get(field.name, "") for field in fields(settings)}


def options_of(kind: type, settings: Any, own: Mapping[str, Any]) -> Any:
    """Checked options: a ``kind``, with the values that ``settings``, whose fields may include them, or ``own`` has.

    Raises:
        ValueError: a value that is not of its type, or not in its bounds.
    """
    shared = {field.name for field in fields(settings)}
    names = [field.name for field in fields(kind)]
    found = {name: getattr(settings, name) for name in names if name in shared}
    options = kind(**found, **{name: own[name] for name in names if name in own and name not in shared})
    check_settings(options)
    return options
