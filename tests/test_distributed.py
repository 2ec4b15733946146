"""Two processes with gloo against one process with the doubled batch."""

import os
import socket
import subprocess
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparse_moon as sm
from sparse_moon.distributed import average_gradients_

STEPS, INTERVAL, CLASSES = 16, 5, 4


def make_model(kind):
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, CLASSES + 1)).double()
    model = sm.sparsify(model, 0.6)
    return sm.lora(model, rank=1) if kind == "lora" else model


def make_batches():
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, 12, generator=generator, dtype=torch.float64),
            torch.randint(0, CLASSES, (8,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def train(model, parallel, kind, part):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.2, momentum=0.9)
    step, updates = optimizer.step, 0
    if kind != "lora":
        step = {"rigl": sm.RigL, "set": sm.SET}[kind](parallel, optimizer, total_steps=30, interval=INTERVAL).step
    for x, y in make_batches():
        F.cross_entropy(parallel(x[part]), y[part]).backward()
        updates += bool(step())  # of an optimizer None
        optimizer.zero_grad()
    assert updates == (0 if kind == "lora" else 3)
    return model.state_dict()


def worker(port, kind, folder, rank):
    """What each process does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = make_model(kind)
    state = train(model, DistributedDataParallel(model), kind, slice(4 * rank, 4 * rank + 4))
    loss = sm.UnknownAwareLoss(CLASSES, 4, warmup_epochs=1)
    x, y = make_batches()[rank]
    loss(model(x).float(), y)
    loss.end_epoch()
    outliers = sm.VirtualOutlierLoss(3, 2, 4)
    features = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]]) * (rank + 1)
    labels = torch.tensor([0, 0, 1 + rank])  # class 1 is seen by the first process alone, class 2 by the second
    outliers(torch.zeros(3, 3), labels, features, torch.nn.Linear(2, 3))
    outliers.end_epoch()
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    for parameter, given in zip(parameters, (True, rank == 1, False), strict=True):
        if given:
            parameter.grad = torch.tensor([2.0 + rank, 4.0])
    average_gradients_(parameters)
    found = {"model": state, "w": loss.w, "outliers": outliers.state_dict(), "grads": [p.grad for p in parameters]}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    for kind in ("rigl", "set", "lora"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, __file__, str(port), kind, str(tmp_path)]
        processes = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
        first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
        model = make_model(kind)
        alone = train(model, model, kind, slice(0, 8))
        assert first["w"] == second["w"] > 0
        for end in (first["outliers"], second["outliers"]):
            assert end["seen"].all()
            torch.testing.assert_close(end["mean"], torch.tensor([[3.0, 4.5], [5.0, 7.0], [10.0, 14.0]]))
            torch.testing.assert_close(end["covariance"], torch.full((2, 2), (2 / 3 + 8 / 3) / 2))  # that of class 0
        for everywhere, second_alone, nowhere in (first["grads"], second["grads"]):
            assert everywhere.tolist() == [2.5, 4.0] and second_alone.tolist() == [1.5, 2.0] and nowhere is None
        for name, tensor in alone.items():
            assert torch.equal(first["model"][name], second["model"][name])
            if tensor.is_floating_point():  # sums in another order: float64 rounding over 16 steps
                torch.testing.assert_close(first["model"][name], tensor, rtol=1e-9, atol=1e-12)
            else:
                assert torch.equal(first["model"][name], tensor)


if __name__ == "__main__":
    worker(*sys.argv[1:4], int(sys.argv[4]))
    os._exit(0)  # everything is saved; gloo's threads can abort an orderly exit of the interpreter
