"""Detectors against plain loops; passes that leave the model as they found it."""

import math

import pytest
import torch
from torch import nn

from sparse_moon.nn import SparseLinear
from sparse_moon.ood import (
    DETECTORS,
    KNN,
    MSP,
    ODIN,
    Detector,
    Energy,
    MaxLogit,
    Outputs,
    Unknown,
    classifier_head,
    collect,
    evaluate,
)
from sparse_moon.ood.metrics import ood_metrics

K = 3


class Net(nn.Module):
    """Images (B, 1, 4, 4) to K or K + 1 logits; counts the images it sees."""

    def __init__(self, outputs: int = K) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 6), nn.Tanh()
        )
        self.head = nn.Linear(6, outputs)
        self.images_seen = 0

    def forward(self, images):
        self.images_seen += len(images)
        return self.head(self.body(images))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def batches(sizes=(4, 4, 3), shift=0.0):
    return [(torch.randn(n, 1, 4, 4) + shift, torch.arange(n) % K) for n in sizes]


def outputs(logits, features=None):
    logits = torch.as_tensor(logits)
    return Outputs(logits, torch.zeros(len(logits), 1) if features is None else features)


def softmax(z):
    return [math.exp(v) / sum(math.exp(w) for w in z) for v in z]


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


# Detectors on logits


@pytest.mark.parametrize("extra", [0, 1])
def test_logit_detectors_against_loops(extra):
    z = 3 * torch.randn(20, K + extra)
    z[:5, -1] += 8  # with an unknown output, some samples are mostly unknown
    found = outputs(z)
    rows = z.double().tolist()
    close = {"rtol": 1e-12, "atol": 0.0}

    def expect(values):
        return torch.tensor(list(values), dtype=torch.float64)

    torch.testing.assert_close(MSP(K).score(found), expect(max(softmax(r)[:K]) for r in rows), **close)
    assert MaxLogit(K).score(found).double().equal(expect(max(r[:K]) for r in rows))
    for t in (1.0, 2.5):
        known = expect(t * math.log(sum(math.exp(v / t) for v in r[:K])) for r in rows)
        every = expect(t * math.log(sum(math.exp(v / t) for v in r)) for r in rows)
        torch.testing.assert_close(Energy(K, t).score(found), known, **close)
        torch.testing.assert_close(Energy(K, t, extra="all").score(found), every, **close)
        assert known.equal(every) == (extra == 0)
    scaled = expect(max(softmax([v / 1000 for v in r])[:K]) for r in rows)
    torch.testing.assert_close(ODIN(K).score(found), scaled, **close)


def test_unknown_mass():
    z = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 9.0]])
    expected = torch.tensor([0.75, 1 - softmax([1, 2, 3, 9])[-1]], dtype=torch.float64)
    torch.testing.assert_close(Unknown(K).score(outputs(z)), expected)
    # MSP over K + 1 is (1 - u) times MSP over K.
    torch.testing.assert_close(MSP(K).score(outputs(z)), expected * MSP(K).score(outputs(z[:, :K])))
    with pytest.raises(ValueError, match=r"3 \+ 1 outputs, got logits \(2, 3\)"):
        Unknown(K).score(outputs(z[:, :K]))


@pytest.mark.parametrize("detector", [MSP(K), Unknown(K)])
def test_the_most_confident_do_not_tie(detector):
    # In float32 all of these round to 1.
    z = torch.tensor([[20.0, 0, 0, 0], [21.0, 0, 0, 0], [22.0, 0, 0, 0]])
    low, middle, high = detector.score(outputs(z)).tolist()
    assert low < middle < high < 1


@pytest.mark.parametrize("detector", [MSP(K), MaxLogit(K), Energy(K), ODIN(K), Unknown(K)], ids=lambda d: d.name)
@pytest.mark.parametrize("columns", [K - 1, K + 2])
def test_wrong_number_of_outputs(detector, columns):
    with pytest.raises(ValueError, match=rf"got (logits )?(of shape )?\(2, {columns}\)"):
        detector.score(outputs(torch.zeros(2, columns)))


def test_registry():
    logits = ["msp", "maxlogit", "energy", "odin", "unknown", "klm", "gen"]
    head = ["dice", "react", "vim", "ash", "scale", "gradnorm"]
    assert sorted(DETECTORS) == sorted([*logits, "knn", "mahalanobis", *head])
    for name, detector in DETECTORS.items():
        assert detector(K).name == name
        assert detector(K).num_classes == K
        assert detector(K).threshold is None
    assert {name for name, d in DETECTORS.items() if d(K).fits} == {"knn", "klm", "mahalanobis", "dice", "react", "vim"}
    assert {name for name, d in DETECTORS.items() if d(K).linear_head} == set(head)
    assert [name for name, d in DETECTORS.items() if d(K).perturbs] == ["odin"]
    assert not ODIN(K, eps=0).perturbs
    assert MSP(K).fit(outputs(torch.zeros(1, K))).perturb(nn.Identity(), torch.ones(1)) == 1


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MSP(0), "num_classes"),
        (lambda: Energy(K, 0.0), "temperature must be positive, got 0.0"),
        (lambda: Energy(K, extra="some"), "'some'"),
        (lambda: ODIN(K, -1.0), "temperature"),
        (lambda: ODIN(K, eps=-0.1), "eps"),
        (lambda: KNN(K, 0), "k must be at least 1"),
    ],
)
def test_detector_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# ODIN


def test_odin_by_hand():
    # z = (x, -x): log S rises with |x|, so inputs move away from zero by exactly eps.
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    images = torch.tensor([[0.5], [-0.25]])
    assert ODIN(2, eps=0.125).perturb(model, images).equal(torch.tensor([[0.625], [-0.375]]))
    assert images.equal(torch.tensor([[0.5], [-0.25]]))


def test_odin_predicts_among_the_known_classes():
    # z = (x, 0, 2x): at x > 0 the unknown output is largest; class 0 is the prediction, and as x grows it loses
    # mass to the unknown one faster than it gains from class 1 (softmax over all outputs): d log S_0 / dx < 0.
    model = nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [0.0], [2.0]]))
    assert ODIN(2, temperature=1.0, eps=0.5).perturb(model, torch.tensor([[2.0]])).tolist() == [[1.5]]
    # As three classes the prediction is the third, which grows.
    assert ODIN(3, temperature=1.0, eps=0.5).perturb(model, torch.tensor([[2.0]])).tolist() == [[2.5]]


@pytest.mark.parametrize("extra", [0, 1])
def test_odin_against_finite_differences(extra):
    net = Net(K + extra).double().eval()
    images = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    temperature, eps, h = 2.0, 0.01, 1e-6

    def log_confidence(x, y):
        z = (net(x[None])[0] / temperature).tolist()
        return math.log(softmax(z)[y])

    expected = images.clone()
    with torch.no_grad():
        for i, image in enumerate(images):
            y = int(net(image[None])[0, :K].argmax())
            for position in range(16):
                step = torch.zeros(16, dtype=torch.float64)
                step[position] = h
                step = step.view(1, 4, 4)
                slope = log_confidence(image + step, y) - log_confidence(image - step, y)
                expected[i].view(-1)[position] += eps * math.copysign(1, slope)
    torch.testing.assert_close(ODIN(K, temperature, eps).perturb(net, images), expected)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_odin_needs_no_gradients_from_outside(guard):
    net = Net().eval()
    images = torch.randn(2, 1, 4, 4)
    expected = ODIN(K).perturb(net, images)
    with guard():
        moved = ODIN(K).perturb(net, images.clone())
        found = collect(net, [images.clone()], perturb=ODIN(K).perturb)
    assert moved.equal(expected) and not moved.requires_grad
    torch.testing.assert_close(found.logits, net(expected).detach())
    assert all(p.grad is None for p in net.parameters())


def test_odin_keeps_gradients_that_are_there():
    net = Net().eval()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    ODIN(K).perturb(net, torch.randn(2, 1, 4, 4))
    assert all(p.grad.eq(1).all() for p in net.parameters())


def test_odin_raises_confidence():
    net, data = Net(), batches()
    odin = ODIN(K, temperature=1.0, eps=1e-3)
    moved = odin.score(collect(net, data, perturb=odin.perturb))
    assert (moved > odin.score(collect(net, data))).all()


def test_odin_without_a_step_is_temperature_scaled_msp():
    net, data = Net(), batches()
    found = collect(net, data)
    odin = ODIN(K, temperature=10.0, eps=0.0)
    assert odin.perturb(net.eval(), data[0][0]).equal(data[0][0])
    scaled = Outputs(found.logits.double() / 10, found.features)
    assert odin.score(found).equal(MSP(K).score(scaled))


# KNN


@pytest.mark.parametrize("k", [1, 2, 7, 19])
@pytest.mark.parametrize("chunk_elements", [1, 19, 70, 2**24])
def test_knn_against_brute_force(k, chunk_elements):
    train, test = torch.randn(19, 5), 10 * torch.randn(13, 5)
    knn = KNN(K, k, chunk_elements).fit(outputs(torch.zeros(19, K), train))
    expected = []
    for q in test.double():
        distances = sorted(float((q / q.norm() - b / b.norm()).norm()) for b in train.double())
        expected.append(-distances[k - 1])
    score = knn.score(outputs(torch.zeros(13, K), test))
    torch.testing.assert_close(score.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_knn_by_hand():
    # Unit vectors at 0, 90 and 180 degrees; lengths do not matter.
    train = outputs(torch.zeros(3, K), torch.tensor([[2.0, 0.0], [0.0, 0.5], [-3.0, 0.0]]))
    test = outputs(torch.zeros(2, K), torch.tensor([[7.0, 0.0], [0.0, -1.0]]))
    assert KNN(K, 1).fit(train).score(test).tolist() == pytest.approx([0.0, -math.sqrt(2)])
    assert KNN(K, 2).fit(train).score(test).tolist() == pytest.approx([-math.sqrt(2), -math.sqrt(2)])
    assert KNN(K, 3).fit(train).score(test).tolist() == pytest.approx([-2.0, -2.0])


def test_knn_resolves_small_distances():
    # 1 - q.b is below float32 resolution here.
    train = outputs(torch.zeros(1, K), torch.tensor([[1.0, 0.0]]))
    test = outputs(torch.zeros(3, K), torch.tensor([[1.0, 0.0], [1.0, 1e-5], [1.0, 2e-5]]))
    assert KNN(K, 1).fit(train).score(test).tolist() == pytest.approx([0.0, -1e-5, -2e-5], rel=1e-4)


def test_knn_errors():
    train = outputs(torch.zeros(4, K), torch.randn(4, 5))
    with pytest.raises(ValueError, match=r"k = 50 neighbours .* got 4"):
        KNN(K).fit(train)
    with pytest.raises(ValueError, match="not fitted"):
        KNN(K).score(train)
    with pytest.raises(ValueError, match="size 5, got 6"):
        KNN(K, 2).fit(train).score(outputs(torch.zeros(2, K), torch.randn(2, 6)))
    train.features[1, 1] = math.nan
    with pytest.raises(ValueError, match="finite"):
        KNN(K, 2).fit(train)


def test_knn_shows_nan_features():
    knn = KNN(K, 2).fit(outputs(torch.zeros(4, K), torch.randn(4, 5)))
    features = torch.randn(3, 5)
    features[1, 2] = math.nan
    assert knn.score(outputs(torch.zeros(3, K), features)).isnan().tolist() == [False, True, False]


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
