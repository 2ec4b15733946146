"""``sm.train``: a run of the command line from Python."""

import json
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import yaml

import sparse_moon as sm
from small_own import own_files
from sparse_moon.algorithms import ALGORITHMS
from sparse_moon.app import run_folder
from sparse_moon.app.cli import main
from sparse_moon.app.config import TrainConfig

SETTINGS = {"model": "mlp", "width": 16, "epochs": 2, "interval": 4, "batch_size": 256, "ood": ["noise"], "seed": 3}
FLAGS = [word for name, value in SETTINGS.items() for word in
         (f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [str(value)]))]  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:.* never updates the topology:UserWarning")


@pytest.fixture(scope="module")
def by_command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "cli"
    main(["train", *FLAGS, "--quiet", "--out", str(folder)])
    return folder


def same_run(a, b):
    a, b = (run_folder.read_checkpoint(folder)["model"] for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("form", ["keywords", "mapping", "config", "yaml"])
def test_it_is_the_run_of_the_command_line_to_the_bit(by_command, tmp_path, form):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**SETTINGS, "seed": 0}))
    config = {
        "keywords": None,
        "mapping": {**SETTINGS, "seed": 0},
        "config": TrainConfig(**{**SETTINGS, "seed": 0}),
        "yaml": tmp_path / "own.yaml",
    }[form]
    keywords = SETTINGS if config is None else {"seed": 3}
    results = sm.train(config, out=tmp_path / "run", progress=False, **keywords)
    assert results.pop("folder") == str(tmp_path / "run")
    assert same_run(tmp_path / "run", by_command)
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    assert json.loads(json.dumps(results)) == {k: v for k, v in stored.items() if k != "checksum"}
    assert results["id"] == json.loads((by_command / "results.json").read_text())["id"]


def test_numbers_of_a_yaml_file_are_those_of_the_command_line(tmp_path):
    (tmp_path / "own.yaml").write_text("lr: 1e-1\nlr_end: 2E-3\nweight_decay: .5e-3\nepochs: 0\n")
    with pytest.raises(ValueError, match="epochs must be at least 1"):  # and not that a number is none
        sm.train(tmp_path / "own.yaml")


def test_it_is_resumed_and_a_run_that_is_there_is_kept(by_command, tmp_path):
    again = sm.train(SETTINGS, out=by_command, resume=True)
    assert again["id"]["accuracy"] == json.loads((by_command / "results.json").read_text())["id"]["accuracy"]
    with pytest.raises(ValueError, match="holds a run already"):
        sm.train(SETTINGS, out=by_command)
    again = sm.train(**SETTINGS | {"ood": ("noise",)}, out=by_command, resume=True)  # which its file has as a list
    assert again["id"]["accuracy"] == json.loads((by_command / "results.json").read_text())["id"]["accuracy"]
    with pytest.raises(ValueError, match=r"has ood \['noise'\], it cannot be resumed with \('letters',\)"):
        sm.train(ood=("letters",), out=by_command, resume=True)
    with pytest.raises(ValueError, match="has seed 3, it cannot be resumed with 4"):
        sm.train(SETTINGS, seed=4, out=by_command, resume=True)


def test_the_folder_is_named_after_the_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = sm.train(SETTINGS, progress=False)["folder"]
    assert folder == "runs/digits-mlp-rigl-moon-0.9-seed3" and (tmp_path / folder / "report.html").exists()


def test_methods_of_ones_own_with_their_options(tmp_path, monkeypatch):
    code = (
        "from dataclasses import dataclass\nfrom sparse_moon import SET\n\n\nclass Mine(SET):\n    name = 'mine'\n\n"
        "    @dataclass(frozen=True)\n    class Options:\n        '''Its options.\n\n        Args:\n"
        "            strength: of it.\n        '''\n\n        strength: float = 1.0\n\n"
        "    def __init__(self, *arguments, strength, **others):\n"
        "        super().__init__(*arguments, **others)\n        self.strength = strength\n\n"
        "    @classmethod\n    def arguments(cls, options, run):\n"
        "        return {**super().arguments(options, run), 'strength': options.strength}\n"
    )
    with own_files(tmp_path, monkeypatch, (ALGORITHMS,), own_mine=code):
        run = {**SETTINGS, "method": "own_mine.Mine", "out": tmp_path / "run", "progress": False}
        with pytest.raises(ValueError, match="unknown setting 'strenght'; did you mean 'strength'"):
            sm.train(**run, strenght=2.0)
        sm.train(**run, strength=2.0)
        assert json.loads((tmp_path / "run" / "config.json").read_text())["own"] == {"strength": 2.0}


@pytest.mark.parametrize("config, settings, message", [
    (None, {"sparsty": 0.9}, "unknown setting 'sparsty'; did you mean 'sparsity'?"),
    ({"lr": "fast"}, {}, "lr must be a number, got 'fast'"),
    ("moon-cifra10", {}, "moon-cifra10 is neither a file nor one of the presets "),
    ("moon-cifar10", {"epochs": 0}, "epochs must be at least 1 unless weights says"),
    (None, {"method": "nowhere.at.All"}, "importing nowhere.at failed"),
])  # fmt: skip
def test_mistakes(tmp_path, config, settings, message):
    with pytest.raises(ValueError) as error:
        sm.train(config, out=tmp_path / "run", **settings)
    assert message in str(error.value) and not (tmp_path / "run").exists()


def test_a_folder_may_have_the_name_of_a_preset(tmp_path, monkeypatch):
    """As the folder of its run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moon-cifar10").mkdir()
    with pytest.raises(ValueError, match="need lr > 0"):
        sm.train("moon-cifar10", lr=-1.0)
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"other cannot be read: .*Is a directory"):
        sm.train("other")


def test_settings_execute_no_code(tmp_path):
    (tmp_path / "x.yaml").write_text(f"model: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]\n")
    with pytest.raises(ValueError, match=r"x\.yaml cannot be read: could not determine a constructor"):
        sm.train(tmp_path / "x.yaml", out=tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]


@pytest.mark.parametrize("text, message", [("a: [", "cannot be read"), ("[1]", "must hold settings by name, got list")])
def test_files_that_hold_no_settings(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        sm.train(tmp_path / "x.yaml")


@pytest.mark.parametrize("device, backend, expected", [("cuda", "nccl", "cuda:1"), ("cpu", "gloo", "cpu")])
def test_processes_wait_for_the_first_one_as_long_as_it_evaluates(tmp_path, monkeypatch, device, backend, expected):
    """NCCL's watchdog ends processes that wait for 10 minutes."""
    joined, devices = [], []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(dist, "init_process_group", lambda name, timeout: joined.append((name, timeout)))
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))  # by which a device is tried, which may lack
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda: None)
    monkeypatch.setattr("sparse_moon.app.start.train_in", lambda config, *_, **__: devices.append(config.device) or {})
    sm.train(device=device, out=tmp_path / "run")
    ((name, timeout),) = joined
    assert name == backend and timeout >= timedelta(days=1)
    assert devices == ([expected, expected] if device == "cuda" else [expected])
