"""The command line: ``sparse-moon train | compare | eval | flops | export``."""

import inspect
import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields, replace
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
import torch.distributed as dist
import yaml
from jsonargparse import ArgumentParser, Namespace

from sparse_moon import compare, flops, models, runs
from sparse_moon.allocation import Allocation
from sparse_moon.config import START_SPARSITY, TrainConfig, parse_label
from sparse_moon.distributed import rank
from sparse_moon.evaluation import SCORES, FinishedRun, evaluate_model, fit_detector, load_run
from sparse_moon.inputs import load_ood_sets
from sparse_moon.memory import keep_freed_memory
from sparse_moon.nn import densify
from sparse_moon.ood import save_detector
from sparse_moon.train import train

# What ``compare`` combines.
_COMBINED = {
    "method": "one or more of train's",
    "reliability": "one or more of train's; moon:-tuning or cigl:-mask-averaging leaves parts out",
    "sparsity": "one or more",
    "seed": "one or more",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 a run of several failed, 2 wrong arguments, data or files, 130 interrupted."""
    parser = _parser()
    arguments = parser.parse_args(_with_presets(list(sys.argv[1:] if argv is None else argv)))
    command = arguments.command
    try:
        commands = {"train": _train, "compare": _compare, "eval": _eval, "flops": _flops, "export": _export}
        commands[command](arguments[command])
    except (ValueError, OSError) as error:
        print(f"sparse-moon {command}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"sparse-moon {command}: interrupted", file=sys.stderr)
        sys.exit(130)


def presets() -> dict[str, Path]:
    """The settings of the papers that the package brings, by name."""
    folder = Path(str(files("sparse_moon.presets")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _with_presets(argv: list[str]) -> list[str]:
    """``--config`` with the path of a preset in place of its name; for ``compare`` with the settings themselves."""
    known = presets()
    for i, argument in enumerate(argv[:-1]):
        if argument == "--config":
            path = Path(argv[i + 1])
            path = known[argv[i + 1]] if argv[i + 1] in known and not path.exists() else path
            argv[i + 1] = _settings_of_runs(path) if argv[0] == "compare" and path.is_file() else str(path)
    return argv


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


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="sparse-moon",
        allow_abbrev=False,
        description="Sparse training for models that know what they do not know.",
    )
    commands = parser.add_subcommands(dest="command")

    train_parser = ArgumentParser(allow_abbrev=False, description="Train, evaluate and report one sparse model.")
    train_parser.add_argument(
        "--config", action="config", help=f"YAML file of settings, or one of the presets: {', '.join(presets())}"
    )
    _add_settings(train_parser)
    train_parser.add_argument("--out", type=str | None, default=None, help="run folder; default runs/ and the settings")
    train_parser.add_argument("--resume", action="store_true", help="continue the run in --out from its checkpoint")
    commands.add_subcommand("train", train_parser)

    commands.add_subcommand("compare", _compare_parser())

    eval_parser = ArgumentParser(
        allow_abbrev=False, description="Evaluate a finished run again, on other OOD sets or with other scores."
    )
    eval_parser.add_argument("run", type=str, help="run folder")
    eval_parser.add_argument("--ood", type=str, nargs="+", help="OOD sets, NAME or NAME=PATH; default the run's own")
    eval_parser.add_argument(
        "--score",
        type=str,
        nargs="+",
        help=f"scores to compute, of {', '.join(SCORES)}; default all that fit the model",
    )
    eval_parser.add_argument("--data-root", type=str | None, default=None, help="folder of the named data sets")
    eval_parser.add_argument("--device", type=str | None, default=None, help="default the run's own")
    eval_parser.add_argument("--save-detector", type=str | None, default=None, help="file to write the one --score to")
    eval_parser.add_argument("--tpr", type=float, default=0.95, help="share of ID images that its threshold accepts")
    eval_parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    commands.add_subcommand("eval", eval_parser)

    flops_parser = ArgumentParser(allow_abbrev=False, description="Count the FLOPs of a sparse model, layer by layer.")
    flops_parser.add_argument("--model", type=Literal[tuple(models.MODELS)], default="resnet50", help="which network")
    flops_parser.add_argument("--width", type=int | None, default=None, help="its width, where it has one")
    flops_parser.add_argument("--input", type=str, default="3,224,224", help="channels, height and width of an image")
    flops_parser.add_argument("--classes", type=int, default=1000, help="number of classes")
    flops_parser.add_argument("--sparsity", type=float, default=0.8, help="share of weights to leave out")
    flops_parser.add_argument("--allocation", type=Allocation, default="erk", help="how it is spread over the layers")
    flops_parser.add_argument("--pattern", type=str, default="unstructured", help="unstructured, vectorV or blockB")
    flops_parser.add_argument("--exclude", type=str, nargs="+", help="layers to keep dense, by name with * and ?")
    flops_parser.add_argument("--method", type=flops.TrainingMethod, default="rigl", help="training method")
    flops_parser.add_argument("--interval", type=int, default=100, help="batches from topology update to update")
    flops_parser.add_argument("--stop", type=float, default=0.75, help="share of the training with updates")
    flops_parser.add_argument("--start-sparsity", type=float | None, default=None, help="where gmp and granet start")
    flops_parser.add_argument("--forward-share", type=float, default=0.5, help="of top-kast's trained weights")
    flops_parser.add_argument("--examples", type=int, default=1_281_167, help="size of the training set")
    flops_parser.add_argument("--epochs", type=int, default=100, help="passes over it")
    flops_parser.add_argument("--batch-size", type=int, default=32, help="images a batch")
    flops_parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    commands.add_subcommand("flops", flops_parser)

    export_parser = ArgumentParser(
        allow_abbrev=False, description="Write a finished run's model as a plain dense PyTorch state dict."
    )
    export_parser.add_argument("run", type=str, help="run folder")
    export_parser.add_argument("--dense", type=str, required=True, help="file to write (.pt)")
    commands.add_subcommand("export", export_parser)
    return parser


def _compare_parser() -> ArgumentParser:
    parser = ArgumentParser(
        allow_abbrev=False,
        description="Train every combination of methods, reliability methods, sparsities and seeds, each in a folder "
        "of its own, and put their figures side by side. Finished runs are skipped, interrupted ones resumed.",
    )
    parser.add_argument("--config", action="config", help="as in train: settings of all runs")
    for name, text in _COMBINED.items():
        kind = {"sparsity": float, "seed": int}.get(name, str)
        parser.add_argument(f"--{name}", type=kind, nargs="+", default=[getattr(TrainConfig(), name)], help=text)
    _add_settings(parser, leave_out={*_COMBINED, "without"})
    parser.add_argument("--out", type=str, required=True, help="folder of the runs and of the table")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each a process")
    parser.add_argument("--table-only", action="store_true", help="train nothing, write the table of what there is")
    parser.add_argument(
        "--evaluate", action="store_true", help="train nothing, evaluate all finished runs on --ood with --score"
    )
    parser.add_argument("--score", type=str, nargs="+", help="with --evaluate: scores; default all that fit")
    return parser


def _add_settings(parser: ArgumentParser, leave_out: Collection[str] = ()) -> None:
    """One option a field of TrainConfig, with the help of its docstring."""
    text = inspect.getdoc(TrainConfig) or ""
    helps = dict(line.strip().split(": ", 1) for line in text.split("Args:\n")[1].splitlines())
    hints = get_type_hints(TrainConfig)
    for field in fields(TrainConfig):
        if field.name in leave_out:
            continue
        flag = "--" + field.name.replace("_", "-")
        if field.name in ("ood", "exclude", "without"):
            parser.add_argument(flag, type=str, nargs="+", help=helps[field.name])
        elif hints[field.name] is bool:
            parser.add_argument(flag, action="store_true", help=helps[field.name])
        else:
            parser.add_argument(flag, type=hints[field.name], default=field.default, help=helps[field.name])


def _settings(arguments: Mapping[str, Any]) -> TrainConfig:
    names = {field.name for field in fields(TrainConfig)}
    return TrainConfig.from_dict({name: value for name, value in arguments.items() if name in names})


def _train(arguments: Namespace) -> None:
    config = _settings(vars(arguments))
    default_out = f"runs/{Path(config.dataset).stem}-{config.model}-{compare.run_name(config)}"
    folder = Path(arguments.out or default_out)
    if arguments.resume:
        config = _resumed(config, folder)
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        config = _join_processes(config)
    if config.device == "cpu":
        keep_freed_memory()
    results = train(config, folder, resume=arguments.resume)
    if rank() == 0:
        print(format_results(results))
        print(f"\nreport: {folder / runs.REPORT}")
    if dist.is_initialized():
        dist.barrier()  # none leaves while another still needs it
        dist.destroy_process_group()


def _resumed(config: TrainConfig, folder: Path) -> TrainConfig:
    """The run's own settings; what was asked for besides must not contradict them."""
    saved = TrainConfig.from_dict(runs.read_json(folder / runs.CONFIG))
    default = TrainConfig()
    for field in fields(TrainConfig):
        asked, kept = getattr(config, field.name), getattr(saved, field.name)
        if asked != getattr(default, field.name) and asked != kept:
            raise ValueError(f"the run in {folder} has {field.name} {kept!r}, it cannot be resumed with {asked!r}")
    return saved


def _join_processes(config: TrainConfig) -> TrainConfig:
    """Join the process group that ``torchrun`` describes in the environment; the device of this process."""
    cuda = config.device.startswith("cuda")
    dist.init_process_group("nccl" if cuda else "gloo")
    return replace(config, device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}") if cuda else config


def _eval(arguments: Namespace) -> None:
    run = load_run(Path(arguments.run), device=arguments.device)
    if arguments.save_detector is not None:
        if len(arguments.score or ()) != 1:
            raise ValueError(f"--save-detector needs one --score, got {arguments.score or 'none'}")
        _save_detector(run, arguments.score[0], arguments.tpr, Path(arguments.save_detector))
    asked = {"ood": arguments.ood, "data_root": arguments.data_root}
    config = replace(run.config, **{name: value for name, value in asked.items() if value is not None})
    sets = load_ood_sets(config, run.dataset)
    figures, _ = evaluate_model(run.predictor, config, run.dataset, sets, arguments.score)
    print(json.dumps(figures, indent=2) if arguments.json else format_results(figures))


def _save_detector(run: FinishedRun, score: str, tpr: float, target: Path) -> None:
    if not target.parent.is_dir():
        raise ValueError(f"the folder {target.parent} does not exist")
    detector = fit_detector(score, run.predictor, run.config, run.dataset, tpr)
    save_detector(target, detector)
    images = "ID test images" if run.dataset.holdout is None else "ID images held out of training"
    print(
        f"wrote {target}: {score} with threshold {detector.threshold:.6g}, which {tpr:g} of the {images} reach",
        file=sys.stderr,
    )


def _compare(arguments: Namespace) -> None:
    folder = Path(arguments.out)
    if arguments.evaluate:
        compare.evaluate_again(folder, ood=arguments.ood, scores=arguments.score, device=arguments.device)
    elif arguments.score:
        raise ValueError("--score is for --evaluate")
    failed: list[str] = []
    if not (arguments.table_only or arguments.evaluate):
        if arguments.jobs < 1:
            raise ValueError(f"--jobs must be at least 1, got {arguments.jobs}")
        failed = compare.run_all(_combinations(arguments), folder, jobs=arguments.jobs)
    table = compare.write_table(folder)
    print(compare.format_markdown(table).partition("\n## ")[0])
    print(f"AUROC and FPR95 by score: {folder / compare.MARKDOWN}")
    if failed:
        print(f"sparse-moon compare: {len(failed)} runs failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


def _combinations(arguments: Namespace) -> list[TrainConfig]:
    configs = []
    for method, label in product(arguments.method, arguments.reliability):
        name, without = parse_label(label)
        for sparsity, seed in product(arguments.sparsity, arguments.seed):
            one = {"method": method, "reliability": name, "without": without, "seed": seed}
            one["sparsity"] = 0.0 if method == "dense" else sparsity  # so that dense runs are not repeated
            configs.append(_settings({**vars(arguments), **one}))
    return configs


def _flops(arguments: Namespace) -> None:
    try:
        channels, height, width = (int(n) for n in arguments.input.split(","))
    except ValueError:
        raise ValueError(f"--input must be channels,height,width such as 3,224,224, got {arguments.input!r}") from None
    if height != width:
        raise ValueError(f"--input must be square, got {height} x {width}")
    with torch.device("meta"):  # counting needs shapes, no memory
        model = models.build(
            arguments.model, arguments.classes, in_channels=channels, image_size=height, width=arguments.width
        )
    built = arguments.start_sparsity
    if built is None:
        built = START_SPARSITY.get(arguments.method)
    if arguments.method == "top-kast":
        built = 1.0 - (1.0 - arguments.sparsity) / arguments.forward_share
    report = flops.flops_report(
        model, (channels, height, width), sparsity=arguments.sparsity, allocation=arguments.allocation,
        pattern=arguments.pattern, exclude=arguments.exclude or (), method=arguments.method,
        interval=arguments.interval, update_fraction=arguments.stop, built_sparsity=built,
        num_classes=arguments.classes,
        examples=arguments.examples, epochs=arguments.epochs, batch_size=arguments.batch_size,
    )  # fmt: skip
    print(json.dumps(report, indent=2) if arguments.json else flops.format_report(report))


def _export(arguments: Namespace) -> None:
    target = Path(arguments.dense)
    if not target.parent.is_dir():
        raise ValueError(f"the folder {target.parent} does not exist")
    run = load_run(Path(arguments.run), device="cpu")
    config, dataset = run.config, run.dataset
    if config.averages_predictions or config.reliability == "generalized-odin":
        what = "several networks" if config.averages_predictions else "a cosine head"
        raise ValueError(f"a run with {config.label} ends with {what}, not with one plain {config.model}")
    channels, size, _ = dataset.train.shape
    content = {
        "model": config.model,
        "num_outputs": dataset.num_classes + config.unknown_unit,
        "in_channels": channels,
        "image_size": size,
        "width": config.width,
        "mean": dataset.mean,
        "std": dataset.std,
        "config": asdict(config),
        "state_dict": densify(run.network).state_dict(),
    }
    with runs.replacing(target) as temporary:
        torch.save(content, temporary)
    print(f"wrote {target}: state_dict of a plain {config.model}, load it with torch.load(..., weights_only=True)")


def format_results(results: dict[str, Any]) -> str:
    """ID and OOD figures as a table in plain text."""
    figures = results["id"]
    lines = [
        "in distribution   accuracy {accuracy:.4f}   ECE {ece:.4f} (classwise {classwise_ece:.4f}, "
        "adaptive {adaptive_ece:.4f})   NLL {nll:.4f}   Brier {brier:.4f}   AURC {aurc:.4f}".format(**figures)
    ]
    if "calibration" in results:
        lines.append(
            "temperature       {temperature:.3f} from held-out images: ECE {ece_before:.4f} -> {ece_after:.4f}   "
            "NLL {nll_before:.4f} -> {nll_after:.4f}".format(**results["calibration"])
        )
    if "sparsity" in results:
        memory, counts = results["memory"], results["flops"]
        lines.append(
            f"network           sparsity {results['sparsity']['actual']:.4f}   "
            f"forward FLOPs {counts['forward_sparse'] / counts['forward_dense']:.3f} x dense   "
            f"training FLOPs {counts['train_ratio']:.3f} x dense   "
            f"training memory {memory['ratio']:.3f} x dense   time {results['time_s']:.1f} s"
        )
    lines += ["", "out of distribution: AUROC, AUPR-in (ID positive), AUPR-out (OOD positive), OSCR (ID classified",
              "correctly), FPR95 = share of OOD taken for ID where 95 % of ID is kept; in %", ""]  # fmt: skip
    width = max([len(name) for name in results["ood"]], default=8) + 2
    wide = max([len(score) for scores in results["ood"].values() for score in scores], default=8) + 2
    lines.append(f"{'set':<{width}}{'score':<{wide}}{'AUROC':>8}{'FPR95':>8}{'AUPR-in':>9}{'AUPR-out':>10}{'OSCR':>8}")
    for name, scores in results["ood"].items():
        for score, m in scores.items():
            columns = {"auroc": 8, "fpr95": 8, "aupr_in": 9, "aupr_out": 10, "oscr": 8}
            row = "".join(f"{m[key]:>{space}.2%}" for key, space in columns.items()).replace("%", " ")
            lines.append(f"{name:<{width}}{score:<{wide}}{row}")
    return "\n".join(lines)
