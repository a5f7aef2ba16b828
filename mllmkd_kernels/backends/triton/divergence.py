"""One token's share of a divergence: the Triton twin of `mllmkd_kernels.divergence`, row for row,
under its names.

With u = log q − log p (p teacher, q student):

* value (f), up to a multiple of q − p, which sums to zero: second-order small where models agree;
* slope (g), ∂f/∂q up to a constant, 0 at u = 0; ∂D/∂a = q·(g − Σ q g), or q − p directly.

Near (|u| < 1/2, of JSD 1) terms come from series; far they are in p and q, because p·expm1(u) may
overflow, and as exact as the larger of the two is. Both are formed and one is chosen. A column that
both models mask (log p = log q = −inf, padding too) contributes 0 to everything.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false
# (A number is no `tl.constexpr` to it, and what `tl.exp2` gives may be a tuple.)

import functools
import math

import triton
import triton.language as tl

from mllmkd_kernels.backends.triton.tiles import (
    LN2,
    LOG2E,
    exp,
    exp_minus_line,
    expm1_near,
    log2,
    log_defect,
)
from mllmkd_kernels.divergence import ONE_SWEEP, PARAMETERS

#: Divergences whose gradient needs mean = Σ_k q_k slope_k before it can be written.
NEEDS_MEAN = frozenset(PARAMETERS) - ONE_SWEEP

#: A probability whose log is less counts for nothing; exp of it and of its opposite are normal.
FAINT = tl.constexpr(-80.0)

#: Terms of a series of JSD, which then is exact to 2e-7 for |u| ≤ 1, whatever the parameter.
TERMS = tl.constexpr(8)


# --- the series of JSD, found on the host --------------------------------------------------------


@functools.lru_cache(maxsize=64)
def constants_of(name: str, param: float) -> tuple[float, ...]:
    """What `terms` takes as `param`: the parameter and, of JSD, two series in u.

    With m = βp + (1−β)q, w = 1−β, M = m/p and L = log M a value is p·(w u eᵘ − M L), the first
    series times p u²; a slope is w·(u − L), the second times u. M vanishes nowhere nearer than
    |u| = π, so 24 terms are more than fp32 can tell from all.
    """
    if name != "jsd":
        return (param,)
    w, n = 1.0 - param, range(24)
    grown = [w / math.factorial(k) for k in n]  # w eᵘ
    m, log_m = [1.0, *grown[1:]], [0.0]
    for k in n[1:]:  # M L' = M'
        log_m.append(m[k] - sum(j * log_m[j] * m[k - j] for j in range(1, k)) / k)
    value = [grown[k - 1] - sum(m[j] * log_m[k - j] for j in range(k)) for k in n[2:]]
    slope = [w * (1.0 - log_m[1]), *(-w * c for c in log_m[2:])]
    return (param, *shortened(value), *shortened(slope))


def shortened(series: list[float]) -> list[float]:
    """`TERMS` terms that are nearly the nearest to `series` for |u| ≤ 1: from the last term on, as
    much of a Chebyshev polynomial is taken away.
    """
    series = list(series)
    while len(series) > TERMS.value:
        degree, c = len(series) - 1, series.pop()
        for k in range(degree // 2):
            i = degree - 2 * k
            c *= -i * (i - 1) / (4 * (k + 1) * (degree - k - 1))
            series[i - 2] -= c
    return series


@triton.jit
def series_of(u, coefficients, FIRST: tl.constexpr):
    """The sum of a series in u; its `TERMS` coefficients start at `FIRST`."""
    c = coefficients[FIRST + TERMS - 1]
    for i in tl.static_range(2, TERMS + 1):  # pyright: ignore[reportGeneralTypeIssues]
        c = coefficients[FIRST + TERMS - i] + u * c
    return c


# --- terms ----------------------------------------------------------------------------------------


@triton.jit
def times(p, x):
    """p · x with 0 · inf = 0: a token without mass contributes nothing."""
    return p * tl.where(p == 0.0, 0.0, x)


@triton.jit
def log_ratio(log_p, log_q):
    """u = log q − log p, 0 where both models mask the token."""
    return tl.where(log_p == log_q, 0.0, log_q - log_p)


@triton.jit
def finite_ratio(log_p, log_q):
    """u with no log-probability below `FAINT`: what it multiplies is less than 1e-34 there."""
    log_p = tl.maximum(log_p, FAINT, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(log_q, FAINT, propagate_nan=tl.PropagateNan.ALL) - log_p


@triton.jit
def difference(p, q, u):
    """q − p, as p · expm1(u) where the two are close."""
    return tl.where(tl.abs(u) < 0.5, p * expm1_near(u), q - p)


@triton.jit
def mixture(p, q, u, lam):
    """Of m = λp + (1−λ)q, with x = m/p − 1 = (1−λ) expm1(u), u finite: value p·(x − log1p x), a
    term of KL(p ‖ m); log m/p; share 1 − p/m.
    """
    w = 1.0 - lam
    x = w * tl.where(tl.abs(u) < 0.5, expm1_near(u), exp(u) - 1.0)
    log2_mix = log2(lam + w * exp(u))
    log_mix, inverse = LN2 * log2_mix, tl.exp2(-log2_mix)
    small, defect = tl.abs(x) < 0.25, log_defect(x)
    value = tl.where(small, p * defect, w * difference(p, q, u) - p * log_mix)
    share = tl.where(small, x * inverse, 1.0 - inverse)
    return value, tl.where(small, x - defect, log_mix), share


@triton.jit
def middle(p, q, u, param):
    """(value, slope) of JSD, u finite. Far they are −β p log m/p + q·slope and −w log m/q, each
    logarithm from the sum that loses nothing where p or q is large; each to 2e-7, which is more of
    a value where β or w is small: hence the wider border.
    """
    near, beta, w = tl.abs(u) < 1.0, param[0], 1.0 - param[0]
    u2 = u * LOG2E
    slope = (-LN2 * w) * log2(w + beta * tl.exp2(-u2))
    value = q * slope - p * ((LN2 * beta) * log2(beta + w * tl.exp2(u2)))
    value = tl.where(near, p * (u * u * series_of(u, param, 1)), value)
    return value, tl.where(near, u * series_of(u, param, 1 + TERMS), slope)


@triton.jit
def terms(log_p, log_q, param, NAME: tl.constexpr):
    """(value, slope) of every token, from normalised log-probabilities and `constants_of`, for
    `param`. A slope is finite where q is 0: their mean is Σ q·slope.
    """
    p, q, u = exp(log_p), exp(log_q), log_ratio(log_p, log_q)
    near, finite = tl.abs(u) < 0.5, finite_ratio(log_p, log_q)
    value, slope = tl.zeros_like(u), tl.zeros_like(u)
    if NAME == "forward_kl":
        value = tl.where(near, p * exp_minus_line(u), q - p - times(p, u))
    elif NAME == "reverse_kl":
        slope = tl.where(q == 0.0, 0.0, u)
        value = tl.where(near, q * exp_minus_line(-u), p - q + q * slope)
    elif NAME == "soft_cross_entropy":
        value = -times(p, log_q)
    elif NAME == "total_variation":
        value = 0.5 * tl.abs(difference(p, q, finite))
        slope = tl.clamp(1e36 * finite, -0.5, 0.5, propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "skew_forward_kl":
        value, _, share = mixture(p, q, finite, param[0])
        slope = (1.0 - param[0]) * share
    elif NAME == "skew_reverse_kl":
        value, log_mix, share = mixture(q, p, -finite, param[0])
        slope = param[0] * share - log_mix
    else:
        tl.static_assert(NAME == "jsd", "unknown divergence")
        value, slope = middle(p, q, finite, param)
    return value, slope


@triton.jit
def gradient(log_p, log_q, slope, mean, NAME: tl.constexpr):
    """∂D/∂a of every token; `slope` and `mean` are looked at for names in `NEEDS_MEAN` only."""
    q = exp(log_q)
    if NAME == "forward_kl" or NAME == "soft_cross_entropy":
        da = difference(exp(log_p), q, log_ratio(log_p, log_q))
    elif NAME == "reverse_kl":  # whose mean is infinite where the teacher forbids a token
        da = times(q, slope - mean)
    else:
        da = q * (slope - mean)
    return da
