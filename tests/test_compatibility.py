"""A few of the architectures of benchmarks/compatibility.py, which says more, and torch's older tracers."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

import sparse_moon as sm

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


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_torch_fx_takes_sparse_layers_as_leaves_and_torchscript_dense_ones():
    model = sm.sparsify(resnet18(num_classes=4), sparsity=0.9)
    with pytest.raises(fx.proxy.TraceError):
        fx.symbolic_trace(model)
    leaves = {"leaf_modules": [sm.SparseLinear, sm.SparseConv2d]}
    found = create_feature_extractor(model, ["layer4", "fc"], tracer_kwargs=leaves)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(found(images)["fc"], model(images))
    found(images)["fc"].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ValueError, match="Unknown type annotation: '<class 'sparse_moon"):
        torch.jit.script(model)
    dense = sm.densify(copy.deepcopy(model)).eval()
    torch.testing.assert_close(torch.jit.script(dense)(images), model.eval()(images))
