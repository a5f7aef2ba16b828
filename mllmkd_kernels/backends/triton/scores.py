"""What of a row does the divergence see: its logits, z/T, or z-scored ones (see `zscore`)?

The scale of z-scored logits is one a row, like 1/T. What goes back through σ is along
a = log q + offset, whose mean is 0.
"""

import triton
import triton.language as tl

from mllmkd_kernels import zscore
from mllmkd_kernels.backends.triton.divergence import gradient
from mllmkd_kernels.backends.triton.tiles import exp, softcap

EPS = tl.constexpr(zscore.EPS)


@triton.jit
def logits(z, bias, columns, vocab, stride, CAP: tl.constexpr, EVEN: tl.constexpr):
    """Final logits of some columns of the row at `z`, −inf past the vocabulary. A product that is
    not finite, from a hidden state that is not, becomes NaN where the soft-cap would hide it.
    """
    if EVEN:  # nothing lies between rows: the mask is one for 16 columns, and the load fills in
        product = tl.load(z + columns, columns < vocab, other=-float("inf"))
    else:
        product = tl.load(z + columns, columns < stride, other=0.0)
    x = product
    if bias is not None:
        x += tl.load(bias + columns, columns < vocab, other=0.0).to(tl.float32)
    if CAP != 0.0:
        x = softcap(x, CAP) + (product - product)
    if CAP != 0.0 or not EVEN:
        x = tl.where(columns < vocab, x, -float("inf"))
    return x


@triton.jit
def spread(
    z, bias, vocab, stride, inverse, CAP: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """(μ, 1/(T(σ + ε)), κ) of the row at `z`. Every lane keeps a running mean and the squares about
    it, so that nothing cancels beside a large μ.
    """
    lanes = tl.arange(0, BLOCK)
    mean = tl.zeros((BLOCK,), tl.float32)
    square = mean
    seen = 0.0
    for start in range(0, vocab, BLOCK):
        x = logits(z, bias, start + lanes, vocab, stride, CAP, EVEN)
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
def offset_of(rest, top, middle, scale):
    """What log q lacks of a."""
    return rest + (top - middle) * scale


@triton.jit
def pull_of(through, forth, mean, centre):
    """κ·Σ G a, from the sums of `along` and the mean Σ q g."""
    return through * (forth - mean * centre)


@triton.jit
def scored(log_q, offset):
    """a of one tile; 0 in the padding."""
    return tl.where(log_q == -float("inf"), 0.0, log_q + offset)


@triton.jit
def along(log_p, log_q, slope, offset, NAME: tl.constexpr):
    """(G a, q a) of one tile, G = ∂D/∂a but for the mean Σ q g."""
    a = scored(log_q, offset)
    return gradient(log_p, log_q, slope, 0.0, NAME) * a, exp(log_q) * a
