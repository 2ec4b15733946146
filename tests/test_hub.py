"""Models in folders as the Hugging Face Hub has them."""

import json

import pytest
import torch
from torch import nn

import sparse_moon as sm

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
from huggingface_hub.errors import LocalEntryNotFoundError

from sparse_moon.formats.hub import HubMixin


class Net(nn.Module, HubMixin):
    def __init__(self, classes: int = 10, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.hidden = nn.Linear(width, 4 * width)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x):
        return self.fc(self.hidden(self.norm(self.conv(x)).relu().mean((2, 3))))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("pattern", ["unstructured", "block4"])
@pytest.mark.filterwarnings("ignore:.*(does not divide|was asked for|have no weight):UserWarning")
def test_a_folder(tmp_path, pattern):
    model = sm.sparsify(Net(5, width=16), 0.5, pattern=pattern).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"classes": 5, "width": 16}
    assert (tmp_path / "README.md").exists() and not [*tmp_path.glob("*.bin"), *tmp_path.glob("*.pt")]
    loaded = Net.from_pretrained(tmp_path)
    x = torch.randn(2, 3, 8, 8)
    assert not loaded.training and torch.equal(loaded(x), model(x))
    assert sm.sparse_layers(loaded).keys() == sm.sparse_layers(model).keys()
    other = sm.load(tmp_path, Net(5, width=16)).eval()  # a folder of sm.save as well
    assert torch.equal(other(x), model(x))


def test_a_dense_model(tmp_path):
    model = Net().eval()
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(Net.from_pretrained(tmp_path)(x), model(x))


def test_another_architecture(tmp_path):
    sm.sparsify(Net(5), 0.5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"fc.weight .*\(5, 32\) in the folder.*\(7, 32\) here|of \(5, 32\) in the"):
        Net.from_pretrained(tmp_path, classes=7)


def test_damage(tmp_path):
    sm.sparsify(Net(), 0.5).save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
        Net.from_pretrained(tmp_path)


def test_what_is_not_there(tmp_path):
    with pytest.raises(LocalEntryNotFoundError, match="Cannot find the requested files"):
        Net.from_pretrained("nobody/nothing", local_files_only=True, cache_dir=tmp_path)
