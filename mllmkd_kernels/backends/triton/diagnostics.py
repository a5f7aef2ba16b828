"""What else do sweeps over the logits see? Entropies, and whether both models favour one token.

An entropy comes from two sums of non-negative terms. With x = (z − top)·scale ≤ 0:

    H = log Σ eˣ − Σ x eˣ / Σ eˣ

Where a row is seen in pieces, each piece knows its own two maxima and a vote: does one of its
columns have both? The vote of a piece counts where its maxima are those of the row. No logit is
compared with one of an earlier sweep, which may have rounded it differently.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mllmkd_kernels.backends.triton.tiles import exp, log_of_sum

#: exp of less is 0 in fp32, and x·exp(x) must be 0 there too, not −inf · 0.
NOTHING_LEFT = tl.constexpr(-200.0)


@triton.jit
def weighted(x):
    """x·exp(x) for x ≤ 0; 0 for −inf."""
    return tl.maximum(x, NOTHING_LEFT) * exp(x)


@triton.jit
def lowered(sum_x, total, step):
    """Σ x·exp(x), given it and Σ exp(x), once every x is lower: by −step ≥ 0."""
    return exp(step) * (sum_x + tl.maximum(step, NOTHING_LEFT) * total)


@triton.jit
def entropy(total, sum_x):
    """H from Σ exp(x), its largest term being 1, and Σ x·exp(x)."""
    return log_of_sum(total) - sum_x / total


@triton.jit
def fold_entropy(step, total, sum_x):
    """H of a row from the sums of its lanes, each of which is higher by −step."""
    return entropy(tl.sum(total * exp(step), 0), tl.sum(lowered(sum_x, total, step), 0))


@triton.jit
def vote(best_s, best_t, agree, z_s, z_t):
    """The maxima and the vote of a row, (R,) each, once the columns of a tile (R, B) are in too."""
    top_s, top_t = tl.max(z_s, 1), tl.max(z_t, 1)
    both = (z_s == tl.expand_dims(top_s, 1)) & (z_t == tl.expand_dims(top_t, 1))
    here = tl.max(tl.where(both, 1.0, 0.0), 1)
    still = tl.where((best_s >= top_s) & (best_t >= top_t), agree, 0.0)
    now = tl.where((top_s >= best_s) & (top_t >= best_t), here, 0.0)
    return tl.maximum(best_s, top_s), tl.maximum(best_t, top_t), tl.maximum(still, now)


def counted(votes: Tensor) -> Tensor:
    """Maxima and votes of pieces of a row, (pieces, 3, N), together: (3, N)."""
    best = votes[:, :2].amax(0)
    counts = (votes[:, :2] == best).all(1) & (votes[:, 2] > 0)
    return torch.cat((best, counts.any(0, keepdim=True).to(best.dtype)))
