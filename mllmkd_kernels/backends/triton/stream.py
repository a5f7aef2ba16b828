"""What do the logits say, when nobody writes them down? Kernels that multiply tiles of a head and
keep, of each tile, only sums per row, or the gradient block.

A program takes a block of rows and a range of vocabulary tiles (a *split*); `logits_tile` makes one
tile ``z = softcap(h Wᵀ + b)`` in fp32 registers. Three sweeps use it:

    statistics   top = max z,  log Σ exp((z − top)·scale),  the logit of the label     one head
    values       D = Σ f(p, q)  and  mean = Σ q ∂f/∂q                                  both heads
    gradient     dz = ce·(softmax(z) − onehot) + kd·∂D/∂a  of some columns             both heads

with ``scale = 1/T``. A log-sum-exp is kept as the pair (top, log Σ): ``(z − top)·scale − log Σ``
loses nothing where the logits are 1e4, their rounded sum would. Partial sums lie in (split, row)
and are added in the order of splits: no atomics, the same bits every run.

Tiles are loaded by pointers, or by tensor descriptors (TMA) where the machine has them and rows are
16-byte aligned. Operands of unequal dtypes are widened to fp32 tile by tile, in registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from mllmkd_kernels.backends.triton import tables
from mllmkd_kernels.backends.triton.divergence import gradient as divergence_gradient
from mllmkd_kernels.backends.triton.divergence import terms, times
from mllmkd_kernels.backends.triton.tiles import LOWEST, log_of_sum, softcap, softcap_slope

#: What is known of every row: `facts` is a matrix (11, N) fp32. Of the student and of the teacher
#: what `statistics` finds (log Σ at scale 1 and the label's logit for the student only), then
#: mean = Σ q·slope and the weights of CE and of ∂D/∂a.
TOP_S, LOG_S, LOG_ONE, Z_LABEL = (tl.constexpr(i) for i in range(4))
TOP_T, LOG_T = tl.constexpr(4), tl.constexpr(5)
MEAN, CE_WEIGHT, KD_WEIGHT = (tl.constexpr(i) for i in range(8, 11))
FACTS = 11

#: Row blocks that are dealt out together: 16 blocks of 128 rows of D 2,560 are 10 MiB of L2.
GROUP_BLOCKS = 16

#: Triton's interpreter multiplies bf16 numbers as if their bits were integers, and rounds to bf16 by
#: cutting bits off. Both are mended where it runs.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))

#: Rows of a merge program.
MERGE_ROWS = 128

#: Streaming multiprocessors of an H100, assumed where there is no GPU to ask.
PROCESSORS = 132

#: More splits than this balance nothing, and each costs a row of partial sums.
MOST_SPLITS = 64


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
def _operand(x, first, k, count, D: tl.constexpr, TMA: tl.constexpr, ROWS: tl.constexpr,
             COLUMNS: tl.constexpr):  # fmt: skip
    """Rows first … of x (count, D), columns k …: (ROWS, COLUMNS), 0 beyond D. Rows beyond `count`
    hold something harmless: nobody keeps what comes of them.
    """
    if TMA:
        return x.load([first, k])
    rows = tl.minimum(first + tl.arange(0, ROWS), count - 1).to(tl.int64)
    columns = k + tl.arange(0, COLUMNS)
    places = x + rows[:, None] * D + columns[None, :]
    if D % COLUMNS == 0:
        return tl.load(places)
    return tl.load(places, mask=(columns < D)[None, :], other=0.0)


@triton.jit
def logits_tile(h, w, bias, row, column, n, vocab, D: tl.constexpr, CAP: tl.constexpr,
                TMA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
                BLOCK_D: tl.constexpr):  # fmt: skip
    """softcap(h Wᵀ + b) of rows row … and tokens column …, (BLOCK_N, BLOCK_V) fp32; −inf beyond
    the vocabulary.
    """
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for k in range(0, D, BLOCK_D):
        x = _operand(h, row, k, n, D, TMA, BLOCK_N, BLOCK_D)
        y = _operand(w, column, k, vocab, D, TMA, BLOCK_V, BLOCK_D)
        if INTERPRETED or x.dtype != y.dtype:
            x, y = x.to(tl.float32), y.to(tl.float32)
        z = tl.dot(x, y.T, z, input_precision="ieee")
    columns = column + tl.arange(0, BLOCK_V)
    broken = tl.abs(z) == float("inf")  # an inf in h, which a tanh would hide
    if bias is not None:
        z += tl.load(bias + columns, mask=columns < vocab, other=0.0).to(tl.float32)[None, :]
    if CAP > 0:
        z = tl.where(broken, float("nan"), softcap(z, CAP))
    return tl.where((columns < vocab)[None, :], z, float("-inf"))


@triton.jit
def _fact(facts, which, n, rows):
    return tl.load(facts + which * n + rows, mask=rows < n, other=0.0)


@triton.jit
def _log_probability(z, facts, TOP: tl.constexpr, LOG: tl.constexpr, n, rows, scale):
    """log softmax(z · scale) of a tile, from its rows' statistics."""
    return (z - _fact(facts, TOP, n, rows)[:, None]) * scale - _fact(facts, LOG, n, rows)[:, None]


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """x in a narrower dtype, to nearest even as a GPU rounds it."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, near.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


# --- kernels --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "tiles"])
def statistics_kernel(
    h, w, bias, labels, partial, n, vocab, tiles, scale,
    D: tl.constexpr, CAP: tl.constexpr, TWO_SCALES: tl.constexpr, TMA: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """partial (splits, 4, N): of `tiles` tiles, the maximum, Σ exp((z − top)·scale), the same at
    scale 1 where it is another number, and the logit of the label.
    """
    block, split = _place(tl.program_id(0), tl.cdiv(n, BLOCK_N), GROUP)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    top = tl.full((BLOCK_N,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    total_one = tl.zeros((BLOCK_N,), tl.float32)
    z_label = tl.zeros((BLOCK_N,), tl.float32)
    label = rows * 0
    if labels is not None:
        label = tl.load(labels + rows, mask=rows < n, other=-1).to(tl.int32)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(vocab, BLOCK_V))):
        z = logits_tile(h, w, bias, block * BLOCK_N, tile * BLOCK_V, n, vocab, D, CAP, TMA,
                        BLOCK_N, BLOCK_V, BLOCK_D)  # fmt: skip
        higher = tl.maximum(top, tl.max(z, 1))
        x, step = z - higher[:, None], top - higher
        total = total * tl.exp(step * scale) + tl.sum(tl.exp(x * scale), 1)
        if TWO_SCALES:
            total_one = total_one * tl.exp(step) + tl.sum(tl.exp(x), 1)
        if labels is not None:
            here = label[:, None] == (tile * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]
            z_label += tl.sum(tl.where(here, z, 0.0), 1)
        top = higher
    mine = partial + split.to(tl.int64) * 4 * n + rows
    tl.store(mine, top, mask=rows < n)
    tl.store(mine + n, total, mask=rows < n)
    tl.store(mine + 2 * n, total_one, mask=rows < n)
    tl.store(mine + 3 * n, z_label, mask=rows < n)


@triton.jit(do_not_specialize=["n", "splits"])
def merge_kernel(partial, merged, n, splits, scale, BLOCK: tl.constexpr):
    """merged (4, N): top, log Σ exp((z − top)·scale), log Σ exp(z − top), z[label]."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < n
    top = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    total_one = tl.zeros((BLOCK,), tl.float32)
    z_label = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        theirs = partial + tl.cast(split, tl.int64) * 4 * n + rows
        other = tl.load(theirs, mask=inside, other=0.0)
        higher = tl.maximum(top, other)
        step, other_step = top - higher, other - higher
        total *= tl.exp(step * scale)
        total += tl.load(theirs + n, mask=inside, other=1.0) * tl.exp(other_step * scale)
        total_one *= tl.exp(step)
        total_one += tl.load(theirs + 2 * n, mask=inside, other=1.0) * tl.exp(other_step)
        z_label += tl.load(theirs + 3 * n, mask=inside, other=0.0)
        top = higher
    tl.store(merged + rows, top, mask=inside)
    tl.store(merged + n + rows, log_of_sum(total), mask=inside)
    tl.store(merged + 2 * n + rows, log_of_sum(total_one), mask=inside)
    tl.store(merged + 3 * n + rows, z_label, mask=inside)


@triton.jit(do_not_specialize=["n", "tiles"])
def values_kernel(
    hs, ws, bs, ht, wt, bt, facts, partial, n, vocab, tiles, scale, param,
    NAME: tl.constexpr, D_S: tl.constexpr, D_T: tl.constexpr, CAP_S: tl.constexpr,
    CAP_T: tl.constexpr, TMA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """partial (splits, 2, N): Σ f and Σ q·slope of `tiles` tiles."""
    block, split = _place(tl.program_id(0), tl.cdiv(n, BLOCK_N), GROUP)
    row = block * BLOCK_N
    rows = row + tl.arange(0, BLOCK_N)
    value = tl.zeros((BLOCK_N,), tl.float32)
    mean = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(vocab, BLOCK_V))):
        z_s = logits_tile(hs, ws, bs, row, tile * BLOCK_V, n, vocab, D_S, CAP_S, TMA,
                          BLOCK_N, BLOCK_V, BLOCK_D)  # fmt: skip
        z_t = logits_tile(ht, wt, bt, row, tile * BLOCK_V, n, vocab, D_T, CAP_T, TMA,
                          BLOCK_N, BLOCK_V, BLOCK_D)  # fmt: skip
        log_q = _log_probability(z_s, facts, TOP_S, LOG_S, n, rows, scale)
        log_p = _log_probability(z_t, facts, TOP_T, LOG_T, n, rows, scale)
        f, slope = terms(log_p, log_q, param, NAME)
        value += tl.sum(f, 1)
        mean += tl.sum(times(tl.exp(log_q), slope), 1)
    mine = partial + split.to(tl.int64) * 2 * n + rows
    tl.store(mine, value, mask=rows < n)
    tl.store(mine + n, mean, mask=rows < n)


@triton.jit(do_not_specialize=["n", "first", "end"])
def gradient_kernel(
    hs, ws, bs, ht, wt, bt, labels, facts, dz, partial, n, first, end, stride, scale, param,
    NAME: tl.constexpr, D_S: tl.constexpr, D_T: tl.constexpr, CAP_S: tl.constexpr,
    CAP_T: tl.constexpr, TWO_SCALES: tl.constexpr, TMA: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dz (N, end − first) of tokens first … end, and partial (tiles, N): Σ f of each tile."""
    block, tile = _place(tl.program_id(0), tl.cdiv(n, BLOCK_N), GROUP)
    row, column = block * BLOCK_N, first + tile * BLOCK_V
    rows, columns = row + tl.arange(0, BLOCK_N), column + tl.arange(0, BLOCK_V)
    z_s = logits_tile(hs, ws, bs, row, column, n, end, D_S, CAP_S, TMA,
                      BLOCK_N, BLOCK_V, BLOCK_D)  # fmt: skip
    log_q = _log_probability(z_s, facts, TOP_S, LOG_S, n, rows, scale)
    dz_tile = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if wt is not None:
        z_t = logits_tile(ht, wt, bt, row, column, n, end, D_T, CAP_T, TMA,
                          BLOCK_N, BLOCK_V, BLOCK_D)  # fmt: skip
        log_p = _log_probability(z_t, facts, TOP_T, LOG_T, n, rows, scale)
        f, slope = terms(log_p, log_q, param, NAME)
        if partial is not None:
            tl.store(partial + tile.to(tl.int64) * n + rows, tl.sum(f, 1), mask=rows < n)
        mean = _fact(facts, MEAN, n, rows)[:, None]
        weight = _fact(facts, KD_WEIGHT, n, rows)[:, None]
        da = divergence_gradient(log_p, log_q, slope, mean, NAME)
        dz_tile += tl.where(weight == 0, 0.0, weight * da)  # NaN in a row of no weight stays there
    if labels is not None:
        if TWO_SCALES:
            log_q = _log_probability(z_s, facts, TOP_S, LOG_ONE, n, rows, 1.0)
        label = tl.load(labels + rows, mask=rows < n, other=-1).to(tl.int32)
        weight = _fact(facts, CE_WEIGHT, n, rows)[:, None]
        dq = tl.exp(log_q) - (label[:, None] == columns[None, :]).to(tl.float32)
        dz_tile += tl.where(weight == 0, 0.0, weight * dq)
    if CAP_S > 0:
        dz_tile = tl.where(dz_tile == 0, 0.0, dz_tile * softcap_slope(z_s, CAP_S))
    places = dz + rows.to(tl.int64)[:, None] * stride + (columns - first)[None, :]
    inside = (rows < n)[:, None] & (columns < end)[None, :]
    tl.store(places, _rounded(dz_tile, dz.dtype.element_ty), mask=inside)


# --- launchers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """A head with its rows: h (N, D) and w (V, D), contiguous; cap 0.0 is none."""

    h: Tensor  # (N, D)
    w: Tensor  # (≥V, D)
    bias: Tensor | None  # (≥V,)
    cap: float

    @property
    def tma(self) -> bool:
        """Can tensor descriptors load it? Rows of whole 16-byte units, and a machine with TMA."""
        aligned = self.h.numel() > 0 and all(
            x.data_ptr() % 16 == 0 and x.shape[1] * x.itemsize % 16 == 0 for x in (self.h, self.w)
        )
        return aligned and self.h.is_cuda and torch.cuda.get_device_capability(self.h.device)[0] > 8

    def operands(self, tma: bool, launch: dict[str, int]) -> tuple[Any, Any]:
        """h and w as a kernel takes them."""
        if not tma:
            return self.h, self.w
        box = launch["BLOCK_D"]
        return (
            TensorDescriptor.from_tensor(self.h, [launch["BLOCK_N"], box]),
            TensorDescriptor.from_tensor(self.w, [launch["BLOCK_V"], box]),
        )


def _launch(kernel: str, heads: tuple[Head, ...], override: dict[str, int] | None) -> dict:
    """The table's parameters; operands of unequal dtypes are fp32 when they are multiplied."""
    dtypes = {x.dtype for head in heads for x in (head.h, head.w)}
    plain = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return {**tables.launch(kernel, heads[0].h.device, plain), **(override or {})}


def processors(device: torch.device) -> int:
    """How many programs run side by side."""
    if device.type != "cuda":
        return PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def split_count(blocks: int, tiles: int, processors: int) -> int:
    """How many splits of `tiles` vocabulary tiles finish first, when `blocks` row blocks times
    that many programs run in waves; starting a program counts as a quarter of a tile.
    """

    def cost(splits: int) -> float:
        return triton.cdiv(blocks * splits, processors) * (triton.cdiv(tiles, splits) + 0.25)

    return min(range(1, max(1, min(tiles, MOST_SPLITS)) + 1), key=cost)


def _splits(n: int, vocab: int, device: torch.device, launch: dict[str, int]) -> tuple[int, int]:
    """(splits, tiles of each)."""
    tiles = triton.cdiv(vocab, launch["BLOCK_V"])
    wanted = split_count(triton.cdiv(n, launch["BLOCK_N"]), tiles, processors(device))
    each = triton.cdiv(tiles, wanted)
    return triton.cdiv(tiles, each), each


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
    *,
    tma: bool | None = None,
    launch: dict[str, int] | None = None,
) -> None:
    """Of every row the largest logit, log Σ exp((z − top)·scale), log Σ exp(z − top) if
    `two_scales`, and the logit of the label.
    """
    n, d = head.h.shape
    use = _launch("statistics", (head,), launch)
    splits, tiles = _splits(n, vocab, head.h.device, use)
    tma = head.tma if tma is None else tma
    partial = found.new_empty(splits, 4, n)
    arguments: list[Any] = [*head.operands(tma, use), head.bias, labels, partial, n, vocab, tiles]
    constants = {"D": d, "CAP": head.cap, "TWO_SCALES": two_scales, "TMA": tma}
    grid = (triton.cdiv(n, use["BLOCK_N"]) * splits,)
    statistics_kernel[grid](*arguments, scale, **constants, GROUP=GROUP_BLOCKS, **use)
    grid = (triton.cdiv(n, MERGE_ROWS),)
    merge_kernel[grid](*[partial, found, n, splits, scale], BLOCK=MERGE_ROWS)


def values(
    student: Head,
    teacher: Head,
    facts: Tensor,  # (11, N)
    divergence: str,
    param: float,
    scale: float,
    vocab: int,
    *,
    tma: bool | None = None,
    launch: dict[str, int] | None = None,
) -> Tensor:
    """(2, N) fp32: D and Σ q·slope of every row."""
    n = student.h.shape[0]
    use = _launch("values", (student, teacher), launch)
    splits, tiles = _splits(n, vocab, student.h.device, use)
    tma = student.tma and teacher.tma if tma is None else tma
    partial = facts.new_empty(splits, 2, n)
    arguments: list[Any] = [*student.operands(tma, use), student.bias]
    arguments += [*teacher.operands(tma, use), teacher.bias]
    arguments += [facts, partial, n, vocab, tiles, scale, param, divergence]
    constants = {**_widths(student, teacher), "TMA": tma, "GROUP": GROUP_BLOCKS}
    values_kernel[(triton.cdiv(n, use["BLOCK_N"]) * splits,)](*arguments, **constants, **use)
    return partial.sum(0)


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
    *,
    tma: bool | None = None,
    launch: dict[str, int] | None = None,
) -> Tensor | None:
    """Fill `dz` for the tokens `columns`; returns their share of D, (N,), if wanted."""
    n = student.h.shape[0]
    heads = (student,) if teacher is None else (student, teacher)
    use = _launch("gradient", heads, launch)
    tma = all(head.tma for head in heads) if tma is None else tma
    tiles = triton.cdiv(columns.stop - columns.start, use["BLOCK_V"])
    partial = facts.new_empty(tiles, n) if want_values else None
    arguments: list[Any] = [*student.operands(tma, use), student.bias]
    arguments += [None] * 3 if teacher is None else [*teacher.operands(tma, use), teacher.bias]
    arguments += [labels, facts, dz, partial, n, columns.start, columns.stop, dz.stride(0)]
    arguments += [scale, param, divergence]
    constants = {**_widths(student, teacher), "TMA": tma, "GROUP": GROUP_BLOCKS}
    constants["TWO_SCALES"] = two_scales
    gradient_kernel[(triton.cdiv(n, use["BLOCK_N"]) * tiles,)](*arguments, **constants, **use)
    return None if partial is None else partial.sum(0)
