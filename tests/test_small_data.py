"""A trained run can always be finished, however few images there are; what cannot be, is refused before training."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from sparse_moon.app import run_folder
from sparse_moon.app.cli import main
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.evaluate import load_run
from sparse_moon.app.train import train
from sparse_moon.app.trainer import Trainer


def images(count, seed=0, size=8):
    return np.random.default_rng(seed).integers(0, 255, (count, size, size), np.uint8)


def write(folder: Path, train_images: int, test_images: int, classes: int = 3) -> str:
    path = folder / "few.npz"
    labels = np.arange(max(train_images, test_images)) % classes
    np.savez(path, x_train=images(train_images), y_train=labels[:train_images], x_test=images(test_images, 1),
             y_test=labels[:test_images])  # fmt: skip
    return str(path)


def config(folder, train_images=30, test_images=12, **changes):
    settings = {"model": "mlp", "width": 16, "epochs": 2, "batch_size": 8, "interval": 2, "ood": ["noise"]}
    return TrainConfig(**{**settings, "dataset": write(folder, train_images, test_images), **changes})


def test_scores_that_few_images_do_not_allow_are_left_out_with_one_line(tmp_path):
    with pytest.warns(UserWarning, match=r"scores left out.*knn \(k = 50 neighbours .* got 30: ") as said:
        results = train(config(tmp_path), tmp_path / "run", progress=False)
    assert len(said) == 1
    assert results["left_out"].keys() == {"knn"} and "knn" not in results["ood"]["noise"]
    assert {"msp", "mahalanobis", "energy", "dice"} <= results["ood"]["noise"].keys()
    assert "knn was left out" in (tmp_path / "run" / run_folder.REPORT).read_text()
    assert load_run(tmp_path / "run").config.epochs == 2


@pytest.mark.filterwarnings("ignore:scores left out")
@pytest.mark.parametrize(("batch_size", "size"), [(8, 8), (1000, 30)])
def test_kernels_are_looked_at_with_a_batch_that_there_is(tmp_path, monkeypatch, batch_size, size):
    seen = []
    for name in ("what_runs", "what_would_pay"):
        monkeypatch.setattr(f"sparse_moon.app.train.{name}", lambda model, batch, *_: seen.append(batch.shape))
    train(config(tmp_path, batch_size=batch_size, method="static", score=["msp"]), tmp_path / "run", progress=False)
    assert seen == [(size, 1, 8, 8)] * 2


def test_a_score_that_is_asked_for_is_an_error(tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(config(tmp_path), tmp_path / "run", progress=False)
    for argv in (["eval", str(tmp_path / "run"), "--score", "knn"],):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2 and "k = 50 neighbours" in capsys.readouterr().err
    main(["eval", str(tmp_path / "run"), "--score", "energy", "--json"])
    assert json.loads(capsys.readouterr().out)["ood"]["noise"].keys() == {"energy"}


@pytest.mark.parametrize("reliability", ["none", "moon", "vos", "mc-dropout"])
@pytest.mark.parametrize(
    "change",
    [
        {"train_images": 4},
        {"train_images": 60, "test_images": 1},
        {"train_images": 60, "holdout": 0.02},
        {"train_images": 60, "batch_size": 59},
        {"train_images": 60, "ood": []},
    ],
    ids=str,
)
def test_every_run_that_is_trained_is_finished(tmp_path, reliability, change):
    np.savez(tmp_path / "one.npz", x=images(1, 2))
    settings = {"ood": [f"one={tmp_path / 'one.npz'}", "noise"], "reliability": reliability, **change}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scores left out
        results = train(config(tmp_path, **settings), tmp_path / "run", progress=False)
    assert results["ood"].keys() == ({"one", "noise"} if settings["ood"] else set())
    assert run_folder.read_checkpoint(tmp_path / "run")["finished"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"holdout": 0.9}, "holdout 0.9 leaves no training image of class"),
        ({"holdout": 0.001}, "leaves one of both parts empty"),
        ({"ood": ["id=one.npz"]}, "an OOD set cannot be called 'id'"),
        ({"ood": ["a\nb=one.npz"]}, r"must be printable text, got 'a\\nb'"),
        ({"ood": ["\udcff=one.npz"]}, "must be printable text"),
        ({"ood": ["noise", "noise"]}, "two OOD sets are called 'noise'"),
        ({"ood": ["noise", "noise=one.npz"]}, "two OOD sets are called 'noise'"),
        ({"headline": "unknown", "reliability": "none"}, "headline must be a score that fits this run"),
        ({"headline": "knn"}, "the headline 'knn' needs 50 training images or more, got 30"),
        ({"headline": "knn:k=28", "holdout": 0.1}, "'knn:k=28' needs 28 training images or more, got 27"),
        ({"headline": "vim", "reliability": "mc-dropout"}, r"must be a score that fits this run, \['msp', .*got 'vim'"),
        (
            {"headline": "energy", "reliability": "mc-dropout", "score": ["dice"]},
            r"must be a score that fits this run, \['msp', .*got 'energy'",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_finished_is_not_begun(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    np.savez("one.npz", x=images(1))
    monkeypatch.setattr(Trainer, "run_epoch", lambda self, bar: pytest.fail("trained"))
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path, **change), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
