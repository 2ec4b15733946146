"""Kernels that were launched before are found without Triton's look-up, and never one for other arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CODE = """
import torch, triton, triton.language as tl
import stub_gpu
from sparse_moon.kernels.launch import Launch

@triton.jit
def kernel(p_x, p_other, n, factor, SIZE: tl.constexpr):
    where = tl.arange(0, SIZE)
    tl.store(p_x + where * n, factor)

calls = []
class Driver(stub_gpu._Driver):
    @staticmethod
    def launcher_cls(source, metadata):
        return lambda *all: calls.append((metadata.hash, all[:3], all[-5:]))
triton.runtime.driver.set_active(Driver())

x, half, odd, other = torch.zeros(99), torch.zeros(99).half(), torch.zeros(99)[1:], torch.zeros(9)
launches = {
    "first": (x, None, 8, 0.5, 64), "factor": (x, None, 8, 1.5, 64), "one": (x, None, 1, 0.5, 64),
    "divisible": (x, None, 32, 0.5, 64), "long": (x, None, 2**31, 0.5, 64), "dtype": (half, None, 8, 0.5, 64),
    "aligned": (odd, None, 8, 0.5, 64), "there": (x, other, 8, 0.5, 64), "constant": (x, None, 8, 0.5, 32),
    "grid": (x, None, 9, 0.5, 64), "zero": (x, None, 0, 0.5, 64), "false": (x, None, False, 0.5, 64),
}
names = kernel.arg_names
for name, arguments in launches.items():
    grid = (3, 2) if name == "grid" else (7,)
    launch = Launch(kernel, grid, dict(zip(names, arguments)))
    kernel[grid](*arguments, num_warps=4, num_stages=3)  # as Triton finds it
    launch()
    kernel.run = None  # not asked any more
    launch()
    del kernel.run
    found, calls[:] = calls[:], []
    assert len({hash_ for hash_, _, _ in found}) == 1, name
    assert all(where == (*grid, 1, 1)[:3] for _, where, _ in found), name
    for _, _, given in found:
        assert len(given) == 5 and all(a is b or a == b for a, b in zip(given, arguments)), (name, given)
Launch(kernel, (7,), dict(zip(names, launches["first"])), num_warps=8)()
print(calls[0][0] != found[0][0])
"""


def test_what_was_launched_is_found_again_and_only_that(tmp_path):
    if not (BENCHMARKS / "stub_gpu.py").exists():
        pytest.skip("the benchmarks are not here")
    code = tmp_path / "launches.py"  # Triton reads the source of what it compiles
    code.write_text(CODE)
    path = os.pathsep.join(filter(None, [str(BENCHMARKS), os.environ.get("PYTHONPATH")]))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, code], env={**environment, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert process.stdout.strip() == "True", process.stderr
