"""Refreshed batch-norm statistics are those of all images, each weighing the same."""

import copy
import os
import socket
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparse_moon as sm

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SIZES = [8, 8, 5, 1]  # the last batch of an epoch, of one image


def images(count, *shape):
    """No two alike in their mean, so that weights of images matter."""
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    return 3 * noise + torch.arange(float(count)).view(-1, *[1] * len(shape))


def check(norm, x):
    """Statistics of one big batch."""
    dims = [d for d in range(x.dim()) if d != 1]
    torch.testing.assert_close(norm.running_mean, x.mean(dims), **CLOSE)
    torch.testing.assert_close(norm.running_var, x.var(dims), **CLOSE)


@pytest.mark.parametrize(
    "norm, shape",
    [(nn.BatchNorm1d, ()), (nn.BatchNorm1d, (6,)), (nn.BatchNorm2d, (1, 1)), (nn.BatchNorm2d, (3, 5)),
     (nn.BatchNorm3d, (2, 3, 4)), (nn.SyncBatchNorm, (3, 5)), (sm.BatchNormReLU2d, (3, 5)),
     (sm.BatchNormReLU2d, (1, 1))],
)  # fmt: skip
@pytest.mark.parametrize(
    "sizes", [SIZES, [1, 8, 13], [22], [11, 11], [1] * 22, [2, 1, 1, 18], [21, 1]], ids=lambda s: "_".join(map(str, s))
)
def test_unequal_batches_and_single_images_weigh_as_in_one_big_batch(norm, shape, sizes):
    x, norm = images(22, 4, *shape), norm(4)
    sm.refresh_batch_norm(nn.Sequential(norm), [(part, None) for part in x.split(sizes)])
    check(norm, x)


def test_the_mean_is_exact_far_from_zero_and_in_16_bits():
    x = torch.randn(64, 4, 3, 3) + 1000
    norm = nn.BatchNorm2d(4)
    sm.refresh_batch_norm(norm, x.split(9))
    torch.testing.assert_close(norm.running_var, x.double().var((0, 2, 3)).float(), rtol=1e-4, atol=0)
    norm = nn.BatchNorm2d(4).bfloat16()
    x = torch.randn(64, 4, 3, 3).bfloat16()
    sm.refresh_batch_norm(norm, x.split(1))
    assert torch.equal(norm.running_mean, x.float().mean((0, 2, 3)).bfloat16())


def test_later_layers_see_batches_normalised_by_themselves():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 5), nn.BatchNorm1d(5))
    x = images(20, 4)
    sm.refresh_batch_norm(model, x.split(10))
    with torch.no_grad():
        hidden = torch.cat([model[1](nn.BatchNorm1d(4)(part)) for part in x.split(10)])
    check(model[2], hidden)


def test_images_of_several_sizes_weigh_by_their_positions():
    norm, batches = nn.BatchNorm2d(2), [images(3, 2, 4, 4), images(1, 2, 7, 3), images(1, 2, 2, 2), images(2, 2, 5, 5)]
    sm.refresh_batch_norm(norm, batches)
    check(norm, torch.cat([x.movedim(1, 3).reshape(-1, 2) for x in batches]))


def test_a_batch_norm_that_is_used_twice_has_the_statistics_of_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(x) + self.norm(2 * x + 1)

    model, x = Twice(), images(20, 4)
    sm.refresh_batch_norm(model, x.split(6))
    check(model.norm, torch.cat([x, 2 * x + 1]))


def test_dropout_is_off_as_where_the_statistics_are_used():
    model, x = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4)).train(), images(20, 4)
    sm.refresh_batch_norm(model, [x])
    check(model[1], x)


def modes(model):
    return [module.training for module in model.modules()]


def test_modes_and_momenta_stay():
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=0.3), nn.Dropout(), nn.BatchNorm1d(4, momentum=None)).train()
    model[0].eval()
    before = modes(model)
    sm.refresh_batch_norm(model, images(20, 4).split(6))
    assert modes(model) == before and (model[0].momentum, model[2].momentum) == (0.3, None)
    assert model[0].num_batches_tracked == 4 and not model[0]._forward_pre_hooks


def test_a_failing_pass_leaves_everything_as_it_was():
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=0.3), nn.BatchNorm1d(4)).train()
    model[1].eval()
    model(images(20, 4))
    before, state = modes(model), copy.deepcopy(model.state_dict())

    def broken():
        yield images(5, 4)
        yield images(5, 4)
        raise OSError("the disk is gone")

    for batches in (broken(), [images(5, 4), images(5, 3)]):
        with pytest.raises((OSError, RuntimeError)):
            sm.refresh_batch_norm(model, batches)
        assert modes(model) == before and model[0].momentum == 0.3 and not model[0]._forward_pre_hooks
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_model_without_batch_norm_does_not_read_the_data():
    def unread():
        raise AssertionError("read")
        yield

    sm.refresh_batch_norm(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), unread())
    sm.refresh_batch_norm(nn.BatchNorm1d(4, track_running_stats=False), unread())


class Batch(NamedTuple):
    image: torch.Tensor
    label: torch.Tensor


def test_kinds_of_batches():
    x, y = images(20, 4), torch.zeros(20)
    for kind in (lambda a, b: a, lambda a, b: (a, b), lambda a, b: [a, b], lambda a, b: (a,), Batch):
        norm = nn.BatchNorm1d(4)
        sm.refresh_batch_norm(norm, [kind(a, b) for a, b in zip(x.split(6), y.split(6), strict=True)])
        check(norm, x)
    for batch, name in (({"image": x}, "dict"), ((), "tuple"), (x.numpy(), "ndarray"), (torch.tensor(1.0), "Tensor")):
        with pytest.raises(ValueError, match=rf"expected batches of images .* got {name}"):
            sm.refresh_batch_norm(nn.BatchNorm1d(4), [batch])


def test_nothing_to_estimate_from_is_an_error():
    for batches in ([], iter(()), [images(1, 4)[:0]]):
        norm = nn.BatchNorm1d(4)
        with pytest.raises(ValueError, match="no image to estimate"):
            sm.refresh_batch_norm(norm, batches)
        assert norm.running_var.eq(1).all()
    for norm in (nn.BatchNorm1d(4), nn.BatchNorm2d(4), sm.BatchNormReLU2d(4)):
        x = images(1, 4) if isinstance(norm, nn.BatchNorm1d) else images(1, 4, 1, 1)
        with pytest.raises(ValueError, match="value"):
            sm.refresh_batch_norm(norm, [x])
        assert norm.running_var.eq(1).all() and norm.running_mean.eq(0).all()


def test_batch_norms_that_are_not_used_are_named():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Identity())
    model[1].idle = nn.BatchNorm1d(4)
    with pytest.warns(UserWarning, match=r"did not use these batch norms.*\['1.idle'\]"):
        sm.refresh_batch_norm(model, [images(20, 4)])
    check(model[0], images(20, 4))
    assert model[1].idle.running_var.eq(1).all() and model[1].idle.num_batches_tracked == 0


def test_fused_sparse_and_compiled_models():
    first, second = ([nn.Conv2d(c, 8, 3), nn.BatchNorm2d(8), nn.ReLU()] for c in (3, 8))
    model = sm.sparsify(nn.Sequential(*first, *second), 0.5, "uniform", first_dense=False)
    fused = sm.fuse(copy.deepcopy(model))
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    x = images(9, 3, 6, 6)
    compiled(x)  # compiled before there are hooks
    for other in (model, fused, compiled):
        sm.refresh_batch_norm(other, [(part, None) for part in x.split(4)])
    for name, expected in model.named_buffers():
        if "running" in name:
            torch.testing.assert_close(dict(fused.named_buffers())[name], expected, **CLOSE)
            torch.testing.assert_close(dict(compiled.named_buffers())[f"_orig_mod.{name}"], expected, **CLOSE)


def worker(port, folder, rank):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = DistributedDataParallel(nn.Sequential(nn.BatchNorm1d(4)))
    mine = images(20, 4)[:13] if rank == 0 else images(20, 4)[13:]
    sm.refresh_batch_norm(model, mine.split(6))
    torch.save(model.module.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_agree_on_the_statistics_of_all_images(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, str(port), str(tmp_path)]
    processes = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first["0.running_mean"], second["0.running_mean"])
    assert torch.equal(first["0.running_var"], second["0.running_var"])
    norm = nn.BatchNorm1d(4)
    norm.running_mean, norm.running_var = first["0.running_mean"], first["0.running_var"]
    check(norm, images(20, 4))


if __name__ == "__main__":
    worker(*sys.argv[1:3], int(sys.argv[3]))
    os._exit(0)  # everything is saved; gloo's threads can abort an orderly exit of the interpreter
