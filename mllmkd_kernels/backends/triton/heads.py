"""How do the logits of a head come into registers? Tiles of ``softcap(h Wᵀ + b)``, and how a kernel
goes through one.

Operands are loaded by pointers, or by tensor descriptors (TMA) where the machine has them and rows
are of whole 16-byte units. Operands of unequal dtypes are widened to fp32 in registers, tile by
tile. A product is one matrix instruction's worth of fp32 numbers, far more than what follows it can
hold temporaries for: bias, soft-cap and everything else are done part by part.

Matrix units do not round their fp32 sums to nearest, and a long sum drifts by what grows with its
length. That cancels between two models of one width, not of unequal ones. So the hidden size is
summed in segments, whose sums are added by ordinary fp32 additions (see `SEGMENT`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from mllmkd_kernels.backends.calls import Head
from mllmkd_kernels.backends.triton.tiles import softcap

#: Triton's interpreter multiplies bf16 numbers as if their bits were integers, and rounds to bf16
#: by cutting bits off. Both are mended where it runs.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


#: Columns of the longest segment. Known, from models of the hardware that agree with it bit by bit
#: (arXiv 2511.10909, 2512.07004): NVIDIA's tensor cores cut fp32 sums off toward zero, of 8 columns
#: at a time (sm_80 to sm_89) or of 16 (sm_90, sm_100, sm_120); CDNA3 rounds what it adds down, of 8
#: columns. Assumed: later ones do likewise. Emulated error of dh, V 151,936, D 1,024 and 2,560,
#: logits 0.0055 apart, no other rounding: in one sum 0.19%, 0.36% (8 columns), 0.18% (CDNA3); in
#: segments of 1,024 0.03%, of 512 0.013 to 0.019%, of 256 no less; rounded to nearest 0.03%.
SEGMENT = tl.constexpr(512)


@triton.constexpr_function
def segment_of(d, block, most):
    """Columns of each segment of `d`, whole blocks: `d` itself if it is few, else the longest, from
    `most` down to half of it, with the fewest columns beyond `d` in the last one.
    """
    longest, step = max(most, block), max(most // 8, block)
    if d <= longest:
        return d
    return min(range(longest, longest // 2 - 1, -step), key=lambda length: -d % length)


@triton.jit
def _operand(x, first, k, count, D: tl.constexpr, WHOLE: tl.constexpr, TMA: tl.constexpr,
             ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Rows first … of x (count, D), columns k …: (ROWS, COLUMNS), 0 beyond D, where no tile is
    if WHOLE. Rows beyond `count` hold something harmless: nobody keeps what comes of them.
    """
    if TMA:
        tile = x.load([first, k])
    else:
        # offsets within the tile are int32, which saves registers; the tile's own is int64
        rows = tl.minimum(tl.arange(0, ROWS), count - 1 - first)
        columns = tl.arange(0, COLUMNS)
        places = x + tl.cast(first, tl.int64) * D + k + (rows[:, None] * D + columns[None, :])
        if WHOLE:
            tile = tl.load(places)
        else:
            tile = tl.load(places, mask=(columns < D - k)[None, :], other=0.0)
    return tile


@triton.jit
def _added(z, h, w, row, column, k, n, vocab, D: tl.constexpr, WHOLE: tl.constexpr,
           TMA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
           BLOCK_D: tl.constexpr):  # fmt: skip
    """z + the product of columns k … of both operands."""
    x = _operand(h, row, k, n, D, WHOLE, TMA, BLOCK_N, BLOCK_D)
    y = _operand(w, column, k, vocab, D, WHOLE, TMA, BLOCK_V, BLOCK_D)
    if INTERPRETED or x.dtype != y.dtype:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y.T, z, input_precision="ieee")


@triton.jit
def product_tile(h, w, row, column, n, vocab, D: tl.constexpr, TMA: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """h Wᵀ of rows row … and tokens column …, (BLOCK_N, BLOCK_V) fp32."""
    LENGTH: tl.constexpr = segment_of(D, BLOCK_D, SEGMENT)  # pyright: ignore[reportAssignmentType]
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if LENGTH == D:
        for k in range(0, D, BLOCK_D):
            z = _added(z, h, w, row, column, k, n, vocab, D, D % BLOCK_D == 0, TMA,
                       BLOCK_N, BLOCK_V, BLOCK_D)  # fmt: skip
    else:
        # flattened into one loop, whose loads run on from one segment into the next
        for first in tl.range(0, D, LENGTH, flatten=True):  # pyright: ignore
            part = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
            for k in range(0, LENGTH, BLOCK_D):
                part = _added(part, h, w, row, column, first + k, n, vocab, D, D % LENGTH == 0,
                              TMA, BLOCK_N, BLOCK_V, BLOCK_D)  # fmt: skip
            z += part
    return z


@triton.jit
def logits(product, bias, columns, vocab, CAP: tl.constexpr):
    """softcap(product + bias) of a part of a tile; −inf beyond the vocabulary."""
    z = product
    if bias is not None:
        z += tl.load(bias + columns, mask=columns < vocab, other=0.0).to(tl.float32)[None, :]
    if CAP > 0:  # a tanh would hide an inf in h
        z = tl.where(tl.abs(product) == float("inf"), float("nan"), softcap(z, CAP))
    return tl.where((columns < vocab)[None, :], z, float("-inf"))


@triton.jit
def parts_of(x, R: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr):
    """x (R, C) in PARTS parts of C/PARTS columns each: a renaming of registers. What follows a
    product is written part by part: taken whole, every step of a divergence would hold temporaries
    of all elements of the tile at once, and spill.
    """
    if PARTS == 1:
        parts = (x,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(x, (R, 2, C // 2)), (0, 2, 1)))
        parts = parts_of(left, R, C // 2, PARTS // 2) + parts_of(right, R, C // 2, PARTS // 2)
    return parts


@triton.jit
def part_columns(column, part, WIDTH: tl.constexpr):
    """Columns of a part of the tile that starts at `column`."""
    return column + part * WIDTH + tl.arange(0, WIDTH)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in a narrower dtype, to nearest even as a GPU rounds it."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, near.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


def tma(head: Head) -> bool:
    """Should tensor descriptors load it? Where tensor cores multiply it and the machine has TMA:
    rows of whole 16-byte units. (fp32 is multiplied by FMAs, and spills fed that way.)
    """
    aligned = all(
        x.data_ptr() % 16 == 0 and x.itemsize == 2 and x.shape[1] % 8 == 0 for x in (head.h, head.w)
    )
    nvidia = head.h.is_cuda and not torch.version.hip  # AMD's have no TMA
    able = nvidia and torch.cuda.get_device_capability(head.h.device)[0] > 8
    return able and aligned and head.h.numel() > 0


def operands(head: Head, by_descriptors: bool, launch: dict[str, int]) -> tuple[Any, Any]:
    """h and w as a kernel takes them."""
    if not by_descriptors:
        return head.h, head.w
    box = launch["BLOCK_D"]
    return (
        TensorDescriptor.from_tensor(head.h, [launch["BLOCK_N"], box]),
        TensorDescriptor.from_tensor(head.w, [launch["BLOCK_V"], box]),
    )
