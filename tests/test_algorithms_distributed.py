"""Two processes with gloo against one process with the doubled batch, for the methods of test_algorithms_methods."""

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
from sparse_moon.algorithms import GMP, MEST, GraNet, RigL, SRigL, TopKAST

STEPS = 16
DIVIDED = "rigl, Adam's state divided among the processes"
KINDS = {
    "gmp": lambda *args, **common: GMP(*args, densities={"0": 0.2, "2": 0.3}, **common),
    "granet": lambda *args, **common: GraNet(*args, densities=0.3, **common),
    "mest": lambda *args, **common: MEST(*args, gradient_weight=2.0, **common),
    "mest-soft": lambda *args, **common: MEST(*args, soft_memory_bound=True, **common),
    "top-kast": TopKAST,
    "srigl": lambda *args, **common: SRigL(*args, gamma_sal=0.9, **common),
    DIVIDED: RigL,
}


def adam(parameters):
    """Alone; in several processes each has the state of some parameters."""
    if not dist.is_initialized():
        return torch.optim.Adam(parameters, lr=0.01)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(parameters, torch.optim.Adam, lr=0.01)


def train(kind, parts, wrap=lambda model: model):
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5)).double()
    model = sm.sparsify(model, 0.5, "uniform", first_dense=False, selection="constant_fan_in")
    divided = kind == DIVIDED
    optimizer = adam(model.parameters()) if divided else torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
    parallel = wrap(model)
    method = KINDS[kind](parallel, optimizer, total_steps=STEPS, interval=3, stop=0.9)
    if divided:
        method.attach()
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(8, 12, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 5, (8,), generator=generator)
        F.cross_entropy(parallel(x[parts]), y[parts]).backward()
        if divided:
            optimizer.step()
        elif method.step() and method.resizes:
            parallel = wrap(model)
        optimizer.zero_grad()
    return model.state_dict()


def worker(port, folder, rank):
    """What each process does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    part = slice(4 * rank, 4 * rank + 4)
    torch.save({kind: train(kind, part, DistributedDataParallel) for kind in KINDS}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [subprocess.Popen([sys.executable, __file__, str(port), str(tmp_path), str(r)]) for r in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for kind in KINDS:
        for name, tensor in train(kind, slice(0, 8)).items():
            assert torch.equal(first[kind][name], second[kind][name]), (kind, name)
            if tensor.is_floating_point():  # sums in another order: float64 rounding over 16 steps
                torch.testing.assert_close(first[kind][name], tensor, rtol=1e-9, atol=1e-12)
            else:
                assert torch.equal(first[kind][name], tensor), (kind, name)


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    os._exit(0)  # everything is saved; gloo's threads can abort an orderly exit of the interpreter
