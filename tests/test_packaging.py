import ast
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

from sparse_moon.ops.native import native

ROOT = Path(__file__).parents[1]


def argument_of_setup(name):
    """A literal argument of ``setup.py``'s call of ``setup``."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setup":
            return next(ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg == name)
    raise AssertionError("setup.py calls no setup")


def test_wheels_have_every_package():
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "sparse_moon").rglob("__init__.py")}
    assert set(argument_of_setup("packages")) == found | {"sparse_moon.kernels"}


def test_wheels_have_every_file_that_is_no_module():
    """The style and the template of the report, presets, tables, types."""
    data = argument_of_setup("package_data")
    folders = {name: ROOT.joinpath(*name.split(".")) for name in data}
    listed = {path for name, patterns in data.items() for pattern in patterns for path in folders[name].glob(pattern)}
    modules = {".py", ".pyc", ".so", ".pyd"}
    there = {path for path in (ROOT / "sparse_moon").rglob("*") if path.is_file() and path.suffix not in modules}
    assert {"report.css", "report.html.jinja", "py.typed"} <= {path.name for path in there}
    assert there == listed


def test_the_sdist_is_the_repository(tmp_path):
    """With what the wheel is built of, and all that the tests read."""
    listed = (
        subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True) if shutil.which("git") else None
    )
    if listed is None or listed.returncode or not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    tracked = {path for path in listed.stdout.splitlines() if (ROOT / path).is_file()}
    left_over = {"sparse_moon/_C.so", "tests/__pycache__/test_nn.pyc", "benchmarks/results/mnist/run/checkpoint.pt"}
    for path in tracked:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, tmp_path / path)
    for path in left_over:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    command = [sys.executable, "setup.py", "--quiet", "sdist"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as files:
        packed = {name.partition("/")[2] for name in files.getnames() if files.getmember(name).isfile()}
    assert tracked <= packed
    assert {path for path in packed - tracked if ".egg-info/" not in path} == {"PKG-INFO", "setup.cfg"}


def test_one_build_runs_on_every_processor_of_its_architecture():
    """Instructions of AVX and AVX-512 are only in functions that are chosen by what the processor has."""
    if native is None or platform.machine() != "x86_64" or not shutil.which("objdump"):
        pytest.skip("needs the compiled kernels of an x86-64 and objdump")
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", native.__file__]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    function, found = "", set()
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line.partition("<")[2]
        elif re.match(r"\s*[0-9a-f]+:\s+v\w+ .*%[xyz]mm", line):
            found.add(function)
    chosen = re.compile(r"\bavx512::|\bavx2::|\bfill_avx512\(|\bfill_avx2\(")
    assert found, "the kernels for AVX-512 and AVX2 are missing"
    assert not [function for function in found if not chosen.search(function)]


def setup_on(machine, monkeypatch):
    """The names of ``setup.py``, and the CPU extension that it builds, on a machine of another kind."""
    pytest.importorskip("pybind11")
    made = []
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr("setuptools.setup", lambda **arguments: made.extend(arguments["ext_modules"]))
    monkeypatch.chdir(ROOT)
    return runpy.run_path("setup.py"), made[0]


@pytest.mark.parametrize("machine", ["aarch64", "arm64", "ARM64"])
def test_on_arm_generic_vectors_alone_are_compiled(machine, monkeypatch):
    names, extension = setup_on(machine, monkeypatch)
    sources = {Path(path).name for path in extension.sources}
    everything = {path.name for path in (ROOT / "csrc/cpu").glob("*.cpp")} | {"register_cpu.cpp"}
    assert sources == everything - {"kernels_avx2.cpp", "kernels_avx512.cpp"} and "kernels_generic.cpp" in sources
    assert not names["ISA_FLAGS"] and not [flag for flag in extension.extra_compile_args if flag.startswith("-m")]


@pytest.mark.parametrize("machine", ["x86_64", "AMD64"])
def test_on_x86_each_file_has_the_flags_of_its_vectors_alone(machine, monkeypatch):
    names, extension = setup_on(machine, monkeypatch)
    sources = {Path(path).name for path in extension.sources}
    assert {"kernels_avx2.cpp", "kernels_avx512.cpp", "kernels_generic.cpp"} <= sources
    assert {source for source in sources if source.endswith(tuple(names["ISA_FLAGS"]))} == {
        "kernels_avx2.cpp", "kernels_avx512.cpp"
    }  # fmt: skip
    assert not [flag for flag in extension.extra_compile_args if flag.startswith("-m")]


def test_the_changelog_begins_with_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    titles = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)
    assert all(re.fullmatch(r"\d+\.\d+\.\d+, (not released|\d{4}-\d\d-\d\d)", title) for title in titles)
    assert titles[0].partition(",")[0] == version and not any("not released" in title for title in titles[1:])
