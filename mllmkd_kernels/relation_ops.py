"""How do rows, or the columns of a head, relate to each other? The operators of Gram matrices and
cosines: schema, fake implementation and autograd formula together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mllmkd_kernels import cells, gram, softcap
from mllmkd_kernels.backends import eager, products
from mllmkd_kernels.backends.calls import Head, Options
from mllmkd_kernels.registration import (
    gradients_formed_in_forward,
    module_of,
    no_double_backward,
    operator,
)


@operator("head_gram")
def head_gram(w: Tensor, b: Tensor | None, vocab: int, double: bool = False) -> Tensor:
    """G = WᵀW, (D, D), or (D + 1, D + 1) with a bias: see `gram.gram`."""
    return gram.gram(w, b, vocab, double)


@head_gram.register_fake
def _(w, b, vocab, double=False):
    size = w.shape[1] + (b is not None)
    acc = torch.float64 if double else products.accumulation_dtype(w, b)
    return w.new_empty(size, size, dtype=acc)


@operator("head_gram_backward")
def head_gram_backward(
    dg: Tensor, w: Tensor, b: Tensor | None, vocab: int
) -> tuple[Tensor, Tensor]:
    """dW and db of `head_gram`: see `gram.gram_backward`."""
    return gram.gram_backward(dg, w, b, vocab)


@head_gram_backward.register_fake
def _(dg, w, b, vocab):
    return w.new_empty(w.shape), w.new_empty(0) if b is None else b.new_empty(b.shape)


def _gram_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    w, b, ctx.vocab, _ = inputs
    ctx.save_for_backward(w, b)


def _gram_backward(ctx: Any, dg: Tensor) -> tuple[Tensor | None, ...]:
    w, b = ctx.saved_tensors
    dw, db = head_gram_backward(dg, w, b, ctx.vocab)
    return dw, None if b is None else db, None, None


head_gram.register_autograd(_gram_backward, setup_context=_gram_context)
no_double_backward(head_gram_backward)


@operator("affinity")
def affinity(
    visual_s: Tensor,
    response_s: Tensor,
    visual_t: Tensor,
    response_t: Tensor,
    cu_visual: Tensor,
    cu_response: Tensor,
    joint: bool,
    want_visual: bool,
    want_response: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, d visual_s, d response_s): see `cells.affinity`."""
    return cells.affinity(
        visual_s, response_s, visual_t, response_t, cu_visual, cu_response, joint,
        want_visual, want_response,
    )  # fmt: skip


@affinity.register_fake
def _(visual_s, response_s, visual_t, response_t, cu_visual, cu_response, joint, want_visual,
      want_response):  # fmt: skip
    dv = visual_s.new_empty(visual_s.shape if want_visual else (0,))
    dr = response_s.new_empty(response_s.shape if want_response else (0,))
    return visual_s.new_empty(()), dv, dr


gradients_formed_in_forward(affinity, 9, {0: 1, 1: 2})


@operator("relation")
def relation(
    hs: Tensor,
    gs: Tensor | None,
    ht: Tensor,
    gt: Tensor | None,
    cu_seqlens: Tensor,
    want_dh: bool,
    want_dg: bool,
    backend: str,
    joint: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dh, dg): see `gram.relation`."""
    module = module_of(backend, hs, gs, ht, gt)
    return gram.relation(module, hs, gs, ht, gt, cu_seqlens, want_dh, want_dg, joint)


@relation.register_fake
def _(hs, gs, ht, gt, cu_seqlens, want_dh, want_dg, backend, joint):
    acc = products.accumulation_dtype(hs, gs, ht, gt)
    d = hs.shape[1]
    dh = hs.new_empty(hs.shape if want_dh else (0,), dtype=acc)
    return hs.new_empty((), dtype=acc), dh, hs.new_empty((d, d) if want_dg else (0,), dtype=acc)


gradients_formed_in_forward(relation, 9, {0: 1, 1: 2})


@operator("relation_softcapped")
def relation_softcapped(
    hs: Tensor,
    ws: Tensor,
    bs: Tensor | None,
    ht: Tensor,
    wt: Tensor,
    bt: Tensor | None,
    cu_seqlens: Tensor,
    cap_s: float,
    cap_t: float,
    vocab: int,
    want_dh: bool,
    want_dw: bool,
    want_db: bool,
    joint: bool,
    equal: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, dh, dw, db): see `softcap.relation`."""
    student, teacher = Head(hs, ws, bs, cap_s), Head(ht, wt, bt, cap_t)
    options = Options(vocab, eager.RELATION_TILE, want_dh, want_dw, want_db)
    return softcap.relation(student, teacher, cu_seqlens, options, joint, equal)


@relation_softcapped.register_fake
def _(hs, ws, bs, ht, wt, bt, cu_seqlens, cap_s, cap_t, vocab, want_dh, want_dw, want_db, joint,
      equal=0):  # fmt: skip
    acc = products.accumulation_dtype(hs, ws, bs, ht, wt, bt)
    dh = hs.new_empty(hs.shape if want_dh else (0,), dtype=acc)
    db = hs.new_empty(ws.shape[0] if want_db else 0, dtype=acc)
    dw = ws.new_empty(ws.shape if want_dw else (0,), dtype=acc)
    return hs.new_empty((), dtype=acc), dh, dw, db


gradients_formed_in_forward(relation_softcapped, 15, {0: 1, 1: 2, 2: 3})
