"""And where the head bends its logits? ``c·tanh(z/c)`` has no Gram matrix, so the vocabulary is
streamed.

For each strip of rows of an image, ``R_strip = Σ_slices Z_strip Zᵀ`` accumulates over vocabulary
slices; the gradient takes the same slices again, ``dZ = 2 dR Z``. Neither a P × P nor a V-wide
tensor is held: a strip has at most `RELATION_TILE` rows, a slice `VOCAB_SLICE` columns. It costs as
much as the logits themselves, several times; a head without soft-cap goes through `gram.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from mllmkd_kernels.backends import eager, products
from mllmkd_kernels.backends.calls import Head, Options, dtype_of
from mllmkd_kernels.gram import cosine_of_stats


def relation(
    student: Head,
    teacher: Head,
    cu_seqlens: Tensor,  # (images + 1,)
    options: Options,  # its chunk: rows of a strip
    joint: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (scalar) and the unscaled gradients dh, dw, db of the student's head; empty where
    unwanted.
    """
    acc = dtype_of(student, teacher)
    images = [slice(a, b) for a, b in pairwise(cu_seqlens.tolist())]
    strips = [
        (i, image, strip)
        for i, image in enumerate(images)
        for strip in products.chunks(image.stop - image.start, options.chunk)
    ]

    def relations(image: slice, strip: slice) -> tuple[Tensor, ...]:
        return tuple(_strip(h, image, strip, options.vocab, acc) for h in (student, teacher))

    stats = torch.zeros(len(images), 3, dtype=torch.float64, device=student.h.device)
    for i, image, strip in strips:
        r_s, r_t = (r.double() for r in relations(image, strip))
        stats[i] += torch.stack([(r_s * r_s).sum(), (r_t * r_t).sum(), (r_s * r_t).sum()])
    loss, coef = cosine_of_stats(stats, cu_seqlens, joint)
    grads = products.Gradients(student.h, student.w, acc, *options.wants)
    for i, image, strip in strips if grads.wanted else ():
        r_s, r_t = relations(image, strip)
        of_t, of_s = coef[i].to(acc)
        dr = of_t * r_t + of_s * r_s
        rows = slice(image.start + strip.start, image.start + strip.stop)
        for columns, z in _slices(student, image, options.vocab, acc):
            dz = eager._through_softcap_((dr @ z).mul_(2), z[strip], student.cap)
            grads.add(rows, dz, columns)
    return loss.to(acc), *grads.result()


def _slices(
    head: Head, rows: slice, vocab: int, acc: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """(vocabulary slice, logits of `rows` in it)."""
    for columns in products.chunks(vocab, products.VOCAB_SLICE):
        b = None if head.b is None else head.b[columns]
        size = columns.stop - columns.start
        z = eager._logits(head.h[rows], head.w[columns], b, size, acc)
        yield columns, eager._softcap_(z, head.cap, head.h[rows])


def _strip(head: Head, image: slice, strip: slice, vocab: int, acc: torch.dtype) -> Tensor:
    """R of the rows `strip` (relative to the image) against all rows of the image."""
    rows, total = image.stop - image.start, strip.stop - strip.start
    r = torch.zeros(total, rows, dtype=acc, device=head.h.device)
    for _, z in _slices(head, image, vocab, acc):
        r.addmm_(z[strip], z.mT)
    return r
