"""Networks of libraries, and weights of trained networks from files."""

import pickle
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn

from sparse_moon.app.build import build_model, build_run, load_network
from sparse_moon.app.cli import main
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.evaluate import load_run
from sparse_moon.app.models import build
from sparse_moon.app.pretrained import load_weights
from sparse_moon.app.run_data import load_dataset
from sparse_moon.app.run_record import read_record
from sparse_moon.nn import Selection, densify, sparse_layers


@pytest.mark.parametrize(
    ("name", "in_channels", "size"),
    [("torchvision:resnet18", 3, 32), ("torchvision:squeezenet1_0", 3, 64), ("timm:resnet10t", 1, 32),
     ("timm:vit_tiny_patch16_224", 3, 32)],
)  # fmt: skip
def test_networks_of_libraries(name: str, in_channels: int, size: int) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    assert TrainConfig(model=name).model == name
    model = build(name, 7, in_channels=in_channels, image_size=size)
    assert model.training
    assert model(torch.zeros(2, in_channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "in_channels", "message"),
    [
        ("torchvision:resnet17", 3, "torchvision:resnet17 cannot be made: .*resnet17"),
        ("torchvision:resnet18", 1, "torchvision:resnet18 cannot be made: .*3 channels, got 1"),
        ("torchvision:inception_v3", 3, "inception_v3 has auxiliary outputs|inception_v3 does not take images"),
        ("timm:resnet17", 3, "timm:resnet17 cannot be made: "),
        ("torchvision:alexnet", 3, r"torchvision:alexnet does not take images \(1, 3, 32, 32\)"),
    ],
)
def test_networks_that_a_library_cannot_make(name: str, in_channels: int, message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's of slow initial weights
        with pytest.raises(ValueError, match=message):
            build(name, 7, in_channels=in_channels, image_size=32)


def test_the_width_of_a_library_model_is_its_own() -> None:
    with pytest.raises(ValueError, match="torchvision:resnet18 has the width of its name, got width 8"):
        build("torchvision:resnet18", 7, in_channels=3, image_size=32, width=8)


@pytest.mark.parametrize("name", ["timm:", "timm:hf-hub:someone/model", "keras:resnet50", "torchvision:a b"])
def test_names_that_are_of_no_library(name: str) -> None:
    with pytest.raises(ValueError, match=r"model must be one of mlp, .*, timm:NAME, torchvision:NAME or your own"):
        TrainConfig(model=name)


def test_timm_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ValueError, match="timm:resnet10t cannot be made: timm is not installed: pip install timm"):
        build("timm:resnet10t", 7, in_channels=3, image_size=32)


def test_densenet_has_the_tensors_of_its_paper_and_of_dice() -> None:
    with torch.device("meta"):
        model = build("densenet101", 10, in_channels=3, image_size=32)
    assert sum(p.numel() for p in model.parameters()) == 769_162  # 0.8M (Huang et al. 2017, Table 2)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 99  # and the head
    names = {re.sub(r"\d+", "N", name) for name in model.state_dict()}
    assert {"convN.weight", "blockN.layer.N.bnN.running_mean", "blockN.layer.N.convN.weight"} <= names
    assert {"transN.bnN.weight", "transN.convN.weight", "bnN.bias", "fc.weight"} <= names
    assert model.state_dict()["fc.weight"].shape == (10, 342)


def test_resnet101() -> None:
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in build("resnet101", 1000, in_channels=3, image_size=s).parameters())
            for s in (32, 224)
        ]
    assert sizes == [44_549_160 - (49 - 9) * 3 * 64, 44_549_160]


CONFIG = TrainConfig(model="mlp", width=6, method="set", reliability="none", sparsity=0.5)


def network(outputs: int = 8, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return build("mlp", outputs, in_channels=1, image_size=8, width=6)


def wrapped(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}


@pytest.mark.parametrize("wrap", [dict, wrapped, lambda state: {"model": state}])
def test_weights_from_a_file(tmp_path: Path, wrap: Any) -> None:
    given, model = network(), network(seed=2)
    torch.save(wrap(given.state_dict()), tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    for mine, theirs in zip(model.parameters(), given.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_head_of_other_outputs_starts_at_random(tmp_path: Path) -> None:
    given, model = network(), network(outputs=9, seed=2)
    head = model.state_dict()["fc.weight"].clone()
    torch.save(given.state_dict(), tmp_path / "w.pt")
    with pytest.warns(UserWarning, match=r"w\.pt: its head has 8 outputs, not 9: that of the network starts at random"):
        load_weights(model, tmp_path / "w.pt")
    assert torch.equal(model.state_dict()["fc.weight"], head)
    assert torch.equal(model.state_dict()["hidden1.weight"], given.state_dict()["hidden1.weight"])


@pytest.mark.parametrize("method", ["rigl", "static"])
def test_the_largest_weights_of_a_trained_network_are_kept(tmp_path: Path, method: str) -> None:
    given = network()
    torch.save(given.state_dict(), tmp_path / "w.pt")
    config = replace(CONFIG, method=method, weights=str(tmp_path / "w.pt"), selection="magnitude")
    layers = sparse_layers(build_model(config, load_dataset(config), tmp_path / "w.pt"))
    assert layers
    for name, layer in layers.items():
        dense = given.get_submodule(name).weight.detach()
        assert torch.equal(layer.dense_weight()[layer.mask()], dense[layer.mask()])
        assert dense[layer.mask()].abs().min() >= dense[~layer.mask()].abs().max()


def test_selections_are_those_of_sparsify() -> None:
    hint = get_type_hints(TrainConfig)["selection"]
    assert {name for kind in get_args(hint) for name in get_args(kind)} == set(get_args(Selection))
    with pytest.raises(ValueError, match="selection"):
        replace(CONFIG, selection="smallest")


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def test_nothing_in_a_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pickle.pt").write_bytes(pickle.dumps({"fc.weight": Harmful()}))
    torch.save({"fc.weight": Harmful()}, "torch.pt")
    for name in ("pickle.pt", "torch.pt"):
        with pytest.raises(ValueError, match=rf"{name}: damaged, or not a file of tensors alone"):
            load_weights(network(), Path(name))
    assert not Path("executed").exists()


def test_bad_files_of_weights(tmp_path: Path) -> None:
    path, state = tmp_path / "w.pt", network().state_dict()
    with pytest.raises(ValueError, match=r"w\.pt, the file of weights, does not exist"):
        load_weights(network(), path)
    other = {name: tensor for name, tensor in state.items() if "hidden1" not in name}
    bad: dict[str, Any] = {
        "expected a state dict, got list": [1, 2],
        "expected a state dict, got dict of other things than tensors": {"a": 1},
        "a state dict without tensors": {"state_dict": {}},
        r"another network: hidden2\.weight is \(6, 5\), not \(6, 6\)": {
            **state,
            "hidden2.weight": torch.zeros(6, 5),
        },
        r"of another network: 2 tensors are missing \['hidden1\.weight', 'hidden1\.bias'\], 0 are unknown": other,
        r"0 tensors are missing \[\], 1 are unknown \['extra'\]": {**state, "extra": torch.zeros(1)},
    }
    for message, content in bad.items():
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            load_weights(network(), path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"w\.pt: damaged"):
        load_weights(network(), path)


def test_a_run_starts_from_weights(tmp_path: Path) -> None:
    torch.save(network().state_dict(), path := tmp_path / "w.pt")
    config = TrainConfig.from_dict({**CONFIG.to_dict(), "weights": str(path)})
    data = load_dataset(config)
    model = densify(build_run(config, data).model)
    for (name, mine), theirs in zip(model.named_parameters(), network().parameters(), strict=True):
        kept = mine != 0
        assert torch.equal(mine[kept], theirs[kept]), name
    assert not torch.equal(densify(build_model(CONFIG, data)).hidden1.weight, model.hidden1.weight)  # type: ignore[union-attr]
    path.unlink()  # a finished run does not need it
    load_network(config, data, build_model(config, data).state_dict())


def test_no_epochs_need_weights() -> None:
    assert TrainConfig(epochs=0, weights="w.pt", reliability="none").epochs == 0
    with pytest.raises(ValueError, match="epochs must be at least 1 unless weights says what to start from, got 0"):
        TrainConfig(epochs=0)
    with pytest.raises(ValueError, match="moon averages over epochs: epochs must be at least 1, got 0"):
        TrainConfig(epochs=0, weights="w.pt")


def test_a_trained_network_is_evaluated_without_training(tmp_path: Path) -> None:
    torch.save(network().state_dict(), path := tmp_path / "w.pt")
    options = ["--model", "mlp", "--width", "6", "--method", "dense", "--reliability", "none", "--epochs", "0"]
    main(["train", *options, "--weights", str(path), "--ood", "noise", "--out", str(tmp_path / "run"), "--quiet"])
    record = read_record(tmp_path / "run")
    assert record.results["epochs"] == 0 and record.history == []
    assert 0 < record.results["ood"]["noise"]["msp"]["auroc"] < 1
    assert torch.equal(load_run(tmp_path / "run").network.hidden1.weight, network().hidden1.weight)  # type: ignore
