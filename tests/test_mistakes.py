"""What is easily got wrong in a loop of one's own, and what is said then."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparse_moon as sm

X, Y = torch.randn(8, 20), torch.arange(8) % 4


def net():
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def trained_by(kind, model=None, **options):
    model = sm.sparsify(net(), 0.8) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, kind(model, optimizer, **options)


def backward(model):
    F.cross_entropy(model(X), Y).backward()


@pytest.mark.parametrize(("kind", "options"), [(sm.Static, {}), (sm.RigL, {"total_steps": 100, "interval": 10})])
@pytest.mark.parametrize("attached", [False, True])
def test_a_model_that_was_made_dense_is_not_trained_on(kind, options, attached):
    model, optimizer, method = trained_by(kind, **options)
    if attached:
        method.attach()
    step = optimizer.step if attached else method.step
    backward(model)
    step()
    assert type(sm.densify(copy.deepcopy(model))[0]) is nn.Linear
    backward(model)
    step()
    sm.densify(model)
    backward(model)
    with pytest.raises(RuntimeError, match=r"densify\(\) has put dense layers in the places of those that method"):
        step()
    model, _, method = trained_by(sm.Static, model)  # dense now
    before = model[0].weight.clone()
    backward(model)
    method.step()
    assert not torch.equal(before, model[0].weight)


def test_a_start_from_which_nothing_prunes():
    model = sm.sparsify(net(), 0.9, start_sparsity=0.5)
    with pytest.warns(UserWarning, match="with start_sparsity, which method 'rigl' keeps: it prunes nothing"):
        trained_by(sm.RigL, model, total_steps=20, interval=5)
    trained_by(sm.RigL, model, total_steps=20, interval=5)  # it is said once


@pytest.mark.filterwarnings("ignore:.*outputs have no weight", "error:.*start_sparsity")
def test_a_start_from_which_a_method_prunes():
    model = sm.sparsify(net(), 0.9, start_sparsity=0.5)
    trained_by(sm.GMP, model, densities=0.1, total_steps=20, interval=5)
    trained_by(sm.Static, model)  # afterwards
    trained_by(sm.Static, sm.sparsify(net(), 0.9, start_sparsity=0.9))


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: sm.sparsify(net(), "0.9"), TypeError, "sparsity must be a number, got '0.9'"),
        (lambda: sm.sparsify(net(), None), TypeError, "sparsity must be a number, got None"),
        (lambda: sm.param_groups(net(), "1e-2"), TypeError, "weight_decay must be a number, got '1e-2'"),
        (lambda: sm.sparsify(net(), 0.8, pattern="block48"), ValueError,
         r"block \(48, 48\) divides none of the layers to make sparse: 0 \(64, 20\), 2 \(64, 64\), 4 \(4, 64\)$"),
        (lambda: sm.sparsify(net(), 0.8, exclude=nn.Linear), ValueError, "sparse but those that exclude names$"),
        (lambda: sm.sparsify(net(), 0.8)(X.numpy()), TypeError, "input must be a tensor, got ndarray"),
        (lambda: sm.RigL(torch.optim.SGD([X], 0.1), net(), total_steps=9), TypeError,
         "a method takes a model and then its optimizer, got SGD first"),
        (lambda: trained_by(sm.Static)[2].step(lambda: None), TypeError, r"a closure is step\(closure=...\)"),
        (lambda: pickle.dumps(trained_by(sm.SET, total_steps=9, interval=2)[2]), TypeError,
         "'set' cannot be pickled: keep its state_dict"),
    ],
)  # fmt: skip
def test_a_word_about_it(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_onnx_without_its_packages():
    code = "import sys; sys.modules['onnxscript'] = None\nimport sparse_moon.formats.onnx"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "sparse_moon.formats.onnx needs onnx and onnxscript" in done.stderr.splitlines()[-1]
