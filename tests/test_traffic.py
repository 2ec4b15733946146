"""Bytes of gradients that two processes exchange: at 95 % sparsity at least five times less than dense ones."""

import json
import sys
from unittest import mock

import torch
from torch import nn

import sparse_moon as sm
from small_processes import join, leave, run_processes

STEPS, INTERVAL = 21, 20  # an update, five times as often as every 100 batches


def make_model(sparsity):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))
    return sm.sparsify(model, sparsity, "uniform", first_dense=False) if sparsity else model


def train(model, parallel):
    """The bytes that topology updates send; each step's loss is of this process's batch."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    kind = sm.RigL if sm.sparse_layers(model) else lambda model, optimizer, **_: sm.algorithms.Dense(model, optimizer)
    method = kind(parallel, optimizer, total_steps=100, interval=INTERVAL)
    sent = []
    update = sm.algorithms.regrowth.mean_over_processes_

    def counted(tensor):
        sent.append(2 * tensor.nbytes)  # to one process and back, as an all-reduce
        update(tensor)

    with mock.patch("sparse_moon.algorithms.regrowth.mean_over_processes_", counted):
        for _ in range(STEPS):
            parallel(torch.randn(4, 128)).square().mean().backward()
            method.step()
            optimizer.zero_grad()
    return sum(sent)


def by_ddp(sparsity):
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    sent = []

    def hook(group, bucket):
        sent.append(2 * bucket.buffer().nbytes)
        return allreduce_hook(group, bucket)

    model = make_model(sparsity)
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel.register_comm_hook(None, hook)
    updates = train(model, parallel)
    return {"gradients": sum(sent), "updates": updates}


def by_fsdp(sparsity):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sent = {"gradients": 0, "weights": 0}

    def counted(kind, of, call):
        def run(*args, **kwargs):
            tensors = {"output": args[0] if args else None, "input": args[1] if len(args) > 1 else None, **kwargs}
            whole = tensors.get(f"{of}_tensor", tensors.get(of))
            sent[kind] += whole.nbytes
            return call(*args, **kwargs)

        return run

    # torch 2.14 has other names for both
    names = {"reduce_scatter_tensor": ("gradients", "input"), "reduce_scatter_single": ("gradients", "input"),
             "all_gather_into_tensor": ("weights", "output"), "all_gather_single": ("weights", "output")}  # fmt: skip
    patches = [
        mock.patch.object(distributed, name, counted(*what, getattr(distributed, name)))
        for name, what in names.items()
        if hasattr(distributed, name)
    ]
    for patch in patches:
        patch.start()
    model = make_model(sparsity)
    mesh = init_device_mesh("cpu", (2,))
    for layer in list(model)[::2]:
        fully_shard(layer, mesh=mesh)
    updates = train(model, fully_shard(model, mesh=mesh))
    for patch in patches:
        patch.stop()
    return {**sent, "updates": updates}


def test_sparse_gradients_take_a_fifth_of_the_bytes(tmp_path):
    run_processes(__file__, 2, tmp_path)
    sent = json.loads((tmp_path / "sent.json").read_text())
    for way in ("ddp", "fsdp"):
        dense, sparse = sent[f"{way} 0"], sent[f"{way} 0.95"]
        present = sum(parameter.numel() for parameter in make_model(0.0).parameters())
        each = 2 if way == "ddp" else 1  # a reduce-scatter is half an all-reduce
        assert dense["gradients"] == each * 4 * present * STEPS and dense["updates"] == 0
        assert sparse["updates"] > 0
        assert dense["gradients"] > 5 * (sparse["gradients"] + sparse["updates"]), (way, sent)
        assert dense["gradients"] > 15 * sparse["gradients"], (way, sent)
    assert sent["fsdp 0"]["weights"] > 15 * sent["fsdp 0.95"]["weights"] > 0


if __name__ == "__main__":
    from torch.distributed import get_rank

    (folder,) = join(sys.argv)
    counts = {f"{way.__name__[3:]} {sparsity}": way(sparsity) for way in (by_ddp, by_fsdp) for sparsity in (0, 0.95)}
    if get_rank() == 0:
        with open(f"{folder}/sent.json", "w") as file:
            json.dump(counts, file)
    leave()
