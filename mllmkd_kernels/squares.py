"""How far are the student's logits from the teacher's in squares, a chunk of rows at a time?

    L = Σ_n w_n · mean_k (z_s − z_t)²,   dz_s = 2 w_n (z_s − z_t) / V

Between the products are a few passes over a block in cache, so plain PyTorch is as fast as they are
on every device: there are no kernels for it. Through Gram matrices, ``h_s G_s h_s − 2 h_s W_sᵀW_t
h_t + h_t G_t h_t``, there would be no logits at all, but 4·V·D_s·(D_s + D_t) FLOPs of fp64, since
it is a small difference near convergence, beside the 2·N·V·(3D_s + D_t) here: fifteen times the
time for 256 rows of D 896 and 2,048 on a processor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mllmkd_kernels.backends import eager, products
from mllmkd_kernels.backends.calls import Head, Options, dtype_of


def logit_mse(
    student: Head, teacher: Head, row_weight: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss (scalar), mean squares of every row (N,), and the unscaled gradients dh, dw, db."""
    h, vocab, acc = student.h, options.vocab, dtype_of(student, teacher)
    n, half = h.shape[0], h.is_cuda and h.dtype == student.w.dtype == torch.bfloat16
    blocks = torch.empty(2, min(n, options.chunk), vocab, dtype=acc, device=h.device)
    rows_of = torch.zeros(n, dtype=torch.float64, device=h.device)
    grads = products.Gradients(h, student.w, acc, *options.wants, options.into)
    dead = row_weight == 0
    for rows in products.chunks(n, options.chunk):
        z, z_t = (
            eager._logits(head.h[rows], head.w, head.b, vocab, acc, block)
            for head, block in zip((student, teacher), blocks, strict=True)
        )
        for strip, off in eager._strips(rows, z):
            off -= z_t[eager._within(strip, rows)]
            broken = 0 * off[:, 0]  # NaN: every product of what is not finite is not either
            rows_of[strip] = off.square().sum(-1, dtype=torch.float64) / vocab + broken
            off.mul_(2 / vocab * row_weight[strip, None]).masked_fill_(dead[strip, None], 0)
        if grads.wanted:
            grads.add(rows, z.to(h.dtype) if half else z, dead=dead[rows])
    loss = torch.where(dead, 0, row_weight * rows_of).sum()
    return loss.to(acc), rows_of.to(acc), *grads.result()
