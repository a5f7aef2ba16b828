"""What can be said of a head's logits? How wide they spread, how far they are from another's."""

from __future__ import annotations

import torch
from torch import Tensor

from mllmkd_kernels import checks, ops, relation_ops
from mllmkd_kernels.backends.products import accumulation_dtype
from mllmkd_kernels.casting import autocast, wants
from mllmkd_kernels.relation import with_ones


def logit_std(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None = None,  # (V,)
    *,
    vocab_size: int | None = None,
) -> Tensor:
    """Population standard deviation of each row's logits over the vocabulary: (N,) fp32 (fp64 for
    fp64), differentiable; where it is 0 its gradient is 0.

    Through the Gram matrix of the head, ``σ² = h (G/V − w̄ w̄ᵀ) h`` with w̄ the mean row of W, so
    there are no logits; in fp64, because it is a small difference where logits have a large mean.
    G costs V·D² products, as much as D/2 rows of logits, whatever N is; a bias, one copy of the
    head. Inside a divergence, `fused_linear_distill` with ``standardize=True`` needs no G.

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
    wide = w if b is None else torch.cat((w, b[:, None]), 1)
    both = relation_ops.head_gram(wide, wide.new_ones(wide.shape[0]), vocab, True)  # of [W 1]
    gram, total = both[:-1, :-1], both[:-1, -1:]  # Wᵀ 1 is V·w̄
    x = with_ones(h.double(), b)
    variance = (x @ (gram / vocab - total @ total.mT / vocab**2) * x).sum(-1)
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
    workspace_mb: float | None = None,
    main_grad: Tensor | None = None,  # (V_s, D_s)
    loss_gradient: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Σ_n row_weight[n] · mean_k (z_s − z_t)² (LLAVADI's logit MSE), a chunk of rows at a time.

    Rows whose weight is 0 contribute exactly 0. Plain PyTorch on every device: see `squares`.

    Args:
        student_hidden, student_weight, teacher_hidden, teacher_weight, *_bias: the heads as in
            `fused_linear_distill`; only the student's receive gradients. Biases are finite.
        row_weight: a number or (N,); it carries the normalisation.
        vocab_size: shared columns; default the smaller head.
        workspace_mb, main_grad, loss_gradient: as in `fused_linear_distill`.

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
    acc = accumulation_dtype(hs, ws, bs, ht, wt, bt)
    want_dh, want_dw, want_db = wants(hs, ws, bs)
    known = checks.loss_gradient(loss_gradient, main_grad, want_dw)
    compute = ops.linear_logit_mse if known is None else ops.linear_logit_mse_added
    loss, squares, *_ = compute(
        hs, ws, bs, ht, wt, bt, weight.to(acc), vocab, want_dh, want_dw, want_db,
        checks.workspace(workspace_mb), checks.main_grad(main_grad, student_weight, acc), known,
    )  # fmt: skip
    return loss, squares.detach()
