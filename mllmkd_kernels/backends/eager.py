"""The chunked algorithm in plain PyTorch: any device, any floating dtype; the fallback and the
cross-check.

Rows are taken C at a time. Both logit blocks of a chunk are formed in fp32 (fp64 for fp64 inputs),
turned into per-row losses and into the gradient block ``dz``, which two products fold into ``dh``
and ``dw``; then the block is forgotten. Gradients are formed with the loss, unscaled: the caller
multiplies them by its incoming gradient.

``diagnostics`` (3, N), where it is given, is filled with H(softmax(z_s/T)), H(softmax(z_t/T)) and
1.0 where some column is the maximum of both rows, else 0.0; without a teacher only with the first,
the student's at T = 1. `settle_` does the rest for all backends.

These functions are the interface of every backend. Conventions: ``vocab`` is the number of shared
columns, a soft-cap of 0.0 means none, all tensors are contiguous, an unwanted gradient is returned
as an empty tensor. Gradients come in the accumulation dtype (fp32, or fp64), since rounding is for
the one who has scaled them; only `logprob_grad`, which has, gives ``dw`` in the weight's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from mllmkd_kernels import divergence as div
from mllmkd_kernels.backends import products
from mllmkd_kernels.backends.products import Gradients, accumulation_dtype, chunks

#: Side of a relation tile: R_s and R_t of 512 × 512 fp32 entries are 2 MiB, the size of a core's L2
#: cache.
RELATION_TILE = 512


def distill_rows(
    hs: Tensor,  # (N, D_s)
    ws: Tensor,  # (V_s, D_s)
    bs: Tensor | None,  # (V_s,)
    ht: Tensor | None,  # (N, D_t); None: no divergence
    wt: Tensor | None,  # (V_t, D_t)
    bt: Tensor | None,  # (V_t,)
    labels: Tensor | None,  # (N,); None: no cross-entropy
    ce_weight: Tensor | None,  # (N,)
    kd_weight: Tensor | None,  # (N,)
    divergence: str,
    param: float,
    temperature: float,
    cap_s: float,
    cap_t: float,
    vocab: int,
    ignore_index: int,
    want_dh: bool,
    want_dw: bool,
    want_db: bool,
    chunk_rows: int,
    diagnostics: Tensor | None = None,  # (3, N), written
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss (scalar), CE and D per row (N,), and the unscaled gradients dh (N, D_s), dw (V_s,
    D_s), db (V_s,).
    """
    acc = accumulation_dtype(hs, ws, bs, ht, wt, bt)
    table = _divergence(divergence, param)
    ce, kd = (torch.zeros(hs.shape[0], dtype=acc, device=hs.device) for _ in range(2))
    loss = torch.zeros((), dtype=torch.float64, device=hs.device)
    grads = Gradients(hs, ws, acc, want_dh, want_dw, want_db)
    check_labels(labels, vocab, ignore_index)
    for rows in chunks(hs.shape[0], chunk_rows):
        z = _softcap_(_logits(hs[rows], ws, bs, vocab, acc), cap_s, hs[rows])
        dz = torch.zeros_like(z) if grads.wanted else None
        if labels is not None and ce_weight is not None:
            ce[rows] = _cross_entropy(z, labels[rows], ce_weight[rows], ignore_index, dz)
            valid = (ce_weight[rows] != 0) & (labels[rows] != ignore_index)
            loss += torch.where(valid, ce_weight[rows] * ce[rows], 0).sum(dtype=torch.float64)
        if ht is not None and wt is not None and kd_weight is not None:
            b = _softcap_(_logits(ht[rows], wt, bt, vocab, acc), cap_t, ht[rows])
            b = b.div_(temperature)
            log_p = b.log_softmax(-1)
            log_q = (z / temperature).log_softmax(-1)
            if diagnostics is not None:
                diagnostics[0, rows] = div.entropies(log_q)
                diagnostics[1, rows] = div.entropies(log_p)
                diagnostics[2, rows] = _agree(z, b)
            kd[rows] = div.values(table, log_p, log_q)
            weight = kd_weight[rows]
            loss += torch.where(weight != 0, weight * kd[rows], 0).sum(dtype=torch.float64)
            if dz is not None:
                da = div.gradients(table, log_p, log_q)
                dz += _scale_rows(da, weight / temperature)
        elif diagnostics is not None:
            diagnostics[0, rows] = div.entropies(z.log_softmax(-1))
        if dz is not None:
            dead = dead_rows(hs, rows, labels, ce_weight, kd_weight, ignore_index)
            grads.add(rows, _through_softcap_(dz, z, cap_s), dead=dead)
    return loss.to(acc), ce, kd, *grads.result()


def logprob_rows(
    h: Tensor,  # (N, D)
    w: Tensor,  # (≥V, D)
    b: Tensor | None,  # (≥V,)
    labels: Tensor,  # (N,)
    temperature: float,
    cap: float,
    vocab: int,
    ignore_index: int,
    chunk_rows: int,
) -> tuple[Tensor, Tensor]:
    """log softmax(z/T)[label] and the log-sum-exp of z/T, both (N,); 0 log-probability where
    ignored.
    """
    acc = accumulation_dtype(h, w, b)
    logp, lse = (torch.zeros(h.shape[0], dtype=acc, device=h.device) for _ in range(2))
    check_labels(labels, vocab, ignore_index)
    for rows in chunks(h.shape[0], chunk_rows):
        a = _softcap_(_logits(h[rows], w, b, vocab, acc), cap, h[rows]).div_(temperature)
        lse[rows] = _logsumexp(a)
        logp[rows] = _at_label(a, labels[rows], ignore_index) - lse[rows]
    return logp.masked_fill_(labels == ignore_index, 0), lse


def logprob_grad(
    grad: Tensor,  # (N,)
    h: Tensor,  # (N, D)
    w: Tensor,  # (≥V, D)
    b: Tensor | None,  # (≥V,)
    labels: Tensor,  # (N,)
    lse: Tensor,  # (N,)
    temperature: float,
    cap: float,
    vocab: int,
    ignore_index: int,
    want_dh: bool,
    want_dw: bool,
    want_db: bool,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dh, dw, db of Σ_n grad[n]·logp[n]; the logits are made again, chunk by chunk."""
    acc = accumulation_dtype(h, w, b)
    grads = Gradients(h, w, acc, want_dh, want_dw, want_db)
    for rows in chunks(h.shape[0], chunk_rows):
        z = _softcap_(_logits(h[rows], w, b, vocab, acc), cap, h[rows])
        weight = -torch.where(labels[rows] == ignore_index, 0, grad[rows].to(acc)) / temperature
        q = (z / temperature - lse[rows, None]).exp_()
        dz = _scale_rows(_minus_one_hot_(q, labels[rows], ignore_index), weight)
        grads.add(rows, _through_softcap_(dz, z, cap), dead=weight == 0)
    dh, dw, db = grads.result()
    return dh, dw.to(w.dtype), db


def relation_stats(
    hs: Tensor,  # (N, D_s) fp32 or fp64
    ks: Tensor,  # (N, D_s): hs @ G_s, or hs itself for a relation of features
    ht: Tensor,  # (N, D_t)
    kt: Tensor,  # (N, D_t)
    cu_seqlens: Tensor,  # (images + 1,) int32
) -> Tensor:
    """<R_s, R_s>, <R_t, R_t>, <R_s, R_t> of every image, (images, 3) fp64, with R = K Hᵀ seen
    tile by tile.
    """
    ends = cu_seqlens.tolist()
    stats = torch.zeros(len(ends) - 1, 3, dtype=torch.float64, device=hs.device)
    for image, i, j in _relation_tiles(ends):
        r_s, r_t = (ks[i] @ hs[j].mT).double(), (kt[i] @ ht[j].mT).double()
        twice = (
            1.0 if i == j else 2.0
        )  # R is symmetric: an off-diagonal tile stands for its mirror image too
        products = ((r_s, r_s), (r_t, r_t), (r_s, r_t))
        stats[image] += twice * torch.stack([(x * y).sum() for x, y in products])
    return stats


def relation_grad(
    hs: Tensor,  # (N, D_s)
    ks: Tensor,  # (N, D_s)
    ht: Tensor,  # (N, D_t)
    kt: Tensor,  # (N, D_t)
    cu_seqlens: Tensor,  # (images + 1,) int32
    coef: Tensor,  # (images, 2) fp64
) -> Tensor:
    """M = dR · H_s of every image, (N, D_s), with dR = coef[0]·R_t + coef[1]·R_s formed tile by
    tile.
    """
    m = torch.zeros_like(hs)
    coef = coef.to(hs.dtype)
    for image, i, j in _relation_tiles(cu_seqlens.tolist()):
        dr = coef[image, 0] * (kt[i] @ ht[j].mT) + coef[image, 1] * (ks[i] @ hs[j].mT)
        m[i] += dr @ hs[j]
        if i != j:
            m[j] += dr.mT @ hs[i]
    return m


def _divergence(name: str, param: float) -> div.Divergence:
    key, _ = div.PARAMETERS[name]
    return div.Divergence(name, **({} if key is None else {key: param}))


def _logits(h: Tensor, w: Tensor, b: Tensor | None, vocab: int, acc: torch.dtype) -> Tensor:
    """h Wᵀ + b in the accumulation dtype."""
    z = torch.empty(h.shape[0], vocab, dtype=acc, device=h.device)
    products.product(h, w[:vocab].mT, z)
    return z if b is None else z.add_(b[:vocab])


def _softcap_(z: Tensor, cap: float, h: Tensor) -> Tensor:
    """c·tanh(z/c) of the logits of `h`; NaN for a row of h that holds an inf, which tanh would
    hide.
    """
    if not cap:
        return z
    broken = ~h.isfinite().all(1, keepdim=True)
    return z.div_(cap).tanh_().mul_(cap).masked_fill_(broken, torch.nan)


def _through_softcap_(dz: Tensor, z: Tensor, cap: float) -> Tensor:
    """dz/dy = 1 − (z/c)² for z = c·tanh(y/c)."""
    return dz.mul_(1 - (z / cap).square_()) if cap else dz


def _logsumexp(z: Tensor) -> Tensor:
    """Row-wise log-sum-exp that keeps NaN: an inf among the logits is an error upstream, not a
    finite loss.
    """
    top = z.amax(-1)
    return (z - top[:, None]).exp_().sum(-1).log_() + top


def _at_label(z: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    safe = labels.masked_fill(labels == ignore_index, 0)
    return z.gather(1, safe[:, None]).squeeze(1)


def _minus_one_hot_(q: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    valid = labels != ignore_index
    return q.scatter_add_(1, labels.masked_fill(~valid, 0)[:, None], -valid.to(q.dtype)[:, None])


def _scale_rows(dz: Tensor, weight: Tensor) -> Tensor:
    """weight[n]·dz[n], exactly 0 for a row of zero weight whatever it holds."""
    scaled = dz.mul_(weight[:, None].to(dz.dtype))
    return scaled.masked_fill_((weight == 0)[:, None], 0)


def dead_rows(
    hs: Tensor,
    rows: slice,
    labels: Tensor | None,
    ce_weight: Tensor | None,
    kd_weight: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """Which of `rows` have no weight at all, neither for a label nor for the teacher."""
    dead = torch.ones(rows.stop - rows.start, dtype=torch.bool, device=hs.device)
    if labels is not None and ce_weight is not None:
        dead = (ce_weight[rows] == 0) | (labels[rows] == ignore_index)
    return dead if kd_weight is None else dead & (kd_weight[rows] == 0)


def _cross_entropy(
    z: Tensor, labels: Tensor, weight: Tensor, ignore_index: int, dz: Tensor | None
) -> Tensor:
    """CE of every row (0 where ignored); adds weight·(softmax(z) − onehot) to `dz`."""
    lse = _logsumexp(z)
    ignored = labels == ignore_index
    if dz is not None:
        q = _minus_one_hot_((z - lse[:, None]).exp_(), labels, ignore_index)
        dz += _scale_rows(q, weight.masked_fill(ignored, 0))
    return (lse - _at_label(z, labels, ignore_index)).masked_fill_(ignored, 0)


def _agree(a: Tensor, b: Tensor) -> Tensor:
    """Is some column the maximum of both rows? (C,) bool."""
    return ((a == a.amax(-1)[:, None]) & (b == b.amax(-1)[:, None])).any(-1)


def settle_(
    diagnostics: Tensor,  # (3, N)
    hs: Tensor,  # (N, D_s)
    labels: Tensor | None,
    ce_weight: Tensor | None,
    kd_weight: Tensor | None,
    ignore_index: int,
) -> None:
    """Agreement is NaN where an entropy is; rows without weight are 0, whatever they hold."""
    diagnostics[2] += 0 * (diagnostics[0] + diagnostics[1])
    every = slice(0, hs.shape[0])
    dead = dead_rows(hs, every, labels, ce_weight, kd_weight, ignore_index)
    diagnostics.masked_fill_(dead, 0)


def check_labels(labels: Tensor | None, vocab: int, ignore_index: int) -> None:
    """On the CPU, where looking costs nothing, a label outside the vocabulary is named;
    elsewhere asserted on device.
    """
    if labels is None or labels.numel() == 0:
        return
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    if labels.device.type != "cpu":
        torch.ops.aten._assert_async.msg(~wrong.any(), "labels: a token outside the vocabulary")
    elif wrong.any():
        row = int(wrong.nonzero()[0])
        raise IndexError(
            f"labels: got {int(labels[row])} at row {row}, "
            f"expected a token in [0, {vocab}) or ignore_index = {ignore_index}"
        )


def _relation_tiles(ends: list[int]) -> Iterator[tuple[int, slice, slice]]:
    """(image, row slice, column slice) of the lower triangle of every image's R."""
    for image, (start, end) in enumerate(pairwise(ends)):
        blocks = [
            slice(start + s.start, start + s.stop) for s in chunks(end - start, RELATION_TILE)
        ]
        for n, i in enumerate(blocks):
            for j in blocks[: n + 1]:
                yield image, i, j
