"""Each preset trains one epoch by its name, on a few images in the layouts of the real data."""

import json
from pathlib import Path

import pytest
import torch

from small_data_roots import save_data_root
from sparse_moon.app import models, run_folder, train
from sparse_moon.app.cli import main, presets
from sparse_moon.app.ood_groups import ood_group

# Only what makes networks and images small, and the training short; the depths are the papers'.
SMALL = ["--epochs", "1", "--batch-size", "8", "--interval", "2", "--quiet"]
WIDTHS = {"resnet18": "4", "resnet50": "4", "wrn-22-2": "4", "densenet101": "2"}


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
    options = ["--width", next(width for model, width in WIDTHS.items() if model in settings)]
    if "image_size" in settings:
        options += ["--image-size", "32", "--resize", "36"]
    if "ood:" not in settings:
        options += ["--ood", "textures"]  # those that are always at hand are large
    if "warmup_epochs" in settings:
        options += ["--warmup-epochs", "0"]
    if "weights:" in settings:
        network = models.build("resnet50", 1000, in_channels=3, image_size=32, width=4)  # as many as in ImageNet's file
        torch.save(network.state_dict(), tmp_path / "w.pt")
        options += ["--weights", str(tmp_path / "w.pt")]
    out = tmp_path / "run"
    main(["train", "--config", name, "--data-root", str(data_root), *SMALL, *options, "--out", str(out)])
    config = json.loads((out / run_folder.CONFIG).read_text())
    results = json.loads((out / run_folder.RESULTS).read_text())
    assert config["epochs"] == results["epochs"] == 1
    if config["ood"] is not None:
        assert list(results["ood"]) == config["ood"]
        assert {ood_group(config["dataset"], ood) for ood in results["ood"]} <= {"near", "far"}
    if config["method"] != "dense":
        assert results["sparsity"]["actual"] == pytest.approx(config["sparsity"], abs=0.01)
