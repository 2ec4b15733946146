"""Where and with what a run was made."""

import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from sparse_moon.source_tree import VERSION


def environment(device: str) -> dict[str, str]:
    """Date (UTC), command, versions and machine, for a run's results."""
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    program = "python -m sparse_moon" if Path(sys.argv[0]).name == "__main__.py" else Path(sys.argv[0]).name
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": f"{program} {shlex.join(sys.argv[1:])}".strip(),
        "sparse_moon": VERSION,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        **({"gpu": gpu} if gpu else {}),
    }


def _processor() -> str:
    """The processor's name, which Python knows on some systems only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == "model name")
    return next(names, platform.processor() or platform.machine())
