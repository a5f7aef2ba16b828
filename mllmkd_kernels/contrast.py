"""Which answer tokens is an image token near to, of each sample of a batch, and the reverse? (the
contrastive affinity of LLAVADI's released code, `align_contrastive_affinity`)

With c and t the cosines of student and teacher between the visual rows of sample a and the response
rows of sample b, whichever two samples these are, and P and M how many rows:

    L(a, b) = (mean_i Σ_j −t_ij log softmax_j(c)_ij + mean_j Σ_i −t_ij log softmax_i(c)_ij) / 2M

and L is the sum over all pairs over the square of the number of samples. As in that code the
targets are the teacher's cosines as they are, no distribution: equal models still have a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mllmkd_kernels.cells import sample_of

#: Below any Σ exp(c), which is at least 1/e where there is a cell: none is 0 · log this.
_LEAST = 0.1


def contrast(
    visual_s: Tensor,  # (P, D_s), rows of unit length
    response_s: Tensor,  # (M, D_s)
    visual_t: Tensor,  # (P, D_t)
    response_t: Tensor,  # (M, D_t)
    cu_visual: Tensor,  # (samples + 1,), on the device of the rows
    cu_response: Tensor,  # (samples + 1,)
) -> Tensor:
    """L, see above; a pair without cells counts as 0. Sums over samples are products with their
    indicators, so nothing is read on the host. A few matrices P × M exist at a time.
    """
    images, answers = _indicator(visual_s, cu_visual), _indicator(response_s, cu_response)
    sizes_v, sizes_r = (x.sum(0).clamp(min=1) for x in (images, answers))
    c, t = visual_s @ response_s.mT, visual_t @ response_t.mT
    e, product = c.exp(), t * c
    per_image = (e @ answers).clamp(min=_LEAST).log() * (t @ answers) - product @ answers
    per_answer = (images.mT @ e).clamp(min=_LEAST).log() * (images.mT @ t) - images.mT @ product
    both = images.mT @ per_image / sizes_v[:, None] + per_answer @ answers / sizes_r
    return (both / sizes_r).sum() / (2 * max(len(sizes_r), 1) ** 2)


def _indicator(rows: Tensor, cu: Tensor) -> Tensor:
    """(N, samples): 1 where a row is of a sample."""
    samples = torch.arange(len(cu) - 1, dtype=cu.dtype, device=cu.device)
    return (sample_of(rows, cu)[:, None] == samples).to(rows.dtype)
