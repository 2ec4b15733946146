"""The code of README.md and docs/ runs, and its commands are ones that the program takes.

A Python block needs names from elsewhere, a model or a loader. A comment before it, ``<!-- prelude: NAME -->``, says
which of the preludes below makes them.
"""

import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch
from torch import distributed

import small_frameworks
from sparse_moon.app.cli import _parser, _with_presets, main
from sparse_moon.reliability import RELIABILITY

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- prelude: (?P<prelude>\w+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
BLOCKS = [(page, match) for page in PAGES for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def data(epochs=2, batches=75):
    """Images (4, 3, 16, 16) of a pattern for each of 10 classes."""
    patterns, labels = torch.randn(10, 3, 16, 16), torch.randint(0, 10, (batches, 4))
    return {"epochs": epochs, "loader": [(patterns[y] + torch.randn(4, 3, 16, 16), y) for y in labels]}


def dense():
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3)]
    head = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.ReLU(), torch.nn.Linear(8, 10)]
    return {"model": torch.nn.Sequential(*layers, *head), "steps": 1000}


def training():
    import sparse_moon as sm

    model = sm.sparsify(dense()["model"], 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    method = sm.RigL(model, optimizer, total_steps=150)
    return {**data(), "model": model, "optimizer": optimizer, "method": method,
            "criterion": torch.nn.CrossEntropyLoss()}  # fmt: skip


def training_dense():
    found = data()
    return {**found, **dense(), "steps": len(found["loader"]), "criterion": torch.nn.CrossEntropyLoss()}


def captured():
    warnings.filterwarnings("ignore", "training steps are not captured")  # without a GPU; pytest undoes it
    device, network = "cuda" if torch.cuda.is_available() else "cpu", dense()["model"]
    del network[6]  # a rectifier that dies at this page's learning rate, after which all gradients are 0
    return {**data(), "network": network, "criterion": torch.nn.CrossEntropyLoss(), "device": device}


def ood():
    names = ("train", "test", "validation", "svhn", "textures")
    batches = {name: [(torch.randn(40, 3, 8, 8), torch.randint(0, 10, (40,))) for _ in range(4)] for name in names}
    return {"model": dense()["model"], "images": torch.randn(5, 3, 8, 8), **batches}


def service():
    """What the page's commands before leave in the folder."""
    main(
        [
            "train",
            "--model",
            "mlp",
            "--width",
            "16",
            "--epochs",
            "1",
            "--interval",
            "5",
            "--ood",
            "noise",
            "--out",
            "RUN",
        ]
    )
    main(["export", "RUN", "--dense", "model.pt"])
    main(["eval", "RUN", "--score", "dice", "--save-detector", "dice.pt"])
    return {"images": torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)}


def hub():
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    return {}


def one_process():
    """That of a group alone; the test ends the group."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    return {**data(epochs=1, batches=105), **dense(), "device": "cpu", "resumes": False}


def empty():
    return {}


PRELUDES = {
    "hub": hub,
    "one_process": one_process,
    "empty": empty,
    "data": data,
    "dense": dense,
    "training": training,
    "training_dense": training_dense,
    "captured": captured,
    "ood": ood,
    "service": service,
}
PRELUDES |= small_frameworks.PRELUDES


def place(page, match):
    return f"{page.name}:{page.read_text(encoding='utf-8')[: match.start('code')].count(chr(10)) + 1}"


PYTHON = [pytest.param(match, id=place(page, match)) for page, match in BLOCKS if match["language"] == "python"]


def execute(match, **names):
    exec(compile(match["code"], "snippet", "exec"), names)


@pytest.mark.parametrize("match", PYTHON)
def test_python_runs(match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert match["prelude"] in PRELUDES, f"say before the block which prelude it needs, of {list(PRELUDES)}"
    for package in ("onnx", "onnxscript") if "to_onnx" in match["code"] else ():
        pytest.importorskip(package, reason=f"{package} is not installed")
    before = set(RELIABILITY)
    try:
        execute(match, **PRELUDES[match["prelude"]]())
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    for name in RELIABILITY.keys() - before:  # that the page has defined
        del RELIABILITY[name]


@pytest.mark.parametrize("epochs, batches", [(1, 150), (6, 25)])
def test_the_training_loop_runs_for_any_number_of_epochs(epochs, batches):
    execute(
        next(match for page, match in BLOCKS if page.name == "README.md" and match["language"] == "python"),
        **data(epochs, batches),
    )


def commands():
    """Each ``sparse-moon ...`` in a block without language, and each in the text that has an option."""
    for page, match in BLOCKS:
        if not match["language"]:
            lines = match["code"].replace("\\\n", " ").splitlines()
            for command in (part.strip() for line in lines for part in line.split("&&")):
                if command.startswith("sparse-moon "):
                    yield pytest.param(command, id=f"{page.name} {command}")
    for page in PAGES:
        for command in re.findall(r"`(sparse-moon \w+ --[^`]*)`", BLOCK.sub("", page.read_text(encoding="utf-8"))):
            yield pytest.param(command, id=f"{page.name} {command}")


@pytest.mark.parametrize("command", list(commands()))
def test_commands_are_taken(command):
    _, *arguments = shlex.split(command, comments=True)
    _parser("sparse-moon").parse_args(_with_presets(arguments))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_exist(page, capsys):
    known = set()
    for command in ([], ["train"], ["compare"], ["eval"], ["flops"], ["export"], ["doctor"]):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        known |= set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    named = {option for code in re.findall(r"`(--[^`]*|sparse-moon [^`]*)`", text)
             for option in re.findall(r"--[a-z][a-z-]*", code)}  # fmt: skip
    assert named <= known


def test_every_command_of_a_script_names_a_file():
    for page, match in BLOCKS:
        for script in re.findall(r"python (\S+\.py)", match["code"]):
            assert (ROOT / script).is_file(), f"{page.name}: {script}"
