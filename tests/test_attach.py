"""Attached methods: the optimizer's step is theirs."""

import copy
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import sparse_moon as sm
from small_training import METHODS, Lookahead, backward, batch, changed, make, masks, net, sgd
from sparse_moon.integrations.callback import SparseCallback


def twins():
    """Two models that are alike, the same at every call, and so are the batches drawn afterwards."""
    torch.manual_seed(0)
    model = net()
    return [model, copy.deepcopy(model)]


@pytest.mark.parametrize("schedule", ["none", "before", "after"])
@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("kind", [*METHODS, "static"])
def test_an_attached_method_trains_like_a_called_one(kind, closure, schedule):
    models = twins()
    batches = [batch() for _ in range(17)]
    for model, attached in zip(models, (False, True), strict=True):
        optimizer = sgd(model)
        scheduler = CosineAnnealingLR(optimizer, 17) if schedule == "before" else None
        method = sm.Static(model, optimizer) if kind == "static" else make(kind, model, optimizer)
        if attached:
            assert method.attach() is method
        scheduler = CosineAnnealingLR(optimizer, 17) if schedule == "after" else scheduler
        for one in batches:
            if attached and closure:

                def compute(model=model, optimizer=optimizer, one=one):
                    optimizer.zero_grad()
                    return backward(model, one)

                assert optimizer.step(compute) > 0
            else:
                optimizer.zero_grad()
                backward(model, one)
                optimizer.step() if attached else method.step()
            if scheduler is not None:
                scheduler.step()
        assert method.steps == 17
        if attached:
            with pytest.raises(ValueError, match="attached to method"):
                method.attach()
    for (name, ours), theirs in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


class Scaled(torch.optim.SGD):
    """Its step takes a factor of the learning rate, and returns it."""

    def step(self, closure=None, scale=1.0):
        rate = self.param_groups[0]["lr"]
        self.param_groups[0]["lr"] = rate * scale
        super().step(closure)
        self.param_groups[0]["lr"] = rate
        return scale


@pytest.mark.parametrize("by_name", [False, True])
def test_the_optimizers_own_step_gets_and_returns_what_it_has(by_name):
    models = twins()
    batches = [batch() for _ in range(7)]
    for model, attached in zip(models, (False, True), strict=True):
        optimizer = Scaled(model.parameters(), 0.1)
        method = make("rigl", model, optimizer, interval=20)
        if attached:
            method.attach()
        for one in batches:
            optimizer.zero_grad()
            backward(model, one)
            if attached:
                assert (optimizer.step(scale=0.5) if by_name else optimizer.step(None, 0.5)) == 0.5
            else:
                optimizer.param_groups[0]["lr"] = 0.05
                method.step()
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))


def test_lbfgs_returns_its_first_loss():
    torch.manual_seed(0)
    model, one = net(), batch()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3)
    sm.Static(model, optimizer).attach()
    losses = []

    def closure():
        optimizer.zero_grad()
        losses.append(backward(model, one).item())
        return torch.tensor(losses[-1])

    returned = float(optimizer.step(closure))
    assert len(losses) == 3 and returned == losses[0] != losses[-1]


class Unscaling(torch.optim.AdamW):
    """Takes the gradient scaler, as torch's contract for those that handle the scale has it."""

    _step_supports_amp_scaling = True

    def step(self, closure=None, *, grad_scaler=None):
        grad_scaler.unscale_(self)
        return super().step(closure)


def fused(parameters):
    return torch.optim.AdamW(parameters, fused=True)


@pytest.mark.filterwarnings("ignore:GradScaler is going to stop passing itself:FutureWarning")
@pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, fused, Unscaling])
def test_an_attached_method_reads_gradients_without_their_scale(make_optimizer):
    seen = []
    for scale in (1.0, 65536.0):
        torch.manual_seed(0)
        model = net()
        optimizer = make_optimizer(model.parameters())
        method = make("mest", model, optimizer, interval=2, gradient_weight=1.0).attach()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for _ in range(5):
            scaler.scale(F.cross_entropy(model(batch()[0]), batch()[1])).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert method.steps == 5
        seen.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in seen), strict=True))


def test_an_attached_method_is_not_called_besides():
    model = net()
    method = make("rigl", model).attach()
    backward(model, batch())
    with pytest.raises(RuntimeError, match="is attached to its optimizer"):
        method.step()


@pytest.mark.parametrize("schedule", ["none", "before", "after"])
def test_a_detached_optimizer_takes_a_method_that_is_made_anew(schedule):
    """A layer trains later, and the method is made anew for it."""
    models = twins()
    batches, before = [batch() for _ in range(15)], masks(models[0])
    for model, attached in zip(models, (False, True), strict=True):
        model[0].requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        scheduler = CosineAnnealingLR(optimizer, 17) if schedule == "before" else None
        method = make("rigl", model, optimizer, interval=4)
        if attached:
            method.attach()
        scheduler = CosineAnnealingLR(optimizer, 17) if schedule == "after" else scheduler
        for number, one in enumerate(batches):
            if number == 4:
                model[0].requires_grad_(True)
            message = f"keep their topology; {'detach.. it and ' if attached else ''}make the method anew"
            with pytest.warns(UserWarning, match=message) if number == 4 else nullcontext():
                optimizer.zero_grad()
                backward(model, one)
                optimizer.step() if attached else method.step()
            if scheduler is not None:
                scheduler.step()
            if number == 4:
                anew = make("rigl", model, optimizer, interval=4)
                if attached:
                    with pytest.raises(ValueError, match=r"attached to method 'rigl' already: detach\(\) that first"):
                        anew.attach()
                    method.detach()
                    anew.attach()
                method = anew
        assert method.steps == 10 and "0" in changed(before, model)
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))


def test_a_detached_method_is_called_as_one_that_never_was_attached():
    models = twins()
    batches = [batch() for _ in range(13)]
    for model, attached in zip(models, (False, True), strict=True):
        optimizer = sgd(model)
        method = make("rigl", model, optimizer, interval=4)
        method.detach()
        if attached:
            method.attach().detach()
        for number, one in enumerate(batches):
            optimizer.zero_grad()
            backward(model, one)
            optimizer.step() if number == 12 else method.step()
        assert method.steps == 12
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))


def scaled_step(model, method, scaler, *, overflows):
    """A batch as loops of others train it: the scaler calls the optimizer, which the method is attached to."""
    x, y = batch()
    scaler.scale(F.cross_entropy(model(x * (float("inf") if overflows else 1.0)), y)).backward()
    scaler.step(method.optimizer)
    scaler.update()
    method.optimizer.zero_grad()


@pytest.mark.parametrize("fused", [False, True])
def test_an_attached_method_with_a_gradient_scaler(fused):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=fused)
    method = make("rigl", model, optimizer, interval=2).attach()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = masks(model)
    for step in range(7):
        scaled_step(model, method, scaler, overflows=step == 2)
        assert bool(changed(before, model)) == (step > 2)
    assert method.steps == 6


def test_accumulation_by_accelerate_counts_steps():
    """Its wrapper steps only where gradients are synchronised."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer, self.gradient_state = optimizer, SimpleNamespace(sync_gradients=True)
            self.param_groups, self.state = optimizer.param_groups, optimizer.state

        def step(self, closure=None):
            if self.gradient_state.sync_gradients:
                self.optimizer.step(closure)

        def zero_grad(self, set_to_none=True):
            if self.gradient_state.sync_gradients:
                self.optimizer.zero_grad(set_to_none)

    models = twins()
    batches = [batch() for _ in range(24)]
    for model, how in zip(models, ("step", "attach"), strict=True):
        wrapper = Wrapper(sgd(model))
        method = make("rigl", model, wrapper, backwards_per_step=2, interval=3)
        method = method.attach() if how == "attach" else method
        for number, one in enumerate(batches):
            wrapper.gradient_state.sync_gradients = number % 2 == 1
            backward(model, one)
            method.step() if how == "step" else wrapper.step()
            wrapper.zero_grad()
        assert method.steps == 12
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))


def test_a_dense_gradient_that_overflows_ends_no_training_of_an_attached_method():
    """A scaler looks at the parameters' gradients; that of the dense weight, which RigL reads, may be larger."""
    mask = torch.rand(64, 32) < 0.4
    mask[:, 0] = False
    model = nn.Sequential(sm.SparseLinear.from_dense(nn.Linear(32, 64), mask), nn.ReLU(), nn.Linear(64, 6))
    method = make("rigl", model, interval=2).attach()
    before = masks(model)
    for step in range(3):
        x, y = batch()
        x[:, 0] = 3e38  # no weight sees it
        loss = 100 * F.cross_entropy(model(x), y)
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        with pytest.warns(UserWarning, match="at batch 2 are not finite: no topol") if step == 2 else nullcontext():
            method.optimizer.step()
        method.optimizer.zero_grad()
    assert method.steps == 3 and not changed(before, model)


@pytest.mark.parametrize("kind", ["gmp", "top-kast", "rigl"])
def test_steps_that_a_scaler_skips_are_missing_at_the_end_and_said(kind):
    model = net()
    method = make(kind, model, total_steps=10, interval=2, stop=1.0).attach()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(10):
        scaled_step(model, method, scaler, overflows=step == 3)
    assert method.steps == 9
    if kind == "rigl":
        assert method.unfinished is None
    else:
        assert f"{kind!r} made 9 of the 10 steps to its final density" in method.unfinished


class Both(torch.optim.Optimizer):
    """Two optimizers as one: of what is sparse, and of the rest."""

    def __init__(self, model):
        named = dict(model.named_parameters())
        self.sparse = torch.optim.Adam([p for name, p in named.items() if name.endswith("values")], 0.01)
        self.rest = torch.optim.SGD([p for name, p in named.items() if name.endswith("bias")], 0.1, momentum=0.9)
        super().__init__([*self.sparse.param_groups, *self.rest.param_groups], {})

    def step(self, closure=None):
        self.sparse.step()
        self.rest.step()


class Around:
    """No optimizer itself."""

    def __init__(self, model):
        self.inner, self.step = sgd(model), lambda: self.inner.step()
        self.zero_grad = self.inner.zero_grad


class Beside:
    """Two optimizers in what is none itself."""

    def __init__(self, model):
        both = Both(model)
        self.rest, self.sparse = both.rest, both.sparse

    def step(self):
        self.sparse.step()
        self.rest.step()

    def zero_grad(self):
        self.sparse.zero_grad()
        self.rest.zero_grad()


AROUND = {"lookahead": lambda model: Lookahead(sgd(model)), "both": Both, "beside": Beside, "around": Around}


@pytest.mark.parametrize("kind", ["rigl", "gmp", "top-kast"])
@pytest.mark.parametrize("name", AROUND)
def test_an_optimizer_around_others_trains_alike_attached_and_called(name, kind):
    models = twins()
    batches = [batch() for _ in range(17)]
    before, kept = masks(models[0]), []
    for model, attached in zip(models, (False, True), strict=True):
        optimizer = AROUND[name](model)
        method = make(kind, model, optimizer)
        if attached:
            method.attach()
        for one in batches:
            optimizer.zero_grad()
            backward(model, one)
            optimizer.step() if attached else method.step()
        assert method.steps == 17
        states = [optimizer.state[p] for p in model.parameters()] if name == "lookahead" else []
        kept.append([*model.state_dict().values(), *(state["slow"] for state in states)])
    assert changed(before, models[0])
    for called, attached in zip(*kept, strict=True):
        assert torch.equal(called, attached)


# --- methods that change the number of weights


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


RESIZING = [kind for kind in METHODS if kind not in ("set", "rigl", "mest")]


@pytest.mark.parametrize("kind", METHODS)
def test_a_parallel_model_that_is_to_be_wrapped_anew_is_not_attached(kind, one_process):
    method = make(kind, nn.parallel.DistributedDataParallel(net()))
    if kind in RESIZING:
        with pytest.raises(ValueError, match=rf"{kind.partition('-soft')[0]}.* wrap the model where that returns True"):
            method.attach()
    else:
        method.attach()
    assert method.attached == (kind not in RESIZING)


def callback_of(kind, **arguments):
    sparse = SparseCallback(kind.removesuffix("-soft"), 0.6, interval=5, **arguments)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 6))
    sparse.convert(model)
    return sparse, model, sgd(model)


@pytest.mark.parametrize("kind", METHODS)
def test_callbacks_refuse_methods_that_change_the_number_of_weights_in_several_processes(kind, monkeypatch):
    sparse, model, optimizer = callback_of(kind, options={"soft_memory_bound": True} if kind == "mest-soft" else {})
    monkeypatch.setattr("sparse_moon.integrations.callback.world_size", lambda: 2)
    if kind in RESIZING:
        with pytest.raises(ValueError, match="changes the number of weights, whose gradients 2 processes exchange"):
            sparse.begin(model, [optimizer], 60)
        assert sparse.method is None
    else:
        sparse.begin(model, [optimizer], 60)


@pytest.mark.parametrize("kind", ["gmp", "granet", "top-kast", "srigl", "rigl"])
@pytest.mark.parametrize("steps", [20, 50, 60])
def test_a_training_that_ends_early_says_what_is_missing(kind, steps):
    sparse, model, optimizer = callback_of(kind)
    sparse.begin(model, [optimizer], 60)
    for _ in range(steps):
        backward(model, batch())
        optimizer.step()
        optimizer.zero_grad()
    if "rigl" not in kind and steps == 20:
        sparsity = sm.overall_sparsity(model)
        assert sparsity < 0.595
        said = (
            f"ended after 20 of 60 steps, and method '{kind}' is at its final density from step 45 on.* {sparsity:.4f}"
        )
        with pytest.warns(UserWarning, match=said):
            sparse.check_finished(steps)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sparse.check_finished(steps)


@pytest.mark.parametrize("kind", [*METHODS, "static"])
@pytest.mark.parametrize("make_optimizer", [sgd, Beside])
def test_a_copy_of_an_attached_method_is_attached(make_optimizer, kind):
    """To the copied optimizer, and trains like the first one."""
    model = net()
    optimizer = make_optimizer(model)
    method = sm.Static(model, optimizer) if kind == "static" else make(kind, model, optimizer)
    method.attach()
    batches = [batch() for _ in range(17)]
    runs = [(model, optimizer, method)]
    for i, one in enumerate(batches):
        if i == 5:
            runs.append(copy.deepcopy(runs[0]))
        for model, optimizer, _ in runs:
            optimizer.zero_grad()
            backward(model, one)
            optimizer.step()
    (first, _, method), (other, optimizer, copied) = runs
    assert method.steps == copied.steps == 17 and copied.attached
    for (name, ours), theirs in zip(first.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    copied.detach()
    optimizer.step()
    assert copied.steps == method.steps == 17 and method.attached
