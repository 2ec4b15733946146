"""GELU (Hendrycks and Gimpel 2016) and its derivative, of numbers in registers, computed in float32.

ACTIVATION is ``"gelu"``, x Phi(x) with the normal distribution's Phi, or ``"gelu_tanh"``, which puts in place of Phi(x)
(1 + tanh u) / 2 = 1 / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3).

Phi(-|x|) = exp(-x^2 / 2) P(1 / (1 + p |x|)), of the form of Abramowitz and Stegun 7.1.26, with P and p fitted for the
smallest largest error, 5e-9, a tenth of float32's at 1. The derivative needs the same exponential. CUDA's erf, which
has a polynomial for each half of its range, takes 2.1 times the instructions and in the end of a matrix product all
registers. PRECISE divisions take 6 instructions; else a reciprocal is the square of a root's, 3e-7 off.
"""

import triton
import triton.language as tl

# Triton's interpreter wants tensors to the left of these.
_DENSITY = tl.constexpr(0.3989422804014327)  # of the normal distribution at 0
_HALF_LOG2_E = tl.constexpr(0.7213475204444817)
_SLOPE = tl.constexpr(1.5957691216057308)  # 2 u = _SLOPE x + _CUBIC x^3
_CUBIC = tl.constexpr(1.5957691216057308 * 0.044715)
_LOG2_E = tl.constexpr(1.4426950408889634)

_P = tl.constexpr(0.275)
_P1 = tl.constexpr(0.1178092499827511)
_P2 = tl.constexpr(0.04211150072903508)
_P3 = tl.constexpr(0.33393224783502967)
_P4 = tl.constexpr(-0.3309933603758557)
_P5 = tl.constexpr(0.4519986955554259)
_P6 = tl.constexpr(-0.11485832900742707)


@triton.jit
def _reciprocal(x, PRECISE: tl.constexpr):
    if PRECISE:
        return 1 / x
    else:
        root = tl.rsqrt(x)
        return root * root


@triton.jit
def _bell(x):
    """exp(-x^2 / 2)."""
    return tl.exp2(x * x * -_HALF_LOG2_E)


@triton.jit
def _share(x, bell, PRECISE: tl.constexpr):
    """Phi(x)."""
    t = _reciprocal(tl.abs(x) * _P + 1, PRECISE)
    tail = bell * t * (t * (t * (t * (t * (t * _P6 + _P5) + _P4) + _P3) + _P2) + _P1)
    return tl.where(x > 0, 1 - tail, tail)


@triton.jit
def _power(x):
    """exp(-2 u)."""
    return tl.exp2(x * (x * x * (-_CUBIC * _LOG2_E) - _SLOPE * _LOG2_E))


@triton.jit
def gelu(x, ACTIVATION: tl.constexpr):
    """The activation of x, in float32."""
    PRECISE: tl.constexpr = x.dtype == tl.float32
    x = x.to(tl.float32)
    if ACTIVATION == "gelu":
        return x * _share(x, _bell(x), PRECISE)
    else:
        return x * _reciprocal(_power(x) + 1, PRECISE)


@triton.jit
def gelu_derivative(x, ACTIVATION: tl.constexpr):
    """The derivative at x, in float32."""
    PRECISE: tl.constexpr = x.dtype == tl.float32
    x = x.to(tl.float32)
    if ACTIVATION == "gelu":
        bell = _bell(x)
        return _share(x, bell, PRECISE) + x * (bell * _DENSITY)
    else:
        power = _power(x)
        share = _reciprocal(power + 1, PRECISE)
        rest = x * (share * share * power) * (x * x * (3 * _CUBIC) + _SLOPE)
        return tl.where(power < 1e30, share + rest, share)
