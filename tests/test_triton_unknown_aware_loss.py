import math
import sys

import pytest
import torch

from sparse_moon.kernels.unknown_aware_loss import unknown_aware_loss
from sparse_moon.ops.choice import use_backend
from sparse_moon.ops.registry import KERNELS
from sparse_moon.ops.unknown_aware_loss import loss_and_gradient_reference, unknown_aware_loss_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")

# NumPy, under Triton's interpreter, warns of what these tests are about: infinities
infinities = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def run(logits, target, w):
    """Loss, gradient and statistics of the kernel, on the CPU."""
    logits, target = logits.to(DEVICE), target.to(DEVICE)
    outputs = [torch.full(shape, NAN, device=DEVICE) for shape in ((), logits.shape, (3,))]
    unknown_aware_loss(logits, target, torch.as_tensor(w, device=DEVICE), *outputs)
    return tuple(t.cpu() for t in outputs)


def exact(logits, target, w):
    """The same in float64: the gradient by autograd, the prediction as the first of the largest."""
    z = logits.double().requires_grad_()
    loss = unknown_aware_loss_reference(z, target, torch.tensor(float(w), dtype=torch.float64))
    loss.backward()
    p = z.detach().softmax(1)
    ce, u = -z.detach().log_softmax(1).gather(1, target[:, None])[:, 0], p[:, -1]
    classes = torch.arange(z.shape[1])
    predicted = torch.where(z == z.amax(1, keepdim=True), classes, z.shape[1]).amin(1)
    statistics = torch.stack([((1 - u) * ce).mean(), u.mean(), (predicted != target).sum()])
    return loss.detach(), z.grad, statistics


def assert_as_accurate_as_torch(logits, target, w):
    """Error against float64 at most twice that of PyTorch in float32, or two units in the last place."""

    def separate(loss, grad, statistics):
        return loss, grad, *statistics

    kernel = separate(*run(logits, target, w))
    torch32 = separate(*loss_and_gradient_reference(logits, target, torch.tensor(float(w))))
    wanted = separate(*exact(logits, target, w))
    for ours, theirs, right in zip(kernel, torch32, wanted, strict=True):
        error, allowed = (ours - right).abs().max(), 2 * (theirs - right).abs().max() + 2**-22 * right.abs().max()
        assert error <= allowed, (error, allowed)


def make(batch, outputs, dtype=torch.float32):
    return (3 * torch.randn(batch, outputs)).to(dtype), torch.randint(0, max(outputs - 1, 1), (batch,))


def test_one_row_by_hand():
    # p = (1/2, 1/4, 1/4), predicted 0, y = 1: extra = 1 / (1 + 1/4), slope = ln 4 * 0.64 / 4
    ln4 = math.log(4)
    loss, grad, statistics = run(torch.tensor([[math.log(2), 0.0, 0.0]]), torch.tensor([1]), 1.0)
    factor = 1.8 + 0.16 * ln4
    torch.testing.assert_close(loss, torch.tensor(1.8 * ln4))
    torch.testing.assert_close(grad, torch.tensor([[factor / 2, factor / 4 - 1.8, factor / 4 - 0.16 * ln4]]))
    torch.testing.assert_close(statistics, torch.tensor([0.75 * ln4, 0.25, 1.0]))


@pytest.mark.parametrize("w", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("outputs", [2, 11, 33, 1001])
@pytest.mark.parametrize("batch", [1, 7, 130])
def test_against_float64(batch, outputs, w):
    if batch == 130 and outputs == 1001:
        batch = 20  # a program a row is slow to interpret
    assert_as_accurate_as_torch(*make(batch, outputs), w)


@pytest.mark.parametrize("shape", [(1030, 11), (5, 5003), (2, 8192), (3, 8193), (1, 20011)])
def test_several_programs_and_chunks(shape):
    assert_as_accurate_as_torch(*make(*shape), 1.5)


@pytest.mark.parametrize("shape", [(7, 11), (3, 1001), (2, 9000)])
def test_float16_is_computed_in_float32(shape):
    assert_as_accurate_as_torch(*make(*shape, torch.float16), 4.0)


@pytest.mark.parametrize("shape", [(60, 5), (9, 1200), (2, 16500)])
def test_first_of_equal_logits_is_predicted(shape):
    logits = torch.randint(0, 2, shape).float()
    logits[:, -1] = -1.0  # which no label can be
    largest = logits == logits.amax(1, keepdim=True)
    first = torch.where(largest, torch.arange(shape[1]), shape[1]).amin(1)
    assert run(logits, first, 2.0)[2][2] == 0
    last = torch.where(largest, torch.arange(shape[1]), -1).amax(1)
    assert (last != first).any()
    assert run(logits, last, 2.0)[2][2] == (last != first).sum()


def test_equal_logits_in_different_chunks():
    logits = torch.zeros(1, 20000)
    logits[0, [8191, 8192, 19999]] = 2.0
    assert run(logits, torch.tensor([8191]), 1.0)[2][2] == 0
    assert run(logits, torch.tensor([8192]), 1.0)[2][2] == 1
    assert run(torch.zeros(1, 20000), torch.tensor([0]), 1.0)[2][2] == 0


@infinities
@pytest.mark.parametrize("outputs", [4, 9000])
@pytest.mark.parametrize("w", [0.0, 2.0])
def test_extreme_logits_as_the_reference(outputs, w):
    """Large, -inf where the target is not and where it is, a row of -inf, +inf, NaN; a row a call: NaN would hide."""
    inf = float("inf")
    rows = [[1e4, 0.0, -1e4], [0.0, 1e4, 1e4], [-1e4, 1e4, 1e4], [0.0, -inf, 1.0], [-inf, 2.0, -inf]]
    rows += [[-inf, 0.5, 1.0], [-inf, 0.0, -1e4], [-inf, -inf, -inf], [inf, 0.0, 1.0], [0.0, NAN, 1.0]]
    for y, row in zip([1, 0, 0, 0, 1, 0, 0, 0, 1, 0], rows, strict=True):
        # the rest is between them and the unknown unit, so that chunks consist of -inf alone
        logits = torch.cat([torch.tensor(row[:2]), torch.full((outputs - 3,), -inf), torch.tensor(row[2:])])[None]
        target = torch.tensor([y])
        kernel, reference = run(logits, target, w), loss_and_gradient_reference(logits, target, torch.tensor(w))
        for ours, theirs in zip(kernel[:2], reference[:2], strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True)
        torch.testing.assert_close(kernel[2][:2], reference[2][:2], equal_nan=True)
        assert logits.isnan().any() or kernel[2][2] == reference[2][2]


@infinities
@pytest.mark.parametrize("outputs", [6, 9000])
def test_impossible_targets_make_their_rows_nan(outputs):
    logits, target = make(5, outputs)
    bad = target.clone()
    bad[[1, 2, 3]] = torch.tensor([-1, outputs - 1, 2**40])
    loss, grad, statistics = run(logits, bad, 1.0)
    assert loss.isnan() and grad[1:4].isnan().all() and statistics[0].isnan()
    good = run(logits, target, 1.0)
    assert torch.equal(grad[[0, 4]], good[1][[0, 4]]) and statistics[1] == good[2][1] and statistics[2].isnan()


@pytest.mark.parametrize("outputs", [11, 9000])
def test_strided_rows_targets_and_other_dtypes_of_w(outputs):
    logits, target = make(6, outputs + 5)
    view, every_other = logits[::2, 2:-3], target[::2].clamp(max=outputs - 1)
    expected = run(view.contiguous(), every_other.contiguous(), 0.5)
    spread = torch.stack([every_other, torch.full_like(every_other, -7)], 1)[:, 0]
    assert not view.is_contiguous() and not spread.is_contiguous()
    for w in (0.5, torch.tensor(0.5, dtype=torch.float16), torch.tensor(0.5, dtype=torch.float64)):
        for ours, theirs in zip(run(view, spread, w), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_operator_takes_the_kernel_where_it_can(monkeypatch):
    logits, target = (t.to(DEVICE) for t in make(9, 6))
    w = torch.tensor(2.0, device=DEVICE)
    expected = loss_and_gradient_reference(logits, target, w)
    on_gpu = KERNELS["unknown_aware_loss", "cuda"]
    with use_backend("triton"):
        for ours, theirs in zip(on_gpu(logits.t().contiguous().t(), target, w), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    monkeypatch.setitem(sys.modules, "sparse_moon.kernels.unknown_aware_loss", None)  # importing it fails
    for backend in ("cuda", "reference"):
        with use_backend(backend):
            assert torch.equal(on_gpu(logits, target, w)[1], expected[1])
    for backend in ("auto", "kernel"):
        with use_backend(backend):
            with pytest.raises(ImportError):
                on_gpu(logits, target, w)
            assert on_gpu(logits.double(), target, w.double())[0].dtype == torch.float64
    monkeypatch.setattr(sys.modules["sparse_moon.ops.unknown_aware_loss"], "has_triton", lambda: False)
    assert torch.equal(on_gpu(logits, target, w)[1], expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 11), (1024, 1001), (130, 5000), (130, 50001), (70000, 21)])
def test_large_on_the_gpu(shape, dtype):
    logits, target = make(*shape, dtype)
    assert_as_accurate_as_torch(logits, target, 1.0)
    first, second = run(logits, target, 1.0), run(logits, target, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(128, 11), (1024, 1001), (130, 50001)])
def test_graph_replays_with_another_w(shape):
    logits, target = (t.cuda() for t in make(*shape))
    w = torch.tensor(0.0, device="cuda")
    outputs = [torch.zeros(size, device="cuda") for size in ((), shape, (3,))]
    unknown_aware_loss(logits, target, w, *outputs)  # compiled outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        unknown_aware_loss(logits, target, w, *outputs)
    for value in (0.5, 4.0):
        w.fill_(value)
        graph.replay()
        for ours, theirs in zip(outputs, run(logits, target, value), strict=True):
            assert torch.equal(ours.cpu(), theirs)


@pytest.mark.gpu
def test_operator_trains_through_the_kernel():
    logits, target = make(130, 11)
    w = torch.tensor(2.0, device="cuda")
    z = logits.cuda().bfloat16().requires_grad_()
    with use_backend("triton"):
        loss, grad, statistics = torch.ops.sparse_moon.unknown_aware_loss(z, target.cuda(), w)
        loss.backward()
    wanted = exact(logits.bfloat16(), target, 2.0)
    torch.testing.assert_close(loss.cpu(), wanted[0].float())
    torch.testing.assert_close(statistics.cpu(), wanted[2].float())
    assert torch.equal(z.grad, grad.bfloat16())
