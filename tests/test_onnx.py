"""ONNX files and exported programs: of the dense equivalent and of the sparse products."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import sparse_moon as sm

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
import onnx
import onnxruntime

from sparse_moon import files
from sparse_moon.app import models
from sparse_moon.app.cli import main
from sparse_moon.app.evaluate import load_run
from sparse_moon.formats.onnx import to_onnx

pytestmark = pytest.mark.filterwarnings("ignore:.*(does not divide|was asked for|have no weight):UserWarning")


def net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=(1, 2), dilation=(1, 2), groups=2, bias=False), nn.ReLU(),
        nn.Conv2d(32, 32, 2, padding="same"), nn.ReLU(),
        nn.Conv2d(32, 16, 3, padding=1, padding_mode="reflect"), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8, bias=False),
    )  # fmt: skip


class Tokens(nn.Module):
    """A linear layer on (B, T, I)."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16, bias=False)

    def forward(self, x):
        return self.b(self.a(x).relu())


def run(path, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def randomised(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def test_the_command_line(tmp_path):
    """Each form of a finished run computes what its network does."""
    run_folder = tmp_path / "run"
    main(["train", "--model", "mlp", "--width", "32", "--epochs", "1", "--interval", "5", "--ood", "noise", "--quiet",
          "--out", str(run_folder)])  # fmt: skip
    forms = {"folder": "sparse", "onnx": "dense.onnx", "sparse-onnx": "sparse.onnx"}
    main(["export", str(run_folder), *(w for form, name in forms.items() for w in (f"--{form}", str(tmp_path / name)))])
    network = load_run(run_folder).network.eval()
    x = torch.randn(5, 1, 8, 8)
    expected = network(x).detach()
    for name in ("dense.onnx", "sparse.onnx"):
        torch.testing.assert_close(run(tmp_path / name, x), expected, rtol=1e-4, atol=1e-5)
    about = files.read_json(tmp_path / "sparse" / "preprocessing.json")
    kept = {p.key: json.loads(p.value) for p in onnx.load(tmp_path / "sparse.onnx").metadata_props}
    assert kept == about and about["model"] == "mlp" and about["image_size"] == 8
    plain = models.build("mlp", about["num_outputs"], in_channels=1, image_size=8, width=32)
    assert torch.equal(sm.load(tmp_path / "sparse", plain).eval()(x), expected)


BATCH = ({0: torch.export.Dim("batch")},)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("pattern", ["unstructured", "vector4", "block8"])
def test_onnxruntime_computes_the_same(tmp_path, pattern, sparse):
    model = randomised(sm.sparsify(net(), 0.7, pattern=pattern))
    path = tmp_path / "model.onnx"
    to_onnx(model, (torch.randn(2, 3, 16, 16),), path, sparse=sparse, dynamic_shapes=BATCH, metadata={"classes": "8"})
    x = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(run(path, x), model(x).detach(), rtol=1e-4, atol=1e-5)
    written = onnx.load(path)
    onnx.checker.check_model(written)
    assert {p.key: p.value for p in written.metadata_props} == {"classes": "8"}
    layers = sm.sparse_layers(model)
    ours = [node for node in written.graph.node if node.domain == "sparse_moon"]
    assert len(ours) == (len(layers) if sparse else 0)
    assert {f.name for f in written.functions} == ({"DenseWeight", "SparseLinear", "SparseConv2d"} if sparse else set())
    sizes = {i.name: int(np.prod(i.dims)) for i in written.graph.initializer}
    if sparse:  # values and indices, and no dense weight
        assert all(sizes[f"{name}.values"] == layer.topology.nnz for name, layer in layers.items())
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("sparse", [False, True])
def test_tokens(tmp_path, sparse):
    model = sm.sparsify(Tokens(), 0.8).eval()
    x = torch.randn(2, 7, 16)
    to_onnx(model, (x,), tmp_path / "model.onnx", sparse=sparse)
    torch.testing.assert_close(run(tmp_path / "model.onnx", x), model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes(tmp_path, dtype):
    model = sm.sparsify(nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)), 0.7).eval().to(dtype)
    x = torch.randn(3, 32, dtype=dtype)
    to_onnx(model, (x,), tmp_path / "model.onnx", sparse=True)
    torch.testing.assert_close(run(tmp_path / "model.onnx", x), model(x).detach(), rtol=1e-2, atol=1e-3)


def test_layers_with_empty_rows(tmp_path):
    layer = nn.Linear(8, 6)
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[2, 3] = mask[2, 7] = mask[4, 0] = True
    layer = sm.SparseLinear.from_dense(layer, mask).eval()
    x = torch.randn(3, 8)
    to_onnx(layer, (x,), tmp_path / "model.onnx", sparse=True)
    torch.testing.assert_close(run(tmp_path / "model.onnx", x), layer(x).detach())


def test_the_model_is_left_as_it_was(tmp_path):
    model = sm.sparsify(net(), 0.7).train()
    layers = sm.sparse_layers(model)
    to_onnx(model, (torch.randn(2, 3, 16, 16),), tmp_path / "model.onnx")
    assert model.training and sm.sparse_layers(model) == layers


def test_what_cannot_be_exported(tmp_path):
    class Untraceable(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    (tmp_path / "model.onnx").write_text("the one before")
    with pytest.raises(ValueError, match="Untraceable cannot be exported: "):
        to_onnx(Untraceable(4, 4), (torch.randn(2, 4),), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_text() == "the one before"


def test_an_exported_program_runs_in_another_process(tmp_path):
    """``torch.export`` itself: what is sparse in a file needs the package where it runs, what is dense does not."""
    model = randomised(sm.sparsify(net(), 0.7))
    x = torch.randn(2, 3, 16, 16)
    program = torch.export.export(model, (x,), dynamic_shapes=BATCH)
    assert sum("sparse_moon" in str(node.target) for node in program.graph.nodes) == len(sm.sparse_layers(model))
    torch.export.save(program, tmp_path / "sparse.pt2")
    y = torch.randn(4, 3, 16, 16)
    torch.save((y, model(y).detach()), tmp_path / "data.pt")
    torch.export.save(torch.export.export(sm.densify(model), (x,), dynamic_shapes=BATCH), tmp_path / "dense.pt2")
    for file, first in (("sparse.pt2", "import sparse_moon.ops"), ("dense.pt2", "")):
        code = f"""
import torch
{first}
x, expected = torch.load('data.pt')
torch.testing.assert_close(torch.export.load('{file}').module()(x), expected, rtol=1e-4, atol=1e-5)
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
