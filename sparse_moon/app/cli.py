"""The command line: ``sparse-moon train | compare | eval | flops | export``.

Here is what parses it, which must not take seconds to say what is wrong; ``sparse_moon.app.commands`` does the work.
"""

import difflib
import inspect
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser

import sparse_moon
from sparse_moon.allocation import Allocation
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.names import OR_IMPORT_PATH, ImportPath, ModelName, Score, TrainingMethod, is_import_path
from sparse_moon.app.own import import_modules

_COMMANDS = {
    "train": "train, evaluate and report one sparse model",
    "compare": "train every combination of settings and put their figures side by side",
    "eval": "evaluate a finished run again, on other OOD sets or with other scores",
    "flops": "count the FLOPs of a sparse model, layer by layer",
    "export": "write a finished run's model as a plain dense PyTorch state dict",
}

# Headings of train's options in its help; the fields of TrainConfig below each.
_GROUPS = {
    "data": ("dataset", "data_root", "download", "image_size", "holdout", "ood"),
    "model": ("model", "width", "fuse", "recompute"),
    "sparsity": ("method", "sparsity", "pattern", "allocation", "exclude", "interval", "drop_fraction", "stop"),
    "options of single topology methods": (
        "start_sparsity", "gradient_weight", "soft_memory_bound", "ablation_threshold", "forward_share",
    ),
    "reliability": (
        "reliability", "without", "final_weight", "warmup_epochs", "vote_from", "keep", "rescale", "label_smoothing",
        "mixup_alpha", "logit_temperature", "outlier_weight", "outliers_from", "samples", "tickets",
    ),
    "optimisation": (
        "epochs", "batch_size", "lr", "lr_end", "lr_until", "momentum", "weight_decay", "amp", "seed", "device",
    ),
    "output": ("headline",),
}  # fmt: skip

# What ``compare`` combines.
_COMBINED = {
    "method": "one or more of train's",
    "reliability": "one or more of train's; moon:-tuning or cigl:-mask-averaging leaves parts out",
    "sparsity": "one or more",
    "seed": "one or more",
}
_LONGEST_MESSAGE = 1000


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 a run of several failed, 2 everything else that went wrong, 130 interrupted.

    What went wrong is one line on stderr; ``--traceback`` adds where.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in given if word in _COMMANDS), None)
    program = f"sparse-moon {command}" if command else "sparse-moon"
    shown = warnings.showwarning
    warnings.showwarning = lambda message, *_: print(f"{program}: warning: {_one_line(message)}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        with _ending_at_once(program):
            arguments = _parser(program).parse_args(_with_presets(given))
            run = import_module(f"sparse_moon.app.commands.{arguments.command}").run
        options = arguments[arguments.command]
        import_modules(filter(is_import_path, [options.get("model"), *(options.get("score") or ())]))
        with open(os.devnull, "w") as nothing, redirect_stdout(nothing if options.get("quiet") else sys.stdout):
            run(options)
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if "--traceback" in given:
            traceback.print_exc()
        print(f"{program}: error: {_message(error)}", file=sys.stderr)
        _drop_stdout()
        sys.exit(2)
    finally:
        warnings.showwarning = shown


@contextmanager
def _ending_at_once(program: str) -> Iterator[None]:
    """In the block Ctrl-C ends the process with one line: imports make errors of their own of ``KeyboardInterrupt``."""

    def end(*_: Any) -> None:
        os.write(2, f"{program}: interrupted\n".encode())
        os._exit(130)

    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _drop_stdout() -> None:
    """Give up what could not be written, where nobody reads or a disk is full: Python would try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ValueError:  # closed
        pass


def _message(error: Exception) -> str:
    """An error in one line, in the words of the command line."""
    text = _in_options(_one_line(error))
    if isinstance(error, BrokenPipeError):
        return "nobody reads what is printed"
    if isinstance(error, MemoryError):
        return f"not enough memory: {text}" if text else "not enough memory"
    if isinstance(error, ValueError | OSError):
        return text
    if isinstance(error, RuntimeError):  # torch's, for lack of memory and for devices
        return text or type(error).__name__
    return f"{type(error).__name__}: {text} (this should not happen; --traceback shows where)"


def _one_line(message: object) -> str:
    text = " ".join(str(message).split())
    return text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + " ..."


def _in_options(text: str) -> str:
    """Settings that a message names, as options."""
    text = text.replace("pass download=True", "pass --download")
    for name in (field.name for field in fields(TrainConfig)):
        option = "--" + name.replace("_", "-")
        if "_" in name:
            text = re.sub(rf"(?<![\w/.'-]){name}(?![\w/.'=-])", option, text)
        text = re.sub(rf"^{name}(?= must )", option, text)
    return text


class _Parser(ArgumentParser):
    """A parser whose errors are one line that begins with ``program``."""

    program = "sparse-moon"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong with the arguments, and end with code 2."""
        parser = getattr(ex, "subcommand_parser", None) or self
        known = [option for action in parser._actions for option in action.option_strings]
        print(f"{self.program}: error: {_parse_message(message, known)}", file=sys.stderr)
        sys.exit(2)


_KINDS = {"int": "an integer", "float": "a number", "str": "a text", "bool": "true or false"}


def _parse_message(message: str, known: Sequence[str]) -> str:
    """jsonargparse's message in the words of the command line, with the options that were meant where it can be told.

    Args:
        known: options of the command.
    """
    text = _one_line(message)
    if found := re.match(r"unrecognized arguments: (.*)", text):
        options = [word.split("=")[0] for word in found[1].split() if word.startswith("-")]
        unknown = "; ".join(f"unknown option {option}{_suggestion(option, known)}" for option in options)
        return unknown or f"unexpected {found[1]}"
    if found := re.match(r"argument command: invalid choice: '(.*?)'", text):
        return f"unknown command {found[1]}, expected {_listing(_COMMANDS)}{_suggestion(found[1], list(_COMMANDS))}"
    if found := re.match(r"(?:Problems parsing config|Unexpected config): (.*)", text):
        return f"the settings of --config cannot be read: {found[1]}"
    if text.endswith("object is not iterable"):
        return "a setting of --config that takes a list has another value"
    if text.startswith('expected "command"'):
        return f"expected a command: {_listing(_COMMANDS)}"
    if found := re.match(r"the following arguments are required: (.*)", text):
        return f"missing: {re.sub(r'[a-z]+[.]([a-z_]+)', _as_argument, found[1])}"
    if found := re.match(r'Parser key "([\w.]+)"(?: element \d+)?: (.*)', text):
        option, rest = "--" + found[1].split(".")[-1].replace("_", "-"), found[2]
        value = re.search(r"(?:Got value|Given value): (.*)$", rest)
        kinds = [_KINDS[kind] for kind in re.findall(r"Expected an? <class '(\w+)'>", rest) if kind in _KINDS]
        if value and (choices := re.search(r"typing\.Literal\[(.*?)\]", rest)):
            names = re.findall(r"'(.*?)'", choices[1])
            own = OR_IMPORT_PATH * ("ImportPath" in rest)
            return f"{option} must be one of {_listing(names)}{own}, got {value[1]}{_suggestion(value[1], names)}"
        if value and kinds:
            return f"{option} must be {' or '.join(kinds)}, got {value[1]}"
        return f"{option}: {rest}"
    return text


def _as_argument(found: re.Match[str]) -> str:
    return "RUN" if found[1] == "run" else "--" + found[1].replace("_", "-")


def _listing(names: Collection[str]) -> str:
    return ", ".join(names)


def _suggestion(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def presets() -> dict[str, Path]:
    """The settings of the papers that the package brings, by name."""
    folder = Path(str(files("sparse_moon.app.presets")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _with_presets(argv: list[str]) -> list[str]:
    """``--config`` with the path of a preset in place of its name; for ``compare`` with the settings themselves."""
    known, words = presets(), []
    for word in argv:
        words += word.split("=", 1) if word.startswith("--config=") else [word]
    for i, word in enumerate(words[:-1]):
        if word == "--config":
            path = Path(words[i + 1])
            path = known[words[i + 1]] if words[i + 1] in known and not path.exists() else path
            if re.fullmatch(r"[\w./~-]+", words[i + 1]) and not path.exists():
                raise ValueError(f"{path} does not exist{_suggestion(str(path), list(known))}")
            words[i + 1] = _settings_of_runs(path) if words[0] == "compare" and path.is_file() else str(path)
    return words


def _settings_of_runs(path: Path) -> str:
    """Settings of ``train`` in a YAML file, as ``compare`` takes them: lists of what it combines."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        settings = None
    if not isinstance(settings, dict):
        return str(path)  # the parser says what is wrong with it
    without = "".join(f"-{part}" for part in settings.pop("without", None) or ())
    if without:
        settings["reliability"] = f"{settings.get('reliability', TrainConfig.reliability)}:{without}"
    single = {name: [settings[name]] for name in _COMBINED if not isinstance(settings.get(name, []), list)}
    return yaml.safe_dump({**settings, **single})


def _parser(program: str) -> _Parser:
    parser = _Parser(
        prog="sparse-moon",
        version=sparse_moon.__version__,
        allow_abbrev=False,
        description="Sparse training for models that know what they do not know.",
        epilog="sparse-moon COMMAND --help says more about a command.",
    )
    parser.program = program
    commands = parser.add_subcommands(dest="command")
    make = {
        "train": _train_parser, "compare": _compare_parser, "eval": _eval_parser, "flops": _flops_parser,
        "export": _export_parser,
    }  # fmt: skip
    for name, summary in _COMMANDS.items():
        one = make[name](summary[0].upper() + summary[1:] + ".")
        one.program = program
        one.add_argument("--traceback", action="store_true", help="where an error came from, for a report of a bug")
        commands.add_subcommand(name, one, help=summary)
    return parser


def _train_parser(description: str) -> _Parser:
    parser = _Parser(allow_abbrev=False, usage="sparse-moon train [OPTION ...]", description=description)
    parser.add_argument(
        "--config", action="config", help=f"YAML file of settings, or one of the presets: {', '.join(presets())}"
    )
    output = _add_settings(parser)
    output.add_argument("--out", type=str | None, default=None, help="run folder; default runs/ and the settings")
    output.add_argument(
        "--resume", action="store_true", help="continue the run in --out from its checkpoint, or begin it"
    )
    output.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    return parser


def _compare_parser(description: str) -> _Parser:
    parser = _Parser(
        allow_abbrev=False,
        usage="sparse-moon compare --out OUT [OPTION ...]",
        description=f"{description} Each run has a folder of its own; finished ones are skipped, interrupted resumed.",
    )
    parser.add_argument("--config", action="config", help="as in train: settings of all runs")
    combined = parser.add_argument_group("what is combined")
    for name, text in _COMBINED.items():
        kind = {"sparsity": float, "seed": int}.get(name, str)
        default = [getattr(TrainConfig, name)]
        combined.add_argument(f"--{name}", type=kind, nargs="+", default=default, help=text)
    output = _add_settings(parser, leave_out={*_COMBINED, "without"})
    output.add_argument("--out", type=str, required=True, help="folder of the runs and of the table")
    output.add_argument("--jobs", type=int, default=1, help="runs at a time, each a process")
    output.add_argument("--table-only", action="store_true", help="train nothing, write the table of what there is")
    output.add_argument(
        "--evaluate", action="store_true", help="train nothing, evaluate all finished runs on --ood with --score"
    )
    output.add_argument("--score", type=str, nargs="+", help="with --evaluate: scores; default all that fit")
    output.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    return parser


def _eval_parser(description: str) -> _Parser:
    parser = _Parser(allow_abbrev=False, description=description)
    scores = _listing(get_args(Score))
    parser.add_argument("run", type=str, help="run folder")
    parser.add_argument("--ood", type=str, nargs="+", help="OOD sets, NAME or NAME=PATH; default the run's own")
    parser.add_argument(
        "--score",
        type=str,
        nargs="+",
        help=f"scores to compute, of {scores}{OR_IMPORT_PATH}; default all that fit the model",
    )
    _add_own_model(parser)
    parser.add_argument("--data-root", type=str | None, default=None, help="folder of the named data sets")
    parser.add_argument("--device", type=str | None, default=None, help="default the run's own")
    parser.add_argument("--save-detector", type=str | None, default=None, help="file to write the one --score to")
    parser.add_argument("--tpr", type=float, default=0.95, help="share of ID images that its threshold accepts")
    parser.add_argument("--json", action="store_true", help="print JSON, of all scores, instead of a table")
    return parser


def _flops_parser(description: str) -> _Parser:
    parser = _Parser(allow_abbrev=False, description=description)
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=ModelName | ImportPath, default="resnet50", help="which network")
    model.add_argument("--width", type=int | None, default=None, help="its width, where it has one")
    model.add_argument("--input", type=str, default="3,224,224", help="channels, height and width of an image")
    model.add_argument("--classes", type=int, default=1000, help="number of classes")
    sparsity = parser.add_argument_group("sparsity")
    sparsity.add_argument("--sparsity", type=float, default=0.8, help="share of weights to leave out")
    sparsity.add_argument("--allocation", type=Allocation, default="erk", help="how it is spread over the layers")
    sparsity.add_argument("--pattern", type=str, default="unstructured", help="unstructured, vectorV or blockB")
    sparsity.add_argument("--exclude", type=str, nargs="+", help="layers to keep dense, by name with * and ?")
    training = parser.add_argument_group("training")
    training.add_argument("--method", type=TrainingMethod, default="rigl", help="training method")
    training.add_argument("--interval", type=int, default=100, help="batches from topology update to update")
    training.add_argument("--stop", type=float, default=0.75, help="share of the training with updates")
    training.add_argument("--start-sparsity", type=float | None, default=None, help="where gmp and granet start")
    training.add_argument("--forward-share", type=float, default=0.5, help="of top-kast's trained weights")
    training.add_argument("--examples", type=int, default=1_281_167, help="size of the training set")
    training.add_argument("--epochs", type=int, default=100, help="passes over it")
    training.add_argument("--batch-size", type=int, default=32, help="images a batch")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _export_parser(description: str) -> _Parser:
    parser = _Parser(allow_abbrev=False, description=description)
    parser.add_argument("run", type=str, help="run folder")
    _add_own_model(parser)
    parser.add_argument("--dense", type=str, required=True, help="file to write (.pt)")
    return parser


def _add_own_model(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=ImportPath | None, default=None, help="your own model if the run has one, to import its module"
    )


def _add_settings(parser: ArgumentParser, leave_out: Collection[str] = ()) -> Any:
    """One option a field of TrainConfig, with the help of its docstring, in groups; the last of them."""
    text = inspect.getdoc(TrainConfig) or ""
    helps = dict(line.strip().split(": ", 1) for line in text.split("Args:\n")[1].splitlines())
    hints = get_type_hints(TrainConfig)
    for title, names in _GROUPS.items():
        group = parser.add_argument_group(title)
        for name in (name for name in names if name not in leave_out):
            flag = "--" + name.replace("_", "-")
            if name in ("ood", "exclude", "without"):
                group.add_argument(flag, type=str, nargs="+", help=helps[name])
            elif hints[name] is bool:
                group.add_argument(flag, action="store_true", help=helps[name])
            else:
                group.add_argument(flag, type=hints[name], default=getattr(TrainConfig, name), help=helps[name])
    return group
