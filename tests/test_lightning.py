"""Sparse training by Lightning's own trainer."""

import csv
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sparse_moon as sm
from small_frameworks import EXTRA

L = pytest.importorskip("lightning.pytorch", reason=f"lightning {EXTRA}")
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from small_lightning import BATCHES, EPOCHS, Net, callback, loader, trainer  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
]


PRUNING = ("granet", "gmp", "top-kast")


def fresh(optimizer="adam"):
    torch.manual_seed(0)
    return Net(optimizer)


class Interrupted(L.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.should_stop = True


def masks(model):
    return {name: layer.mask() for name, layer in sm.sparse_layers(model).items()}


@pytest.mark.parametrize("method", ["rigl", "set", "srigl", "mest", "granet", "gmp", "top-kast", "static"])
def test_a_resumed_run_equals_an_uninterrupted_one(method, tmp_path):
    whole, sparse = fresh(), callback(method)
    trainer([sparse]).fit(whole, loader())
    assert sparse.method.steps == BATCHES * EPOCHS
    assert 1 - sm.overall_sparsity(whole) < 0.5

    saving = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1)
    early = pytest.warns(UserWarning, match="ended after 20 of 40 steps") if method in PRUNING else nullcontext()
    with early:
        trainer([callback(method), Interrupted(), saving], enable_checkpointing=True).fit(fresh(), loader())
    torch.manual_seed(99)
    resumed = Net()
    trainer([callback(method)]).fit(resumed, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert whole.state_dict().keys() == resumed.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    if sparse.kind.updates and method != "gmp":
        torch.manual_seed(0)
        start = Net()
        callback(method).setup(trainer([]), start, "fit")
        assert any(not torch.equal(a, b) for a, b in zip(masks(start).values(), masks(whole).values(), strict=True))


@pytest.mark.parametrize("accumulated, steps", [(1, 10), (2, 5), (4, 3)])
def test_the_loop_is_that_of_a_plain_one(accumulated, steps):
    """The same weights as a loop by hand, with gradients clipped and accumulated."""
    model = fresh("sgd")
    trainer([callback()], accumulate_grad_batches=accumulated, gradient_clip_val=0.5).fit(model, loader())

    plain = fresh("sgd")
    sm.sparsify(plain, 0.7)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    sm.RigL(plain, optimizer, total_steps=steps * EPOCHS, interval=4, stop=0.8,
            drop_fraction=sm.Cosine(0.3, 0.0, round(0.8 * steps * EPOCHS)),
            backwards_per_step=accumulated).attach()  # fmt: skip
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for number, batch in enumerate(loader()):
            (plain.training_step(batch, number) / accumulated).backward()
            if (number + 1) % accumulated == 0 or number + 1 == BATCHES:
                nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        schedule.step()
    for (name, tensor), other in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


def test_density_and_step_time_are_logged(tmp_path):
    logger = CSVLogger(tmp_path)
    run = trainer([callback("gmp")], logger=logger, log_every_n_steps=5)
    run.fit(fresh(), loader())
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    densities = [float(row["density"]) for row in rows if row["density"]]
    assert len(densities) >= EPOCHS and densities[0] > 0.6 and densities == sorted(densities, reverse=True)
    assert densities[-1] == pytest.approx(1 - sm.overall_sparsity(run.lightning_module), abs=1e-6)
    assert all(0 < float(row["step_ms"]) < 5000 for row in rows if row["step_ms"])
    assert run.callback_metrics["density"] < 0.5


def test_a_second_fit_goes_on_and_test_keeps_the_network():
    model, sparse = fresh(), callback()
    run = trainer([sparse], epochs=1)
    run.fit(model, loader())
    before = masks(model)
    run.fit_loop.max_epochs = 2
    with pytest.warns(UserWarning, match="was to take 10 steps and now takes 20"):
        run.fit(model, loader())
    assert sparse.method.steps == 20
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.test_step = model.training_step
    sparse.setup(run, model, "test")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def saved_run(tmp_path, callbacks):
    saving = ModelCheckpoint(tmp_path, save_last=True)
    trainer([*callbacks, Interrupted(), saving], enable_checkpointing=True).fit(fresh(), loader())
    return tmp_path / "last.ckpt"


class WithTest(Net):
    def test_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch, batch_idx))


def test_a_checkpoint_can_be_loaded_to_test(tmp_path):
    with pytest.warns(UserWarning, match="the training ended after 20 of 40 steps"):
        path = saved_run(tmp_path, [callback("granet")])
    model = WithTest()
    with pytest.warns(UserWarning, match="makes a dense module sparse that is not to be trained now"):
        trainer([callback("granet")]).test(model, loader(), ckpt_path=path, verbose=False)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())


def test_a_checkpoint_of_another_run_is_an_error(tmp_path):
    path = saved_run(tmp_path, [callback()])
    for other, message in [
        (callback("set"), "trained with method 'rigl', not 'set'"),
        (callback(sparsity=0.5), r"trained with sparsity 0\.7, not 0\.5"),
        (callback(interval=3), "trained with interval 4, not 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer([other]).fit(fresh(), loader(), ckpt_path=path)


def test_a_checkpoint_without_the_callback_is_an_error(tmp_path):
    class Sparse(Net):
        def __init__(self):
            super().__init__()
            sm.sparsify(self, 0.7)

    saving = ModelCheckpoint(tmp_path, save_last=True)
    torch.manual_seed(0)
    trainer([Interrupted(), saving], enable_checkpointing=True).fit(Sparse(), loader())
    with pytest.raises(ValueError, match="goes on at step 20, but its checkpoint has no state of SparseTraining"):
        trainer([callback(sparsity=None)]).fit(Sparse(), loader(), ckpt_path=tmp_path / "last.ckpt")


def test_processes_end_with_the_same_network(tmp_path):
    program = Path(__file__).with_name("small_lightning.py")
    done = subprocess.run([sys.executable, program, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (start, first), (other_start, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert any(not torch.equal(start[name], other_start[name]) for name in start)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_sharded_processes_equal_replicated_ones(tmp_path):
    """Lightning's FSDP2, and a training that goes on from its checkpoint."""
    program = Path(__file__).with_name("small_lightning.py")
    done = subprocess.run([sys.executable, program, tmp_path, "sharded"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, tensor in first["ddp"].items():
        assert torch.equal(first["fsdp"][name], second["fsdp"][name]), name
        assert torch.equal(first["fsdp"][name], first["resumed"][name]), name
        torch.testing.assert_close(first["fsdp"][name], tensor, rtol=1e-8, atol=1e-10, msg=name)


def test_mixed_precision():
    model, sparse = fresh(), callback()
    trainer([sparse], epochs=1, precision="bf16-mixed").fit(model, loader())
    assert sparse.method.steps == BATCHES and all(torch.isfinite(p).all() for p in model.parameters())


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield torch.randn(32), torch.tensor(1)


def test_weight_decay_beside_a_penalty_is_said():
    with pytest.warns(UserWarning, match="'top-kast' has a penalty in place of weight decay, and the optimizer has"):
        trainer([callback("top-kast")], epochs=1).fit(fresh("adamw"), loader())


def test_wrong_uses_are_named():
    for arguments, message in [
        ({"method": "riggle"}, "unknown method 'riggle', expected one of"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"interval": 0}, "interval must be positive"),
        ({"total_steps": 0}, "total_steps must be positive"),
        (
            {"method": "granet", "options": {"ablation_threshold": 0.1}},
            r"'granet' has the options \['start_sparsity'\]",
        ),
        ({"method": "srigl", "options": {"ablation_threshold": 2.0}}, "ablation_threshold must be"),
        ({"method": "top-kast", "sparsity": 0.3}, "'top-kast' trains a share"),
    ]:
        with pytest.raises(ValueError, match=message):
            callback(**arguments)
    with pytest.raises(ValueError, match="sparsity=None is for a model with sparse layers"):
        trainer([callback(sparsity=None)]).fit(fresh(), loader())
    with pytest.raises(ValueError, match=r"compiled already: call sparse_moon\.sparsify before"):
        trainer([callback()]).fit(torch.compile(fresh(), backend="eager"), loader())
    wrapping = fresh()
    wrapping.net = torch.compile(wrapping.net, backend="eager")
    trainer([callback()], epochs=1).fit(wrapping, loader())
    assert sm.sparse_layers(wrapping)
    endless = torch.utils.data.DataLoader(Endless(), batch_size=8)
    with pytest.raises(ValueError, match="needs the length of the training, got -1: give it total_steps"):
        trainer([callback()], limit_train_batches=1.0).fit(fresh(), endless)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own, of a module without an optimizer
        with pytest.raises(ValueError, match="holds no weights of this model's sparse layers"):
            trainer([callback()]).fit(fresh("none"), loader())
    two = fresh()
    sparse = callback()
    sparse.convert(two)
    with pytest.raises(ValueError, match="needs one optimizer that holds the weights of the sparse layers, 2 of 2 do"):
        sparse.begin(two, [torch.optim.SGD(two.parameters(), 0.1) for _ in range(2)], total_steps=40)


def test_a_training_in_which_the_method_made_fewer_steps_says_so():
    sparse = callback("gmp")
    sparse.method = SimpleNamespace(steps=9, unfinished="made 9 of 10 steps")
    sparse.on_train_end(SimpleNamespace(global_step=9), None)
    with pytest.warns(UserWarning, match="made 9 of 10 steps"):
        sparse.on_train_end(SimpleNamespace(global_step=10), None)
