"""Checkpoints of several processes: another number of them, damage, and a run that is killed and goes on."""

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint import DefaultSavePlanner

import sparse_moon as sm
from small_processes import environment, join, leave, run_processes
from small_training import Lookahead
from sparse_moon.files import read_json, write_json
from sparse_moon.integrations.checkpoint import load_checkpoint, save_checkpoint
from sparse_moon.sharding import whole

STEPS, INTERVAL, SAVED = 11, 3, 6
OPTIMIZERS = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-2),
}
# Those whose first step is not like others.
FIRST_STEPS = {
    "dampening": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, dampening=0.5),
    "adam": lambda parameters: torch.optim.Adam(parameters, 1e-2),
    "rprop": lambda parameters: torch.optim.Rprop(parameters, 1e-2),
    "none": lambda parameters: torch.optim.SGD(parameters, 0.1),
}
warnings.simplefilter("error")


class Net(nn.Sequential):
    """The last layer is a head that takes no part before a checkpoint."""

    def forward(self, x, late):
        *body, early_head, late_head = self
        for layer in body:
            x = layer(x)
        return late_head(x) if late else early_head(x)


def make_run(seed, optimizer, wrap, dropout=0.0, attached=False, sparsity=0.5):
    """Model and method; topology and weights are those of the seed."""
    torch.manual_seed(seed)
    heads = nn.Linear(24, 5), nn.Linear(24, 5)
    model = Net(nn.Linear(12, 24), nn.Dropout(dropout), nn.ReLU(), *heads).double()
    model = wrap(sm.sparsify(model, sparsity, "uniform", first_dense=False))
    optimizer = {**OPTIMIZERS, **FIRST_STEPS}[optimizer](model.parameters())
    method = sm.RigL(model, optimizer, total_steps=STEPS, interval=INTERVAL, stop=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(method.optimizer, 4)
    return model, method.attach() if attached else method, schedule


def wrap(model):
    from torch.distributed import get_world_size, is_initialized
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (get_world_size(),))) if is_initialized() else model


def parallel(model):
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def train(model, method, schedule, first, last, number=0, world=1):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 12, generator=generator, dtype=torch.float64).chunk(world)[number]
        y = torch.randint(0, 5, (8,), generator=generator).chunk(world)[number]
        F.cross_entropy(model(x, step >= SAVED), y).backward()
        method.optimizer.step() if method.attached else method.step()
        schedule.step()
        method.optimizer.zero_grad()


def state_of(model, method):
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = {f"{names[p]}/{key}": v for p, states in method.optimizer.state.items() for key, v in states.items()}
    everything = {**model.state_dict(), **state, "steps": torch.tensor(method.steps)}
    return {name.removeprefix("module."): whole(tensor).clone() for name, tensor in everything.items()}


def go_on(folder, optimizer, number, world, wrap=wrap):
    """A run of another seed that goes on from the checkpoint."""
    model, method, schedule = make_run(2, optimizer, wrap)
    load_checkpoint(folder / optimizer, model, method, {"schedule": schedule})
    loaded = state_of(model, method)
    train(model, method, schedule, SAVED, STEPS, number, world)
    return {"loaded": loaded, "end": state_of(model, method)}


def worker(folder, task):
    from torch.distributed import get_rank, get_world_size

    number, world = get_rank(), get_world_size()
    results = {}
    for optimizer in OPTIMIZERS:
        if task == "save":
            run = make_run(1, optimizer, wrap)
            train(*run, 0, SAVED, number, world)
            save_checkpoint(folder / optimizer, *run[:2], {"schedule": run[2]})
            results[optimizer] = {"loaded": state_of(*run[:2])}
            train(*run, SAVED, STEPS, number, world)
            results[optimizer]["end"] = state_of(*run[:2])
        else:
            results[optimizer] = go_on(folder, optimizer, number, world)
            if world == 2:
                results[f"{optimizer} ddp"] = go_on(folder, optimizer, number, world, parallel)
    if task == "save":
        damage(folder, number)
        unwritable(folder, number)
    torch.save(results, folder / f"{task}-{world}-{number}.pt")


def damage(folder, number):
    """What is wrong is said on every process, and nothing is changed."""
    from torch.distributed import barrier

    file = next((folder / "adamw").glob("steps-*/*.distcp"))
    content = file.read_bytes()
    barrier()
    if number == 0:
        file.write_bytes(content[:-99] + bytes([content[-99] ^ 1]) + content[-98:])
    barrier()
    model, method, schedule = make_run(2, "adamw", wrap)
    before = state_of(model, method)
    with pytest.raises(ValueError, match=rf"is damaged: {file.name} missing or not as written"):
        load_checkpoint(folder / "adamw", model, method, {"schedule": schedule})
    assert all(torch.equal(before[name], tensor) for name, tensor in state_of(model, method).items())
    barrier()
    if number == 0:
        file.write_bytes(content)
    barrier()


def unwritable(folder, number):
    """What the first process alone cannot write is said by every process, and none waits."""
    model, method, _ = make_run(1, "momentum", wrap)
    (folder / "file").touch()
    with pytest.raises(NotADirectoryError):
        save_checkpoint(folder / "file" / "checkpoint", model, method)
    for name in ("write_json", "shutil.rmtree"):
        full = OSError(28, "No space left on device") if number == 0 else AssertionError
        with mock.patch(f"sparse_moon.integrations.checkpoint.{name}", side_effect=full):
            save = partial(save_checkpoint, folder / "full", model, method)
            with pytest.raises(OSError, match="No space left"):
                save()
        save()


def load_all(folder, name):
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob(f"{name}-*.pt"))]


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2)])
def test_a_checkpoint_goes_on_with_another_number_of_processes(tmp_path, before, after):
    run_processes(__file__, before, tmp_path, "save")
    for world in {after, 2}:  # with as many as before the run ends bit for bit as it did
        run_processes(__file__, world, tmp_path, "load")
    saved = load_all(tmp_path, f"save-{before}")[0]
    for world in {after, 2, 1}:
        if world == 1:
            found = [{optimizer: go_on(tmp_path, optimizer, 0, 1) for optimizer in OPTIMIZERS}]
        else:
            found = load_all(tmp_path, f"load-{world}")
        for results in found:
            for case, states in results.items():
                expected = saved[case.split()[0]]
                assert states["loaded"].keys() == expected["loaded"].keys(), (world, case)
                for name, tensor in expected["loaded"].items():
                    assert torch.equal(states["loaded"][name], tensor), (world, case, name)
                exactly = world == before and case in OPTIMIZERS
                for name, tensor in expected["end"].items():
                    if exactly or not tensor.is_floating_point():
                        assert torch.equal(states["end"][name], tensor), (world, case, name)
                    else:  # sums in another order
                        torch.testing.assert_close(states["end"][name], tensor, rtol=1e-9, atol=1e-12)


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("optimizer", FIRST_STEPS)
def test_a_checkpoint_before_the_first_batch_or_a_refused_one_changes_no_training(tmp_path, optimizer):
    run = make_run(1, optimizer, wrap)
    train(*run, 0, STEPS)
    expected = state_of(*run[:2])
    run = make_run(1, optimizer, wrap)
    save_checkpoint(tmp_path, *run[:2])
    assert not run[1].optimizer.state
    train(*run, 0, STEPS)
    same(state_of(*run[:2]), expected)
    run = make_run(1, optimizer, wrap)
    other = make_run(2, optimizer, wrap, sparsity=0.6)
    torch.manual_seed(3)
    drawn = torch.get_rng_state()
    groups = [dict(group) for group in other[1].optimizer.param_groups]
    with pytest.raises(ValueError, match=r"it has model 0\.values"):
        load_checkpoint(tmp_path, *other[:2])
    assert not other[1].optimizer.state
    assert [dict(group) for group in other[1].optimizer.param_groups] == groups
    assert torch.equal(torch.get_rng_state(), drawn)
    train(*other, 0, STEPS)
    other_expected = make_run(2, optimizer, wrap, sparsity=0.6)
    train(*other_expected, 0, STEPS)
    same(state_of(*other[:2]), state_of(*other_expected[:2]))
    run = make_run(2, optimizer, wrap)
    train(*run, 0, 2)  # it has state, which goes
    load_checkpoint(tmp_path, *run[:2])
    assert not run[1].optimizer.state
    run[2].load_state_dict(make_run(1, optimizer, wrap)[2].state_dict())
    train(*run, 0, STEPS)
    same(state_of(*run[:2]), expected)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_state_of_what_was_frozen_since_it_trained_is_kept(tmp_path, optimizer):
    def frozen(run):
        for parameter in run[0][0].parameters():
            parameter.requires_grad_(False)

    run = make_run(1, optimizer, wrap)
    train(*run, 0, 4)
    frozen(run)
    train(*run, 4, SAVED)
    save_checkpoint(tmp_path, *run[:2], {"schedule": run[2]})
    loaded = state_of(*run[:2])
    train(*run, SAVED, STEPS)
    for batches in (0, 2, 8):  # without any state before, with less, and with more
        other = make_run(2, optimizer, wrap)
        train(*other, SAVED - 2, SAVED - 2 + batches)
        frozen(other)
        load_checkpoint(tmp_path, *other[:2], {"schedule": other[2]})
        same(state_of(*other[:2]), loaded)
        assert [p.requires_grad for p in other[0].parameters()] == [False, False, True, True, True, True]
        train(*other, SAVED, STEPS)
        same(state_of(*other[:2]), state_of(*run[:2]))


def test_what_the_optimizer_holds_is_that_of_the_checkpoint(tmp_path):
    run = make_run(1, "none", wrap)
    save_checkpoint(tmp_path, *run[:2])
    with pytest.raises(ValueError, match="it has optimizer SGD, not AdamW"):
        load_checkpoint(tmp_path, *make_run(1, "adamw", wrap)[:2])
    model = make_run(1, "none", wrap)[0]
    method = sm.Static(model, torch.optim.SGD(list(model.parameters())[:-1], 0.1))
    save_checkpoint(tmp_path, model, method)
    method = sm.Static(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match=r"it has no optimizer 4\.bias"):
        load_checkpoint(tmp_path, model, method)


def test_errors(tmp_path):
    model, method, schedule = make_run(1, "momentum", wrap)
    with pytest.raises(ValueError, match=r"checkpoint\.json does not exist"):
        load_checkpoint(tmp_path, model, method)
    train(model, method, schedule, 0, 2)
    save_checkpoint(tmp_path, model, method, {"schedule": schedule})
    with pytest.raises(ValueError, match=r"has \['schedule'\] besides, asked for are \[\]"):
        load_checkpoint(tmp_path, model, method)
    more = {"schedule": schedule}
    other = make_run(1, "adamw", wrap)
    with pytest.raises(ValueError, match=r"it has no optimizer 0\.values step.*; the run has no optimizer 0\.val"):
        load_checkpoint(tmp_path, *other[:2], {"schedule": other[2]})
    other = make_run(1, "momentum", wrap, sparsity=0.6)
    with pytest.raises(ValueError, match=r"it has model 0\.values torch.float64 \[144\], not torch.float64 \[115\]"):
        load_checkpoint(tmp_path, *other[:2], {"schedule": other[2]})
    other = make_run(1, "momentum", wrap)
    other[0][0].transform = torch.tanh
    with pytest.raises(ValueError, match=r"it has no transform of 0"):
        load_checkpoint(tmp_path, *other[:2], {"schedule": other[2]})
    static = sm.algorithms.Static(model, method.optimizer)
    with pytest.raises(ValueError, match="a checkpoint of method 'rigl', this is 'static'"):
        load_checkpoint(tmp_path, model, static, more)
    with pytest.raises(ValueError, match="has the name 'training'"):
        save_checkpoint(tmp_path, model, method, {"training": schedule})
    first = next(tmp_path.glob("steps-*"))
    save_checkpoint(tmp_path, model, method, more)  # of the same batch
    assert not first.exists() and len(list(tmp_path.glob("steps-*"))) == 1
    next(tmp_path.glob("steps-*/*.distcp")).unlink()
    with pytest.raises(ValueError, match=r"is damaged: __0_0\.distcp missing or not as written"):
        load_checkpoint(tmp_path, model, method, more)
    content = json.loads((tmp_path / "checkpoint.json").read_text())
    (tmp_path / "checkpoint.json").write_text(json.dumps({**content, "steps": 9}))
    with pytest.raises(ValueError, match="its checksum is"):
        load_checkpoint(tmp_path, model, method, more)


class Touches:
    """An object whose pickle makes a file when it is read; a ``Stateful`` that holds it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)

    def state_dict(self):
        return {"touches": self}

    def load_state_dict(self, state):
        raise AssertionError


def test_a_checkpoint_executes_no_code(tmp_path):
    made, folder = tmp_path / "made", tmp_path / "checkpoint"
    run = make_run(1, "momentum", wrap)
    train(*run, 0, 2)
    save_checkpoint(folder, *run[:2])
    metadata = next(folder.glob("steps-*/.metadata"))
    metadata.write_bytes(pickle.dumps(Touches(made)))
    content = read_json(folder / "checkpoint.json")
    content["files"][".metadata"] = hashlib.sha256(metadata.read_bytes()).hexdigest()
    write_json(folder / "checkpoint.json", content)
    before = state_of(*run[:2])
    with pytest.raises(ValueError, match=r"\.metadata cannot be read: it asks for \S+, which could execute code"):
        load_checkpoint(folder, *run[:2])
    same(state_of(*run[:2]), before)
    more = {"other": Touches(made)}
    with mock.patch("sparse_moon.integrations.checkpoint.CheckingPlanner", DefaultSavePlanner):
        save_checkpoint(folder, *run[:2], more)  # as somebody else writes it
    with pytest.raises(ValueError, match="Weights only load failed"):
        load_checkpoint(folder, *run[:2], more)
    assert not made.exists()


def test_what_only_code_could_load_is_not_saved(tmp_path):
    run = make_run(1, "momentum", wrap)
    save_checkpoint(tmp_path, *run[:2])
    with pytest.raises(ValueError, match=r"other\.touches is .*Touches object.*, which no checkpoint can hold"):
        save_checkpoint(tmp_path, *run[:2], {"other": Touches(tmp_path / "made")})
    load_checkpoint(tmp_path, *run[:2])  # the one before, and no step, of which the method would warn
    assert not run[1].optimizer.state


def test_what_is_more_than_one_optimizer_is_refused(tmp_path):
    """DCP would leave out Lookahead's slow weights."""
    model, method, schedule = make_run(1, "momentum", wrap)
    method = sm.RigL(model, Lookahead(method.optimizer), total_steps=STEPS, interval=INTERVAL, stop=0.9)
    train(model, method, schedule, 0, 1)
    with pytest.raises(ValueError, match="Lookahead is more than one optimizer, and a checkpoint of DCP has what SGD"):
        save_checkpoint(tmp_path, model, method)
    assert not list(tmp_path.iterdir())


def elastic(folder):
    """A run under torchrun that saves now and then, and whose second process dies once."""
    from torch.distributed import destroy_process_group, get_rank, get_world_size, init_process_group

    torch.set_num_threads(1)
    init_process_group("gloo")
    model, method, schedule = make_run(1, "adamw", wrap, dropout=0.3, attached=True)
    dies = (folder / "dies").exists()
    if (folder / "checkpoint.json").exists():
        load_checkpoint(folder, model, method, {"schedule": schedule})
    for step in range(method.steps, STEPS):
        if step == 8 and dies and get_rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        train(model, method, schedule, step, step + 1, get_rank(), get_world_size())
        if step % 3 == 1:
            save_checkpoint(folder, model, method, {"schedule": schedule})
    state = state_of(model, method)
    if get_rank() == 0:
        torch.save(state, folder / "end.pt")
    destroy_process_group()


def test_a_killed_run_goes_on_under_torchrun_bit_for_bit(tmp_path):
    ends = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "killed":
            (folder / "dies").touch()
        # gloo's processes find the addresses of those before the restart in a store that outlives it (torch 2.14)
        variables = {**environment(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [*launch, "--max-restarts=1", "--monitor-interval=0.1", __file__, "elastic", str(folder)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert ("exitcode: -9" in done.stderr) == (name == "killed"), done.stderr
        ends.append(torch.load(folder / "end.pt", weights_only=True))
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name


if __name__ == "__main__":
    if sys.argv[1] == "elastic":
        elastic(Path(sys.argv[2]))
    else:
        folder, task = join(sys.argv)
        worker(Path(folder), task)
    leave()
