"""``sparse-moon compare``."""

import sys
from collections.abc import Collection
from dataclasses import replace
from itertools import product
from pathlib import Path

from sparse_moon.app import compare, comparison
from sparse_moon.app.commands import settings
from sparse_moon.app.comparison_text import format_summary
from sparse_moon.app.config import TrainConfig, parse_label
from sparse_moon.app.experiment import WHERE
from sparse_moon.app.finished_runs import evaluate_again
from sparse_moon.app.own import NAMES
from sparse_moon.app.parsers import Namespace
from sparse_moon.settings import is_import_path


def run(arguments: Namespace) -> None:
    """Train what is missing, or evaluate again, and write the table."""
    folder = Path(arguments.out)
    if arguments.log and (arguments.evaluate or arguments.table_only):
        raise ValueError("--log is for training; without --table-only and --evaluate finished runs are logged, too")
    where = {name: arguments[name] for name in WHERE if name in arguments.given}
    failed: list[str] = []
    if arguments.table_only and not arguments.evaluate:
        _check_unread(arguments, {"headline"}, "--table-only writes the table of all finished runs, as they are")
    if arguments.evaluate:
        read = {*WHERE, "ood", "score", "headline"}
        _check_unread(arguments, read, "--evaluate evaluates all finished runs, with the settings that they have")
        failed = evaluate_again(folder, ood=arguments.ood, scores=arguments.score, where=where)
    if not (arguments.table_only or arguments.evaluate):
        if arguments.jobs < 1:
            raise ValueError(f"--jobs must be at least 1, got {arguments.jobs}")
        runs, log = _combinations(arguments), arguments.log or ()
        failed = compare.run_all(runs, folder, jobs=arguments.jobs, log=log, where=where)
    table = comparison.write_table(folder, headline=arguments.headline if "headline" in arguments.given else None)
    print(format_summary(table))
    print(f"AUROC and FPR95 by score: {folder / comparison.MARKDOWN}")
    if failed:
        print(f"sparse-moon compare: {len(failed)} runs failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


def _check_unread(arguments: Namespace, read: Collection[str], why: str) -> None:
    """Raise ``ValueError`` for options other than ``read`` and those that import, as finished runs have their own."""
    read = {*read, *(name for name in NAMES if _imports(arguments[name]))}
    unread = [name for name in arguments.given if name not in read]
    unread += ["sweep"] * bool(arguments.sweep) + ["jobs"] * (arguments.jobs != 1)
    if unread:
        raise ValueError(f"{why}: leave out {', '.join('--' + name.replace('_', '-') for name in unread)}")


def _imports(asked: str | list[str]) -> bool:
    """Whether these are import paths, which are given so that they are imported."""
    return all(is_import_path(parse_label(one)[0]) for one in ([asked] if isinstance(asked, str) else asked))


def _combinations(arguments: Namespace) -> list[TrainConfig]:
    configs, sweeps = [], arguments.sweep
    for method, label in product(arguments.method, arguments.reliability):
        name, without = parse_label(label)
        for sparsity, *values, seed in product(arguments.sparsity, *sweeps.values(), arguments.seed):
            one = {"method": method, "reliability": name, "without": without, "sparsity": sparsity, "seed": seed}
            swept = dict(zip(sweeps, values, strict=True))
            config = settings({**vars(arguments), **one, **swept})
            # so that dense runs are not repeated
            configs.append(config if config.method_class.sparse else replace(config, sparsity=0.0))
    return configs
