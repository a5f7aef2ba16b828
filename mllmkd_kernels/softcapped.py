"""And where the head bends its logits? ``c·tanh(z/c)`` has no Gram matrix, so the vocabulary is
streamed.

For each strip of rows of an image, ``R_strip = Σ_slices Z_strip Zᵀ`` accumulates over vocabulary
slices; the gradient walks the same slices again, ``dZ = 2 dR Z``. Neither a P × P nor a V-wide
tensor is held: a strip has at most `RELATION_TILE` rows, a slice `VOCAB_SLICE` columns. It costs as
much as the logits themselves, several times; a head without soft-cap goes through `gram.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mllmkd_kernels.backends import eager, products
from mllmkd_kernels.gram import cosine_of_stats


@dataclass(frozen=True)
class Head:
    """A head and the hidden states that enter it: h (N, D), w (≥V, D), b (≥V,), cap 0.0 for
    none.
    """

    h: Tensor
    w: Tensor
    b: Tensor | None
    cap: float
    vocab: int
    acc: torch.dtype

    def slices(self, rows: slice) -> Iterator[tuple[slice, Tensor]]:
        """(vocabulary slice, logits of `rows` in it)."""
        for columns in products.chunks(self.vocab, products.VOCAB_SLICE):
            b = None if self.b is None else self.b[columns]
            size = columns.stop - columns.start
            z = eager._logits(self.h[rows], self.w[columns], b, size, self.acc)
            yield columns, eager._softcap_(z, self.cap, self.h[rows])

    def strip(self, image: slice, strip: slice) -> Tensor:
        """R of the rows `strip` (relative to the image) against all rows of the image."""
        rows, total = image.stop - image.start, strip.stop - strip.start
        r = torch.zeros(total, rows, dtype=self.acc, device=self.h.device)
        for _, z in self.slices(image):
            r.addmm_(z[strip], z.mT)
        return r


def relation(
    student: Head,
    teacher: Head,
    cu_seqlens: Tensor,  # (images + 1,)
    want_dh: bool,
    want_dw: bool,
    want_db: bool,
    joint: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (scalar) and the unscaled gradients dh, dw, db of the student's head; empty where
    unwanted.
    """
    ends = cu_seqlens.tolist()
    images = [slice(a, b) for a, b in pairwise(ends)]
    stats = torch.zeros(len(images), 3, dtype=torch.float64, device=student.h.device)
    for i, image in enumerate(images):
        for strip in products.chunks(image.stop - image.start, eager.RELATION_TILE):
            r_s, r_t = student.strip(image, strip).double(), teacher.strip(image, strip).double()
            stats[i] += torch.stack([(r_s * r_s).sum(), (r_t * r_t).sum(), (r_s * r_t).sum()])
    loss, coef = cosine_of_stats(stats, cu_seqlens, joint)
    grads = products.Gradients(student.h, student.w, student.acc, want_dh, want_dw, want_db)
    if grads.wanted:
        for i, image in enumerate(images):
            for strip in products.chunks(image.stop - image.start, eager.RELATION_TILE):
                _add_strip(grads, student, teacher, image, strip, coef[i].to(student.acc))
    return loss.to(student.acc), *grads.result()


def _add_strip(
    grads: products.Gradients,
    student: Head,
    teacher: Head,
    image: slice,
    strip: slice,
    coef: Tensor,
) -> None:
    """Fold dZ = 2 dR Z of one strip of rows into the gradients, slice by slice."""
    dr = coef[0] * teacher.strip(image, strip) + coef[1] * student.strip(image, strip)
    rows = slice(image.start + strip.start, image.start + strip.stop)
    for columns, z in student.slices(image):
        dz = eager._through_softcap_((dr @ z).mul_(2), z[strip], student.cap)
        grads.add(rows, dz, columns)
