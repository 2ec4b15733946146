"""Programs that start in a clone's root run the installed package, with its kernels."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import sparse_moon.kernels
from sparse_moon.ops import choice, native
from sparse_moon.source_tree import PACKAGE

PROGRAM = """
import sparse_moon as sm, sparse_moon.kernels, sparse_moon.ops.native as native
print(sm.ops.__file__, sparse_moon.kernels.__file__, native.native.__file__, sep="\\n")
"""


@pytest.fixture
def clone(tmp_path):
    """A clone where nothing was compiled, and a copy of the package as if installed from it."""
    if native.native is None:
        pytest.skip("the package was installed without its CPU kernels")
    clone, installed = tmp_path / "clone", tmp_path / "site" / "sparse_moon"
    no_cache = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, installed, ignore=no_cache)
    kernels = Path(sparse_moon.kernels.__file__).parent
    shutil.copytree(kernels, installed / "kernels", ignore=no_cache, dirs_exist_ok=True)
    shutil.copytree(PACKAGE, clone / "sparse_moon", ignore=shutil.ignore_patterns("__pycache__", "_C*", "kernels"))
    shutil.copytree(kernels, clone / "kernels", ignore=no_cache)
    (clone / "csrc").mkdir()
    (clone / "setup.py").touch()
    return clone


def run(clone, *arguments):
    """In the clone's root; a warning is an error."""
    environment = {**os.environ, "PYTHONPATH": str(clone.parent / "site")}
    environment.pop("PYTHONSAFEPATH")
    command = [sys.executable, "-W", "error:::sparse_moon", *arguments]
    return subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("way", ["-c", "script"])
def test_the_root_of_a_clone_does_not_hide_the_installed_kernels(clone, way):
    (clone / "program.py").write_text(PROGRAM)
    result = run(clone, *(["-c", PROGRAM] if way == "-c" else ["program.py"]))
    assert result.returncode == 0 and not result.stderr, result.stderr
    files = [Path(line) for line in result.stdout.splitlines()]
    assert len(files) == 3 and all(path.is_relative_to(clone.parent / "site") for path in files)


def test_the_program_starts_there_by_its_name(clone):
    result = run(clone, "-m", "sparse_moon", "flops", "--model", "mlp", "--input", "1,8,8", "--classes", "3")
    assert result.returncode == 0 and "FLOPs" in result.stdout and not result.stderr, result.stderr


def test_a_clone_that_is_not_what_is_installed_says_so(clone):
    with (clone / "sparse_moon" / "schedules.py").open("a") as file:
        file.write("\nEDITED = True\n")
    result = run(clone, "-W", "always", "-c", PROGRAM)
    assert result.returncode == 0 and result.stderr.count("Warning: ") == 1
    assert "is not what is installed in" in result.stderr and "`pip install -e .`" in result.stderr


def test_a_clone_with_its_own_kernels_is_used(clone):
    for extension in (clone.parent / "site" / "sparse_moon").glob("_C*"):
        shutil.copy(extension, clone / "sparse_moon")
    result = run(clone, "-c", "import sparse_moon.ops.native as native; print(native.native.__file__)")
    assert Path(result.stdout.strip()).parent == clone / "sparse_moon", result.stderr


def test_a_clone_needs_no_installation(clone):
    for extension in (clone.parent / "site" / "sparse_moon").glob("_C*"):
        shutil.copy(extension, clone / "sparse_moon")
    nowhere = "import importlib.metadata as m; m.Distribution.discover = lambda **_: iter(())"
    result = run(clone, "-c", f"{nowhere}; import sparse_moon; print(sparse_moon.__version__)")
    assert result.stdout == "0+unknown\n", result.stderr


@pytest.mark.parametrize("source_tree", [True, False])
def test_missing_kernels_are_explained_by_what_is_true(monkeypatch, source_tree):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(native.importlib, "import_module", missing)
    monkeypatch.setattr(native, "is_source_tree", lambda: source_tree)
    with pytest.warns(RuntimeWarning, match="without its compiled CPU kernels") as caught:
        assert native.load() is None
    text = str(caught[0].message)
    assert ("pip install -e ." in text) == source_tree and ("compiler and reinstall" in text) != source_tree
    monkeypatch.setattr(native, "native_cuda", None)
    with pytest.raises(RuntimeError, match=r"run `pip install -e \.`" if source_tree else "Get nvcc .* and reinstall"):
        native.require_cuda()


@pytest.mark.parametrize(("capabilities", "expected"), [
    ([(8, 0)], "kernel"), ([(8, 6), (12, 0)], "kernel"), ([(7, 5)], "reference"), ([(9, 0), (7, 5)], "reference"),
])  # fmt: skip
def test_a_gpu_too_old_for_the_cuda_kernels_takes_the_reference(monkeypatch, capabilities, expected):
    monkeypatch.setattr(native, "native_cuda", object())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "Tesla T4")
    run = choice.cuda_or(lambda: "reference", lambda: "kernel")
    native.has_cuda.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert [run(), run()] == [expected] * 2
        assert len(caught) == (expected == "reference")
        assert all("capability 8.0" in str(w.message) and "(Tesla T4) has 7.5" in str(w.message) for w in caught)
    finally:
        native.has_cuda.cache_clear()
