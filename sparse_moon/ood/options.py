"""Detectors as text has them: ``knn``, ``knn:k=200``, ``odin:temperature=1,eps=0``, ``dice:p=0.7,score=msp``.

Options are the arguments of the constructor, by their names; the detector that a `Shaping` goes before is ``score``.
"""

from collections.abc import Mapping, Sequence
from inspect import signature
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sparse_moon.ood.detector import Detector
from sparse_moon.ood.registry import detector_class

_READ = {int: (int, "an integer"), float: (float, "a number"), str: (str, "a text")}


def parse_score(text: str) -> tuple[str, dict[str, str]]:
    """Name or import path of a detector, and its options, from ``NAME`` or ``NAME:OPTION=VALUE,OPTION=VALUE``.

    Raises:
        ValueError: another form, or an option that is named twice.
    """
    name, colon, rest = text.partition(":")
    options: dict[str, str] = {}
    for part in rest.split(",") if colon else ():
        option, equals, value = (word.strip() for word in part.partition("="))
        if not (option and equals and value):
            raise ValueError(f"expected a score as NAME or NAME:OPTION=VALUE,OPTION=VALUE, got {text!r}")
        if option in options:
            raise ValueError(f"the score {text!r} has the option {option!r} twice")
        options[option] = value
    return name, options


def score_name(text: str) -> str:
    """What the detector of a text is called: the same text without spaces.

    Raises:
        ValueError: as `parse_score`.
    """
    return _with_options(*parse_score(text))


def _with_options(name: str, options: Mapping[str, str]) -> str:
    given = ",".join(f"{option}={value}" for option, value in options.items())
    return f"{name}:{given}" if given else name


def check_score(text: str) -> None:
    """Raise ``ValueError`` unless `make_detector` knows the score and its options, as far as K does not matter."""
    name, options = parse_score(text)
    kind = detector_class(name)
    for option, value in options.items():
        _read(kind, option, value)


def make_detector(text: str, num_classes: int, *, std: Sequence[float] | None = None) -> Detector:
    """The detector that a text names, with its defaults but for the options that it gives.

    Args:
        text: see `parse_score`; the detector is called so, too, where it has options.
        num_classes: K.
        std: what each channel of the images was divided by, for detectors whose constructor has such an argument
            (`ODIN`).

    Raises:
        ValueError: an unknown score or option, or a value that the detector does not take.
    """
    name, options = parse_score(text)
    kind = detector_class(name)
    plain = kind.make(num_classes)
    given: dict[str, Any] = {}
    for option, value in options.items():
        parameter, read = _read(kind, option, value)
        given[parameter] = make_detector(read, num_classes) if parameter == "detector" else read
    if std is not None and "std" in signature(kind).parameters:
        given["std"] = std
    if not given:
        return plain
    # The constructors differ, check what they get, and keep it in attributes of the same names.
    make: Any = kind
    try:
        detector: Detector = make(**{name: getattr(plain, name) for name in signature(kind).parameters} | given)
    except ValueError as error:
        raise ValueError(f"the score {text!r}: {error}") from None
    if options:
        detector.name = _with_options(kind.name, options)
    return detector


def _read(kind: type[Detector], option: str, value: str) -> tuple[str, Any]:
    """The constructor's argument that an option is, and the value in its type; of ``detector`` the score's name."""
    hints = get_type_hints(kind.__init__)
    kinds = {name: _kinds(hints.get(name, NoneType)) for name in signature(kind).parameters if name != "num_classes"}
    parameters = {"score" if name == "detector" else name: name for name, taken in kinds.items() if taken}
    if option not in parameters:
        known = f"expected some of {', '.join(parameters)}" if parameters else "it has none"
        raise ValueError(f"unknown option {option!r} of the score {kind.name}, {known}")
    parameter = parameters[option]
    if parameter == "detector":
        check_score(value)
        return parameter, value
    taken = kinds[parameter]
    for one in taken:
        if one not in _READ and value == one:
            return parameter, one
        if one in _READ:
            try:
                return parameter, _READ[one][0](value)
            except ValueError:
                continue
    expected = " or ".join(_READ[one][1] if one in _READ else str(one) for one in taken)
    raise ValueError(f"{option} of the score {kind.name} must be {expected}, got {value!r}")


def _kinds(hint: Any) -> list[Any]:
    """What text can be read as for this type: int, float, str, the words of a ``Literal``, or a detector's name."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return [kind for part in get_args(hint) for kind in _kinds(part)]
    return [hint] if hint in _READ or (isinstance(hint, type) and issubclass(hint, Detector)) else []
