import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_moon import ops
from sparse_moon.ops.unknown_aware_loss import unknown_aware_loss_reference


def naive(logits, target, w):
    """Equation 1, sample by sample in Python floats."""
    total, u_total, beta, errors = 0.0, 0.0, 0.0, 0
    for z, y in zip(logits.tolist(), target.tolist(), strict=True):
        top = max(z)
        e = [math.exp(v - top) for v in z]
        p = [v / sum(e) for v in e]
        ce, u, wrong = -math.log(p[y]), p[-1], z.index(top) != y
        total += ce * (1 + (w / (1 + w * u) if wrong else 0))
        u_total, beta, errors = u_total + u, beta + (1 - u) * ce, errors + wrong
    n = len(target)
    return total / n, beta / n, u_total / n, errors


@given(batch=st.integers(1, 9), classes=st.integers(1, 7), w=st.sampled_from([0.0, 0.01, 1.0, 4.0]))
def test_value_statistics_and_gradient(batch, classes, w):
    logits = (3 * torch.randn(batch, classes + 1, dtype=torch.float64)).requires_grad_()
    target = torch.randint(0, classes, (batch,))
    loss, statistics = ops.unknown_aware_loss(logits, target, torch.tensor(w, dtype=torch.float64))
    value, beta, mean_u, errors = naive(logits, target, w)
    assert loss.item() == pytest.approx(value)
    assert [s.item() for s in statistics] == pytest.approx([beta, mean_u, errors])

    (2.5 * loss).backward()
    reference = logits.detach().clone().requires_grad_()
    (2.5 * unknown_aware_loss_reference(reference, target, torch.tensor(w, dtype=torch.float64))).backward()
    torch.testing.assert_close(logits.grad, reference.grad)


def test_gradient_against_finite_differences():
    target, w = torch.tensor([0, 1, 2, 0]), torch.tensor(2.0, dtype=torch.float64)
    logits = (4 * torch.randn(4, 4, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: ops.unknown_aware_loss(z, target, w)[0], logits)


def test_the_reference_has_second_derivatives():
    target, w = torch.tensor([0, 1, 2, 0]), torch.tensor(2.0, dtype=torch.float64)
    logits = (4 * torch.randn(4, 4, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: unknown_aware_loss_reference(z, target, w), logits)


def test_without_weight_it_is_the_cross_entropy():
    logits, target = torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0])
    loss, _ = ops.unknown_aware_loss(logits, target, torch.tensor(0.0))
    torch.testing.assert_close(loss, F.cross_entropy(logits, target))


@pytest.mark.parametrize("w", [0.5, 1.0, 2.0])
def test_when_the_unknown_unit_is_pushed_up(w):
    """For a wrong sample dL/dz_u < 0 exactly if ce (1-u) w^2 > (1 + w u)(1 + w + w u)."""
    logits = (6 * torch.randn(400, 5, dtype=torch.float64)).requires_grad_()
    target = torch.randint(0, 4, (400,))
    ops.unknown_aware_loss(logits, target, torch.tensor(w, dtype=torch.float64))[0].backward()
    p = logits.detach().softmax(1)
    ce, u, wrong = -p.gather(1, target[:, None])[:, 0].log(), p[:, 4], logits.argmax(1) != target
    condition = ce * (1 - u) * w**2 > (1 + w * u) * (1 + w + w * u)
    pushed_up = logits.grad[:, 4] < 0
    assert torch.equal(pushed_up[wrong], condition[wrong]) and pushed_up.any() and not pushed_up[~wrong].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_logits_are_computed_in_float32(dtype):
    logits = (8 * torch.randn(6, 5)).to(dtype).requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 0, 1])
    loss, statistics = ops.unknown_aware_loss(logits, target, torch.tensor(1.0))
    assert loss.dtype == statistics.beta.dtype == torch.float32
    exact = logits.detach().double().requires_grad_()
    expected, _ = ops.unknown_aware_loss(exact, target, torch.tensor(1.0))
    torch.testing.assert_close(loss, expected.float())
    loss.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad, exact.grad.to(dtype))


class Made(TorchDispatchMode):
    """Dtypes of what operators make of so many dimensions, views aside."""

    def __init__(self, dim):
        super().__init__()
        self.dim, self.dtypes = dim, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.detach.default and result.dim() == self.dim:
            self.dtypes.add(result.dtype)
        return result


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_backward_pass_makes_nothing_wider_than_the_gradient(dtype, compiled):
    logits = (8 * torch.randn(6, 5)).to(dtype).requires_grad_()
    target, w = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor(1.0)
    _, grad, _ = torch.ops.sparse_moon.unknown_aware_loss(logits.detach(), target, w)
    run = torch.compile(ops.unknown_aware_loss, backend="aot_eager", fullgraph=True) if compiled else None
    loss, _ = (run or ops.unknown_aware_loss)(logits, target, w)
    with Made(2) as made:
        (found,) = torch.autograd.grad(loss, logits, torch.tensor(2.7, dtype=loss.dtype))
    assert torch.equal(found, (grad * torch.tensor(2.7, dtype=loss.dtype)).to(dtype))
    assert compiled or made.dtypes == {dtype}


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1e4, 0.0, -1e4], [0.0, 1e4, 1e4]], requires_grad=True)
    loss, _ = ops.unknown_aware_loss(logits, torch.tensor([1, 0]), torch.tensor(1.0))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
def test_opcheck_and_errors():
    logits, target, w = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 1, 0]), torch.tensor(1.0)
    opcheck(torch.ops.sparse_moon.unknown_aware_loss.default, (logits, target, w))
    with pytest.raises(ValueError, match=r"\(B, K\+1\)"):
        ops.unknown_aware_loss(logits[0], target, w)
    with pytest.raises(ValueError, match=r"target must be int64 \(4,\)"):
        ops.unknown_aware_loss(logits, target[:3], w)
    with pytest.raises(ValueError, match="target must be int64"):
        ops.unknown_aware_loss(logits, target.int(), w)
    with pytest.raises(ValueError, match="w must be a 0-d"):
        ops.unknown_aware_loss(logits, target, torch.ones(1))
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        ops.unknown_aware_loss(logits, torch.tensor([0, 1, 3, 0]), w)
