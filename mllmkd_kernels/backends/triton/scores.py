"""What of a row does the divergence see: its logits, z/T, or z-scored ones (see `zscore`)?"""

import triton
import triton.language as tl

from mllmkd_kernels import zscore
from mllmkd_kernels.backends.triton.divergence import gradient
from mllmkd_kernels.backends.triton.tiles import logits

EPS = tl.constexpr(zscore.EPS)


@triton.jit
def scaled(x, by, SCALED: tl.constexpr, SCORED: tl.constexpr):
    """x / T, with T = 1 x itself; z-scored (x − μ)/(T(σ + ε)). `by` is (μ, 1/T or 1/(T(σ + ε)))."""
    if SCORED:
        x = x - by[0]
    if SCALED:
        x = x * by[1]
    return x


@triton.jit
def spread(z, bias, vocab, stride, inverse, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """(μ, 1/(T(σ + ε)), κ) of the row at `z`: see `zscore`. Every lane keeps a running mean and
    the squares about it, so that nothing cancels beside a large μ.
    """
    lanes = tl.arange(0, BLOCK)
    mean = tl.zeros((BLOCK,), tl.float32)
    square = mean
    seen = 0.0
    for start in range(0, vocab, BLOCK):
        x = logits(z, bias, start + lanes, vocab, stride, CAP)
        seen += 1.0
        off = tl.where(start + lanes < vocab, x - mean, 0.0)
        mean += off / seen
        square += off * tl.where(start + lanes < vocab, x - mean, 0.0)
    count = tl.maximum((vocab - lanes + BLOCK - 1) // BLOCK, 0).to(tl.float32)
    middle = tl.sum(count * mean, 0) / vocab
    off = mean - middle
    std = tl.sqrt(tl.sum(square + count * off * off, 0) / vocab)
    whole = std + EPS
    through = tl.where(std == 0.0, 0.0, whole / (std * vocab * inverse * inverse))
    return middle, inverse / whole, through


@triton.jit
def scored_weight(kd_w, scale, inverse):
    """kd_weight/(T(σ + ε)) of kd_weight/T; 0 stays 0, whatever the row holds."""
    return tl.where(kd_w == 0.0, 0.0, kd_w * (scale / inverse))


@triton.jit
def along(a, log_p, log_q, slope, NAME: tl.constexpr):
    """(G a, q a) of one tile, G = ∂D/∂a but for the mean Σ q g; a is −inf in the padding."""
    a = tl.where(a == -float("inf"), 0.0, a)
    return gradient(log_p, log_q, slope, 0.0, NAME) * a, tl.exp(log_q) * a
