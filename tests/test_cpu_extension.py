"""The compiled CPU extension as a whole: instruction sets, its OpenMP runtime."""

import subprocess
import sys

import pytest

from sparse_moon.ops.native import native

if native is None:
    pytest.skip("the compiled kernels were not built", allow_module_level=True)


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
