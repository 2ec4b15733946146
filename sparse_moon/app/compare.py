"""Many runs side by side: train every combination, each in a folder of its own."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sparse_moon import files
from sparse_moon.app import run_folder
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.experiment import experiment, run_key, run_name, unlike_name, varying_settings
from sparse_moon.app.finished_runs import add_ood_sets, add_scores
from sparse_moon.app.logs import Logs, check_kinds
from sparse_moon.app.own import options_to_import

LOG = "log.txt"


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """SIGTERM raises ``SystemExit`` in the block, so that what has to be done at its end is done."""
    if threading.current_thread() is not threading.main_thread():  # where Python handles no signals
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Processes:
    """Processes of runs that threads start and wait for. Once they are told to end, no other starts.

    Args:
        jobs: how many may run at a time. They share the threads that one of them would have: with all of them each, two
            runs on two cores took three times as long a step as one after the other.
        options: of ``train``, besides those that the run's folder has.
    """

    def __init__(self, jobs: int, options: Sequence[str] = ()) -> None:
        self._variables = {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(torch.get_num_threads() // jobs, 1))}
        self._options = options
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._ending = False

    def run(self, folder: Path) -> int:
        """Run the one of this folder to its end: its exit code."""
        with self._lock:
            if self._ending:
                raise CancelledError
            process = _start(folder, self._options, self._variables)
            self._running.add(process)
        try:
            return process.wait()
        finally:
            with self._lock:
                self._running.discard(process)

    def end(self) -> None:
        with self._lock:
            self._ending = True
            for process in self._running:
                process.terminate()


@_exit_on_sigterm()
def run_all(
    configs: Iterable[TrainConfig], folder: Path, *, jobs: int = 1, log: Collection[str] = (),
    where: Mapping[str, Any] | None = None,
) -> list[str]:  # fmt: skip
    """Train each run in a folder of its own in ``folder``; skip finished ones, resume interrupted ones.

    A run that is there is known by its settings, whatever its folder is called, so that commands which differ in any
    setting fill one ``folder``, and the same one again trains nothing twice. A new run's folder is called after the
    settings in which the runs differ, with a checksum of all where another run has that name. OOD sets, and scores that
    are asked for by name, are evaluated where a finished run lacks them, because it was asked for without them.

    Each is a process of its own, ``jobs`` at a time; what it prints goes to ``log.txt`` in its folder. One that fails
    is reported and leaves the others alone, also where it is killed, which would break a pool of processes as a whole.

    Args:
        log: what each run writes its metrics to besides ``metrics.jsonl``, as in :func:`sparse_moon.train`; those that
            were finished before, too.
        where: settings that say where runs compute and find their data, such as ``device`` and ``data_root``, for those
            that are there as well, in place of their own.

    Returns:
        Names of the runs that failed.

    Raises:
        ValueError: settings in ``folder`` that cannot be read, or a log whose package is not installed.
    """
    check_kinds(log)
    runs = _place(list(configs), folder)
    failed: list[str] = []
    where = where or {}
    options = [word for name, value in where.items() for word in _option(name, value)]
    pool, processes = ThreadPoolExecutor(jobs), _Processes(jobs, [*options, *(["--log", *log] if log else ())])
    try:
        names = {pool.submit(_train, folder / name, processes, log): name for name in runs}
        for done, future in enumerate(as_completed(names), 1):
            finished, outcome = future.result()
            if not finished:
                failed.append(names[future])
            print(f"[{done}/{len(runs)}] {names[future]}: {outcome}", flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        processes.end()
        pool.shutdown()
    for name in [name for name in runs if name not in failed]:
        try:
            add_ood_sets(folder / name, runs[name], where)
            add_scores(folder / name, runs[name], where)
        except (OSError, ValueError) as error:
            print(f"{name}: FAILED to evaluate it again: {error}", flush=True)
            failed.append(name)
    return failed


def _place(configs: Sequence[TrainConfig], folder: Path) -> dict[str, TrainConfig]:
    """By the name of its folder each run, of which there is one with these settings now."""
    there = {path.name: _settings_in(path) for path in sorted(folder.glob("[!.]*/"))}
    found = {name: settings for name, settings in there.items() if settings is not None}
    known = {run_key(settings): name for name, settings in found.items()}
    asked = [config.to_dict() for config in configs]
    varying = varying_settings(map(experiment, [*found.values(), *asked]))
    placed: dict[str, TrainConfig] = {}
    for config, settings in zip(configs, asked, strict=True):
        key = run_key(settings)
        if key not in known:
            known[key] = _new_folder(folder, config, varying)
        placed.setdefault(known[key], config)
    return placed


def _settings_in(folder: Path) -> dict[str, Any] | None:
    """The settings of the run in this folder, or None where there is none."""
    path = folder / run_folder.CONFIG
    if path.exists():
        settings = files.read_json(path)
    elif (folder / run_folder.CHECKPOINT).exists():
        settings = run_folder.read_checkpoint(folder)["config"]
    else:
        return None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is damaged: expected an object, got {repr(settings)[:60]}")
    return settings


def _new_folder(folder: Path, config: TrainConfig, varying: Sequence[str]) -> str:
    """Make one for this run; returns its name."""
    names = (run_name(config, varying), unlike_name(config, varying))
    for name in names:
        if _prepare(folder / name, config):
            return name
        settings = _settings_in(folder / name)  # of the same run, where another process has made it since
        if settings is not None and run_key(settings) == run_key(config.to_dict()):
            return name
    raise ValueError(f"{' and '.join(names)} in {folder} hold something else: choose another --out")


def _prepare(folder: Path, config: TrainConfig) -> bool:
    """Make the folder of a run with its settings, both at once; returns whether nothing else was in its place."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True, exist_ok=True)  # a killed process may have left it
    try:
        files.write_json(temporary / run_folder.CONFIG, config.to_dict())
        temporary.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        return False
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def _train(folder: Path, processes: _Processes, log: Collection[str]) -> tuple[bool, str]:
    """Train a run unless that is done: whether it is finished now, and what came of it in words."""
    try:
        if run_folder.is_finished(folder):
            if log:
                with Logs(folder, log) as logs, run_folder.only_writer(folder):
                    logs.write(run_folder.read_metrics(folder))
            return True, "finished before"
        code = processes.run(folder)
        if code == 0 and run_folder.is_finished(folder):
            return True, _summary(files.read_json(folder / run_folder.RESULTS))
        return False, f"FAILED with code {code}: {_reason(folder)}"
    except (OSError, ValueError) as error:  # such as damaged files
        return False, f"FAILED: {error}"


def _start(folder: Path, options: Sequence[str], variables: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "sparse_moon", "train", "--resume", "--out", str(folder), *options]
    command += options_to_import(files.read_json(folder / run_folder.CONFIG))
    # this package, rather than one in the working folder: a checkout there has no compiled kernels
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)


def _option(name: str, value: Any) -> list[str]:
    """A setting as ``sparse-moon train`` takes it: it has no option for None, and none for no where that is usual."""
    word = name.replace("_", "-")
    if value is None or (value is False and getattr(TrainConfig, name) is False):
        return []
    return [f"--{word}" if value else f"--no-{word}"] if isinstance(value, bool) else [f"--{word}", str(value)]


def _summary(results: Mapping[str, Any]) -> str:
    return f"accuracy {results['id']['accuracy']:.4f}, ECE {results['id']['ece']:.4f}, {results['time_s']:.1f} s"


def _reason(folder: Path) -> str:
    """Why the run failed, by its log: the message of the command line, or the last line."""
    text = (folder / LOG).read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line for line in text.split("\n") if line.strip()]
    messages = [line for line in lines if ": error: " in line]
    return (messages or lines or ["it printed nothing"])[-1]
