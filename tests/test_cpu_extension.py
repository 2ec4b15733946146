"""The compiled CPU extension as a whole: instruction sets, its OpenMP runtime, memory safety."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_moon.ops.native import native

if native is None:
    pytest.skip("the compiled kernels were not built", allow_module_level=True)

ROOT = Path(__file__).parents[1]


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="no sse9 kernels"):
        native.set_isa("sse9")
    isas = native.supported_isas()
    assert isas[-1] == "generic" and native.isa() == isas[0]
    with pytest.raises(ValueError, match="faster, possible or never, got often"):
        native.set_flat_panels("often")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime():
    """In a process of its own: other libraries that the tests import bring theirs."""
    program = """
import sparse_moon, torch
sparse_moon.SparseLinear(64, 64, sparsity=0.9)(torch.randn(64, 64))
print(open("/proc/self/maps").read())
"""
    maps = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    runtimes = {line.split()[-1] for line in maps.splitlines() if "omp" in line.rsplit("/", 1)[-1]}
    assert len(runtimes) == 1 and "/torch/" in runtimes.pop()


def test_kernels_under_address_and_undefined_behaviour_sanitizers(tmp_path, sanitizing_compiler):
    compile_ = sanitizing_compiler("-O0", "-g1", "-fopenmp")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mfma"]
    extra = {"kernels_avx512": avx512, "kernels_avx2": ["-mavx2", "-mfma"]} if x86 else {}
    names = ("kernels_*", "dispatch", "transpose_index", "sparse_*", "conv2d_winograd", "bias_grad", "batch_norm_relu")
    sources = [source for name in names for source in sorted((ROOT / "csrc" / "cpu").glob(f"{name}.cpp"))]
    sources.append(ROOT / "tests" / "cpu_kernels.cpp")
    objects = [str(tmp_path / f"{source.stem}.o") for source in sources]
    builds = [
        subprocess.Popen([
            *compile_, *extra.get(source.stem, []), "-I", str(ROOT / "csrc"), "-c", str(source), "-o", target,
        ])
        for source, target in zip(sources, objects, strict=True)
    ]  # fmt: skip
    assert [build.wait() for build in builds] == [0] * len(builds)
    program = str(tmp_path / "driver")
    subprocess.run([*compile_, *objects, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "passed\n", result.stdout + result.stderr
