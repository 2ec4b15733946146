"""Training that would do nothing, or something else, without a word."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparse_moon as sm
from small_training import EXCHANGES, METHODS, backward, batch, changed, make, masks, net, sgd, train

# --- optimizers that hold nothing


@pytest.mark.parametrize("kind", [*METHODS, "static"])
def test_an_optimizer_without_the_sparse_values_is_refused(kind):
    dense = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 6))
    optimizer = torch.optim.SGD(dense.parameters(), 0.1)
    model = sm.sparsify(dense, 0.6, "uniform", first_dense=False, selection="constant_fan_in")
    others = [torch.optim.SGD(net().parameters(), 0.1), torch.optim.SGD([model[0].bias], 0.1)]
    for wrong in (optimizer, *others):
        with pytest.raises(ValueError, match="build it after sparsify"):
            make(kind, model, wrong) if kind != "static" else sm.Static(model, wrong)


def test_the_dense_baseline_refuses_an_optimizer_of_another_model():
    dense = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="holds no weights of this model's layers"):
        sm.Dense(dense, torch.optim.SGD(nn.Linear(4, 4).parameters(), 0.1))


def test_an_optimizer_that_holds_a_part_says_so():
    model = net()
    optimizer = torch.optim.SGD([*model[0].parameters(), *model[2].parameters()], 0.1)
    with pytest.warns(UserWarning, match=r"does not hold the values of \['4'\]"):
        method = sm.RigL(model, optimizer, total_steps=60, interval=5)
    before = masks(model)
    train(model, method, 30)
    assert changed(before, model) == ["0", "2"]


def test_parameters_that_left_the_optimizer_are_an_error():
    model = net()
    method = make("rigl", model)
    train(model, method, 5)
    method.optimizer.param_groups[0]["params"] = list(model[0].parameters())
    backward(model, batch())
    with pytest.raises(ValueError, match="does not hold the values of"):
        method.step()


# --- layers that do not train


@pytest.mark.parametrize("kind", METHODS)
def test_frozen_layers_are_no_part_of_the_method(kind):
    model = net()
    model[0].requires_grad_(False)
    weight = model[0].dense_weight().clone()
    before = masks(model)
    train(model, make(kind, model), 60)
    assert torch.equal(model[0].dense_weight(), weight)
    assert set(changed(before, model)) == {"2", "4"}


def test_a_model_of_frozen_layers_is_refused():
    model = net()
    for layer in sm.sparse_layers(model).values():
        layer.values.requires_grad_(False)
    with pytest.raises(ValueError, match="all are frozen"):
        make("rigl", model)
    sm.Static(model, sgd(model))  # a frozen sparse network with a head to train is one


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x, skip):
        return self.a(x) if skip else self.b(self.a(x))


@pytest.mark.parametrize(("kind", "to_none"), [
    *[(kind, True) for kind in EXCHANGES], *[(kind, False) for kind in EXCHANGES if kind != "top-kast"],  # its penalty
])  # fmt: skip
def test_a_layer_without_a_gradient_keeps_its_topology(kind, to_none):
    model = sm.sparsify(Skips(), 0.75, "uniform", first_dense=False, selection="constant_fan_in")
    method = make(kind, model, total_steps=100)
    before = masks(model)
    for i in range(22):
        model(torch.randn(8, 32), i % 5 == 0).square().mean().backward()
        method.step()
        method.optimizer.zero_grad(set_to_none=to_none)
    assert changed(before, model) == ["a"]
    model(torch.randn(8, 32), False)


@pytest.mark.parametrize("kind", ["gmp", "granet", "mest-soft"])
def test_counts_are_kept_without_a_gradient(kind):
    """What a schedule promises is kept: a layer that is not used is pruned all the same."""
    model = sm.sparsify(Skips(), 0.5, "uniform", first_dense=False)
    method = make(kind, model, total_steps=60)
    for _ in range(60):
        model(torch.randn(8, 32), True).square().mean().backward()
        method.step()
        method.optimizer.zero_grad()
    expected = 512 if kind == "mest-soft" else 102
    assert model.a.topology.nnz == model.b.topology.nnz == expected


def by_inputs(model, x, y):
    F.cross_entropy(model(x), y).backward(inputs=list(model.parameters()))


def by_grad(model, x, y):
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        parameter.grad = grad


def by_func(model, x, y):
    def loss(parameters):
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

    grads = torch.func.grad(loss)(dict(model.named_parameters()))
    for name, parameter in model.named_parameters():
        parameter.grad = grads[name].detach()


@pytest.mark.parametrize("how", [by_inputs, by_grad, by_func])
@pytest.mark.parametrize("kind", ["rigl", "srigl"])
def test_gradients_that_bring_no_dense_gradient_move_nothing_and_that_is_said(kind, how):
    model = net()
    method, before = make(kind, model), masks(model)
    with pytest.warns(UserWarning, match="no layer had a gradient in the update") as said:
        for _ in range(12):
            how(model, *batch())
            method.step()
            method.optimizer.zero_grad()
    assert len(said) == 1 and not changed(before, model)


@pytest.mark.parametrize("first", [4, 5])  # 5: the next batch is an update
@pytest.mark.parametrize("kind", METHODS)
def test_layers_that_are_frozen_later_stay_as_they_are(kind, first):
    model = net()
    method = make(kind, model)
    train(model, method, first)
    model[0].requires_grad_(False)
    before, weight = masks(model), model[0].dense_weight().clone()
    train(model, method, 16)
    assert torch.equal(model[0].dense_weight(), weight) and "2" in changed(before, model)


def test_layers_that_train_later_are_named():
    model = net()
    model[0].requires_grad_(False)
    method = make("rigl", model, torch.optim.SGD(model.parameters(), 0.1))
    train(model, method, 4)
    model[0].requires_grad_(True)
    with pytest.warns(UserWarning, match=r"\['0'\] train now, but when method 'rigl' was made they were frozen"):
        train(model, method, 2)


class Reads(nn.Module):
    """A layer that is called, and one that is read through its weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32, bias=False), nn.Linear(32, 6)

    def forward(self, x):
        return self.b(F.linear(self.a(x).relu(), self.a.weight.t()))


def test_the_dense_gradient_of_a_layer_that_is_read_is_whole():
    model = sm.sparsify(Reads(), 0.6, "uniform", first_dense=False)
    dense = sm.densify(copy.deepcopy(model))
    x = torch.randn(16, 32)
    probe = torch.zeros(()).expand(32, 32).detach().requires_grad_()
    model.a.probe = probe
    for m in (model, dense):
        m(x).square().sum().backward()
    torch.testing.assert_close(probe.grad, dense.a.weight.grad)
    torch.testing.assert_close(model.a.topology.gather(probe.grad), model.a.values.grad)

    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 6)

        def forward(self, x):
            return F.linear(x, self.fc.weight, self.fc.bias)

    model = sm.sparsify(Only(), 0.6, "uniform", first_dense=False)
    before = masks(model)
    train(model, make("rigl", model), 7)
    assert changed(before, model) == ["fc"]


# --- backward passes that are not the step's


def after(model, method, first, skip):
    """The topology after an update on a batch, with another pass before it."""
    train_on = [batch() for _ in range(5)]
    for one in train_on:
        backward(model, one)
        method.step()
        method.optimizer.zero_grad()
    skip(model, first)
    return model


def skipped(model, one):
    backward(model, one)
    model.zero_grad()


def zeroed(model, one):
    backward(model, one)
    model.zero_grad(set_to_none=False)


def attacked(model, one):
    x = one[0].clone().requires_grad_()
    F.cross_entropy(model(x), one[1]).backward()
    model.zero_grad()


def watched(model, one):
    x = one[0].clone().requires_grad_()
    torch.autograd.grad(F.cross_entropy(model(x), one[1]), x)


def failed(model, one):
    x = one[0].clone().requires_grad_()
    x.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        F.cross_entropy(model(x), one[1]).backward()
    model.zero_grad()


def infinite(model, one):
    backward(model, (one[0] * float("nan"), one[1]))
    model.zero_grad()


@pytest.mark.parametrize("backwards", [1, 2])
@pytest.mark.parametrize("other", [skipped, zeroed, attacked, watched, failed, infinite])
@pytest.mark.parametrize("kind", ["rigl", "srigl", "granet"])
def test_what_zero_grad_throws_away_does_not_steer_growth(kind, other, backwards):
    torch.manual_seed(1)
    models = [net()]
    models.append(copy.deepcopy(models[0]))
    for_all = [batch() for _ in range(12)]
    for model, extra in zip(models, (lambda *_: None, other), strict=True):
        method = make(kind, model, backwards_per_step=backwards)
        for step, one in enumerate(for_all):
            if step in (5, 10):
                extra(model, for_all[0])
            for part in range(backwards):
                backward(model, [t[part::backwards] for t in one])
            method.step()
            method.optimizer.zero_grad(set_to_none=other is not zeroed)
    for (name, ours), theirs in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_generator_trains_through_a_sparse_discriminator():
    torch.manual_seed(0)
    generator, models = nn.Linear(8, 32), [net()]
    models.append(copy.deepcopy(models[0]))
    for model, with_generator in zip(models, (False, True), strict=True):
        method = make("rigl", model, interval=2)
        torch.manual_seed(3)
        for _ in range(12):
            one = batch()
            noise = torch.randn(16, 8)
            method.optimizer.zero_grad()
            backward(model, one)
            method.step()
            if with_generator:
                model(generator(noise)).mean().backward()
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))


def test_accumulation_that_was_not_announced_is_still_an_error():
    model = net()
    method = make("rigl", model)
    train(model, method, 5)
    backward(model, batch())
    with pytest.raises(RuntimeError, match="backwards_per_step"):
        backward(model, batch())
    model.zero_grad()
    train(model, method, 10)  # and not the end


def test_an_update_refused_for_infinite_gradients_is_not_the_end():
    for kind in ("rigl", "srigl", "granet", "mest"):
        model = net()
        method = make(kind, model)
        train(model, method, 5)
        backward(model, (batch()[0] * float("inf"), batch()[1]))
        with pytest.raises(ValueError, match="not finite"):
            method.step()
        method.optimizer.zero_grad()
        before = masks(model)
        train(model, method, 1)
        assert changed(before, model)


def test_an_update_that_was_refused_leaves_no_choice_behind():
    model = sm.sparsify(Skips(), 0.75, "uniform", first_dense=False)
    method = make("rigl", model)
    for step in range(7):
        nan, skip = step == 5, step == 6
        model(torch.full((8, 32), float("nan")) if nan else torch.randn(8, 32), skip).square().mean().backward()
        before = masks(model)
        if nan:
            with pytest.raises(ValueError, match="not finite"):
                method.step()
        else:
            method.step()
        method.optimizer.zero_grad()
    assert changed(before, model) == ["a"]  # the update of the batch after, in which b took no part


# --- wrapped models


@pytest.mark.parametrize("kind", ["gmp", "granet", "rigl"])
@pytest.mark.parametrize("wrap", ["compile", "parallel"])
def test_wrapped_models_have_plain_names(kind, wrap):
    model = net(0.3)
    densities = {"0": 0.2, "2": 0.1, "4": 0.3}
    wrapped = torch.compile(model, backend="eager") if wrap == "compile" else nn.DataParallel(model)
    options = {} if kind == "rigl" else {"densities": densities}
    kinds = {"gmp": sm.GMP, "granet": sm.GraNet, "rigl": sm.RigL}
    method = kinds[kind](wrapped, sgd(model), total_steps=40, interval=5, **options)
    assert list(method.layers) == ["0", "2", "4"]
    train(wrapped, method, 40)
    if kind != "rigl":
        for name, density in densities.items():
            assert 1.0 - model.get_submodule(name).sparsity == pytest.approx(density, abs=0.01)
        prefixed = {f"_orig_mod.{name}": density for name, density in densities.items()}
        other = net(0.3)
        kinds[kind](other, sgd(other), total_steps=40, interval=5, densities=prefixed)


# --- several processes


def test_processes_without_a_group_say_so(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match="each trains a network of its own"):
        make("rigl", net())


WORKER = """
import sys, torch, torch.distributed as dist, sparse_moon as sm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
kind, store, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(rank if kind.startswith("seeds") else 0)
model = sm.sparsify(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)), 0.8, "uniform", first_dense=False)
torch.manual_seed(rank)
run = DistributedDataParallel(model, find_unused_parameters=True) if "ddp" in kind else model
try:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    make = sm.SET if "set" in kind else sm.RigL
    method = make(run, optimizer, total_steps=40, interval=3, seed=rank if "set" in kind else 0)
    for step in range(10):
        x = torch.randn(8, 32)
        run(x).square().mean().backward()
        method.step(); optimizer.zero_grad()
    print("trained", model[0].topology.fingerprint, float(model[0].values.detach().sum()))
except ValueError as error:
    print("refused", str(error)[:400])
dist.barrier()
import os; sys.stdout.flush(); os._exit(0)
"""


@pytest.mark.parametrize(("kind", "outcome"), [
    ("seeds", "refused at the start"), ("seeds ddp", "trained"), ("ddp", "trained"), ("set ddp", "refused after the"),
    ("alone", "refused after the"),
])  # fmt: skip
def test_processes_that_would_train_different_networks(kind, outcome, tmp_path):
    run = [sys.executable, "-W", "ignore", "-c", WORKER, kind, str(tmp_path / "store")]
    processes = [subprocess.Popen([*run, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    printed = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert printed[0] == printed[1] and printed[0].startswith(outcome), printed


# --- averages


@pytest.mark.parametrize("pattern", ["unstructured", "block2"])
@pytest.mark.parametrize("kind", ["rigl", "set", "mest-soft"])
def test_ema_is_that_of_the_dense_weights(kind, pattern):
    model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 6))
    sm.sparsify(model, 0.6, "uniform", first_dense=False, pattern=pattern)
    method, ema = make(kind, model, interval=3), sm.EMA(model, 0.8)
    with pytest.raises(ValueError, match="no model has been averaged"):
        ema.copy_to(model)
    dense = None
    for step in range(20):
        train(model, method, 1)
        ema.update(model)
        now = {name: layer.dense_weight().detach() for name, layer in sm.sparse_layers(model).items()}
        now |= {"bias": model[0].bias.detach().clone(), "mean": model[1].running_mean.clone()}
        dense = now if dense is None else {k: v.lerp(now[k], 0.2) for k, v in dense.items()}
        for name, layer in sm.sparse_layers(model).items():
            dense[name] = dense[name] * layer.mask()  # a weight that goes is forgotten
        if step == 10:
            saved = copy.deepcopy(ema.state_dict())
            ema = sm.EMA(copy.deepcopy(model), 0.8)
            ema.load_state_dict(saved)
    target = copy.deepcopy(model)
    train(target, make("set", target, interval=2), 5)
    ema.copy_to(target)
    for name, layer in sm.sparse_layers(target).items():
        torch.testing.assert_close(layer.dense_weight().detach(), dense[name])
    torch.testing.assert_close(target[0].bias.detach(), dense["bias"])
    torch.testing.assert_close(target[1].running_mean, dense["mean"])
    assert int(target[1].num_batches_tracked) == int(model[1].num_batches_tracked)
    target(torch.randn(4, 32)).sum().backward()


def test_ema_of_16_bit_weights_and_wrong_decay():
    model = net().bfloat16()
    ema = sm.EMA(model, 0.999)
    for _ in range(50):
        with torch.no_grad():
            model[0].bias += 0.01
        ema.update(model)
    ema.copy_to(model)
    assert ema.average_0.dtype == torch.float32
    with pytest.raises(ValueError, match="decay must be in"):
        sm.EMA(model, 1.0)


def test_no_warning_in_an_ordinary_training():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in METHODS:
            model = net()
            train(model, make(kind, model), 12)


@pytest.mark.parametrize("kind", METHODS)
def test_values_on_another_device_than_their_index_are_refused(kind):
    model = net()
    method = make(kind, model)
    train(model, method, 5)
    backward(model, batch())
    apart = "'2', whose values are on cpu and whose index is on meta"
    model[2].topology.to("meta")
    with pytest.raises(ValueError, match=apart):
        method.step()
    with pytest.raises(ValueError, match=apart):
        make(kind, model, method.optimizer)
