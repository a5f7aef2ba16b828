"""What do the kernels share? Elementary functions that keep their relative accuracy near 0, and
where a running log-sum-exp starts.

Triton's libdevice exists on NVIDIA only and not in the interpreter, so expm1, log1p and tanh are
made from `tl.exp2` and polynomials. All of it is fp32; NaN stays NaN.

A running log-sum-exp is a pair: log Σ exp(x) = top + log total. Starting at (`LOWEST`, 0) instead
of (−inf, 0) it never forms inf − inf before it has seen anything, and a +inf still makes the total
NaN.
"""

import triton
import triton.language as tl
from triton import knobs
from triton.language.target_info import is_cuda

#: Triton's interpreter knows no inline assembly.
COMPILED = tl.constexpr(not knobs.runtime.interpret)

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)

#: Where a running maximum starts: below every finite number, and finite.
LOWEST = tl.constexpr(-3.4e38)


@triton.jit
def exp(x):
    """exp(x) in two instructions, 0 below 1e-38: `tl.exp` takes six on NVIDIA's GPUs, four of them
    for what is smaller. As there, the product is rounded: 6e-8·|x| of the result.
    """
    return tl.exp2(x * LOG2E)


@triton.jit
def log2(x):
    """log₂(x) for x ≥ 1e-37, as near as x is known: 2e-7 of it or of 1, the larger. One instruction
    on NVIDIA's GPUs, where `tl.log2` takes twenty-six, for what is nearer or smaller.
    """
    if COMPILED and is_cuda():
        y = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        y = tl.log2(x)
    return y


@triton.jit
def exp_minus_line(u):
    """exp(u) − 1 − u for |u| ≤ 1/2: no cancellation. The polynomial of least relative error there,
    2e-8, with the coefficients of csrc/cuda/divergence.cuh.
    """
    c = 1.3981997e-3 + u * 1.9875629e-4
    c = 8.3334522e-3 + u * c
    c = 4.1665796e-2 + u * c
    c = 0.16666665 + u * c
    return u * u * (0.5 + u * c)


@triton.jit
def expm1_near(u):
    """expm1(u) for |u| ≤ 1/2."""
    return exp_minus_line(u) + u


@triton.jit
def log1p(x):
    """log(1 + x) for −1 < x < 2^20. With 1 + x = t·2^n, t in [√½, √2): a polynomial in t − 1, and
    what the sum 1 + x rounded away put back. (`tl.log` is absolutely, not relatively, accurate
    near 1.)
    """
    y = x + 1.0
    lost = (x - (y - 1.0)) / y
    bits = y.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    t = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    n = exponent.to(tl.float32)
    c = -1.1514610310e-1 + t * 7.0376836292e-2
    c = 1.1676998740e-1 + t * c
    c = -1.2420140846e-1 + t * c
    c = 1.4249322787e-1 + t * c
    c = -1.6668057665e-1 + t * c
    c = 2.0000714765e-1 + t * c
    c = -2.4999993993e-1 + t * c
    c = 3.3333331174e-1 + t * c
    square = t * t
    tail = t * square * c + n * -2.12194440e-4 - 0.5 * square + lost
    return n * 0.693359375 + (t + tail) + (x - x)


@triton.jit
def log_defect(x):
    """x − log1p(x) for |x| ≤ 1/4: a polynomial, 2.5e-7 of it."""
    c = -0.15586036 + x * 0.13847944
    c = 0.16612694 + x * c
    c = -0.19958451 + x * c
    c = 0.25000683 + x * c
    c = -0.33333662 + x * c
    return x * x * (0.5 + x * c)


@triton.jit
def tanh(x):
    """tanh through expm1(2|x|), which is e (e + 2) with e = expm1(|x|); |x| is cut at 40, where
    tanh has long been 1.
    """
    y = tl.abs(x)
    y = tl.where(y > 40.0, 40.0, y)
    e = expm1_near(y)
    e = tl.where(y < 0.5, e * (e + 2.0), exp(2.0 * y) - 1.0)
    t = e / (e + 2.0)
    return tl.where(x < 0.0, -t, t)


@triton.jit
def softcap(y, cap):
    """c·tanh(y/c)."""
    return cap * tanh(y / cap)


@triton.jit
def softcap_slope(z, cap):
    """d(softcap)/dy = 1 − (z/c)², from the capped z."""
    r = z / cap
    return 1.0 - r * r


@triton.jit
def log_of_sum(total):
    """The log of a sum of exps of which the largest is 1; exactly 0 for a total of 1."""
    return log1p(total - 1.0)
