"""Compiled networks in captured steps, and what else a capture has to bear."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from host_graph import HostGraph

import sparse_moon as sm
from small_mlp import mlp
from sparse_moon.capture import CapturedStep, graph
from sparse_moon.capture import step as capture_step
from sparse_moon.ops import check_index


@pytest.mark.parametrize("interval", [2, 3])
def test_no_index_is_looked_at_after_an_update(interval, monkeypatch):
    """Layers of a compiled network check their index in the dispatcher's kernels; an update has done it already."""
    monkeypatch.setattr(capture_step, "StepGraph", HostGraph)
    looks, call = [], check_index.call
    monkeypatch.setattr(check_index, "call", lambda *inputs: looks.append(inputs[0]) or call(*inputs))
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), torch.tensor(0.01), momentum=0.9, fused=True)
    method = sm.RigL(model, optimizer, total_steps=60, interval=interval)
    compiled = torch.compile(model, backend="aot_eager")

    def train(x, y):
        loss = F.cross_entropy(compiled(x), y)
        loss.backward()
        method.step()
        return loss

    step = CapturedStep(train, method, model)
    for number in range(12):
        updates, before = method.updates_now, len(looks)
        step(torch.randn(8, 64), torch.randint(7, (8,)))
        assert number == 0 or (len(looks) > before) == updates, number
    assert step.captures == 1 and step.reason is None


def test_other_threads_may_use_the_gpu_during_a_capture(monkeypatch):
    """Those that pin the memory of the next batches do; by default any call of theirs ends a capture."""
    given = {}

    @contextmanager
    def record(*_, **options):
        given.update(options)
        given["stream"] = "the graph's"
        yield
        given["stream"] = "torch's"

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the first")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: given.update(stream=stream))
    assert graph.StepGraph(torch.device("cpu")).capture(lambda: None) is None
    assert given["capture_error_mode"] == "thread_local" and given["stream"] == "the first"
    with pytest.raises(ZeroDivisionError):  # after which torch leaves the graph's stream in its place
        graph.StepGraph(torch.device("cpu")).capture(lambda: 1 / 0)
    assert given["stream"] == "the first"
