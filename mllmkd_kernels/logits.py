"""What can be said of logits without logits? Their spread, and how far the student's are from the
teacher's in squares.

Both are quadratic forms of the hidden states, whose matrices are Grams of the heads:

    mean_k (z_s − z_t)² = (h_s G_s h_s − 2 h_s C h_t + h_t G_t h_t) / V,   C = W_sᵀ W_t
    σ² = h (G/V − w̄ w̄ᵀ) h,   w̄ = the mean row of W

Near convergence the first is a small difference of large numbers, and so is the second where logits
have a large mean: Grams, forms and sums are fp64 whatever the inputs are. A Gram costs V·D²
products, as much as D/2 rows of logits; processors that are slow in fp64 feel it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mllmkd_kernels import checks
from mllmkd_kernels.backends.products import accumulation_dtype
from mllmkd_kernels.casting import autocast
from mllmkd_kernels.relation import check_gram, with_ones
from mllmkd_kernels.relation_ops import grams, head_gram


def logit_std(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None = None,  # (V,)
    *,
    vocab_size: int | None = None,
) -> Tensor:
    """Population standard deviation of each row's logits over the vocabulary: (N,) fp32 (fp64 for
    fp64), differentiable; where it is 0 its gradient is 0.

    Args:
        hidden, weight, bias: the head and its input, as in `fused_linear_distill`.
        vocab_size: columns that take part; default all rows of `weight`.

    Raises:
        TypeError, ValueError, RuntimeError: as in `fused_linear_distill`.
    """
    checks.head("", hidden, weight, bias)
    checks.in_memory("hidden", hidden)
    vocab = checks.vocabulary(vocab_size, weight.shape[0])
    h, w, b = autocast(hidden, weight, bias)
    assert h is not None and w is not None
    ones = torch.ones(1, 1, dtype=w.dtype, device=w.device).expand(vocab, 1)
    gram, total = grams(w, b, ones, None, vocab)  # C = Wᵀ 1 is V·w̄
    variance = _form(with_ones(h.double(), b), gram / vocab - total @ total.mT / vocab**2)
    spread = ~(variance <= 0)  # or NaN
    std = torch.where(spread, variance, 1.0).sqrt().where(spread, 0.0)
    return std.to(accumulation_dtype(h, w, b))


def fused_linear_logit_mse(
    student_hidden: Tensor,  # (N, D_s)
    student_weight: Tensor,  # (V_s, D_s)
    teacher_hidden: Tensor,  # (N, D_t)
    teacher_weight: Tensor,  # (V_t, D_t)
    *,
    row_weight: float | Tensor = 1.0,
    student_bias: Tensor | None = None,  # (V_s,)
    teacher_bias: Tensor | None = None,  # (V_t,)
    vocab_size: int | None = None,
    teacher_gram: Tensor | None = None,  # (D_t, D_t)
) -> tuple[Tensor, Tensor]:
    """Σ_n row_weight[n] · mean_k (z_s − z_t)², exactly, without logits (LLAVADI's logit MSE).

    Rows whose weight is 0 contribute exactly 0.

    Args:
        student_hidden, student_weight, teacher_hidden, teacher_weight, *_bias: the heads as in
            `fused_linear_distill`; only the student's receive gradients. Biases are finite.
        row_weight: a number or (N,); it carries the normalisation.
        vocab_size: shared columns; default the smaller head.
        teacher_gram: cached ``head_gram(..., dtype=torch.float64)`` of the teacher's head, with its
            bias and this `vocab_size`.

    Returns:
        the loss, a scalar, differentiable, and the mean square of every row (N,), detached; fp32
        (fp64 for fp64).

    Raises:
        TypeError, ValueError, RuntimeError: as in `fused_linear_distill`.
    """
    for name, given in (("hidden", teacher_hidden), ("weight", teacher_weight)):
        checks.floating(f"teacher_{name}", given, 2)
    checks.pair(
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias
    )
    vocab = checks.vocabulary(vocab_size, student_weight.shape[0], teacher_weight.shape[0])
    rows = student_hidden.shape[0]
    weight = checks.row_weight("row_weight", row_weight, rows, student_hidden)
    if weight is None:
        weight = student_hidden.new_zeros(rows, dtype=torch.float64)
    teacher = (teacher_hidden, teacher_weight, teacher_bias)
    hs, ws, bs = autocast(student_hidden, student_weight, student_bias)
    ht, wt, bt = autocast(*(None if x is None else x.detach() for x in teacher))
    assert hs is not None and ws is not None and ht is not None and wt is not None
    check_gram("teacher_", teacher_gram, wt, bt, torch.float64)
    gt = head_gram(wt, bt, vocab, True) if teacher_gram is None else teacher_gram.detach()
    xs, xt = (with_ones(finite(h, weight == 0).double(), b) for h, b in ((hs, bs), (ht, bt)))
    gs, cross = grams(ws, bs, wt, bt, vocab)
    squares = _form(xs, gs) - 2 * (xs @ cross * xt).sum(-1) + _form(xt, gt)
    mean = (squares / vocab).clamp(min=0)
    acc = accumulation_dtype(hs, ws, bs, ht, wt, bt)
    return (weight.double() * mean).sum().to(acc), mean.detach().to(acc)


def finite(hidden: Tensor, dead: Tensor) -> Tensor:
    """Hidden states (N, D) without what is not finite in `dead` rows, those without weight: their
    gradient is 0, and through a Gram it would be 0 · NaN.
    """
    return hidden.masked_fill(dead[:, None] & ~hidden.isfinite(), 0)


def _form(x: Tensor, matrix: Tensor) -> Tensor:
    """x M x of each row of x (N, D): (N,)."""
    return (x @ matrix * x).sum(-1)
