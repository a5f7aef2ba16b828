"""And where the head bends its logits? ``c·tanh(z/c)`` has no Gram matrix, so the vocabulary is
streamed.

For each strip of rows of an image, ``R_strip = Σ_slices Z_strip Zᵀ`` accumulates over vocabulary
slices; the gradient takes the same slices again, ``dZ = 2 dR Z``. Neither a P × P nor a V-wide
tensor is held: a strip has at most `RELATION_TILE` rows, a slice `VOCAB_SLICE` columns. It costs as
much as the logits themselves, several times; a head without soft-cap goes through `gram.py`.

Where the host knows which rows an image has (images of equal size, prefix sums on the CPU), a strip
meets these alone. Prefix sums on another device are not waited for: there a strip meets the rows of
all images, and what is of two images counts 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from mllmkd_kernels import cells, checks
from mllmkd_kernels.backends import eager, products
from mllmkd_kernels.backends.calls import Head, Options, dtype_of
from mllmkd_kernels.gram import cosine_of_stats


def relation(
    student: Head,
    teacher: Head,
    cu_seqlens: Tensor,  # (images + 1,)
    options: Options,  # its chunk: rows of a strip
    joint: bool,
    equal: int = 0,  # rows of every image, where all have as many; 0: not known
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (scalar) and the unscaled gradients dh, dw, db of the student's head; empty where
    unwanted.
    """
    acc, n, device = dtype_of(student, teacher), student.h.shape[0], student.h.device
    strips = list(_strips(cu_seqlens, n, equal, options.chunk))
    cu = cu_seqlens.to(device, non_blocking=True)
    image = cells.sample_of(student.h, cu)

    def relations(rows: slice, others: slice) -> tuple[Tensor, ...]:
        apart = image[rows, None] != image[others]
        both = (_relation(h, rows, others, options.vocab, acc) for h in (student, teacher))
        return tuple(r.masked_fill_(apart, 0) for r in both)

    sums = torch.zeros(n, 3, dtype=torch.float64, device=device)
    for rows, others in strips:
        r_s, r_t = (r.double() for r in relations(rows, others))
        sums[rows] = torch.stack(
            [(x * y).sum(1) for x, y in ((r_s, r_s), (r_t, r_t), (r_s, r_t))], 1
        )
    stats = torch.segment_reduce(sums, "sum", offsets=cu, initial=0, unsafe=True)
    loss, coef = cosine_of_stats(stats, cu, joint)
    coef = coef.to(acc)[image]
    grads = products.Gradients(student.h, student.w, acc, *options.wants)
    for rows, others in strips if grads.wanted else ():
        r_s, r_t = relations(rows, others)
        of_t, of_s = coef[rows].split(1, 1)
        dr = of_t * r_t + of_s * r_s
        for columns, z in _slices(student, others, options.vocab, acc):
            bent = z[eager._within(rows, others)]
            dz = eager._through_softcap_((dr @ z).mul_(2), bent, student.cap)
            grads.add(rows, dz, columns)
    return loss.to(acc), *grads.result()


def _strips(cu: Tensor, n: int, equal: int, size: int) -> Iterator[tuple[slice, slice]]:
    """(a few rows, the rows that they meet)."""
    if equal:
        images = products.chunks(n, equal)
    elif cells.on_host(cu):
        images = (slice(*two) for two in pairwise(checks.ends("cu_seqlens", cu, n)))
    else:
        checks.rises("cu_seqlens", cu, n)
        images = (slice(0, n),)
    for image in images:
        for strip in products.chunks(image.stop - image.start, size):
            yield slice(image.start + strip.start, image.start + strip.stop), image


def _slices(
    head: Head, rows: slice, vocab: int, acc: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """(vocabulary slice, logits of `rows` in it)."""
    for columns in products.chunks(vocab, products.VOCAB_SLICE):
        b = None if head.b is None else head.b[columns]
        size = columns.stop - columns.start
        z = eager._logits(head.h[rows], head.w[columns], b, size, acc)
        yield columns, eager._softcap_(z, head.cap, head.h[rows])


def _relation(head: Head, rows: slice, others: slice, vocab: int, acc: torch.dtype) -> Tensor:
    """R of `rows` against `others`, which they are among."""
    among = eager._within(rows, others)
    r = torch.zeros(
        rows.stop - rows.start, others.stop - others.start, dtype=acc, device=head.h.device
    )
    for _, z in _slices(head, others, vocab, acc):
        r.addmm_(z[among], z.mT)
    return r
