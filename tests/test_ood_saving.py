"""Detectors on disk: same scores, nothing executed, nothing partial; thresholds."""

import math
import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from sparse_moon.ood import (
    ASH,
    DETECTORS,
    DICE,
    GEN,
    KNN,
    MSP,
    ODIN,
    SCALE,
    CosineHead,
    Detector,
    Energy,
    GeneralizedODIN,
    Head,
    Mahalanobis,
    Outputs,
    ReAct,
    ViM,
    choose_p,
    collect,
    fit_detectors,
    load_detector,
    save_detector,
    threshold,
)

K, D = 3, 6


def data(extra=1):
    head = Head(torch.randn(K + extra, D), torch.randn(K + extra))

    def outputs(n):
        features = torch.randn(n, D).relu()
        return Outputs(head.logits(features).float(), features, torch.arange(n) % K, head)

    return outputs(70), outputs(23)


SETTINGS = [
    *(make(K) for make in DETECTORS.values()),
    Energy(K, 2.5, "all"),
    ODIN(K, 10.0, 0.25),
    GEN(K, 0.3, 2),
    KNN(K, 7),
    Mahalanobis(K, 0.1),
    ViM(K, 4),
    ASH(MSP(K), 0.5),
    SCALE(GEN(K), 0.3),
    DICE(MSP(K), 0.35, "top+bottom"),
    DICE(Energy(K), 0.35, "unit dropout", seed=4),
    ReAct(DICE(ReAct(Energy(K, 2.0), 0.8), 0.5), 0.95),
]


@pytest.mark.parametrize("detector", SETTINGS, ids=lambda d: d.name)
def test_round_trip_bit_for_bit(detector, tmp_path):
    train, test = data()
    if detector.fits:
        detector.fit(train)
    detector.name = "mine"
    detector.threshold = threshold(detector.score(train))
    save_detector(tmp_path / "detector.pt", detector)
    loaded = load_detector(tmp_path / "detector.pt")
    assert type(loaded) is type(detector) and loaded.name == "mine"
    assert loaded.threshold == detector.threshold
    assert loaded.score(test).equal(detector.score(test))
    assert loaded.accepts(test).equal(detector.score(test) >= detector.threshold)
    assert (loaded.fits, loaded.perturbs) == (detector.fits, detector.perturbs)
    # Settings too: a detector fitted anew is the same.
    if loaded.fits:
        assert loaded.fit(train).score(test).equal(detector.score(test))
    if loaded.perturbs:
        model, images = nn.Linear(4, K), torch.randn(2, 4)
        assert loaded.perturb(model, images).equal(detector.perturb(model, images))
    detector.threshold = None


def test_a_service(tmp_path):
    """Fit, calibrate, save; elsewhere load, score, compare."""
    net = nn.Sequential(nn.Linear(4, D), nn.ReLU(), nn.Linear(D, K))
    dice = DICE(Energy(K))
    fit_detectors(net, [dice], [torch.randn(9, 4), torch.randn(5, 4)])
    dice.threshold = threshold(dice.score(collect(net, [torch.randn(40, 4)])))
    save_detector(tmp_path / "dice.pt", dice)
    request = collect(net, [torch.randn(6, 4)])
    accepted = load_detector(str(tmp_path / "dice.pt")).accepts(request)
    assert accepted.dtype == torch.bool and accepted.equal(dice.score(request) >= dice.threshold)


def test_generalized_odin_round_trip(tmp_path):
    net = nn.Sequential(nn.Linear(4, D), CosineHead(D, K))
    found = collect(net, [torch.randn(5, 4)])
    save_detector(tmp_path / "d.pt", GeneralizedODIN(K))
    assert load_detector(tmp_path / "d.pt").score(found).equal(GeneralizedODIN(K).score(found))


def test_detectors_move():
    train, _ = data()
    moved = ReAct(DICE(Energy(K))).fit(train).to("meta")
    assert moved.clip.device.type == moved.detector.mask.device.type == "meta"
    assert KNN(K).to("meta").bank is None


class Executes:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_loading_executes_nothing(tmp_path):
    evil = tmp_path / "evil.pt"
    torch.save({"format": "sparse_moon detector 1", "detector": Executes(tmp_path / "made")}, evil)
    with pytest.raises(ValueError, match="damaged or not a detector"):
        load_detector(evil)
    evil.write_bytes(pickle.dumps(Executes(tmp_path / "made"), protocol=2))
    with pytest.raises(ValueError, match="damaged or not a detector"):
        load_detector(evil)
    assert not (tmp_path / "made").exists()


def test_what_is_not_a_detector(tmp_path):
    path = tmp_path / "d.pt"
    with pytest.raises(ValueError, match=r"d\.pt does not exist"):
        load_detector(path)
    save_detector(path, KNN(K, 2).fit(data()[0]))
    whole = path.read_bytes()
    for part in (b"", whole[:100], whole[:-40]):
        path.write_bytes(part)
        with pytest.raises(ValueError, match="damaged or not a detector"):
            load_detector(path)
    for content in ([1], {"format": "other"}, {"model": {}}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="not a detector of this version"):
            load_detector(path)
    good = {"kind": "KNN", "arguments": {"num_classes": K}, "name": "knn", "threshold": None, "learned": {}}
    torch.save({"format": "sparse_moon detector 1"}, path)
    with pytest.raises(ValueError, match="does not describe a detector"):
        load_detector(path)
    for change in ({"kind": "Module"}, {"arguments": {"classes": 3}}, {"arguments": {"num_classes": 0}}, {}):
        torch.save({"format": "sparse_moon detector 1", "detector": good | change}, path)
        with pytest.raises(ValueError, match="does not describe a detector"):
            load_detector(path)


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "d.pt"
    save_detector(path, MSP(K))

    def fails(content, file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="disk full"):
        save_detector(path, GEN(K))
    assert type(load_detector(path)) is MSP
    assert [file.name for file in tmp_path.iterdir()] == ["d.pt"]


def test_what_cannot_be_saved(tmp_path):
    class Mine(MSP):
        pass

    with pytest.raises(ValueError, match=r"sparse_moon\.ood, got Mine"):
        save_detector(tmp_path / "d.pt", Mine(K))
    for detector in (KNN(K), ReAct(DICE(Energy(K)))):
        with pytest.raises(ValueError, match="not fitted"):
            save_detector(tmp_path / "d.pt", detector)
    assert not list(tmp_path.iterdir())


HALF = [np.float64(0.5), np.float32(0.5), torch.tensor(0.5), torch.tensor(0.5).double()]


@pytest.mark.parametrize("half", HALF, ids=lambda half: f"{type(half).__name__} {half.dtype}")
def test_numbers_of_other_libraries_are_saved_as_numbers(half, tmp_path):
    train, test = data()
    dice = DICE(Energy(K, temperature=half), p=half).fit(train)
    dice.threshold = half
    dice.name = np.str_("mine")
    save_detector(tmp_path / "d.pt", dice)
    loaded = load_detector(tmp_path / "d.pt")
    numbers = loaded.threshold, loaded.p, loaded.detector.temperature
    assert numbers == (0.5, 0.5, 0.5) and {*map(type, numbers)} == {float} and type(loaded.name) is str
    assert loaded.score(test).equal(dice.score(test)) and loaded.accepts(test).equal(dice.accepts(test))


def test_a_chosen_p_is_saved(tmp_path):
    net = nn.Sequential(nn.Linear(4, D), nn.ReLU(), nn.Linear(D, K))
    dice, images = DICE(Energy(K)), [torch.randn(30, 4)]
    fit_detectors(net, [dice], images)
    p = choose_p(net, dice, images, candidates=list(np.linspace(0.1, 0.9, 5)))
    save_detector(tmp_path / "d.pt", dice.with_p(p))
    assert load_detector(tmp_path / "d.pt").p == p


def told(what):
    """A detector with a setting that its constructor does not look at."""
    return KNN(K, 2, chunk_elements=what).fit(data()[0])


def test_settings_that_can_be_loaded_are_saved(tmp_path):
    for what in ([1, 2.0, "a"], (torch.arange(3), None), torch.float16, {1, 2}):
        save_detector(tmp_path / "d.pt", told(what))
        assert str(load_detector(tmp_path / "d.pt").chunk_elements) == str(what)


def test_settings_that_could_not_be_loaded_are_not_saved(tmp_path):
    path = tmp_path / "d.pt"
    save_detector(path, MSP(K))
    knn = told(1)
    knn.k = 0
    for detector, threshold_, match in (
        (told([np.float64(0.5)]), None, "chunk_elements must be one that can be loaded again, got .*0.5"),
        (told(np.array([0.5])), None, "chunk_elements must be one that can be loaded again, got array"),
        (told(lambda: 1), None, "chunk_elements must be one that can be loaded again, got <function"),
        (told({"a": 1}), None, "'knn' could not be loaded again: KeyError"),
        (knn, None, "'knn' could not be loaded again: k must be at least 1"),
        (MSP(K), "high", "'msp' could not be loaded again: expected a name and a threshold, got 'msp' and 'high'"),
        (MSP(K), torch.tensor([0.5]), r"'msp' could not be loaded again: expected .* tensor\(\[0.5"),
    ):
        detector.threshold = threshold_
        with pytest.raises(ValueError, match=match):
            save_detector(path, detector)
    assert type(load_detector(path)) is MSP
    assert [file.name for file in tmp_path.iterdir()] == ["d.pt"]


@pytest.mark.parametrize(
    ("scores", "tpr", "expected"),
    [
        (range(1, 21), 0.95, 2.0),  # 19 of 20
        (range(1, 20), 0.95, 1.0),  # 18 of 19 would be 94.7 %
        (range(1, 101), 0.07, 94.0),  # 0.07 * 100 is above 7 in floating point
        (range(1, 101), 0.29, 72.0),
        (range(1, 101), 1.0, 1.0),
        (range(1, 101), 1e-9, 100.0),
        ([3.0, 3.0, 3.0, 1.0], 0.5, 3.0),  # ties: more than asked for
        ([3.0, 3.0, 3.0, 1.0], 0.76, 1.0),
        ([math.inf, -math.inf], 1.0, -math.inf),
        ([5.0], 0.95, 5.0),
    ],
)
def test_threshold_by_hand(scores, tpr, expected):
    scores = torch.tensor([float(s) for s in scores])
    found = threshold(scores[torch.randperm(len(scores))], tpr)
    assert found == expected
    assert (scores >= found).double().mean() >= tpr
    above = scores[scores > found]
    assert not len(above) or (scores >= above.min()).double().mean() < tpr  # the largest one


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threshold_and_scores_compare_exactly(dtype):
    scores = torch.randn(997, dtype=dtype)
    assert (scores >= threshold(scores)).sum() == math.ceil(0.95 * 997)


def test_threshold_errors():
    for scores, tpr, match in (
        (torch.randn(3), 0.0, "tpr"),
        (torch.randn(3), 95, "tpr"),
        (torch.randn(0), 0.95, "N > 0"),
        (torch.randn(3, 1), 0.95, r"\(3, 1\)"),
        (torch.tensor([0.0, math.nan]), 0.95, "1 of 2 id_scores are NaN"),
    ):
        with pytest.raises(ValueError, match=match):
            threshold(scores, tpr)
    with pytest.raises(ValueError, match="msp has no threshold"):
        MSP(K).accepts(data()[1])
    assert isinstance(MSP(K), Detector)
