"""Timing that can be believed: interleaved candidates in one process, medians, inputs rotated past the caches."""

import json
import os
import platform
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import sparse_moon.files
from sparse_moon.ops.cpu import emulated


def median_ms(
    candidates: Mapping[str, Callable[[int], Any]], device: torch.device, *, seconds: float, least: int = 5
) -> dict[str, float]:
    """Median time of each candidate in milliseconds.

    Args:
        candidates: functions of the repetition's number (to rotate inputs by); all run once a round, in turn.
        device: on CUDA, events around the call; on CPU, the clock.
        seconds: time to spend on each candidate, about; ``least`` rounds in any case, after a round of warm-up.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for name, run in candidates.items():
        run(0)  # the first call may allocate or compile
        times[name] = [_time_ms(run, 1, device)]
    slowest = max(t[0] for t in times.values())
    for round_ in range(max(least, min(200, round(1e3 * seconds / max(slowest, 1e-3))))):
        for name, run in candidates.items():
            times[name].append(_time_ms(run, round_, device))
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def _time_ms(run: Callable[[int], Any], round_: int, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run(round_)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    run(round_)
    return 1e3 * (time.perf_counter() - begin)


def graphed(run: Callable[[int], Any], repetitions: int) -> Callable[[int], Any]:
    """The work of this many repetitions on the GPU as one CUDA graph: replayed without what each costs the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made on first use must exist before the capture
        for i in range(min(repetitions, 3)):
            run(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(repetitions):
            run(i)
    return lambda _: graph.replay()


class TimeLimit(Exception):
    """What :func:`limit` raises."""


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise :class:`TimeLimit` in what lasts longer, as soon as Python runs again; at once where no time is left."""

    def stop(*_: Any) -> None:
        raise TimeLimit(f"it took more than {seconds:.0f} s")

    if seconds <= 0:
        raise TimeLimit("no time was left")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, min(seconds, 1e6))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def computes_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself; elsewhere torch emulates it, many times slower than fp32."""
    return device.type != "cpu" or not emulated(torch.bfloat16)


def ceilings(device: torch.device, *, seconds: float) -> dict[str, float]:
    """What the machine can do: matrix products in GFLOP/s, copy in GB/s (read and written bytes both count)."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    half_a, half_b = a.bfloat16(), b.bfloat16()
    source = torch.randn(2**26 if device.type == "cpu" else 2**30, device=device)
    target = torch.empty_like(source)
    candidates = {"fp32": lambda _: torch.mm(a, b), "copy": lambda _: target.copy_(source)}
    if computes_bf16(device):
        candidates["bf16"] = lambda _: torch.mm(half_a, half_b)
    times = median_ms(candidates, device, seconds=seconds)
    rates = {f"gflops_{name}": 2e-6 * n**3 / times[name] for name in times if name != "copy"}
    return {**rates, "copy_gb_per_s": 2e-6 * 4 * source.numel() / times["copy"]}


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions, commit and date, for the head of a results file."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return ""
        return done.stdout.strip()

    commit = os.environ.get("SPARSE_MOON_COMMIT")  # for a copy of the files without the repository
    if commit is None:
        commit = git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    info = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        backends = {"linear": torch.backends.cuda.matmul, "convolution": torch.backends.cudnn.conv}
        info |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "fp32_precision": {name: backend.fp32_precision for name, backend in backends.items()},
        }
    return info


def command_line(arguments: Sequence[str]) -> str:
    """Arguments for the head of a results file, without the folders of the machine: an absolute path becomes that from
    the repository, or its last part.
    """
    root = Path(__file__).resolve().parents[1]

    def portable(argument: str) -> str:
        path = Path(argument)
        if not path.is_absolute():
            return argument
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name

    return " ".join(map(portable, arguments))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", platform.processor())
    return f"{name} (family {fields.get('cpu family')}, model {fields.get('model')})"


def write_results(path: Path, content: Mapping[str, Any]) -> None:
    """Results file, replaced as a whole, one row a line."""
    head = {key: value for key, value in content.items() if key != "rows"}
    rows = ",\n".join("  " + json.dumps(row) for row in content["rows"])
    text = json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{rows}\n ]\n}}\n'
    json.loads(text)
    sparse_moon.files.write_text(path, text)
