"""How far are the cosines between the visual and the response rows of a sample from the teacher's?

With rows of unit length the cosines of a sample are ``A = V Rᵀ``, and

    L = Σ over samples and cells of scale · (A_s − A_t)²,   scale = 1 / (cells · samples)
    dV_s = 2·scale·(A_s − A_t) R_s,   dR_s = 2·scale·(A_s − A_t)ᵀ V_s

A is seen a tile at a time. The difference is taken cell by cell: through D × D matrices of the sums
it would be a small difference of large numbers.

Prefix sums on the host tell where the samples lie, and no other tiles are formed. Those on another
device are not waited for: there all rows meet, samples times as many cells, and the scale of a cell
of two samples is 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from mllmkd_kernels import checks

TILE = 1024  # rows and columns: 4 MiB of cosines

Tile = tuple[slice, slice, float | Tensor]  # visual rows, response rows, scale (of each cell)


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
    if on_host(cu_visual, cu_response):
        tiles = _of_samples(
            _samples("cu_visual", cu_visual, len(visual_s)),
            _samples("cu_response", cu_response, len(response_s)), joint,
        )  # fmt: skip
    else:
        tiles = _of_all(visual_s, response_s, visual_t, response_t, cu_visual, cu_response, joint)
        # 0 · NaN would carry a broken row to other samples: there the scale is NaN
        visual_s, response_s, visual_t, response_t = (
            x.nan_to_num() for x in (visual_s, response_s, visual_t, response_t)
        )
    for rows, columns, scale in tiles:
        gap = visual_s[rows] @ response_s[columns].mT
        gap -= visual_t[rows] @ response_t[columns].mT
        scaled = gap * scale
        loss += gap.mul_(scaled).sum(dtype=torch.float64)
        if want_visual:
            dv[rows].addmm_(scaled, response_s[columns], alpha=2)
        if want_response:
            dr[columns].addmm_(scaled.mT, visual_s[rows], alpha=2)
    return loss.to(visual_s.dtype), dv, dr


def _of_samples(visual: list[range], response: list[range], joint: bool) -> Iterator[Tile]:
    """The tiles of each sample, from its rows."""
    cells = [len(v) * len(r) for v, r in zip(visual, response, strict=True)]
    for v, r, own in zip(visual, response, cells, strict=True):
        scale = 1 / max(sum(cells) if joint else own * len(cells), 1)
        yield from ((i, j, scale) for i in _tiles(v) for j in _tiles(r))


def _of_all(
    visual_s: Tensor,  # (P, D_s)
    response_s: Tensor,  # (M, D_s)
    visual_t: Tensor,  # (P, D_t)
    response_t: Tensor,  # (M, D_t)
    cu_visual: Tensor,  # (samples + 1,)
    cu_response: Tensor,  # (samples + 1,)
    joint: bool,
) -> Iterator[Tile]:
    """All tiles, whatever samples their rows are of; NaN for the cells of a broken row."""
    cu_visual, cu_response = (cu.to(visual_s.device) for cu in (cu_visual, cu_response))
    checks.rises("cu_visual", cu_visual, len(visual_s))
    checks.rises("cu_response", cu_response, len(response_s))
    cells = cu_visual.diff().double() * cu_response.diff()
    scale = (1 / (cells.sum() if joint else cells * len(cells)).clamp(min=1)).expand(len(cells))
    v, r = sample_of(visual_s, cu_visual), sample_of(response_s, cu_response)
    scale_v = (scale[v] + 0 * (visual_s.sum(1) + visual_t.sum(1))).to(visual_s.dtype)
    broken_r = 0 * (response_s.sum(1) + response_t.sum(1))
    for i in _tiles(range(len(v))):
        for j in _tiles(range(len(r))):
            same = v[i, None] == r[j]
            yield i, j, torch.where(same, scale_v[i, None] + broken_r[j], 0)


def sample_of(rows: Tensor, cu: Tensor) -> Tensor:
    """(N,) of N rows."""
    index = torch.arange(len(rows), dtype=cu.dtype, device=cu.device)
    return torch.searchsorted(cu[1:].contiguous(), index, right=True)


def on_host(*cu: Tensor) -> bool:
    """Can their values be read without waiting?"""
    return all(x.device.type == "cpu" for x in cu)


def _samples(name: str, cu: Tensor, rows: int) -> list[range]:
    return [range(start, end) for start, end in pairwise(checks.ends(name, cu, rows))]


def _tiles(rows: range) -> list[slice]:
    return [slice(i, min(i + TILE, rows.stop)) for i in rows[::TILE]]
