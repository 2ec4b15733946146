"""The Triton kernels of sparse_conv2d against float64 convolutions with the scattered weight."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from sparse_moon.topology import Topology, matrix_shape, matrix_to_weight, weight_to_matrix

kernels = pytest.importorskip("sparse_moon.kernels.sparse_conv2d")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAUNCHERS = ("sparse_conv2d", "sparse_conv2d_input_grad", "sparse_conv2d_values_grad")


class Case:
    """A convolution with random operands, its three products by the kernels, by PyTorch and in float64."""

    def __init__(
        self, weight_shape, size, block, *, batch=2, density=0.3, stride=(1, 1), padding=(0, 0), dilation=(1, 1),
        groups=1, bias=True, dtype=torch.float32, allow_tf32=False, topology=None,
    ):  # fmt: skip
        self.topology = topology or Topology.random(matrix_shape(weight_shape), density, block)
        self.geometry = dict(
            weight_shape=weight_shape, stride=stride, padding=padding, dilation=dilation, groups=groups
        )
        self.allow_tf32 = allow_tf32
        self.conv = (stride, padding, dilation, groups)
        outputs, channels = weight_shape[0], weight_shape[1] * groups
        scale = max(1, self.topology.nnz / outputs) ** -0.5
        self.x = self.images(torch.randn(batch, channels, *size), dtype)
        self.values = (torch.randn(self.topology.values_shape) * scale).to(DEVICE, dtype)
        self.bias = torch.randn(outputs).to(DEVICE, dtype) if bias else None
        self.topology = self.topology.to(DEVICE)
        self.dy = self.images(
            torch.randn_like(self.products(torch.float64)[0], dtype=torch.float32, device="cpu"), dtype
        )

    @staticmethod
    def images(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)

    def products(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Output and, where there is an upstream gradient, both gradients by PyTorch in ``dtype``."""
        block, shape = self.topology.block, self.geometry["weight_shape"]
        weight = matrix_to_weight(self.topology.to_dense(self.values.to(dtype)), shape, block[1])
        x = self.x.to(dtype)
        y = F.conv2d(x, weight, self.bias if self.bias is None else self.bias.to(dtype), *self.conv)
        if not hasattr(self, "dy"):
            return (y,)
        dy = self.dy.to(dtype)
        dw = weight_to_matrix(conv2d_weight(x, shape, dy, *self.conv), block[1])
        return y, conv2d_input(x.shape, weight, dy, *self.conv), self.topology.gather(dw)

    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where the kernels write: NaN until then."""
        return tuple(torch.full_like(t, torch.nan) for t in (self.dy, self.x, self.values))  # type: ignore[return-value]

    def launch(self, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        row_ptr, col, *transpose = self.topology.index
        rest = self.geometry | dict(allow_tf32=self.allow_tf32)
        kernels.sparse_conv2d(self.x, self.values, self.bias, row_ptr, col, outputs[0], **rest)
        if self.topology.block[1] > 1:
            kernels.sparse_conv2d_input_grad(self.dy, self.values, *transpose, outputs[1], **rest)
        else:  # of vectors there is none
            outputs[1].zero_()
        kernels.sparse_conv2d_values_grad(self.dy, self.x, row_ptr, col, outputs[2], **rest)

    def check(self) -> None:
        """Error against float64 at most twice PyTorch's own in the same dtype."""
        outputs = self.outputs()
        self.launch(outputs)
        dtype = self.x.dtype
        for name, ours, torchs, exact in zip(
            LAUNCHERS, outputs, self.products(dtype), self.products(torch.float64), strict=True
        ):
            assert not ours.isnan().any(), f"{name} left something unwritten"
            if name == "sparse_conv2d_input_grad" and self.topology.block[1] == 1:
                continue
            if exact.numel() == 0:
                continue
            error, allowed = ((t.double() - exact).abs().max().item() for t in (ours, torchs))
            floor = torch.finfo(dtype).eps * exact.abs().max().item() + 1e-30
            assert error <= 2 * allowed + floor, f"{name}: error {error:.2e}, PyTorch's {allowed:.2e}"


@pytest.mark.parametrize("block", [(16, 16), (32, 32), (8, 1), (16, 1), (32, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_patterns(block, dtype):
    channels = 32 if block[1] > 1 else 5
    Case((32, channels, 3, 3), (5, 6), block, padding=(1, 1), dtype=dtype, allow_tf32=dtype != torch.float32).check()


@pytest.mark.parametrize("block", [(64, 64), (128, 128)])
def test_large_blocks(block):
    side = block[0]
    Case((2 * side, side, 1, 2), (3, 4), block, batch=1, density=0.5, padding=(0, 1)).check()


GEOMETRIES = {
    "pointwise": dict(kernel=(1, 1)),
    "pointwise, stride 2, padding": dict(kernel=(1, 1), stride=(2, 2), padding=(1, 1)),
    "stride 2": dict(kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
    "stride (2, 1)": dict(kernel=(3, 3), stride=(2, 1), padding=(1, 0)),
    "stride 3, input that no tap reaches": dict(kernel=(2, 2), stride=(3, 3)),
    "5 x 5": dict(kernel=(5, 5), padding=(2, 2)),
    "3 x 5, padding (0, 2)": dict(kernel=(3, 5), padding=(0, 2)),
    "1 x 3": dict(kernel=(1, 3), padding=(0, 1)),
    "1 x 15": dict(kernel=(1, 15), padding=(0, 7)),
    "15 x 1": dict(kernel=(15, 1), padding=(7, 0)),
    "dilation 2": dict(kernel=(3, 3), padding=(2, 2), dilation=(2, 2)),
    "dilation (1, 2), stride (1, 2)": dict(kernel=(3, 3), padding=(2, 1), dilation=(1, 2), stride=(1, 2)),
    "padding beyond the kernel": dict(kernel=(1, 3), padding=(2, 2)),
    "2 groups": dict(kernel=(3, 3), padding=(1, 1), groups=2),
    "2 groups, stride 2": dict(kernel=(3, 3), padding=(1, 1), groups=2, stride=(2, 2)),
}


@pytest.mark.parametrize("block", [(16, 16), (8, 1)])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name, block):
    geometry = dict(GEOMETRIES[name])
    channels = 16 if block[1] > 1 else 3
    outputs = 32 if "groups" in geometry else 16
    Case((outputs, channels, *geometry.pop("kernel")), (7, 9), block, batch=1, **geometry).check()


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (3, 3), (13, 11)])
@pytest.mark.parametrize("block", [(16, 16), (8, 1)])
def test_odd_planes_of_one_image(size, block):
    Case((16, 16, 3, 3), size, block, batch=1, padding=(1, 1), bias=False).check()


@pytest.mark.parametrize("block", [(16, 16), (8, 1)])
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full(block, density):
    Case((16, 16, 3, 3), (4, 3), block, density=density, padding=(1, 1)).check()


@pytest.mark.parametrize("block", [(16, 16), (8, 1)])
def test_empty_rows_and_columns(block):
    grid = (32 // block[0], 32 * 9 // block[1])
    kept = torch.rand(grid) < 0.4
    kept[1::2] = False  # every second block row, among them the last
    kept[:, :11] = False  # the first columns: in block 16 all taps of the first channels and two more
    mask = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    Case((32, 32, 3, 3), (4, 4), block, padding=(1, 1), topology=Topology.from_mask(mask, block)).check()


@pytest.mark.parametrize("block", [(16, 16), (8, 1)])
def test_no_images(block):
    case = Case((16, 16, 3, 3), (4, 4), block, batch=1)
    case.x, case.dy = case.x[:0], case.dy[:0]
    outputs = case.outputs()
    case.launch(outputs)
    assert not outputs[2].any()


@pytest.mark.parametrize("block", [(16, 16), (8, 1)])
def test_splits_and_image_groups(block, monkeypatch):
    """Many partial sums, and an input copied in unequal groups of images."""
    monkeypatch.setattr(kernels, "COPY_BYTES", 16 * 3 * 9 * 8 * 4 * 2)  # two images
    case = Case((16, 16, 3, 3), (7, 6), block, batch=5, padding=(1, 1), density=0.1)
    grids = [
        launch.grid
        for launch in kernels.values_grad_launches(
            case.dy, case.x, *case.topology.index[:2], case.values, kernels.Geometry(**case.geometry), False
        )
        if launch.kernel is kernels.values_grad_kernel
    ]
    assert sum(grid[1] for grid in grids) > 1
    assert len(grids) == (1 if block[1] > 1 else 3)
    case.check()


def test_infinite_input_stays_where_no_weight_reads_it():
    """Masked and padded parts of a tile must not multiply by zero what they did not have to read."""
    case = Case((16, 32, 1, 1), (3, 3), (16, 16), density=0.5)
    unread = 16 * (1 - case.topology.col.item())
    case.x[:, unread : unread + 16] = torch.inf
    outputs = case.outputs()
    case.launch(outputs)
    assert outputs[0].isfinite().all()
    assert outputs[2].isfinite().all()


def test_takes():
    assert kernels.takes((32, 32), (64, 32, 3, 3), 2, torch.bfloat16)
    assert kernels.takes((8, 1), (64, 3, 7, 7), 1, torch.float32)
    assert not kernels.takes((32, 32), (64, 48, 3, 3), 1, torch.float16)
    assert not kernels.takes((32, 32), (96, 32, 3, 3), 2, torch.float16)
    assert kernels.takes((32, 32), (64, 64, 15, 15), 1, torch.float16)
    assert not kernels.takes((32, 32), (64, 64, 1, 16), 1, torch.float16)
    assert not kernels.takes((1, 1), (64, 64, 3, 3), 1, torch.float32)
    assert not kernels.takes((8, 8), (64, 64, 3, 3), 1, torch.float32)
    assert not kernels.takes((32, 32), (64, 64, 3, 3), 1, torch.float64)


def test_refuses_what_it_cannot_do():
    case = Case((16, 16, 1, 1), (4, 4), (16, 16))
    row_ptr, col = case.topology.index[:2]
    rest = case.geometry | dict(allow_tf32=False)
    with pytest.raises(ValueError, match="must be channels_last, got strides"):
        kernels.sparse_conv2d(case.x.contiguous(), case.values, None, row_ptr, col, case.dy, **rest)
    with pytest.raises(ValueError, match=r"no kernel for block \(16, 4\)"):
        kernels.sparse_conv2d(case.x, case.values.view(-1, 16, 4), None, row_ptr, col, case.dy, **rest)
    case = Case((16, 16, 1, 1), (4, 4), (8, 1))
    with pytest.raises(ValueError, match=r"no kernel for the input gradient of vectors, got blocks \(8, 1\)"):
        kernels.sparse_conv2d_input_grad(case.dy, case.values, *case.topology.index[2:], case.x, **rest)


SMALL = [(block, dtype) for block in kernels.BLOCKS for dtype in (torch.float16, torch.bfloat16, torch.float32)]


@pytest.mark.gpu
@pytest.mark.parametrize(("block", "dtype"), SMALL)
@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
def test_every_dtype_on_the_gpu(block, dtype, stride, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", dtype != torch.float32)
    Case((256, 128, 3, 3), (17, 19), block, batch=8, stride=stride, padding=(1, 1), dtype=dtype).check()


@pytest.mark.gpu
@pytest.mark.parametrize("block", [(32, 32), (16, 1)])
def test_tf32_on_the_gpu(block, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    Case((256, 256, 3, 3), (16, 16), block, batch=8, padding=(1, 1), allow_tf32=True).check()


@pytest.mark.gpu
@pytest.mark.parametrize("block", [(32, 32), (16, 1)])
@pytest.mark.parametrize("channels", [256, 512])
def test_large(block, channels):
    case = Case(
        (channels, channels, 3, 3), (16, 16), block, batch=64, density=0.05, padding=(1, 1), dtype=torch.bfloat16
    )
    case.check()
    first, second = case.outputs(), case.outputs()
    case.launch(first)
    case.launch(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)  # the same bits


@pytest.mark.gpu
def test_offsets_beyond_31_bits():
    """An input of 2^31 elements; only its last image is looked at."""
    case = Case((32, 128, 1, 1), (64, 64), (32, 32), batch=1, density=0.5, dtype=torch.bfloat16)
    batch = 2**31 // (128 * 64 * 64) + 1
    x = torch.empty(batch, 128, 64, 64, dtype=torch.bfloat16, device=DEVICE, memory_format=torch.channels_last)
    x.zero_()[-1] = case.x[0]
    output = torch.empty(batch, 32, 64, 64, dtype=torch.bfloat16, device=DEVICE, memory_format=torch.channels_last)
    row_ptr, col = case.topology.index[:2]
    kernels.sparse_conv2d(x, case.values, case.bias, row_ptr, col, output, **case.geometry, allow_tf32=True)
    small = torch.empty_like(output[-1:], memory_format=torch.channels_last)
    kernels.sparse_conv2d(case.x, case.values, case.bias, row_ptr, col, small, **case.geometry, allow_tf32=True)
    assert torch.equal(output[-1:], small)


@pytest.mark.gpu
@pytest.mark.parametrize("block", [(32, 32), (16, 1)])
def test_capture_and_replay(block):
    case = Case((128, 128, 3, 3), (16, 16), block, batch=16, density=0.1, padding=(1, 1), dtype=torch.bfloat16)
    expected, captured = case.outputs(), case.outputs()
    case.launch(expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.launch(captured)
    for output in captured:
        output.fill_(torch.nan)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)
