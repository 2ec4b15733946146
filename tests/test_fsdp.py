"""FSDP2: values, gradients and optimizer state divided among processes with gloo, against one process."""

import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparse_moon as sm
from small_processes import join, leave, run_processes
from sparse_moon.algorithms import GMP, MEST, SRigL, TopKAST
from sparse_moon.nn import sparse_layers
from sparse_moon.sharding import whole

STEPS = 11
METHODS = {
    "set": sm.SET,
    "rigl": sm.RigL,
    "mest": lambda *args, **common: MEST(*args, gradient_weight=2.0, **common),
    "srigl": lambda *args, **common: SRigL(*args, gamma_sal=0.0, **common),
}
OPTIMIZERS = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.2, momentum=0.9, foreach=False),
    "momentum-foreach": lambda parameters: torch.optim.SGD(parameters, 0.2, momentum=0.9, foreach=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-2, foreach=False),
    "adamw-foreach": lambda parameters: torch.optim.AdamW(parameters, 1e-2, foreach=True),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, 1e-2, fused=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, 1e-2, initial_accumulator_value=0.1),
}
CASES = {
    4: [("rigl", "momentum"), ("set", "adamw-fused")],
    2: [*[("rigl", optimizer) for optimizer in OPTIMIZERS],
        ("set", "momentum"), ("mest", "adamw"), ("srigl", "momentum")],
}  # fmt: skip


def make_model():
    """Single weights, blocks, vectors, a convolution, and two layers with one weight."""
    torch.manual_seed(7)
    layers = [nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(16, 16), nn.Linear(16, 5)).double()
    model[6].weight = model[4].weight
    sm.sparsify(model[2], 0.5, "uniform", first_dense=False, pattern=(4, 1), selection="constant_fan_in")
    return sm.sparsify(model, 0.5, "uniform", first_dense=False, selection="constant_fan_in")


def shard(model, over=None):
    from torch.distributed.fsdp import fully_shard

    over = over or mesh()
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=over)
    return fully_shard(model, mesh=over)


def mesh(*shape):
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh

    shape = shape or (get_world_size(),)
    return init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts")[-len(shape) :])


def batches(steps, number=0, world=1):
    """Eight examples a step, of which a process sees its part."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(8, 2, 4, 4, generator=generator, dtype=torch.float64)
        yield tuple(t.chunk(world)[number] for t in (x, torch.randint(0, 5, (8,), generator=generator)))


def train(model, kind, optimizer, data, backwards=1, reduce_each=False, keep=1.0):
    """What a model and its optimizer have in the end, whole."""
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    common = {"total_steps": STEPS, "interval": 3, "stop": 0.9}
    if backwards > 1:
        common["backwards_per_step"] = backwards
    method = METHODS[kind](model, optimizer, **common)
    sizes = [layer.topology.num_blocks for layer in method.layers.values()]
    updates, mask, averages = 0, None, {}
    if keep < 1.0:
        mask = sm.RandomMask(model, keep)
        sm.freeze_hidden(mask, optimizer)
        averages = {"ema": sm.EMA(model, 0.7), "mean": sm.WeightAverage(model, mask, rescale=True)}
    for x, y in data:
        if updates == 1:
            model(x).sum().backward()  # what comes of it is thrown away
            optimizer.zero_grad()
            with torch.no_grad():
                model(x)  # an evaluation, which leaves the outermost module's parameters whole
        if mask is not None:
            mask.draw()
        parts = list(zip(x.chunk(backwards), y.chunk(backwards), strict=True))
        for number, (x_part, y_part) in enumerate(parts):
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(reduce_each or number == len(parts) - 1)
            (F.cross_entropy(model(x_part), y_part) / len(parts)).backward()
        updates += method.step()
        optimizer.zero_grad()
        for name, average in averages.items():
            if name == "ema" or updates == 3:  # then the topology stays
                with torch.no_grad():
                    model(x)
                average.update(model)
    assert updates == 3 and sizes == [layer.topology.num_blocks for layer in method.layers.values()]
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = {f"{names[p]}/{key}": value for p, states in optimizer.state.items() for key, value in states.items()}
    found = {name: whole(tensor).clone() for name, tensor in {**model.state_dict(), **state}.items()}
    for name, average in averages.items():
        found |= averaged(name, average, model, mask)
    return found


def averaged(name, average, model, mask):
    """What an average holds, and what a model gets from it, one that is divided like it or whole."""
    held = {key: whole(tensor).clone() for key, tensor in average.state_dict().items()}
    assert average.count > 1
    other = type(average)(model, mask, rescale=True) if name == "mean" else type(average)(model)
    other.load_state_dict(held)  # from whole tensors
    alone = make_model()
    if name == "mean":
        for mine, theirs in zip(sparse_layers(alone).values(), sparse_layers(model).values(), strict=True):
            mine.topology.replace_(theirs.topology.index)
    average.copy_to(alone)
    other.copy_to(model)
    ours, theirs = alone.state_dict(), model.state_dict()
    assert all(torch.equal(whole(theirs[key]), tensor) for key, tensor in ours.items())
    return {f"{name}/{key}": tensor for key, tensor in {**held, **ours}.items()}


def worker(folder):
    from torch.distributed import get_rank, get_world_size

    number, world = get_rank(), get_world_size()
    results = {case: train(shard(make_model()), *case, batches(STEPS, number, world)) for case in CASES[world]}
    for case, reduce_each in ("accumulated", False), ("accumulated, reduced each time", True):
        data = batches(STEPS, number, world)
        results[case] = train(shard(make_model()), "rigl", "momentum", data, 2, reduce_each)
    results["masked"] = train(shard(make_model()), "rigl", "momentum", batches(STEPS, number, world), keep=0.8)
    if world == 4:
        results["copies"] = train(shard(make_model(), mesh(2, 2)), "rigl", "momentum", batches(STEPS, number, world))
        halves = shard(make_model(), mesh(2, 2)["parts"])
        with pytest.raises(ValueError, match="they are divided among 2 of 4 processes"):
            sm.SET(halves, torch.optim.SGD(halves.parameters(), 0.1), total_steps=9, interval=1)
    torch.save(results, f"{folder}/{number}.pt")
    if world == 2:
        refusals()
        half_precision()


def refusals():
    def optimizer_of(model):
        return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    model = shard(make_model())
    for kind, more in ((GMP, {"densities": 0.2}), (TopKAST, {}), (SRigL, {}), (MEST, {"soft_memory_bound": True})):
        with pytest.raises(ValueError, match=r"divided among processes: the method changes their number"):
            kind(model, optimizer_of(model), total_steps=9, interval=2, **more)
    dense = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"sparsify needs whole tensors.*: make the model sparse before"):
        sm.sparsify(fully_sharded(dense), 0.5)
    for what in (model[2].dense_weight, lambda: sm.to_scipy(model[0]), lambda: model[2].weight):
        with pytest.raises(ValueError, match=r"needs whole tensors.*: call unshard"):
            what()
    with pytest.raises(ValueError, match="a TicketAverage needs whole tensors"):
        sm.TicketAverage(model)
    with pytest.raises(ValueError, match=r"a folder needs whole tensors.*integrations\.checkpoint"):
        sm.save(model, "folder")
    optimizer = optimizer_of(model)
    method = sm.SET(model, optimizer, total_steps=9, interval=1)
    for x, y in batches(2):
        F.cross_entropy(model(x), y).backward()
        if method.steps == 1:
            values = model[2].values
            optimizer.state[values]["momentum_buffer"] = values.to_local().clone()
            with pytest.raises(ValueError, match="how that moves with the weights is not known"):
                method.step()
        else:
            method.step()
    torch.manual_seed(torch.distributed.get_rank())
    with pytest.raises(ValueError, match="the processes have different topologies"):
        other = fully_sharded(sm.sparsify(nn.Sequential(nn.Linear(8, 8)), 0.5, first_dense=False))
        sm.SET(other, optimizer_of(other), total_steps=9, interval=1)


def fully_sharded(model):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=mesh())


def half_precision():
    """The choice is by the sharded float32 weights, of which the passes see bfloat16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(0)
    model = sm.sparsify(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4)), 0.5, first_dense=False)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=mesh(), mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    method = sm.RigL(model, optimizer, total_steps=9, interval=2)
    for _ in range(3):
        before = whole(model[0].values).clone(), model[0].topology.positions()
        model(torch.randn(4, 32)).float().square().sum().backward()
        updated = method.step()
        optimizer.zero_grad()
    assert updated and model[0].values.dtype == torch.float32
    kept = torch.isin(before[1], model[0].topology.positions())
    moved = torch.isin(model[0].topology.positions(), before[1])
    assert not kept.all()
    assert torch.equal(before[0][kept], whole(model[0].values)[moved])
    dropped = int(method.drop_fraction(2) * len(kept))  # of which some have come back
    assert before[0][~kept].abs().max() <= before[0].abs().sort().values[dropped - 1]


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_processes_equal_one_with_the_whole_batch(tmp_path, world):
    run_processes(__file__, world, tmp_path)
    everywhere = [torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(world)]
    for case in everywhere[0]:
        kind, optimizer = ("rigl", "momentum") if isinstance(case, str) else case
        backwards = 2 if "accumulated" in case else 1
        keep = 0.8 if case == "masked" else 1.0
        alone = train(make_model(), kind, optimizer, batches(STEPS), backwards, keep=keep)
        for name, tensor in alone.items():
            found = [results[case][name] for results in everywhere]
            assert all(torch.equal(other, found[0]) for other in found), (case, name)
            if tensor.is_floating_point():  # sums in another order: float64 rounding
                torch.testing.assert_close(found[0], tensor, rtol=1e-8, atol=1e-11, msg=f"{case} {name}")
            else:
                assert torch.equal(found[0], tensor), (case, name)


if __name__ == "__main__":
    warnings.simplefilter("error")
    worker(Path(*join(sys.argv)))
    leave()
