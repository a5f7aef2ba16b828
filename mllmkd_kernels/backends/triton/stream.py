"""What do the logits say, when nobody writes them down? Kernels that multiply tiles of a head and
keep, of each tile, only sums per row, or the gradient block.

A program takes a block of rows and a range of vocabulary tiles (a *split*), multiplies tile after
tile (`heads`), and forgets them. Three sweeps do so:

    statistics   top = max z,  log Σ exp((z − top)·scale),  the logit of the label     one head
    values       D = Σ f(p, q)  and  mean = Σ q ∂f/∂q                                  both heads
    gradient     dz = ce·(softmax(z) − onehot) + kd·∂D/∂a  of some columns             both heads

with ``scale = 1/T``. A log-sum-exp is kept as the pair (top, log Σ): ``(z − top)·scale − log Σ``
loses nothing where the logits are 1e4, their rounded sum would. Partial sums lie in (split, row)
and are added in the order of splits: no atomics, the same bits every run.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mllmkd_kernels.backends.calls import Head
from mllmkd_kernels.backends.triton import heads
from mllmkd_kernels.backends.triton.diagnostics import counted, entropy, lowered, vote, weighted
from mllmkd_kernels.backends.triton.divergence import constants_of, terms
from mllmkd_kernels.backends.triton.divergence import gradient as divergence_gradient
from mllmkd_kernels.backends.triton.heads import (
    logits,
    part_columns,
    parts_of,
    product_tile,
    rounded,
)
from mllmkd_kernels.backends.triton.splits import launch_of, parts, splits_of
from mllmkd_kernels.backends.triton.tiles import LOWEST, exp, log_of_sum, softcap_slope

#: What is known of every row: `facts` is a matrix (11, N) fp32. Of the student and of the teacher
#: what `statistics` finds (log Σ at scale 1 and the label's logit for the student only), then
#: mean = Σ q·slope and the weights of CE and of ∂D/∂a.
TOP_S, LOG_S, LOG_ONE, Z_LABEL = (tl.constexpr(i) for i in range(4))
TOP_T, LOG_T = tl.constexpr(4), tl.constexpr(5)
MEAN, CE_WEIGHT, KD_WEIGHT = (tl.constexpr(i) for i in range(8, 11))
FACTS = 11

#: Row blocks that are dealt out together: 16 blocks of 128 rows of D 2,560 are 10 MiB of L2.
GROUP_BLOCKS = 16

#: Rows of a merge program.
MERGE_ROWS = 128


# --- helpers --------------------------------------------------------------------------------------


@triton.jit
def _place(program, blocks, GROUP: tl.constexpr):
    """(row block, column range) of a program: GROUP row blocks, then all ranges, then the next
    GROUP. Programs that run together share few blocks of hidden rows and few of the weight, so that
    both stay in L2.
    """
    ranges = tl.num_programs(0) // blocks
    first = program // (GROUP * ranges) * GROUP
    size = tl.minimum(blocks - first, GROUP)
    within = program % (GROUP * ranges)
    return first + within % size, within // size


@triton.jit
def _fact(facts, which, n, rows):
    return tl.load(facts + which * n + rows, mask=rows < n, other=0.0)[:, None]


@triton.jit
def _log_probability(z, facts, TOP, LOG, n, rows, scale):
    """log softmax(z · scale) of a part of a tile."""
    return (z - _fact(facts, TOP, n, rows)) * scale - _fact(facts, LOG, n, rows)


@triton.jit
def write_vote(votes, piece, rows, n, best_s, best_t, agree):
    """votes (pieces, 3, N): maxima and agreement of a piece of the rows."""
    mine = votes + piece.to(tl.int64) * 3 * n + rows
    tl.store(mine, best_s, mask=rows < n)
    tl.store(mine + n, best_t, mask=rows < n)
    tl.store(mine + 2 * n, agree, mask=rows < n)


# --- kernels --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "tiles"])
def statistics_kernel(
    h, w, bias, labels, partial, n, vocab, tiles, scale,
    D: tl.constexpr, CAP: tl.constexpr, TWO_SCALES: tl.constexpr, ENTROPY: tl.constexpr,
    TMA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """partial (splits, 4, N): of `tiles` tiles, the maximum, Σ exp((z − top)·scale), the same at
    scale 1 where it is another number, and the logit of the label; a fifth for the entropy.
    """
    block, split = _place(tl.program_id(0), tl.cdiv(n, BLOCK_N), GROUP)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    top = tl.full((BLOCK_N,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    total_one = tl.zeros((BLOCK_N,), tl.float32)
    sum_x = tl.zeros((BLOCK_N,), tl.float32)
    z_label = tl.zeros((BLOCK_N,), tl.float32)
    label = rows * 0
    if labels is not None:
        label = tl.load(labels + rows, mask=rows < n, other=-1).to(tl.int32)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(vocab, BLOCK_V))):
        product = product_tile(h, w, block * BLOCK_N, tile * BLOCK_V, n, vocab, D, TMA,
                               BLOCK_N, BLOCK_V, BLOCK_D)  # fmt: skip
        parts = parts_of(product, BLOCK_N, BLOCK_V, PARTS)
        for part in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
            columns = part_columns(tile * BLOCK_V, part, BLOCK_V // PARTS)
            z = logits(parts[part], bias, columns, vocab, CAP)
            higher = tl.maximum(top, tl.max(z, 1))
            x, step = z - higher[:, None], top - higher
            if ENTROPY:
                sum_x = lowered(sum_x, total, step * scale) + tl.sum(weighted(x * scale), 1)
            total = total * exp(step * scale) + tl.sum(exp(x * scale), 1)
            if TWO_SCALES:
                total_one = total_one * exp(step) + tl.sum(exp(x), 1)
            if labels is not None:
                z_label += tl.sum(tl.where(label[:, None] == columns[None, :], z, 0.0), 1)
            top = higher
    mine = partial + split.to(tl.int64) * (4 + ENTROPY) * n + rows
    tl.store(mine, top, mask=rows < n)
    tl.store(mine + n, total, mask=rows < n)
    tl.store(mine + 2 * n, total_one, mask=rows < n)
    tl.store(mine + 3 * n, z_label, mask=rows < n)
    if ENTROPY:
        tl.store(mine + 4 * n, sum_x, mask=rows < n)


@triton.jit(do_not_specialize=["n", "splits"])
def merge_kernel(
    partial, merged, entropies, n, splits, scale, SUMS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """merged (4, N): top, log Σ exp((z − top)·scale), log Σ exp(z − top), z[label]; the entropy
    at `scale` where `entropies` (N,) is to have it.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < n
    top = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    total_one = tl.zeros((BLOCK,), tl.float32)
    sum_x = tl.zeros((BLOCK,), tl.float32)
    z_label = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        theirs = partial + tl.cast(split, tl.int64) * SUMS * n + rows
        other = tl.load(theirs, mask=inside, other=0.0)
        higher = tl.maximum(top, other)
        step, other_step = top - higher, other - higher
        if entropies is not None:
            own = tl.load(theirs + n, mask=inside, other=1.0)
            own_x = tl.load(theirs + 4 * n, mask=inside, other=0.0)
            sum_x = lowered(sum_x, total, step * scale) + lowered(own_x, own, other_step * scale)
        total *= exp(step * scale)
        total += tl.load(theirs + n, mask=inside, other=1.0) * exp(other_step * scale)
        total_one *= exp(step)
        total_one += tl.load(theirs + 2 * n, mask=inside, other=1.0) * exp(other_step)
        z_label += tl.load(theirs + 3 * n, mask=inside, other=0.0)
        top = higher
    tl.store(merged + rows, top, mask=inside)
    tl.store(merged + n + rows, log_of_sum(total), mask=inside)
    tl.store(merged + 2 * n + rows, log_of_sum(total_one), mask=inside)
    tl.store(merged + 3 * n + rows, z_label, mask=inside)
    if entropies is not None:
        tl.store(entropies + rows, entropy(total, sum_x), mask=inside)


@triton.jit(do_not_specialize=["n", "tiles"])
def values_kernel(
    hs, ws, bs, ht, wt, bt, facts, partial, votes, n, vocab, tiles, scale, param,
    NAME: tl.constexpr, D_S: tl.constexpr, D_T: tl.constexpr, CAP_S: tl.constexpr,
    CAP_T: tl.constexpr, TMA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """partial (splits, 2, N): Σ f and Σ q·slope of `tiles` tiles; votes (splits, 3, N)."""
    block, split = _place(tl.program_id(0), tl.cdiv(n, BLOCK_N), GROUP)
    row = block * BLOCK_N
    rows = row + tl.arange(0, BLOCK_N)
    value = tl.zeros((BLOCK_N,), tl.float32)
    mean = tl.zeros((BLOCK_N,), tl.float32)
    best_s = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    best_t, agree = best_s, value
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(vocab, BLOCK_V))):
        product_s = product_tile(hs, ws, row, tile * BLOCK_V, n, vocab, D_S, TMA,
                                 BLOCK_N, BLOCK_V, BLOCK_D)  # fmt: skip
        product_t = product_tile(ht, wt, row, tile * BLOCK_V, n, vocab, D_T, TMA,
                                 BLOCK_N, BLOCK_V, BLOCK_D)  # fmt: skip
        parts_s = parts_of(product_s, BLOCK_N, BLOCK_V, PARTS)
        parts_t = parts_of(product_t, BLOCK_N, BLOCK_V, PARTS)
        for part in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
            columns = part_columns(tile * BLOCK_V, part, BLOCK_V // PARTS)
            z_s = logits(parts_s[part], bs, columns, vocab, CAP_S)
            z_t = logits(parts_t[part], bt, columns, vocab, CAP_T)
            log_q = _log_probability(z_s, facts, TOP_S, LOG_S, n, rows, scale)
            log_p = _log_probability(z_t, facts, TOP_T, LOG_T, n, rows, scale)
            f, slope = terms(log_p, log_q, param, NAME)
            value += tl.sum(f, 1)
            mean += tl.sum(exp(log_q) * slope, 1)
            if votes is not None:
                best_s, best_t, agree = vote(best_s, best_t, agree, z_s, z_t)
    mine = partial + split.to(tl.int64) * 2 * n + rows
    tl.store(mine, value, mask=rows < n)
    tl.store(mine + n, mean, mask=rows < n)
    if votes is not None:
        write_vote(votes, split, rows, n, best_s, best_t, agree)


@triton.jit(do_not_specialize=["n", "first", "end"])
def gradient_kernel(
    hs, ws, bs, ht, wt, bt, labels, facts, dz, partial, votes, n, first, end, stride, scale, param,
    NAME: tl.constexpr, D_S: tl.constexpr, D_T: tl.constexpr, CAP_S: tl.constexpr,
    CAP_T: tl.constexpr, TWO_SCALES: tl.constexpr, TMA: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dz (N, end − first) of tokens first … end, and partial (tiles, N): Σ f of each tile, and
    votes (tiles, 3, N).
    """
    block, tile = _place(tl.program_id(0), tl.cdiv(n, BLOCK_N), GROUP)
    row, column = block * BLOCK_N, first + tile * BLOCK_V
    rows = row + tl.arange(0, BLOCK_N)
    product_s = product_tile(hs, ws, row, column, n, end, D_S, TMA,
                             BLOCK_N, BLOCK_V, BLOCK_D)  # fmt: skip
    product_t = product_s
    if wt is not None:
        product_t = product_tile(ht, wt, row, column, n, end, D_T, TMA,
                                 BLOCK_N, BLOCK_V, BLOCK_D)  # fmt: skip
    parts_s = parts_of(product_s, BLOCK_N, BLOCK_V, PARTS)
    parts_t = parts_of(product_t, BLOCK_N, BLOCK_V, PARTS)
    value = tl.zeros((BLOCK_N,), tl.float32)
    best_s = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    best_t, agree = best_s, value
    top_s, log_s = _fact(facts, TOP_S, n, rows), _fact(facts, LOG_S, n, rows)
    for part in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
        columns = part_columns(column, part, BLOCK_V // PARTS)
        z = logits(parts_s[part], bs, columns, end, CAP_S)
        log_q = (z - top_s) * scale - log_s
        dz_part = tl.zeros((BLOCK_N, BLOCK_V // PARTS), tl.float32)
        if wt is not None:
            z_t = logits(parts_t[part], bt, columns, end, CAP_T)
            log_p = (z_t - _fact(facts, TOP_T, n, rows)) * scale - _fact(facts, LOG_T, n, rows)
            f, slope = terms(log_p, log_q, param, NAME)
            if partial is not None:
                value += tl.sum(f, 1)
            if votes is not None:
                best_s, best_t, agree = vote(best_s, best_t, agree, z, z_t)
            da = divergence_gradient(log_p, log_q, slope, _fact(facts, MEAN, n, rows), NAME)
            weight = _fact(facts, KD_WEIGHT, n, rows)
            dz_part += tl.where(weight == 0, 0.0, weight * da)  # not even the NaN of a dead row
        if labels is not None:
            if TWO_SCALES:
                log_q = z - top_s - _fact(facts, LOG_ONE, n, rows)
            label = tl.load(labels + rows, mask=rows < n, other=-1).to(tl.int32)[:, None]
            dq = exp(log_q) - (label == columns[None, :]).to(tl.float32)
            weight = _fact(facts, CE_WEIGHT, n, rows)
            dz_part += tl.where(weight == 0, 0.0, weight * dq)
        if CAP_S > 0:
            dz_part = tl.where(dz_part == 0, 0.0, dz_part * softcap_slope(z, CAP_S))
        places = dz + rows.to(tl.int64)[:, None] * stride + (columns - first)[None, :]
        inside = (rows < n)[:, None] & (columns < end)[None, :]
        tl.store(places, rounded(dz_part, dz.dtype.element_ty), mask=inside)
    if partial is not None:
        tl.store(partial + tile.to(tl.int64) * n + rows, value, mask=rows < n)
    if votes is not None:
        write_vote(votes, tile, rows, n, best_s, best_t, agree)


# --- launchers ------------------------------------------------------------------------------------


def _widths(student: Head, teacher: Head | None) -> dict[str, Any]:
    theirs = (0, 0.0) if teacher is None else (teacher.h.shape[1], teacher.cap)
    mine = (student.h.shape[1], student.cap)
    return dict(zip(("D_S", "CAP_S", "D_T", "CAP_T"), mine + theirs, strict=True))


def statistics(
    head: Head,
    labels: Tensor | None,  # (N,)
    scale: float,
    two_scales: bool,
    vocab: int,
    found: Tensor,  # (4, N): written
    entropies: Tensor | None = None,  # (N,): written
    *,
    tma: bool | None = None,
    launch: dict[str, int] | None = None,
) -> None:
    """Of every row the largest logit, log Σ exp((z − top)·scale), log Σ exp(z − top) if
    `two_scales`, and the logit of the label; the entropy at `scale` where it is wanted.
    """
    n, d = head.h.shape
    tma = heads.tma(head) if tma is None else tma
    use = launch_of("statistics", (head,), tma, launch)
    splits, tiles = splits_of(n, vocab, head.h.device, use)
    sums = 4 if entropies is None else 5
    partial = found.new_empty(splits, sums, n)
    arguments: list[Any] = [*heads.operands(head, tma, use), head.b]
    arguments += [labels, partial, n, vocab, tiles]
    arguments.append(scale)
    constants = {"D": d, "CAP": head.cap, "TWO_SCALES": two_scales, "TMA": tma}
    constants["ENTROPY"] = entropies is not None
    constants |= {"GROUP": GROUP_BLOCKS, "PARTS": parts("statistics", use)}
    grid = (triton.cdiv(n, use["BLOCK_N"]) * splits,)
    statistics_kernel[grid](*arguments, **(constants | use))
    grid = (triton.cdiv(n, MERGE_ROWS),)
    merge_kernel[grid](*[partial, found, entropies, n, splits, scale, sums, MERGE_ROWS])


def values(
    student: Head,
    teacher: Head,
    facts: Tensor,  # (11, N)
    divergence: str,
    param: float,
    scale: float,
    vocab: int,
    want_votes: bool = False,
    *,
    tma: bool | None = None,
    launch: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(2, N) fp32: D and Σ q·slope of every row; if wanted, maxima and agreement (3, N)."""
    n = student.h.shape[0]
    tma = heads.tma(student) and heads.tma(teacher) if tma is None else tma
    use = launch_of("values", (student, teacher), tma, launch)
    splits, tiles = splits_of(n, vocab, student.h.device, use)
    partial = facts.new_empty(splits, 2, n)
    votes = facts.new_empty(splits, 3, n) if want_votes else None
    arguments: list[Any] = [*heads.operands(student, tma, use), student.b]
    arguments += [*heads.operands(teacher, tma, use), teacher.b]
    arguments += [facts, partial, votes, n, vocab, tiles, scale]
    arguments += [constants_of(divergence, param), divergence]
    constants = {**_widths(student, teacher), "TMA": tma, "GROUP": GROUP_BLOCKS}
    constants["PARTS"] = parts("values", use)
    values_kernel[(triton.cdiv(n, use["BLOCK_N"]) * splits,)](*arguments, **(constants | use))
    return partial.sum(0), None if votes is None else counted(votes)


def gradient(
    student: Head,
    teacher: Head | None,
    labels: Tensor | None,  # (N,)
    facts: Tensor,  # (11, N)
    dz: Tensor,  # (N, columns) fp32 or bf16, rows may be strided: written
    columns: slice,
    divergence: str,
    param: float,
    scale: float,
    two_scales: bool,
    want_values: bool,
    want_votes: bool = False,
    *,
    tma: bool | None = None,
    launch: dict[str, int] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Fill `dz` for the tokens `columns`; if wanted, their share of D, (N,), and their maxima and
    agreement (3, N).
    """
    n = student.h.shape[0]
    both = (student,) if teacher is None else (student, teacher)
    tma = all(map(heads.tma, both)) if tma is None else tma
    use = launch_of("gradient", both, tma, launch)
    tiles = triton.cdiv(columns.stop - columns.start, use["BLOCK_V"])
    partial = facts.new_empty(tiles, n) if want_values else None
    votes = facts.new_empty(tiles, 3, n) if want_votes else None
    arguments: list[Any] = [*heads.operands(student, tma, use), student.b]
    arguments += [None] * 3 if teacher is None else [*heads.operands(teacher, tma, use), teacher.b]
    arguments += [labels, facts, dz, partial, votes, n, columns.start, columns.stop, dz.stride(0)]
    arguments += [scale, constants_of(divergence, param), divergence]
    constants = {**_widths(student, teacher), "TMA": tma, "GROUP": GROUP_BLOCKS}
    constants["PARTS"] = parts("gradient with votes" if want_votes else "gradient", use)
    constants["TWO_SCALES"] = two_scales
    gradient_kernel[(triton.cdiv(n, use["BLOCK_N"]) * tiles,)](*arguments, **(constants | use))
    return (
        None if partial is None else partial.sum(0),
        None if votes is None else counted(votes),
    )
