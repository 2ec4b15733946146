"""Detectors as text has them, ``dice:p=0.7,score=msp``, in the library and on the command line."""

import json

import numpy as np
import pytest
import torch

from small_outputs import D, K, network
from sparse_moon.app.cli import main
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.evaluate import load_run
from sparse_moon.app.train import train
from sparse_moon.ood import (
    DETECTORS,
    DICE,
    GEN,
    KNN,
    MSP,
    ODIN,
    SCORES,
    Energy,
    Outputs,
    ReAct,
    ViM,
    load_detector,
    make_detector,
    parse_score,
)
from sparse_moon.ood.metrics import expected_calibration_error

QUICK = ["--epochs", "1", "--interval", "2", "--batch-size", "256", "--quiet", "--width", "4"]


def settings(detector):
    """The arguments that a detector was made with."""
    return {
        name: (value.name if name == "detector" else value)
        for name, value in vars(detector).items()
        if name in ("k", "p", "_p", "select", "seed", "temperature", "eps", "std", "gamma", "top", "dim", "detector",
                    "extra", "percentile")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("knn:k=200", KNN(K, 200)),
        ("odin:temperature=10,eps=0.004", ODIN(K, 10.0, 0.004)),
        ("energy:extra=all,temperature=2", Energy(K, 2.0, "all")),
        ("gen:top=2", GEN(K, top=2)),
        ("vim:dim=3", ViM(K, 3)),
        ("dice:p=0.7", DICE(Energy(K), 0.7)),
        ("dice:select=top+bottom,seed=3", DICE(Energy(K), select="top+bottom", seed=3)),
        ("dice:select=weight dropout", DICE(Energy(K), select="weight dropout")),
        ("dice:p=0.7,score=msp", DICE(MSP(K), 0.7)),
        ("react:percentile=0.95,score=dice", ReAct(DICE(Energy(K)), 0.95)),
    ],
)
def test_options_are_the_constructors_arguments(text, expected):
    found = make_detector(text, K)
    assert type(found) is type(expected) and settings(found) == settings(expected)
    assert found.name == text and found.num_classes == K


def test_what_the_text_says_is_what_is_scored():
    torch.manual_seed(0)
    outputs = Outputs(torch.randn(60, K), torch.randn(60, D).relu(), torch.arange(60) % K, network())
    for text, same in [("dice:p=0.7,score=msp", DICE(MSP(K), 0.7)), ("knn:k=7", KNN(K, 7))]:
        assert make_detector(text, K).fit(outputs).score(outputs).equal(same.fit(outputs).score(outputs))
    three = [make_detector(text, K).fit(outputs).score(outputs) for text in ("dice", "dice:p=0", "energy")]
    assert three[1].equal(three[2]) and not three[0].equal(three[1])


def test_without_options_it_is_the_default():
    for name in DETECTORS:
        found = make_detector(name, K)
        assert type(found) is SCORES[name] and found.name == name
        assert settings(found) == settings(DETECTORS[name](K))
    assert parse_score("dice: p = 0.7 , select=weight dropout") == ("dice", {"p": "0.7", "select": "weight dropout"})


def test_the_channels_widths_go_to_those_that_take_them():
    assert make_detector("odin", K, std=[0.2, 0.3]).std == [0.2, 0.3]
    assert make_detector("odin:eps=0.01", K, std=[0.2]).std == [0.2]
    assert make_detector("odin", K).std is None
    assert make_detector("knn:k=3", K, std=[0.2]).k == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("best:k=3", r"unknown scores \['best'\]"),
        ("knn:p=3", "unknown option 'p' of the score knn, expected some of k, chunk_elements"),
        ("odin:std=3", "unknown option 'std' of the score odin, expected some of temperature, eps"),
        ("msp:k=3", "unknown option 'k' of the score msp, it has none"),
        ("dice:detector=msp", "unknown option 'detector' of the score dice, expected some of score, p, select, seed"),
        ("knn:k=many", "k of the score knn must be an integer, got 'many'"),
        ("knn:k=2.5", "k of the score knn must be an integer, got '2.5'"),
        ("odin:eps=little", "eps of the score odin must be a number, got 'little'"),
        ("dice:select=best", "select of the score dice must be top or bottom or .*, got 'best'"),
        ("dice:p=1", r"the score 'dice:p=1': p must be in \[0, 1\), got 1.0"),
        ("knn:k=0", "the score 'knn:k=0': k must be at least 1, got 0"),
        ("odin:temperature=nan", "temperature must be positive, got nan"),
        ("dice:score=knn", "goes before a detector that neither learns nor perturbs"),
        ("dice:score=best", r"unknown scores \['best'\]"),
        ("dice:", "expected a score as NAME or NAME:OPTION=VALUE,OPTION=VALUE, got 'dice:'"),
        ("dice:p", "expected a score as NAME or NAME:OPTION"),
        ("dice:p=", "expected a score as NAME or NAME:OPTION"),
        ("dice:p=0.5,p=0.7", "the score 'dice:p=0.5,p=0.7' has the option 'p' twice"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        make_detector(text, K)


def test_the_headline_may_have_options():
    assert TrainConfig(headline="knn:k=5").headline == "knn:k=5"
    for headline, message in [
        ("knn:p=5", "unknown option 'p' of the score knn"),
        ("best:p=5", "headline must be one of msp, .*, got 'best:p=5'"),
    ]:
        with pytest.raises(ValueError, match=message):
            TrainConfig(headline=headline)


def test_settings_have_scores_as_their_detectors_are_called():
    config = TrainConfig(headline="knn: k=7", score=["dice:p=0.7, score = msp", "energy"])
    assert (config.headline, config.score) == ("knn:k=7", ["dice:p=0.7,score=msp", "energy"])
    assert [make_detector(text, K).name for text in ("knn: k = 7", *config.score)] == [config.headline, *config.score]
    assert TrainConfig(score=None).score is None


def test_on_the_command_line(tmp_path, capsys):
    """Options of scores, and bins of the calibration errors."""
    run, file = tmp_path / "run", tmp_path / "knn.pt"
    main(["train", *QUICK, "--holdout", "0.1", "--headline", "knn:k=5", "--ood", "noise", "--out", str(run)])
    results = json.loads((run / "results.json").read_text())
    assert {"knn", "knn:k=5"} <= results["ood"]["noise"].keys()
    assert "score knn:k=5" in (run / "report.html").read_text()
    capsys.readouterr()

    asked = ["odin:eps=0", "odin:temperature=1000,eps=0.1", "dice", "dice:p=0.7", "dice:select=bottom,score=msp"]
    main(["eval", str(run), "--json", "--score", *asked, "knn:k=5"])
    found = json.loads(capsys.readouterr().out)
    assert list(found["ood"]["noise"]) == [*asked, "knn:k=5"]
    assert found["ood"]["noise"]["knn:k=5"] == results["ood"]["noise"]["knn:k=5"]
    assert found["ood"]["noise"]["odin:eps=0"] != found["ood"]["noise"]["odin:temperature=1000,eps=0.1"]
    # the run has K + 1 outputs and fifteen bins
    assert found["id"] == results["id"] and "ece_all_outputs" in found["id"]
    main(["eval", str(run), "--json", "--score", "msp", "--ece-bins", "10"])
    ten = json.loads(capsys.readouterr().out)
    # where all bins are underconfident, their number does not matter
    errors = ("ece", "adaptive_ece", "classwise_ece", "ece_all_outputs")
    assert any(ten["id"][name] != results["id"][name] for name in errors)
    assert ten["id"]["accuracy"] == results["id"]["accuracy"]
    with np.load(run / "scores.npz") as scores:
        confidence, correct = map(torch.from_numpy, (scores["confidence"], scores["correct"]))
    assert ten["id"]["ece"] == expected_calibration_error(confidence, correct, 10)
    main(["eval", str(run), "--score", "msp", "--ece-bins", "10"])
    assert "(10 bins, classwise" in capsys.readouterr().out

    # held-out images choose p where none is given
    assert found["dice"].keys() == {"p", "dice:select=bottom,score=msp"}
    assert found["dice"]["p"] == results["dice"]["p"]

    # the temperature is that of the held-out images, and is a score of runs that have some
    assert "temperature" in results["ood"]["noise"] and "left_out" not in results
    main(["eval", str(run), "--ood", "noise", "--score", "temperature", "--save-detector", str(file)])
    assert load_detector(file).temperature.item() == results["calibration"]["temperature"]
    main(["eval", str(run), "--ood", "noise", "--score", "odin:eps=0.1", "--save-detector", str(file)])
    saved = load_detector(file)
    assert saved.name == "odin:eps=0.1" and saved.eps == 0.1
    data = load_run(run).dataset
    assert saved.std == data.std.tolist() != data.mean.tolist()
    capsys.readouterr()
    for words, message in [
        (["eval", str(run), "--score", "knn:p=5"], "unknown option 'p' of the score knn, expected some of k"),
        (["train", *QUICK, "--headline", "gen:top=100", "--out", str(tmp_path / "other")], "top must be in [1, 8]"),
        (["train", *QUICK, "--headline", "nkk:k=5", "--out", str(tmp_path / "other")], "--headline must be one of msp"),
    ]:
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="headline must be a score that fits this run"):
        train(TrainConfig(headline="temperature", epochs=1, interval=2, batch_size=256), tmp_path / "other")
