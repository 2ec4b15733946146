"""What docs/fine-tuning.md does with a trained network, on data that can be learned."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparse_moon as sm

# of so small a network at 90 %
pytestmark = pytest.mark.filterwarnings("ignore:.* outputs have no weight:UserWarning")
PAGE = (Path(__file__).parents[1] / "docs" / "fine-tuning.md").read_text(encoding="utf-8")


def code(heading):
    """The Python block below a heading of the page."""
    return re.search(rf"^## {heading}$.*?^```python\n(.*?)^```$", PAGE, re.M | re.S)[1]


def network():
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


@pytest.fixture(scope="module")
def trained():
    """A network on patterns of 10 classes in noise, and batches of them."""
    torch.manual_seed(0)
    patterns = torch.randn(10, 64)
    labels = torch.randint(0, 10, (200, 32))
    loader = [(patterns[y] + 1.5 * torch.randn(32, 64), y) for y in labels]
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for images, y in loader:
        F.cross_entropy(model(images), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), loader


def run(heading, trained):
    """The page's names after its code has run on the trained network."""
    state, loader = trained
    torch.manual_seed(1)
    model = network()
    model.load_state_dict(state)
    names = {"model": model, "loader": loader, "steps": len(loader), "criterion": nn.CrossEntropyLoss()}
    exec(compile(code(heading), heading, "exec"), names)
    return names["model"], names


def accuracy(model, loader):
    with torch.no_grad():
        return sum((model(x).argmax(1) == y).float().mean().item() for x, y in loader) / len(loader)


@pytest.mark.parametrize("heading", ["The largest weights", "Gradual pruning"])
def test_a_pruned_network_is_as_good_as_before(trained, heading):
    model, names = run(heading, trained)
    assert sm.overall_sparsity(model) == pytest.approx(0.9, abs=0.01)
    dense = network()
    dense.load_state_dict(trained[0])
    assert accuracy(model, names["loader"]) > accuracy(dense, names["loader"]) - 0.02


def test_the_largest_weights_are_a_better_start_than_random_ones(trained):
    state, loader = trained
    found = {}
    for selection in ("magnitude", "random"):
        model = network()
        model.load_state_dict(state)
        found[selection] = accuracy(sm.sparsify(model, 0.9, selection=selection), loader)
    assert found["magnitude"] > found["random"] + 0.2


def test_a_student_comes_near_to_its_teacher(trained):
    model, names = run("Distillation", trained)
    images = torch.cat([x for x, _ in trained[1][:20]])

    def distance(student):
        with torch.no_grad():
            soft = names["teacher"](images).log_softmax(1)
            return F.kl_div(student(images).log_softmax(1), soft, log_target=True, reduction="batchmean").item()

    cut = network()
    cut.load_state_dict(trained[0])
    assert distance(model) < 0.5 * distance(sm.sparsify(cut, 0.8, selection="magnitude"))
    assert all(torch.equal(a, b) for a, b in zip(names["teacher"].parameters(), trained[0].values(), strict=True))


def test_factors_learn_other_labels(trained):
    """A trained sparse network whose classes are renamed: only factors and head train."""
    state, loader = trained
    model = network()
    model.load_state_dict(state)
    sm.sparsify(model, 0.5, selection="magnitude", exclude="4")
    masks = [layer.mask() for layer in sm.sparse_layers(model).values()]
    sm.lora(model, 4, train="4")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    other = [(x, (y * 3 + 1) % 10) for x, y in loader]
    before = accuracy(model, other)
    for x, y in other:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    sm.merge_lora(model)
    assert before < 0.3 and accuracy(model, other) > 0.8
    for layer, mask in zip(sm.sparse_layers(model).values(), masks, strict=True):
        assert torch.equal(layer.mask(), mask)
