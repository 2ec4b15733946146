"""Compile gate of the CPU kernels for aarch64, without one: what setup.py compiles there, by the compiler of ziglang.

Fails on errors and warnings, and on symbols of the package that no file defines. Nothing is optimised, as nothing runs.
Where ziglang is not installed one line says so. ``python .ci/compile_aarch64.py``
"""

import os
import re
import runpy
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

from setuptools import Extension

ROOT = Path(__file__).parents[1]
TARGET = "aarch64-linux-gnu.2.28"  # glibc as in the wheel's image
# zig adds a sanitizer to what is not optimised
FLAGS = ["-target", TARGET, "-O0", "-fno-sanitize=undefined", "-fPIC", "-Werror"]
# zig has no header; this is all that the kernels call
OPENMP = 'extern "C" int omp_get_thread_num(), omp_get_num_threads();\n'


def extension() -> Extension:
    """The CPU kernels, as setup.py would build them on aarch64."""
    with mock.patch("platform.machine", return_value="aarch64"), mock.patch("setuptools.setup") as setup:
        runpy.run_path("setup.py")
    return next(ext for ext in setup.call_args.kwargs["ext_modules"] if ext.name == "sparse_moon._C")


def zig(*arguments: str | Path) -> str:
    """What it prints; nothing where all is well."""
    command = [sys.executable, "-m", "ziglang", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout.strip() or (f"{' '.join(command)} ended with {done.returncode}" if done.returncode else "")


def write_headers(folder: Path) -> None:
    """Headers that a machine of another kind lacks."""
    (folder / "omp.h").write_text(OPENMP)
    # Debian keeps what of Python's depends on the processor apart; for both it says the same of sizes
    for config in Path("/usr/include", sysconfig.get_config_var("MULTIARCH") or "").glob("python3*/pyconfig.h"):
        there = folder / "aarch64-linux-gnu" / config.parent.name / config.name
        there.parent.mkdir(parents=True)
        there.write_text(config.read_text())


def main() -> None:
    if find_spec("ziglang") is None:
        print("ziglang is not installed: csrc/cpu is not compiled for aarch64")
        return
    os.chdir(ROOT)
    ext, start = extension(), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_headers(folder)
        includes = [*ext.include_dirs, sysconfig.get_path("include"), name]
        flags = [*ext.extra_compile_args, *FLAGS, *(f"-I{path}" for path in includes)]

        def compile_one(source: str) -> str:
            return zig("c++", *flags, "-c", source, "-o", folder / f"{Path(source).stem}.o")

        with ThreadPoolExecutor(2) as pool:
            problems = [text for text in pool.map(compile_one, ext.sources) if text]
        if not problems:  # Python, OpenMP and C++ come with the process, so that some are always missing
            link = ["ld.lld", "-shared", "--no-undefined", "--error-limit=0", "-o", folder / "_C.so"]
            linked = zig(*link, *folder.glob("*.o"))
            missing = re.findall(r"undefined symbol: .*", linked)
            problems = [line for line in missing if "sparse_moon::" in line] if missing else [linked]
    seconds = time.perf_counter() - start
    print(f"aarch64: {len(ext.sources)} files, {seconds:.0f} s, {len(problems)} problems", *problems, sep="\n")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
