"""The CPU kernels under the address and undefined behaviour sanitizers, one build of them: two programs that run them
on arrays of exactly the right size, and random calls of the operators (fuzz_ops.py says how)."""

import json
import subprocess
import sys
from pathlib import Path

import fuzz_ops
import pytest

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def compile_(sanitizing_compiler):
    return sanitizing_compiler("-O1", "-g1", "-fopenmp", "-I", str(fuzz_ops.CSRC))


@pytest.fixture(scope="module")
def folder(compile_, tmp_path_factory):
    """That of the build, which the first test makes."""
    pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("build")
    fuzz_ops.build(compile_[0], folder)
    return folder


@pytest.mark.parametrize(("name", "included"), [("cpu_kernels", ""), ("cpu_small_ops", "bernoulli_mask")])
def test_a_program_of_the_kernels(name, included, compile_, folder, tmp_path):
    objects = [str(path) for path in folder.glob("*.o") if path.stem not in ("register_cpu", included)]
    program = str(tmp_path / name)
    subprocess.run([*compile_, str(TESTS / f"{name}.cpp"), *objects, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "passed\n", result.stdout + result.stderr


def campaign(folder, *options):
    command = [sys.executable, str(TESTS / "fuzz_ops.py"), "--build", str(folder), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == fuzz_ops.SKIP:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])["cases"]


def test_a_short_campaign_of_random_calls(folder):
    cases = campaign(folder, "--cases", 120)
    assert sum(cases.values()) == 120


@pytest.mark.slow
def test_a_long_campaign_of_random_calls(folder):
    cases = campaign(folder, "--minutes", 15, "--seed", 1)
    assert len(cases) == 9 and min(cases.values()) > 50
