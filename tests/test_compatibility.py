"""A few of the architectures of benchmarks/compatibility.py, which says more."""

import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FEW = [
    ("timm", "mobilenetv3_small_050", "said"),  # its head is timm's own Linear
    ("timm", "convnext_atto", "reached"),
    ("transformers", "GPT-2", "said"),
    ("transformers", "GPT-2 classifier", "said"),
    ("transformers", "Mixtral", "said"),
    ("transformers", "BERT", "said"),
    ("torchvision", "VisionTransformer", "said"),  # its positions, in a network this small
    ("torch", "TransformerEncoder", "reached"),
    ("torch", "LSTM language model", "said"),
]


@pytest.fixture
def compatibility(monkeypatch: pytest.MonkeyPatch) -> Any:
    if not (BENCHMARKS / "compatibility.py").exists():
        pytest.skip("the benchmarks are not here")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import compatibility

    yield compatibility
    for name in ("compatibility", "timing"):
        sys.modules.pop(name, None)


@pytest.mark.filterwarnings("ignore")  # of these libraries
@pytest.mark.parametrize(("library", "name", "outcome"), FEW)
def test_architectures_work_and_no_shortfall_is_silent(
    compatibility: Any, library: str, name: str, outcome: str
) -> None:
    if library != "torch":
        pytest.importorskip(library)
    (architecture,) = [a for a in compatibility.LIBRARIES[library]() if a.name == name]
    row = compatibility.try_out(architecture)
    assert row.outcome == outcome
    failed = {check: text for check, text in row.checks.items() if text != "ok"}
    if name == "GPT-2":  # its tables, one of which is the head's weight, and no Conv1D
        assert list(row.dense) == ["Embedding"]
    assert failed == {} and name in list(compatibility.table([row]))[2]
