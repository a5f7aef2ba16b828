"""chunk: a vendor's GEMM makes the logits of C rows, `rows` turns them into loss terms and
gradient, two more products fold the gradient into dh and dw.

There is one block of logits of each model, allocated once and used by every chunk. Where hidden
states and head are bf16, so is dz, and all products run on tensor cores. It then has a block of its
own for the rows of several chunks, which are folded at once: each fold reads and writes all of dw.
Otherwise dz is fp32 and takes the place of the student's logits: in fp16 entries below 6e-8, most
of a vocabulary's share of a row of weight 1/N, would be 0.

The CUDA row kernel has read a row before it writes: where no more rows are folded than a chunk has,
bf16 dz takes the place of the student's logits as well.

With `Options.beside` there are two of each block, and the rows of a chunk are gone through beside
the products of the next (`lanes`). A fold is then launched after the products of the chunk that
follows it: before them, it would make them wait for its own rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mllmkd_kernels.backends import cuda, eager, products
from mllmkd_kernels.backends.calls import Head, Options, Targets, dtype_of
from mllmkd_kernels.backends.triton.lanes import PRODUCTS, ROWS, Lanes
from mllmkd_kernels.backends.triton.rows import row_losses, row_stride


def _distill(
    losses: Callable[..., None],  # `rows.row_losses` or another of its signature
    student: Head,
    teacher: Head | None,
    targets: Targets,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, CE and D per row, dh, dw, db: see `eager.distill_rows`, whose conventions hold."""
    acc, hs, ws, vocab = dtype_of(student, teacher), student.h, student.w, options.vocab
    if acc != torch.float32:
        raise TypeError("backend: 'triton' computes in fp32, got fp64 inputs; use backend='eager'")
    if targets.labels is None or targets.ce_weight is None:
        targets = replace(targets, labels=None, ce_weight=None)
    if teacher is None or targets.kd_weight is None:
        teacher, targets = None, replace(targets, kd_weight=None)
    eager.check_labels(targets.labels, vocab, targets.ignore_index)
    n, diagnostics = hs.shape[0], options.diagnostics
    if losses is not row_losses and diagnostics is not None:
        raise ValueError(
            "diagnostics: the row kernel of backend 'cuda' has none; backend='triton' has"
        )
    dead = eager.dead_rows(hs, slice(0, n), targets) if options.want_dw else None
    grads = products.Gradients(hs, ws, acc, *options.wants, options.into)
    apart = grads.wanted and hs.dtype == ws.dtype == torch.bfloat16
    fold = max(options.fold, options.chunk) if apart else options.chunk

    ce, kd = (torch.zeros(n, dtype=acc, device=hs.device) for _ in range(2))
    seen = None if diagnostics is None else torch.zeros(n, 3, dtype=acc, device=hs.device)
    copies = 2 if options.beside else 1

    def blocks(rows: int, dtype: torch.dtype) -> list[Tensor]:
        shape = min(rows, n), row_stride(vocab)
        return [torch.empty(shape, dtype=dtype, device=hs.device) for _ in range(copies)]

    blocks_s = blocks(options.chunk, acc)
    blocks_t = [] if teacher is None else blocks(options.chunk, acc)
    blocks_dz = blocks_s
    if inside := apart and losses is not row_losses and fold == options.chunk:
        blocks_dz = [block.view(torch.bfloat16) for block in blocks_s]
    elif apart:
        blocks_dz = blocks(fold, torch.bfloat16)
    due: list[Callable[[], None]] = []  # a fold, where its rows are launched
    with Lanes(hs.device, options.beside) as lanes:
        for step, (rows, folded) in enumerate(_steps(n, options.chunk, fold)):
            this, turn = step % copies, folded.start // fold % copies
            logits, gradient = ("logits", this), ("dz" if apart and not inside else "logits", turn)
            if copies == 1:
                _settle(due)
            with lanes.launching(PRODUCTS, logits):
                z_s = _logits(blocks_s[this], hs[rows], ws, vocab)
                z_t = None
                if teacher is not None:
                    z_t = _logits(blocks_t[this], teacher.h[rows], teacher.w, vocab)
            _settle(due)
            dz = blocks_dz[turn][: folded.stop - folded.start, :vocab]
            part = slice(rows.start - folded.start, rows.stop - folded.start)
            with lanes.launching(ROWS, logits, gradient):
                losses(
                    z_s, z_t, student.b, None if teacher is None else teacher.b,
                    *(_of(x, rows) for x in (targets.labels, targets.ce_weight, targets.kd_weight)),
                    ce[rows], kd[rows], targets.divergence.name, targets.divergence.param,
                    targets.temperature, student.cap, 0.0 if teacher is None else teacher.cap,
                    targets.ignore_index, dz[part] if grads.wanted else None, seen=_of(seen, rows),
                    standardize=targets.standardize,
                )  # fmt: skip
            if grads.wanted and rows.stop == folded.stop:
                add = functools.partial(grads.add, folded, dz, dead=_of(dead, folded))
                due.append(functools.partial(_fold, lanes, gradient, add))
        _settle(due)
    if diagnostics is not None and seen is not None:
        diagnostics.copy_(seen.mT)
    loss = torch.zeros((), dtype=torch.float64, device=hs.device)
    if targets.labels is not None and targets.ce_weight is not None:
        loss += _weighted_sum(targets.ce_weight, ce, targets.labels != targets.ignore_index)
    if targets.kd_weight is not None:
        loss += _weighted_sum(targets.kd_weight, kd)
    return loss.to(acc), ce, kd, *grads.result()


def _steps(n: int, chunk: int, fold: int) -> Iterator[tuple[slice, slice]]:
    """The rows of every chunk, and those that they are folded with."""
    for folded in products.chunks(n, fold):
        for part in products.chunks(folded.stop - folded.start, chunk):
            yield slice(folded.start + part.start, folded.start + part.stop), folded


def _settle(due: list[Callable[[], None]]) -> None:
    while due:
        due.pop()()


def _fold(lanes: Lanes, block: tuple[str, int], add: Callable[[], None]) -> None:
    with lanes.launching(PRODUCTS, block):
        add()


def _cluster_losses(
    z_s: Tensor,  # (C, V) fp32
    z_t: Tensor | None,  # (C, V) fp32
    b_s: Tensor | None,  # (≥V,)
    b_t: Tensor | None,  # (≥V,)
    labels: Tensor | None,  # (C,)
    ce_weight: Tensor | None,  # (C,)
    kd_weight: Tensor | None,  # (C,)
    ce: Tensor,  # (C,)
    kd: Tensor,  # (C,)
    divergence: str,
    param: float,
    temperature: float,
    cap_s: float,
    cap_t: float,
    ignore_index: int,
    dz: Tensor | None,  # (C, V) fp32 or bf16
    seen: Tensor | None,
    standardize: bool,
) -> None:
    """`rows.row_losses` by the CUDA kernel that reads a row once."""
    assert seen is None

    def broken(z: Tensor | None, cap: float) -> Tensor | None:
        # every product of a hidden state that is not finite is ±inf or NaN, so one column tells
        return ~z[:, 0].isfinite() if z is not None and cap else None

    terms = cuda.rows_(
        z_s, z_t, b_s, b_t, labels,
        None if ce_weight is None else ce_weight.float(),
        None if kd_weight is None else kd_weight.float(),
        broken(z_s, cap_s), broken(z_t, cap_t), divergence, param, temperature, cap_s, cap_t,
        ignore_index, dz, standardize=standardize,
    )  # fmt: skip
    ce.copy_(terms[0])
    kd.copy_(terms[1])


#: With Triton's row kernel, and with the CUDA one: the arguments of `eager.distill_rows`.
distill_rows = functools.partial(_distill, row_losses)
distill_rows_cuda = functools.partial(_distill, _cluster_losses)


def _logits(block: Tensor, h: Tensor, w: Tensor, vocab: int) -> Tensor:
    """h Wᵀ, (C, V), in the memory of `block`."""
    z = block[: h.shape[0], :vocab]
    products.product(h, w[:vocab].mT, z)
    return z


def _of(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def _weighted_sum(weight: Tensor, x: Tensor, used: Tensor | None = None) -> Tensor:
    """Σ weight · x in fp64; a weight of 0 silences whatever its row holds."""
    counts = weight != 0 if used is None else used & (weight != 0)
    return torch.where(counts, weight * x, 0).sum(dtype=torch.float64)
