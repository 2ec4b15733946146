"""Each preset trains one epoch by its name, on a few images in the layouts of the real data."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from small_data_roots import save_data_root
from sparse_moon.app import models, run_folder, train
from sparse_moon.app.cli import main, presets
from sparse_moon.app.ood_groups import ood_group

# Only what makes networks and images small, and the training short; the depths are the papers'.
SMALL = ["--batch-size", "8", "--interval", "2", "--quiet"]
WIDTHS = {"resnet18": "4", "resnet50": "4", "wrn-22-2": "4", "densenet101": "2"}


# What the papers say, and where they say nothing their released code; shares of the steps as there.
SGD = {"momentum": 0.9, "weight_decay": 5e-4}
MOON = {
    **SGD, "model": "resnet18", "sparsity": 0.95, "allocation": "erk", "epochs": 100, "batch_size": 128, "lr": 0.12,
    "lr_end": 0.008, "lr_until": 0.8, "interval": 80, "drop_fraction": 0.3, "stop": 0.7, "warmup_epochs": 5,
    "vote_from": 0.8,
}  # fmt: skip
RIGL = {
    **SGD, "model": "wrn-22-2", "sparsity": 0.95, "allocation": "erk", "epochs": 250, "batch_size": 128, "lr": 0.1,
    "lr_milestones": [round(n * 30_000 / 97_656, 4) for n in (1, 2, 3)], "lr_gamma": 0.2, "interval": 100,
    "drop_fraction": 0.3, "stop": 0.75,
}  # fmt: skip
CIGL = {
    **RIGL, "lr_milestones": [round(n * 30_000 / 87_890, 4) for n in (1, 2)], "lr_gamma": 0.5, "vote_from": 0.8,
    "keep": 0.9,
}  # fmt: skip
WARM = {
    "model": "resnet50", "weight_decay": 1e-4, "lr_warmup": round(1_760 / 87_890, 2),
    "lr_milestones": [0.2476, 0.4751, 0.7027, 0.9303],  # every 20,000 after the warm-up
}  # fmt: skip
IMAGENET = {
    "model": "resnet50", "sparsity": 0.8, "epochs": 100, "batch_size": 4096, "lr": 1.6, "weight_decay": 1e-4,
    "lr_milestones": [0.3, 0.7, 0.9], "lr_warmup": 0.05, "label_smoothing": 0.1,
}  # fmt: skip
DICE = {
    "model": "densenet101", "epochs": 100, "batch_size": 64, "lr": 0.1, "lr_milestones": [0.5, 0.75, 0.9],
    "momentum": 0.9, "weight_decay": 1e-4,
}  # fmt: skip
PAPERS = {
    "moon-mnist": {**MOON, "final_weight": 0.01},
    "moon-cifar10": {**MOON, "final_weight": 1.0},
    "moon-cifar100": {**MOON, "final_weight": 2.0},
    "moon-imagenet": {**MOON, "final_weight": 0.001, "model": "resnet50", "sparsity": 0.8, "batch_size": 32},
    "rigl-cifar10": RIGL,
    "rigl-imagenet": {**RIGL, **IMAGENET, "lr_gamma": None},
    "cigl-cifar10-wrn": CIGL,
    "cigl-cifar10": {**CIGL, **WARM},
    "cigl-cifar100": {**CIGL, **WARM, "lr": 0.3},
    "cigl-imagenet": {**CIGL, **IMAGENET, "lr_gamma": 0.1, "batch_size": 64, "lr": 1.6 / 64, "label_smoothing": None},
    "dice-cifar10": DICE,
    "dice-cifar100": DICE,
    "dice-imagenet": {"model": "resnet50", "epochs": 0, "batch_size": 64},
}
# Scores whose options in the papers are not our defaults.
SCORES = {
    "moon-cifar100": {"knn:k=200"},
    "moon-imagenet": {"knn:k=1000"},
    "dice-cifar10": {"dice", "odin:eps=0.004"},
    "dice-cifar100": {"dice", "odin:eps=0.004"},
    "dice-imagenet": {"dice:p=0.7", "odin:eps=0"},
}


def test_the_values_are_the_papers() -> None:
    assert presets().keys() == PAPERS.keys()
    other = {"dataset", "method", "reliability", "ood", "headline", "score", "image_size", "resize", "crops", "weights"}
    for name, path in presets().items():
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        expected = {key: value for key, value in PAPERS[name].items() if value is not None}
        assert {key: value for key, value in settings.items() if key not in other} == expected, name
        paper, dataset, *_ = name.split("-")
        assert settings["dataset"] == dataset
        assert settings["method"] == ("dense" if paper == "dice" else "rigl")
        trained = {"rigl-imagenet": "label-smoothing", "moon": "moon", "cigl": "cigl"}
        assert settings["reliability"] == trained.get(name, trained.get(paper, "none"))
        scores = {settings.get("headline", "msp"), *settings.get("score", ())}
        assert scores >= SCORES.get(name, set()), name
        # and not the defaults besides
        assert not scores & {score.partition(":")[0] for score in SCORES.get(name, ()) if ":" in score}, name
        assert ("score" in settings) == (name in SCORES), name


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    save_data_root(root)
    return root


# Scores such as KNN need more training images than these.
@pytest.mark.filterwarnings("default::UserWarning", "default::RuntimeWarning")
@pytest.mark.parametrize("name", presets())
def test_a_preset_trains(name: str, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "write_report", lambda *_: None)  # most of the time, and the same for all
    settings = presets()[name].read_text()
    epochs = int(yaml.safe_load(settings)["epochs"] > 0)
    # What is not trained is of its own size.
    options = ["--width", next(width for model, width in WIDTHS.items() if model in settings)] if epochs else []
    if epochs and "image_size" in settings:
        options += ["--image-size", "32", "--resize", "36"]
    if "ood:" not in settings:
        options += ["--ood", "textures"]  # those that are always at hand are large
    if "warmup_epochs" in settings:
        options += ["--warmup-epochs", "0"]
    if epochs:
        options += ["--epochs", "1"]
    if "weights:" in settings:
        network = models.build("resnet50", 1000, in_channels=3, image_size=224)  # as many as in ImageNet's file
        torch.save(network.state_dict(), tmp_path / "w.pt")
        options += ["--weights", str(tmp_path / "w.pt")]
    out = tmp_path / "run"
    main(["train", "--config", name, "--data-root", str(data_root), *SMALL, *options, "--out", str(out)])
    config = json.loads((out / run_folder.CONFIG).read_text())
    results = json.loads((out / run_folder.RESULTS).read_text())
    assert config["epochs"] == results["epochs"] == epochs
    computed = next(iter(results["ood"].values())).keys() | results.get("left_out", {}).keys()
    assert computed >= SCORES.get(name, set())
    if config["ood"] is not None:
        assert list(results["ood"]) == config["ood"]
        assert {ood_group(config["dataset"], ood) for ood in results["ood"]} <= {"near", "far"}
    if config["method"] != "dense":
        assert results["sparsity"]["actual"] == pytest.approx(config["sparsity"], abs=0.01)
