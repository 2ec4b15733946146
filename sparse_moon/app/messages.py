"""What the command line says of mistakes and failures: one line each, in its own words."""

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import fields

from sparse_moon.app.commands import COMMANDS
from sparse_moon.app.config import TrainConfig
from sparse_moon.settings import OR_IMPORT_PATH, OR_LIBRARY

_LONGEST_MESSAGE = 1000


def error_message(error: Exception) -> str:
    """An error in one line, in the words of the command line."""
    text = _in_options(one_line(error))
    if isinstance(error, BrokenPipeError):
        return "nobody reads what is printed"
    if isinstance(error, MemoryError):
        return f"not enough memory: {text}" if text else "not enough memory"
    if isinstance(error, ValueError | OSError):
        return text
    if isinstance(error, RuntimeError):  # torch's, for lack of memory and for devices
        return text or type(error).__name__
    return f"{type(error).__name__}: {text} (this should not happen; --traceback shows where)"


def one_line(message: object) -> str:
    """A message without line breaks, cut where it is very long."""
    text = " ".join(str(message).split())
    return text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + " ..."


def _in_options(text: str) -> str:
    """Settings that a message names, as options."""
    text = text.replace("pass download=True", "pass --download")
    for name in (*(field.name for field in fields(TrainConfig)), "examples"):  # the last is of flops
        option = "--" + name.replace("_", "-")
        if "_" in name:
            text = re.sub(rf"(?<![\w/.'-]){name}(?![\w/.'=-])", option, text)
        text = re.sub(rf"^{name}(?= must )", option, text)
    return text


_KINDS = {"int": "an integer", "float": "a number", "str": "a text", "bool": "true or false"}


def parse_message(message: str, known: Sequence[str]) -> str:
    """jsonargparse's message in the words of the command line, with the options that were meant where it can be told.

    Args:
        known: options of the command.
    """
    text = one_line(message)
    if found := re.match(r"unrecognized arguments: (.*)", text):
        options = [word.split("=")[0] for word in found[1].split() if word.startswith("-")]
        unknown = "; ".join(f"unknown option {option}{suggestion(option, known)}" for option in options)
        return unknown or f"unexpected {found[1]}"
    if found := re.match(r"argument command: invalid choice: '(.*?)'", text):
        return f"unknown command {found[1]}, expected {listing(COMMANDS)}{suggestion(found[1], list(COMMANDS))}"
    if found := re.match(r"(Problems parsing|Unexpected) config: (.*)", text):
        expected = "expected NAME: VALUE, got " if found[1] == "Unexpected" else ""
        return f"the settings of --config cannot be read: {expected}{found[2]}"
    if found := re.match(r"(?:Subcommand|Group) '.*?' does not accept option '(.*?)'", text):
        names = [option.lstrip("-").replace("-", "_") for option in known]
        return f"--config has an unknown setting {found[1]}{suggestion(found[1], names)}"
    if text.endswith(("object is not iterable", "object does not support item assignment")):
        return "a setting of --config that takes a list has another value"
    if text.startswith('expected "command"'):
        return f"expected a command: {listing(COMMANDS)}"
    if found := re.match(r"the following arguments are required: (.*)", text):
        return f"missing: {re.sub(r'[a-z]+[.]([a-z_]+)', _as_argument, found[1])}"
    if found := re.match(r'Parser key "([\w.]+)"(?: element \d+)?: (.*)', text):
        option, rest = "--" + found[1].split(".")[-1].replace("_", "-"), found[2]
        value = re.search(r"(?:Got value|Given value): (.*)$", rest)
        kinds = [_KINDS[kind] for kind in re.findall(r"Expected an? <class '(\w+)'>", rest) if kind in _KINDS]
        if value and (choices := re.search(r"typing\.Literal\[(.*?)\]", rest)):
            names = re.findall(r"'(.*?)'", choices[1])
            own = OR_LIBRARY * ("LibraryModel" in rest) + OR_IMPORT_PATH * ("ImportPath" in rest)
            return f"{option} must be one of {listing(names)}{own}, got {value[1]}{suggestion(value[1], names)}"
        if value and kinds:
            return f"{option} must be {' or '.join(kinds)}, got {value[1]}"
        return f"{option}: {rest}"
    return text


def _as_argument(found: re.Match[str]) -> str:
    return "RUN" if found[1] == "run" else "--" + found[1].replace("_", "-")


def listing(names: Collection[str]) -> str:
    """Names with commas."""
    return ", ".join(names)


def suggestion(word: str, known: Sequence[str]) -> str:
    """What was meant, where one of the known words is close."""
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {close[0]}?" if close else ""
