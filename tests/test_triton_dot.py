import torch
import triton
import triton.language as tl

from sparse_moon.kernels.dot import round_to_tf32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _round_kernel(p_x, p_output, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(p_output + o, round_to_tf32(tl.load(p_x + o)))


def test_rounding_to_tf32():
    """To the nearest number of 11 bits, halves away from zero; subnormal ones and overflow too."""
    low = torch.cat([torch.arange(0, 2**14, 7), torch.tensor([2**12 - 1, 2**12, 2**12 + 1, 2**13 - 1, 2**14 - 1])])
    high = torch.tensor([0x3F800000, 0x3F7FC000, 0x00000000, 0x00FFC000, 0x7F000000, 0x7F7F8000, 0x41200000])
    bits = (high[:, None] + low).flatten()
    finite = bits[bits < 0x7F800000].int()
    x = torch.cat([finite, finite | -(2**31)])
    x = torch.nn.functional.pad(x, (0, 2**17 - x.numel())).to(DEVICE).view(torch.float32)
    output = torch.empty_like(x)
    _round_kernel[(1,)](x, output, x.numel())
    exact = x.double()
    _, exponent = torch.frexp(exact)
    step = torch.ldexp(torch.ones_like(exact), exponent.clamp(min=-125) - 11)  # between neighbours of 11 bits
    nearest = (exact.abs() / step + 0.5).floor() * step * exact.sign()
    nearest = torch.where(nearest.abs() < 2.0**128, nearest, nearest.sign() * torch.inf)
    assert torch.equal(output.double(), nearest)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0], device=DEVICE)
    output = torch.empty_like(special)
    _round_kernel[(1,)](special, output, 4)
    torch.testing.assert_close(output, special, rtol=0, atol=0, equal_nan=True)
