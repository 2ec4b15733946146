"""Our layers on torch's own sample inputs of ``conv2d``, ``linear`` and their modules, against torch's results."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import skip_init

from sparse_moon.nn import SparseConv2d, SparseLinear

samples = pytest.importorskip("torch.testing._internal.common_methods_invocations", exc_type=ImportError)
modules = pytest.importorskip("torch.testing._internal.common_modules", exc_type=ImportError)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real"),
]

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
SHARES = {"full": 1.0, "half": 0.5, "empty": 0.0}  # of the weights that exist
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2}


def op(name: str) -> Any:
    return next(info for info in samples.op_db if info.name == f"nn.functional.{name}")


def op_samples() -> list[Any]:
    found = []
    for name in ("conv2d", "linear"):
        for i, sample in enumerate(op(name).sample_inputs("cpu", torch.float64)):
            x, weight = tuple(sample.input.shape), tuple(sample.args[0].shape)
            text = f"{name}-{i}-{'x'.join(map(str, x))}-{'x'.join(map(str, weight))}"
            found.append(pytest.param(name, i, id=text))
    return found


def layer_of(name: str, weight: torch.Tensor, bias: torch.Tensor | None, options: dict[str, Any]) -> Any:
    if name == "linear":
        dense: Any = skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    else:
        channels = weight.shape[1] * options.get("groups", 1)
        dense = nn.Conv2d(channels, weight.shape[0], tuple(weight.shape[2:]), bias=bias is not None, dtype=weight.dtype,
                          **options)  # fmt: skip
    with torch.no_grad():
        dense.weight.copy_(weight)
        if bias is not None:
            dense.bias.copy_(bias)
    return dense


def assert_equal(dense: Any, share: float, x: torch.Tensor) -> None:
    """Output and all gradients of the sparse layer, against those of the dense one with zeros.

    torch's own convolutions of bfloat16 round differently from CPU to CPU (without AVX-512, between the taps too), so
    what counts is the result in float64, which ours may miss by twice as much as torch's and the rounding.
    """
    mask = torch.rand(dense.weight.shape) < share
    sparse = (SparseLinear if isinstance(dense, nn.Linear) else SparseConv2d).from_dense(dense, mask)
    masked = copy.deepcopy(dense)
    with torch.no_grad():
        masked.weight *= mask
    results = []
    for layer in (sparse, masked, copy.deepcopy(masked).double()):
        image = x.detach().clone(memory_format=torch.preserve_format).to(next(layer.parameters()).dtype)
        image.requires_grad_()
        output = layer(image)
        output.backward(torch.linspace(-1, 1, output.numel(), dtype=x.dtype).to(output.dtype).view_as(output))
        weight_grad = layer.values.grad if layer is sparse else layer.weight.grad[mask]
        bias_grad = None if layer.bias is None else layer.bias.grad
        results.append([output, image.grad, weight_grad, bias_grad])
    tolerance = TOLERANCE[x.dtype]
    for ours, theirs, exact in zip(*results, strict=True):
        assert (ours is None) == (exact is None)
        if exact is not None:
            assert ours.dtype == theirs.dtype
            own = (theirs - exact).abs().max().item() if exact.numel() else 0.0
            torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance + 2 * own)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("name", "i"), op_samples())
def test_sample_inputs_of_operators(name: str, i: int, share: str, dtype: torch.dtype) -> None:
    sample = list(op(name).sample_inputs("cpu", dtype))[i]
    weight, bias = (*sample.args, None)[:2]
    dense = layer_of(name, weight, bias, sample.kwargs)
    function = F.linear if name == "linear" else F.conv2d
    torch.testing.assert_close(dense(sample.input), function(sample.input, weight, bias, **sample.kwargs))
    assert_equal(dense, SHARES[share], sample.input)


@pytest.mark.parametrize("name", ["conv2d", "linear"])
def test_sample_inputs_that_are_not_contiguous(name: str) -> None:
    for sample in op(name).sample_inputs("cpu", torch.float64):
        weight, bias = (*sample.args, None)[:2]
        if sample.input.numel():
            assert_equal(layer_of(name, weight, bias, sample.kwargs), 0.5, sample.noncontiguous().input)


@pytest.mark.parametrize("i", range(len(list(op("conv2d").error_inputs("cpu")))))
def test_error_inputs_of_conv2d(i: int) -> None:
    sample = list(op("conv2d").error_inputs("cpu"))[i].sample_input
    weight, bias = (*sample.args, None)[:2]
    options = {key: value * 2 if isinstance(value, tuple) else value for key, value in sample.kwargs.items()}
    with pytest.raises((ValueError, RuntimeError)):
        layer = SparseConv2d.from_dense(layer_of("conv2d", weight, None, options), sparsity=0.0)
        layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        layer(sample.input)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.Linear])
def test_sample_inputs_of_modules(kind: type[nn.Module], share: str, dtype: torch.dtype) -> None:
    info = next(info for info in modules.module_db if info.module_cls is kind)
    for sample in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=True):
        made = sample.constructor_input
        dense = kind(*made.args, **made.kwargs, dtype=dtype)
        x = sample.forward_input.args[0] if sample.forward_input.args else sample.forward_input.kwargs["input"]
        assert_equal(dense, SHARES[share], x)
