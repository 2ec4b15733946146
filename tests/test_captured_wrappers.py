"""What runs on a GPU around the kernels of an operator, captured on the host, without launching any of them."""

from collections import Counter
from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
from host_graph import HostGraph

import sparse_moon.nn  # noqa: F401, all operators
from sparse_moon.ops import choice
from sparse_moon.ops.choice import use_backend
from sparse_moon.ops.plan import Geometry
from sparse_moon.ops.registry import KERNELS
from sparse_moon.topology import Topology

Launch = pytest.importorskip("sparse_moon.kernels.launch").Launch
LAST = torch.channels_last
BLOCKS = {(1, 1): "cuda", (8, 1): "triton", (16, 16): "triton", (32, 32): "triton"}


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """How often kernels would have been launched, by kind."""
    found = Counter()

    class Extension:
        """In the place of the CUDA extension."""

        def __getattr__(self, name):
            if name.endswith("workspace"):
                return lambda *_: 1024
            return lambda *_: found.update(["cuda"])

    monkeypatch.setattr(Launch, "__call__", lambda launch: found.update(["triton"]))
    monkeypatch.setattr(choice, "has_cuda", lambda: True)
    monkeypatch.setattr("sparse_moon.ops.gpu.has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    for module in ("sparse_linear.cuda", "sparse_conv2d.cuda", "average_", "bernoulli_mask"):
        place = import_module(f"sparse_moon.ops.{module}")
        monkeypatch.setattr(place, "require_cuda", Extension)
        monkeypatch.setattr(place, "current_stream", lambda: 0)
    return found


def captured(step):
    with torch.no_grad():
        HostGraph(torch.device("cpu")).capture(step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["kernel", "dense", "auto"])
@pytest.mark.parametrize("block", BLOCKS)
def test_linear(block, backend, dtype, launched):
    topology = Topology.random((64, 96), 0.3, block)
    plan, values = topology.plan(), torch.randn(topology.values_shape, dtype=dtype)
    x, bias = torch.randn(2, 5, 96, dtype=dtype), torch.randn(64, dtype=dtype)

    def step():
        y = KERNELS["sparse_linear", "cuda"](x, values, bias, None, plan)
        return KERNELS["sparse_linear_grads", "cuda"](y, x, values, plan, True)

    with use_backend(backend):
        captured(step)
    assert backend != "kernel" or launched[BLOCKS[block]] >= 3


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("backend", ["kernel", "dense", "auto"])
@pytest.mark.parametrize("block", BLOCKS)
def test_conv2d(block, backend, kernel, stride, launched):
    topology = Topology.random((64, 32 * kernel**2), 0.3, block)
    geometry = Geometry((64, 32, kernel, kernel), (stride,) * 2, (kernel // 2,) * 2, (1, 1), 1)
    plan, values = topology.plan(geometry), torch.randn(topology.values_shape, dtype=torch.bfloat16)
    x = torch.randn(2, 32, 6, 6, dtype=torch.bfloat16).to(memory_format=LAST)

    def step():
        y = KERNELS["sparse_conv2d", "cuda"](x, values, None, None, plan)
        return KERNELS["sparse_conv2d_grads", "cuda"](y, x, values, plan, True)

    with use_backend(backend):
        captured(step)
    assert backend != "kernel" or launched[BLOCKS[block]] >= 3


def test_loss_mask_and_average(launched):
    """What MOON, CigL and averages of weights add to a step."""
    logits, target, w = torch.randn(8, 5), torch.arange(8) % 4, torch.tensor(0.1)
    values, step_number = torch.randn(6), torch.tensor(1)

    def step():
        KERNELS["unknown_aware_loss", "cuda"](logits, target, w)
        KERNELS["bernoulli_mask", "cuda"](values, 0.8, 0, 0, step_number)
        KERNELS["average_", "cuda"]([values], [torch.ones(6)], step_number + 1, 0.8, 0, step_number)

    captured(step)
    assert launched["triton"] and launched["cuda"] >= 2
