"""How far are the cosines between the visual and the response rows of a sample from the teacher's?

With rows of unit length the cosines of a sample are ``A = V Rᵀ``, and

    L = Σ over samples and cells of scale · (A_s − A_t)²,   scale = 1 / (cells · samples)
    dV_s = 2·scale·(A_s − A_t) R_s,   dR_s = 2·scale·(A_s − A_t)ᵀ V_s

A is seen a tile at a time. The difference is taken cell by cell: through D × D matrices of the sums
it would be a small difference of large numbers.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from mllmkd_kernels import checks

TILE = 1024  # rows and columns: 4 MiB of cosines


def affinity(
    visual_s: Tensor,  # (P, D_s)
    response_s: Tensor,  # (M, D_s)
    visual_t: Tensor,  # (P, D_t)
    response_t: Tensor,  # (M, D_t)
    cu_visual: Tensor,  # (samples + 1,)
    cu_response: Tensor,  # (samples + 1,)
    joint: bool,
    want_visual: bool,
    want_response: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dV_s, dR_s), see above; `joint`: scale is 1 over the cells of all samples. A gradient
    that is not wanted comes back empty.
    """
    loss = torch.zeros((), dtype=torch.float64, device=visual_s.device)
    dv = torch.zeros_like(visual_s) if want_visual else visual_s.new_empty(0)
    dr = torch.zeros_like(response_s) if want_response else response_s.new_empty(0)
    visual = _samples("cu_visual", cu_visual, len(visual_s))
    response = _samples("cu_response", cu_response, len(response_s))
    cells = [len(v) * len(r) for v, r in zip(visual, response, strict=True)]
    for v, r, own in zip(visual, response, cells, strict=True):
        scale = 1 / max(sum(cells) if joint else own * len(cells), 1)
        for rows, columns in ((i, j) for i in _tiles(v) for j in _tiles(r)):
            gap = visual_s[rows] @ response_s[columns].mT
            gap -= visual_t[rows] @ response_t[columns].mT
            loss += scale * gap.square().sum(dtype=torch.float64)
            if want_visual:
                dv[rows].addmm_(gap, response_s[columns], alpha=2 * scale)
            if want_response:
                dr[columns].addmm_(gap.mT, visual_s[rows], alpha=2 * scale)
    return loss.to(visual_s.dtype), dv, dr


def _samples(name: str, cu: Tensor, rows: int) -> list[range]:
    ends = cu.tolist()
    checks.prefix_sum(name, ends, rows)
    return [range(start, end) for start, end in pairwise(ends)]


def _tiles(rows: range) -> list[slice]:
    return [slice(i, min(i + TILE, rows.stop)) for i in rows[::TILE]]
