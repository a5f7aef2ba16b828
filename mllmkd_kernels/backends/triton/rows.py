"""chunk: from a block of logits to row terms and the gradient block.

One program has one row. With a = z_s/T and b = z_t/T, q = softmax(a), p = softmax(b):

    ce[n] = log Σ exp(z_s) − z_s[label]                  (0 where the label is ignored)
    kd[n] = Σ_k f(p_k, q_k)
    dz    = ce_weight · (softmax(z_s) − onehot) + kd_weight/T · ∂D/∂a,   times 1 − (z/c)² if capped

A row that fits one block is read once and stays in registers. A longer one is swept two or three
times: log-sum-exps; values, with dz in the same sweep where ∂D/∂a = q − p; dz of the others, which
need Σ q g first. Where the divergence sees z-scored logits, a sweep before those finds μ and σ, and
all divergences need sums first: a part of dz goes back through σ. Sums run in lanes of `PACK`
columns, which share a maximum: an exp a column and one more a lane. They are folded once a sweep,
always in the same order. A log-sum-exp is a pair: log q = (z − top)/T − rest loses nothing where
logits are 1e4.

The block comes as the GEMM made it: bias and soft-cap are applied here, in each sweep. Rows lie
`stride` apart, which may exceed the vocabulary, so that every row starts aligned whatever V is;
padding is read, never used, and dz is 0 there.

Where they are wanted, `seen` (C, 3) gets both entropies, from the sums of the log-sum-exps, and
the agreement: 1 where some column is the maximum of both rows.
"""
# pyright: reportAssignmentType=false, reportRedeclaration=false, reportArgumentType=false
# pyright: reportOptionalOperand=false
# (`NAME: tl.constexpr = ...` tells Triton when a name is known, and is no type.)

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mllmkd_kernels.backends.triton import tables
from mllmkd_kernels.backends.triton.diagnostics import entropy, fold_entropy, lowered, weighted
from mllmkd_kernels.backends.triton.divergence import NEEDS_MEAN, constants_of, gradient, terms
from mllmkd_kernels.backends.triton.heads import rounded
from mllmkd_kernels.backends.triton.scores import (
    along,
    logits,
    offset_of,
    pull_of,
    scored,
    scored_weight,
    spread,
)
from mllmkd_kernels.backends.triton.tiles import LOWEST, exp, log_of_sum, softcap_slope
from mllmkd_kernels.divergence import sweeps

#: Rows of a logit block start this many elements apart, or a multiple: 64 bytes in fp32.
ALIGN = 16

#: Columns that share a running maximum: what a thread reads at once, 16 bytes.
PACK = tl.constexpr(4)


@triton.jit
def divided(x, inverse, SCALED: tl.constexpr):
    """x / T; with T = 1, x itself."""
    if SCALED:
        x = x * inverse
    return x


@triton.jit
def swept(
    x, top, total, total_one, sum_x, inverse,
    SCALED: tl.constexpr, ONE: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """(top, Σ exp((x − top)/T), the same at T = 1 if ONE, Σ of its terms times their logarithms if
    ENTROPY) of every lane, (L,) each, once the columns of the tile x (L, PACK) are in them too.
    """
    new = tl.maximum(top, tl.max(x, 1))
    x, step = x - new[:, None], top - new
    a, down = divided(x, inverse, SCALED), divided(step, inverse, SCALED)
    if ENTROPY:
        sum_x = lowered(sum_x, total, down) + tl.sum(weighted(a), 1)
    total = total * exp(down) + tl.sum(exp(a), 1)
    if ONE:
        total_one = total_one * exp(step) + tl.sum(exp(x), 1)
    return new, total, total_one, sum_x


@triton.jit
def fold(top, most, total, inverse, SCALED: tl.constexpr):
    """log Σ exp((x − most)/T) of all lanes, `most` being the largest top."""
    return log_of_sum(tl.sum(total * exp(divided(top - most, inverse, SCALED)), 0))


@triton.jit
def whole(a):
    """The same from the row itself, less its maximum and divided by T."""
    return log_of_sum(tl.sum(exp(a), 0))


@triton.jit
def whole_entropy(a):
    """And the entropy of the row."""
    return entropy(tl.sum(exp(a), 0), tl.sum(weighted(a), 0))


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
def write_ce(
    ce, z, bias, row, label, top, rest, vocab, stride, ignore_index, CAP: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """CE of the row; before dz overwrites its logits, where it does."""
    used = label != ignore_index
    at_label = logits(z, bias, tl.where(used, label, 0), vocab, stride, CAP, EVEN)
    tl.debug_barrier()  # no warp writes dz there before all have read it
    tl.store(ce + row, tl.where(used, (top - at_label) + rest, 0.0))


@triton.jit
def write_dz(
    dz, columns, stride, x, log_p, log_q, log_q_ce, label, ce_w, kd_w, mean, offset, pull, param,
    NAME: tl.constexpr, CE: tl.constexpr, CAP: tl.constexpr, SCORED: tl.constexpr
):  # fmt: skip
    """dz of one tile of a row, exactly 0 where the row has no weight, whatever it holds."""
    g = tl.zeros_like(x)
    if NAME != "none":
        _, slope = terms(log_p, log_q, param, NAME)
        g = gradient(log_p, log_q, slope, mean, NAME)
        if SCORED:
            g -= scored(log_q, offset) * pull
        g = tl.where(kd_w == 0.0, 0.0, kd_w * g)
    if CE:
        q = exp(log_q_ce)
        g += tl.where(ce_w == 0.0, 0.0, ce_w * tl.where(columns == label, q - 1.0, q))
    if CAP != 0.0:  # 0 stays 0: x is −inf in the padding, and may be NaN in a row without weight
        g = tl.where(g == 0.0, 0.0, g * softcap_slope(x, CAP))
    tl.store(dz + columns, rounded(g, dz.dtype.element_ty), columns < stride)


@triton.jit
def log_probabilities(
    z_s, z_t, b_s, b_t, columns, top_s, rest_s, rest_ce, top_t, rest_t, vocab, stride,
    inverse_s, inverse_t, TEACHER: tl.constexpr, SCALED: tl.constexpr, CAP_S: tl.constexpr,
    CAP_T: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """(z_s, z_t, log p, log q, log softmax(z_s)) of one tile; without a teacher z_t and log p stand
    for nothing.
    """
    x = logits(z_s, b_s, columns, vocab, stride, CAP_S, EVEN)
    below = x - top_s
    log_q = divided(below, inverse_s, SCALED) - rest_s
    y, log_p, log_q_ce = x, log_q, log_q
    if SCALED:
        log_q_ce = below - rest_ce
    if TEACHER:
        y = logits(z_t, b_t, columns, vocab, stride, CAP_T, EVEN)
        log_p = divided(y - top_t, inverse_t, SCALED) - rest_t
    return x, y, log_p, log_q, log_q_ce


@triton.jit
def whole_row_kernel(
    z_s, z_t, b_s, b_t, labels, ce_weight, kd_weight, ce, kd, seen, dz, vocab, stride, dz_stride,
    ignore_index, param, inverse, NAME: tl.constexpr, SCALED: tl.constexpr, CAP_S: tl.constexpr,
    CAP_T: tl.constexpr, SCORED: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A row of at most BLOCK columns, read once."""
    row = tl.program_id(0).to(tl.int64)
    CE: tl.constexpr = labels is not None
    TEACHER: tl.constexpr = NAME != "none"
    columns = tl.arange(0, BLOCK)
    z_s += row * stride
    label, ce_w, kd_w = weights(ce_weight, kd_weight, labels, row, inverse, ignore_index, TEACHER)
    if TEACHER:
        z_t += row * stride
    inverse_s, inverse_t, middle, through, pull = inverse, inverse, 0.0, 0.0, 0.0
    if SCORED:
        middle, inverse_s, through = spread(z_s, b_s, vocab, stride, inverse, CAP_S, EVEN, BLOCK)
        inverse_t = spread(z_t, b_t, vocab, stride, inverse, CAP_T, EVEN, BLOCK)[1]
        kd_w = scored_weight(kd_w, inverse_s, inverse)
    x = logits(z_s, b_s, columns, vocab, stride, CAP_S, EVEN)
    top = tl.max(x, 0)
    below = x - top
    a = divided(below, inverse_s, SCALED)
    rest = whole(a)
    log_q, offset = a - rest, offset_of(rest, top, middle, inverse_s)
    if seen is not None:
        tl.store(seen + row * 3, whole_entropy(a))
    log_p, log_q_ce, mean = log_q, log_q, 0.0
    if CE:
        if SCALED:
            rest = whole(below)
            log_q_ce = below - rest
        write_ce(ce, z_s, b_s, row, label, top, rest, vocab, stride, ignore_index, CAP_S, EVEN)
    if TEACHER:
        y = logits(z_t, b_t, columns, vocab, stride, CAP_T, EVEN)
        top_t = tl.max(y, 0)
        b = divided(y - top_t, inverse_t, SCALED)
        log_p = b - whole(b)
        if seen is not None:
            tl.store(seen + row * 3 + 1, whole_entropy(b))
            both = (x == top) & (y == top_t)
            tl.store(seen + row * 3 + 2, tl.max(tl.where(both, 1.0, 0.0), 0))
        value, slope = terms(log_p, log_q, param, NAME)
        tl.store(kd + row, tl.sum(value, 0))
        mean = tl.sum(exp(log_q) * slope, 0)
        if SCORED:
            forth, centre = along(log_p, log_q, slope, offset, NAME)
            pull = pull_of(through, tl.sum(forth, 0), mean, tl.sum(centre, 0))
    if dz is not None:
        write_dz(
            dz + row * dz_stride, columns, dz_stride, x, log_p, log_q, log_q_ce, label, ce_w, kd_w,
            mean, offset, pull, param, NAME, CE, CAP_S, SCORED
        )  # fmt: skip


@triton.jit
def long_row_kernel(
    z_s, z_t, b_s, b_t, labels, ce_weight, kd_weight, ce, kd, seen, dz, vocab, stride, dz_stride,
    ignore_index, param, inverse, NAME: tl.constexpr, SCALED: tl.constexpr, CAP_S: tl.constexpr,
    CAP_T: tl.constexpr, SCORED: tl.constexpr, EVEN: tl.constexpr, MEAN_FIRST: tl.constexpr,
    BLOCK: tl.constexpr
):  # fmt: skip
    """A row of any length, swept two or three times, z-scored four times."""
    row = tl.program_id(0).to(tl.int64)
    CE: tl.constexpr = labels is not None
    TEACHER: tl.constexpr = NAME != "none"
    CE_APART: tl.constexpr = SCALED and labels is not None
    ENTROPY: tl.constexpr = seen is not None
    LANES: tl.constexpr = BLOCK // PACK
    z_s += row * stride
    if TEACHER:
        z_t += row * stride
    label, ce_w, kd_w = weights(ce_weight, kd_weight, labels, row, inverse, ignore_index, TEACHER)

    inverse_s, inverse_t, middle, through = inverse, inverse, 0.0, 0.0
    if SCORED:
        middle, inverse_s, through = spread(z_s, b_s, vocab, stride, inverse, CAP_S, EVEN, BLOCK)
        inverse_t = spread(z_t, b_t, vocab, stride, inverse, CAP_T, EVEN, BLOCK)[1]
        kd_w = scored_weight(kd_w, inverse_s, inverse)
    top_s = tl.full((LANES,), LOWEST, tl.float32)
    total_s = tl.zeros((LANES,), tl.float32)
    top_t, total_t, total_ce, sum_s, sum_t = top_s, total_s, total_s, total_s, total_s
    pairs = tl.arange(0, LANES)[:, None] * PACK + tl.arange(0, PACK)[None, :]
    for start in range(0, vocab, BLOCK):
        x = logits(z_s, b_s, start + pairs, vocab, stride, CAP_S, EVEN)
        top_s, total_s, total_ce, sum_s = swept(
            x, top_s, total_s, total_ce, sum_s, inverse_s, SCALED, CE_APART, ENTROPY
        )
        if TEACHER:
            y = logits(z_t, b_t, start + pairs, vocab, stride, CAP_T, EVEN)
            top_t, total_t, _, sum_t = swept(
                y, top_t, total_t, total_t, sum_t, inverse_t, SCALED, False, ENTROPY
            )
    most_s = tl.max(top_s, 0)
    rest_s = fold(top_s, most_s, total_s, inverse_s, SCALED)
    offset = offset_of(rest_s, most_s, middle, inverse_s)
    rest_ce, most_t, rest_t = rest_s, most_s, rest_s
    if CE_APART:
        rest_ce = fold(top_s, most_s, total_ce, inverse, False)
    if TEACHER:
        most_t = tl.max(top_t, 0)
        rest_t = fold(top_t, most_t, total_t, inverse_t, SCALED)
    if ENTROPY:
        seen += row * 3
        tl.store(seen, fold_entropy(divided(top_s - most_s, inverse_s, SCALED), total_s, sum_s))
        if TEACHER:
            below = divided(top_t - most_t, inverse_t, SCALED)
            tl.store(seen + 1, fold_entropy(below, total_t, sum_t))
    if CE:
        write_ce(
            ce, z_s, b_s, row, label, most_s, rest_ce, vocab, stride, ignore_index, CAP_S, EVEN
        )

    if dz is not None:
        dz += row * dz_stride
    lanes = tl.arange(0, BLOCK)
    if TEACHER or dz is not None:
        value = tl.zeros((BLOCK,), tl.float32)
        mean = tl.zeros((BLOCK,), tl.float32)
        agree, forth, centre = mean, mean, mean
        for start in range(0, vocab, BLOCK):
            x, y, log_p, log_q, log_q_ce = log_probabilities(
                z_s, z_t, b_s, b_t, start + lanes, most_s, rest_s, rest_ce, most_t, rest_t, vocab,
                stride, inverse_s, inverse_t, TEACHER, SCALED, CAP_S, CAP_T, EVEN
            )  # fmt: skip
            if TEACHER:
                f, slope = terms(log_p, log_q, param, NAME)
                value += f
                mean += exp(log_q) * slope
                if SCORED:
                    ahead, aside = along(log_p, log_q, slope, offset, NAME)
                    forth, centre = forth + ahead, centre + aside
                if ENTROPY:
                    agree = tl.where((x == most_s) & (y == most_t), 1.0, agree)
            if dz is not None and not MEAN_FIRST:
                write_dz(
                    dz, start + lanes, dz_stride, x, log_p, log_q, log_q_ce, label, ce_w, kd_w,
                    0.0, 0.0, 0.0, param, NAME, CE, CAP_S, SCORED
                )  # fmt: skip
        if TEACHER:
            tl.store(kd + row, tl.sum(value, 0))
            if ENTROPY:
                tl.store(seen + 2, tl.max(agree, 0))
        if dz is not None and MEAN_FIRST:
            row_mean, pull = tl.sum(mean, 0), 0.0
            if SCORED:
                pull = pull_of(through, tl.sum(forth, 0), row_mean, tl.sum(centre, 0))
            for start in range(0, vocab, BLOCK):
                x, _, log_p, log_q, log_q_ce = log_probabilities(
                    z_s, z_t, b_s, b_t, start + lanes, most_s, rest_s, rest_ce, most_t, rest_t,
                    vocab, stride, inverse_s, inverse_t, TEACHER, SCALED, CAP_S, CAP_T, EVEN
                )  # fmt: skip
                write_dz(
                    dz, start + lanes, dz_stride, x, log_p, log_q, log_q_ce, label, ce_w, kd_w,
                    row_mean, offset, pull, param, NAME, CE, CAP_S, SCORED
                )  # fmt: skip


def row_stride(vocab: int) -> int:
    """How far apart the rows of a logit block should lie, in elements."""
    return -(-vocab // ALIGN) * ALIGN


def row_losses(
    z_s: Tensor,  # (C, V) fp32
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
    dz: Tensor | None,  # (C, V) fp32 or a 16-bit dtype, written; z_s itself may be it
    launch: dict[str, int] | None = None,
    seen: Tensor | None = None,  # (C, 3) fp32, contiguous, written: entropies and agreement
    standardize: bool = False,
) -> None:
    """Write ce, kd and `seen` of every row, and dz where it is wanted.

    Blocks z_s and z_t have unit column strides and one row stride, at least V: `row_stride(V)` is
    the one that reads fastest. So has dz, whose columns up to its own stride are written.
    """
    rows, vocab = z_s.shape
    stride = z_s.stride(0)
    if z_t is not None and z_t.stride(0) != stride:
        raise ValueError(f"z_t: rows are {z_t.stride(0)} elements apart, those of z_s {stride}")
    if not rows:
        return
    name = "none" if z_t is None else divergence
    settings: dict[str, Any] = dict(
        tables.bounded(launch or tables.launch("rows", z_s.device), z_s.device),
        NAME=name, SCALED=(temperature != 1.0 or standardize) and z_t is not None, CAP_S=cap_s,
        CAP_T=cap_t, SCORED=standardize and z_t is not None, EVEN=vocab == stride,
    )  # fmt: skip
    kernel = long_row_kernel
    if whole := whole_block(vocab, settings["BLOCK"]):
        kernel, settings["BLOCK"] = whole_row_kernel, whole
    else:
        settings["MEAN_FIRST"] = name in NEEDS_MEAN or settings["SCORED"]
    kernel[(rows,)](
        z_s, z_t, b_s, b_t, labels, ce_weight, kd_weight, ce, kd, seen, dz, vocab, stride,
        0 if dz is None else dz.stride(0), ignore_index, constants_of(name, param),
        1.0 / temperature, **settings,
    )  # fmt: skip


def whole_block(vocab: int, block: int) -> int:
    """The block that holds a whole row, 0 where `block`, what stays in registers, is shorter."""
    needed = triton.next_power_of_2(vocab)
    return needed if needed <= block else 0


def bytes_moved(
    rows: int, vocab: int, teacher: bool, divergence: str, dz_bytes: int, block: int = 2048
) -> int:
    """Bytes that `row_losses` reads and writes in memory, the V-long ones; `dz_bytes` is the size
    of an element of dz, 0 where no gradient is wanted.
    """
    whole = whole_block(vocab, block) > 0
    reads = 1 if whole else sweeps(divergence if teacher else None, dz_bytes > 0)
    return rows * vocab * (reads * 4 * (1 + teacher) + dz_bytes)
