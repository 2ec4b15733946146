"""Random calls of the package's CPU operators, under the address and undefined behaviour sanitizers.

    python tests/fuzz_ops.py --minutes 20 --seed 1
    python tests/fuzz_ops.py --seed 1 --case 4711        # one case again, as a failure names it

builds csrc with the sanitizers in a temporary folder (or ``--build``, which is kept), where scratch memory has just
the size that was asked for, and runs a Python with it: tensors of torch, which come from malloc, have red zones too.
Prints how many cases of each kind there were, and every failure with its seed and its choices; exits 1 where there was
one, 77 without a compiler for this. test_sanitizers.py runs a short one.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
SKIP = 77
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mfma"]
_ISA_FLAGS = {"kernels_avx512": _AVX512, "kernels_avx2": ["-mavx2", "-mfma"]}  # as in setup.py
_SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def build(compiler: str, folder: Path) -> Path:
    """The CPU extension under sanitizers; objects newer than all of csrc are kept."""
    import pybind11

    x86 = platform.machine().lower() in ("x86_64", "amd64")
    includes = [str(CSRC), sysconfig.get_paths()["include"], pybind11.get_include()]
    common = [compiler, "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp", *(f"-I{path}" for path in includes)]
    newest = max(path.stat().st_mtime for path in CSRC.rglob("*") if path.is_file())

    def compile_one(source: Path) -> str:
        out = folder / f"{source.stem}.o"
        level = "-O0" if "kernels" in source.stem or source.stem == "register_cpu" else "-O1"  # else they take minutes
        flags = [level, "-g1", "-ffp-contract=fast", "-DSPARSE_MOON_EXACT_SCRATCH", *_SANITIZE]
        if not out.exists() or out.stat().st_mtime < newest:
            isa = _ISA_FLAGS.get(source.stem, [])
            subprocess.run([*common, *flags, *isa, "-c", str(source), "-o", str(out)], check=True)
        return str(out)

    sources = [CSRC / "register_cpu.cpp", *(CSRC / "cpu").glob("*.cpp")]
    sources = [path for path in sources if x86 or path.stem not in _ISA_FLAGS]
    sources.sort(key=lambda path: -path.stat().st_size * ("kernels" in path.stem or path.stem == "register_cpu"))
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "_C.so"
    subprocess.run([compiler, "-shared", "-fopenmp", *_SANITIZE, *objects, "-o", str(library)], check=True)
    return library


def runtime(compiler: str, folder: Path) -> str | None:
    """What has to be loaded before Python, None where this compiler has no sanitizers to load."""
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    done = subprocess.run([compiler, *_SANITIZE, str(probe), "-o", str(folder / "probe")], capture_output=True)
    # libstdc++ too: the sanitizer looks for the functions that throw when it is loaded, long before Python needs them
    names = ("libasan.so", "libstdc++.so")
    found = [subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
             for name in names]  # fmt: skip
    return " ".join(found) if not done.returncode and all(Path(path).is_absolute() for path in found) else None


def child(library: str, log: str, seed: int, first: int, last: int, until: float, kinds: list[str]) -> None:
    """Run cases, up to number ``last`` unless it is -1, and print a line of JSON for each failure and for counts."""
    import torch  # first: its OpenMP library is the one to use

    spec = importlib.util.spec_from_file_location("sparse_moon._C", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["sparse_moon._C"] = module

    from fuzz_layers import Draw, batch_norm_relu, conv2d, linear
    from fuzz_methods import methods
    from fuzz_small_ops import check_index, drop_and_grow, masks_and_averages, misuse, unknown_aware_loss

    from sparse_moon.ops.native import native

    assert native is module
    torch.use_deterministic_algorithms(True)  # which also fills new memory with NaN
    shares = {
        linear: 22, conv2d: 34, batch_norm_relu: 7, unknown_aware_loss: 5, drop_and_grow: 7, check_index: 5,
        masks_and_averages: 4, methods: 6, misuse: 10,
    }  # fmt: skip
    by_name = {kind.__name__: kind for kind in shares}
    names, weights = list(by_name), list(shares.values())
    counts: Counter[str] = Counter()
    descriptor = os.open(log, os.O_RDWR | os.O_CREAT)
    number = first
    while time.time() < until and (last < 0 or number <= last):
        draw = Draw(seed, number, descriptor)
        name = draw.random.choices(names, weights)[0]
        draw.drawn["kind"] = name
        signal.alarm(300)  # one that hangs is a crash, too
        if not kinds or name in kinds:
            try:
                by_name[name](draw)
            except Exception as error:
                text = f"{draw}\n{''.join(traceback.format_exception(error)[-4:])}"
                print(json.dumps({"failure": text}), flush=True)
            counts[name] += 1
            if counts.total() % 20 == 0:
                print(json.dumps({"counts": counts}), flush=True)
        number += 1
    print(json.dumps({"counts": counts, "finished": True}), flush=True)


def campaign(library: Path, preload: str, options: argparse.Namespace, folder: Path) -> int:
    """Run children, a new one after each crash, and report; returns the number of failures."""
    environment = {
        **os.environ,
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(HERE),
        "OMP_NUM_THREADS": "2",
    }
    log, until, first, failures = folder / "case", time.time() + 60 * options.minutes, 0, 0
    total: Counter[str] = Counter()
    last = -1
    if options.case is not None or options.cases:
        first = options.case or 0
        last, until = first + max(options.cases, 1) - 1, time.time() + 3600
    while time.time() < until and failures < options.failures:
        arguments = [str(library), str(log), options.seed, first, last, until, *options.kinds]
        command = [sys.executable, __file__, "child", *map(str, arguments)]
        counts: dict[str, int] = {}
        finished = False
        with (folder / "stderr").open("w+") as stderr:
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
            ) as process:
                assert process.stdout is not None
                for line in (json.loads(text) for text in process.stdout if text.startswith("{")):
                    counts, finished = line.get("counts", counts), line.get("finished", False)
                    if "failure" in line:
                        failures += 1
                        print(f"FAILED {line['failure']}", flush=True)
            stderr.seek(0)
            report = _report(stderr.read())
        total.update(counts)
        if finished:
            break
        failures += 1
        case = log.read_text().strip() if log.exists() else "before the first case"
        print(f"CRASHED with status {process.returncode}: {case}\n{report}", flush=True)
        if options.case is not None or "case=" not in case:
            break
        first = int(case.split("case=")[1].split()[0]) + 1
        total[case.split("kind=")[1].split()[0]] += 1
    print(json.dumps({"cases": total, "failures": failures}))
    return failures


def _report(stderr: str) -> str:
    """The sanitizer's, without what is below the kernels."""
    lines = stderr.splitlines()
    start = next((i for i, line in enumerate(lines) if "ERROR: " in line or "runtime error" in line), len(lines) - 12)
    return "\n".join(line[:200] for line in lines[max(start, 0) :][:14])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="of cases, after the build")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=0, help="run so many in place of a time")
    parser.add_argument("--case", type=int, help="run this one alone")
    parser.add_argument("--kinds", nargs="*", default=[], help="run only these")
    parser.add_argument("--failures", type=int, default=20, help="stop after so many")
    parser.add_argument("--build", type=Path, help="folder to build in, kept")
    options = parser.parse_args()
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        preload = compiler and sys.platform == "linux" and runtime(compiler, folder)
        if not compiler or not preload:
            print("no compiler with a sanitizer that can be loaded into Python")
            return SKIP
        target = options.build or folder
        target.mkdir(parents=True, exist_ok=True)
        return int(campaign(build(compiler, target), preload, options, folder) > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        library, log, seed, first, last, until, *kinds = sys.argv[2:]
        child(library, log, int(seed), int(first), int(last), float(until), kinds)
    else:
        sys.exit(main())
