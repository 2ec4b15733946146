"""Several processes with gloo on this machine, for tests."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def environment() -> dict[str, str]:
    """That of processes with one thread each, which find what test files share."""
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}


def run_processes(file: str, world: int, *arguments: object) -> None:
    """Run a test file as so many processes, each of which calls :func:`join` with ``sys.argv``.

    Raises:
        AssertionError: one of them failed; what it wrote to stderr.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands = [[sys.executable, file, str(port), str(world), str(rank), *map(str, arguments)] for rank in range(world)]
    processes = [subprocess.Popen(c, env=environment(), stderr=subprocess.PIPE, text=True) for c in commands]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    failed = [error for process, error in zip(processes, errors, strict=True) if process.returncode]
    assert not failed, "\n".join(failed)


def join(arguments: list[str]) -> list[str]:
    """Become one of the processes; the arguments that are the test's own."""
    port, world, rank = map(int, arguments[1:4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    return arguments[4:]


def leave() -> None:
    """End the process; gloo's threads can abort an orderly exit of the interpreter."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
