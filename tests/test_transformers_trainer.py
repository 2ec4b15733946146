"""Sparse training by the Trainer of Hugging Face's transformers; as a program, one of several processes of it."""

import os
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import sparse_moon as sm
from small_frameworks import EXTRA
from small_processes import leave, run_processes

transformers = pytest.importorskip("transformers", reason=f"transformers {EXTRA}")
pytest.importorskip("accelerate", reason=f"accelerate {EXTRA}")

from sparse_moon.integrations.transformers import SparseTraining  # noqa: E402

EXAMPLES, EPOCHS = 80, 3


def model(dropout=0.1):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, num_labels=3, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def data():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (EXAMPLES, 12), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones(12, dtype=torch.long), "labels": row[0] % 3} for row in ids]


def callback(method="rigl", sparsity=0.7, **options):
    return SparseTraining(method, sparsity, exclude=torch.nn.Embedding, **{"interval": 4, "stop": 0.8, **options})


def trainer(folder, callbacks, network=None, optimizers=(None, None), **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=EPOCHS, learning_rate=1e-2, use_cpu=True, report_to="none",
        disable_tqdm=True, logging_steps=5, seed=3, dataloader_pin_memory=False,
        **{"per_device_train_batch_size": 8, "save_steps": 10, **options},
    )  # fmt: skip
    return transformers.Trainer(
        model() if network is None else network, arguments, train_dataset=data(), callbacks=callbacks,
        optimizers=optimizers,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["rigl", "set", "srigl", "mest", "granet", "gmp", "top-kast"])
def test_a_resumed_run_equals_an_uninterrupted_one(method, tmp_path):
    """With dropout and shuffled batches, whose random state the Trainer keeps; the checkpoint lies within an epoch."""
    sparse = callback(method)
    decay = {"weight_decay": 0.0 if method == "top-kast" else 0.01}
    whole = trainer(tmp_path, [sparse], save_steps=15, **decay)
    whole.train()
    assert sparse.method.steps == EXAMPLES // 8 * EPOCHS
    assert 1 - sm.overall_sparsity(whole.model) < 0.6
    resumed = trainer(tmp_path / "other", [callback(method)], save_strategy="no", **decay)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_the_topology_moves_and_figures_are_logged(tmp_path):
    sparse = callback()
    run = trainer(tmp_path, [sparse], save_strategy="no", gradient_accumulation_steps=2, max_grad_norm=0.5)
    before = {name: layer.mask() for name, layer in sm.sparse_layers(run.model).items()}
    run.train()
    assert sparse.method.steps == run.state.global_step == EXAMPLES // 16 * EPOCHS
    assert any(not torch.equal(layer.mask(), before[name]) for name, layer in sm.sparse_layers(run.model).items())
    rows = [row for row in run.state.log_history if "loss" in row]
    assert len(rows) >= 3 and all(row["density"] == 1 - sm.overall_sparsity(run.model) for row in rows)
    assert 0 < rows[-1]["step_ms"] < 60_000


def test_a_gradient_scaler_changes_nothing(tmp_path):
    """In the place of that of fp16=True, which needs a GPU and unscales before it clips."""
    models = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        sparse = callback()
        run = trainer(tmp_path, [sparse], save_strategy="no", max_grad_norm=0.0)
        run.accelerator.scaler = scaler
        before = {name: layer.mask() for name, layer in sm.sparse_layers(run.model).items()}
        run.train()
        assert sparse.method.steps == run.state.global_step == EXAMPLES // 8 * EPOCHS
        assert any(not torch.equal(layer.mask(), before[name]) for name, layer in sm.sparse_layers(run.model).items())
        models.append(run.model)
    for plain, scaled in zip(*(one.parameters() for one in models), strict=True):
        assert torch.equal(plain, scaled)


@pytest.mark.parametrize("method", ["rigl", "top-kast"])
def test_a_second_training_has_a_method_of_its_own(method, tmp_path):
    sparse = callback(method)
    run = trainer(tmp_path, [sparse], save_strategy="no")
    run.train()
    first, trained = sparse.method, sm.overall_sparsity(run.model)
    before = {name: layer.mask() for name, layer in sm.sparse_layers(run.model).items()}
    message = "was to start from a sparsity of 0.3602, and an earlier training has left 0.6224"
    with pytest.warns(UserWarning, match=message) if method == "top-kast" else nullcontext():
        run.train()
    assert sparse.method is not first and sparse.method.steps == first.steps == EXAMPLES // 8 * EPOCHS
    assert any(not torch.equal(layer.mask(), before[name]) for name, layer in sm.sparse_layers(run.model).items())
    assert (sm.overall_sparsity(run.model) == trained) == (method == "rigl")


def test_a_reporter_that_comes_later_sees_the_figures(tmp_path):
    class Reporter(transformers.TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_log(self, args, state, control, **kwargs):
            self.seen.append(dict(kwargs["logs"]))

    reporter = Reporter()
    trainer(tmp_path, [callback(), reporter], max_steps=10, save_strategy="no").train()
    assert any("density" in row for row in reporter.seen)


def test_a_checkpoint_of_another_run_is_an_error(tmp_path):
    trainer(tmp_path, [callback()], max_steps=10).train()
    path = str(tmp_path / "checkpoint-10")
    for other, message in [
        (callback("set"), "trained with method 'rigl', not 'set'"),
        (callback(sparsity=0.5), r"trained with sparsity 0\.7, not 0\.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path / "other", [other], max_steps=20, save_strategy="no").train(resume_from_checkpoint=path)


def test_a_checkpoint_without_the_callback_is_an_error(tmp_path):
    def sparse():
        return sm.sparsify(model(), 0.7, exclude=torch.nn.Embedding)

    trainer(tmp_path, [], sparse(), max_steps=10).train()
    with pytest.raises(ValueError, match="goes on at step 10, but its checkpoint has no state of SparseTraining"):
        trainer(tmp_path / "other", [callback(sparsity=None)], sparse(), max_steps=20).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-10")
        )


def test_wrong_uses_are_named(tmp_path):
    network = model()
    optimizer = torch.optim.AdamW(network.parameters())
    with pytest.raises(ValueError, match="was made of the dense model: leave it to the Trainer"):
        trainer(tmp_path, [callback()], network, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="make the model sparse before OptimizedModule wraps it"):
        trainer(tmp_path, [callback()], torch.compile(model(), backend="eager"))
    late = trainer(tmp_path, [])
    late.add_callback(callback())
    with pytest.raises(ValueError, match="has to be among the callbacks of the Trainer's constructor"):
        late.train()
    with pytest.raises(ValueError, match="sparsity=None is for a model with sparse layers"):
        trainer(tmp_path, [callback(sparsity=None)])


def test_processes_equal_one_with_the_whole_batch(tmp_path):
    """And go on from a checkpoint bit for bit."""
    run_processes(__file__, 2, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = several(tmp_path / "alone", per_device_train_batch_size=16)
    alone.train()
    assert alone.state.global_step == EXAMPLES // 16 * EPOCHS
    for name, tensor in alone.model.state_dict().items():
        assert torch.equal(first["whole"][name], second["whole"][name]), name
        assert torch.equal(first["whole"][name], first["resumed"][name]), name
        torch.testing.assert_close(first["whole"][name], tensor, rtol=1e-8, atol=1e-10, msg=name)


def several(folder, **options):
    """In float64: sums over processes have another order.

    By default the Trainer scales a loss that is a mean, as this model's, by the number of processes.
    """
    options = {"save_steps": 8, "average_tokens_across_devices": False, **options}
    return trainer(folder, [callback()], model(dropout=0.0).double(), **options)


def worker(port, world, rank, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=world, RANK=rank, LOCAL_RANK=rank)
    found = {}
    for name, checkpoint in ("whole", None), ("resumed", f"{folder}/checkpoint-8"):
        run = several(folder, ddp_backend="gloo")
        run.train(resume_from_checkpoint=checkpoint)
        found[name] = run.model.state_dict()
    torch.save(found, f"{folder}/{rank}.pt")


if __name__ == "__main__":
    worker(*sys.argv[1:])
    leave()


def test_a_training_in_which_the_method_made_fewer_steps_says_so():
    sparse = SparseTraining(method="gmp", sparsity=0.5)
    sparse.method = SimpleNamespace(steps=9, unfinished="made 9 of 10 steps")
    sparse.on_train_end(None, SimpleNamespace(global_step=9), None)
    with pytest.warns(UserWarning, match="made 9 of 10 steps"):
        sparse.on_train_end(None, SimpleNamespace(global_step=10), None)
