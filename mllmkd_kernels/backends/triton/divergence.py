"""One token's share of a divergence: the Triton twin of `mllmkd_kernels.divergence`, row for row,
under its names.

With u = log q − log p (p teacher, q student):

* value (f), up to a multiple of q − p, which sums to zero: second-order small where models agree;
* slope (g), ∂f/∂q up to a constant, 0 at u = 0; ∂D/∂a = q·(g − Σ q g), or q − p directly.

Near (|u| < 1) terms come from series; far they are in p and q, because p·expm1(u) may overflow.
A column that both models mask (log p = log q = −inf, padding too) contributes 0 to everything.
"""

import triton
import triton.language as tl

from mllmkd_kernels.backends.triton.tiles import (
    exp,
    exp_minus_line,
    expm1_both,
    expm1_near,
    log1p,
    log_defect,
)
from mllmkd_kernels.divergence import ONE_SWEEP, PARAMETERS

#: Divergences whose gradient needs mean = Σ_k q_k slope_k before it can be written.
NEEDS_MEAN = frozenset(PARAMETERS) - ONE_SWEEP


@triton.jit
def times(p, x):
    """p · x with 0 · inf = 0: a token without mass contributes nothing. Σ `times(q, slope)` is the
    mean that `gradient` asks for.
    """
    return p * tl.where(p == 0.0, 0.0, x)


@triton.jit
def log_ratio(log_p, log_q):
    """u = log q − log p, 0 where both models mask the token."""
    return tl.where(log_p == log_q, 0.0, log_q - log_p)


@triton.jit
def difference(p, q, u):
    """q − p, as p · expm1(u) where the two are close."""
    near = tl.abs(u) < 1.0
    return tl.where(near, p * expm1_near(tl.where(near, u, 0.0)), q - p)


@triton.jit
def mixture(p, q, u, w):
    """Of m = (1−w)p + w q, with x = m/p − 1 = w·expm1(u): value p·(x − log1p x), a term of KL(p ‖
    m); log m/p; share 1 − p/m.
    """
    near = tl.abs(u) < 1.0
    x = w * expm1_near(tl.where(near, u, 0.0))
    # far from u = 0 only expm1(−|u|) is formed: log m/p = u + log1p((1−w) expm1(−u)) for u > 0
    up = u > 0.0
    e = exp(-tl.abs(u))
    t = tl.where(near, x, tl.where(up, 1.0 - w, w) * (e - 1.0))
    log = log1p(t)
    inverse = 1.0 / (1.0 + t)
    share = tl.where(near, x * inverse, 1.0 - tl.where(up, e * inverse, inverse))
    log_mix = log + tl.where(near, 0.0, tl.where(up, u, 0.0))
    value = tl.where(near, p * log_defect(x, log), w * (q - p) - times(p, log_mix))
    return value, log_mix, share


@triton.jit
def middle(p, q, u, w):
    """(value, log m/q), m = (1−w)p + w q: of JSD, (1−w)·KL(p ‖ m) + w·KL(q ‖ m). One logarithm
    serves both: log m/p = log m/q + u.
    """
    near = tl.abs(u) < 1.0
    up_u, down_u = expm1_both(tl.where(near, u, 0.0))
    x_p, x_q = w * up_u, (1.0 - w) * down_u  # m/p − 1, m/q − 1
    # far from u = 0 only expm1(−|u|) is formed, as in `mixture`; there w(1−w)(q − p) cancels
    of_q = near | (u > 0.0)
    t = tl.where(near, x_q, tl.where(of_q, 1.0 - w, w) * (exp(-tl.abs(u)) - 1.0))
    log = log1p(t)
    log_p, log_q = tl.where(of_q, log + u, log), tl.where(of_q, log, log - u)
    value_p = tl.where(near, p * log_defect(x_p, log_p), -times(p, log_p))
    value_q = tl.where(near, q * log_defect(x_q, log_q), -times(q, log_q))
    return (1.0 - w) * value_p + w * value_q, log_q


@triton.jit
def terms(log_p, log_q, param, NAME: tl.constexpr):
    """(value, slope) of every token, from normalised log-probabilities."""
    p, q, u = exp(log_p), exp(log_q), log_ratio(log_p, log_q)
    near = tl.abs(u) < 1.0
    u_near = tl.where(near, u, 0.0)
    value, slope = tl.zeros_like(u), tl.zeros_like(u)
    if NAME == "forward_kl":
        value = tl.where(near, p * exp_minus_line(u_near), q - p - times(p, u))
    elif NAME == "reverse_kl":
        value = tl.where(near, q * exp_minus_line(-u_near), p - q + times(q, u))
        slope = u
    elif NAME == "soft_cross_entropy":
        value = -times(p, log_q)
    elif NAME == "total_variation":
        d = difference(p, q, u)
        value = 0.5 * tl.abs(d)
        # d − d keeps the NaN that comparisons lose
        slope = tl.where(d > 0.0, 0.5, tl.where(d < 0.0, -0.5, 0.0)) + (d - d)
    elif NAME == "skew_forward_kl":
        value, _, share = mixture(p, q, u, 1.0 - param)
        slope = (1.0 - param) * share
    elif NAME == "skew_reverse_kl":
        value, log_mix, share = mixture(q, p, -u, 1.0 - param)
        slope = param * share - log_mix
    else:
        tl.static_assert(NAME == "jsd", "unknown divergence")
        value, log_mix = middle(p, q, u, 1.0 - param)
        slope = (param - 1.0) * log_mix
    return value, slope


@triton.jit
def gradient(log_p, log_q, slope, mean, NAME: tl.constexpr):
    """∂D/∂a of every token; `slope` and `mean` are looked at for names in `NEEDS_MEAN` only."""
    q = exp(log_q)
    if NAME == "forward_kl" or NAME == "soft_cross_entropy":
        da = difference(exp(log_p), q, log_ratio(log_p, log_q))
    else:
        da = times(q, slope - mean)
    return da
