"""Loaders and models of every usual form: what is not understood is said, and the head is what gave the logits."""

import math
from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from sparse_moon.nn import SparseLinear
from sparse_moon.ood import (
    DETECTORS,
    DICE,
    GEN,
    KNN,
    MSP,
    ODIN,
    CosineHead,
    Detector,
    Energy,
    GradNorm,
    Mahalanobis,
    ReAct,
    Unknown,
    choose_p,
    collect,
    evaluate,
    fit_detectors,
)
from sparse_moon.ood.passes import model_logits

K, D = 3, 6


class Net(nn.Module):
    """Images (B, 4) to logits (B, K), the head defined first; what is returned is up to ``form``."""

    def __init__(self, form=lambda z, h: z, head=None):
        super().__init__()
        self.head = nn.Linear(D, K) if head is None else head
        self.body = nn.Sequential(nn.Linear(4, D), nn.Tanh())
        self.form = form

    def forward(self, images):
        h = self.body(images)
        return self.form(self.head(h), h)


@dataclass
class Result:
    logits: Any
    loss: Any = None


class Named(NamedTuple):
    logits: torch.Tensor
    aux_logits: torch.Tensor | None


images, labels = torch.randn(8, 4), torch.arange(8) % K

BATCHES = {
    "tensor": lambda x, y: x,
    "(x,)": lambda x, y: (x,),
    "[x, y]": lambda x, y: [x, y],
    "(x, y, index)": lambda x, y: (x, y, torch.arange(len(x))),
    "(x, None)": lambda x, y: (x, None),
    "(x, list)": lambda x, y: (x, y.tolist()),
    "image, label": lambda x, y: {"image": x, "label": y},
    "pixel_values, labels": lambda x, y: UserDict(pixel_values=x, labels=y, ids=["a"] * len(x)),
    "images": lambda x, y: {"images": x},
}


@pytest.mark.parametrize("form", BATCHES)
def test_forms_of_batches(form):
    net = Net()
    batches = [BATCHES[form](x, y) for x, y in zip(images.split(3), labels.split(3), strict=True)]
    found = collect(net, batches)
    assert found.logits.equal(collect(net, [*images.split(3)]).logits)
    if form in ("tensor", "(x,)", "(x, None)", "images"):
        assert found.labels is None
    else:
        assert found.labels.equal(labels)
    dice = DICE(Energy(K))
    fit_detectors(net, [dice], batches)
    assert choose_p(net, dice, batches, candidates=[0.1, 0.5]) in (0.1, 0.5)
    evaluate(net, [MSP(K), ODIN(K), GradNorm(K)], id_batches=batches, ood_batches={"far": batches})


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (images.numpy(), "got ndarray"),
        ("image.png", "got str"),
        (([1.0, 2.0], labels), "got tuple"),
        ((), "got tuple"),
        ({"input_ids": images}, r"got dict with keys \['input_ids'\]"),
        ({"image": images, "x": images}, r"expected one of image, .* got \['image', 'x'\]"),
        ((images, labels + 0.5), "class numbers, got fractions"),
        ((images, nn.functional.one_hot(labels)), r"expected 8 labels, got shape \(8, 3\)"),
        ((images, ["cat"] * 8), "class numbers, got list"),
        ((images, labels[:5]), r"expected 8 labels, got shape \(5,\)"),
    ],
)
def test_forms_of_batches_that_are_not_known(batch, message):
    with pytest.raises(ValueError, match=message):
        collect(Net(), [batch])


FORMS = {
    "tensor": lambda z, h: z,
    "dict": lambda z, h: {"features": h, "logits": z},
    "dataclass": lambda z, h: Result(z),
    "named tuple": lambda z, h: Named(z, None),
    "(logits, features)": lambda z, h: (z, h),
    "[features, logits]": lambda z, h: [h, z],
    "(loss, logits)": lambda z, h: (z.sum(), z),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_results(form):
    net = Net(FORMS[form])
    expected = net.head(net.body(images)).detach()
    found = collect(net, [images, images[:3]])
    torch.testing.assert_close(found.logits, torch.cat([expected, expected[:3]]))
    assert found.features[:8].equal(net.body(images).detach())
    assert model_logits(net, images).equal(net.head(net.body(images)))
    odin = ODIN(K, eps=0.1)
    plain = Net()
    plain.load_state_dict(net.state_dict())
    assert odin.perturb(net, images).equal(odin.perturb(plain, images))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda z, h: {"out": z}, r"logits.* got dict with keys \['out'\]"),
        (lambda z, h: (2 * z, h), "got tuple of 2 parts, 0 of them from a linear module"),
        (lambda z, h: None, "got NoneType"),
        (lambda z, h: Result(None), "got Result"),
        (lambda z, h: z[:, :, None], r"expected logits \(B, K\) of images \(8, 4\), got shape \(8, 3, 1\)"),
        (lambda z, h: z.argmax(1), r"expected logits \(B, K\) .* got shape \(8,\)"),
        (lambda z, h: z[:2], r"got shape \(2, 3\)"),
    ],
)
def test_forms_of_results_that_are_not_known(form, message):
    with pytest.raises(ValueError, match=message):
        collect(Net(form), [images])


HEADS = {
    "linear": lambda: nn.Linear(D, K),
    "sparse": lambda: SparseLinear(D, K, sparsity=0.5),
    "cosine": lambda: CosineHead(D, K),
    "wrapped": lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(D, K), nn.Identity()),
}


@pytest.mark.parametrize("kind", HEADS)
def test_the_head_is_what_gave_the_logits(kind):
    """The last linear layer by definition is one of the body."""
    net = Net(head=HEADS[kind]()).eval()
    found = collect(net, [*images.split(3)])
    torch.testing.assert_close(found.features, net.body(images).detach())
    assert found.head is not None and found.head.weight.shape == (K, D)
    assert found.head.cosine == (kind == "cosine")


class Two(nn.Module):
    """Two heads on different features; ``mix`` makes the logits of what they return."""

    def __init__(self, mix):
        super().__init__()
        self.main, self.aux = nn.Linear(D, K), nn.Linear(4, K)
        self.body, self.mix = nn.Linear(4, D), mix

    def forward(self, images):
        h = self.body(images)
        main, aux = self.main(h), self.aux(images)
        return self.mix(main, aux)


@pytest.mark.parametrize(
    "mix", [lambda m, a: m, lambda m, a: Result(m, a), lambda m, a: m / 2.5, lambda m, a: m.log_softmax(1)]
)
def test_an_auxiliary_head_is_not_the_head(mix):
    net = Two(mix)
    assert collect(net, [images, images[:1]]).features[:8].equal(net.body(images).detach())


@pytest.mark.parametrize(
    "mix", [lambda m, a: m + a, lambda m, a: m.softmax(1), lambda m, a: m - 2 * m, lambda m, a: m * m[:, :1].abs()]
)
def test_logits_of_no_head_have_no_features(mix):
    net = Two(mix)
    found = collect(net, [images])
    assert found.features is None and found.head is None
    assert found.to("meta").features is None
    evaluate(net, [MSP(K), GEN(K), ODIN(K)], id_batches=[images], ood_batches={"far": [images]})
    for detector in (KNN(K, 2), Mahalanobis(K)):
        with pytest.raises(ValueError, match=r"expected outputs with features, .*pass head"):
            detector.fit(found)
    for name in ("react", "ash", "scale", "gradnorm", "dice", "vim"):
        with pytest.raises(ValueError, match=r"expected outputs with (a head|features)"):
            DETECTORS[name](K).fit(found).score(found)
    data = {"train_batches": [(images, labels)], "id_batches": [images], "ood_batches": {"far": [images]}}
    for head in ("main", net.main):
        evaluate(net, [KNN(K, 2), Mahalanobis(K, 0.5)], head=head, **data)
        assert collect(net, [images], head=head).features.equal(net.body(images).detach())
    assert collect(net, [images], head="aux").features.equal(images)


def test_one_image_and_two_classes_do_not_tell_a_scaled_head():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.head(self.body(x).tanh()) / 3

    for seed in range(8):  # in half of them the difference of the body's two results has the logits' sign
        torch.manual_seed(seed)
        net, images = Scaled(), torch.randn(3, 4)
        assert collect(net, [images[:1]]).features is None
        assert collect(net, [images]).features.equal(net.body(images).tanh().detach())


def test_several_heads_returned():
    """Deep supervision: which of them is meant, is not known."""
    net = Two(lambda m, a: (m, a))
    with pytest.raises(ValueError, match="tuple of 2 parts, 2 of them from a linear module"):
        collect(net, [images])
    found = collect(net, [images], head="main")
    assert found.logits.equal(net.main(net.body(images)).detach()) and found.head is not None


@pytest.mark.parametrize("head", ["nose", nn.Linear(D, K), 3])
def test_heads_that_are_not_there(head):
    with pytest.raises(ValueError, match="expected head, a module of the model or its name, got"):
        collect(Net(), [images], head=head)


def test_a_head_that_changes_between_batches():
    net = Two(lambda m, a: m if len(m) > 3 else a)
    with pytest.raises(ValueError, match="'main' returned the logits of the first batch but not of another"):
        collect(net, [images, images[:2]])


def test_a_head_called_by_keyword():
    class ByKeyword(Net):
        def forward(self, images):
            return self.head(input=self.body(images))

    net = ByKeyword()
    assert collect(net, [images]).features.equal(net.body(images).detach())


def test_transformers_are_not_slowed_down_after_the_first_batch():
    """Their fast path needs layers without hooks; and their many large results are not kept."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(8, K), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.hooked = []

        def forward(self, x):
            self.hooked.append(any(m._forward_hooks for m in self.body.modules()))
            return self.head(self.body(x)[:, 0])

    net = Transformer()
    x = torch.randn(4, 5, 8)
    found = collect(net, [x, x, x])
    assert net.hooked == [True, False, False]
    torch.testing.assert_close(found.features[:4], net.eval().body(x)[:, 0].detach())


def test_data_are_left_alone():
    class Normalises(Net):
        def forward(self, images):
            return super().forward(images.mul_(2).add_(1))

    batches = [images.clone()]
    evaluate(Normalises(), [MSP(K), ODIN(K)], id_batches=batches, ood_batches={"far": batches})
    assert batches[0].equal(images)


def test_results_in_a_memory_that_is_used_again():
    class Reuses(Net):
        def __init__(self):
            super().__init__()
            self.place = torch.empty(2, K)

        def forward(self, images):
            return self.place.copy_(super().forward(images))

    net = Reuses()
    expected = torch.cat([net(x).detach().clone() for x in images.split(2)])
    assert collect(net, images.split(2)).logits.equal(expected)


def test_scores_that_are_not_finite_are_named():
    class Strange(Detector):
        name = "strange"

        def __init__(self, make):
            super().__init__(K)
            self.make = make

        def score(self, outputs):
            return self.make(outputs.logits)

    def first(value):
        return lambda z: torch.full((len(z),), value) if z[0, 0] == 1 else torch.zeros(len(z))

    net = nn.Linear(K, K, bias=False)
    nn.init.eye_(net.weight)
    known, far = [torch.zeros(4, K)], [torch.ones(3, K)]
    for make, message in (
        (first(math.nan), "3 of 3 scores 'strange' of set 'far' are NaN or infinite"),
        (first(math.inf), "3 of 3 scores 'strange' of set 'far' are NaN or infinite"),
        (lambda z: z, r"expected 4 scores 'strange' of set 'id', got shape \(4, 3\)"),
        (lambda z: z.sum(), r"expected 4 scores 'strange' of set 'id', got shape \(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(net, [MSP(K), Strange(make)], id_batches=known, ood_batches={"far": far})


def test_what_does_not_fit_is_found_in_the_first_batch():
    def stream(x):
        yield x
        raise AssertionError("a second batch was read")

    def training():
        raise AssertionError("the training data was read")
        yield

    net = Two(lambda m, a: m + a)
    for detector, message in (
        (Unknown(K), r"3 \+ 1 outputs"),
        (MSP(K + 1), "expected logits of shape"),
        (ReAct(Energy(K)), "outputs with a head"),
        (GradNorm(K), "outputs with a head"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(net, [KNN(K, 2), detector], train_batches=training(), id_batches=stream(images), ood_batches={})
    with pytest.raises(ValueError, match="expected outputs with features"):
        evaluate(net, [KNN(K, 2)], train_batches=stream(images), id_batches=[images], ood_batches={})


def test_an_iterator_is_read_once_only():
    with pytest.raises(ValueError, match=r"\['odin'\] need another pass over 'far'.* used before"):
        evaluate(Net(), [ODIN(K)], id_batches=[images], ood_batches={"far": iter([images])})
    once = iter([images])
    with pytest.raises(ValueError, match="an iterator that was used before"):
        evaluate(Net(), [MSP(K)], id_batches=once, ood_batches={"far": once})
    evaluate(Net(), [MSP(K)], id_batches=iter([images]), ood_batches={"far": iter([images])})
