"""Every training method and reliability method in the loop that the command line runs."""

import io
import math
import warnings
from dataclasses import asdict, fields, replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from tqdm import tqdm

import sparse_moon as sm
from sparse_moon.algorithms import ALGORITHMS
from sparse_moon.app import run_folder
from sparse_moon.app.build import build_model
from sparse_moon.app.config import TrainConfig, parse_label
from sparse_moon.app.evaluate import evaluate_model, fit_detector, load_run
from sparse_moon.app.run_data import load_dataset, load_ood_sets, plain_batches
from sparse_moon.app.train import train
from sparse_moon.app.trainer import Trainer
from sparse_moon.averaging import PredictionAverage, StochasticPasses
from sparse_moon.losses import VirtualOutlierLoss
from sparse_moon.nn import overall_sparsity, sparse_layers, weight_layers
from sparse_moon.ood import CosineHead, collect, fit_detectors
from sparse_moon.options import MethodOptions, MixupOptions, TopKASTOptions, VOSOptions

SMALL = TrainConfig(
    model="mlp", width=16, epochs=4, batch_size=64, interval=5, sparsity=0.8, ood=[], lr=0.2, vote_from=0.5, stop=0.5,
    reliability="none",
)  # fmt: skip
METHODS = ["static", "set", "rigl", "mest", "srigl", "gmp", "granet", "top-kast"]
RELIABILITY = [
    {"reliability": "moon"}, {"reliability": "moon", "without": ("tuning",)}, {"reliability": "cigl"},
    {"reliability": "cigl", "without": ("mask",)}, {"reliability": "cigl", "without": ("averaging",)},
    {"reliability": "weight-dropout"}, {"reliability": "mc-dropout"}, {"reliability": "label-smoothing"},
    {"reliability": "mixup"}, {"reliability": "logitnorm"}, {"reliability": "dac"}, {"reliability": "vos"},
    {"reliability": "generalized-odin"}, {"reliability": "sup-tickets"}, {"reliability": "gamblers"},
]  # fmt: skip
BAR = tqdm(disable=True)


@pytest.fixture(scope="module")
def digits():
    return load_dataset(SMALL)


def trained(config, dataset, epochs=None):
    trainer = Trainer(config, dataset)
    for _ in range(config.epochs if epochs is None else epochs):
        trainer.run_epoch(BAR)
    return trainer


def flat(state, path=""):
    """Leaves of nested containers by path, without times."""
    if isinstance(state, dict | list):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        kept = [(key, value) for key, value in items if key not in ("time_s", "step_ms")]
        return {k: v for key, value in kept for k, v in flat(value, f"{path}/{key}").items()}
    return {path: state}


def same(a, b):
    a, b = flat(a), flat(b)
    if a.keys() != b.keys():
        return False
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "change",
    [*({"method": m} for m in METHODS), {"method": "mest", "soft_memory_bound": True},
     {"method": "gmp", "reliability": "moon"}, {"method": "srigl", "reliability": "cigl"},
     {"method": "top-kast", "reliability": "moon"}, {"method": "top-kast", "reliability": "cigl"}, *RELIABILITY],
    ids=lambda change: "-".join(map(str, change.values())),
)  # fmt: skip
def test_a_resumed_run_ends_with_the_same_bits(digits, change):
    config = replace(SMALL, **change)
    whole = trained(config, digits)
    state = through_a_file(trained(config, digits, 3).state_dict())
    torch.manual_seed(99)  # only the checkpoint's state counts
    second = Trainer(config, digits)
    second.load_state_dict(state)
    second.run_epoch(BAR)
    assert same(whole.state_dict(), second.state_dict())
    images, _ = next(iter(plain_batches(digits.test, digits, config)))
    with torch.no_grad():
        assert torch.equal(whole.finish()(images), second.finish()(images))


def test_random_numbers_of_a_gpu_are_part_of_a_checkpoint(digits, monkeypatch):
    """Dropout draws there; here the GPU's state is a stub."""
    states = {"cuda:1": torch.tensor([7], dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[str(device)])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({str(device): state}))
    trainer = Trainer(SMALL, digits)
    on_cpu = trainer.state_dict()
    trainer.device = torch.device("cuda:1")
    state = through_a_file(trainer.state_dict())
    for without in (on_cpu, {name: value for name, value in state.items() if name != "cuda_random_state"}):
        trainer.load_state_dict(without)  # of a CPU, or written before it was kept
    assert states["cuda:1"].item() == 7
    states["cuda:1"] = torch.tensor([9], dtype=torch.uint8)
    trainer.load_state_dict(state)
    assert states["cuda:1"].item() == 7


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_at_its_sparsity_and_updates(digits, method):
    trainer = trained(replace(SMALL, method=method), digits)
    # a constant fan-in rounds each row
    assert overall_sparsity(trainer.model) == pytest.approx(0.8, abs=0.02 if method == "srigl" else 0.002)
    updates = [row["topology_updates"] for row in trainer.history]
    assert updates[2:] == [0, 0] and (sum(updates) > 0) == (method != "static")
    starts = {"gmp": 1.0, "granet": 0.5, "top-kast": 0.4}
    built = 1.0 - overall_sparsity(build_model(trainer.config, digits))
    assert built == pytest.approx(starts.get(method, 0.2), abs=0.02 if method == "srigl" else 0.002)


def test_top_kast_ends_at_its_sparsity_where_layers_stay_dense(digits):
    config = replace(SMALL, method="top-kast", model="small-resnet", width=4, epochs=2)
    model = build_model(config, digits)
    layers, trained_weights = sparse_layers(model), 0
    assert len(layers) < len(weight_layers(model))
    for layer in layers.values():
        trained_weights += layer.topology.nnz
    trainer = trained(config, digits)
    assert overall_sparsity(trainer.model) == pytest.approx(0.8, abs=0.002)
    used = sum(layer.topology.nnz for layer in sparse_layers(trainer.model).values())
    assert used == pytest.approx(0.5 * trained_weights, rel=0.01)


def test_top_kast_takes_the_weight_decay_as_its_penalty(digits):
    trainer = Trainer(replace(SMALL, method="top-kast", weight_decay=3e-4), digits)
    decay = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    values = {id(layer.values) for layer in sparse_layers(trainer.model).values()}
    assert trainer.method.penalty == 3e-4 and len(decay) == len(list(trainer.model.parameters()))
    assert all(decay[id(p)] == (0.0 if id(p) in values else 3e-4) for p in trainer.model.parameters())


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ({"method": "mest"}, {"gradient_weight": 100.0}),
        ({"method": "mest"}, {"soft_memory_bound": True}),
        ({"method": "mest"}, {"drop_fraction": 0.5}),
        ({"method": "srigl"}, {"ablation_threshold": 1.0}),
        ({"method": "srigl"}, {"drop_fraction": 0.5}),
        ({"method": "top-kast"}, {"forward_share": 0.7}),
        ({"method": "top-kast"}, {"weight_decay": 0.1}),
        ({"method": "top-kast"}, {"drop_fraction": 0.9}),
        ({"method": "gmp"}, {"start_sparsity": 0.5}),
        ({"method": "gmp"}, {"stop": 0.4}),
        ({"method": "granet"}, {"start_sparsity": 0.0}),
        ({"method": "granet"}, {"drop_fraction": 0.5}),
        ({"reliability": "label-smoothing"}, {"label_smoothing": 0.2}),
        ({"reliability": "mixup"}, {"mixup_alpha": 1.0}),
        ({"reliability": "logitnorm"}, {"logit_temperature": 0.1}),
        ({"reliability": "dac"}, {"final_weight": 0.3}),
        ({"reliability": "dac"}, {"warmup_epochs": 2}),
        ({"reliability": "gamblers"}, {"payoff": 1.5}),
        ({"reliability": "vos"}, {"outlier_weight": 0.5}),
        ({"reliability": "vos"}, {"outliers_from": 0.9}),
        ({"reliability": "mc-dropout"}, {"keep": 0.7}),
        ({"reliability": "sup-tickets"}, {"tickets": 1}),
        ({"reliability": "sup-tickets"}, {"vote_from": 0.8}),
        ({}, {"holdout": 0.2}),
    ],
    ids=str,
)
def test_every_option_counts(base, change):
    outcomes = []
    for config in (replace(SMALL, **base), replace(SMALL, **base, **change)):
        trainer = trained(config, load_dataset(config))
        trainer.finish()
        outcomes.append(trainer.model.state_dict())
    assert not same(*outcomes)


def test_training_flops_of_a_run(digits):
    def ratio(**change):
        config = replace(SMALL, sparsity=0.9, **change)
        counts = [t.flop_counts() for t in (Trainer(config, digits), trained(config, digits, 2))]
        return counts[0]["forward_sparse"], *(counts[1][k] for k in ("forward_sparse", "forward_dense", "train_ratio"))

    first, last, dense, found = ratio(method="gmp", start_sparsity=0.5)
    assert first == pytest.approx(0.5 * dense, rel=0.01) and last == pytest.approx(0.1 * dense, rel=0.01)
    assert found == pytest.approx((0.5 * (last + (first - last) / 4) + 0.5 * last) / dense)
    first, last, dense, found = ratio(method="top-kast", forward_share=0.25, stop=0.4)
    assert first == pytest.approx(4 * last, rel=0.01)
    assert found == pytest.approx((0.4 * first + 0.6 * last) / dense)
    _, last, dense, found = ratio(method="mest", soft_memory_bound=True, drop_fraction=0.4)
    assert found == pytest.approx((1 + 0.4 / 2 * 0.5) * last / dense)
    _, last, dense, found = ratio(method="rigl", reliability="sup-tickets")  # which updates to the end
    assert found == pytest.approx((3 * last + (dense - last) / 5) / (3 * dense))


@pytest.mark.parametrize("change", RELIABILITY, ids=lambda change: "-".join(map(str, change.values())))
def test_mixed_precision(digits, change):
    trainer = trained(replace(SMALL, epochs=2, outliers_from=0.0, amp="bfloat16", **change), digits)
    single = trained(replace(SMALL, epochs=2, outliers_from=0.0, **change), digits)
    losses = [t.history[0]["loss"] for t in (trainer, single)]
    assert losses[0] == pytest.approx(losses[1], rel=0.2) and losses[0] != losses[1]
    trainer.finish()


def test_float16_trains_with_a_scaler_that_resumes(digits):
    config = replace(SMALL, amp="float16")
    whole, single = trained(config, digits), trained(SMALL, digits)
    state = through_a_file(trained(config, digits, 2).state_dict())
    assert state["scaler"]["scale"] > 1 and state["scaler"]["_growth_tracker"] > 0
    second = Trainer(config, digits)
    second.load_state_dict(state)
    for _ in range(2):
        second.run_epoch(BAR)
    assert same(whole.state_dict(), second.state_dict())
    losses = [[row["loss"] for row in trainer.history] for trainer in (whole, single)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]


def test_no_two_reliability_methods_train_the_same_network(digits):
    ends = [trained(SMALL, digits).model.state_dict()]
    for change in RELIABILITY:
        if change.get("without") not in (("mask",), ("averaging",)) and change["reliability"] != "mc-dropout":
            trainer = trained(replace(SMALL, **change), digits)
            trainer.finish()
            ends.append(trainer.model.state_dict())
    assert not [(i, j) for i in range(len(ends)) for j in range(i) if same(ends[i], ends[j])]


def test_mixup_trains_on_soft_targets_of_mixed_images(digits, monkeypatch):
    seen = []
    forward = nn.CrossEntropyLoss.forward
    monkeypatch.setattr(nn.CrossEntropyLoss, "forward", lambda s, z, y: (seen.append(y), forward(s, z, y))[1])
    trained(replace(SMALL, reliability="mixup", mixup_alpha=4.0), digits, 1)
    assert all(y.shape == (64, 8) and torch.allclose(y.sum(1), torch.ones(64)) for y in seen)
    assert any(((y > 0.01) & (y < 0.99)).any() for y in seen)


def test_virtual_outliers_see_the_features_of_the_head(digits):
    trainer = trained(replace(SMALL, reliability="vos"), digits, 1)
    assert isinstance(trainer.reliability.loss, VirtualOutlierLoss) and trainer.reliability.loss.seen.all()
    outputs = collect(trainer.model, plain_batches(digits.train, digits, trainer.config))
    means = torch.stack([outputs.features[outputs.labels == c].mean(0) for c in range(8)])
    # a moving average of a network in training, so not the same
    assert torch.nn.functional.cosine_similarity(means, trainer.reliability.loss.mean).min() > 0.8
    assert any(p is trainer.reliability.loss.slope for group in trainer.optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize("fuse", [False, True])
def test_generalized_odin_has_a_cosine_head_without_weight_decay(fuse, digits):
    model = "small-resnet" if fuse else "mlp"
    config = replace(SMALL, reliability="generalized-odin", model=model, width=4, fuse=fuse)
    trainer = Trainer(config, digits)
    head = trainer.model.fc
    assert isinstance(head, CosineHead) and "fc" not in sparse_layers(trainer.model)
    decay = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert decay[id(head.weight)] == 0.0 and decay[id(head.scale_weight)] == 5e-4
    assert collect(trainer.model, [torch.zeros(2, 1, 8, 8)]).head.cosine


def test_mc_dropout_averages_over_masks(digits):
    config = replace(SMALL, reliability="mc-dropout", samples=3, keep=0.7)
    trainer = trained(config, digits, 1)
    whole = trainer.finish()
    assert isinstance(whole, StochasticPasses)
    images, _ = next(iter(plain_batches(digits.test, digits, config)))
    probabilities, mask = [], trainer.reliability.mask
    mask.step = torch.zeros_like(mask.step)
    with torch.no_grad():
        for _ in range(3):
            mask.draw()
            probabilities.append(trainer.model(images).double().softmax(1))
        mask.clear()
        plain = trainer.model(images)
        torch.testing.assert_close(whole(images).exp().double(), sum(probabilities) / 3, rtol=1e-5, atol=1e-6)
        assert torch.equal(whole(images), whole(images)) and torch.equal(trainer.model(images), plain)
        one = replace(config, samples=1).make_reliability().predictor(trainer.model, None)
        assert not torch.allclose(one(images), whole(images))


def test_cigl_without_averaging_averages_predictions_of_masked_networks(digits):
    config = replace(SMALL, reliability="cigl", without=("averaging",), keep=0.7)
    trainer, kept = Trainer(config, digits), []
    for epoch in range(4):
        trainer.run_epoch(BAR)
        if epoch + 1 >= config.make_reliability().first_vote:
            network = build_model(config, digits).eval()
            network.load_state_dict(trainer.model.state_dict())
            for stream, layer in enumerate(sparse_layers(network).values()):
                layer.values.data *= trainer.reliability.mask.mask(stream, layer)
            kept.append(network)
    whole = trainer.finish()
    assert isinstance(whole, PredictionAverage) and len(whole.networks) == 2
    images, _ = next(iter(plain_batches(digits.test, digits, config)))
    with torch.no_grad():
        expected = sum(network(images).double().softmax(1) for network in kept) / 2
        torch.testing.assert_close(whole(images).double().exp(), expected, rtol=1e-5, atol=1e-6)


def test_sup_tickets_cycles(digits):
    config = replace(SMALL, reliability="sup-tickets", epochs=10, tickets=3, vote_from=0.5, lr_end=0.01, lr_until=0.4)
    reliability = config.make_reliability()
    assert reliability.ticket_epochs == (6, 8, 10) and reliability.topology_stop == 1.0
    trainer = Trainer(config, digits)
    length = len(trainer.batches)
    rates = [trainer.learning_rate(step) for step in range(10 * length)]
    assert rates[0] == 0.2 and rates[5 * length - 1] == pytest.approx(0.01)
    for start, end in ((5, 6), (6, 8), (8, 10)):
        cycle = rates[start * length : end * length]
        assert cycle[0] == pytest.approx(0.05) and all(a > b for a, b in pairwise(cycle))
        assert cycle[len(cycle) // 2] == pytest.approx(
            0.01 + 0.04 * 0.5 * (1 + math.cos(math.pi * (len(cycle) // 2) / len(cycle)))
        )
    for epoch in range(10):
        trainer.run_epoch(BAR)
        assert trainer.reliability.average.count == sum(epoch + 1 >= e for e in (6, 8, 10))
    assert sum(row["topology_updates"] for row in trainer.history[5:]) > 0
    before = [layer.topology.num_blocks for layer in sparse_layers(trainer.model).values()]
    trainer.finish()
    assert [layer.topology.num_blocks for layer in sparse_layers(trainer.model).values()] == before


def test_held_out_images_are_not_trained_on(digits):
    config = replace(SMALL, holdout=0.25)
    data = load_dataset(config)
    held = {tuple(i.flatten().tolist()) for i in data.holdout.batch(torch.arange(len(data.holdout)))}
    kept = {tuple(i.flatten().tolist()) for i in data.train.batch(torch.arange(len(data.train)))}
    assert len(data.holdout) == round(0.25 * len(digits.train)) and not held & kept
    assert len(data.train) + len(data.holdout) == len(digits.train)
    whole = digits.train.batch(torch.arange(len(digits.train)))
    labels = {tuple(i.flatten().tolist()): int(y) for i, y in zip(whole, digits.train.labels, strict=True)}
    for part in (data.train, data.holdout):
        images = part.batch(torch.arange(len(part)))
        assert [labels[tuple(i.flatten().tolist())] for i in images] == part.labels.tolist()
    other = load_dataset(replace(config, seed=1)).holdout
    again = load_dataset(config).holdout
    assert torch.equal(again.indices, data.holdout.indices) and not torch.equal(other.indices, data.holdout.indices)
    with pytest.raises(ValueError, match=r"holdout 0\.0001 of \d+ training images leaves"):
        load_dataset(replace(SMALL, holdout=0.0001))


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held") / "run"
    config = replace(SMALL, holdout=0.2, ood=["noise"], width=64)
    return folder, config, train(config, folder, progress=False)


def test_temperature_and_p_come_from_held_out_images(held, monkeypatch):
    folder, config, results = held
    run = load_run(folder)
    calibration, data = results["calibration"], run.dataset
    outputs = collect(run.predictor, plain_batches(data.holdout, data, config))

    def nll(t):
        return nn.functional.cross_entropy(outputs.logits.double() / t, outputs.labels).item()

    t = calibration["temperature"]
    assert nll(t) < nll(0.98 * t) and nll(t) < nll(1.02 * t)
    test = collect(run.predictor, plain_batches(data.test, data, config))
    assert calibration["nll_after"] == pytest.approx(
        nn.functional.cross_entropy(test.logits.double() / t, test.labels).item()
    )
    for name in ("ece", "nll", "brier", "classwise_ece", "adaptive_ece"):
        assert calibration[f"{name}_before"] == results["id"][name] != calibration[f"{name}_after"]
    assert results["dice"]["p"] in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
    given = {}

    def fit(model, detectors, batches, **_):
        given["fit"] = batches
        fit_detectors(model, detectors, batches)

    monkeypatch.setattr("sparse_moon.app.evaluate.fit_detectors", fit)
    monkeypatch.setattr("sparse_moon.app.evaluate.choose_p", lambda *a, **_: given.update(choose=a[2]) or 0.3)
    figures, _ = evaluate_model(run.predictor, config, data, load_ood_sets(config, data), ["dice"])
    assert figures["dice"] == {"p": 0.3}
    for name, images in (("choose", data.holdout), ("fit", data.train)):  # test images choose nothing
        expected, got = (torch.cat([x for x, _ in b]) for b in (plain_batches(images, data, config), given[name]))
        assert torch.equal(got, expected)


def test_a_saved_detector_accepts_the_share_asked_for(held):
    folder, config, _ = held
    run = load_run(folder)
    for name, tpr in (("dice", 0.9), ("odin", 0.8)):
        detector = fit_detector(name, run.predictor, config, run.dataset, tpr)
        perturb = detector.perturb if detector.perturbs else None
        outputs = collect(run.predictor, plain_batches(run.dataset.holdout, run.dataset, config), perturb=perturb)
        assert detector.accepts(outputs).double().mean() == pytest.approx(tpr, abs=1 / len(run.dataset.holdout))


@pytest.mark.parametrize(
    ("change", "scores"),
    [
        ({"reliability": "dac"}, ["unknown", "dice", "msp"]),
        ({"reliability": "generalized-odin"}, ["godin", "msp", "knn"]),
        ({"reliability": "mc-dropout"}, ["msp", "odin", "mahalanobis"]),
        ({"reliability": "cigl", "without": ("averaging",)}, ["msp", "gen"]),
    ],
    ids=str,
)
def test_a_run_is_evaluated_with_the_scores_that_fit_it(tmp_path, change, scores):
    config = replace(SMALL, **change, epochs=2, ood=["noise"])
    results = train(config, tmp_path, progress=False)
    assert results["ood"]["noise"].keys() >= set(scores)
    linear = change["reliability"] == "dac"
    assert ("dice" in results["ood"]["noise"]) == ("vim" in results["ood"]["noise"]) == linear
    assert ("unknown" in results["ood"]["noise"]) == linear
    assert ("energy" in results["ood"]["noise"]) == (change["reliability"] in ("dac", "generalized-odin"))
    passes = {"mc-dropout": 10, "cigl": 1}.get(change["reliability"], 1)
    assert results["flops"]["passes"] == passes
    run = load_run(tmp_path)
    figures, _ = evaluate_model(run.predictor, run.config, run.dataset, load_ood_sets(run.config, run.dataset))
    assert figures["id"] == results["id"] and figures["ood"] == results["ood"]


def test_runs_of_older_versions_load(tmp_path, held):
    """A checkpoint without the settings and the state that were added later."""
    config = replace(SMALL, epochs=1)
    train(config, tmp_path, progress=False)
    state = run_folder.read_checkpoint(tmp_path)
    later = [option.name for kind in (MethodOptions, VOSOptions, MixupOptions) for option in fields(kind)]
    later += ["holdout", "label_smoothing", "logit_temperature", "samples", "tickets"]
    assert len(later) == 13 and set(later) < asdict(config).keys()
    old = {key: value for key, value in state["config"].items() if key not in later}
    run_folder.write_checkpoint(tmp_path, {**{k: v for k, v in state.items() if k != "members"}, "config": old})
    run = load_run(tmp_path)
    assert run.config == config
    trainer = Trainer(run.config, run.dataset)
    trainer.load_state_dict({k: v for k, v in run_folder.read_checkpoint(tmp_path).items() if k != "members"})
    with pytest.raises(ValueError, match=r"unknown settings \['hold'\]"):
        TrainConfig.from_dict({**old, "hold": 0.1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reliability": "sup-tickets", "method": "gmp"}, "'sup-tickets' needs a method that exchanges"),
        ({"reliability": "sup-tickets", "method": "mest", "soft_memory_bound": True}, "constant number"),
        ({"reliability": "mc-dropout", "method": "dense"}, "masks sparse layers"),
        ({"method": "top-kast", "sparsity": 0.5}, "needs a sparsity above 0.5, got 0.5"),
        ({"method": "gmp", "start_sparsity": 0.9}, "start_sparsity to sparsity"),
        ({"method": "granet", "sparsity": 0.4}, "start_sparsity to sparsity"),
        ({"method": "gmp", "reliability": "moon", "stop": 0.9}, "leaves the topology changing"),
        ({"holdout": 1.0}, r"holdout must be in \[0, 1\)"),
        ({"mixup_alpha": 0.0}, "mixup_alpha must be positive"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"outlier_weight": -1.0}, "outlier_weight must be at least 0"),
        ({"ablation_threshold": 1.5}, r"ablation_threshold must be in \[0, 1\]"),
        ({"reliability": "dac", "without": ("tuning",)}, "parts"),
    ],
)
def test_settings_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_labels():
    config = replace(SMALL, reliability="moon", without=("tuning", "voting"))
    assert config.label == "moon:-tuning-voting" and parse_label(config.label) == ("moon", ("tuning", "voting"))
    assert replace(SMALL, reliability="label-smoothing").label == "label-smoothing"
    assert parse_label("label-smoothing") == ("label-smoothing", ())


@pytest.mark.parametrize("sizes", [(3, 2, 2), (16, 8, 4), (64, 5, 3), (2, 64, 3), (300, 100, 10)])
@pytest.mark.parametrize("allocation", ["erk", "uniform"])
@pytest.mark.parametrize("sparsity", [0.6, 0.9])
@pytest.mark.parametrize("share", [0.7, 1.0])
def test_top_kast_starts_with_as_many_weights_as_end_over_the_share(sizes, allocation, sparsity, share):
    """Also where rounding or layers that stay dense make a tiny network denser than asked."""
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    options, kind = TopKASTOptions(forward_share=share), ALGORITHMS.find("top-kast")
    model = nn.Sequential(*layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a tiny network misses
        densities = sm.layer_densities(model, sparsity, allocation)
        start = kind.start_sparsity(options, sparsity, model, densities)
        assert 0.0 <= start <= sparsity
        sm.sparsify(model, sparsity, allocation, start_sparsity=start)
    if share == 1.0 or allocation == "uniform":
        for name, layer in sm.sparse_layers(model).items():
            assert layer.topology.nnz == pytest.approx(densities[name] / share * layer.topology.numel, abs=1)
