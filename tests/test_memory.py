import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import sparse_moon as sm
from sparse_moon import memory
from sparse_moon.memory import keep_freed_memory

FAULTS = """
import resource, sys, torch
import sparse_moon as sm
from sparse_moon import memory
way = sys.argv[1]
kept = way == "keep" and memory.keep_freed_memory()
if "layer" in way:
    layer = sm.SparseLinear(64, 64, sparsity=0.5)
    if way == "refused, layer":
        assert memory.keep_freed_memory(False) is False
    elif way == "layer, then back":
        layer(torch.ones(4, 64))
        assert memory.decided and memory.keep_freed_memory(False) is False
    with torch.set_grad_enabled("evaluated" not in way):
        layer(torch.ones(4, 64))
    kept = memory.decided
if "train" in way:
    from sparse_moon.app import start
    start.train_in = lambda *args, **options: {}
    if "refused" in way:
        memory.keep_freed_memory(False)
    sm.train(out="nowhere")
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


LARGE_STEPS = """
import ctypes, resource, sys
from sparse_moon.memory import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
SIZE = 40 * 10**6
def step():
    blocks = [libc.malloc(ctypes.c_size_t(SIZE)) for _ in range(int(sys.argv[2]))]
    for block in blocks:
        pages = memoryview((ctypes.c_char * SIZE).from_address(block)).cast("B")[::65536]
        pages[:] = bytes(len(pages))
    for block in blocks:
        libc.free(ctypes.c_void_p(block))
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(way, *arguments, script=FAULTS, **variables):
    command, environment = [sys.executable, "-c", script, way, *map(str, arguments)], {**os.environ, **variables}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return [int(word) for word in out.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted on Linux")
def test_freed_memory_comes_back_without_page_faults():
    kept, faults = run("keep")
    if not kept:
        pytest.skip("the C library is not glibc")
    returned = run("return")[1]
    assert returned > 500  # 30 tensors of 19 huge pages, or 9,766 small ones
    # a small block that settles in a large free one makes the heap grow once more: one tensor of the thirty
    assert faults < returned / 10
    # training of a sparse layer does it by itself, once, and can be told not to
    assert run("layer")[1] < returned / 10
    for way, decided in (("refused, layer", 1), ("layer, evaluated", 0), ("layer, then back", 1)):
        found = run(way)
        assert found[0] == decided and found[1] > 0.5 * returned, way
    # and so does a run
    assert run("train")[1] < returned / 10
    assert run("refused, train")[1] > 0.5 * returned
    assert run("layer, train", SPARSE_MOON_KEEP_MEMORY="0")[1] > 0.5 * returned


MIDDLING_BLOCKS = """
import resource, sys, torch
from sparse_moon.memory import keep_freed_memory
if sys.argv[1] == "back":
    keep_freed_memory()
    keep_freed_memory(False)
for _ in range(20):
    torch.ones(2_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    torch.ones(2_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted on Linux")
def test_who_goes_back_still_reuses_blocks_below_32_mb():
    if run("as ever", script=MIDDLING_BLOCKS)[0] >= 50:
        pytest.skip("the C library is not glibc")
    assert run("back", script=MIDDLING_BLOCKS)[0] < 50


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted on Linux")
def test_steps_of_more_than_2_gb_come_back_without_page_faults():
    if os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 6e9:
        pytest.skip("huge pages would take 2.8 GB")
    returned = run("return", 60, script=LARGE_STEPS)[1]
    assert returned > 500
    for blocks in (60, 65, 70):  # of 40 MB
        kept, faults = run("keep", blocks, script=LARGE_STEPS)
        if not kept:
            pytest.skip("the C library is not glibc")
        assert faults < returned / 10, blocks


@pytest.mark.parametrize("adapted", [False, True])
def test_compiled_training_keeps_memory_too(adapted, monkeypatch):
    asked = []

    def keep():
        asked.append(True)
        memory.decided = True
        return True

    monkeypatch.setattr(memory, "decided", False)
    monkeypatch.setattr(memory, "keep_freed_memory", keep)
    model = nn.Sequential(sm.SparseLinear(16, 8, sparsity=0.5), nn.ReLU(), sm.SparseLinear(8, 4, sparsity=0.5))
    x = torch.ones(4, 16)
    if adapted:  # values that do not train, and factors that do
        sm.lora(model, rank=1)
    torch.export.export(model, (x,), strict=False)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        compiled(x)
    assert not asked and counter.frame_count == 1
    for _ in range(3):
        compiled(x).sum().backward()
    assert asked == [True] and counter.frame_count == 2


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(memory, "decided", False)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False and memory.decided
