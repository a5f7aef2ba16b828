"""How can a loss of the logits need no logits? Through the Gram matrix of the head.

With ``Z = H Wᵀ`` the relation matrix of an image is ``R = Z Zᵀ = H (WᵀW) Hᵀ``: a D × D matrix ``G =
WᵀW`` replaces all P × V logits. Of R only three scalars per image are kept, ``<R_s,R_s>``,
``<R_t,R_t>``, ``<R_s,R_t>``, so R itself is seen tile by tile. With ``a = ‖R_s‖``, ``b = ‖R_t‖``:

    L = mean over images of 1 − <R_s,R_t>/(ab)
    dR_s = −(R_t/(ab) − <R_s,R_t>·R_s/(a³b)),   M = dR_s H_s,   dH_s = 2 M G_s,   dG_s = H_sᵀ M,
    dW_s = W (dG + dGᵀ)

``G = None`` stands for the identity: the relation of features. Tiles are fp32, sums over tiles
fp64: entries of R reach V·z² ≈ 1e6 while ``1 − cos`` of a nearly aligned pair is 1e-4.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mllmkd_kernels.backends import products
from mllmkd_kernels.backends.products import on_tensor_cores

#: Rows of a head that are gone through at a time, on a CPU in fp32. Hopper's tensor cores truncate
#: the sum at every 16th, by 1e-7 of it at most: 4e-6 in all of so many.
SUMMED_ROWS = 2048


def gram(
    weight: Tensor,  # (≥V, D)
    bias: Tensor | None,  # (≥V,)
    vocab: int,
    double: bool = False,
) -> Tensor:
    """G = WᵀW over the first `vocab` rows, (D, D) fp32, fp64 for fp64 or where asked for; a bias is
    an extra column of W. Products of 16-bit numbers are exact in fp32: a GPU's tensor cores form
    them.
    """
    acc = torch.float64 if double else products.accumulation_dtype(weight, bias)
    size = weight.shape[1] + (bias is not None)
    g = torch.zeros(size, size, dtype=acc, device=weight.device)
    for rows in products.chunks(vocab, SUMMED_ROWS):
        w = _with_bias(weight, bias, rows, acc)
        products.add_product(g, w.mT, w)
    return g


def gram_backward(
    dg: Tensor,  # (D, D)
    weight: Tensor,  # (≥V, D)
    bias: Tensor | None,  # (≥V,)
    vocab: int,
) -> tuple[Tensor, Tensor]:
    """dW = W (dG + dGᵀ) in the weight's dtype, zero beyond `vocab`; db is its last column
    (empty without a bias).
    """
    d, both = weight.shape[1], dg + dg.mT
    dw = torch.zeros_like(weight)
    db = torch.zeros_like(bias) if bias is not None else weight.new_empty(0)
    for rows in products.chunks(vocab, SUMMED_ROWS):
        w = _with_bias(weight, bias, rows, both.dtype)
        total = _product(w, both, w)
        dw[rows] = total[:, :d].to(dw.dtype)
        if bias is not None:
            db[rows] = total[:, d].to(db.dtype)
    return dw, db


def relation(
    backend: ModuleType,
    hs: Tensor,  # (N, D_s)
    gs: Tensor | None,  # (D_s, D_s)
    ht: Tensor,  # (N, D_t)
    gt: Tensor | None,  # (D_t, D_t)
    cu_seqlens: Tensor,  # (images + 1,)
    want_dh: bool,
    want_dg: bool,
    joint: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (scalar) and the unscaled gradients dh (N, D_s), dg (D_s, D_s); an unwanted one
    comes back empty.
    """
    acc = products.accumulation_dtype(hs, gs, ht, gt)
    hs_acc, ht_acc = hs.to(acc), ht.to(acc)
    ks = hs_acc if gs is None else _product(hs, gs.to(acc), hs)
    kt = ht_acc if gt is None else _product(ht, gt.to(acc), ht)
    stats = backend.relation_stats(hs_acc, ks, ht_acc, kt, cu_seqlens)
    loss, coef = cosine_of_stats(stats, cu_seqlens, joint)
    dh = dg = hs_acc.new_empty(0)
    if want_dh or want_dg:
        m = backend.relation_grad(hs_acc, ks, ht_acc, kt, cu_seqlens, coef)
        if want_dh:
            dh = 2 * m if gs is None else _product(m, gs.to(acc), hs).mul_(2)
        if want_dg:
            dg = _product(hs.mT, m, hs)
    return loss.to(acc), dh, dg.clone() if dg is dh else dg


def cosine_of_stats(stats: Tensor, cu_seqlens: Tensor, joint: bool) -> tuple[Tensor, Tensor]:
    """Mean loss and, per image, the factors of R_t and R_s in dR_s, from the (images, 3) inner
    products.

    An image without rows has nothing to align: loss 0. One whose R vanishes has no direction: loss
    1 (the value of ``F.cosine_similarity``), gradient 0. `joint` takes one cosine over all images:
    their R are blocks of one matrix, whose inner products are sums.
    """
    if joint:
        ends = torch.stack((cu_seqlens[0], cu_seqlens[-1]))  # [[0, -1]] would wait for a GPU
        loss, coef = cosine_of_stats(stats.sum(0, keepdim=True), ends, False)
        return loss, coef.expand(stats.shape[0], 2).contiguous()
    ss, tt, st = stats.unbind(1)
    empty = (cu_seqlens.diff() == 0).to(stats.device, non_blocking=True)
    flat = (ss == 0) | (tt == 0)
    norms = torch.where(flat, 1.0, ss.sqrt() * tt.sqrt())
    images = max(stats.shape[0], 1)
    per_image = torch.where(flat, 1.0, 1 - st / norms).masked_fill_(empty, 0)
    factor_t = torch.where(flat, 0.0, -1 / norms)
    factor_s = torch.where(flat, 0.0, st / (norms * torch.where(flat, 1.0, ss)))
    return per_image.sum() / images, torch.stack((factor_t, factor_s), 1) / images


def _product(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """a @ b in the dtype of `b`, for hidden states or a head `h`. On a GPU fp32 products of the
    Gram would cost more than all tiles of R; with bf16 ones they are made of bf16 products.
    """
    if on_tensor_cores(h) and h.dtype == torch.bfloat16 and b.dtype == torch.float32:
        return products.product_split(a, b)
    return a.to(b.dtype) @ b


def _with_bias(weight: Tensor, bias: Tensor | None, rows: slice, acc: torch.dtype) -> Tensor:
    """In the dtype that both have, if a GPU multiplies that into `acc`; else in `acc`."""
    one = acc == torch.float32 and (bias is None or bias.dtype == weight.dtype)
    dtype = weight.dtype if one and on_tensor_cores(weight) else acc
    w = weight[rows].to(dtype)
    return w if bias is None else torch.cat((w, bias[rows].to(dtype)[:, None]), 1)
