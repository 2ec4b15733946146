"""What the command line says of mistakes and failures, and how fast: one line each, and what was there stays."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from sparse_moon import files
from sparse_moon.algorithms import ALGORITHMS
from sparse_moon.app import cli, models, run_folder
from sparse_moon.app import evaluate as evaluation
from sparse_moon.app.cli import main
from sparse_moon.app.commands import flops as flops_command
from sparse_moon.app.config import TrainConfig
from sparse_moon.app.names import ModelName, Score
from sparse_moon.ood import MSP, save_detector
from sparse_moon.options import ReliabilityMethod, TrainingMethod
from sparse_moon.reliability import RELIABILITY

QUICK = ["--model", "mlp", "--width", "16", "--epochs", "2", "--interval", "2", "--batch-size", "256", "--ood", "noise"]
PROGRAM = [sys.executable, "-m", "sparse_moon"]
HEAVY = ["torch", "matplotlib", "sklearn", "torchvision", "PIL", "pandas", "scipy", "numpy"]
pytestmark = pytest.mark.filterwarnings("ignore:.* never updates the topology:UserWarning")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc or /dev/full")
environment = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors") / "run"
    main(["train", *QUICK, "--quiet", "--out", str(folder)])
    return folder


def refused(capsys, *argv, code=2):
    """The line that a command ends with."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    printed = capsys.readouterr().err
    assert stop.value.code == code and printed.count("\n") == 1 and "Traceback" not in printed
    return printed.rstrip("\n")


def started(*argv, **settings):
    return subprocess.run([*PROGRAM, *map(os.fsencode, argv)], capture_output=True, env=environment, **settings)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("train --epoch 3", "sparse-moon train: error: unknown option --epoch; did you mean --epochs?"),
        ("train --epochs=3 --widht=4", "unknown option --widht; did you mean --width?"),
        ("train --xyzzy", "sparse-moon train: error: unknown option --xyzzy"),
        ("train 3", "sparse-moon train: error: unexpected 3"),
        ("trian", "unknown command trian, expected train, compare, eval, flops, export, doctor; did you mean train?"),
        ("", "sparse-moon: error: expected a command: train, compare, eval, flops, export, doctor"),
        ("train --lr fast", "--lr must be a number, got fast"),
        ("train --epochs 3.5", "--epochs must be an integer, got 3.5"),
        ("train --image-size x", "--image-size must be an integer, got x"),
        ("compare --out x --sparsity 0.9 x", "--sparsity must be a number, got x"),
        ("train --method rigle", "--method must be one of dense, static, set, rigl, mest, srigl, gmp, granet, "),
        ("train --method rigle", "got rigle; did you mean rigl?"),
        ("flops --model resnet19", "did you mean resnet18?"),
        ("train --headline mps", "got mps; did you mean msp?"),
        ("train --epochs", "argument --epochs: expected one argument"),
        ("eval", "sparse-moon eval: error: missing: RUN"),
        ("export run", "sparse-moon export: error: missing: --dense"),
        ("train --config moon-cifar", "moon-cifar does not exist; did you mean moon-cifar"),
        ("train --config=nothing.yaml", "nothing.yaml does not exist"),
        ("train --batch-size 0", "--batch-size must be at least 1, got 0"),
        ("train --sparsity 1", "--sparsity must be in [0, 1), got 1.0"),
        ("train --lr nan", "--lr must be a number, got nan"),
        ("train --seed -1", "seed must be at least 0, got -1"),
        ("train --device meta", "device 'meta' cannot be used: "),
        ("train --device nowhere", "device 'nowhere' cannot be used: "),
        ("train --ood id=x.npz", "an OOD set cannot be called 'id'"),
        ("train --ood noise noise", "two OOD sets are called 'noise'"),
        ("train --dataset mnist", "pass --download to fetch them"),
        ("flops --input 3,224,22", "--input must be square, got 224 x 22"),
        ("flops --model mlp --input 1,8,8 --examples 0", "flops: error: --examples must be at least 1, got 0"),
        ("flops --model mlp --input 1,8,8 --epochs 0", "flops: error: --epochs must be at least 1, got 0"),
        ("train --weights .", "train: error: . is a folder, expected the file of weights"),
        ("export run --onnx x --sparse-onnx ./x", "each form needs a place of its own, got x, x"),
        ("export run --dense x --folder x", "each form needs a place of its own, got x, x"),
        ("eval nowhere", "nowhere/checkpoint.pt does not exist"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, *argv.split())
    assert message in line and "typing" not in line and "<class" not in line and "download=True" not in line[-60:]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_with_the_name_of_a_preset_does_not_hide_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moon-mnist").mkdir()
    for command in ("train", "compare"):
        line = refused(capsys, command, "--config", "moon-mnist", "--out", "moon-mnist", "--lr", "-1")
        assert "need lr > 0" in line and not any((tmp_path / "moon-mnist").iterdir())


def test_mistakes_in_a_settings_file_get_one_line(tmp_path, capsys):
    path = tmp_path / "own.yaml"
    for text, message in (
        ("epoch: 3\n", "epoch"),
        ("sparsty: 0.9\n", "--config has an unknown setting sparsty; did you mean sparsity?"),
        ("width: 16\nwidth: 32\n", "own.yaml cannot be read: width is set twice"),
        ("lr: fast\n", "--lr must be a number, got fast"),
        ("a: [", "the settings of --config cannot be read: "),
        ("[1, 2]\n", "--config"),
        ("- mlp\n", "the settings of --config cannot be read: expected NAME: VALUE, got - mlp"),
        *((f"{name}: {value}\n", f"error: --{name.replace('_', '-')} must be a list, got ")
          for name in ("ood", "score", "exclude", "without", "lr_milestones") for value in ("a", 3, "{a: 1}")),
        ("\x00", "--config"),
    ):  # fmt: skip
        path.write_text(text)
        for command in ("train", "compare"):
            assert message in refused(capsys, command, "--config", path, "--out", tmp_path / "run")
    path.write_text(f"model: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]\n")  # is not executed
    for command in ("train", "compare"):
        refused(capsys, command, "--config", path, "--out", tmp_path / "run")
    assert [left.name for left in tmp_path.iterdir()] == ["own.yaml"]
    for text in ("exclude: fc", "exclude: 3"):
        assert "--config that takes a list" in refused(capsys, "train", "--config", text)


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["train", "--epoch", "3"], ["--version"], []])
def test_what_is_said_at_once_imports_nothing_heavy(argv):
    code = (
        "import json, sys\nfrom sparse_moon.app.cli import main\n"
        "try: main(json.loads(sys.argv[1]))\n"
        "except SystemExit: pass\n"
        f"print(json.dumps([name for name in {HEAVY} if name in sys.modules]), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(argv)], capture_output=True, text=True)
    assert json.loads(done.stderr.splitlines()[-1]) == []


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import sparse_moon; sparse_moon.__version__; dir(sparse_moon)", HEAVY),
        (
            "import sparse_moon as sm; sm.RigL, sm.sparsify, sm.UnknownAwareLoss, sm.tune",
            [*HEAVY[1:-1], "torch._dynamo"],
        ),
        ("import sparse_moon.app.commands.flops", ["matplotlib", "sklearn", "torchvision"]),
        ("import sparse_moon.app.commands.eval", ["matplotlib", "sklearn", "torchvision", "torch._dynamo"]),
        ("import sparse_moon.app.commands.train", ["sklearn", "torchvision", "torch._dynamo"]),
        ("import sparse_moon.app.commands.export", ["sparse_moon.app.report", "sparse_moon.app.plots"]),
    ],
)  # fmt: skip
def test_imports_are_those_that_are_needed(code, absent):
    check = f"{code}\nimport sys; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_help_takes_less_than_importing_torch():
    """A bound with slack; benchmarks/startup.py measures."""

    def cpu_s(*command):
        before = os.times()
        subprocess.run([sys.executable, *command], capture_output=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    for _ in range(2):
        torch_s, help_s, typo_s = (
            cpu_s("-c", "import torch"),
            cpu_s("-m", "sparse_moon", "--help"),
            cpu_s("-m", "sparse_moon", "train", "--epoch", "3"),
        )
    assert max(help_s, typo_s) < 1.3 * torch_s


def test_public_names_are_there_when_they_are_used():
    import sparse_moon

    for name in sparse_moon.__all__:
        assert getattr(sparse_moon, name) is not None and name in dir(sparse_moon)
    assert re.match(r"\d+\.\d+", sparse_moon.__version__) and sparse_moon.nn.SparseLinear is sparse_moon.SparseLinear
    assert not hasattr(sparse_moon, "nothing") and not hasattr(sparse_moon, "_nothing")
    # the stub is the one list of public names: what it imports is what it says
    text = Path(sparse_moon.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    said = set(re.findall(r'^    "(\w+)",$', text, re.M))
    assert said == set(sparse_moon.__all__)


def test_names_are_those_of_what_they_name():
    assert set(get_args(ModelName)) == set(models.MODELS)
    assert set(get_args(Score)) == set(evaluation.SCORES)
    assert set(get_args(TrainingMethod)) == set(ALGORITHMS)
    assert set(get_args(ReliabilityMethod)) == set(RELIABILITY)


def test_help_has_every_setting_in_one_group_and_describes_every_command(capsys):
    grouped = [name for names in cli._GROUPS.values() for name in names]
    assert sorted([*grouped, "own"]) == sorted(field.name for field in fields(TrainConfig))
    for argv, words in (
        (["--help"], ["train, evaluate and report one sparse model", "count the FLOPs"]),
        (["train", "--help"], ["data:", "model:", "sparsity:", "reliability:", "optimisation:", "output:", "--quiet"]),
    ):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0
        out = " ".join(capsys.readouterr().out.split())
        assert all(word in out for word in words)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and re.fullmatch(r"sparse-moon \d+\.\d+\S*\n", capsys.readouterr().out)


def test_quiet_prints_nothing_and_otherwise_a_log_has_a_line_an_epoch(tmp_path, capsys):
    main(["train", *QUICK, "--quiet", "--out", str(tmp_path / "a")])
    assert capsys.readouterr() == ("", "")
    main(["train", *QUICK, "--out", str(tmp_path / "b")])
    printed = capsys.readouterr()
    assert [line.split(":")[0] for line in printed.err.splitlines()] == ["epoch 1/2", "epoch 2/2"]
    assert "\r" not in printed.err and len(printed.out.splitlines()) < 20


def test_the_table_leads_with_one_score_fixed_beforehand(tmp_path, capsys):
    sets = ["digits-8-9", "letters", "photos", "noise"]
    main(["train", *QUICK[:-1], *sets, "--headline", "energy", "--out", str(tmp_path / "run")])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split()[:3] for line in lines if line.startswith(("near", "far"))]
    assert rows == [
        ["near", "digits-8-9", "energy"], ["near", "letters", "energy"], ["near", "mean", "energy"],
        ["far", "photos", "energy"], ["far", "noise", "energy"], ["far", "mean", "energy"],
    ]  # fmt: skip
    assert any("on them the best of 15 scores is" in line for line in lines) and str(tmp_path) in lines[-1]
    assert all(len(line) <= 160 for line in lines)


@pytest.mark.filterwarnings("default:scores left out:UserWarning")
def test_scores_can_be_chosen(tmp_path, capsys):
    run = ["train", *QUICK, "--reliability", "none", "--headline", "energy"]
    main([*run, "--score", "msp", "dice:p=0.5", "unknown", "--out", str(tmp_path / "run")])
    printed = capsys.readouterr()
    assert "warning: scores left out, which do not fit this run: unknown\n" in printed.err
    assert "on them the best of 3 scores is" in printed.out
    results = files.read_json(tmp_path / "run" / run_folder.RESULTS)
    assert all(scores.keys() == {"energy", "msp", "dice:p=0.5"} for scores in results["ood"].values())
    main(["eval", str(tmp_path / "run"), "--ood", "noise", "--json"])
    assert len(json.loads(capsys.readouterr().out)["ood"]["noise"]) > 10  # all that fit, as without a run's choice
    for score, message in (
        ("mps", "unknown scores ['mps']"),
        ("knn:k=0", "k must be at least 1"),
        ("sparse_moon.ood.MSP", "one of the package's"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*run, "--score", score, "--out", str(tmp_path / "other")])
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "other" / run_folder.CHECKPOINT).exists()


def test_resume_begins_a_run_that_is_not_there(tmp_path, capsys):
    command = ["train", *QUICK, "--quiet", "--resume", "--out", str(tmp_path / "run")]
    main(command)
    before = (tmp_path / "run" / run_folder.RESULTS).read_bytes()
    main(command)
    assert (tmp_path / "run" / run_folder.RESULTS).read_bytes() == before
    (tmp_path / "run" / run_folder.CONFIG).unlink()  # the checkpoint has the settings, too
    main(["train", "--quiet", "--resume", "--out", str(tmp_path / "run")])
    assert files.read_json(tmp_path / "run" / run_folder.CONFIG)["width"] == 16


def test_damaged_files_get_one_line(run, tmp_path, capsys):
    for name in (run_folder.CHECKPOINT, run_folder.CONFIG):
        folder = tmp_path / name
        folder.mkdir()
        for path in run.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        content = bytearray((run / name).read_bytes())
        content[len(content) // 2] ^= 4
        (folder / name).write_bytes(content)
        command = (
            ["eval", folder, "--score", "msp"]
            if name == run_folder.CHECKPOINT
            else ["train", "--resume", "--out", folder]
        )
        assert name in refused(capsys, *command)
        assert (folder / name).read_bytes() == content


def test_folders_that_cannot_be(run, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("x")
    for out in (file, file / "run", "/proc/nowhere/run" if Path("/proc").exists() else file, "a" * 300, "a\0b"):
        refused(capsys, "train", *QUICK, "--quiet", "--out", out)
    refused(capsys, "eval", file)
    refused(capsys, "eval", run, "--score", "msp", "--save-detector", file / "x.pt")
    refused(capsys, "export", run, "--dense", tmp_path)
    assert file.read_text() == "x"


def test_what_does_not_fit_into_memory(tmp_path, capsys):
    for size in ("100000", "100000000", "10000000000000000"):
        command = ["train", *QUICK, "--quiet", "--image-size", size, "--out", tmp_path / "run"]
        refused(capsys, *command)
    assert not (tmp_path / "run").exists()


def test_what_should_not_happen_is_one_line_too_and_a_traceback_where_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(flops_command, "run", lambda arguments: [][1])
    line = refused(capsys, "flops")
    assert line == "sparse-moon flops: error: IndexError: list index out of range (this should not happen; --traceback shows where)"  # fmt: skip  # noqa: E501
    with pytest.raises(SystemExit):
        main(["flops", "--traceback"])
    assert "Traceback" in capsys.readouterr().err
    for error in (RuntimeError("out of memory\nTried to"), MemoryError(), KeyError("x"), OSError(28, "No space left")):

        def fails(arguments, error=error):
            raise error

        monkeypatch.setattr(flops_command, "run", fails)
        refused(capsys, "flops")
    monkeypatch.setattr(flops_command, "run", lambda arguments: signal.raise_signal(signal.SIGINT))
    assert refused(capsys, "flops", code=130) == "sparse-moon flops: interrupted"


@linux
def test_full_disks_and_closed_pipes(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*PROGRAM, "flops"], stdout=full, stderr=subprocess.PIPE, env=environment)
    assert done.returncode == 2 and done.stderr.decode().count("\n") == 1 and b"No space left" in done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*PROGRAM, "flops"], stdout=writer, stderr=subprocess.PIPE, env=environment)
    assert done.returncode == 2 and done.stderr == b"sparse-moon flops: error: nobody reads what is printed\n"
    command = f"ulimit -f 20; exec {' '.join(PROGRAM)} train {' '.join(QUICK)} --quiet --width 64 --out {tmp_path}/run"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "checkpoint.pt" in done.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == {run_folder.CONFIG, run_folder.METRICS}
    assert started("train", "--resume", "--quiet", "--out", f"{tmp_path}/run").returncode == 0


@linux
def test_ctrl_c_while_it_imports_and_while_it_trains(tmp_path):
    def interrupted(ready):
        command = [*PROGRAM, "train", *QUICK, "--epochs", "5000", "--out", str(tmp_path / "run")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
            while not ready(Path(f"/proc/{process.pid}/maps")):
                assert process.poll() is None
                time.sleep(0.005)
            process.send_signal(signal.SIGINT)
            error = process.communicate()[1].decode()
        return process.returncode, [line for line in error.splitlines() if not line.startswith("epoch")]

    expected = (130, ["sparse-moon train: interrupted"])
    assert interrupted(lambda maps: "libtorch" in maps.read_text()) == expected
    assert interrupted(lambda maps: "matplotlib" in maps.read_text()) == expected
    assert not (tmp_path / "run" / run_folder.CHECKPOINT).exists()
    assert interrupted(lambda maps: (tmp_path / "run" / run_folder.CHECKPOINT).exists()) == expected


@linux
def test_names_that_are_no_text(tmp_path):
    folder = os.fsencode(tmp_path)
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 8, 8), np.uint8))
    os.rename(folder + b"/x.npz", folder + b"/\xff.npz")
    done = started("train", *QUICK, f"mine={os.fsdecode(folder)}/\udcff.npz", "--out", f"{tmp_path}/\udcfe")
    assert done.returncode == 0, done.stderr
    assert b"\\udcfe/report.html" in done.stdout
    assert {b"report.html", b"results.json"} <= set(os.listdir(folder + b"/\xfe"))
    done = started("train", *QUICK, "\udcff=x.npz", "--out", f"{tmp_path}/other")
    assert done.returncode == 2 and b"must be printable text" in done.stderr and not (tmp_path / "other").exists()


def test_a_detector_of_another_program_is_named(tmp_path, capsys):
    save_detector(tmp_path / "d.pt", MSP(3))
    refused(capsys, "eval", tmp_path / "d.pt")
