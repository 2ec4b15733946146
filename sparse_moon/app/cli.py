"""The command line: ``sparse-moon train | compare | eval | flops | export | doctor``.

Here is what parses it, which must not take seconds to say what is wrong; ``sparse_moon.app.commands`` does the work.
"""

import os
import re
import signal
import sys
import threading
import traceback
import warnings
from argparse import BooleanOptionalAction
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml

import sparse_moon
from sparse_moon.allocation import Allocation
from sparse_moon.app.commands import COMMANDS
from sparse_moon.app.config import TrainConfig, own_options
from sparse_moon.app.messages import error_message, listing, one_line, parse_message, suggestion
from sparse_moon.app.names import Log, ModelName, Score
from sparse_moon.app.own import NAMES, import_modules, typed_paths
from sparse_moon.app.parsers import ArgumentParser
from sparse_moon.app.presets import presets
from sparse_moon.app.settings_files import parse_settings
from sparse_moon.app.sweep import parse_sweeps
from sparse_moon.options import MethodOptions, Refresh, ReliabilityOptions, TrainingMethod
from sparse_moon.settings import OR_IMPORT_PATH, ImportPath, LibraryModel, helps, is_import_path

# Headings of train's options in its help; the fields of TrainConfig below each.
_GROUPS = {
    "data": ("dataset", "data_root", "download", "image_size", "resize", "crops", "workers", "holdout", "ood"),
    "model": ("model", "width", "weights", "fuse", "recompute"),
    "sparsity": (
        "method", "sparsity", "pattern", "allocation", "selection", "exclude", "interval", "drop_fraction", "stop",
    ),
    "options of single topology methods": tuple(option.name for option in fields(MethodOptions)),
    "reliability": ("reliability", "without", *(option.name for option in fields(ReliabilityOptions))),
    "optimisation": (
        "epochs", "batch_size", "lr", "lr_end", "lr_until", "lr_milestones", "lr_gamma", "lr_warmup", "momentum",
        "weight_decay", "amp", "memory_format", "seed", "device", "capture",
    ),
    "output": ("headline", "score", "ece_bins", "diagnostics"),
}  # fmt: skip

# Settings that are lists.
_LISTS = ("ood", "score", "exclude", "without", "lr_milestones")

# What ``compare`` combines.
_COMBINED = {
    "method": "one or more of train's",
    "reliability": "one or more of train's; moon:-tuning or cigl:-mask-averaging leaves parts out",
    "sparsity": "one or more",
    "seed": "one or more",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 a run of several failed, 2 everything else that went wrong, 130 interrupted.

    What went wrong is one line on stderr; ``--traceback`` adds where.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in given if word in COMMANDS), None)
    program = f"sparse-moon {command}" if command else "sparse-moon"
    shown = warnings.showwarning
    warnings.showwarning = lambda message, *_: print(f"{program}: warning: {one_line(message)}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        with _ending_at_once(program):
            import_modules(typed_paths(given, ("method", "reliability")))  # whose options are parsed, too
            arguments = _parser(program, given).parse_args(_with_presets(given))
            if arguments.command == "compare":
                arguments.compare.sweep = parse_sweeps(arguments.compare.sweep or (), _own_options(given))
            run = import_module(f"sparse_moon.app.commands.{arguments.command}").run
        options = arguments[arguments.command]
        if arguments.command == "compare" or options.get("resume"):  # where runs may have settings of their own
            options.given = _given(program, given)
        else:
            options.given = ()
        models = [options.get("model"), *(options.get("sweep") or {}).get("model", ())]
        scores = (score.partition(":")[0] for score in options.get("score") or ())
        import_modules(filter(is_import_path, [*models, *scores]))
        with open(os.devnull, "w") as nothing, redirect_stdout(nothing if options.get("quiet") else sys.stdout):
            run(options)
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if "--traceback" in given:
            traceback.print_exc()
        print(f"{program}: error: {error_message(error)}", file=sys.stderr)
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


class _Parser(ArgumentParser):
    """A parser whose errors are one line that begins with ``program``."""

    program = "sparse-moon"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong with the arguments, and end with code 2."""
        parser = getattr(ex, "subcommand_parser", None) or self
        known = [option for action in parser._actions for option in action.option_strings]
        print(f"{self.program}: error: {parse_message(message, known)}", file=sys.stderr)
        sys.exit(2)


def _given(program: str, argv: Sequence[str]) -> list[str]:
    """The options of a command line, by name, apart from those that have their defaults."""
    arguments = _parser(program, argv).parse_args(_with_presets(list(argv)), defaults=False)
    names = {field.name for field in fields(TrainConfig)} | _own_options(argv).keys()
    return [name for name in vars(arguments[arguments.command]) if name in names]


def _with_presets(argv: list[str]) -> list[str]:
    """``--config`` with the path of a preset in place of its name; for ``compare`` with the settings themselves."""
    known, words = presets(), []
    for word in argv:
        words += word.split("=", 1) if word.startswith("--config=") else [word]
    for i, word in enumerate(words[:-1]):
        if word == "--config":
            path = Path(words[i + 1])
            path = known[words[i + 1]] if words[i + 1] in known and not path.is_file() else path
            if re.fullmatch(r"[\w./~-]+", words[i + 1]) and not path.exists():
                raise ValueError(f"{path} does not exist{suggestion(str(path), list(known))}")
            settings = _settings(path) if os.path.isfile(path) else None
            words[i + 1] = str(path) if settings is None or words[0] != "compare" else _settings_of_runs(settings)
    return words


def _settings(path: Path) -> dict[str, Any] | None:
    """Settings in a YAML file; None where there are none, of which the parser says what is wrong.

    Raises:
        ValueError: one that is set twice, or one that should be a list, of which the parser would not say which.
    """
    try:
        settings = parse_settings(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    except ValueError as error:
        raise ValueError(f"the settings of {path} cannot be read: {error}") from None
    if not isinstance(settings, dict):
        return None
    for name in _LISTS:
        if not isinstance(settings.get(name), list | None):
            raise ValueError(f"{name} must be a list, got {settings[name]!r}")
    return settings


def _settings_of_runs(settings: dict[str, Any]) -> str:
    """Settings of ``train`` as ``compare`` takes them: lists of what it combines."""
    without = "".join(f"-{part}" for part in settings.pop("without", None) or ())
    if without:
        settings["reliability"] = f"{settings.get('reliability', TrainConfig.reliability)}:{without}"
    single = {name: [settings[name]] for name in _COMBINED if not isinstance(settings.get(name, []), list)}
    return yaml.safe_dump({**settings, **single})


def _parser(program: str, argv: Sequence[str] = ()) -> _Parser:
    parser = _Parser(
        prog="sparse-moon",
        version=sparse_moon.__version__,
        allow_abbrev=False,
        description="Sparse training for models that know what they do not know.",
        epilog="sparse-moon COMMAND --help says more about a command.",
    )
    parser.program = program
    commands = parser.add_subcommands(dest="command")
    own = _own_options(argv)
    make: dict[str, Callable[[str], _Parser]] = {
        "train": partial(_train_parser, own=own), "compare": partial(_compare_parser, own=own), "eval": _eval_parser,
        "flops": partial(_flops_parser, own=own), "export": _export_parser,
        "doctor": _doctor_parser,
    }  # fmt: skip
    for name, summary in COMMANDS.items():
        one = make[name](summary[0].upper() + summary[1:] + ".")
        one.program = program
        one.add_argument("--traceback", action="store_true", help="where an error came from, for a report of a bug")
        commands.add_subcommand(name, one, help=summary)
    return parser


def _own_options(argv: Sequence[str]) -> dict[str, type]:
    """The options of methods of the user's own on a command line."""
    return own_options(typed_paths(argv, ["method"]), typed_paths(argv, ["reliability"]))


def _train_parser(description: str, own: Mapping[str, type]) -> _Parser:
    parser = _Parser(allow_abbrev=False, usage="sparse-moon train [OPTION ...]", description=description)
    parser.add_argument(
        "--config", action="config", help=f"YAML file of settings, or one of the presets: {', '.join(presets())}"
    )
    output = _add_settings(parser, own)
    output.add_argument("--out", type=str | None, default=None, help="run folder; default runs/ and the settings")
    output.add_argument(
        "--resume", action="store_true", help="continue the run in --out from its checkpoint, or begin it"
    )
    output.add_argument(
        "--time-dense", action="store_true",
        help="in the end time steps of the network and of the same made dense, in turn, and show which kernels ran",
    )  # fmt: skip
    _add_log(output)
    output.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    return parser


def _compare_parser(description: str, own: Mapping[str, type]) -> _Parser:
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
    combined.add_argument(
        "--sweep",
        action="append",
        type=str,
        metavar="NAME=VALUE,VALUE",
        help="values of another option, as final_weight=0.1,1,4 or model=mlp,resnet18; may be given again for another",
    )
    output = _add_settings(parser, own, leave_out={*_COMBINED, "without"})
    output.add_argument("--out", type=str, required=True, help="folder of the runs and of the table")
    output.add_argument("--jobs", type=int, default=1, help="runs at a time, each a process")
    output.add_argument("--table-only", action="store_true", help="train nothing, write the table of what there is")
    output.add_argument(
        "--evaluate", action="store_true", help="train nothing, evaluate all finished runs on --ood with --score"
    )
    _add_log(output)
    output.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    return parser


def _eval_parser(description: str) -> _Parser:
    parser = _Parser(allow_abbrev=False, description=description)
    scores = listing(get_args(Score))
    parser.add_argument("run", type=str, help="run folder")
    parser.add_argument("--ood", type=str, nargs="+", help="OOD sets, NAME or NAME=PATH; default the run's own")
    parser.add_argument(
        "--score", type=str, nargs="+", help=f"scores to compute, of {scores}{OR_IMPORT_PATH}, with options as in "
        "knn:k=200 or dice:p=0.7,score=msp; default all that fit the model",
    )  # fmt: skip
    _add_imports(parser)
    _add_data_root(parser)
    parser.add_argument("--device", type=str | None, default=None, help="default the run's own")
    parser.add_argument("--ece-bins", type=int | None, default=None, help="bins of the calibration errors")
    parser.add_argument("--save-detector", type=str | None, default=None, help="file to write the one --score to")
    parser.add_argument("--tpr", type=float, default=0.95, help="share of ID images that its threshold accepts")
    parser.add_argument("--json", action="store_true", help="print JSON, of all scores, instead of a table")
    return parser


def _flops_parser(description: str, own: Mapping[str, type]) -> _Parser:
    parser = _Parser(allow_abbrev=False, description=description)
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=ModelName | LibraryModel | ImportPath, default="resnet50", help="which network")
    model.add_argument("--width", type=int | None, default=None, help="its width, where it has one")
    model.add_argument("--input", type=str, default="3,224,224", help="channels, height and width of an image")
    model.add_argument("--classes", type=int, default=1000, help="number of classes")
    sparsity = parser.add_argument_group("sparsity")
    sparsity.add_argument("--sparsity", type=float, default=0.8, help="share of weights to leave out")
    sparsity.add_argument("--allocation", type=Allocation, default="erk", help="how it is spread over the layers")
    sparsity.add_argument("--pattern", type=str, default="unstructured", help="unstructured, vectorV or blockB")
    sparsity.add_argument("--exclude", type=str, nargs="+", help="layers to keep dense, by name with * and ?")
    training = parser.add_argument_group("training")
    training.add_argument(
        "--method", type=TrainingMethod | ImportPath, default=TrainConfig.method, help="how the topology changes"
    )
    training.add_argument("--interval", type=int, default=100, help="batches from topology update to update")
    training.add_argument("--stop", type=float, default=0.75, help="share of the training with updates")
    training.add_argument(
        "--reliability", type=ImportPath | None, default=None, help="your own reliability method, whose costs to add"
    )
    _add_options(training, MethodOptions, [option.name for option in fields(MethodOptions)])
    training.add_argument(
        "--drop-fraction", type=float, default=TrainConfig.drop_fraction, help=helps(TrainConfig)["drop_fraction"]
    )
    _add_own(training, own)
    training.add_argument("--examples", type=int, default=1_281_167, help="size of the training set")
    training.add_argument("--epochs", type=int, default=100, help="passes over it")
    training.add_argument("--batch-size", type=int, default=32, help="images a batch")
    training.add_argument("--refresh", type=Refresh, default="final", help="when batch norm is estimated anew")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _export_parser(description: str) -> _Parser:
    parser = _Parser(allow_abbrev=False, description=description)
    parser.add_argument("run", type=str, help="run folder")
    _add_imports(parser)
    _add_data_root(parser)
    parser.add_argument("--dense", type=str | None, default=None, help="file for a plain dense state dict (.pt)")
    parser.add_argument("--folder", type=str | None, default=None, help="folder for the sparse model, for sm.load")
    parser.add_argument("--onnx", type=str | None, default=None, help="file for the dense model in ONNX")
    parser.add_argument("--sparse-onnx", type=str | None, default=None, help="file for the sparse model in ONNX")
    return parser


def _doctor_parser(description: str) -> _Parser:
    parser = _Parser(allow_abbrev=False, description=description)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def _add_data_root(parser: _Parser) -> None:
    text = "folder of the named data sets, the run's own among them; default where it had them"
    parser.add_argument("--data-root", type=str | None, default=None, help=text)


def _add_log(group: Any) -> None:
    group.add_argument(
        "--log", type=Log, nargs="+",
        help="write the metrics of each epoch to metrics.csv (csv) or to event files (tensorboard) in the folder, too",
    )  # fmt: skip


def _add_imports(parser: ArgumentParser) -> None:
    for name in NAMES:
        parser.add_argument(
            f"--{name}", type=ImportPath | None, default=None, help=f"your own {name} if the run has one, to import it"
        )


def _add_settings(parser: ArgumentParser, own: Mapping[str, type], leave_out: Collection[str] = ()) -> Any:
    """One option a field of TrainConfig, in groups, and those of ``own``; the last group."""
    for title, names in _GROUPS.items():
        group = parser.add_argument_group(title)
        _add_options(group, TrainConfig, [name for name in names if name not in leave_out])
        if "reliability" in names and own:
            _add_own(parser.add_argument_group("options of your own methods"), own)
    return group


def _add_own(group: Any, own: Mapping[str, type]) -> None:
    for name, kind in own.items():
        _add_options(group, kind, [name])


def _add_options(group: Any, settings: type, names: Collection[str]) -> None:
    """Options of these fields of a dataclass, with their types, defaults and help."""
    text, hints = helps(settings), get_type_hints(settings)
    for name in names:
        flag = "--" + name.replace("_", "-")
        if name in _LISTS:
            group.add_argument(flag, type=float if name == "lr_milestones" else str, nargs="+", help=text[name])
        elif hints[name] in (bool, bool | None):
            on = getattr(settings, name)  # if it is not plainly off, there is --no-NAME
            action = "store_true" if on is False else BooleanOptionalAction
            group.add_argument(flag, action=action, default=on, help=text[name])
        else:
            group.add_argument(flag, type=hints[name], default=getattr(settings, name), help=text[name])
