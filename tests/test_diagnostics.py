"""What the papers' theory speaks of: by hand, and in a run."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from tqdm import tqdm

import sparse_moon as sm
from sparse_moon.app import run_folder
from sparse_moon.app.cli import main
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.diagnostics import mask_correlation
from sparse_moon.app.run_data import load_dataset, load_ood_sets
from sparse_moon.app.trainer import Trainer
from sparse_moon.nn.exploration import Exploration
from sparse_moon.ood import DICE, Energy, Head, Outputs
from sparse_moon.ood.regions import class_margins, local_gaps

SMALL = TrainConfig(
    model="mlp", width=16, epochs=3, batch_size=64, interval=5, sparsity=0.8, ood=["noise"], lr=0.2, vote_from=0.7,
    stop=0.6, reliability="cigl", diagnostics=True,
)  # fmt: skip


def test_regions_by_hand():
    # Class means at 0 and 10; margins |10 - 2 x| of the samples at -1, 1, 4 and 9, 11, 10.
    features = torch.tensor([[-2.0], [-2.0], [4.0], [9.0], [11.0], [10.0]])
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6], [0.0001, 0.9999], [0.25, 0.75]])
    outputs = Outputs(p.log(), features, labels)
    assert class_margins(outputs, 2).tolist() == [10, 10, 2, 8, 10, 10]
    # by margin: the one at 4 (wrong, 0.7), at 9 (right, 0.6); the rest in the order of their places
    sure, right, gap = local_gaps(outputs, 2, regions=3)
    assert right.tolist() == [0.5, 1.0, 1.0]
    assert sure.tolist() == pytest.approx([0.65, 0.85, (0.9999 + 0.75) / 2])
    assert gap.tolist() == pytest.approx([0.15, -0.15, (0.9999 + 0.75) / 2 - 1], abs=1e-6)


def test_regions_of_networks_with_an_unknown_output():
    # The unknown output takes confidence, and is no prediction; a class without samples has no mean.
    p = torch.tensor([[0.2, 0.1, 0.1, 0.6], [0.1, 0.2, 0.1, 0.6]])
    outputs = Outputs(p.log(), torch.eye(2), torch.tensor([0, 1]))
    sure, right, _ = local_gaps(outputs, 3, regions=2)
    assert sure.tolist() == pytest.approx([0.2, 0.2]) and right.tolist() == [1.0, 1.0]
    assert class_margins(outputs, 3).tolist() == pytest.approx([math.sqrt(2)] * 2)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (Outputs(torch.zeros(4, 2), None, torch.zeros(4, dtype=torch.long)), "expected outputs with features"),
        (Outputs(torch.zeros(4, 2), torch.zeros(4, 1)), "expected outputs with labels"),
        (
            Outputs(torch.zeros(4, 2), torch.zeros(4, 1), torch.zeros(4, dtype=torch.long)),
            "of two classes or more, got 1",
        ),
        (Outputs(torch.zeros(4, 2), torch.zeros(4, 1), torch.arange(4) % 2), "as many samples as regions, 10, got 4"),
    ],
)
def test_regions_refuse(outputs, message):
    with pytest.raises(ValueError, match=message):
        local_gaps(outputs, 2)


def test_variance_of_dice_by_hand():
    # Two units of mean 2 and 1 and variances 1 and 4, uncorrelated; W = [[1, 1], [2, 0]], V = [[2, 1], [4, 0]].
    features = torch.tensor([[1.0, -1.0], [3.0, -1.0], [1.0, 3.0], [3.0, 3.0]])
    head = Head(torch.tensor([[1.0, 1.0], [2.0, 0.0]]), torch.tensor([5.0, -5.0]))
    outputs = Outputs(head.logits(features).float(), features, None, head)
    dice = DICE(Energy(2), p=0.4).fit(outputs)
    assert dice.mask.tolist() == [[True, False], [True, False]]  # 1 and 0 go
    whole, sparse = dice.output_variance(outputs)
    assert whole == pytest.approx(((1 + 4) + 4 * 1) / 2) and sparse == pytest.approx((1 + 4) / 2)
    assert dice.with_p(0.0).output_variance(outputs) == pytest.approx((whole, whole))
    # where units go against each other, leaving one out adds variance (Lemma 2's covariance)
    against = torch.tensor([[0.0, 0.0], [2.0, -2.0]])
    outputs = Outputs(head.logits(against).float(), against, None, head)
    assert dice.output_variance(outputs) == pytest.approx(((0 + 4) / 2, (1 + 4) / 2))


def test_exploration_by_hand():
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[0] = True
    model = nn.Sequential(sm.SparseLinear.from_dense(nn.Linear(5, 4), mask))
    seen = Exploration(model)
    assert seen.rate == 5 / 20

    def move(row, upto):
        other = torch.zeros(4, 5, dtype=torch.bool)
        other[row, :upto] = True
        new = sm.SparseLinear.from_dense(nn.Linear(5, 4), other)
        model[0].replace_(new.topology.index, new.values.detach())
        seen.update()

    move(1, 3)
    assert seen.rate == 8 / 20
    move(0, 5)  # nothing new
    assert seen.rate == 8 / 20
    resumed = Exploration(model)
    resumed.load_state_dict(seen.state_dict())
    assert resumed.rate == 8 / 20
    with pytest.raises(ValueError, match="expected a model with sparse layers"):
        Exploration(nn.Linear(2, 2))


def test_exploration_counts_the_weights_of_blocks():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    sm.sparsify(model, 0.5, "uniform", pattern="vector4", first_dense=False)
    assert Exploration(model).rate == 0.5


def test_correlation_by_hand():
    layer = sm.SparseLinear(4, 1, bias=False, sparsity=0.0)
    mask = sm.RandomMask(nn.Sequential(layer), 0.5)
    with torch.no_grad():
        layer.values.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    mask.mask = lambda stream, layer: torch.tensor([False, False, True, True])
    # deviations (-.5, -.5, .5, .5) and (-1.5, -.5, .5, 1.5): 2 / sqrt(1 * 5)
    assert mask_correlation(mask) == pytest.approx(2 / math.sqrt(5))
    mask.mask = lambda stream, layer: torch.ones(4, dtype=torch.bool)
    assert mask_correlation(mask) == 0.0


NETWORK = {
    "id_confidence", "hard_confidence", "ood_confidence", "hard_gap", "local_gap",
    "dice_variance_id", "dice_variance_id_sparse", "dice_variance_ood", "dice_variance_ood_sparse",
}  # fmt: skip


def test_in_a_run(tmp_path, capsys):
    words = ["--model", "mlp", "--width", "16", "--epochs", "3", "--interval", "5", "--quiet", "--ood", "noise"]
    words += ["--reliability", "cigl", "--stop", "0.6"]
    for name, more in (("plain", []), ("told", ["--diagnostics"])):
        main(["train", *words, *more, "--out", str(tmp_path / name)])
    plain, told = ([json.loads(line) for line in (tmp_path / name / run_folder.METRICS).read_text().splitlines()]
                   for name in ("plain", "told"))  # fmt: skip
    found = {*NETWORK, "exploration_rate", "mask_correlation"}
    for without, row in zip(plain, told, strict=True):
        assert row.keys() - without.keys() == found
        assert all(0 < row[name] < 1 for name in ("id_confidence", "hard_confidence", "ood_confidence"))
        assert row["dice_variance_id_sparse"] > 0 and abs(row["mask_correlation"]) < 0.2
        # it measures and changes nothing
        assert {k: row[k] for k in ("loss", "test_accuracy")} == {k: without[k] for k in ("loss", "test_accuracy")}
    rates = [row["exploration_rate"] for row in told]
    assert told[0]["density"] < rates[0] <= rates[1] <= rates[2] < 1
    results = json.loads((tmp_path / "told" / "results.json").read_text())
    assert results["diagnostics"].keys() == found
    page = (tmp_path / "told" / "report.html").read_text()
    for title in ("Confidence minus accuracy", "Variance of logits on OOD", "Weights that have existed"):
        assert title in page and title not in (tmp_path / "plain" / "report.html").read_text()
    states = [run_folder.read_checkpoint(tmp_path / name)["model"] for name in ("plain", "told")]
    assert all(states[0][key].equal(states[1][key]) for key in states[0])


@pytest.mark.parametrize(
    ("count", "message"), [(9, "10 test images or more, got 9"), (12, "two classes or more, got one")]
)
def test_test_images_without_regions_are_refused_before_training(tmp_path, count, message):
    x, y = np.random.default_rng(0).integers(0, 255, (60, 8, 8), np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x[::3][:count], y_test=y[::3][:count])
    config = replace(SMALL, dataset=str(tmp_path / "d.npz"), ood=[], interval=1)
    with pytest.raises(ValueError, match=f"diagnostics need .*{message}"):
        Trainer(config, load_dataset(config))


def test_resumed_and_dense_runs_and_cosine_heads():
    data = load_dataset(SMALL)
    sets = load_ood_sets(SMALL, data)

    def trained(config, epochs, state=None):
        trainer = Trainer(config, data, sets)
        if state is not None:
            trainer.load_state_dict(state)
        while trainer.epoch < epochs:
            trainer.run_epoch(tqdm(disable=True))
        return trainer

    whole, half = trained(SMALL, 3), trained(SMALL, 1)
    resumed = trained(SMALL, 3, half.state_dict())
    names = {*NETWORK, "exploration_rate", "mask_correlation"}
    assert [[row[n] for n in names] for row in whole.history] == [[row[n] for n in names] for row in resumed.history]

    dense = trained(replace(SMALL, method="dense", reliability="none"), 1)
    assert dense.history[0].keys() >= NETWORK and "exploration_rate" not in dense.history[0]
    cosine = trained(replace(SMALL, reliability="generalized-odin"), 1)
    assert "dice_variance_id" not in cosine.history[0] and "hard_gap" in cosine.history[0]
