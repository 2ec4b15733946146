"""benchmarks/gpu.sh with a Python that plays the GPU: which parts run in which order, and what is left of a cut run."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TARGETS = ["vit_base", "gpt2_1.3b", "resnet50"]
FAKE = """#!/usr/bin/env bash
slow() { [[ -n $SLOW && $all == *"$SLOW"* ]]; }
all="$*"
case "$*" in
*"import xdist"*) exit 1 ;;
*"sys, torch"*) [ -n "$MISSING" ] && exit 1; [ -e built ] && echo built || echo 90; exit ;;
esac
echo "$*" >>calls.txt
case "$*" in
*build_ext*) [ -n "$NO_BUILD" ] || touch built ;;
*tune.py*) echo table >sparse_moon/ops/tables/crossover_cuda_sm90.json ;;
*"-m pytest"*) if slow; then trap 'echo told what failed; exit 1' INT; sleep 30 & wait $!; fi ;;
esac
while [ $# -gt 0 ]; do
    if [ "$1" = --json ]; then echo '{"rows": [{"pass": "sparse, rigl, moon"}]}' >"$2"; fi
    shift
done
if slow; then sleep 30; fi
"""


@pytest.fixture
def gpu(tmp_path):
    """The script in a folder of its own, as a function of its arguments and variables: code, output, calls."""
    if not (BENCHMARKS / "gpu.sh").exists():
        pytest.skip("the benchmarks are not here")
    root = tmp_path / "checkout"
    for folder in ("benchmarks", "tests", "kernels", "sparse_moon/ops/tables"):
        (root / folder).mkdir(parents=True)
    shutil.copy(BENCHMARKS / "gpu.sh", root / "benchmarks")
    (root / "tests/test_triton_a.py").write_text("")
    fake = root / "python"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(fake), "SPARSE_MOON_COMMIT": "abc"}

    def start(*arguments, **more):
        return subprocess.Popen(
            ["bash", root / "benchmarks/gpu.sh", root / "build/out", *arguments], env=environment | more,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(*arguments, **more):
        process = start(*arguments, **more)
        output, _ = process.communicate(timeout=60)
        calls = (root / "calls.txt").read_text().splitlines() if (root / "calls.txt").exists() else []
        (root / "calls.txt").unlink(missing_ok=True)
        return process.returncode, output, calls

    run.start, run.root, run.out = start, root, root / "build/out"
    return run


def place(calls, *parts):
    (found,) = [number for number, call in enumerate(calls) if all(part in call for part in parts)]
    return found


def test_the_first_stage_goes_by_value(gpu):
    code, output, calls = gpu("first", PACK=str(gpu.root / "first.tgz"))
    assert code == 0, output
    timed = [place(calls, "--json", f"cuda_step_{name}.json") for name in TARGETS]
    chosen = [place(calls, "tune.py", f"--case {name} ") for name in TARGETS]
    order = [number for pair in zip(chosen, timed, strict=True) for number in pair]
    assert order == sorted(order) and place(calls, "-m pytest") > order[-1]
    assert max(place(calls, "build_ext"), place(calls, "compile_kernels.py")) < order[0]
    assert all(place(calls, "--compile-only", name) < order[0] for name in TARGETS)
    assert "--pattern block64 block32" in calls[timed[0]] and "--pattern block32 block64" in calls[timed[2]]
    assert "WITHOUT the compiled" not in output
    expected = {f"cuda_step_{name}.json" for name in TARGETS} | {"log.txt", "smoke.log", "crossover_cuda_sm90.json"}
    assert expected <= packed(gpu.root / "first.tgz").keys()


def test_the_second_stage_begins_with_what_the_first_one_lacks(gpu):
    gpu("first")
    _, output, calls = gpu("second")
    assert not any("tune.py" in call and f"--case {name} " in call for name in TARGETS for call in calls), output
    (gpu.out / "cuda_step_resnet50.json").unlink()
    (gpu.root / "sparse_moon/ops/tables/crossover_cuda_sm90.json").unlink()
    _, _, calls = gpu("second")
    steps = place(calls, "--json", "cuda_step_resnet50.json")
    assert place(calls, "tune.py", "--case resnet50 ") < steps < place(calls, "--json", "cuda_step_resnet18.json")
    assert not any("cuda_step_vit_base.json" in call or "test_captured_step" in call for call in calls)


def test_every_network_that_is_timed_has_its_crossovers_before(gpu):
    calls = gpu("first")[2] + gpu("second")[2]
    for number, call in enumerate(calls):
        words = shlex.split(call)
        if "step" in words and "--compile-only" not in words:
            name = words[words.index("--case") + 1]
            assert any("tune.py" in before and f"--case {name} " in before for before in calls[:number]), call


def packed(path):
    with tarfile.open(path) as archive:
        return {Path(member.name).name: archive.extractfile(member).read() for member in archive if member.isfile()}


def test_what_is_cut_leaves_its_results_and_its_words(gpu):
    path = gpu.root / "cut.tgz"
    code, output, _ = gpu("steps_vit_base", SLOW="py step", STAGE_SECONDS="6", PACK=str(path))
    assert code == 0 and "steps_vit_base: exit code 124" in output
    assert json.loads(packed(path)["cuda_step_vit_base.json"])["rows"]
    _, output, _ = gpu("smoke", SLOW="-m pytest", STAGE_SECONDS="6")
    assert "told what failed" in output, output


def test_a_killed_stage_has_packed_the_parts_before(gpu):
    path = gpu.root / "killed.tgz"
    with gpu.start("steps_vit_base", "smoke", SLOW="-m pytest", STAGE_SECONDS="8", PACK=str(path)) as process:
        while not path.exists() and process.poll() is None:
            time.sleep(0.1)
        process.kill()
        process.stdout.close()
    assert "cuda_step_vit_base.json" in packed(path)


def test_what_is_missing_is_said(gpu):
    _, output, _ = gpu("build", "csr", NO_BUILD="1", SPARSE_MOON_COMMIT="")
    assert "WITHOUT the compiled extensions" in output and "results will name no commit" in output
    code, output, calls = gpu("csr", MISSING="1")
    assert code == 2 and "bring along what is missing" in output and not calls


class Parsed(Exception):
    """Raised where a program has read its options."""


def test_the_programs_take_the_options_that_they_are_given(gpu, monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.syspath_prepend(BENCHMARKS)
    before = set(sys.modules)
    import compile_kernels
    import flops_and_time
    import tune

    def parsed(*_, **__):
        raise Parsed

    monkeypatch.setattr(flops_and_time, "keep_freed_memory", parsed)
    monkeypatch.setattr(tune, "keep_freed_memory", parsed)
    monkeypatch.setattr(compile_kernels.driver, "set_active", parsed)
    programs = {"flops_and_time.py": flops_and_time, "tune.py": tune, "compile_kernels.py": compile_kernels}
    seen = set()
    for call in gpu("first")[2] + gpu("second")[2]:
        words = shlex.split(call)
        if (name := Path(words[0]).name) in programs:
            seen.add(name)
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(Parsed):
                programs[name].main()
    assert seen == programs.keys()
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]
