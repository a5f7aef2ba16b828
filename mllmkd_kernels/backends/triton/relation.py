"""What does a GPU keep of the relation matrices of an image? Three sums, and a product for dH.

With K = H G (or K = H for features) R = K Hᵀ is symmetric, P × P for an image of P rows, and seen
only tile by tile, in registers, student and teacher side by side:

    stats   <R_s,R_s>, <R_t,R_t>, <R_s,R_t> per image: tiles j ≤ i, those off the diagonal twice
    grad    M_i = Σ_j dR_ij · H_s,j   with   dR_ij = coef_t·R_t,ij + coef_s·R_s,ij

The images of a batch differ in size and their sizes are known on the device only. The host knows N
and the number of images, and that N rows cannot make more than N/B + images tiles of B rows. So it
launches that many; a table made on the device says which image a tile belongs to, and tiles past
the end leave at once. Nothing waits for the device.

The work of a row tile is a row of column tiles, which `splits` programs share. Each leaves its own
partial result, three sums or its rows of an (N, D_s) tensor, and partial results are added in a
fixed order: same inputs, same bits.

Launch parameters: `block` rows and columns of a tile of R, made `block_k` of the hidden size at a
time; `block_d` columns of M at a time.

Entries of R are fp32 and reach 1e6, while 1 − cos of a nearly aligned pair is 1e-4: products of
entries are formed and added in fp64. Operands are fp32, multiplied on tensor cores as three TF32
products each, which keeps 22 of the 24 bits (on AMD's as they are); sums are fp32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mllmkd_kernels import checks
from mllmkd_kernels.backends.triton import tables

#: Partial results that the merging program reads at a time.
_MERGE_BLOCK = 128


# --- helpers -------------------------------------------------------------------------------------


@triton.jit
def _first_row(tile, image, cu_ptr, starts_ptr):
    """Number of a row tile within its image, first row of the image, rows of the image."""
    first = tl.load(cu_ptr + image)
    rows = tl.load(cu_ptr + image + 1) - first
    return tile - tl.load(starts_ptr + image), first.to(tl.int64), rows


@triton.jit
def _tile_of_r(
    k_ptr, h_ptr,  # the first rows of the two tiles
    d, live_i, live_j,  # how many rows are the image's
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """K_i H_jᵀ, (BLOCK, BLOCK) fp32; 0 in rows and columns that are not the image's."""
    rows_i = tl.arange(0, BLOCK)[:, None]
    rows_j = tl.arange(0, BLOCK)[None, :]
    columns = tl.arange(0, BLOCK_K)
    # offsets within a tile are int32, which saves registers; the tile's own is int64
    k_ptrs = k_ptr + (rows_i * d + columns[None, :])
    h_ptrs = h_ptr + (rows_j * d + columns[:, None])
    r = tl.zeros((BLOCK, BLOCK), tl.float32)
    for c in range(0, d, BLOCK_K):
        k = tl.load(k_ptrs + c, mask=rows_i < live_i, other=0.0)
        h = tl.load(h_ptrs + c, mask=rows_j < live_j, other=0.0)
        r = tl.dot(k, h, r, input_precision=PRECISION)
    return r


@triton.jit
def _add_product(
    m_ptr, dr, h_ptr, d, live_i, live_j,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """M_i += dR H_j, BLOCK_D columns at a time; `m_ptr`, `h_ptr`: the first rows of the tiles."""
    rows_i = tl.arange(0, BLOCK)[:, None]
    rows_j = tl.arange(0, BLOCK)[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    m_ptrs, h_ptrs = m_ptr + (rows_i * d + columns), h_ptr + (rows_j * d + columns)
    for c in range(0, d, BLOCK_D):
        h = tl.load(h_ptrs + c, mask=rows_j < live_j, other=0.0)
        m = tl.load(m_ptrs + c, mask=rows_i < live_i, other=0.0)
        m += tl.dot(dr, h, input_precision=PRECISION)
        tl.store(m_ptrs + c, m, mask=rows_i < live_i)


@triton.jit
def _inner(x, y):
    """Σ x∘y of two fp32 tiles, products and sum in fp64."""
    return tl.sum(tl.sum(x.to(tl.float64) * y.to(tl.float64), 1), 0)


# --- kernels -------------------------------------------------------------------------------------


@triton.jit
def relation_stats_kernel(
    hs_ptr, ks_ptr, ht_ptr, kt_ptr,  # (N, D_s) or (N, D_t) fp32, D a multiple of every block
    cu_ptr, starts_ptr, image_ptr,  # see `_RowTiles`
    partial_ptr,  # (tiles, SPLITS, 3) fp64, zero
    images, d_s, d_t,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over the tiles j = split, split + SPLITS, … ≤ i of row tile i."""
    tile, split = tl.program_id(0), tl.program_id(1)
    image = tl.load(image_ptr + tile)
    if image >= images:
        return
    i, first, rows = _first_row(tile, image, cu_ptr, starts_ptr)
    row_i = first + i * BLOCK
    ss = tl.full((), 0.0, tl.float64)
    tt = tl.full((), 0.0, tl.float64)
    st = tl.full((), 0.0, tl.float64)
    for j in range(split, i + 1, SPLITS):
        row_j = first + j * BLOCK
        live_i, live_j = rows - i * BLOCK, rows - j * BLOCK
        r_s = _tile_of_r(
            ks_ptr + row_i * d_s, hs_ptr + row_j * d_s, d_s, live_i, live_j,
            BLOCK, BLOCK_K, PRECISION,
        )  # fmt: skip
        r_t = _tile_of_r(
            kt_ptr + row_i * d_t, ht_ptr + row_j * d_t, d_t, live_i, live_j,
            BLOCK, BLOCK_K, PRECISION,
        )  # fmt: skip
        # R is symmetric: an off-diagonal tile stands for its mirror image too
        twice = tl.where(j == i, 1.0, 2.0).to(tl.float64)
        ss += twice * _inner(r_s, r_s)
        tt += twice * _inner(r_t, r_t)
        st += twice * _inner(r_s, r_t)
    out = partial_ptr + (tile * SPLITS + split) * 3
    tl.store(out, ss)
    tl.store(out + 1, tt)
    tl.store(out + 2, st)


@triton.jit
def relation_merge_kernel(
    partial_ptr,  # (tiles, SPLITS, 3) fp64
    starts_ptr,  # (images + 1,)
    stats_ptr,  # (images, 3) fp64
    SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up the partial sums of one image, which stand one after another, in their order."""
    image = tl.program_id(0)
    begin = tl.load(starts_ptr + image) * SPLITS
    end = tl.load(starts_ptr + image + 1) * SPLITS
    term = tl.arange(0, 4)  # three sums, and a fourth because lengths are powers of two
    total = tl.zeros((4,), tl.float64)
    for first in range(begin, end, BLOCK):
        parts = first + tl.arange(0, BLOCK)
        mask = (parts < end)[:, None] & (term < 3)[None, :]
        total += tl.sum(
            tl.load(partial_ptr + parts[:, None] * 3 + term[None, :], mask=mask, other=0.0), 0
        )
    tl.store(stats_ptr + image * 3 + term, total, mask=term < 3)


@triton.jit
def relation_grad_kernel(
    hs_ptr, ks_ptr, ht_ptr, kt_ptr,  # (N, D_s) or (N, D_t) fp32, D a multiple of every block
    cu_ptr, starts_ptr, image_ptr,  # see `_RowTiles`
    coef_ptr,  # (images, 2) fp64
    m_ptr,  # (SPLITS, N, D_s) fp32, zero
    n, images, d_s, d_t,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """M_i of one split: dR_ij stays in registers while its product with H_j is added to the rows
    of M that no other program touches, BLOCK_D columns at a time.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    image = tl.load(image_ptr + tile)
    if image >= images:
        return
    i, first, rows = _first_row(tile, image, cu_ptr, starts_ptr)
    row_i, live_i = first + i * BLOCK, rows - i * BLOCK
    coef_t = tl.load(coef_ptr + image * 2).to(tl.float32)
    coef_s = tl.load(coef_ptr + image * 2 + 1).to(tl.float32)
    m_tile = m_ptr + (split.to(tl.int64) * n + row_i) * d_s
    for j in range(split, tl.cdiv(rows, BLOCK), SPLITS):
        row_j, live_j = first + j * BLOCK, rows - j * BLOCK
        dr = coef_t * _tile_of_r(
            kt_ptr + row_i * d_t, ht_ptr + row_j * d_t, d_t, live_i, live_j,
            BLOCK, BLOCK_K, PRECISION,
        )  # fmt: skip
        dr += coef_s * _tile_of_r(
            ks_ptr + row_i * d_s, hs_ptr + row_j * d_s, d_s, live_i, live_j,
            BLOCK, BLOCK_K, PRECISION,
        )  # fmt: skip
        _add_product(
            m_tile, dr, hs_ptr + row_j * d_s, d_s, live_i, live_j, BLOCK, BLOCK_D, PRECISION
        )
        # the thread that adds to an element next need not be the one that stored it
        tl.debug_barrier()


# --- launchers -----------------------------------------------------------------------------------


class _RowTiles(NamedTuple):
    """Row tiles of all images, one after another. int32; `count` is known on the host."""

    count: int
    cu: Tensor  # (images + 1,) first row of every image
    starts: Tensor  # (images + 1,) first tile of every image
    image: Tensor  # (count,) the image of a tile; `images` where there are no more tiles


def _row_tiles(cu_seqlens: Tensor, n: int, block: int, device: torch.device) -> _RowTiles:
    """The tile table, made on `device` without waiting for it."""
    cu = cu_seqlens.to(device, torch.int32, non_blocking=True).contiguous()
    count = n // block + cu.shape[0] - 1
    starts = torch.zeros_like(cu)
    torch.cumsum((cu.diff() + (block - 1)) // block, 0, dtype=torch.int32, out=starts[1:])
    tiles = torch.arange(count, dtype=torch.int32, device=device)
    image = torch.searchsorted(starts[1:], tiles, right=True, out_int32=True)
    return _RowTiles(count, cu, starts, image)


def _padded(x: Tensor, block: int) -> Tensor:
    """Columns of zeros up to a multiple of `block`: aligned rows are read 16 bytes at a time and
    loops have no remainder. Rows of any length as they are cost so many addresses and masks that
    the gradient's kernel spilled 536 bytes a thread on sm_90.
    """
    missing = -x.shape[1] % block
    return F.pad(x, (0, missing)) if missing else x.contiguous()  # padding by nothing copies


def _settings(kernel: str, device: torch.device, launch: dict[str, int] | None) -> dict[str, Any]:
    """Launch parameters by the names they have in the kernel; `launch` overrides the table."""
    chosen = tables.launch(kernel, device) | (launch or {})
    named = {k if k.startswith("num_") else k.upper(): v for k, v in chosen.items()}
    return named | {"PRECISION": "ieee" if torch.version.hip else "tf32x3"}


def relation_stats(
    hs: Tensor,  # (N, D_s) fp32
    ks: Tensor,  # (N, D_s): hs @ G_s, or hs itself for a relation of features
    ht: Tensor,  # (N, D_t)
    kt: Tensor,  # (N, D_t)
    cu_seqlens: Tensor,  # (images + 1,) int32
    launch: dict[str, int] | None = None,
) -> Tensor:
    """<R_s, R_s>, <R_t, R_t>, <R_s, R_t> of every image, (images, 3) fp64."""
    settings = _settings("relation_stats", hs.device, launch)
    splits, n, images = settings["SPLITS"], hs.shape[0], cu_seqlens.shape[0] - 1
    stats = torch.zeros(images, 3, dtype=torch.float64, device=hs.device)
    if not images:
        return stats
    tiles = _row_tiles(cu_seqlens, n, settings["BLOCK"], hs.device)
    checks.rises("cu_seqlens", tiles.cu, n)
    hs, ks, ht, kt = (_padded(x, settings["BLOCK_K"]) for x in (hs, ks, ht, kt))
    partial = torch.zeros(tiles.count, splits, 3, dtype=torch.float64, device=hs.device)
    relation_stats_kernel[(tiles.count, splits)](
        hs, ks, ht, kt, tiles.cu, tiles.starts, tiles.image, partial,
        images, hs.shape[1], ht.shape[1], **settings,
    )  # fmt: skip
    relation_merge_kernel[(images,)](*[partial, tiles.starts, stats, splits, _MERGE_BLOCK])
    return stats


def relation_grad(
    hs: Tensor,  # (N, D_s) fp32
    ks: Tensor,  # (N, D_s)
    ht: Tensor,  # (N, D_t)
    kt: Tensor,  # (N, D_t)
    cu_seqlens: Tensor,  # (images + 1,) int32
    coef: Tensor,  # (images, 2) fp64
    launch: dict[str, int] | None = None,
) -> Tensor:
    """M = dR · H_s of every image, (N, D_s) fp32, with dR = coef[0]·R_t + coef[1]·R_s."""
    settings = _settings("relation_grad", hs.device, launch)
    splits, n, images = settings["SPLITS"], hs.shape[0], cu_seqlens.shape[0] - 1
    d_s, columns = hs.shape[1], max(settings["BLOCK_K"], settings["BLOCK_D"])
    hs, ks, ht, kt = (_padded(x, columns) for x in (hs, ks, ht, kt))
    m = torch.zeros(splits, *hs.shape, dtype=torch.float32, device=hs.device)
    if n and images:
        tiles = _row_tiles(cu_seqlens, n, settings["BLOCK"], hs.device)
        relation_grad_kernel[(tiles.count, splits)](
            hs, ks, ht, kt, tiles.cu, tiles.starts, tiles.image, coef.contiguous(), m,
            n, images, hs.shape[1], ht.shape[1], **settings,
        )  # fmt: skip
    return (m[0] if splits == 1 else m.sum(0))[:, :d_s].contiguous()
