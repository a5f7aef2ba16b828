"""chunk: from a block of logits to row terms and, in the same memory, the gradient block.

One program has one row. With a = z_s/T and b = z_t/T, q = softmax(a), p = softmax(b):

    ce[n] = log Σ exp(z_s) − z_s[label]                  (0 where the label is ignored)
    kd[n] = Σ_k f(p_k, q_k)
    dz    = ce_weight · (softmax(z_s) − onehot) + kd_weight/T · ∂D/∂a,   times 1 − (z/c)² if capped

A row that fits one block is read once and stays in registers. A longer one is swept two or three
times: log-sum-exps; values, with dz in the same sweep where ∂D/∂a = q − p; dz of the others, which
need Σ q g first. Where the divergence sees z-scored logits (`zscore` has the formulas), a sweep
before those finds μ and σ of both rows, and all divergences need sums first: dz then has a part
along a, the one that goes back through σ. Sums run lane by lane and are folded once a sweep,
always in the same order.

The block comes as the GEMM made it: bias and soft-cap are applied here, in each sweep. Rows lie
`stride` apart, which may exceed the vocabulary, so that every row starts aligned whatever V is;
padding is read, never used, and dz is 0 there.

Where they are wanted, `seen` (C, 3) gets both entropies, from the sums of the log-sum-exps, and
the agreement: 1 where some column is the maximum of both rows.
"""
# pyright: reportAssignmentType=false, reportRedeclaration=false
# (`NAME: tl.constexpr = ...` tells Triton when a name is known, and is no type.)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mllmkd_kernels.backends.triton import tables
from mllmkd_kernels.backends.triton.divergence import NEEDS_MEAN, gradient, terms, times
from mllmkd_kernels.backends.triton.heads import rounded
from mllmkd_kernels.backends.triton.observe import entropy, fold_entropy, weighted, weighted_lane
from mllmkd_kernels.backends.triton.scores import along, scaled, scored_weight, spread
from mllmkd_kernels.backends.triton.tiles import (
    LOWEST,
    log_of_sum,
    logits,
    online_lane,
    softcap_slope,
)
from mllmkd_kernels.divergence import sweeps

#: Rows of a logit block start this many elements apart, or a multiple: 64 bytes in fp32.
ALIGN = 16


@triton.jit
def fold(top, total):
    """log Σ exp of all lanes, in two parts: log-probabilities are (a − top) − rest."""
    most = tl.max(top, 0)
    return most, log_of_sum(tl.sum(total * tl.exp(top - most), 0))


@triton.jit
def whole(a):
    """The same two parts from the row itself."""
    top = tl.max(a, 0)
    return top, log_of_sum(tl.sum(tl.exp(a - top), 0))


@triton.jit
def whole_entropy(a, top):
    """And the entropy of the row."""
    x = a - top
    return entropy(tl.sum(tl.exp(x), 0), tl.sum(weighted(x), 0))


@triton.jit
def weights(ce_weight, kd_weight, labels, row, inverse, ignore_index, TEACHER: tl.constexpr):
    """Label and weights of a row, 0.0 for what it does not have: (label, ce_weight,
    kd_weight/T).
    """
    label, ce_w, kd_w = ignore_index, 0.0, 0.0
    if labels is not None:
        label = tl.load(labels + row).to(tl.int32)
        ce_w = tl.where(label == ignore_index, 0.0, tl.load(ce_weight + row).to(tl.float32))
    if TEACHER:
        kd_w = tl.load(kd_weight + row).to(tl.float32) * inverse
    return label, ce_w, kd_w


@triton.jit
def write_ce(ce, z, bias, row, label, top, rest, vocab, stride, ignore_index, CAP: tl.constexpr):
    """CE of the row; before dz overwrites its logits."""
    used = label != ignore_index
    at_label = logits(z, bias, tl.where(used, label, 0), vocab, stride, CAP)
    tl.debug_barrier()  # no warp writes dz there before all have read it
    tl.store(ce + row, tl.where(used, (top - at_label) + rest, 0.0))


@triton.jit
def write_dz(
    dz, columns, stride, x, a, log_p, log_q, log_q_ce, label, ce_w, kd_w, mean, pull, param,
    NAME: tl.constexpr, CE: tl.constexpr, CAP: tl.constexpr, SCORED: tl.constexpr
):  # fmt: skip
    """dz of one tile of a row, exactly 0 where the row has no weight, whatever it holds."""
    g = tl.zeros_like(x)
    if NAME != "none":
        _, slope = terms(log_p, log_q, param, NAME)
        g = gradient(log_p, log_q, slope, mean, NAME)
        if SCORED:  # a is −inf in the padding
            g -= tl.where(a == -float("inf"), 0.0, a * pull)
        g = tl.where(kd_w == 0.0, 0.0, kd_w * g)
    if CE:
        q = tl.exp(log_q_ce)
        g += tl.where(ce_w == 0.0, 0.0, ce_w * tl.where(columns == label, q - 1.0, q))
    if CAP != 0.0:  # 0 stays 0: x is −inf in the padding, and may be NaN in a row without weight
        g = tl.where(g == 0.0, 0.0, g * softcap_slope(x, CAP))
    if dz.dtype.element_ty != tl.float32:
        # 16-bit tiles go to the front half of the row's own memory. Tile i lands in the bytes
        # [2iB, 2iB + 2B), where logits of tiles ≤ i were: of tile 0 itself, and of tiles that a
        # slower warp may not have read yet. All warps have read tile i behind this barrier. Tiles
        # > i start at byte 4(i + 1)B and are not touched.
        tl.debug_barrier()
    tl.store(dz + columns, rounded(g, dz.dtype.element_ty), columns < stride)


@triton.jit
def log_probabilities(
    z_s, z_t, b_s, b_t, columns, by_s, by_t, lse_s, lse_t, lse_ce, vocab, stride,
    TEACHER: tl.constexpr, SCALED: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr,
    SCORED: tl.constexpr
):  # fmt: skip
    """(z_s, a, b, log p, log q, log softmax(z_s)) of one tile; without a teacher b and log p stand
    for nothing.
    """
    x = logits(z_s, b_s, columns, vocab, stride, CAP_S)
    a = scaled(x, by_s, SCALED, SCORED)
    log_q = (a - lse_s[0]) - lse_s[1]
    b, log_p, log_q_ce = x, log_q, log_q
    if SCALED:
        log_q_ce = (x - lse_ce[0]) - lse_ce[1]
    if TEACHER:
        b = scaled(logits(z_t, b_t, columns, vocab, stride, CAP_T), by_t, SCALED, SCORED)
        log_p = (b - lse_t[0]) - lse_t[1]
    return x, a, b, log_p, log_q, log_q_ce


@triton.jit
def whole_row_kernel(
    z_s, z_t, b_s, b_t, labels, ce_weight, kd_weight, ce, kd, seen, dz, vocab, stride,
    ignore_index, param, inverse, NAME: tl.constexpr, SCALED: tl.constexpr, CAP_S: tl.constexpr,
    CAP_T: tl.constexpr, SCORED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A row of at most BLOCK columns, read once."""
    row = tl.program_id(0).to(tl.int64)
    CE: tl.constexpr = labels is not None
    TEACHER: tl.constexpr = NAME != "none"
    columns = tl.arange(0, BLOCK)
    z_s += row * stride
    label, ce_w, kd_w = weights(ce_weight, kd_weight, labels, row, inverse, ignore_index, TEACHER)
    by_s, by_t, through, pull = (0.0, inverse), (0.0, inverse), 0.0, 0.0
    if SCORED:
        middle, scale, through = spread(z_s, b_s, vocab, stride, inverse, CAP_S, BLOCK)
        by_s, kd_w = (middle, scale), scored_weight(kd_w, scale, inverse)
    x = logits(z_s, b_s, columns, vocab, stride, CAP_S)
    a = scaled(x, by_s, SCALED, SCORED)
    top, rest = whole(a)
    top_s = top
    log_q = (a - top) - rest
    if seen is not None:
        tl.store(seen + row * 3, whole_entropy(a, top))
    log_p, log_q_ce, mean = log_q, log_q, 0.0
    if CE:
        if SCALED:
            top, rest = whole(x)
            log_q_ce = (x - top) - rest
        write_ce(ce, z_s, b_s, row, label, top, rest, vocab, stride, ignore_index, CAP_S)
    if TEACHER:
        z_t += row * stride
        if SCORED:
            middle, scale, _ = spread(z_t, b_t, vocab, stride, inverse, CAP_T, BLOCK)
            by_t = (middle, scale)
        b = scaled(logits(z_t, b_t, columns, vocab, stride, CAP_T), by_t, SCALED, SCORED)
        top_t, rest_t = whole(b)
        log_p = (b - top_t) - rest_t
        if seen is not None:
            tl.store(seen + row * 3 + 1, whole_entropy(b, top_t))
            both = (a == top_s) & (b == top_t)
            tl.store(seen + row * 3 + 2, tl.max(tl.where(both, 1.0, 0.0), 0))
        value, slope = terms(log_p, log_q, param, NAME)
        tl.store(kd + row, tl.sum(value, 0))
        mean = tl.sum(times(tl.exp(log_q), slope), 0)
        if SCORED:
            forth, centre = along(a, log_p, log_q, slope, NAME)
            pull = through * (tl.sum(forth, 0) - mean * tl.sum(centre, 0))
    if dz is not None:
        RATIO: tl.constexpr = 32 // dz.dtype.element_ty.primitive_bitwidth
        dz += row * stride * RATIO
        write_dz(
            dz, columns, stride, x, a, log_p, log_q, log_q_ce, label, ce_w, kd_w, mean, pull,
            param, NAME, CE, CAP_S, SCORED
        )  # fmt: skip


@triton.jit
def long_row_kernel(
    z_s, z_t, b_s, b_t, labels, ce_weight, kd_weight, ce, kd, seen, dz, vocab, stride,
    ignore_index, param, inverse, NAME: tl.constexpr, SCALED: tl.constexpr, CAP_S: tl.constexpr,
    CAP_T: tl.constexpr, SCORED: tl.constexpr, MEAN_FIRST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A row of any length, swept two or three times, z-scored four times."""
    row = tl.program_id(0).to(tl.int64)
    CE: tl.constexpr = labels is not None
    TEACHER: tl.constexpr = NAME != "none"
    CE_APART: tl.constexpr = SCALED and labels is not None
    lanes = tl.arange(0, BLOCK)
    z_s += row * stride
    if TEACHER:
        z_t += row * stride
    label, ce_w, kd_w = weights(ce_weight, kd_weight, labels, row, inverse, ignore_index, TEACHER)

    by_s, by_t, through = (0.0, inverse), (0.0, inverse), 0.0
    if SCORED:
        middle, scale, through = spread(z_s, b_s, vocab, stride, inverse, CAP_S, BLOCK)
        by_s, kd_w = (middle, scale), scored_weight(kd_w, scale, inverse)
        middle, scale, _ = spread(z_t, b_t, vocab, stride, inverse, CAP_T, BLOCK)
        by_t = (middle, scale)
    top_s = tl.full((BLOCK,), LOWEST, tl.float32)
    total_s = tl.zeros((BLOCK,), tl.float32)
    top_t, total_t, top_ce, total_ce = top_s, total_s, top_s, total_s
    sum_s, sum_t = total_s, total_s
    for start in range(0, vocab, BLOCK):
        x = logits(z_s, b_s, start + lanes, vocab, stride, CAP_S)
        a = scaled(x, by_s, SCALED, SCORED)
        if seen is not None:
            sum_s = weighted_lane(top_s, total_s, sum_s, a)
        top_s, total_s = online_lane(top_s, total_s, a)
        if CE_APART:
            top_ce, total_ce = online_lane(top_ce, total_ce, x)
        if TEACHER:
            b = logits(z_t, b_t, start + lanes, vocab, stride, CAP_T)
            b = scaled(b, by_t, SCALED, SCORED)
            if seen is not None:
                sum_t = weighted_lane(top_t, total_t, sum_t, b)
            top_t, total_t = online_lane(top_t, total_t, b)
    lse_s = fold(top_s, total_s)
    lse_ce, lse_t = lse_s, lse_s
    if CE_APART:
        lse_ce = fold(top_ce, total_ce)
    if TEACHER:
        lse_t = fold(top_t, total_t)
    if seen is not None:
        seen += row * 3
        tl.store(seen, fold_entropy(top_s, total_s, sum_s))
        if TEACHER:
            tl.store(seen + 1, fold_entropy(top_t, total_t, sum_t))
    if CE:
        write_ce(ce, z_s, b_s, row, label, lse_ce[0], lse_ce[1], vocab, stride, ignore_index, CAP_S)

    if dz is not None:
        RATIO: tl.constexpr = 32 // dz.dtype.element_ty.primitive_bitwidth
        dz += row * stride * RATIO
    if TEACHER or dz is not None:
        value = tl.zeros((BLOCK,), tl.float32)
        mean = tl.zeros((BLOCK,), tl.float32)
        agree, forth, centre = mean, mean, mean
        for start in range(0, vocab, BLOCK):
            x, a, b, log_p, log_q, log_q_ce = log_probabilities(
                z_s, z_t, b_s, b_t, start + lanes, by_s, by_t, lse_s, lse_t, lse_ce, vocab, stride,
                TEACHER, SCALED, CAP_S, CAP_T, SCORED
            )  # fmt: skip
            if TEACHER:
                f, slope = terms(log_p, log_q, param, NAME)
                value += f
                mean += times(tl.exp(log_q), slope)
                if SCORED:
                    ahead, aside = along(a, log_p, log_q, slope, NAME)
                    forth, centre = forth + ahead, centre + aside
                if seen is not None:
                    both = (a == lse_s[0]) & (b == lse_t[0])
                    agree = tl.where(both, 1.0, agree)
            if dz is not None and not MEAN_FIRST:
                write_dz(
                    dz, start + lanes, stride, x, a, log_p, log_q, log_q_ce, label, ce_w, kd_w,
                    0.0, 0.0, param, NAME, CE, CAP_S, SCORED
                )  # fmt: skip
        if TEACHER:
            tl.store(kd + row, tl.sum(value, 0))
            if seen is not None:
                tl.store(seen + 2, tl.max(agree, 0))
        if dz is not None and MEAN_FIRST:
            row_mean, pull = tl.sum(mean, 0), 0.0
            if SCORED:
                pull = through * (tl.sum(forth, 0) - row_mean * tl.sum(centre, 0))
            for start in range(0, vocab, BLOCK):
                x, a, _, log_p, log_q, log_q_ce = log_probabilities(
                    z_s, z_t, b_s, b_t, start + lanes, by_s, by_t, lse_s, lse_t, lse_ce, vocab,
                    stride, TEACHER, SCALED, CAP_S, CAP_T, SCORED
                )  # fmt: skip
                write_dz(
                    dz, start + lanes, stride, x, a, log_p, log_q, log_q_ce, label, ce_w, kd_w,
                    row_mean, pull, param, NAME, CE, CAP_S, SCORED
                )  # fmt: skip


def row_stride(vocab: int) -> int:
    """How far apart the rows of a logit block should lie, in elements."""
    return -(-vocab // ALIGN) * ALIGN


def row_losses(
    z_s: Tensor,  # (C, V) fp32, overwritten where dz is wanted
    z_t: Tensor | None,  # (C, V) fp32
    b_s: Tensor | None,  # (≥V,)
    b_t: Tensor | None,  # (≥V,)
    labels: Tensor | None,  # (C,)
    ce_weight: Tensor | None,  # (C,)
    kd_weight: Tensor | None,  # (C,)
    ce: Tensor,  # (C,) fp32, written where there are labels
    kd: Tensor,  # (C,) fp32, written where there is a teacher
    divergence: str,
    param: float,
    temperature: float,
    cap_s: float,
    cap_t: float,
    ignore_index: int,
    dz_dtype: torch.dtype | None,
    launch: dict[str, int] | None = None,
    seen: Tensor | None = None,  # (C, 3) fp32, contiguous, written: entropies and agreement
    standardize: bool = False,
) -> Tensor | None:
    """Write ce, kd and `seen` of every row; return dz (C, V) in `dz_dtype` (fp32 or a 16-bit one),
    in the memory of z_s, or None where no gradient is wanted.

    Blocks z_s and z_t have unit column strides and one row stride, at least V: `row_stride(V)` is
    the one that reads fastest.
    """
    rows, vocab = z_s.shape
    stride = z_s.stride(0)
    if z_t is not None and z_t.stride(0) != stride:
        raise ValueError(f"z_t: rows are {z_t.stride(0)} elements apart, those of z_s {stride}")
    dz = None if dz_dtype is None else z_s.view(dz_dtype)[:, :vocab]
    if not rows:
        return dz
    name = "none" if z_t is None else divergence
    settings: dict[str, Any] = dict(
        tables.bounded(launch or tables.launch("rows", z_s.device), z_s.device),
        NAME=name, SCALED=(temperature != 1.0 or standardize) and z_t is not None, CAP_S=cap_s,
        CAP_T=cap_t, SCORED=standardize and z_t is not None,
    )  # fmt: skip
    kernel = long_row_kernel
    if whole := whole_block(vocab, settings["BLOCK"]):
        kernel, settings["BLOCK"] = whole_row_kernel, whole
    else:
        settings["MEAN_FIRST"] = name in NEEDS_MEAN or settings["SCORED"]
    kernel[(rows,)](
        z_s, z_t, b_s, b_t, labels, ce_weight, kd_weight, ce, kd, seen, dz, vocab, stride,
        ignore_index, param, 1.0 / temperature, **settings,
    )  # fmt: skip
    return dz


def whole_block(vocab: int, block: int) -> int:
    """The block that holds a whole row, 0 where `block`, what stays in registers, is shorter."""
    needed = triton.next_power_of_2(vocab)
    return needed if needed <= block else 0


def bytes_moved(
    rows: int, vocab: int, teacher: bool, divergence: str, dz_bytes: int, block: int = 4096
) -> int:
    """Bytes that `row_losses` reads and writes in memory, the V-long ones; `dz_bytes` is the size
    of an element of dz, 0 where no gradient is wanted.
    """
    whole = whole_block(vocab, block) > 0
    reads = 1 if whole else sweeps(divergence if teacher else None, dz_bytes > 0)
    return rows * vocab * (reads * 4 * (1 + teacher) + dz_bytes)
