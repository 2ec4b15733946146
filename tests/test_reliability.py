"""What the reliability methods answer, apart from training; tests/test_train_methods.py trains with each."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sparse_moon.algorithms import ALGORITHMS, Dense, RigL
from sparse_moon.nn import sparsify
from sparse_moon.ood import SCORES, CosineHead
from sparse_moon.options import AbstentionOptions
from sparse_moon.reliability import MOON, RELIABILITY, CigL, Plain, Reliability, ReliabilityRun, RunCost
from sparse_moon.schedules import Cosine

RUN = ReliabilityRun("digits", epochs=10, stop=0.7, seed=0, method=RigL, method_options=RigL.Options())
COST = RunCost(1e9, 10.0, 100.0, 50.0, num_classes=3, examples=1000, epochs=10, batch_size=10, averaged_epochs=2)


def made(name, **changes):
    return RELIABILITY[name](replace(RUN, **changes))


def net(outputs=3):
    model = nn.Sequential()
    model.hidden = nn.Linear(8, 16)
    model.fc = nn.Linear(16, outputs)
    return sparsify(model, 0.5, first_dense=False, exclude="fc")


def test_the_base_class_does_nothing():
    plain, model = Plain(RUN), net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain.attach(model, 3)
    images, labels = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    assert plain.batch(images, labels) == (images, labels)
    plain.before_batch(updates_now=False)
    assert torch.equal(plain.loss_of(model(images), labels), nn.functional.cross_entropy(model(images), labels))
    plain.end_epoch(model, 1)
    assert plain.learning_rate(Cosine(1.0, 0.0, 10), 3, 5) == Cosine(1.0, 0.0, 10)(3)
    assert not plain.finish(model) and plain.predictor(model, None) is model and plain.head(model) is None
    assert plain.metrics() == plain.progress() == {} and plain.passes == 1 and not plain.ends_with
    assert plain.change(model) is model and plain.topology_stop == 0.7 and plain.overhead(COST) is None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    plain.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("name", list(RELIABILITY))
def test_each_trains_a_batch_and_its_state_loads(name):
    reliability = made(name)
    model = reliability.change(net(3 + reliability.unknown_output))
    reliability.attach(model, 3)
    for _ in range(2):
        reliability.before_batch(updates_now=False)
        images, targets = reliability.batch(torch.randn(6, 8), torch.tensor([0, 1, 2, 0, 1, 2]))
        loss = reliability.loss_of(model(images), targets)
        loss.backward()
        assert loss.shape == () and loss.isfinite()
    assert set(reliability.metrics()) == ({"w", "mean_u"} if reliability.unknown_output else set())
    assert set(reliability.progress()) == ({"w", "u"} if reliability.unknown_output else set())
    reliability.end_epoch(model, 10)
    other = made(name)
    other.attach(model, 3)
    other.load_state_dict(reliability.state_dict())
    for part in ("loss", "average"):
        mine, loaded = reliability.state_dict()[part], other.state_dict()[part]
        assert (mine is None) == (loaded is None)
        assert mine is None or all(torch.equal(mine[key], loaded[key]) for key in mine)
    assert reliability.finish(model) == (reliability.average is not None)
    assert reliability.predictor(model.eval(), lambda state: net().eval())(torch.randn(2, 8)).shape[0] == 2


def test_scores_that_fit():
    fitting = {name: {score for score in SCORES if made(name).fits(SCORES[score])} for name in RELIABILITY}
    linear = {"dice", "vim"}
    for name, scores in fitting.items():
        assert ("unknown" in scores) == (name in ("moon", "dac", "gamblers"))
        assert ("godin" in scores) == (name == "generalized-odin")
        assert (linear <= scores) == (name not in ("generalized-odin", "mc-dropout")) and {"msp", "knn"} <= scores
        assert ("energy" in scores) == (name != "mc-dropout")
    assert not {*linear, "energy"} & {s for s in SCORES if CigL(RUN, without=("averaging",)).fits(SCORES[s])}


def test_parts_and_what_they_change():
    assert MOON(RUN).unknown_output and MOON(RUN).averages and MOON(RUN).first_vote == 9
    assert not MOON(RUN, without=["loss"]).unknown_output and not MOON(RUN, without=["voting"]).averages
    assert CigL(RUN).masks and not CigL(RUN, without=["mask"]).masks
    whole = CigL(RUN, without=["averaging"])
    assert whole.several and whole.ends_with == "several networks" and whole.passes == 1
    with pytest.raises(ValueError, match=r"'moon' has the parts \('loss', 'tuning', 'voting'\) to leave out, got"):
        MOON(RUN, without=["x"])


@pytest.mark.parametrize(("dataset", "weight"), [
    ("mnist", 0.01), ("cifar10", 1.0), ("cifar100", 2.0), ("imagenet", 0.001), ("digits", 1.0),
])  # fmt: skip
def test_the_final_weight_of_moon_is_the_papers(dataset, weight):
    moon = made("moon", dataset=dataset)
    moon.attach(net(4), 3)
    assert moon.loss.final_weight == weight
    named = f"({dataset})" if dataset in ("mnist", "cifar100", "imagenet") else "(others)"
    assert f"{weight:g} {named}" in AbstentionOptions.__doc__


@pytest.mark.parametrize(("share", "epochs"), [(0.7, 90), (0.57, 100), (0.58, 50), (0.29, 200), (0.8, 10), (1.0, 10)])
def test_voting_begins_after_the_share_as_it_is_written(share, epochs):
    moon = MOON(replace(RUN, epochs=epochs, stop=0.0), MOON.Options(vote_from=share))
    assert moon.first_vote == min(round(100 * share) * epochs // 100 + 1, epochs)


def test_what_does_not_fit_its_run():
    with pytest.raises(ValueError, match="'cigl' masks sparse layers, it needs another method than 'dense'"):
        made("cigl", method=Dense)
    with pytest.raises(ValueError, match=r"stop 0\.95 leaves the topology changing at the end of epoch 9 of 10"):
        made("moon", stop=0.95)
    made("moon", stop=0.95, method=ALGORITHMS["static"])
    with pytest.raises(ValueError, match=r"exchanges weights and keeps their number, .*'rigl'.*, got 'static'"):
        made("sup-tickets", method=ALGORITHMS["static"])
    assert made("sup-tickets", stop=0.9).topology_stop == 1.0
    mest = ALGORITHMS["mest"]
    with pytest.raises(ValueError, match="constant number of weights, 'mest' with"):
        made("sup-tickets", method=mest, method_options=mest.Options(soft_memory_bound=True))
    with pytest.raises(ValueError, match=r"replaces the nn\.Linear fc of a model, mine has none"):
        made("generalized-odin").check_model(nn.Linear(2, 2), "mine")


def test_the_head_changes():
    model = net()
    assert isinstance(made("generalized-odin").change(model).fc, CosineHead)


def test_overheads_are_those_of_two():
    costs = {name: kind.overhead(COST) for name, kind in RELIABILITY.items()}
    assert {name for name, cost in costs.items() if cost} == {"moon", "cigl"}
    assert costs["moon"]["averaging"] == 3 * 100 * 2 and costs["cigl"]["mask"] == 2 * 50 * 100 * 10


def test_names_of_the_classes():
    assert all(kind.name == name and issubclass(kind, Reliability) for name, kind in RELIABILITY.items())
