import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_moon import files
from sparse_moon.app import models, run_folder
from sparse_moon.app.build import build_model
from sparse_moon.app.cli import main, presets
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.evaluate import load_run
from sparse_moon.app.run_data import load_dataset, plain_batches
from sparse_moon.nn.fusion import fusions
from sparse_moon.ood import collect, load_detector
from sparse_moon.ops.native import native

QUICK = [
    "--model",
    "mlp",
    "--width",
    "64",
    "--epochs",
    "3",
    "--batch-size",
    "64",
    "--interval",
    "9",
    "--lr",
    "0.2",
    "--ood",
    "noise",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    main(["train", *QUICK, "--out", str(folder)])
    return folder


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_train_says_what_came_of_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["train", *QUICK, "--seed", "3"])
    out = capsys.readouterr().out
    folder = Path("runs/digits-mlp-rigl-moon-0.9-seed3")
    assert (folder / run_folder.REPORT).exists() and str(folder / run_folder.REPORT) in out
    for word in ("accuracy", "ECE", "noise", "energy", "AUROC", "FPR95", "sparsity 0.899"):
        assert word in out
    assert json.loads((folder / run_folder.CONFIG).read_text())["seed"] == 3


def test_settings_file_and_options(tmp_path, run):
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        "model: mlp\nwidth: 16\nepochs: 1\nbatch_size: 256\ninterval: 2\nood: [noise]\nexclude: [fc]\nmethod: static\n"
    )
    main(["train", "--config", str(settings), "--method", "set", "--out", str(tmp_path / "run")])
    config = json.loads((tmp_path / "run" / run_folder.CONFIG).read_text())
    assert (config["width"], config["method"], config["exclude"], config["ood"]) == (16, "set", ["fc"], ["noise"])


def test_presets_are_valid_settings():
    assert presets().keys() >= {"moon-mnist", "moon-cifar10", "moon-cifar100", "moon-imagenet", "rigl-cifar10"}
    import yaml

    for path in presets().values():
        TrainConfig.from_dict(yaml.safe_load(path.read_text()))


def test_preset_by_name(capsys, tmp_path):
    # the data is missing: the message shows that the preset was read
    assert "cifar10" in refused(
        capsys, "train", "--config", "moon-cifar10", "--data-root", tmp_path, "--out", tmp_path / "r"
    )


@pytest.mark.skipif(native is None, reason="without compiled CPU kernels nothing is gained")
@pytest.mark.parametrize("method", ["rigl", "dense"])
def test_sparse_and_dense_networks_are_fused_unless_it_is_refused(method):
    config = TrainConfig(model="small-resnet", width=4, method=method)
    for fuse in (True, False):
        model = build_model(replace(config, fuse=fuse), load_dataset(config))
        assert ("fused" in fusions(model).values()) is fuse


def test_runs_of_before_go_on_without_fusion(tmp_path, capsys):
    folder = tmp_path / "run"
    options = ["--model", "small-resnet", "--width", "4", *QUICK[4:], "--epochs", "1", "--out", str(folder)]
    main(["train", "--no-fuse", *options])
    config = folder / run_folder.CONFIG
    assert json.loads(config.read_text())["fuse"] is False  # as all of them have it that did not ask for it
    main(["train", *options, "--resume"])
    assert json.loads(config.read_text())["fuse"] is False
    main(["train", *options[:-1], str(tmp_path / "other")])
    assert "has fuse True" in refused(capsys, "train", "--no-fuse", *options[:-1], tmp_path / "other", "--resume")


def test_resume_takes_the_runs_settings(run, capsys):
    main(["train", "--out", str(run), "--resume"])
    assert "--resume" not in capsys.readouterr().err
    assert "width 64, it cannot be resumed with 20" in refused(
        capsys, "train", "--out", run, "--resume", "--width", "20"
    )


@pytest.mark.parametrize("option", [["--batch-size", "64"], ["--lr", "0.12"], ["--method", "rigl"]])
def test_what_is_asked_of_a_resumed_run_counts_where_it_is_the_default_too(tmp_path, capsys, option):
    files.write_json(tmp_path / run_folder.CONFIG, TrainConfig(batch_size=32, lr=0.1, method="set").to_dict())
    assert "it cannot be resumed with" in refused(capsys, "train", "--out", tmp_path, "--resume", *option)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparsity", "1.0"], "sparsity must be in [0, 1), got 1.0"),
        (["--method", "rigle"], "method"),
        (["--lr", "fast"], "lr"),
        (["--epoch", "3", "--epochs", "1", "--what", "1"], "--what"),
        (["--ood", "nowhere=/does/not/exist"], "/does/not/exist"),
        (["--ood", "unheard-of"], "unheard-of"),
        (["--dataset", "mnist"], "mnist"),
        (["--dataset", "missing.npz"], "missing.npz"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_wrong_arguments_end_with_a_message_and_code_2(tmp_path, capsys, options, message):
    folder = tmp_path / "run"
    assert message in refused(capsys, "train", *QUICK, "--out", folder, *options)
    assert not (folder / run_folder.RESULTS).exists()


def test_bad_data_files(tmp_path, capsys):
    path = tmp_path / "data.npz"
    images, labels = np.zeros((8, 6, 6), np.uint8), np.arange(8) % 2
    np.savez(path, x_train=images, y_train=labels[:7], x_test=images, y_test=labels)
    assert "7" in refused(capsys, "train", *QUICK, "--dataset", path, "--out", tmp_path / "run")
    path.write_bytes(b"not an archive")
    assert "data.npz" in refused(capsys, "train", *QUICK, "--dataset", path, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_on_an_npz_file(tmp_path):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 120)
    labels[:3] = range(3)
    images = (generator.integers(0, 40, (120, 10, 10)) + 60 * labels[:, None, None]).astype(np.uint8)
    np.savez(tmp_path / "shades.npz", x_train=images[:90], y_train=labels[:90], x_test=images[90:], y_test=labels[90:])
    np.savez(tmp_path / "other.npz", x=generator.integers(0, 255, (40, 12, 12, 3)).astype(np.uint8))
    options = [*QUICK[:-2], "--epochs", "12", "--batch-size", "30", "--ood", f"mine={tmp_path / 'other.npz'}"]
    main(["train", *options, "--dataset", str(tmp_path / "shades.npz"), "--out", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run" / run_folder.RESULTS).read_text())
    assert results["id"]["accuracy"] > 0.9 and results["ood"].keys() == {"mine"}


def test_eval_repeats_and_extends_the_runs_figures(run, capsys):
    main(["eval", str(run), "--json"])
    figures = json.loads(capsys.readouterr().out)
    saved = json.loads((run / run_folder.RESULTS).read_text())
    assert figures["id"] == saved["id"] and figures["ood"] == saved["ood"]
    main(["eval", str(run), "--ood", "letters", "--score", "energy"])
    out = capsys.readouterr().out
    assert "letters" in out and "energy" in out and "noise" not in out and "knn" not in out
    assert "unknown scores ['best']" in refused(capsys, "eval", run, "--score", "best")
    assert "does not exist" in refused(capsys, "eval", run.parent / "nowhere")


def test_a_detector_for_a_service(run, tmp_path, capsys):
    """What docs/reliability.md shows: the exported network and the saved detector, without the run."""
    target = tmp_path / "dice.pt"
    main(["eval", str(run), "--score", "dice", "--save-detector", str(target), "--tpr", "0.9", "--json"])
    printed = capsys.readouterr()
    assert json.loads(printed.out)["ood"]["noise"].keys() == {"dice"} and "ID test images" in printed.err
    whole = load_run(run)
    batches = plain_batches(whole.dataset.test, whole.dataset, whole.config)
    detector = load_detector(target)
    accepted = detector.accepts(collect(whole.predictor, batches)).double().mean().item()
    assert accepted == pytest.approx(0.9, abs=1 / len(whole.dataset.test))
    main(["export", str(run), "--dense", str(tmp_path / "dense.pt")])
    content = torch.load(tmp_path / "dense.pt", weights_only=True)
    model = models.build(
        content["model"], content["num_outputs"], in_channels=content["in_channels"], image_size=content["image_size"],
        width=content["width"],
    )  # fmt: skip
    model.load_state_dict(content["state_dict"])
    assert detector.accepts(collect(model, batches)).double().mean() == pytest.approx(accepted, abs=0.02)
    eval_run = ["eval", run, "--save-detector", target]
    assert "needs one --score, got ['msp', 'knn']" in refused(capsys, *eval_run, "--score", "msp", "knn")
    assert "needs one --score, got none" in refused(capsys, *eval_run)
    assert "tpr must be in (0, 1]" in refused(capsys, *eval_run, "--score", "msp", "--tpr", "0")
    assert "does not exist" in refused(capsys, "eval", run, "--score", "msp", "--save-detector", tmp_path / "no" / "x")


def test_what_has_no_plain_dense_model(run, tmp_path, capsys):
    state = run_folder.read_checkpoint(run)
    for change in ({"reliability": "generalized-odin"}, {"reliability": "cigl", "without": ("averaging",)}):
        config = replace(TrainConfig.from_dict(state["config"]), **change)
        model = build_model(config, load_dataset(config)).state_dict()
        saved = {**state, "config": asdict(config), "model": model, "members": [model]}
        run_folder.write_checkpoint(tmp_path, saved)
        assert "not with one plain mlp" in refused(capsys, "export", tmp_path, "--dense", tmp_path / "x.pt")


def test_export_is_a_plain_dense_model(run, tmp_path, capsys):
    target = tmp_path / "dense.pt"
    main(["export", str(run), "--dense", str(target)])
    content = torch.load(target, weights_only=True)
    model = models.build(
        content["model"], content["num_outputs"], in_channels=content["in_channels"], image_size=content["image_size"],
        width=content["width"],
    )  # fmt: skip
    model.load_state_dict(content["state_dict"])
    data = load_dataset(load_run(run).config)
    assert torch.equal(content["mean"], data.mean) and torch.equal(content["std"], data.std)
    assert not torch.equal(data.mean, data.std)
    assert type(model.fc) is torch.nn.Linear and (model.hidden1.weight == 0).float().mean() > 0.8
    assert "does not exist" in refused(capsys, "export", run, "--dense", tmp_path / "no" / "x.pt")


def test_flops_of_methods_that_begin_with_more_weights(capsys):
    command = ["flops", "--model", "mlp", "--input", "1,8,8", "--sparsity", "0.8", "--json", "--method"]

    def ratio(*options):
        main([*command, *options])
        report = json.loads(capsys.readouterr().out)
        return report["train_ratio"] / report["forward_ratio"]

    assert ratio("mest") == pytest.approx(1.0)
    assert ratio("gmp", "--stop", "0") == pytest.approx(1.0)
    assert 1.1 < ratio("gmp", "--start-sparsity", "0.5") < ratio("gmp")
    assert ratio("granet") > ratio("gmp", "--start-sparsity", "0.5")
    # all that is trained is two to four times what is used
    assert ratio("top-kast", "--stop", "1") == pytest.approx(2.0, rel=0.01)
    assert ratio("top-kast", "--stop", "1", "--forward-share", "0.25") == pytest.approx(4.0, rel=0.05)


def test_flops_of_resnet50(capsys):
    command = ["flops", "--model", "resnet50", "--input", "3,224,224", "--classes", "1000", "--sparsity", "0.8"]
    main([*command, "--allocation", "erk", "--method", "rigl", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report.keys() >= {"forward_dense", "forward_sparse", "forward_ratio", "train_ratio", "layers"}
    assert report["forward_dense"] == pytest.approx(8.2e9, rel=0.01)
    assert report["forward_ratio"] == pytest.approx(0.42, abs=0.01)
    main([*command, "--allocation", "uniform"])
    assert "total" in capsys.readouterr().out
    assert "--input" in refused(capsys, "flops", "--input", "3,224")


def test_flops_of_batch_norm_in_each_epoch(capsys):
    """MOON's Appendix F: 2.4e15 a pass at 80 %, uniform, and twenty passes nearly all of its 6.8 %."""
    command = ["flops", "--sparsity", "0.8", "--allocation", "uniform", "--json", "--method"]
    for method, options, passes, share in [
        ("static", [], 1, 1 / 300),
        ("static", ["--refresh", "epoch"], 20, 20 / 300),
        ("rigl", ["--refresh", "epoch"], 20, 0.0661),  # of a training that its dense gradients make longer
    ]:
        main([*command, method, *options])
        moon = json.loads(capsys.readouterr().out)["overhead"]["moon"]
        assert moon["batch_norm"] == pytest.approx(passes * 2.34e15, rel=0.002)
        assert moon["ratio"] == pytest.approx(share, rel=0.001)


def test_module_entry_point_and_two_processes(tmp_path):
    """``torchrun`` with two processes ends in one run folder, also where the number of weights changes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "sparse_moon", "train", *QUICK, "--method", "granet", "--out", str(tmp_path / "run")]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report:") == 1
    results = json.loads((tmp_path / "run" / run_folder.RESULTS).read_text())
    assert results["id"]["accuracy"] > 0.3
