"""A campaign of faults against a run's files: kills before file operations, damage, two writers, full disks.

    python tests/faults.py --kills 200 --damages 3000 --out faults.json

prints and writes how many trials there were and how many held. test_faults.py runs a short one.
"""

import argparse
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_moon import files
from sparse_moon.app import comparison, run_folder
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.evaluate import fit_detector, load_run
from sparse_moon.app.train import train
from sparse_moon.ood import load_detector, save_detector

BASE = TrainConfig(
    model="mlp", width=24, epochs=3, batch_size=256, interval=2, sparsity=0.8, lr=0.2, ood=["digits-8-9"]
)
CONFIGS = {
    "rigl moon": BASE,
    "dense none": replace(BASE, method="dense", reliability="none"),
    "set cigl": replace(BASE, method="set", reliability="cigl"),
    "granet mc-dropout": replace(BASE, method="granet", reliability="mc-dropout", samples=2),
    "mest sup-tickets": replace(BASE, method="mest", reliability="sup-tickets"),
    "top-kast cigl:-averaging": replace(BASE, method="top-kast", reliability="cigl", without=("averaging",)),
}
CHANGING = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.fsync", "torch.save"}


class Faults:
    """Counts what changes files, and ends the process before the operation with this number; None ends none."""

    def __init__(self, at: int | None) -> None:
        self.at, self.count = at, 0
        fsync, save = os.fsync, torch.save

        def half(content: Any, path: Path) -> None:
            save(content, path)
            if self.count == self.at:
                os.truncate(path, path.stat().st_size // 2)
            self.operation()

        def synced(handle: int) -> None:
            self.operation()
            fsync(handle)

        os.fsync, torch.save = synced, half  # neither of which Python announces
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in CHANGING:
            self.operation()

    def operation(self) -> None:
        self.count += 1
        if self.at is not None and self.count > self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def in_child(act: Callable[[], int]) -> int:
    """Exit code of a process that runs ``act``, minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 2)
            code = act()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def attempt(config: TrainConfig, folder: Path, at: int | None, report: Path | None = None) -> int:
    """Train or resume in another process, killed before this operation; how many there were goes to ``report``."""

    def act() -> int:
        faults = Faults(at)
        train(config, folder, resume=True, progress=False)
        if report is not None:
            report.write_text(str(faults.count))
        return 0

    return in_child(act)


def content(folder: Path) -> dict[str, Any]:
    """All that a run leaves, without times."""
    results = files.read_json(folder / run_folder.RESULTS)
    del results["time_s"], results["steps"]["median_ms"], results["environment"]
    times = ("time_s", "step_ms")
    metrics = [{k: v for k, v in row.items() if k not in times} for row in run_folder.read_metrics(folder)]
    checkpoint = run_folder.read_checkpoint(folder)
    checkpoint["history"] = metrics
    return {
        "names": sorted(path.name for path in folder.iterdir()), "config": files.read_json(folder / run_folder.CONFIG),
        "metrics": metrics, "results": results, "scores": run_folder.read_scores(folder), "checkpoint": checkpoint,
    }  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Whether two contents are the same, bit for bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.tobytes() == b.tobytes()
    return type(a) is type(b) and repr(a) == repr(b)


def kills(count: int, names: list[str], work: Path, rng: random.Random) -> dict[str, int]:
    """Runs that are killed once or twice and then finish: to be the same as one that is not."""
    tally = {"trials": 0, "held": 0, "killed": 0}
    for name in names:
        config = CONFIGS[name]
        whole = work / name.replace(" ", "-")
        assert attempt(config, whole, None, work / "count") == 0
        expected, operations = content(whole), int((work / "count").read_text())
        moments = range(operations) if count >= operations else sorted(rng.sample(range(operations), count))
        for at in moments:
            with tempfile.TemporaryDirectory(dir=work) as place:
                folder = Path(place) / "run"
                codes = [attempt(config, folder, at)]
                if rng.random() < 0.3:
                    codes.append(attempt(config, folder, rng.randrange(operations)))
                tally["killed"] += sum(code == -signal.SIGKILL for code in codes)
                last = attempt(config, folder, None)
                tally["trials"] += 1
                held = last == 0 and codes[0] == -signal.SIGKILL and same(content(folder), expected)
                tally["held"] += held
                if not held:
                    print(f"not held: {name}, killed before operation {at} of {operations}, {codes}", file=sys.stderr)
    return tally


def readers(folder: Path) -> dict[Path, Callable[[], Any]]:
    """What is read of each file of a run, of a detector and of a comparison."""
    run = load_run(folder)
    detector, table = folder.parent / "detector.pt", folder.parent / comparison.TABLE
    save_detector(detector, fit_detector("knn", run.predictor, run.config, run.dataset))
    files.write_json(table, {"near": [], "rows": [{"label": "a", "figures": {"accuracy": {"mean": 0.5, "std": None}}}]})
    epochs = run.config.epochs

    def learned() -> dict[str, Any]:
        read = load_detector(detector)
        return {"name": read.name, "threshold": read.threshold, "k": read.k, "bank": read.bank}

    return {
        folder / run_folder.CONFIG: lambda: files.read_json(folder / run_folder.CONFIG),
        folder / run_folder.METRICS: lambda: run_folder.read_metrics(folder, epochs),
        folder / run_folder.CHECKPOINT: lambda: run_folder.read_checkpoint(folder),
        folder / run_folder.RESULTS: lambda: files.read_json(folder / run_folder.RESULTS),
        folder / run_folder.SCORES: lambda: run_folder.read_scores(folder),
        detector: learned,
        table: lambda: files.read_json(table),
    }


def damages(count: int, folder: Path, rng: random.Random) -> dict[str, dict[str, int]]:
    """Flipped bits and truncations of every file: a ``ValueError`` with its name, or the same content."""
    tallies = {}
    for path, read in readers(folder).items():
        whole, expected = path.read_bytes(), read()
        tally = {"trials": 0, "held": 0, "refused": 0}
        for trial in range(count):
            damaged = bytearray(whole)
            if trial % 4 == 3:
                del damaged[rng.randrange(len(whole)) :]
            else:
                for _ in range(1 if trial % 4 else rng.randint(2, 20)):
                    damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            tally["trials"] += 1
            try:
                tally["held"] += same(read(), expected)
            except ValueError as error:
                tally["held"] += path.name in str(error)
                tally["refused"] += 1
            except Exception as error:
                print(f"not held: {path.name}: {error!r}", file=sys.stderr)
        path.write_bytes(whole)
        tallies[path.name] = tally
    return tallies


def two_writers(count: int, work: Path) -> dict[str, int]:
    """Pairs of processes that start the same run at once: one trains, the other is refused and changes nothing."""
    tally = {"trials": 0, "held": 0}
    config = replace(BASE, epochs=1)
    for trial in range(count):
        folder = work / f"pair{trial}" / "run"

        def act(folder: Path = folder) -> int:
            try:
                train(config, folder, progress=False)
            except ValueError:
                return 2
            return 0

        children = []
        start = time.monotonic() + 0.05
        for _ in range(2):
            child = os.fork()
            if child == 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                while time.monotonic() < start:
                    pass
                os._exit(act())
            children.append(child)
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        tally["trials"] += 1
        tally["held"] += codes == [0, 2] and content(folder)["checkpoint"]["finished"]
    return tally


def full_disks(count: int, work: Path, rng: random.Random) -> dict[str, int]:
    """No file may grow beyond a random size: an ``OSError`` that names it, and then the run goes on to the same end."""
    tally = {"trials": 0, "held": 0}
    whole = work / "roomy"
    assert attempt(BASE, whole, None) == 0
    expected = content(whole)
    largest = max(path.stat().st_size for path in whole.iterdir())
    for trial in range(count):
        folder = work / f"full{trial}" / "run"
        limit = rng.randrange(1, largest)

        def act(folder: Path = folder, limit: int = limit) -> int:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                train(BASE, folder, resume=True, progress=False)
            except OSError as error:
                return 2 if any(str(folder / name) in str(error) for name in os.listdir(whole)) else 3
            return 0

        tally["trials"] += 1
        refused = in_child(act) == 2
        tally["held"] += refused and attempt(BASE, folder, None) == 0 and same(content(folder), expected)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=0, help="moments a run is killed at, for each of the methods")
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="methods for --kills")
    parser.add_argument("--damages", type=int, default=0, help="damages to each file")
    parser.add_argument("--pairs", type=int, default=0, help="pairs of processes in one folder")
    parser.add_argument("--full-disks", type=int, default=0, help="runs with too little room")
    parser.add_argument("--seed", type=int, default=0, help="of what is chosen at random")
    parser.add_argument("--out", type=Path, help="file for the figures")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        figures["kills"] = kills(options.kills, options.configs, work, rng) if options.kills else {}
        if options.damages:
            train(BASE, work / "damaged" / "run", progress=False)
            figures["damages"] = damages(options.damages, work / "damaged" / "run", rng)
        figures["pairs"] = two_writers(options.pairs, work)
        figures["full disks"] = full_disks(options.full_disks, work, rng) if options.full_disks else {}
    print(json.dumps(figures, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
