"""Common settings of the tests."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from hypothesis import settings

if torch.cuda.is_available():
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what cuBLAS asks for in deterministic mode
else:
    # Triton kernels run in its interpreter, on CPU tensors; it reads this when a kernel is defined.
    os.environ["TRITON_INTERPRET"] = "1"

# Programs that tests start run the package that is tested, not the checkout in the working folder.
os.environ["PYTHONSAFEPATH"] = "1"

# One thread: small tests gain nothing from more, and lose much where another process has the cores. Tests of threaded
# kernels ask for theirs.
torch.set_num_threads(1)

# Hypothesis' own search is random but reproducible here; no deadline, because a shared machine stalls.
settings.register_profile("tests", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    broken = _interpreter_is_broken()
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, none is visible"))
        elif broken and "triton" in item.path.name:
            item.add_marker(pytest.mark.skip(reason=broken))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    from sparse_moon.ops.native import native

    cpu = "none" if native is None else native.isa()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    terminalreporter.write_line(f"torch {torch.__version__}, CPU kernels: {cpu}, GPU: {gpu}")


def _interpreter_is_broken() -> str | None:
    """Triton up to 3.6 takes int() of arrays of one element, which NumPy refuses from 2.4 on."""
    try:
        triton, numpy = (tuple(int(n) for n in version(name).split(".")[:2]) for name in ("triton", "numpy"))
    except PackageNotFoundError:
        return None
    if triton < (3, 7) and numpy >= (2, 4):
        return f"the interpreter of Triton {version('triton')} does not work with NumPy {version('numpy')}"
    return None


@pytest.fixture(scope="session")
def sanitizing_compiler(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Command of a C++ compiler with the address and undefined behaviour sanitizers and more flags; skips without."""

    folder = tmp_path_factory.mktemp("probe")

    def command(*flags: str) -> list[str]:
        compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            pytest.skip("no C++ compiler on the path")
        whole = [compiler, "-std=c++17", *flags, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        probe = folder / "probe.cpp"
        probe.write_text("int main() {}\n")
        if subprocess.run([*whole, str(probe), "-o", str(folder / "probe")], capture_output=True).returncode:
            pytest.skip(f"{compiler} has no sanitizers")
        return whole

    return command


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """A fixed seed, NaN in memory that nobody wrote, and nothing compiled: a function is compiled a few times only."""
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def nothing_measured() -> Iterator[None]:
    """No crossovers but those of the stored tables."""
    from sparse_moon.ops import choice

    before = choice.remembered()
    choice.forget()
    yield
    choice.forget()
    for work, crossover in before.items():
        choice.remember(work, crossover)
