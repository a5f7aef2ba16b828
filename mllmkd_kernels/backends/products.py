"""Which matrix products, and in what precision? Shared by the backends that call a vendor's GEMM.

Accumulation is fp32 always (fp64 for fp64 inputs), and so are the results: 16-bit inputs are never
answered by a 16-bit block of logits. On CUDA the GEMM itself gives fp32 from 16-bit operands; where
the library has no such product (CPU), operands are widened, a slice of the vocabulary at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Rows of a head that are gone through at a time: 8,192 × D 4,096 is 128 MiB in fp32.
VOCAB_SLICE = 8192

#: The same on a CPU, for a single product: a fifth faster than all rows at once where few rows are
#: multiplied with them; and where they are widened for it. 512 × D 2,048 is 4 MiB. Of slices of 16
#: MiB malloc kept up to three at a time, by what the process had freed before; they were no faster.
MULTIPLIED_ROWS = 2048
WIDENED_ROWS = 512
_HALVES = (torch.bfloat16, torch.float16)


def strip_bytes(device: torch.device) -> int:
    """How much of a block of logits PyTorch's operators go through at a time, between the products.

    On a CPU the tensors that come and go for each of their dozens of passes then stay in the cache
    of their core, and malloc keeps little. Elsewhere a launch must have enough to do.
    """
    return torch.get_num_threads() * 2**18 if device.type == "cpu" else 2**26


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any input is fp64, else fp32."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def chunks(n: int, size: int) -> Iterator[slice]:
    """[0, n) in slices of `size`, the last one shorter."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


_mkldnn: Any = torch.backends.mkldnn  # its stubs lack `matmul`

#: Settings that may round inside a product, and how each does not; `_ROUND` are the values that do.
_SETTINGS = (
    (torch.backends.cuda.matmul, "fp32_precision", "ieee"),
    (_mkldnn.matmul, "fp32_precision", "ieee"),
    (torch.backends.cuda.matmul, "allow_fp16_accumulation", False),
)
_ROUND = ("tf32", "bf16", True)


class _Exact:
    """No setting rounds while any thread is inside. They belong to the process (PyTorch has them
    for no single product), so the first thread changes them and the last puts the caller's back:
    were each to restore what it found, the second would find, and leave behind, what the first set.
    """

    def __init__(self) -> None:
        self.lock, self.threads, self.before = threading.Lock(), 0, []

    def enter(self) -> None:
        with self.lock:
            self.threads += 1
            if self.threads > 1:
                return
            self.before = [(x, n, getattr(x, n)) for x, n, _ in _SETTINGS]
            for (x, name, was), (_, _, exact) in zip(self.before, _SETTINGS, strict=True):
                if was in _ROUND:
                    setattr(x, name, exact)

    def leave(self) -> None:
        with self.lock:
            self.threads -= 1
            if self.threads:
                return
            for x, name, was in self.before:
                if was in _ROUND:
                    setattr(x, name, was)


_exact = _Exact()


@contextmanager
def full_fp32() -> Iterator[None]:
    """fp32 products in fp32, and 16-bit ones summed in fp32, whatever
    ``torch.set_float32_matmul_precision`` and its like say: TF32, or bf16 on some processors, would
    round the logits. The caller's settings come back.
    """
    _exact.enter()
    try:
        yield
    finally:
        _exact.leave()


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, (M, K) by (K, L), in the accumulation dtype of `out`."""
    if _gemm_widens(a, b, out):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
        return
    a = a.to(out.dtype)
    for columns in chunks(b.shape[1], _slice(b, out)):
        torch.mm(a, b[:, columns].to(out.dtype), out=out[:, columns])


def add_product(out: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> None:
    """out += factor · a @ b in the accumulation dtype of `out`; `out` (M, L), and M or K may be V
    long.
    """
    if _gemm_widens(a, b, out):
        torch.addmm(out, a, b, alpha=factor, out_dtype=out.dtype, out=out)
    elif b.dtype == out.dtype or b.shape[0] <= VOCAB_SLICE:
        b = b.to(out.dtype)
        for rows in chunks(a.shape[0], VOCAB_SLICE):
            out[rows].addmm_(a[rows].to(out.dtype), b, alpha=factor)
    else:
        for k in chunks(b.shape[0], _slice(b, out)):
            out.addmm_(a[:, k].to(out.dtype), b[k].to(out.dtype), alpha=factor)


def _slice(x: Tensor, out: Tensor) -> int:
    """How many rows of a head are multiplied at a time, widened first where they are 16-bit."""
    if x.device.type != "cpu":
        return VOCAB_SLICE
    return MULTIPLIED_ROWS if x.dtype == out.dtype else WIDENED_ROWS


def head_gradient(dz: Tensor, h: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """dzᵀ h of dz (N, V) and h (N, D), both in the accumulation dtype: (rows, D), rounded once, to
    `dtype`; 0 in the rows beyond V.
    """
    dw = torch.empty(rows, h.shape[1], dtype=dtype, device=h.device)
    for tokens in chunks(dz.shape[1], _slice(h, dw)):
        columns = dz[:, tokens].mT
        if dtype == h.dtype:
            torch.mm(columns, h, out=dw[tokens])
        else:
            dw[tokens] = columns @ h
    dw[dz.shape[1] :].zero_()
    return dw


def product_split(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, (M, K) by (K, L), bf16 or fp32 each, in fp32 and as exact as an fp32 product, from
    products of bf16 matrices.

    An fp32 number is the sum of three bf16 numbers, each the rounding of what the ones before left.
    Products of parts that both are roundings of roundings fall below the last bit of fp32: with one
    operand in bf16 already three products remain, otherwise six. A GPU multiplies bf16 about 15
    times as fast as fp32. The small ones come first, so that large ones do not absorb them.
    """
    parts_a, parts_b = _bf16_parts(a), _bf16_parts(b)
    out = torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    pairs = [(i, j) for i in range(len(parts_a)) for j in range(len(parts_b)) if i + j < 3]
    smallest, *larger = sorted(pairs, key=sum, reverse=True)
    product(parts_a[smallest[0]], parts_b[smallest[1]], out)
    for i, j in larger:
        add_product(out, parts_a[i], parts_b[j])
    return out


def _bf16_parts(x: Tensor, count: int = 3) -> list[Tensor]:
    """x itself if it is bf16; else `count` bf16 tensors whose sum is x to 8 bits each: two for all
    of fp16, three for all of fp32.
    """
    if x.dtype == torch.bfloat16:
        return [x]
    x, parts = x.float(), []
    for _ in range(count):
        parts.append(x.to(torch.bfloat16))
        x = x - parts[-1]  # exact in fp32: the rest has fewer bits than x
    return parts


def on_tensor_cores(x: Tensor) -> bool:
    """Does the library multiply matrices like this one as they are into fp32?"""
    return x.device.type == "cuda" and x.dtype in _HALVES


def _gemm_widens(a: Tensor, b: Tensor, out: Tensor) -> bool:
    """Can the library multiply these as they are into an fp32 `out`?"""
    return on_tensor_cores(a) and a.dtype == b.dtype and out.dtype == torch.float32


def _fold(out: Tensor, a: Tensor, b: Tensor, write: bool, factor: float = 1.0) -> None:
    """out = a @ b if `write`, else out += factor · a @ b. Where a is a gradient in fp32 and b fp16,
    a GPU multiplies two bf16 parts of each, which hold 16 bits of a and all of b: three products on
    tensor cores instead of one in fp32 without them.
    """
    if not (out.device.type == "cuda" and a.dtype == torch.float32 and b.dtype == torch.float16):
        if write and b.dtype != out.dtype and not _gemm_widens(a, b, out):
            out.zero_()  # `product` would widen all of b at once, `add_product` a block at a time
            write = False
        product(a, b, out) if write else add_product(out, a, b, factor)
        return
    fold_in_parts(out, a, b, write, factor)


def fold_in_parts(out: Tensor, a: Tensor, b: Tensor, write: bool, factor: float = 1.0) -> None:
    """The same by bf16 parts, a slice of the longer of M and K at a time."""
    if write:
        out.zero_()
    tall = a.shape[0] > a.shape[1]
    for some in chunks(max(a.shape), VOCAB_SLICE):
        rows, k = (some, slice(None)) if tall else (slice(None), some)
        parts_a, parts_b = _bf16_parts(a[rows, k], 2), _bf16_parts(b[k], 2)
        for i, j in ((0, 1), (1, 0), (0, 0)):
            add_product(out[rows], parts_a[i], parts_b[j], factor)


class Into(NamedTuple):
    """Where a head's gradient is added as it is formed, in the place of a sum of its own."""

    main_grad: Tensor  # (≥V, D) in the accumulation dtype
    factor: float  # of what is added


class Gradients:
    """The accumulators of the wanted gradients of one head; `add` folds in the dz block of some
    rows, `result` gives dh (N, D), dw (V, D) and db (V,) in the accumulation dtype, and an empty
    tensor for what was not wanted, or added elsewhere.
    """

    def __init__(
        self, h: Tensor, w: Tensor, acc: torch.dtype, dh: bool, dw: bool, db: bool,
        into: Into | None = None,
    ) -> None:  # fmt: skip
        self.h, self.w, self.acc, self.into, self.begun = h, w, acc, into, False

        def made(wanted: bool, *shape: int) -> Tensor | None:
            return torch.empty(shape, dtype=acc, device=h.device) if wanted else None

        self.dh, self.db = made(dh, *h.shape), made(db, w.shape[0])
        self.dw = made(dw and into is None, *w.shape)
        self.wanted = dh or dw or db

    def add(
        self, rows: slice, dz: Tensor, columns: slice | None = None, dead: Tensor | None = None
    ) -> None:
        """Fold in dz (rows, columns), fp32 or the 16-bit dtype of h and w. By default the columns
        are the first `dz.shape[1]` of the vocabulary, the same for all rows, and no row comes
        twice: then dh is written, not added to, and so is dw at first. `dead` marks rows of zero
        weight, whose dz is 0: their h may hold NaN, and 0 · NaN is NaN.
        """
        whole, first = columns is None, not self.begun
        tokens = slice(0, dz.shape[1]) if columns is None else columns
        h = self.h[rows]
        if dead is not None:
            h = h.masked_fill(dead[:, None], 0)
        if first:
            self._begin(dz.shape[1] if whole else 0, whole)
        if self.dh is not None:
            _fold(self.dh[rows], dz, self.w[tokens], whole)
        if self.dw is not None:
            _fold(self.dw[tokens], dz.mT, h, whole and first)
        if self.into is not None:
            _fold(self.into.main_grad[tokens], dz.mT, h, False, self.into.factor)
        if self.db is not None:
            self.db[tokens] += dz.sum(0, dtype=self.acc)

    def _begin(self, vocab: int, whole: bool) -> None:
        """Zeros, but where a product is written first: dh, and dw up to the vocabulary."""
        self.begun = True
        rest = None if self.dw is None else self.dw[vocab:]
        for x in (None if whole else self.dh, rest, self.db):
            if x is not None:
                x.zero_()

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """(dh, dw, db)."""
        if not self.begun:
            self._begin(0, whole=False)

        def made(x: Tensor | None) -> Tensor:  # a new one each time: outputs may not alias
            return torch.empty(0, dtype=self.acc, device=self.h.device) if x is None else x

        return made(self.dh), made(self.dw), made(self.db)
