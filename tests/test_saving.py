"""Models in a folder: what comes back, what is refused, and what a crash leaves."""

import json
import os
import random
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sparse_moon as sm
from sparse_moon import files


def net(classes=10, channels=16):
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.Conv2d(channels, channels, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes),
    )  # fmt: skip


class Tied(nn.Module):
    """Two layers with one weight, one layer with two names, a table that is an output layer, and odd buffers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.b.weight = self.a.weight
        self.again = self.c
        self.table = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("small", torch.randn(4).to(torch.bfloat16))
        self.register_buffer("part", self.small[1:3])

    def forward(self, x):
        return self.head(self.b(self.a(x))), self.again(x)


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.fixture
def saved(tmp_path):
    model = sm.sparsify(net(), 0.8).eval()
    sm.save(model, tmp_path / "model")
    return model, tmp_path / "model"


def weights_of(folder):
    (path,) = folder.glob("*.safetensors")
    return path


@pytest.mark.parametrize("pattern", ["unstructured", "vector4", "block8"])
@pytest.mark.parametrize("sparsity", [None, 0.5, 0.9])
@pytest.mark.filterwarnings("ignore:.*block .* does not divide:UserWarning", "ignore:.*was asked for:UserWarning")
@pytest.mark.filterwarnings("ignore:.*outputs have no weight:UserWarning")
def test_a_dense_or_a_sparse_model_becomes_what_was_saved(tmp_path, pattern, sparsity):
    model = sm.sparsify(net(), 0.8, pattern=pattern, exclude=nn.Linear).eval()
    model[1].running_mean.normal_()
    sm.save(model, tmp_path)
    other = net().eval()
    if sparsity is not None:
        other = sm.sparsify(other, sparsity, pattern=pattern, exclude=nn.Linear)
    assert sm.load(tmp_path, other) is other
    assert same_state(other, model)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(other(x), model(x))
    assert {n: (la.topology.block, la.sparsity) for n, la in sm.sparse_layers(other).items()} == {
        n: (la.topology.block, la.sparsity) for n, la in sm.sparse_layers(model).items()
    }


def test_a_loaded_model_trains_on(saved):
    _, folder = saved
    model = sm.load(folder, net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    method = sm.RigL(model, optimizer, total_steps=10, interval=2)
    before = {name: layer.topology.nnz for name, layer in sm.sparse_layers(model).items()}
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        method.step()
    assert {name: layer.topology.nnz for name, layer in sm.sparse_layers(model).items()} == before
    sm.save(model, folder)
    assert same_state(sm.load(folder, net()), model)


def test_what_is_shared_stays_shared_and_is_written_once(tmp_path):
    model = sm.sparsify(Tied(), 0.5, exclude=nn.Embedding, allocation="uniform", first_dense=False)
    sm.save(model, tmp_path)
    other = sm.load(tmp_path, Tied())
    assert same_state(other, model)
    assert other.b.values is other.a.values and other.b.topology is other.a.topology
    assert other.again is other.c and other.head.weight is other.table.weight
    x = torch.randn(3, 8)
    assert all(map(torch.equal, other(x), model(x)))
    numbers = sum(t.numel() * t.element_size() for t in {id(t): t for t in model.parameters()}.values())
    assert weights_of(tmp_path).stat().st_size < numbers + 4000


def test_sharing_must_be_the_same(tmp_path):
    class Apart(Tied):
        def __init__(self):
            super().__init__()
            self.b.weight = nn.Parameter(torch.zeros(8, 8))

    tied = sm.sparsify(Tied(), 0.5, exclude=nn.Embedding)
    sm.save(tied, tmp_path / "tied")
    with pytest.raises(ValueError, match=r"only the folder shares a.values and b.values"):
        sm.load(tmp_path / "tied", Apart())
    sm.save(sm.sparsify(Apart(), 0.5, exclude=nn.Embedding), tmp_path / "apart")
    with pytest.raises(ValueError, match=r"only the model shares a.values and b.values"):
        sm.load(tmp_path / "apart", Tied())


def test_dense_models_and_single_layers(tmp_path):
    dense = net()
    sm.save(dense, tmp_path / "dense")
    assert same_state(sm.load(tmp_path / "dense", net()), dense)
    layer = sm.sparsify(nn.Linear(32, 16), 0.5)
    sm.save(layer, tmp_path / "layer")
    loaded = sm.load(tmp_path / "layer", nn.Linear(32, 16))
    assert isinstance(loaded, sm.SparseLinear) and same_state(loaded, layer)


def test_the_model_inside_of_a_wrapper(saved, tmp_path):
    model, folder = saved
    sm.save(nn.DataParallel(model), tmp_path / "again")
    assert weights_of(tmp_path / "again").read_bytes() == weights_of(folder).read_bytes()
    other = nn.DataParallel(sm.sparsify(net(), 0.9, exclude=nn.Linear))
    assert sm.load(folder, other) is other and same_state(other.module, model)
    with pytest.raises(ValueError, match="load into the model before DataParallel wraps it"):
        sm.load(folder, nn.DataParallel(net()))


@pytest.mark.parametrize("make, message", [
    (lambda: net(100), r"6.weight has shape \(10, 16\) in the folder, \(100, 16\) here"),
    (lambda: net(channels=8), r"'0' has a weight of \(16, 3, 3, 3\) in the folder, of \(8, 3, 3, 3\) here"),
    (lambda: nn.Linear(3, 4), r"'0' is a sparse layer of .* in the folder, here is no such layer"),
    (lambda: net().double(), r"torch.float32 in the folder, torch.float64 here"),
    (lambda: sm.sparsify(net(), 0.5, pattern="vector2"), r"blocks of \(1, 1\) in the folder, of \(2, 1\) here"),
    (lambda: sm.sparsify(net(), 0.2, allocation="uniform", first_dense=False), "'6' is dense in the folder and sparse"),
    (lambda: nn.Sequential(*net(), nn.Linear(10, 10)), "the folder has no 7.weight, 7.bias"),
    (lambda: net()[:6], "the model has no 6.bias, 6.weight"),
    (lambda: nn.Sequential(nn.ConvTranspose2d(3, 16, 3), *net()[1:]), "here is a ConvTranspose2d that cannot become"),
    (lambda: net().to("meta"), "expected tensors with memory"),
])  # fmt: skip
def test_another_architecture_is_refused_and_left_as_it_was(saved, make, message):
    _, folder = saved
    model = make()
    modules, state = list(model.modules()), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        sm.load(folder, model)
    assert list(model.modules()) == modules
    assert all(v.is_meta or torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_files_that_are_missing(saved):
    _, folder = saved
    with pytest.raises(ValueError, match=r"the folder .*nowhere does not exist"):
        sm.load(folder / "nowhere", net())
    weights_of(folder).unlink()
    with pytest.raises(ValueError, match=r"model-\w+.safetensors does not exist"):
        sm.load(folder, net())
    (folder / "model.json").unlink()
    with pytest.raises(ValueError, match=r"model.json does not exist"):
        sm.load(folder, net())


def test_every_damage_is_noticed(saved):
    model, folder = saved
    draw = random.Random(0)
    for path in (weights_of(folder), folder / "model.json"):
        whole = path.read_bytes()
        damaged = [whole[:n] for n in (0, 7, 100, len(whole) // 2, len(whole) - 1)] + [whole + b"x"]
        for _ in range(150):
            place = draw.randrange(len(whole))
            damaged.append(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :])
        for content in damaged:
            path.write_bytes(content)
            other = net()
            try:
                sm.load(folder, other)
            except ValueError:
                assert not sm.sparse_layers(other)
            else:  # in spaces or the like
                assert same_state(other, model)
        path.write_bytes(whole)
    assert same_state(sm.load(folder, net()), model)


def test_every_flipped_bit_of_the_tensors_file_is_an_error(tmp_path):
    sm.save(nn.Linear(2, 1), tmp_path)
    path = weights_of(tmp_path)
    whole = path.read_bytes()
    for place in range(8 * len(whole)):
        byte, bit = divmod(place, 8)
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1 << bit]) + whole[byte + 1 :])
        with pytest.raises(ValueError, match=r"model-\w+.safetensors is damaged"):
            sm.load(tmp_path, nn.Linear(2, 1))
    path.write_bytes(whole)
    save_file(load_file(path), path)  # by another program, without metadata
    sm.load(tmp_path, nn.Linear(2, 1))


def test_a_torn_file_names_itself(saved):
    _, folder = saved
    path = weights_of(folder)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"model-\w+.safetensors is damaged or not a safetensors file"):
        sm.load(folder, net())


@pytest.mark.parametrize("change, message", [
    (lambda d: d.update(format="other"), "expected format 'sparse_moon model 1', got 'other'"),
    (lambda d: d.update(weights="../secret.safetensors"), r"bad \['weights'\]"),
    (lambda d: d.update(layers=[]), r"bad \['layers'\]"),
    (lambda d: d["layers"]["3"].update(shape="large"), "layer '3' has shape 'large'"),
    (lambda d: d["layers"]["3"].update(block=[3, 3]), "does not divide"),
    (lambda d: d["layers"].pop("3"), "the folder has no 3.weight"),
])  # fmt: skip
def test_descriptions_that_are_none(saved, change, message):
    _, folder = saved
    description = files.read_json(folder / "model.json")
    change(description)
    (folder / "model.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=message):
        sm.load(folder, net())


def test_an_index_that_is_none_is_refused(saved):
    """Also where its digest is right: whoever writes a file can write that, too."""
    _, folder = saved
    tensors = load_file(weights_of(folder))
    tensors["3.topology.col"] = tensors["3.topology.col"] + 10**6
    save_file(tensors, weights_of(folder))
    with pytest.raises(ValueError, match="is damaged: its tensors have the digest") as error:
        sm.load(folder, net())
    digest = re.search(r"the digest (\w+)", str(error.value))[1]
    description = files.read_json(folder / "model.json")
    files.write_json(folder / "model.json", {**description, "sha256": digest})
    with pytest.raises(ValueError, match=r"topology at '3.topology' is damaged: columns outside"):
        sm.load(folder, net())


@pytest.mark.parametrize("failing", range(1, 3))
def test_a_crash_leaves_the_old_model_or_the_new_one(saved, monkeypatch, failing):
    old, folder = saved
    new = sm.sparsify(net(), 0.5).eval()
    replace, calls = os.replace, []

    def crashing(*names):
        calls.append(names)
        if len(calls) == failing:
            raise KeyboardInterrupt
        replace(*names)

    monkeypatch.setattr(os, "replace", crashing)
    with pytest.raises(KeyboardInterrupt):
        sm.save(new, folder)
    monkeypatch.undo()
    assert same_state(sm.load(folder, net()), old)
    sm.save(new, folder)
    assert same_state(sm.load(folder, net()), new)


def test_the_file_before_goes_when_it_is_replaced(saved):
    model, folder = saved
    first = weights_of(folder)
    sm.save(model, folder)
    assert weights_of(folder) == first
    sm.save(sm.sparsify(net(), 0.5), folder)
    assert weights_of(folder) != first


def test_what_cannot_be_saved(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(ValueError, match="expected a state of tensors, got _extra_state: dict"):
        sm.save(Extra(2, 2), tmp_path / "x")
    with pytest.raises(ValueError, match="are on meta: weight, bias"):
        sm.save(nn.Linear(2, 2, device="meta"), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("transform", [torch.tanh, nn.Tanh()], ids=["function", "module"])
def test_a_transform_is_not_lost(tmp_path, transform):
    """Neither of them has a state."""
    model = sm.sparsify(nn.Sequential(nn.Linear(16, 16)), 0.5)
    model[0].transform = transform
    sm.save(model, tmp_path)
    x, name = torch.randn(2, 16), type(transform).__name__ if isinstance(transform, nn.Module) else "tanh"
    again = sm.sparsify(nn.Sequential(nn.Linear(16, 16)), 0.7)
    for other in (nn.Sequential(nn.Linear(16, 16)), again):
        with pytest.raises(ValueError, match=f"'0' has the transform {name} in the folder, None here: make the model"):
            sm.load(tmp_path, other)
    again[0].transform = transform
    assert torch.equal(sm.load(tmp_path, again)(x), model(x))
    model[0].transform = None
    sm.save(model, tmp_path)
    with pytest.raises(ValueError, match=f"'0' has the transform None in the folder, {name} here"):
        sm.load(tmp_path, again)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_files_have_the_rights_of_the_umask(tmp_path):
    before = os.umask(0)
    try:
        for umask, expected in ((0o077, 0o600), (0o022, 0o644), (0o002, 0o664)):
            os.umask(umask)
            sm.save(nn.Linear(2, 2), tmp_path / f"{umask}")
            found = {path.name.split("-")[0]: path.stat().st_mode & 0o777 for path in (tmp_path / f"{umask}").iterdir()}
            assert found == {"model": expected, "model.json": expected}
    finally:
        os.umask(before)
