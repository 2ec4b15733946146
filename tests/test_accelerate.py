"""The loop of docs/frameworks.md with accelerate: steps, accumulates, saves and goes on."""

import copy

import pytest
import torch

import sparse_moon as sm
from small_frameworks import EXTRA
from small_training import make, net

accelerate = pytest.importorskip("accelerate", reason=f"accelerate {EXTRA}")

METHODS = ["rigl", "set", "srigl", "granet", "gmp", "top-kast"]
BATCHES = 40


def data():
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(BATCHES * 16, 32, generator=generator), torch.randint(0, 6, (BATCHES * 16,), generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)


def prepared(kind, model, accumulated=1, scaler=None):
    """As the page has it; a scaler in the place of that of mixed_precision="fp16", which needs a GPU."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
    accelerator.scaler = scaler
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, data())
    options = {"backwards_per_step": accumulated} if kind != "gmp" else {}
    method = make(kind, model, optimizer, total_steps=BATCHES // accumulated, interval=4, **options)
    accelerator.register_for_checkpointing(method)
    return accelerator, model, optimizer, loader, method


def loop(accelerator, model, optimizer, loader, method, until=None):
    for number, (x, y) in enumerate(loader):
        if number == until:
            break
        with accelerator.accumulate(model):
            accelerator.backward(torch.nn.functional.cross_entropy(model(x), y))
            method.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("kind", METHODS)
def test_a_resumed_loop_equals_an_uninterrupted_one(kind, tmp_path):
    start = net()
    whole, first, resumed = (copy.deepcopy(start) for _ in range(3))
    loop(*prepared(kind, whole))
    parts = prepared(kind, first)
    loop(*parts, until=17)
    parts[0].save_state(str(tmp_path))

    accelerator, *parts, loader, method = prepared(kind, resumed)
    accelerator.load_state(str(tmp_path))
    assert method.steps == 17
    loop(accelerator, *parts, accelerator.skip_first_batches(loader, 17), method)
    assert method.steps == BATCHES
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_accumulation_is_that_of_a_plain_loop():
    start = net()
    models = [copy.deepcopy(start) for _ in range(2)]
    loop(*prepared("rigl", models[0], accumulated=2))
    optimizer = torch.optim.SGD(models[1].parameters(), 0.1, momentum=0.9)
    method = make("rigl", models[1], optimizer, total_steps=BATCHES // 2, interval=4, backwards_per_step=2)
    for number, (x, y) in enumerate(data()):
        (torch.nn.functional.cross_entropy(models[1](x), y) / 2).backward()
        if number % 2:
            method.step()
            optimizer.zero_grad()
    assert method.steps == BATCHES // 2
    assert any(not torch.equal(a.mask(), b.mask()) for a, b in zip(*map(layers, (models[0], start)), strict=True))
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, models[1].state_dict()[name]), name


def layers(model):
    return sm.sparse_layers(model).values()


def test_a_state_of_another_method_is_an_error(tmp_path):
    parts = prepared("rigl", net())
    loop(*parts, until=3)
    parts[0].save_state(str(tmp_path))
    accelerator, *_ = prepared("set", net())
    with pytest.raises(ValueError, match="the state is of method 'rigl', this is 'set'"):
        accelerator.load_state(str(tmp_path))


@pytest.mark.parametrize("overflow", [None, 2, 4])
@pytest.mark.parametrize("scale", [None, 2.0**10])
def test_an_attached_method_steps_with_the_optimizer(scale, overflow):
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    accelerator, model, optimizer, loader, method = prepared("rigl", net(), scaler=scaler)
    before = [layer.mask() for layer in layers(model)]
    method.attach()
    for number, (x, y) in enumerate(loader):
        if number == 6:
            break
        loss = torch.nn.functional.cross_entropy(model(x), y)
        skipped = scaler is not None and number == overflow
        accelerator.backward(loss * float("inf") if skipped else loss)
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.step_was_skipped == skipped
    assert method.steps == (6 if scaler is None or overflow is None else 5)
    assert any(not torch.equal(layer.mask(), mask) for layer, mask in zip(layers(model), before, strict=True))
    assert all(p.isfinite().all() for p in model.parameters())
    method.detach()
    assert method.optimizer is optimizer


@pytest.mark.parametrize("kind", ["rigl", "mest", "top-kast", "gmp"])
def test_a_gradient_scaler_changes_nothing(kind):
    plain, scaled = (scaled_loop(kind, scale) for scale in (None, 2.0**10))
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["rigl", "mest", "top-kast", "gmp"])
@pytest.mark.parametrize("overflow", [3, 4])
def test_an_overflow_is_skipped_also_where_the_topology_updates(kind, overflow):
    assert all(p.isfinite().all() for p in scaled_loop(kind, 2.0**10, overflow).parameters())


def scaled_loop(kind, scale, overflow=None):
    """A network after ten batches, of which the one of that number overflows, with updates at 4 and 8."""
    torch.manual_seed(3)
    model, scaler = net(), None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    accelerator, wrapped, optimizer, loader, method = prepared(kind, model, scaler=scaler)
    for number, (x, y) in enumerate(loader):
        if number == 10:
            break
        loss = torch.nn.functional.cross_entropy(wrapped(x), y)
        accelerator.backward(loss * float("inf") if number == overflow else loss)
        method.step()
        optimizer.zero_grad()
    assert method.steps == 10
    return model
