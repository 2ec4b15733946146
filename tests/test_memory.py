import subprocess
import sys

import pytest

from sparse_moon.memory import keep_freed_memory

FAULTS = """
import resource, sys, torch
from sparse_moon.memory import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
def step():
    for _ in range(3):
        torch.ones(10**7)  # 40 MB: glibc maps and unmaps blocks above 32 MB one by one
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted on Linux")
def test_freed_memory_comes_back_without_page_faults():
    def run(mode):
        out = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True).stdout
        return [int(word) for word in out.split()]

    kept, faults = run("keep")
    if not kept:
        pytest.skip("the C library is not glibc")
    returned = run("return")[1]
    assert returned > 500  # 30 tensors of 19 huge pages, or 9,766 small ones
    # a small block that settles in a large free one makes the heap grow once more: one tensor of the thirty
    assert faults < returned / 10


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
