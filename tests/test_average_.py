import importlib
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.library import opcheck

from sparse_moon import ops
from sparse_moon.ops import registry


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_average_of_many(dtype):
    history = [[torch.randn(3, 4, dtype=dtype), torch.randn(5, dtype=dtype)] for _ in range(7)]
    averages = [torch.full((3, 4), 1e9, dtype=dtype), torch.full((5,), -1e9, dtype=dtype)]  # count 0 forgets these
    for n, values in enumerate(history):
        ops.average_(averages, values, torch.tensor(n))
    for i, average in enumerate(averages):
        torch.testing.assert_close(average, torch.stack([values[i] for values in history]).mean(0))


def test_masked_average_by_hand():
    values = [torch.randn(40), torch.randn(6, 7)]
    averages = [torch.ones(40), torch.ones(6, 7)]
    ops.average_(averages, values, torch.tensor(3), keep=0.8, seed=5, step=torch.tensor(12))
    for stream, (average, value) in enumerate(zip(averages, values, strict=True)):
        mask = ops.bernoulli_mask(value, 0.8, seed=5, stream=stream, step=torch.tensor(12))
        assert 0 < (~mask).sum() < mask.numel()
        torch.testing.assert_close(average, (3 + mask * value) / 4)


def test_parameters_and_no_tensors():
    parameter = torch.nn.Parameter(torch.full((2,), 4.0))
    average = torch.zeros(2)
    ops.average_([average], [parameter], torch.tensor(1))
    assert average.tolist() == [2.0, 2.0]
    ops.average_([], [], torch.tensor(1))


def test_opcheck_and_errors():
    args = ([torch.zeros(4)], [torch.ones(4)], torch.tensor(1), 0.5, 3, torch.tensor(7))
    opcheck(torch.ops.sparse_moon.average_.default, args)
    with pytest.raises(ValueError, match="same shapes"):
        ops.average_([torch.zeros(4)], [torch.zeros(3)], torch.tensor(0))
    with pytest.raises(ValueError, match="needs a step"):
        ops.average_([torch.zeros(4)], [torch.zeros(4)], torch.tensor(0), keep=0.5)
    with pytest.raises(ValueError, match="keep must be"):
        ops.average_([torch.zeros(4)], [torch.zeros(4)], torch.tensor(0), keep=-0.5)
    with pytest.raises(ValueError, match="count must be"):
        ops.average_([torch.zeros(4)], [torch.zeros(4)], torch.tensor(0.0))


def test_one_launch_takes_tensors_of_one_device(monkeypatch):
    lengths, module = [], importlib.import_module("sparse_moon.ops.average_")  # a function has that name, too

    def kernel(tasks, *_):
        lengths.extend(task[2] for task in tasks)

    monkeypatch.setattr("sparse_moon.ops.choice.has_cuda", lambda: True)
    monkeypatch.setattr(module, "require_cuda", lambda: SimpleNamespace(average_float32=kernel, average_float64=kernel))
    monkeypatch.setattr(module, "current_stream", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    averages = [torch.zeros(4), torch.zeros(5, device="meta"), torch.zeros(6)]  # meta stands for another GPU
    values = [torch.ones(4), torch.ones(5, device="meta"), torch.ones(6)]
    registry.KERNELS["average_", "cuda"](averages, values, torch.tensor(1), 1.0, 0, torch.tensor(1))
    assert lengths == [4, 6] and averages[1]._version > 0
