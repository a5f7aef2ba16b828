"""What do the kernels share? Elementary functions that keep their relative accuracy near 0, and
where a running log-sum-exp starts.

Triton's libdevice exists on NVIDIA only and not in the interpreter, so expm1, log1p and tanh are
made from `tl.exp` and polynomials, with the coefficients of csrc/cpu/vecmath.h. All of it is fp32;
NaN stays NaN.

A running log-sum-exp is a pair: log Σ exp(x) = top + log total. Starting at (`LOWEST`, 0) instead
of (−inf, 0) it never forms inf − inf before it has seen anything, and a +inf still makes the total
NaN.
"""

import triton
import triton.language as tl

#: Where a running maximum starts: below every finite number, and finite.
LOWEST = tl.constexpr(-3.4e38)


@triton.jit
def exp(x):
    """exp(x) in two instructions, 0 below 1e-38: `tl.exp` takes six on NVIDIA's GPUs, four of them
    for what is smaller. As there, the product is rounded: 6e-8·|x| of the result.
    """
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def exp_minus_line(u):
    """exp(u) − 1 − u for |u| ≤ 1 by its series: no cancellation."""
    c = 1 / 362880 + u * (1 / 3628800)
    c = 1 / 40320 + u * c
    c = 1 / 5040 + u * c
    c = 1 / 720 + u * c
    c = 1 / 120 + u * c
    c = 1 / 24 + u * c
    c = 1 / 6 + u * c
    return u * u * (1 / 2 + u * c)


@triton.jit
def expm1_near(u):
    """expm1(u) for |u| ≤ 1."""
    return exp_minus_line(u) + u


@triton.jit
def expm1_both(u):
    """expm1(u) and expm1(−u) for |u| ≤ 1: the even and the odd part of one series."""
    s = u * u
    even = 1 / 40320 + s * (1 / 3628800)
    even = 1 / 720 + s * even
    even = s * (1 / 2 + s * (1 / 24 + s * even))
    odd = 1 / 5040 + s * (1 / 362880 + s * (1 / 39916800))
    odd = u + u * s * (1 / 6 + s * (1 / 120 + s * odd))
    return even + odd, even - odd


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
def log_defect(x, log):
    """x − log1p(x), given log = log1p(x): by its series for |x| < 0.1."""
    c = -1 / 7 + x * (1 / 8)
    c = 1 / 6 + x * c
    c = -1 / 5 + x * c
    c = 1 / 4 + x * c
    c = -1 / 3 + x * c
    return tl.where(tl.abs(x) < 0.1, x * x * (1 / 2 + x * c), x - log)


@triton.jit
def tanh(x):
    """tanh through expm1(2|x|), which is cut at 80, where tanh has long been 1."""
    y = 2.0 * tl.abs(x)
    small = y < 1.0
    y = tl.where(y > 80.0, 80.0, y)
    e = tl.where(small, expm1_near(tl.where(small, y, 0.0)), exp(y) - 1.0)
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
