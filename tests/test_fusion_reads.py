"""A fused forward pass does what the code of the module would do now, whatever that code reads."""

import copy
import pickle
import warnings
from types import MethodType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_moon.nn import batch_norm_relu
from sparse_moon.nn.fusion import fuse, fusions, unfuse
from sparse_moon.ops.native import native

pytestmark = pytest.mark.skipif(native is None, reason="without compiled kernels nothing is fused by itself")


@pytest.fixture(autouse=True)
def kernels_for_small_inputs(monkeypatch):
    monkeypatch.setattr(batch_norm_relu, "FEWEST", 0)


class Twice(nn.Conv2d):
    def __call__(self, x):
        return 2 * super().__call__(x)


def make(code):
    """A model whose forward pass ends with ``code`` of itself and of what its batch norm and activation return."""

    class Net(nn.Module):
        scale = 1.0

        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
            self.drop, self.pool, self.twice = nn.Dropout(0.5), nn.Identity(), Twice(4, 4, 1)
            self.layers, self.inner = nn.Sequential(nn.Identity()), nn.Module()
            self.inner.layers = nn.ModuleList([nn.Identity()])
            self.other = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
            self.number, self.seen, self.known = torch.tensor(1.0), [], {}
            self.meter = SimpleNamespace(count=0, last=None)
            self.register_module("extra", None)
            self.register_parameter("shift", None)

        def body(self, x):
            return self.act(self.bn(self.conv(x)))

        def helper(self, y):
            return y + 1

        def forward(self, x):
            return code(self, x)

    return Net()


def through(modules, y):
    for module in modules:
        y = module(y)
    return y


def assert_same(fused, plain):
    x = torch.randn(4, 4, 8, 8)
    for mode in (True, False):
        torch.testing.assert_close(fused.train(mode)(x.clone()), plain.train(mode)(x.clone()))


CHANGES = {
    "a method": (lambda m, x: m.helper(m.body(x)), lambda m: setattr(m, "helper", lambda y: 3 * y)),
    "a method of the class": (
        lambda m, x: m.helper(m.body(x)), lambda m: setattr(type(m), "helper", lambda self, y: 3 * y)
    ),
    "the forward pass of the class": (
        lambda m, x: m.body(x), lambda m: setattr(type(m), "forward", lambda self, x: 3 * self.body(x))
    ),
    "an attribute over that of the class": (lambda m, x: m.body(x) * m.scale, lambda m: setattr(m, "scale", 3.0)),
    "one that was not there": (lambda m, x: m.body(x) * getattr(m, "gain", 1.0), lambda m: setattr(m, "gain", 3.0)),
    "whether one is there": (
        lambda m, x: 3 * m.body(x) if hasattr(m, "flag") else m.body(x), lambda m: setattr(m, "flag", True)
    ),
    "all attributes": (lambda m, x: m.body(x) * m.__dict__.get("gain", 1.0), lambda m: setattr(m, "gain", 3.0)),
    "a module that was not there": (
        lambda m, x: m.body(x) if m.extra is None else m.extra(m.body(x)), lambda m: setattr(m, "extra", nn.Tanh())
    ),
    "a module that goes": (
        lambda m, x: m.body(x) if m.pool is None else m.pool(m.body(x)), lambda m: setattr(m, "pool", None)
    ),
    "a parameter that was not there": (
        lambda m, x: m.body(x) if m.shift is None else m.body(x) + m.shift,
        lambda m: setattr(m, "shift", nn.Parameter(torch.ones(8))),
    ),
    "a parameter that nobody knew of": (
        lambda m, x: m.body(x) + getattr(m, "offset", 0.0),
        lambda m: m.register_parameter("offset", nn.Parameter(torch.ones(8))),
    ),
    "the type of a module": (
        lambda m, x: m.body(x) if isinstance(m.pool, nn.Identity) else 3 * m.body(x),
        lambda m: setattr(m, "pool", nn.Tanh()),
    ),
    "a number of a module": (lambda m, x: m.body(x) * m.drop.p, lambda m: setattr(m.drop, "p", 0.25)),
    "what is in a Sequential": (lambda m, x: through(m.layers, m.body(x)), lambda m: m.layers.append(nn.Tanh())),
    "what is in a list of a module": (
        lambda m, x: through(m.inner.layers, m.body(x)), lambda m: m.inner.layers.append(nn.Tanh())
    ),
    "a number in a tensor": (
        lambda m, x: 3 * m.body(x) if m.number > 2 else m.body(x), lambda m: m.number.fill_(3)
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("copied", [False, True])
def test_what_the_code_has_read_and_that_changes(what, copied):
    code, change = CHANGES[what]
    model = make(code)
    plain = copy.deepcopy(model)
    fuse(model)
    assert fusions(model)["bn"] == "fused"
    assert_same(model, plain)
    before = model(torch.ones(4, 4, 8, 8))
    change(model), change(plain)
    model = copy.deepcopy(model) if copied else model
    assert_same(model, plain)
    assert (model(torch.ones(4, 4, 8, 8)) - before).abs().max() > 0.01
    assert fusions(model)["bn"] != "fused"


def caught(m, x):
    try:
        sizes = int(x.shape[0])
    except Exception:
        sizes = 0
    return m.body(x) * (1 + sizes)


def power_in_place(m, x):
    y = m.body(x)
    z = y
    z **= 2
    return y + z


def written_through_a_view(m, x):
    y = m.bn(x)
    z = m.other(x[:, :])
    return m.act(y) + z


def of_a_view(m, x):
    y = m.bn(x[:, :])
    z = m.other(x)
    return m.act(y) + z


def statistics(m, x):
    y = m.bn(x)
    return m.act(y) + m.bn.running_mean.view(1, 4, 1, 1) + m.bn.num_batches_tracked


OTHERS = {
    "the mode of a module": lambda m, x: F.dropout(m.body(x), m.drop.p, m.drop.training) * 0 + m.body(x),
    "the mode of a module, in a batch norm": lambda m, x: F.instance_norm(
        m.body(x), use_input_stats=m.drop.training, running_mean=m.bn.running_mean, running_var=m.bn.running_var
    ),
    "a __call__ of its own": lambda m, x: m.twice(m.body(x)),
    "type()": lambda m, x: m.body(x) if type(x) is torch.Tensor else x,
    "hasattr()": lambda m, x: x.tensors if hasattr(x, "tensors") else m.body(x),
    "a refusal that is caught": caught,
    "a power in place": power_in_place,
    "an input that is written through a view": written_through_a_view,
    "a view whose base is written": of_a_view,
    "statistics that are read before the activation": statistics,
}


@pytest.mark.parametrize("what", OTHERS)
def test_code_that_a_graph_would_not_say_whole(what):
    model = make(OTHERS[what])
    plain = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of some nothing is fused
        fuse(model)
    assert_same(model, plain)


def kept_in_a_list(m, x):
    m.seen.append(m.bn(x))
    return m.act(m.seen[-1])


def kept_in_a_dict(m, x):
    if "sum" not in m.known:
        m.known["sum"] = m.bn(x)
    return m.act(m.known["sum"])


def kept_in_an_object(m, x):
    m.meter.count += 1
    m.meter.last = m.bn(x)
    return m.act(m.meter.last)


@pytest.mark.parametrize("code", [kept_in_a_list, kept_in_a_dict, kept_in_an_object])
def test_tracing_leaves_nothing_in_the_module(code):
    model = make(code)
    with pytest.warns(UserWarning, match="writes to the module"):
        fuse(model)
    assert model.seen == [] and model.known == {} and vars(model.meter) == {"count": 0, "last": None}
    model(torch.randn(2, 4, 8, 8))


def test_a_relu6_that_clips_elsewhere():
    model = make(lambda m, x: m.act(m.bn(x)))
    model.act = nn.ReLU6()
    plain = copy.deepcopy(model)
    fuse(model)
    assert fusions(model)["bn"] == "fused"
    model.act.max_val = plain.act.max_val = 0.5
    assert_same(model, plain)
    assert fusions(fuse(model))["bn"] == "not fused: followed by ReLU6"


def test_a_forward_pass_that_is_bound_once_more():
    # accelerate's unwrap_model binds what it takes for a function
    model = fuse(make(lambda m, x: m.body(x)))
    plain = unfuse(copy.deepcopy(model))
    model.forward = MethodType(model.forward, model)
    assert_same(model, plain)


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    @property
    def gain(self):
        return 2.0

    def forward(self, x):
        return F.relu(self.bn(self.conv(x))) * self.gain


def test_pickles_are_fused():
    model = fuse(Module())
    other = pickle.loads(pickle.dumps(model))
    assert fusions(other) == {"bn": "fused"}
    assert_same(other, unfuse(model))
