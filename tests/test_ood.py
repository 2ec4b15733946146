"""Outputs, passes that leave the model as they found it, and the evaluation of detectors."""

import math
import re

import pytest
import torch
from torch import nn

from small_net import K, Net, batches, outputs
from sparse_moon.nn import SparseLinear
from sparse_moon.ood import (
    ASH,
    DICE,
    KNN,
    MSP,
    ODIN,
    Detector,
    Energy,
    MaxLogit,
    Outputs,
    ReAct,
    Unknown,
    classifier_head,
    collect,
    evaluate,
    fit_detectors,
)
from sparse_moon.ood.metrics import ood_metrics

# Outputs


@pytest.mark.parametrize(
    ("logits", "features", "labels", "match"),
    [
        (torch.zeros(4, 3), torch.zeros(5, 2), None, r"\(4, 3\) and \(5, 2\)"),
        (torch.zeros(4), torch.zeros(4, 2), None, r"\(4,\)"),
        (torch.zeros(4, 3), torch.zeros(4, 7, 2), None, r"\(4, 7, 2\)"),
        (torch.zeros(4, 3), torch.zeros(4, 2), torch.zeros(3), r"4 labels, got shape \(3,\)"),
    ],
)
def test_outputs_must_fit_together(logits, features, labels, match):
    with pytest.raises(ValueError, match=match):
        Outputs(logits, features, labels)


def test_outputs_move():
    moved = Outputs(torch.zeros(4, 3), torch.zeros(4, 2), torch.zeros(4)).to("meta")
    assert [t.device.type for t in (moved.logits, moved.features, moved.labels)] == ["meta"] * 3
    assert outputs(torch.zeros(2, K)).to("meta").labels is None


# Head and collection


def test_head_is_the_last_linear_module_by_definition():
    net = Net()
    assert classifier_head(net) is net.head
    assert classifier_head(net.body) is net.body[5]
    assert classifier_head(net.head) is net.head
    with pytest.raises(ValueError, match="Sequential has no linear module"):
        classifier_head(nn.Sequential(nn.Conv2d(1, 2, 3)))


def test_a_sparse_layer_is_a_head():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), SparseLinear(8, K, sparsity=0.5), nn.Identity())
    assert classifier_head(net) is net[2]
    images = torch.randn(5, 1, 4, 4)
    found = collect(net, [images])
    torch.testing.assert_close(found.features, net[:2](images).detach())
    torch.testing.assert_close(found.logits, net(images).detach())


def test_collect_is_the_forward_pass_in_evaluation_mode():
    net, data = Net(), batches()
    net.body[1].running_mean.normal_()
    found = collect(net, data)
    net.eval()
    images = torch.cat([images for images, _ in data])
    with torch.no_grad():
        torch.testing.assert_close(found.logits, net(images))
        torch.testing.assert_close(found.features, net.body(images))
    assert found.labels.tolist() == [0, 1, 2, 0, 0, 1, 2, 0, 0, 1, 2]
    assert not found.logits.requires_grad and not found.features.requires_grad


def test_collect_without_labels_and_in_other_dtypes():
    net = Net().double()
    found = collect(net, [images.double() for images, _ in batches()])
    assert found.labels is None
    assert found.logits.dtype == found.features.dtype == torch.float32
    labelled = collect(net, [[images.double(), labels.to(torch.uint8)] for images, labels in batches()])
    assert labelled.labels.dtype == torch.int64


def test_features_are_what_the_head_saw_even_if_overwritten_later():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, K)

        def forward(self, images):
            logits = self.head(images)
            images.zero_()
            return logits

    images = torch.randn(5, 4)
    assert collect(InPlace(), [images.clone()]).features.equal(images)


def assert_untouched(net, modes, state):
    assert [m.training for m in net.modules()] == modes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())
    assert all(p.grad is None for p in net.parameters())
    assert all(value.equal(state[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [None, "batches", "forward", "perturb"])
def test_collect_leaves_the_model_as_it_was(training, fails):
    net = Net().train(training)
    net.body[1].eval()  # frozen batch norm in a training model
    modes = [m.training for m in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}

    def perturb(model, images):
        assert not any(m.training for m in model.modules())
        if fails == "perturb":
            raise RuntimeError("no")
        return ODIN(K).perturb(model, images)

    def stream():
        yield torch.zeros(2, 1, 4, 5) if fails == "forward" else torch.zeros(2, 1, 4, 4)
        if fails == "batches":
            raise RuntimeError("no")

    if fails is None:
        collect(net, stream(), perturb=perturb)
    else:
        with pytest.raises(RuntimeError):
            collect(net, stream(), perturb=perturb)
    assert torch.is_grad_enabled()
    assert_untouched(net, modes, state)


def test_perturbed_pass():
    net, (batch, *_) = Net(), batches()
    double = collect(net, [batch], perturb=lambda model, images: 2 * images)
    expected = collect(net, [2 * batch[0]])
    assert double.logits.equal(expected.logits) and double.features.equal(expected.features)

    def perturb_with_a_pass(model, images):
        model(torch.cat([images, images]))  # its features must not be mistaken for those of the batch
        return images

    assert collect(net, [batch], perturb=perturb_with_a_pass).features.equal(collect(net, [batch]).features)


class Unreached(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(4, K)

    def forward(self, images):
        return images[:, :K]


@pytest.mark.parametrize(
    ("net", "data", "match"),
    [
        (nn.Linear(4, K), [], "no batches"),
        (nn.Linear(4, K), [torch.zeros(2, 4), (torch.zeros(2, 4), torch.zeros(2))], "1 of 2"),
        (nn.Linear(4, K), [torch.zeros(2, 5, 4)], r"\(2, 5, 4\)"),
        (Unreached(), [torch.zeros(2, 4)], "does not reach"),
        (nn.Conv2d(1, 1, 1), [torch.zeros(2, 1, 4, 4)], "no linear"),
    ],
)
def test_collect_errors(net, data, match):
    with pytest.raises(ValueError, match=match):
        collect(net, data)


def test_features_of_an_earlier_pass_do_not_stand_in():
    class Shortcut(Net):
        def forward(self, images):
            return super().forward(images) if images.any() else torch.zeros(len(images), K)

    image = torch.ones(1, 1, 4, 4)
    collect(Shortcut(), [image, image])
    with pytest.raises(ValueError, match="does not reach"):
        collect(Shortcut(), [image, 0 * image])
    with pytest.raises(ValueError, match="does not reach"):
        collect(Shortcut(), [image], perturb=lambda model, images: 0 * model(images).sum() * images)


# Evaluation


def test_evaluate_against_single_steps():
    net = Net(K + 1)
    train, test, far = batches((8, 8)), batches(), batches((5, 2), shift=2.0)
    detectors = [MSP(K), MaxLogit(K), Energy(K), ODIN(K, eps=0.01), KNN(K, 3), Unknown(K)]
    result = evaluate(
        net, detectors, train_batches=train, id_batches=test, ood_batches={"far": far, "near": batches((6,))}
    )
    assert list(result.metrics) == ["far", "near"]
    assert list(result.scores) == ["id", "far", "near"]

    bank = collect(net, train)
    for set_name, data in (("id", test), ("far", far)):
        found = collect(net, data)
        for detector in (MSP(K), MaxLogit(K), Energy(K), KNN(K, 3).fit(bank), Unknown(K)):
            assert result.scores[set_name][detector.name].equal(detector.score(found)), detector.name
        odin = ODIN(K, eps=0.01)
        expected = odin.score(collect(net, data, perturb=odin.perturb))
        assert result.scores[set_name]["odin"].equal(expected)
        assert not expected.equal(odin.score(found))
    for d in (detector.name for detector in detectors):
        assert result.metrics["far"][d] == ood_metrics(result.scores["id"][d], result.scores["far"][d])
    assert result.id_outputs.logits.equal(collect(net, test).logits)
    assert result.id_outputs.labels.equal(torch.cat([labels for _, labels in test]))


def test_one_pass_serves_all_that_do_not_perturb():
    net = Net()
    data = {"id_batches": batches((5,)), "ood_batches": {"a": batches((3,)), "b": batches((2,))}}
    evaluate(net, [MSP(K), MaxLogit(K), Energy(K), ODIN(K, eps=0)], train_batches=batches((7,)), **data)
    assert net.images_seen == 10  # nothing fits, so the training set is left alone
    net.images_seen = 0
    evaluate(net, [MSP(K), KNN(K, 2)], train_batches=batches((7,)), **data)
    assert net.images_seen == 17
    net.images_seen = 0
    evaluate(net, [MSP(K), ODIN(K)], **data)
    assert net.images_seen == 10 + 2 * 10  # ODIN: a gradient pass and the perturbed one


def test_what_was_left_out_before_is_tried_again():
    net, left_out = Net(), {"other": "no head"}
    data = {"id_batches": batches(), "ood_batches": {"a": batches()}, "left_out": left_out}
    few = evaluate(net, [MSP(K), KNN(K, 9)], train_batches=batches((8,)), **data)
    assert list(few.metrics["a"]) == ["msp"] and list(left_out) == ["other", "knn"]
    enough = evaluate(net, [MSP(K), KNN(K, 9)], train_batches=batches((9,)), **data)
    assert list(enough.metrics["a"]) == ["msp", "knn"] and list(left_out) == ["other"]
    for size in (8, 9):
        detectors = [KNN(K, 9), KNN(K, 3)]  # of one name
        fit_detectors(net, detectors, batches((size,)), left_out=left_out)
        assert [detector.bank is not None for detector in detectors] == [size == 9, True]
        assert ("knn" in left_out) == (size == 8)


@pytest.mark.parametrize("k", [0, 1])
def test_what_the_model_does_not_allow_is_left_out_with_its_reason(k):
    net, left_out = nn.Sequential(Net(K + k), nn.LogSoftmax(1)), {}
    detectors = [MSP(K), DICE(Energy(K)), ReAct(Energy(K)), ASH(Energy(K)), Unknown(K)]
    data = {"train_batches": batches((7,)), "id_batches": batches(), "ood_batches": {"a": batches((3,))}}
    found = evaluate(net, detectors, **data, left_out=left_out)
    assert list(left_out) == ["dice", "react", "ash", *["unknown"] * (k == 0)]
    assert all("a head: those of a model whose logits" in left_out[name] for name in ("dice", "react", "ash"))
    kept = ["msp", *["unknown"] * k]
    assert [list(found.metrics["a"]), *map(list, found.scores.values())] == [kept] * 3
    with pytest.raises(ValueError, match="a head: those of a model whose logits"):
        evaluate(net, detectors[:2], **data)


def test_detectors_that_learn_share_none_that_learns():
    net, dice, react = Net(), DICE(Energy(K)), ReAct(Energy(K))
    data = {"id_batches": batches(), "ood_batches": {"a": batches()}, "left_out": {}}
    for detectors, part in (
        ([dice, ReAct(dice)], "DICE"),
        ([ReAct(dice), dice], "DICE"),
        ([ASH(dice), ReAct(dice)], "DICE"),
        ([ReAct(dice), DICE(ASH(dice))], "DICE"),
        ([react, DICE(react)], "ReAct"),
        ([dice, dice], "DICE"),
    ):
        both = re.escape(f"{[detector.name for detector in detectors]} learn with the same {part}: give each one")
        with pytest.raises(ValueError, match=both):
            fit_detectors(net, detectors, batches())
        if detectors[0] is not detectors[1]:
            with pytest.raises(ValueError, match=both):
                evaluate(net, detectors, train_batches=batches(), **data)
    assert net.images_seen == 0  # said before any pass
    energy = Energy(K)  # which learns nothing
    ash = ASH(energy)
    apart = [energy, ash, ReAct(ash), DICE(Energy(K)), ReAct(DICE(energy))]
    found = evaluate(net, apart, train_batches=batches(), **data)
    assert list(found.metrics["a"]) == ["energy", "ash", "react+ash", "dice", "react+dice"]


def test_evaluate_leaves_the_model_as_it_was():
    net = Net(K + 1).train()
    modes = [m.training for m in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    detectors = [ODIN(K), KNN(K, 2)]
    evaluate(net, detectors, train_batches=batches(), id_batches=batches(), ood_batches={"a": batches()})
    assert_untouched(net, modes, state)


def test_a_new_detector_takes_a_few_lines():
    class Norm(Detector):
        name = "norm"

        def score(self, outputs):
            return outputs.features.norm(dim=1)

    everything = Energy(K, extra="all")
    everything.name = "energy_all"
    result = evaluate(Net(), [Norm(K), Energy(K), everything], id_batches=batches(), ood_batches={"a": batches()})
    assert list(result.metrics["a"]) == ["norm", "energy", "energy_all"]
    assert result.scores["id"]["norm"].equal(result.id_outputs.features.norm(dim=1))


def test_evaluate_errors():
    net = Net()
    with pytest.raises(ValueError, match=r"distinct names, got \['msp', 'msp'\]"):
        evaluate(net, [MSP(K), MSP(K)], id_batches=batches(), ood_batches={})
    with pytest.raises(ValueError, match='"id"'):
        evaluate(net, [MSP(K)], id_batches=batches(), ood_batches={"id": batches()})
    with pytest.raises(ValueError, match=r"train_batches is needed to fit \['knn'\]"):
        evaluate(net, [MSP(K), KNN(K)], id_batches=batches(), ood_batches={})
    with pytest.raises(ValueError, match="used before"):
        evaluate(net, [ODIN(K)], id_batches=iter(batches()), ood_batches={})
    with pytest.raises(ValueError, match=r"3 \+ 1 outputs"):
        evaluate(net, [Unknown(K)], id_batches=batches(), ood_batches={})
    with torch.no_grad():
        net.head.bias[0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        evaluate(net, [MSP(K)], id_batches=batches(), ood_batches={"a": batches()})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_agrees():
    net = Net(K + 1)
    data = {"train_batches": batches((40,)), "id_batches": batches(), "ood_batches": {"far": batches(shift=2.0)}}
    detectors = [MSP(K), MaxLogit(K), Energy(K), ODIN(K, eps=0), KNN(K, 3), Unknown(K)]
    expected = evaluate(net, detectors, **data)
    result = evaluate(net.cuda(), detectors, **data)
    for set_name, scores in expected.scores.items():
        for name, values in scores.items():
            found = result.scores[set_name][name]
            assert found.device.type == "cpu"
            torch.testing.assert_close(found, values, rtol=1e-2, atol=1e-2)  # TF32 convolutions
